"""Eigenvalues, trace and norm of a symmetric matrix. Knows no model."""
