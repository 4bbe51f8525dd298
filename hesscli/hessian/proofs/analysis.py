"""What a recorded pass proves of a problem: that samples, and positions, do not mix, and which uses are affine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.losses import OF_CLASSES
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs.affine import find_uses
from hesscli.hessian.proofs.positions import positions_stay_apart
from hesscli.hessian.proofs.sample_axis import Axes, SampleAxis
from hesscli.hessian.proofs.samples import follow, sample_axes
from hesscli.hessian.proofs.uses import Use, values_of
from hesscli.hessian.recording.recorder import record, record_terms
from hesscli.hessian.recording.tape import Tape


@dataclass(frozen=True)
class Analysis:
    """What a tape proves of a problem."""

    tape: Tape
    axes: Axes
    uses: dict[str, Use]  # of each parameter that has one affine use alone
    shared: dict[str, tuple[Use, ...]]  # of each that enters at several values
    reasons: dict[str, str]  # why a parameter has no affine use alone
    class_axis: int | None = None  # of the output, where the loss couples what lies along it
    terms: Tape | None = None  # of a loss of the user's own
    # Whether positions stay apart behind some values, as far as that was asked for.
    _apart: dict[tuple[int, ...], bool] = field(default_factory=dict, init=False)

    def loss_couples(self, axis: SampleAxis, count: int) -> bool:
        """Whether the loss has terms of more than one of the places, so many, along an axis of the output."""
        if self.terms is None:
            return axis.axis == self.class_axis
        try:
            follow(self.terms, dict.fromkeys(self.terms.inputs, axis), count)
        except NotApplicable:
            return True
        return False

    def use(self, parameter: str) -> Use:
        if parameter not in self.uses:
            raise NotApplicable(self.reasons.get(parameter, "unused"))
        return self.uses[parameter]

    def all_uses(self, parameter: str) -> tuple[Use, ...]:
        """The affine uses of a parameter, in the order of execution."""
        return self.shared[parameter] if parameter in self.shared else (self.use(parameter),)

    def uses_apart(self, parameters: Iterable[str]) -> dict[str, Use]:
        """The uses of some parameters, with positions as samples if none sees another behind any of them."""
        uses = {name: self.uses[name] for name in parameters if name in self.uses}
        zs = values_of(uses.values())
        if zs not in self._apart:
            mine = list(uses.values())
            apart = bool(zs) and positions_stay_apart(self.tape, self.axes, mine, self.loss_couples)
            self._apart[zs] = apart
        if not self._apart[zs]:
            return uses
        return {n: replace(use, positions=1, apart=use.positions) for n, use in uses.items()}


class Analyses:
    """The analysis of each batch, kept as long as the batch is: one whose data is made anew is analysed anew.

    It holds no activations, only the batch's data and what its calls are.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.made: WeakKeyDictionary[Batch, Analysis | NotApplicable] = WeakKeyDictionary()

    def of(self, batch: Batch) -> Analysis:
        """What is proven of a batch.

        Raises:
            NotApplicable: samples mix, or cannot be shown not to.
        """
        found = self.made.get(batch)
        if found is None:
            try:
                found = _analyse(self.problem, batch)
            except NotApplicable as reason:
                found = NotApplicable(str(reason))  # without its traceback, which holds the batch
            self.made[batch] = found
        if isinstance(found, NotApplicable):
            raise NotApplicable(str(found))
        return found


def _analyse(problem: Problem, batch: Batch) -> Analysis:
    loss = problem.loss
    if loss.whole:
        raise NotApplicable(f"the loss {loss.name} is one number for all data")
    if not batch.inputs or not batch.inputs[0].dim():
        raise NotApplicable("the inputs have no sample axis")
    tape = record(problem, batch)
    if tape.refusal:
        raise NotApplicable(tape.refusal)
    if loss.name in OF_CLASSES and len(tape.shapes[tape.output]) < 2:
        raise NotApplicable("one sample without a sample axis")  # axis 0 holds its classes
    axes = sample_axes(tape, len(batch.inputs[0]))
    uses = find_uses(tape, axes)
    terms = None
    if loss.function is not None:
        terms = record_terms(problem, batch)
        if terms.refusal:
            raise NotApplicable(f"{terms.refusal} in the loss {loss.name}")
    classes = loss.class_axis(tape.shapes[tape.output], batch.target)
    analysis = Analysis(tape, axes, uses.single, uses.shared, uses.reasons, classes, terms)
    if analysis.loss_couples(SampleAxis(0), len(batch.inputs[0])):
        raise NotApplicable(f"the loss {loss.name} may mix samples")
    return analysis
