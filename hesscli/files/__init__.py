"""Model files, data files and Hessian files. Knows no mathematics and no terminal."""
