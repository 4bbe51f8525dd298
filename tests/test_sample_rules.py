"""Operators that keep the samples apart, and that mix them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import labels, normal
from oracles import hessian, relative_error
from problems import problem_of
from torch import Tensor, nn
from torch.nn import functional as F

import hesscli
from hesscli.hessian.proofs.analysis import Analyses


def square(z: Tensor) -> Tensor:
    return z.view(-1, 3, 3)


def positive_definite(z: Tensor) -> Tensor:
    return square(z) @ square(z).mT + torch.eye(3, dtype=z.dtype)


OF_SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky": lambda z: torch.linalg.cholesky(positive_definite(z)),
    "inverse": lambda z: torch.linalg.inv(positive_definite(z)),
    "solve": lambda z: torch.linalg.solve(positive_definite(z), square(z)),
    "solve-vectors": lambda z: torch.linalg.solve(positive_definite(z), z[:, :3]),
    "solve-one-for-all": lambda z: torch.linalg.solve(positive_definite(torch.ones(9, dtype=z.dtype)), square(z)),
    "triangular": lambda z: torch.linalg.solve_triangular(positive_definite(z).tril(), square(z), upper=False),
    "cholesky-solve": lambda z: torch.cholesky_solve(square(z), torch.linalg.cholesky(positive_definite(z))),
    "determinant": lambda z: torch.linalg.det(positive_definite(z)),
    "log-determinant": lambda z: torch.linalg.slogdet(positive_definite(z))[1],
    "eigenvalues": lambda z: torch.linalg.eigh(positive_definite(z))[0],
    "singular-values": lambda z: torch.linalg.svd(square(z))[1],
    "qr": lambda z: torch.linalg.qr(positive_definite(z))[1],
    "exponential": lambda z: torch.matrix_exp(0.3 * square(z)),
    "grid": lambda z: F.grid_sample(
        z[:, :4].view(-1, 1, 2, 2), z[:, 4:8].reshape(-1, 1, 2, 2).tanh(), align_corners=False
    ),
    "affine-grid": lambda z: F.affine_grid(z[:, :6].view(-1, 2, 3), [len(z), 1, 2, 2], False),
    "trilinear": lambda z: F.interpolate(
        z[:, :8].view(-1, 1, 2, 2, 2), scale_factor=2, mode="trilinear"
    ),
    "nearest-exact": lambda z: F.interpolate(
        z[:, :4].view(-1, 1, 2, 2), scale_factor=2, mode="nearest-exact"
    ),
    "antialiased": lambda z: F.interpolate(
        z[:, :8].view(-1, 1, 2, 4), size=(2, 2), mode="bilinear", antialias=True
    ),
    "heaviside": lambda z: z * torch.heaviside(z.detach(), torch.ones(1, dtype=z.dtype)),
    "sign": lambda z: z.square() * torch.sgn(z),
    "times-powers": lambda z: torch.ldexp(z, torch.arange(9)),
    "gamma": lambda z: torch.igamma(torch.arange(1.0, 10, dtype=z.dtype), z.square()),
    "polygamma": lambda z: torch.polygamma(1, z.square() + 1),
    "without-nan": lambda z: torch.nansum(square(z).tanh(), 2),
    "nonzero-counts": lambda z: square(z).sum(2) * torch.count_nonzero(square(z) > 0, dim=2),
    "buckets": lambda z: z * torch.bucketize(z, torch.linspace(-1, 1, 5, dtype=z.dtype)),
    "mode": lambda z: z - z.round().mode(1, keepdim=True).values,
    "many-gammas": lambda z: torch.mvlgamma(z.square() + 2, 2),
    "bessel": lambda z: z * torch.special.bessel_j0(z.detach()),
    "rotated": lambda z: torch.rot90(square(z), 1, [1, 2]),
    "cross-product": lambda z: torch.linalg.cross(square(z), square(z.flip(1)).square()),
    "found-in-table": lambda z: z * torch.searchsorted(torch.linspace(-1, 1, 5, dtype=z.dtype), z.detach()),
    "found-in-own-table": lambda z: z[:, 5:] * torch.searchsorted(z[:, :5].detach().sort(1).values, z[:, 5:].detach()),
    "is-in-table": lambda z: z * torch.isin(z.round(), torch.tensor([0.0, 1], dtype=z.dtype)),
    "copied-part": lambda z: z.narrow_copy(1, 2, 5),
    "unpooled": lambda z: F.max_unpool2d(
        *F.max_pool2d(z[:, :8].reshape(-1, 1, 2, 4), 2, return_indices=True), 2
    ),
    "reflected": lambda z: F.pad(z.unsqueeze(0), (2, 2), mode="reflect")[0],
    "pooled-alone": lambda z: F.max_pool2d(z[:, :8].reshape(1, -1, 2, 4), 2)[0],
    "distances": lambda z: torch.cdist(z, torch.linspace(-1, 1, 18, dtype=z.dtype).view(2, 9)),
    "distances-1": lambda z: torch.cdist(torch.ones(2, 3, dtype=z.dtype), square(z), p=1),
    "distances-inf": lambda z: torch.cdist(square(z), square(z.roll(1, 1)), p=torch.inf),
    "distances-itself": lambda z: torch.cdist(square(z), square(z)),
    "distances-by-products": lambda z: torch.cdist(
        z, torch.linspace(-1, 1, 270, dtype=z.dtype).view(30, 9)
    ),
    "exclusive-or": lambda z: z[:, :4] * ((z[:, :4] > 0) ^ (z[:, 4:8] > 0)),
    "copysign": lambda z: torch.copysign(z[:, :4], z[:, 4:8]),
    "logaddexp2": lambda z: torch.logaddexp2(z[:, :4], z[:, 4:8]),
    "log-normal": torch.special.log_ndtr,
    "fourier": lambda z: torch.fft.fft(z, dim=1).real,
    "fourier-filter": lambda z: torch.fft.irfft(torch.fft.rfft(z) * torch.tensor([1, 2j, 0.5, 1j, 0]), n=9),
    "fourier-power": lambda z: torch.fft.rfft(z, norm="ortho").abs(),
    "fourier-plane": lambda z: torch.view_as_real(torch.fft.fft2(square(z))).flatten(2).tanh(),
    "spectrogram": lambda z: torch.stft(
        z, 4, 2, window=torch.tensor([0.3, 1, 0.7, 0.2], dtype=z.dtype), return_complex=True
    ).abs(),
    "from-a-spectrogram": lambda z: torch.istft(
        torch.view_as_complex(z.tanh().repeat(1, 2).view(-1, 3, 3, 2)), 4, 2, window=torch.ones(4, dtype=z.dtype)
    ),
    "polar": lambda z: torch.polar(z[:, :4].exp(), z[:, 4:8]).imag,
    "own-kernels": lambda z: F.conv1d(
        z.view(1, -1, 3), z[:, :6].tanh().reshape(-1, 3, 2), groups=len(z)
    ).view(len(z), -1),
    "own-kernels-transposed": lambda z: F.conv_transpose1d(
        z.view(1, -1, 3), z[:, :6].tanh().reshape(-1, 1, 2), z[:, 0] ** 2, groups=len(z)
    ).view(len(z), -1),
    "own-kernels-on-a-constant": lambda z: F.conv1d(
        torch.ones(1, 3 * len(z), 4, dtype=z.dtype), z.view(-1, 1, 3), groups=3 * len(z)
    ).view(len(z), -1),
    "own-groups": lambda z: F.conv1d(
        z.view(1, -1, 3), torch.linspace(-1, 1, 6, dtype=z.dtype).view(1, 3, 2).repeat(len(z), 1, 1),
        groups=len(z),
    ).view(len(z), -1),
    "bounded-norm": lambda z: torch.renorm(z, 2, 0, 0.5),
    "complex": lambda z: (
        torch.complex(z[:, :4], z[:, 4:8]).conj() * torch.view_as_complex(z[:, :8].clone().view(-1, 4, 2))
    ).real,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_functions_of_each_sample_alone(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 9), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = OF_SAMPLES[name](self.a(x)).reshape(len(x), -1)
            by_place = z * torch.arange(1.0, 1 + z.shape[1], dtype=z.dtype)
            return self.b(torch.tanh(torch.stack([z.sum(1), by_place.sum(1)], 1)))

    torch.manual_seed(0)
    model = Net().double()
    x, y = normal(6, 3), labels(2, 6)
    try:
        truth = hessian(model, F.cross_entropy, (x,), y)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        pytest.skip(f"with this PyTorch: {error}")  # grid_sample before 2.12
    found = hesscli.compute(
        model, (x, y), blocks="full", method="preactivation", framework="torch"
    )  # fmt: skip
    assert relative_error(found.matrix(), truth) < 1e-9


PREPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.t().contiguous().t(),
    "flatten": lambda x: x.unsqueeze(1).flatten(1),
    "imag": lambda x: torch.complex(x, x).imag,
    "narrow": lambda x: x.narrow(1, 0, 3),
    "positive": torch.positive,
    "real": lambda x: torch.complex(x, x).real,
    "relu6": F.relu6,
    "reshape": lambda x: x.reshape(6, 3),
    "resolve_conj": lambda x: torch.view_as_real(torch.complex(x, x).conj().resolve_conj())[..., 0],
    "selu": F.selu,
    "softmax": lambda x: x.softmax(1),
    "square": Tensor.square,
    "unflatten": lambda x: x.unflatten(1, (1, 3))[:, 0],
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 3, 1)[0].expand(6, 3),
}


@pytest.mark.parametrize("name", PREPARED)
def test_operators_that_inference_mode_does_not_take_apart(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                prepared = PREPARED[name](x)
            return self.a(prepared.clone())

    problem = problem_of(Net(), [normal(6, 3)], labels(2, 6), "cross-entropy")
    analysis = Analyses(problem).of(problem.batches[0])
    assert name in {call.name for call in analysis.tape.calls}
    assert analysis.uses.keys() == {"a.weight", "a.bias"}


@pytest.mark.parametrize("mixed", [
    lambda z: torch.linalg.solve(z[:6, :6] + 9 * torch.eye(6, dtype=z.dtype), z),
    lambda z: torch.linalg.cholesky(z @ z.T + torch.eye(6, dtype=z.dtype)),
    lambda z: torch.linalg.inv(z[:, :6] + 9 * torch.eye(6, dtype=z.dtype)),
    lambda z: torch.cdist(z, z),
    lambda z: torch.cdist(z, z, compute_mode="use_mm_for_euclid_dist"),
    lambda z: torch.rot90(z[:, :6], 1, [0, 1]),
    lambda z: torch.linalg.cross(z.view(3, 2, 9), z.exp().view(3, 2, 9), dim=0).view(6, 9),
    lambda z: F.pad(z[None], (0, 0, 1, 1), mode="reflect")[0, 1:-1],
    lambda z: torch.clamp(z, min=torch.linspace(-1, 1, 6, dtype=z.dtype)[:, None, None]).sum(1),
    lambda z: (z[:, :6, None] * z[:, None, :6]).diagonal(dim1=0, dim2=2),
    lambda z: z.T.diag_embed().sum(0),
    lambda z: z[torch.arange(6)[:, None], z[:, :6].argsort(1).T],
    lambda z: z.reshape(18, 3)[torch.arange(6)],
    lambda z: z[:, z.argsort(1)[:, 0]],
    lambda z: torch.searchsorted(z.detach().T.sort(1).values.contiguous(), z.detach().T.contiguous()).T * z,
    lambda z: torch.renorm(z, 2, 1, 0.5),
    lambda z: F.conv1d(z.T.reshape(1, 54, 1), z.view(6, 9, 1), groups=6).view(6, 1),
    lambda z: F.conv1d(z.view(1, 18, 3), z[:, :6].reshape(6, 6, 1), groups=3).view(6, 3),
    lambda z: F.conv1d(z.view(1, 18, 3), z.T.reshape(18, 3, 1), groups=6).view(6, 9),
    lambda z: F.conv1d(z.view(6, 3, 3), z[:2].view(6, 3, 1)).flatten(1),
    lambda z: torch.zeros_like(z).index_add(1, z.argsort(1)[:, 0], z[:, :6]),
])  # fmt: skip
def test_matrices_of_samples_mix_them(mixed: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 9)

        def forward(self, x: Tensor) -> Tensor:
            return mixed(self.a(x))

    torch.manual_seed(0)
    with pytest.raises(hesscli.HesscliError, match="may mix samples"):
        hesscli.compute(
            Net().double(), (normal(6, 3), normal(6, *mixed(torch.ones(6, 9).double()).shape[1:])),
            loss="mse", method="preactivation",
        )  # fmt: skip
