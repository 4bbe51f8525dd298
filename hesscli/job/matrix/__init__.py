"""Plan -> blocks -> file: how a matrix is computed, checked and written, or goes on where it was stopped."""
