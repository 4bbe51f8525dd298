"""Lanczos, trace and density on matrices whose spectrum is known."""

from __future__ import annotations

import signal
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from hesscli.errors import NumericalError
from hesscli.spectrum.dense import dense
from hesscli.spectrum.density import exact
from hesscli.spectrum.eigen import WHICH
from hesscli.spectrum.finite import NotFinite, norm
from hesscli.spectrum.hiding import Hiding
from hesscli.spectrum.interrupts import deferred_interrupt
from hesscli.spectrum.lanczos import CHAIN, Lanczos
from hesscli.spectrum.quadrature import lanczos_quadrature
from hesscli.spectrum.statistics import of_diagonal, of_matrix
from hesscli.spectrum.trace import Sketch, estimate, standard_error

DRAWN = np.random.default_rng(0)
SPECTRA = {
    "normal": DRAWN.standard_normal(900),
    "outliers": np.r_[0.1 * DRAWN.standard_normal(2000), 5, 4, 3, 3, 3, 2, 1, -3.5, -2],
    "triples": np.repeat(0.05 + DRAWN.random(250) ** 3, 3),
    "tenfold": np.repeat(0.05 + DRAWN.random(80) ** 2, 10),
    "double-behind-four": np.r_[DRAWN.random(2000), 1.3, 1.3, 1.4, 1.5],
    "zero": np.zeros(600),
    "identity": np.ones(600),
    "rank-3": np.r_[np.zeros(700), 3, 2, 1],
    "one": np.array([2.0]),
    "two": np.array([2.0, -1.0]),
    "thirty": DRAWN.standard_normal(30),
}


def rotated(values: np.ndarray, dtype: torch.dtype = torch.float64):
    """v -> W diag(values) W^T v, in its own kind of random basis: two reflections."""
    n = len(values)
    d = torch.from_numpy(values).to(dtype)
    generator = torch.Generator().manual_seed(5)
    mirrors = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2)]
    mirrors = [(m / m.norm()).to(dtype) for m in mirrors]

    def reflect(v: Tensor, order) -> Tensor:
        for m in order:
            v = v - 2 * m * (m @ v)
        return v

    return (lambda v: reflect(d * reflect(v, mirrors), mirrors[::-1])), d


def search(
    values,
    top,
    which,
    tolerance=1e-3,
    dtype=torch.float64,
    most=2000,
    seed=0,
    guess=None,
    **options,
):
    multiply, like = rotated(np.asarray(values, float), dtype)
    generator = torch.Generator().manual_seed(seed)
    guess = torch.zeros_like(like) if guess is None else guess
    search = Lanczos(multiply, len(values), top, which, tolerance, generator, guess, **options)
    return search.run(most), multiply


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues(name, which, dtype):
    values = SPECTRA[name]
    top = min(6, len(values))
    found, multiply = search(values, top, which, dtype=dtype)
    truth = values[WHICH[which](values)][:top]
    assert found.converged.all()
    scale = np.abs(values).max() or 1.0
    key = np.abs if which == "magnitude" else np.array
    assert (np.abs(key(found.values) - key(truth)) <= found.residuals + 1e-6 * scale).all()
    gram = found.vectors @ found.vectors.T
    assert torch.allclose(gram, torch.eye(top, dtype=dtype), atol=1e-5)
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        true = float((multiply(vector) - value * vector).norm())
        assert true <= 1.01 * residual + 4e-6 * scale
        assert residual <= max(1e-3 * abs(value), 2e-4 * scale)


@pytest.mark.parametrize("which", ["smallest", "both"])
@pytest.mark.parametrize("name", ["normal", "outliers", "identity", "zero", "two", "thirty"])
def test_the_other_end(name, which):
    values = SPECTRA[name]
    top = min(5, len(values))
    found, _ = search(values, top, which)
    truth = values[WHICH[which](values)][:top]
    assert found.converged.all()
    np.testing.assert_allclose(found.values, truth, atol=1e-5 * (np.abs(values).max() or 1))


def test_both_ends_are_shared_out():
    assert WHICH["both"](np.array([3.0, -5.0, 9.0, 0.0, 1.0])).tolist() == [2, 1, 0, 3, 4]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-8])
