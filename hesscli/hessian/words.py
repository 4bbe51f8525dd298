"""The words for methods and structures. Importing this loads no torch."""

from __future__ import annotations

PREACTIVATION, GAUSS_NEWTON = "preactivation", "gauss-newton"
HVP, FINITE_DIFFERENCE = "hvp", "finite-difference"

STRUCTURES = {
    "diag": "block_diagonal",
    "module": "module",
    "full": "full",
    "elements": "elements",
}
"""`--blocks` option -> the structure's name in table, JSON and metadata."""
