"""What a recorded pass proves of a problem: that samples, and positions, do not mix, and which uses are affine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs.affine import find_uses
from hesscli.hessian.proofs.channels import Channels
from hesscli.hessian.proofs.last_layers import RecordedLoss, parted
from hesscli.hessian.proofs.positions import positions_stay_apart
from hesscli.hessian.proofs.sample_axis import Axes, SampleAxis
from hesscli.hessian.proofs.samples import follow, sample_axes
from hesscli.hessian.proofs.samples_in_front import with_samples_in_front
from hesscli.hessian.proofs.softmax import log_softmaxes
from hesscli.hessian.proofs.summands import demand_summands
from hesscli.hessian.proofs.uses import Use, values_of
from hesscli.hessian.proofs.weights import Neurons, Weights, find_weights
from hesscli.hessian.recording.recorder import record, record_terms
from hesscli.hessian.recording.tape import Tape


@dataclass(frozen=True)
class Analysis:
    """What a tape proves of a problem."""

    tape: Tape
    axes: Axes
    all_uses: dict[str, tuple[Use, ...]]  # of each parameter whose uses are affine, as executed
    reasons: dict[str, str]  # why a parameter has no affine use alone
    loss: Loss  # of the tape's output
    terms: Tape  # of the loss
    # Whether positions stay apart behind some values, and a parameter's neurons, as far as that was asked for.
    _apart: dict[tuple[int, ...], bool] = field(default_factory=dict, init=False)
    _softmaxes: dict[Channels, dict[int, Channels] | None] = field(default_factory=dict, init=False)
    _neurons: dict[str, Neurons | None] = field(default_factory=dict, init=False)

    def loss_couples(self, axis: SampleAxis, count: int) -> bool:
        """Whether the loss has terms of more than one of the places, so many, along an axis of the output."""
        if count == 1:
            return False
        try:
            if axis.axis == 0 and self.terms.shapes[self.terms.output].numel() > 1:
                follow(self.terms, dict.fromkeys(self.terms.inputs, axis), count)  # to terms
            else:
                demand_summands(self.terms, axis, count)
        except NotApplicable:
            return True
        return False

    @cached_property
    def of_sample(self) -> Channels:
        """Where the numbers of a sample lie in the output."""
        return Channels(self.tape.shapes[self.tape.output][1:].numel())

    @cached_property
    def of_sites(self) -> list[Channels]:
        """Where the numbers of sites lie in the output, of each of which the loss has terms of its own: of positions,
        as it may be, then of samples.
        """
        shape = self.tape.shapes[self.tape.output]
        axes = [i for i in range(1, len(shape)) if self._coupled <= {i}]
        found = [Channels(shape[i], shape[i + 1 :].numel()) for i in axes]
        return list(dict.fromkeys([*found, self.of_sample]))

    @cached_property
    def _coupled(self) -> set[int]:
        """The axes of a sample's output along which the loss has terms of more than one number."""
        shape = self.tape.shapes[self.tape.output]
        axes = range(1, len(shape))
        return {axis for axis in axes if self.loss_couples(SampleAxis(axis), shape[axis])}

    def loss_rank(self, channels: Channels) -> int:
        """The rank of the loss's own Hessian at a site of the output, less a diagonal, at most.

        Zero where each number of the output has terms of its own, or the loss is linear; two for each softmax.
        """
        if not self._coupled:
            return 0
        softmaxes = self.softmaxes(channels)
        return channels.n if softmaxes is None else 2 * len(softmaxes)

    def softmaxes(self, channels: Channels) -> dict[int, Channels] | None:
        """The values log softmax(s f + c) of the loss's tape that it is linear in, each of a site of the output f.

        None where it is not, or a site has less than two numbers for each.
        """
        if channels not in self._softmaxes:
            found = log_softmaxes(self.terms, channels)
            few = found is not None and 2 * len(found) < channels.n
            self._softmaxes[channels] = found if few else None
        return self._softmaxes[channels]

    @cached_property
    def uses(self) -> dict[str, Use]:
        """The affine use of each parameter that has one alone."""
        return {name: use for name, (use, *others) in self.all_uses.items() if not others}

    def uses_of(self, parameter: str) -> tuple[Use, ...]:
        """The affine uses of a parameter; raises NotApplicable where it has others, or none."""
        if parameter not in self.all_uses:
            raise NotApplicable(self.reasons.get(parameter, "unused"))
        return self.all_uses[parameter]

    def use(self, parameter: str) -> Use:
        """The only one; raises NotApplicable where there are several, too."""
        use, *others = self.uses_of(parameter)
        if others:
            raise NotApplicable(self.reasons[parameter])
        return use

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

    @cached_property
    def weights(self) -> Weights:
        """What enters of the parameters."""
        return find_weights(self.tape, self.axes)

    @cached_property
    def behind_weights(self) -> Analysis:
        """The same of the tape whose parameters are the weights."""
        tape = self.weights.tape
        all_uses, reasons = find_uses(tape, self.axes)
        return replace(self, tape=tape, all_uses=all_uses, reasons=reasons)

    def weights_of(self, block: Block) -> Block:
        """The block of the weights that the parameters of a block make.

        Raises:
            NotApplicable: all enter once, as they are; or a weight is of another dtype.
        """
        made: dict[str, Tensor] = {}
        if any(name not in self.uses for name in block.parameters):
            mine = {w for name in block.parameters for w in self.weights.of.get(name, ())}
            made = {name: w for name, w in self.weights.values.items() if name in mine}
        if not made:
            raise NotApplicable("no weights are made of it")
        dtypes = {self.tape.given[number].dtype for number in self.tape.parameters.values()}
        if any(w.dtype not in dtypes for w in made.values()):
            raise NotApplicable("weights of another dtype")
        return Block(", ".join(made), tuple(made), tuple(w.numel() for w in made.values()))

    def neurons_of(self, block: Block, made: Block) -> Neurons | None:
        """Those of the only weight that a block's only parameter makes, if each is made of entries of its own."""
        if len(block.parameters) > 1 or len(made.parameters) > 1:
            return None
        (parameter,), (weight,) = block.parameters, made.parameters
        use, *others = self.behind_weights.uses_of(weight)
        if not use.is_layer or not all(map(use.enters_as, others)):
            return None
        if parameter not in self._neurons:
            self._neurons[parameter] = self.weights.neurons(parameter, use)
        return self._neurons[parameter]


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


