"""Differences of gradients: the check of every result, and the Hessian where autograd has none."""
