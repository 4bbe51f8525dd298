"""What is measured, against whom, and what hesscli must reach. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GEMM = "gemm"  # a goal for the GEMM efficiency, not against a peer
GRADIENT = "gradient"  # a goal in gradients: the smaller, the better

# What is wanted instead of blocks.
EIGEN = "eigen"  # the largest eigenvalues
PRODUCT = "product"  # products with the Hessian

PAIRS = 10  # eigenvalues
PAIRS_TOLERANCE = 1e-3  # of ||Hv - lambda v|| / |lambda|
PRODUCTS = 30  # that share the cost of linearising


@dataclass(frozen=True)
class Goal:
    """At least this many times faster; of `gemm` this share; of `gradient` at most this many."""

    against: str
    least: float
    aim: float

    def met(self, value: float) -> bool:
        return value <= self.least if self.against == GRADIENT else value >= self.least

    def __str__(self) -> str:
        if self.against == GRADIENT:
            return f"<= {self.least:g} (aim {self.aim:g})"
        if self.against == GEMM:
            return f">= {self.least:.0%} (aim {self.aim:.0%})"
        return f">= {self.least:g}x (aim {self.aim:g}x)"


@dataclass(frozen=True)
class Task:
    """One row of the table: a model with data, what is written of its Hessian, and the peers."""

    name: str
    title: str
    model: str  # a builder in models.py
    sizes: Mapping[str, Any]
    toy: Mapping[str, Any]
    blocks: str  # or EIGEN or PRODUCT: no matrix
    peers: tuple[str, ...]  # functions in peers.py, or in spectra.py
    goals: tuple[Goal, ...] = ()
    wrong: frozenset[str] = frozenset()  # peers known to get this model wrong

    def goal(self, against: str) -> Goal | None:
        return next((goal for goal in self.goals if goal.against == against), None)


# What a peer needs beyond torch.
PACKAGES = {
    "curvlinops": "curvlinops",
    "curvlinops-chunked": "curvlinops",
    "backpack": "backpack",
    "pyhessian": "pyhessian",
    "hessian-eigenthings": "hessian_eigenthings",
}

CHUNKS: dict[str, tuple[int, ...]] = {
    "vmap-jvp-grad": (16, 32, 64, 128, 256),
    "is-grads-batched": (64, 128, 256),
    "curvlinops": (),
    "curvlinops-chunked": (16, 32, 64, 128, 256),
    "pyhessian": (1,),
    "hessian-eigenthings": (1,),
}
"""Rows at a time: the fastest of these; none: as many as fit. Other peers cannot be had in parts."""

# A vmapped jvp of jacrev is wrong between LayerNorm's weight and what lies before it.
LAYER_NORM = frozenset({"func-hessian", "curvlinops", "curvlinops-chunked"})

MATRIX_PEERS = (
    "vmap-jvp-grad",
    "is-grads-batched",
    "func-hessian",
    "curvlinops",
    "curvlinops-chunked",
    "pyhessian",
    "hessian-eigenthings",
)
BLOCK_PEERS = ("vmap-jvp-grad", "is-grads-batched", "curvlinops-chunked")
ELEMENT_PEERS = ("vmap-jvp-grad", "backpack")


def _mlp(samples: int, *widths: int) -> dict[str, Any]:
    return {"samples": samples, "widths": widths}


def _cnn(samples: int, activation: str, *channels: int) -> dict[str, Any]:
    return {"samples": samples, "channels": channels, "activation": activation}


TOY_MLP = _mlp(16, 5, 4, 3)
FREE_TOY = _mlp(32, 24, 20, 10)  # large enough for Lanczos
TOY_CNN = _cnn(6, "ReLU", 2, 3)

TRANSFORMER: dict[str, Any] = {
    "samples": 64,
    "vocabulary": 32,
    "length": 16,
    "width": 32,
    "layers": 2,
}
TOY_TRANSFORMER: dict[str, Any] = {
    "samples": 4,
    "vocabulary": 5,
    "length": 3,
    "width": 4,
    "layers": 1,
}

TASKS = (
    Task(
        "full-mlp",
        "full, tanh MLP 88-88-40-10, B = 768",
        "mlp",
        _mlp(768, 88, 88, 40, 10),
        TOY_MLP,
        "full",
        MATRIX_PEERS,
        (Goal("vmap-jvp-grad", 8, 16), Goal("curvlinops", 50, 100)),
    ),
    Task(
        "full-wide",
        "full, tanh MLP 128-160-96-10, P = 37066, B = 2048",
        "mlp",
        _mlp(2048, 128, 160, 96, 10),
        TOY_MLP,
        "full",
        ("vmap-jvp-grad",),
    ),
    Task(
        "full-residual",
        "full, residual + LayerNorm + GELU, P = 6814, B = 512",
        "residual",
        {"samples": 512, "features": 24, "width": 36, "layers": 2},
        {"samples": 16, "features": 4, "width": 6, "layers": 1},
        "full",
        MATRIX_PEERS,
        (Goal("is-grads-batched", 6, 12),),
        LAYER_NORM,
    ),
    Task(
        "full-gemm",
        "full, tanh MLP 96-96-32-10, P = 12746, B = 512: GEMM efficiency",
        "mlp",
        _mlp(512, 96, 96, 32, 10),
        TOY_MLP,
        "full",
        ("vmap-jvp-grad",),
        (Goal(GEMM, 0.45, 0.75),),
    ),
    Task(
        "full-gemm-1024",
        "full, the same with B = 1024",
        "mlp",
        _mlp(1024, 96, 96, 32, 10),
        TOY_MLP,
        "full",
        ("vmap-jvp-grad",),
        (Goal(GEMM, 0.45, 0.75),),
    ),
    Task(
        "diag-cnn",
        "diag, ReLU CNN 12-24 channels on 8x8, P = 6586, B = 512",
        "cnn",
        _cnn(512, "ReLU", 12, 24),
        TOY_CNN,
        "diag",
        BLOCK_PEERS,
        (Goal("is-grads-batched", 10, 40),),
    ),
    Task(
        "diag-mlp",
        "diag, tanh MLP 64-128-64-10, B = 512",
        "mlp",
        _mlp(512, 64, 128, 64, 10),
        TOY_MLP,
        "diag",
        BLOCK_PEERS,
        (Goal("is-grads-batched", 10, 50),),
    ),
    Task(
        "diag-transformer",
        "diag, 2-layer GELU transformer, d = 32, T = 16, B = 64",
        "transformer",
        TRANSFORMER,
        TOY_TRANSFORMER,
        "diag",
        BLOCK_PEERS,
        (Goal("is-grads-batched", 1.5, 4),),
    ),
    Task(
        "full-points",
        "full, tanh MLP 3-64-64-10 at 64 points of 32 samples, P = 5066",
        "points",
        {"samples": 32, "places": 64, "widths": (3, 64, 64, 10)},
        {"samples": 3, "places": 4, "widths": (2, 4, 3)},
        "full",
        ("vmap-jvp-grad", "is-grads-batched"),
    ),
    Task(
        "diag-words",
        "diag, 2-layer GELU transformer as diag-transformer, with scores of ten classes for each token",
        "words",
        TRANSFORMER,
        TOY_TRANSFORMER,
        "diag",
        BLOCK_PEERS,
    ),
    Task(
        "elements-mlp",
        "elements, tanh MLP 256-256-128-10, B = 2048",
        "mlp",
        _mlp(2048, 256, 256, 128, 10),
        TOY_MLP,
        "elements",
        ELEMENT_PEERS,
        (Goal("backpack", 5, 10),),
    ),
    Task(
        "elements-cnn",
        "elements, ReLU CNN 12-24 channels on 8x8, P = 6586, B = 512",
        "cnn",
        _cnn(512, "ReLU", 12, 24),
        TOY_CNN,
        "elements",
        ELEMENT_PEERS,
        (Goal("backpack", 1, 2),),
    ),
    Task(
        "elements-million",
        "elements, tanh MLP 512-1024-448-10, P = 989002, B = 256",
        "mlp",
        _mlp(256, 512, 1024, 448, 10),
        TOY_MLP,
        "elements",
        (*ELEMENT_PEERS, GRADIENT),
        (Goal(GRADIENT, 60, 25),),
    ),
    Task(
        "elements-classes",
        "elements, tanh MLP 64-256-512, P = 148224, B = 512: as many outputs as a vocabulary has",
        "mlp",
        _mlp(512, 64, 256, 512),
        TOY_MLP,
        "elements",
        ELEMENT_PEERS,
    ),
    # Without a matrix.
    Task(
        "eigen-mlp",
        "10 largest eigenvalues to 1e-3, tanh MLP 256-512-256-10, P = 265482, B = 2048",
        "mlp",
        _mlp(2048, 256, 512, 256, 10),
        FREE_TOY,
        EIGEN,
        ("curvlinops", "pyhessian", "hessian-eigenthings", "eigsh-operator"),
        (Goal("curvlinops", 5, 5), Goal("pyhessian", 3, 3), Goal("hessian-eigenthings", 2.5, 2.5)),
    ),
    Task(
        "product-mlp",
        "a Hessian-vector product, one of 30, tanh MLP 256-512-256-10, P = 265482, B = 2048",
        "mlp",
        _mlp(2048, 256, 512, 256, 10),
        FREE_TOY,
        PRODUCT,
        ("curvlinops", "pyhessian"),
        (Goal(GRADIENT, 1.8, 1.2),),
    ),
    Task(
        "full-tied",
        "full, one 48 x 48 layer used three times, B = 256",
        "tied",
        {"samples": 256, "width": 48, "times": 3},
        {"samples": 8, "width": 4, "times": 2},
        "full",
        ("vmap-jvp-grad", "is-grads-batched"),
    ),
    Task(
        "diag-standardised",
        "diag, ReLU CNN 12-24 channels on 8x8 with standardised kernels, B = 128",
        "cnn",
        _cnn(128, "ReLU", 12, 24) | {"standardised": True},
        TOY_CNN | {"standardised": True},
        "diag",
        BLOCK_PEERS,
    ),
    # Where hesscli has little or nothing to gain.
    Task(
        "losing-conv",
        "losing case: diag, GELU CNN 12-24 channels on 8x8, B = 128",
        "cnn",
        _cnn(128, "GELU", 12, 24),
        _cnn(6, "GELU", 2, 3),
        "diag",
        BLOCK_PEERS,
    ),
    Task(
        "losing-vocabulary",
        "losing case: diag, softmax over 512 classes, B = 256",
        "mlp",
        _mlp(256, 16, 8, 512),
        _mlp(8, 3, 2, 12),
        "diag",
        ("vmap-jvp-grad", "is-grads-batched"),
    ),
)
BY_NAME = {task.name: task for task in TASKS}
