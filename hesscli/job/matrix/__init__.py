"""Plan -> blocks -> file: how a matrix is computed, checked and written, or goes on where it was stopped.

`planning.py` has the blocks and ranks the routes to each, `memory.py` what they take. `run.py` carries a plan out:
blocks that are held whole (`small.py`), and those that are written band by band (`large.py`, `triangles.py`), each by
the next of its routes where one is not exact (`ranking.py`). What is finished of a file stands in the journals beside
it (`unfinished.py`, `journal.py`).
"""
