"""Sums over samples of Kronecker products: the Hessian blocks of linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from hesscli.hessian.chunk_sizes import chunk_sizes, grouped
from hesscli.hessian.layout import Span
from hesscli.hessian.routes.sums import product
from hesscli.hessian.workers import side_by_side, workers

_WIDTH = 32  # columns of a that are multiplied together
FEWEST = 128  # samples multiplied at once; a product over fewer runs far below the machine's rate


def add_kronecker_rows(out: Tensor, s: Tensor, a: Tensor) -> None:
    """out[(p, q), (i, j)] += sum_b s[p, b, i] a[b, q] a[b, j], for the first rows p and the columns i >= p: out is
    [rows m, n m], s [rows, B, n], and a [B, m].

    The matrix is symmetric in (p, i), and in (q, j) for fixed p and i. So only the columns i >= p of each chunk of rows
    are filled (`mirror_` does the rest), and only products with q <= j, by groups of `_WIDTH`, are computed: a
    quarter of all, and a little more.
    """
    rows, _, n = s.shape
    m = a.shape[1]
    groups = -(-m // _WIDTH)
    edges = [(g * m // groups, (g + 1) * m // groups) for g in range(groups)]
    usual = chunk_sizes(out.device)
    step = max(FEWEST, usual.pairs // (m * max(stop - q for q, stop in edges)))
    target = out.unflatten(1, (n, m)).unflatten(0, (rows, m))
    for b in range(0, len(a), step):
        mine = slice(b, b + step)
        # Of a, to be multiplied with all at a time.
        columns = min(usual.groups, usual.pairs) // (len(a[mine]) * m)
        for together in grouped(edges, lambda edge: edge[1] - edge[0], columns):
            _add_products(target, s[:, mine], a[mine], together, usual.product)


def _add_products(target: Tensor, s: Tensor, a: Tensor, edges: Sequence[Span], most: int) -> None:
    """The share of some samples, and of these columns of a: target [rows, m, n, m]."""
    rows, samples, n = s.shape
    m = a.shape[1]
    pairs = [(a[:, q:stop, None] * a[:, None, q:]).flatten(1) for q, stop in edges]
    widest = max(pair.shape[1] for pair in pairs)
    chunks: list[range] = []
    start = 0
    while start < rows:
        stop = min(rows, start + max(1, most // ((n - start) * widest)))
        chunks.append(range(start, stop))
        start = stop
    count = workers(target.device, len(chunks))
    buffers = [a.new_empty(max(most, n * widest)) for _ in range(count)]

    def add(worker: int, mine: Iterator[range]) -> None:
        for chunk in mine:
            p, i = slice(chunk.start, chunk.stop), slice(chunk.start, n)
            part = s[p, :, i].transpose(1, 2).reshape(-1, samples)
            for (q, stop), pair in zip(edges, pairs, strict=True):
                flat = buffers[worker][: part.shape[0] * pair.shape[1]].view(-1, pair.shape[1])
                sums = product(part, pair, out=flat).view(len(chunk), -1, stop - q, m - q)
                target[p, q:stop, i, q:] += sums.permute(0, 2, 1, 3)
                if stop < m:
                    target[p, stop:, i, q:stop] += sums[..., stop - q :].permute(0, 3, 1, 2)

    side_by_side(chunks, count, add)