def test_tolerance(tolerance):
    found, multiply = search(SPECTRA["outliers"], 4, "largest", tolerance)
    assert (found.residuals <= tolerance * np.abs(found.values)).all()
    for value, vector in zip(found.values, found.vectors, strict=True):
        assert (multiply(vector) - value * vector).norm() <= tolerance * abs(value) * 1.01


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_squares_far_from_one(scale):
    found, _ = search(scale * SPECTRA["normal"], 3, "largest", 1e-6)
    truth = scale * np.sort(SPECTRA["normal"])[::-1][:3]
    np.testing.assert_allclose(found.values, truth, rtol=1e-6)


def test_squares_that_are_zero_in_float64_are_refused():
    with pytest.raises(NumericalError, match="squares"):
        search(1e-170 * SPECTRA["normal"], 3, "largest")


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1.0, 1e200])
def test_norms_of_numbers_whose_squares_leave_their_range(scale):
    entries = scale * np.array([3.0, 4.0, 12.0])
    assert of_diagonal(entries).fro_norm == pytest.approx(13 * scale, rel=1e-14)
    assert of_matrix(np.diag(entries)).fro_norm == pytest.approx(13 * scale, rel=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_norm_of_many_numbers(dtype):
    """Of which runs are added up apart."""
    entries = np.full(40_000, 0.5, dtype)
    assert of_diagonal(entries).fro_norm == pytest.approx(100, rel=1e-6)
    assert of_matrix(entries.reshape(200, 200), "basic").fro_norm == pytest.approx(100, rel=1e-6)
    small = entries * np.array(1e-30, dtype)  # whose squares float32 has no numbers for
    assert of_diagonal(small).fro_norm == pytest.approx(1e-28, rel=1e-6, abs=0)


def test_traces_of_float32_that_cancel():
    entries = np.array([2**24, 1, -(2**24), 0.5], np.float32)
    assert of_diagonal(entries).trace == of_matrix(np.diag(entries)).trace == 1.5


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_found_from_any_start(seed):
    values = SPECTRA["tenfold"]
    found, _ = search(values, 12, "largest", seed=seed)
    np.testing.assert_allclose(found.values, np.sort(values)[::-1][:12], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_last_copy_does_not_hide_behind_the_next_values(dtype):
    """Its part of a random vector is smaller than that of the twenty below, which converge first."""
    bulk = np.random.default_rng(2).uniform(0, 3.8, 400)
    values = np.r_[np.repeat([4.8, 4.5, 4.0], 2), np.repeat(3.95, 20), bulk]
    lasts = [search(values, 6, "largest", dtype=dtype, seed=s)[0].values[-1] for s in range(20)]
    assert (np.array(lasts) < 3.98).sum() <= 1  # one in a hundred, but for bad luck


def test_what_hides_from_a_chain():
    """The bound of <u, v> is the value itself where u is exact, through steps and restarts."""
    drawn = np.random.default_rng(3)
    W = np.linalg.qr(drawn.standard_normal((40, 40)))[0]
    H = W * np.r_[drawn.uniform(-1, 1, 39), 1.1] @ W.T
    u, v = W[:, -1], drawn.standard_normal(40)
    v /= np.linalg.norm(v)
    hiding, basis, pending = Hiding(1.1, 40), np.zeros((0, 40)), v

    def bounded() -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        T, coupling = basis @ H @ basis.T, basis @ H @ pending
        parts = np.r_[basis, [pending]] @ u
        np.testing.assert_allclose(hiding.start @ parts, u @ v, rtol=1e-8)
        ritz, columns = np.linalg.eigh(T)
        bound = hiding.probability(ritz, columns, coupling)
        exact = abs(u @ v) / np.linalg.norm(parts) * np.sqrt(2 * 40 / np.pi)
        assert bound == pytest.approx(exact, rel=1e-6)
        return bound, ritz, columns, coupling

    for _ in range(3):
        for _ in range(6):
            basis = np.vstack([basis, pending])
            product = H @ pending
            for _ in range(2):
                product = product - basis.T @ (basis @ product)
            pending = product / np.linalg.norm(product)
            hiding.step()
        bound, *chain = bounded()
        Y = chain[1][:, -4:]
        hiding.restart(*chain, Y)
        basis = Y.T @ basis
        bounded()
    assert bound < 40 * abs(u @ v)


@pytest.mark.parametrize("which", ["largest", "magnitude", "both"])
@pytest.mark.parametrize("gap", [1e-7, 1e-5, 1e-3])
def test_copies_in_clusters(which, gap):
    """Pairs of next to equal eigenvalues, each several times, come out within a few hundred products."""
    drawn = np.random.default_rng(1)
    pairs = [c * (1 - gap * i) for c in drawn.uniform(1, 3, 3) for i in range(2)]
    values = np.r_[np.repeat(pairs, 3), drawn.uniform(-0.5, 0.5, 600)]
    found, _ = search(values, 10, which)
    assert found.converged.all()
    assert found.products < 500
    truth = values[WHICH[which](values)][:10]
    np.testing.assert_allclose(np.sort(found.values), np.sort(truth), rtol=2e-3, atol=1e-3)


def test_a_basis_stays_orthonormal_where_next_to_nothing_is_new():
    """In a chain, what a product has along rough pairs that are kept is far more than the rest of it."""
    multiply, like = rotated(np.r_[5, 4, 3, 3, 1e-10 * np.linspace(-1, 1, 600)])
    generator, errors = torch.Generator().manual_seed(0), []

    def measure(*_):
        basis = torch.vstack([lanczos.basis[: lanczos.count], lanczos.pending])
        errors.append(float((basis @ basis.T - torch.eye(len(basis))).abs().max()))

    guess = torch.zeros_like(like)
    lanczos = Lanczos(multiply, 604, 3, "largest", 0.1, generator, guess, report=measure)
    lanczos.run(300)
    assert len(errors) > 5
    assert max(errors) < 1e-13


def test_fewer_than_were_asked_for_have_not_converged():
    found, _ = search(np.zeros(700), 5, "largest", most=3)  # each of which is exact
    assert len(found.values) == 3
    assert not found.converged.any()
    assert search(np.zeros(700), 5, "largest")[0].converged.all()


def test_a_good_guess_saves_products_and_a_bad_one_hides_nothing():
    values = SPECTRA["outliers"]
    alone, _ = search(values, 6, "largest")
    noise = torch.randn(len(values), generator=torch.Generator().manual_seed(1)).double()
    near = alone.vectors.sum(0) + 1e-3 * noise
    helped, _ = search(values, 6, "largest", guess=near)
    assert helped.products < alone.products
    worst, _ = search(values, 1, "smallest")
    misled, _ = search(values, 6, "largest", guess=1e9 * worst.vectors[0])
    infinite, _ = search(values, 6, "largest", guess=torch.full_like(near, torch.inf))
    for found in (helped, misled, infinite):
        assert found.converged.all()
        np.testing.assert_allclose(found.values, alone.values, rtol=1e-5)


def test_the_same_seed_gives_the_same_bytes():
    one, two = (search(SPECTRA["normal"], 5, "largest")[0] for _ in range(2))
    assert torch.equal(one.vectors, two.vectors)
    assert np.array_equal(one.values, two.values)


def test_products_run_out():
    found, _ = search(SPECTRA["normal"], 6, "largest", most=12)
    assert found.products == 12
    assert len(found.values) == 6
    assert not found.copies_sought
    assert not found.converged.all()
    assert found.residuals.max() > 1e-2
    none, _ = search(SPECTRA["normal"], 6, "largest", most=0)
    assert len(none.values) == len(none.vectors) == len(none.residuals) == none.products == 0


def test_products_that_run_out_while_copies_are_sought():
    whole, _ = search(SPECTRA["outliers"], 4, "largest")
    short, _ = search(SPECTRA["outliers"], 4, "largest", most=whole.products - 6)
    assert short.converged.all()
    assert not short.copies_sought
    assert whole.copies_sought
    for spare, confirming in (
        (0, 4),
        (1, 1),
        (3, 1),
        (4, 0),
    ):  # one for each pair, one for all, or none
        found, _ = search(SPECTRA["outliers"], 4, "largest", most=whole.products - spare)
        assert found.converged.all()
        assert found.copies_sought
        assert found.products == whole.products - 4 + confirming

    def report(products, residual, tolerance):
        if products == whole.products - 6:
            signal.raise_signal(signal.SIGINT)

    stopped, _ = search(SPECTRA["outliers"], 4, "largest", report=report)
    assert stopped.interrupted
    assert stopped.converged.all()
    assert not stopped.copies_sought


def test_what_is_reported():
    heard = []
    found, _ = search(SPECTRA["outliers"], 4, "largest", report=lambda *facts: heard.append(facts))
    products, residuals, tolerances = zip(*heard, strict=True)
    assert list(products) == list(range(1, found.products - 4 + 1))  # four more confirm the four
    assert residuals[:3] == (1, 1, 1)  # there are fewer than four values yet
    assert residuals[3] > 1e-3 >= residuals[-1]
    assert set(tolerances) == {1e-3}


@pytest.mark.parametrize(("name", "tolerance"), [("normal", 0.1), ("outliers", 1e-2)])
def test_residuals_are_no_larger_than_they_are(name, tolerance):
    found, multiply = search(SPECTRA[name], 6, "largest", tolerance)
    true = [(multiply(x) - v * x).norm() for v, x in zip(found.values, found.vectors, strict=True)]
    assert (found.residuals <= 1.01 * np.array(true) + 1e-12).all()


def test_a_chain_gets_twelve_products_at_least():
    """However soon a copy of the outermost value would show, and however few products the search took."""
    values, heard = np.r_[5, 0.1 * SPECTRA["normal"]], []
    found, _ = search(values, 2, "largest", 0.1, report=lambda *facts: heard.append(facts))
    converged = next(products for products, residual, _ in heard if residual <= 0.1)
    assert converged < CHAIN
    assert found.products == converged + CHAIN + 1  # which confirms


def test_a_whole_space_hides_no_copy():
    """All of it was multiplied: nothing is left to seek copies in."""
    found, _ = search(np.linspace(1, 2, 20), 2, "largest", 1e-12)
    assert found.products == 20 + 1  # and one to confirm
    assert found.copies_sought


def test_interrupted():
    calls = []

    def report(products, residual, tolerance):
        calls.append(products)
        if products == 20:
            signal.raise_signal(signal.SIGINT)

    found, _ = search(SPECTRA["normal"], 6, "largest", report=report)
    assert found.interrupted
    assert len(found.values) == len(found.residuals) == 6
    assert calls == list(range(1, 21))


def test_interrupted_before_anything_is_known():
    def multiply(v):
        raise KeyboardInterrupt

    generator, like = torch.Generator().manual_seed(0), torch.zeros(5)
    found = estimate(multiply, [2, 3], 0.1, 9, generator, like)
    assert found.interrupted
    assert np.isnan([*found.parts, *found.errors, found.total, found.error]).all()
    density = lanczos_quadrature(multiply, 5, 2, 3, generator, like)
    assert density.interrupted
    assert density.probes == len(density.nodes) == len(density.histogram(4)[1]) == 0


def test_a_thread_that_gets_no_signals():
    with ThreadPoolExecutor() as threads:
        found, _ = threads.submit(search, SPECTRA["rank-3"], 2, "largest").result()
    np.testing.assert_allclose(found.values, [3, 2], rtol=1e-5)


def test_memory_is_bounded():
    values = np.r_[5.0, 4.0, 3.0, np.zeros(400_000)]
    multiply, like = rotated(values, torch.float32)
    search = Lanczos(
        multiply, len(values), 10, "largest", 1e-3, torch.Generator().manual_seed(0), like
    )
    found = search.run(30)
    assert len(search.basis) + 2 <= 30  # what is pending, and a product
    np.testing.assert_allclose(found.values[:3], values[:3], rtol=1e-4)
    for value, vector in zip(found.values[:3], found.vectors, strict=False):
        assert float((multiply(vector) - value * vector).norm()) < 1e-2
    multiply, like = rotated(SPECTRA["normal"])
    small = Lanczos(multiply, 900, 10, "largest", 1e-3, torch.Generator().manual_seed(0), like)
    small.run(500)
    assert small.basis.numel() <= 1 << 23
    assert len(small.basis) <= 80


TINY = np.random.default_rng(0)
OUTLIERS = np.r_[1000, 300, 50, 50, 10, 10]
SMALL = {
    "bulk": (np.r_[OUTLIERS, TINY.uniform(-0.001, 0.001, 800), -0.06, -0.05, -0.05], "both", 6),
    "positive-bulk": (np.r_[OUTLIERS, TINY.uniform(0, 0.04, 800), -0.06, -0.05, -0.05], "both", 6),
    "wide-bulk": (np.r_[OUTLIERS, TINY.uniform(-0.1, 0.1, 800)], "largest", 12),
}


@pytest.mark.parametrize("name", SMALL)
def test_values_far_below_the_largest(name):
    """A thousandth of a tenth of it is no zero: such values converge, or are said not to."""
    values, which, top = SMALL[name]
    truth = np.sort(values[WHICH[which](values)][:top])
    done = 0
    for seed in range(4):
        found, multiply = search(values, top, which, seed=seed)
        if found.converged.all():
            done += 1
            np.testing.assert_allclose(np.sort(found.values), truth, rtol=2e-2)
            true = [
                float((multiply(x) - v * x).norm())
                for v, x in zip(found.values, found.vectors, strict=True)
            ]
            assert (np.array(true) <= 1e-3 * np.abs(found.values)).all()
    assert done >= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [2, 5, 50])
def test_the_smallest_of_a_matrix_of_low_rank_are_zero(rank, dtype):
    values = np.r_[np.linspace(1, 5, rank), np.zeros(700)]
    found, _ = search(values, 3, "smallest", dtype=dtype)
    assert found.converged.all()
    assert found.products < 100
    np.testing.assert_allclose(found.values, 0, atol=1e-3)
    gram = (found.vectors @ found.vectors.T).double()
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), atol=atol, rtol=0)


