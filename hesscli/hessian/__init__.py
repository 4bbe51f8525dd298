"""The mathematics. Knows tensors, never files or terminals.

A reader may go the way of the data: a `Problem` is what is differentiated (`objective/`), with the derivatives that
PyTorch's operators should have (`aten/`). One pass of each batch becomes a tape (`recording/`), on which is proven
how samples keep apart and how parameters enter (`proofs/`). By that the planner (`planner.py`) takes the cheapest exact
route to each block (`routes/`), and what comes out is checked against differences of gradients that know of none of
this (`differences/`). Where no matrix is formed, `operator.py` multiplies vectors. `curvatures.py` says what plans,
makes and checks each of the three matrices.
"""
