"""The ways to compute blocks of a Hessian. Each adds one batch's share to sums that the caller owns."""