def test_the_residuals_of_a_whole_matrix_are_those_of_its_products():
    """Which are not quite symmetric, as rounding leaves them."""
    drawn = np.random.default_rng(0)
    matrix = in_a_random_basis(drawn.standard_normal(50)).numpy()
    matrix += 1e-3 * drawn.standard_normal((50, 50)) * np.arange(50)
    pairs = dense(lambda start, stop: torch.from_numpy(matrix[start:stop]), 50)
    for value, vector, residual in zip(pairs[0], pairs[1].T, pairs[2], strict=True):
        assert residual == pytest.approx(np.linalg.norm(matrix @ vector - value * vector))
    np.testing.assert_allclose(pairs[0], np.linalg.eigvalsh((matrix + matrix.T) / 2), atol=1e-12)


def test_norms_of_long_vectors():
    """Of more numbers than are made float64 at a time, whose squares are none in float32."""
    v = torch.full((200_000,), 3e-30)
    v[::2] = 4e-30
    assert norm(v) == pytest.approx(5e-30 * 100_000**0.5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_not_finite(wrong):
    """One number of a product is enough."""
    generator, like = torch.Generator().manual_seed(0), torch.zeros(600)
    some, part = torch.ones(600), torch.ones(3, 3)
    some[5] = part[1, 2] = wrong
    search = Lanczos(lambda v: v * some, 600, 2, "largest", 1e-3, generator, like)
    with pytest.raises(NotFinite):
        search.run(50)
    with pytest.raises(NotFinite):
        lanczos_quadrature(lambda v: v * some, 600, 2, 5, generator, like)
    with pytest.raises(NotFinite):
        dense(lambda start, stop: part[start:stop], 3)


# --- trace ----------------------------------------------------------------------------------------

SIZES = [300, 0, 500, 100]
EVEN = np.linspace(0, 1, 300)


def estimated(values, seed=0, relative=0.01, most=1000, **options):
    multiply, like = rotated(np.asarray(values, float))
    generator = torch.Generator().manual_seed(seed)
    return estimate(multiply, SIZES, relative, most, generator, like, **options), multiply


def parts_of(multiply) -> np.ndarray:
    diagonal = torch.stack([multiply(e) for e in torch.eye(900, dtype=torch.float64)]).diagonal()
    return np.array([float(part.sum()) for part in diagonal.split(SIZES)])


@pytest.mark.parametrize(
    "values",
    [
        np.r_[DRAWN.random(860), 5 * DRAWN.random(40)],
        np.r_[0.01 * DRAWN.random(880), np.linspace(1, 20, 20)],
        np.r_[0.3 + DRAWN.standard_normal(900)],
    ],
    ids=["flat", "outliers", "indefinite"],
)
def test_trace(values):
    hits, total = [], values.sum()
    truth = parts_of(rotated(values)[0])
    for seed in range(40):
        found, _ = estimated(values, seed, relative=0.02, most=300)
        hits.append(abs(found.total - total) <= 2 * found.error)
        assert found.total == pytest.approx(found.parts.sum())
        assert (np.abs(found.parts - truth) <= 6 * found.errors + 1e-9).all()
        if found.converged:
            assert found.error <= 0.02 * abs(found.total)
        else:
            assert found.products == 300
    assert np.mean(hits) >= 0.85  # 95 % is expected; of forty, fewer than 34 happen once in 300


def in_a_random_basis(values: np.ndarray) -> Tensor:
    """W diag(values) W^T; unlike `rotated`, its eigenvectors are far from the unit vectors."""
    generator = torch.Generator().manual_seed(5)
    w = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double())[0]
    return w * torch.from_numpy(values) @ w.T


