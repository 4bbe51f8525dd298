"""Losses that PyTorch cannot differentiate twice, or not to all digits, as formulas, with its own signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesscli.hessian.aten.formulas import log_sigmoid

_NEVER = -1e30  # log of a probability of zero, without the NaN that differences of infinities have


def binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """-w (pos_weight y log s(x) + (1 - y) log(1 - s(x))), s being the sigmoid."""
    positive = target if pos_weight is None else pos_weight * target
    terms = -(positive * log_sigmoid(x) + (1 - target) * log_sigmoid(-x))
    if weight is not None:
        terms = terms * weight
    return _reduced(terms, reduction)


def multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """sum_j w_y max(0, margin - x_y + x_j)^p / C over j other than y."""
    y = target.reshape(-1, 1)
    rows = x.reshape(len(y), -1)
    others = torch.ones_like(rows, dtype=torch.bool).scatter(1, y, False)
    excess = torch.relu(margin - rows.gather(1, y) + rows)
    terms = (excess if p == 1 else excess * excess).where(others, 0).sum(1) / rows.shape[1]
    if weight is not None:
        terms = terms * weight[y.squeeze(1)]
    return _reduced(terms.reshape(target.shape), reduction)


def multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """sum_ij max(0, 1 - x_j + x_i) / C over classes j that a target lists before its first -1, and i that it does not;
    and which classes are listed.
    """
    lists, rows = target.reshape(-1, target.shape[-1]), x.reshape(-1, x.shape[-1])
    listed = (lists < 0).cumsum(1) == 0
    places = lists.clamp(min=0)
    among = torch.zeros_like(rows).scatter_add(1, places, listed.to(x.dtype)) > 0
    excess = torch.relu(1 - rows.gather(1, places).unsqueeze(2) + rows.unsqueeze(1))
    counted = listed.unsqueeze(2) & ~among.unsqueeze(1)
    terms = excess.where(counted, 0).sum((1, 2)) / rows.shape[1]
    return _reduced(terms.reshape(x.shape[:-1]), reduction), among.to(x.dtype).reshape(target.shape)


def _reduced(terms: Tensor, reduction: int) -> Tensor:
    return terms.mean() if reduction == 1 else terms.sum() if reduction == 2 else terms


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Sequence[int] | Tensor,
    target_lengths: Sequence[int] | Tensor,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """-log sum_paths prod_t p_t: the forward algorithm over labels with blanks between them.

    Its gradient is PyTorch's, which takes `log_probs` for those of a softmax: at others it is that of the loss plus all
    probabilities.

    Args:
        log_probs: [T, N, C].
        targets: [N, S], or all in a row.
        input_lengths: T at most, [N].
        target_lengths: S at most, [N].
        blank: the class that is no label.
        zero_infinity: `ctc_loss` itself makes zero of what is infinite.

    Returns:
        the loss [N], and nothing that PyTorch keeps for its backward pass.
    """
    lengths, durations = (
        torch.as_tensor(counts, device=log_probs.device).long()
        for counts in (target_lengths, input_lengths)
    )
    labels, skips = _with_blanks(targets.to(log_probs.device), lengths, blank)
    each = log_probs.masked_fill(log_probs == -torch.inf, _NEVER)
    each = each.gather(2, labels.expand(len(each), *labels.shape))
    never = each.new_full((len(labels), 2), _NEVER)
    paths = torch.full_like(labels, _NEVER, dtype=each.dtype).index_fill(1, labels.new_zeros(1), 0)
    found = [paths]  # log of the probability of all ways to each label
    for step in each:
        before = torch.cat([never[:, :1], paths[:, :-1]], 1)
        skipped = torch.cat([never, paths[:, :-2]], 1)[:, : paths.shape[1]].where(skips, _NEVER)
        paths = torch.stack([paths, before, skipped]).logsumexp(0) + step
        found.append(paths)
    places = durations.reshape(1, -1, 1).expand(1, *labels.shape)
    ways = torch.stack(found).gather(0, places).squeeze(0)
    on_blank = ways.gather(1, 2 * lengths.unsqueeze(1))
    on_label = ways.gather(1, (2 * lengths.unsqueeze(1) - 1).clamp(min=0))
    on_label = on_label.where(lengths.unsqueeze(1) > 0, _NEVER)
    loss = -torch.cat([on_blank, on_label], 1).logsumexp(1)
    times = torch.arange(len(each), device=loss.device).unsqueeze(1)
    total = log_probs.exp().sum(2).where(times < durations, 0).sum(0)
    impossible = loss > -_NEVER / 2
    loss = (loss + (total - total.detach())).masked_fill(impossible, torch.inf)
    return loss, loss.new_empty(0)


def _with_blanks(targets: Tensor, lengths: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Labels with blanks around them [N, 2 S + 1], and which of them may follow the last but one."""
    if targets.dim() == 1:
        starts = (lengths.cumsum(0) - lengths).unsqueeze(1)
        places = starts + torch.arange(int(lengths.max()), device=targets.device)
        targets = targets[places.clamp(max=max(0, len(targets) - 1))]
    there = torch.arange(targets.shape[1], device=targets.device) < lengths.unsqueeze(1)
    targets = targets.long().where(there, blank)
    around = torch.full_like(targets, blank)
    first = torch.full_like(lengths.unsqueeze(1), blank)
    labels = torch.cat([first, torch.stack([targets, around], 2).flatten(1)], 1)
    skips = labels != blank
    skips[:, 2:] &= labels[:, 2:] != labels[:, :-2]
    return labels, skips
