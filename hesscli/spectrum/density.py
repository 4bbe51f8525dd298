"""The spectral density of a symmetric operator: which share of its eigenvalues lies where. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SAME = 1e-6  # relative distance of values that only rounding tells apart


@dataclass(frozen=True)
class Density:
    """Point masses on the real line."""

    nodes: np.ndarray  # [k], ascending
    weights: np.ndarray  # [k], they add up to 1
    exact: bool
    probes: int
    interrupted: bool = False

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges [bins + 1] and the mass between them [bins]."""
        if not len(self.nodes):
            return np.zeros(1), np.zeros(0)
        low, high = float(self.nodes[0]), float(self.nodes[-1])
        if high - low <= _SAME * max(abs(low), abs(high)):
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        mass, edges = np.histogram(self.nodes, bins, (low, high), weights=self.weights)
        return edges, mass


def exact(values: np.ndarray) -> Density:
    """The density of a known spectrum: every eigenvalue has the same mass."""
    nodes = np.sort(values)
    return Density(nodes, np.full(len(nodes), 1 / max(1, len(nodes))), True, 0)
