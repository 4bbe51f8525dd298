"""One forward pass as a list of operators."""
