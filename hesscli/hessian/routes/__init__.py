"""The ways to compute blocks of a Hessian. Each fills sums over all batches, which the caller owns."""
