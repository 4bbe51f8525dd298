"""Hugging Face models: folders as `save_pretrained` writes them, against central differences."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Ran, read
from oracles import hessian_by_differences, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [2, 2, 9, 1, 0]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
Y = torch.tensor([0, 2, 1])
BERT = "transformers:AutoModelForSequenceClassification"


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=5, max_position_embeddings=6, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=150, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=5, max_position_embeddings=6,
        initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a data file."""
    bert().save_pretrained(tmp_path / "bert")
    np.savez(tmp_path / "d.npz", input_ids=IDS, attention_mask=MASK, labels=Y)
    return tmp_path


@pytest.mark.parametrize("arch", ["transformers:AutoModel", "timm:resnet18"])
def test_the_hub_is_never_asked(saved, arch):
    """The libraries decide that when they are imported."""
    pytest.importorskip(arch.partition(":")[0])
    code = """
import sys
from hesscli.files.models.architectures import build
build(sys.argv[1], {}, {}, "bert")
from huggingface_hub.constants import HF_HUB_OFFLINE
sys.exit(not HF_HUB_OFFLINE)
"""
    left = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", code, arch], env=left, cwd=saved, check=True)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def rms_norm(part: nn.Module, x: Tensor) -> Tensor:
    return part.weight * x / (x.square().mean(-1, keepdim=True) + part.variance_epsilon).sqrt()


def differences(model: nn.Module, loss: Callable[..., Tensor], names: list[str]) -> Tensor:
    wrapped = Logits(model).double()
    return hessian_by_differences(wrapped, loss, (IDS, MASK), Y, [f"model.{n}" for n in names])


def test_bert(cli: Callable[..., Ran], saved: Path) -> None:
    some = ["bert.encoder.layer.0.attention.self.*", "classifier.*", "*LayerNorm.weight"]
    words = [word for glob in some for word in ("--params", glob)]
    ran = cli(
        "compute", "bert", "d.npz", "--arch", BERT, "--dtype", "float64", "-b", "full", *words
    )
    assert ran.code == 0, ran.stderr
    said = "input_ids (int64 [3, 5]), attention_mask (int64 [3, 5]), inferred from what the model"
    assert any(said in note for note in ran.notes)
    document, found = read(saved / "hessian.safetensors")
    names = [p["name"] for p in document["parameters"]]
    assert len(names) > 8
    expected = differences(bert(), F.cross_entropy, names)
    assert relative_error(found["hessian"], expected) < 1e-7


def test_a_model_that_returns_its_loss(cli: Callable[..., Ran], saved: Path) -> None:
    words = ("--dtype", "float64", "--params", "classifier.*", "-b", "full")
    names = ["--inputs", "attention_mask", "--inputs", "input_ids"]
    ran = cli("compute", "bert", "d.npz", "--arch", BERT, *words, *names, "-o", "logits")
    assert "inputs are passed by name: attention_mask, input_ids" in ran.notes
    ran = cli("compute", "bert", "d.npz", "--arch", BERT, *words, "--loss", "output", "-o", "loss")
    assert ran.code == 0, ran.stderr
    assert "inputs are passed by name: input_ids, attention_mask, labels" in ran.notes
    left, right = (read(saved / file)[1]["hessian"] for file in ("logits", "loss"))
    torch.testing.assert_close(left, right)


def test_shards_and_tied_weights_in_bfloat16(cli: Callable[..., Ran], saved: Path) -> None:
    model = llama().bfloat16()
    model.save_pretrained(saved / "llama", max_shard_size="1KB")
    assert (saved / "llama" / "model.safetensors.index.json").exists()
    np.savez(saved / "lm.npz", input_ids=IDS, y=IDS.roll(-1, 1))
    (saved / "loss_of_test.py").write_text(
        "import torch.nn.functional as F\n"
        "def loss(output, target):\n"
        "    return F.cross_entropy(output.transpose(1, 2), target, reduction='none')\n"
    )
    arch = ("--arch", "transformers:LlamaForCausalLM", "--dtype", "float64")
    params = ("--params", "*self_attn*", "--params", "*norm*")
    loss = ("--loss", "loss_of_test:loss", "-b", "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(saved))
        ran = cli("compute", "llama", "lm.npz", *arch, *params, *loss)
    assert ran.code == 0, ran.stderr
    assert any(note.startswith("weights stored in bfloat16") for note in ran.notes)
    assert "what the model itself computes in float32 is computed in float64" in ran.notes
    document, found = read(saved / "hessian.safetensors")
    names = [p["name"] for p in document["parameters"]]

    def mean(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), target)

    # transformers normalises, and takes the softmax, in float32: here by definition, in float64
    model.set_attn_implementation("sdpa")
    for part in model.modules():
        if type(part).__name__ == "LlamaRMSNorm":
            part.forward = partial(rms_norm, part)
    wrapped = Logits(model.float()).double()
    chosen = [f"model.{name}" for name in names]
    every = torch.ones_like(IDS)
    expected = hessian_by_differences(wrapped, mean, (IDS, every), IDS.roll(-1, 1), chosen)
    assert relative_error(found["hessian"], expected) < 1e-7