@pytest.mark.parametrize("relative", [0.3, 0.05])
@pytest.mark.parametrize(
    "values",
    [
        np.r_[150, EVEN[:299]],
        np.r_[100, 50, EVEN[:298]],
        np.r_[150, -50, EVEN[:298]],
        0.5 ** np.arange(300),
        1 / np.arange(1, 301) ** 2,
        np.r_[1, np.zeros(299)],
    ],
    ids=["outlier", "two", "signs", "geometric", "power", "rank-1"],
)
def test_trace_where_an_eigenvalue_dominates(values, relative):
    """Samples are skewed then: too many have an error that is too small, unless the eigenvalue is taken out."""
    matrix = in_a_random_basis(values)
    sizes, total = [100, 200], values.sum()
    truth = np.array([float(part.sum()) for part in matrix.diagonal().split(sizes)])
    hits = []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        found = estimate(lambda v: matrix @ v, sizes, relative, 1000, generator, matrix[0])
        assert found.converged
        assert found.products <= 80
        hits.append(abs(found.total - total) <= 2 * found.error + 1e-12)
        assert (np.abs(found.parts - truth) <= 6 * found.errors + 1e-12).all()
    assert np.mean(hits) >= 0.84  # 90 to 93 % of a thousand seeds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outliers_are_taken_out(dtype):
    values = np.r_[1e-3 * EVEN[:290], np.linspace(10, 20, 10)]
    matrix = in_a_random_basis(values).to(dtype)
    generator = torch.Generator().manual_seed(0)
    found = estimate(lambda v: matrix @ v, [300], 1e-3, 2000, generator, matrix[0])
    assert found.converged
    assert found.products < 60  # samples alone take 20,000
    assert found.total == pytest.approx(values.sum(), rel=5e-3)


