"""d^2 L / dz^2 of each site as a sum of terms with few rows, which pass linear layers one by one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hesscli.hessian.routes.output_hessian import OutputHessian

MOST_ROWS = 3  # times n: to multiply out S, and start anew from it, costs about as much as to push that many


class FactoredHessian:
    """S = L^T R + sum of V^T diag(w) V + diag(d), for each sample, to begin with Lambda."""

    def __init__(self, at_output: OutputHessian) -> None:
        rows, d = at_output.right, at_output.d
        if not rows.shape[1] and d is not None and bool((d == d[0]).all()):
            at_output = at_output.of(slice(1))  # of a squared error, the same in all samples
        self._become(at_output)

    def _become(self, S: OutputHessian) -> None:
        self.right = S.right  # [B or 1, r, n], as the left ones
        n = S.right.shape[2]
        self.left = S.right.new_ones(n).diag().unsqueeze(0) if S.left is None else S.left
        self.d = S.d  # [B or 1, n]
        self.weighted: list[tuple[Tensor, Tensor]] = []  # V [B or 1, r, n], w [B or 1, r]

    def scale(self, g: Tensor) -> None:
        """S <- diag(g) S diag(g), g [B, n]."""
        g = g.unsqueeze(1)
        self._replace(lambda rows: rows * g)
        if self.d is not None:
            self.d = self.d * g.squeeze(1) ** 2

    def _replace(self, by: Callable[[Tensor], Tensor]) -> None:
        """Puts something else in the place of all rows, one term after the other: both are never held of all."""
        self.left = by(self.left)
        self.right = by(self.right)
        for place, (v, w) in enumerate(self.weighted):
            self.weighted[place] = by(v), w

    def add_diagonal(self, d: Tensor) -> None:
        self.d = d if self.d is None else self.d + d

    def linear(self, matrix: Tensor, last: bool) -> None:
        """S <- M S M^T with M [n', n]; the last time, only the diagonal of that."""
        m = matrix.T.contiguous()  # [n, n']
        if 2 * self.left.shape[1] + sum(v.shape[1] for v, _ in self.weighted) > MOST_ROWS * len(m):
            self._multiply_out()
        if last:
            self._become(OutputHessian.elementwise(self.diagonal(m)))
            return
        self._replace(lambda rows: rows @ m)
        if self.d is not None:
            shared = len(self.right) == len(self.d) == 1
            self.weighted.append((m.unsqueeze(0), self.d))
            self.d = None
            if shared and len(m) > 2 * m.shape[1]:  # fewer rows then, once for all samples
                self._multiply_out()

    def diagonal(self, m: Tensor | None = None) -> Tensor:
        """diag(S), [B or 1, n]; or, with m = M^T, diag(M S M^T), [B or 1, n']."""
        left, right = (self.left, self.right) if m is None else (self.left @ m, self.right @ m)
        total = (left * right).sum(1)
        if self.d is not None:
            total = total + (self.d if m is None else self.d @ (m * m))
        for v, w in self.weighted:
            if m is None:
                total = total + _weighted_squares(v, w)
                continue
            for some, weights in zip(v.split(64, 1), w.split(64, 1), strict=True):  # [B, 64, n']
                total = total + _weighted_squares(some @ m, weights)
        return total

    def _multiply_out(self) -> None:
        S = self.left.transpose(1, 2) @ self.right
        for v, w in self.weighted:
            S += (v * w.unsqueeze(2)).transpose(1, 2) @ v
        if self.d is not None:
            S.diagonal(dim1=1, dim2=2).add_(self.d)
        self._become(OutputHessian(None, S))


def _weighted_squares(v: Tensor, w: Tensor) -> Tensor:
    """diag(V^T diag(w) V): V [B or 1, r, n], w [B or 1, r] -> [B or 1, n]."""
    squares = v * v
    return w @ squares[0] if len(v) == 1 else (w.unsqueeze(1) @ squares).squeeze(1)
