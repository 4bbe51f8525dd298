"""Model, data and options -> the problem, ready to be differentiated, by one process or by several.

`opening.py` tells it in order. Model and data are loaded, or are in memory (`given.py`). The loss is settled
(`loss.py`), how the inputs are passed (`passing.py`), and which parameters are differentiated by (`parameters.py`).
Then the data, a `Source`, is cut into batches (`batches.py`), unless its samples mix (`mixing.py`) or a loss of the
user's own wants them all at once (`own_loss.py`). `team.py` has the processes that torchrun started: where each has a
share of the data, the first asks all of them (`many_processes.py`).
"""