@pytest.mark.parametrize("leading", [[], [30], [40, 20]], ids=str)
def test_what_a_sketch_leaves(leading):
    """Of the square of the norm, about as much as the best projections leave: no product speaks for itself."""
    values = np.r_[leading, np.ones(300 - len(leading))]
    z = torch.randn(16, 300, generator=torch.Generator().manual_seed(0)).double()
    left = Sketch(z @ in_a_random_basis(values)).left()
    squares = np.cumsum(np.r_[0, values[:15] ** 2])
    np.testing.assert_allclose(left, 1 - squares / (values**2).sum(), atol=0.1)


def test_nothing_is_left_out_where_a_few_more_samples_will_do():
    """A direction of some size among many: to take it out costs 17 products and more."""
    matrix = in_a_random_basis(np.r_[5, EVEN[1:]])
    products = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        found = estimate(lambda v: matrix @ v, [300], 0.012, 1000, generator, matrix[0])
        assert found.converged
        products.append(found.products)
    assert sum(count < 16 + 17 for count in products) >= 5


def test_products_are_kept_for_the_sketch_alone():
    made, held = weakref.WeakSet(), []
    multiply, like = rotated(np.linspace(-1, 1.1, 900))

    def product(v):
        found = multiply(v)
        made.add(found)
        return found

    def report(products, error, tolerance):
        held.append(len(made))

    generator = torch.Generator().manual_seed(0)
    estimate(product, SIZES, 0.0, 60, generator, like, report)
    assert max(held) == 16
    assert max(held[16:]) == 1