class WeightAnalyses(Analyses):
    """Those of the problem as a function of its weights: `Analysis.behind_weights` of each batch.

    Raises:
        NotApplicable: nothing is proven of the first batch.
    """

    def __init__(self, analyses: Analyses) -> None:
        problem = analyses.problem
        weights = analyses.of(problem.batches[0]).weights
        super().__init__(replace(problem, parameters=weights.values))
        self.analyses = analyses

    def of(self, batch: Batch) -> Analysis:
        return self.analyses.of(batch).behind_weights


def _analyse(problem: Problem, batch: Batch) -> Analysis:
    if not batch.inputs[0].dim():
        raise NotApplicable("the inputs have no sample axis")
    samples = len(batch.inputs[0])
    tape = record(problem, batch)
    if tape.refusal:
        raise NotApplicable(tape.refusal)
    loss = problem.loss
    parts = parted(tape, samples) if loss.is_output else None
    if parts:
        tape, axes, terms = parts
        loss = RecordedLoss(**vars(loss), tape=terms)
    else:
        with torch.no_grad():
            output = problem.output(batch)
        if loss.function is not None and output.shape[:1] != (samples,):
            tape, in_front = with_samples_in_front(tape, samples, loss)
            loss, output = in_front, in_front.in_front(output)
        terms = record_terms(loss, output, batch)
        if terms.refusal:
            raise NotApplicable(f"{terms.refusal} in the loss {loss.name}")
        axes = sample_axes(tape, samples)
    all_uses, reasons = find_uses(tape, axes)
    analysis = Analysis(tape, axes, all_uses, reasons, loss, terms)
    if analysis.loss_couples(SampleAxis(0), samples):
        raise NotApplicable(f"the loss {loss.name} may mix samples")
    return analysis
