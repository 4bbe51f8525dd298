"""Derivatives of gradients by differences, of gradients whose derivative is known."""

from __future__ import annotations

import pytest
import torch

from hesscli.hessian.differences.quotients import Quotients

V = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def test_a_smooth_gradient():
    found = Quotients(torch.float64)(lambda h: torch.sin(V * h) + h**4, 1.0)
    torch.testing.assert_close(found, V, rtol=1e-10, atol=0)


@pytest.mark.parametrize("holds", [True, False])
def test_steps_that_drown_in_rounding(holds):
    """The derivative is zero: no step agrees with its half, and the largest has the least of the rounding."""

    def gradient(h):
        return 1e-12 * torch.sin(1e9 * V * h)

    found = Quotients(torch.float64, holds)(gradient, 1.0)
    assert float(found.norm()) < 1e-7
    assert float((gradient(1e-7) - gradient(-1e-7)).norm()) / 2e-7 > 1e-6
