"""Eigenvalues, trace, spectral density and norm of a symmetric matrix, and how two differ. Knows no model."""