def deit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.DeiTConfig(
        image_size=8, patch_size=4, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=5, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return transformers.DeiTForImageClassification(config).eval()


DEIT = ("--arch", "transformers:DeiTForImageClassification")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_files_with_the_names_of_older_versions(
    cli: Callable[..., Ran], tmp_path: Path, dtype: torch.dtype
) -> None:
    """`save_pretrained` writes the names that the model had at first, whatever its modules are called today."""
    model = deit().to(dtype)
    model.save_pretrained("deit")
    with safe_open(tmp_path / "deit" / "model.safetensors", "pt") as file:
        assert set(file.keys()) != set(model.state_dict())
    x = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    np.savez("d.npz", x=x, y=Y[:2])
    ran = cli("compute", "deit", "d.npz", *DEIT, "-b", "full", "-p", "classifier*", "-p", "*norm*",
              "--dtype", "float64")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert "names: as transformers maps them to those of this version" in ran.notes
    narrow = "weights stored in bfloat16, and widened"
    assert (narrow in ran.notes) == (dtype is torch.bfloat16)
    document, found = read(tmp_path / "hessian.safetensors")
    names = [p["name"] for p in document["parameters"]]
    assert len(names) == 8

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    chosen = [f"model.{name}" for name in names]
    expected = hessian_by_differences(Direct(), F.cross_entropy, (x.double(),), Y[:2], chosen)
    assert relative_error(found["hessian"], expected) < 1e-7


def test_what_older_names_lack(cli: Callable[..., Ran], tmp_path: Path) -> None:
    deit().save_pretrained("deit")
    np.savez("d.npz", x=np.zeros((2, 3, 8, 8), np.float32), y=Y[:2])
    ran = cli("compute", "deit", "d.npz", *DEIT, "--arch-arg", "num_labels=4")
    shape = "weights do not fit the architecture: of another shape: classifier.weight [3, 4] (the"
    assert shape in ran.fails(4)
    path = tmp_path / "deit" / "model.safetensors"
    weights = load_file(path)
    weights["spare"] = weights.pop("classifier.bias")
    save_file(weights, path)
    ran = cli("compute", "deit", "d.npz", *DEIT)
    assert "architecture: missing: classifier.bias; unexpected: spare" in ran.fails(4)


def test_names_that_cannot_be_mapped(
    cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("quantised in a way of its own")

    deit().save_pretrained("deit")
    np.savez("d.npz", x=np.zeros((2, 3, 8, 8), np.float32), y=Y[:2])
    monkeypatch.setattr(transformers.DeiTForImageClassification, "from_pretrained", fails)
    ran = cli("compute", "deit", "d.npz", *DEIT)
    assert "weights do not fit the architecture: missing: deit." in ran.fails(4)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_language_model(cli: Callable[..., Ran], saved: Path, left: bool) -> None:
    """Positions, masks, a cache and tied words, with class scores along the last axis.

    Padded at the left, words see nothing: the attention that transformers takes by default gives zero there.
    """
    ids, mask = (IDS.flip(1), MASK.flip(1)) if left else (IDS, MASK)
    y = ids.roll(-1, 1)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=6, initializer_range=0.5,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained("gpt2")
    np.savez("lm.npz", input_ids=ids, attention_mask=mask, y=y)
    arch = ("--arch", "transformers:GPT2LMHeadModel", "--dtype", "float64")
    ran = cli("compute", "gpt2", "lm.npz", *arch, "-b", "elements")
    assert ran.code == 0, ran.stderr
    assert "classes: 11, along the last axis of the model's output" in ran.notes
    some = (
        "-p",
        "*wpe*",
        "-p",
        "*c_fc*",
        "-p",
        "*c_attn*",
        "--method",
        "preactivation",
        "-o",
        "fast",
    )
    fast = cli("compute", "gpt2", "lm.npz", *arch, "-b", "elements", *some)
    assert fast.code == 0, fast.stderr
    document, found = read(saved / "hessian.safetensors")

    def mean(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    names = [p["name"] for p in document["parameters"]]
    wrapped, chosen = Logits(model).double(), [f"model.{name}" for name in names]
    truth = hessian_by_differences(wrapped, mean, (ids, mask), y, chosen)
    for name, part in read(saved / "fast")[1].items():
        torch.testing.assert_close(part, found[name])
    together = torch.cat([found[name].flatten() for name in names])
    assert relative_error(together, truth.diagonal()) < 1e-7


def test_the_hint_names_the_class(cli: Callable[..., Ran], saved: Path) -> None:
    ran = cli("compute", "bert", "d.npz")
    assert "bert: a state dict holds weights but no architecture" in ran.fails(3)
    assert (
        ran.hint == "hesscli compute bert d.npz --arch transformers:BertForSequenceClassification"
    )
    ran = cli("compute", "bert", "d.npz", "--arch", "transformers:NoSuchModel")
    assert "transformers has no model of this name" in ran.fails(2)
    assert "--arch transformers:BertForSequenceClassification" in ran.hint


def test_code_in_the_folder_is_not_run(cli: Callable[..., Ran], saved: Path) -> None:
    """A configuration may name Python files of its own, for `trust_remote_code`."""
    import json

    path = saved / "bert" / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    path.write_text(json.dumps(config))
    (saved / "bert" / "code.py").write_text("open('ran', 'w')\n")
    cli("compute", "bert", "d.npz", "--arch", BERT).fails(2)
    assert not (saved / "ran").exists()


def test_arguments_change_the_configuration(cli: Callable[..., Ran], saved: Path) -> None:
    ran = cli("compute", "bert", "d.npz", "--arch", BERT, "--arch-arg", "num_labels=4")
    assert "classifier.weight [3, 4] (the architecture has [4, 4])" in ran.fails(4)