def test_few_products_leave_nothing_out(recwarn):
    matrix = in_a_random_basis(np.r_[150, EVEN[:299]])
    for most in (1, 15, 16, 31, 33):
        generator = torch.Generator().manual_seed(0)
        found = estimate(lambda v: matrix @ v, [300], 1e-3, most, generator, matrix[0])
        assert not found.converged
        assert (found.error < 4) == (most == 33)
        assert found.products == most
        assert np.isfinite(found.total)
    assert not recwarn.list


def test_small_sizes_have_traces_too():
    for size in (1, 3, 17):
        values = EVEN[:size]
        matrix = in_a_random_basis(values)
        generator = torch.Generator().manual_seed(0)
        found = estimate(lambda v, m=matrix: m @ v, [size], 0.1, 500, generator, matrix[0])
        assert found.converged
        assert abs(found.total - values.sum()) <= 5 * found.error + 1e-9


@pytest.mark.parametrize("values", [np.zeros(900), np.ones(900)], ids=["zero", "identity"])
def test_trace_without_variance(values, recwarn):
    found, _ = estimated(values, relative=0.01 if values.any() else 0.0)
    assert not recwarn.list
    assert found.converged
    assert found.error < 1e-9
    assert found.total == pytest.approx(values.sum())
    assert found.parts == pytest.approx([values[0] * size for size in SIZES])


