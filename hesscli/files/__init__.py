"""Model files (`models/`), data files (`data.py`) and Hessian files (`hessians/`). Knows no mathematics."""
