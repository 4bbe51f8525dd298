"""Hessian files, read and written."""