def test_a_trace_that_cancels_runs_out_of_products():
    found, _ = estimated(np.r_[np.ones(450), -np.ones(450)], most=60)
    assert not found.converged
    assert found.products == 60
    assert abs(found.total) <= 4 * found.error


def test_trace_interrupted():
    def report(products, error, tolerance):
        if products == 5:
            raise KeyboardInterrupt

    found, _ = estimated(np.ones(900), report=report)
    assert found.interrupted
    assert found.total == pytest.approx(900)


def test_a_trace_that_is_interrupted_once_directions_were_taken_out():
    """One sample has no error; what those before it came to has."""
    values, samples = np.r_[100.0, 80, 60, np.linspace(0, 1, 897)], []

    def report(products, error, tolerance):
        samples.append(products)
        if len(samples) == 17:
            raise KeyboardInterrupt

    found, _ = estimated(values, report=report)
    assert found.interrupted
    assert found.products > 17  # those of the directions
    assert abs(found.total - values.sum()) < 3 * found.error


# --- density --------------------------------------------------------------------------------------


def quadrature(values, probes, steps):
    multiply, like = rotated(np.asarray(values, float))
    generator = torch.Generator().manual_seed(1)
    return lanczos_quadrature(multiply, len(values), probes, steps, generator, like)


@pytest.mark.parametrize(
    "name", ["normal", "outliers", "triples", "identity", "zero", "two", "one"]
)
def test_density(name):
    values = SPECTRA[name]
    probes, steps = 8, 40
    found = quadrature(values, probes, steps)
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)
    assert (found.weights >= 0).all()
    assert (np.diff(found.nodes) >= 0).all()
    width = np.ptp(values)
    # Gauss quadrature of m nodes: within pi width / (2 m - 1); chance: 1 / sqrt(n probes) of the width.
    bound = np.pi * width / (2 * steps - 1) + width / np.sqrt(len(values) * probes)
    distance = stats.wasserstein_distance(found.nodes, values, found.weights)
    assert distance <= bound + 1e-9 * max(1.0, width)


