"""hesscli: the exact Hessian of a saved PyTorch model, from the command line."""

__version__ = "0.1.0"
