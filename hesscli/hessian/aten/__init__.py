"""PyTorch's operators: which derivatives are wrong or missing, where they have corners, in how many digits they run."""