@pytest.mark.parametrize("scale", [1e20, 1e-24])
def test_density_where_squares_leave_float32(scale):
    values = np.linspace(1, 2, 100)
    diagonal = torch.from_numpy(scale * values).float()
    generator = torch.Generator().manual_seed(1)
    found = lanczos_quadrature(lambda v: diagonal * v, 100, 8, 40, generator, diagonal)
    assert stats.wasserstein_distance(found.nodes / scale, values, found.weights) < 0.05


def test_a_probe_ends_where_nothing_is_new():
    """In the directions of as many eigenvalues as differ: more would be of rounding."""
    for values in (np.ones(600), np.r_[3, 2, 1, np.zeros(597)]):
        d, products = torch.from_numpy(values), []
        generator = torch.Generator().manual_seed(1)
        lanczos_quadrature(
            lambda v, d=d, p=products: p.append(v) or d * v, 600, 8, 40, generator, d
        )
        assert len(products) == 8 * len(set(values))


def test_density_sharpens_with_steps():
    values = SPECTRA["normal"]
    far, near = (
        stats.wasserstein_distance(found.nodes, values, found.weights)
        for found in (quadrature(values, 8, 5), quadrature(values, 8, 60))
    )
    assert near < far / 2


def test_exact_density_and_histogram():
    found = exact(np.array([3.0, 1.0, 2.0, 1.0]))
    assert found.nodes.tolist() == [1, 1, 2, 3]
    edges, mass = found.histogram(2)
    assert edges.tolist() == [1, 2, 3]
    assert mass.tolist() == [0.5, 0.5]
    for flat in (np.zeros(5), np.full(5, -2.0), 3 * (1 + np.arange(5) * 1e-15)):
        edges, mass = exact(flat).histogram(4)
        assert mass.sum() == pytest.approx(1)
        assert edges[0] < flat[0] < edges[-1]


def test_ctrl_c_waits_for_the_step_to_end():
    """Wherever it comes, what is known is whole: values, vectors and residuals belong together."""
    size = 60
    diagonal = torch.arange(1.0, size + 1, dtype=torch.float64)
    for last in (1, 5, 20, 33):
        products = 0

        def multiply(v: torch.Tensor, last: int = last) -> torch.Tensor:
            nonlocal products
            products += 1
            if products == last:
                signal.raise_signal(signal.SIGINT)
            return diagonal * v

        lanczos = Lanczos(
            multiply, size, 4, "largest", 1e-14, torch.Generator().manual_seed(0), diagonal
        )
        found = lanczos.run(1000)
        assert found.interrupted
        assert found.products == last
        errors = diagonal * found.vectors - torch.from_numpy(found.values)[:, None] * found.vectors
        assert np.allclose(errors.norm(dim=1).numpy(), found.residuals, atol=1e-10)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as pressed:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert pressed()
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("samples", [*range(2, 18), 40, 500])
def test_the_error_of_few_samples_is_that_of_student(samples):
    values = np.random.default_rng(0).standard_normal(samples)
    plain = values.std(ddof=1) / samples**0.5
    wider = stats.t.ppf(stats.norm.cdf(2), samples - 1) / 2
    assert standard_error(values) == pytest.approx(wider * plain, rel=5e-3)


@pytest.mark.parametrize("products", [2, 3, 5, 10])
@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_the_error_of_a_trace_from_a_few_products(name, products):
    values = {"normal": SPECTRA["normal"] + 0.3, "uniform": np.linspace(0, 1, 300)}[name]
    multiply, like = rotated(values)
    held = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        found = estimate(multiply, [len(values)], 1e-9, products, generator, like)
        held += abs(found.total - values.sum()) <= 2 * found.error
    assert held >= 90


def test_a_trace_of_rank_one_to_all_digits(recwarn):
    direction = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        found = estimate(
            lambda v: (direction @ v) * direction, [300], 0.0, 100, generator, direction
        )
        assert found.total == pytest.approx(float(direction @ direction))
    assert not recwarn.list


def test_a_trace_that_cancels_is_never_taken_for_known():
    """However rough an estimate is asked for: by chance it is twice its error now and then."""
    values = np.r_[np.ones(200), -np.ones(200)]
    multiply, like = rotated(values)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert not estimate(multiply, [400], 0.5, 200, generator, like).converged
