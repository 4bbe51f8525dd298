"""Model file + data file + options -> the Problem, ready to be differentiated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hesscli.errors import DeviceMismatchError, MismatchError, NumericalError
from hesscli.files.arrays import check_finite, not_finite_error
from hesscli.files.data import Data, load_data
from hesscli.files.models.model_file import SavedModel, load_model
from hesscli.hessian.aten.precision import in_precision_
from hesscli.hessian.batch_size import Passes
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.objective.measure import measure, protected
from hesscli.hessian.objective.problem import Problem
from hesscli.job.json_form import Document
from hesscli.job.options import ComputeOptions, Listener, Note, ProblemOptions
from hesscli.job.setup.batches import in_batches
from hesscli.job.setup.devices import demanding_float64, device_called
from hesscli.job.setup.loss import by_name, loss_of, printable
from hesscli.job.setup.own_loss import of_outputs
from hesscli.job.setup.parameters import chosen_parameters
from hesscli.job.setup.passing import as_columns, in_one, model_inputs, scales
from hesscli.job.setup.processes import Processes
from hesscli.job.setup.second_loss import demand_no_other
from hesscli.job.setup.settings import settle
from hesscli.job.setup.source import Source, per_sample
from hesscli.texts import listed

_THIS_ONE = Processes(side_by_side=False)


class NoteKeeper(Listener):
    """Passes on to a listener what it hears, each note once, and keeps the notes for the document."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.notes: list[str] = []

    def note(self, *texts: str) -> None:
        for text in texts:
            if text not in self.notes:
                self.notes.append(text)
                self.listener.note(text)

    def progress(self, done: int, total: int, doing: str) -> None:
        self.listener.progress(done, total, doing)


@dataclass(frozen=True)
class Opened:
    """A problem, and what is worth saying about where it came from."""

    options: ProblemOptions  # that it was opened with
    problem: Problem
    passes: Passes  # what goes through a batch at once
    tied: dict[str, list[str]]  # first name -> the other names of the same tensor
    frozen: list[str]  # parameters left out because they do not require a gradient
    facts: Document  # model, data and loss, as in the JSON document
    listener: NoteKeeper

    @cached_property
    def double(self) -> Problem | None:
        """The problem in float64, for checks and for differences; None if the model does not run in it."""
        return self.problem.double()

    @property
    def reference(self) -> Problem:
        """Where gradients are taken that are compared with each other: in float64 if the model runs in it."""
        return self.double or self.problem


def open_problem(
    options: ProblemOptions,
    listener: Listener,
    processes: Processes = _THIS_ONE,
) -> Opened:
    """Loads model and data, settles the loss, and makes one pass over the data."""
    device, keeper = device_called(options.device), NoteKeeper(listener)
    try:
        return _opened(options, device, keeper, processes)
    except DeviceMismatchError as error:
        if options.device != "auto":
            raise
        makes = error.message.partition(" on another device")[0]
    keeper.note(f"{makes} on the CPU, so all is done there")
    return _opened(options, torch.device("cpu"), keeper, processes)


def _opened(
    options: ProblemOptions,
    device: torch.device,
    listener: NoteKeeper,
    processes: Processes,
) -> Opened:
    """The same on one device; DeviceMismatchError where the model makes tensors on another."""
    note = listener.note
    torch.manual_seed(options.seed)
    settle(options)
    if options.tf32 and device.type != "cuda":
        note(f"--tf32 has no effect: the device is {device.type}")
    options = by_name(options, note)
    with demanding_float64():
        model, dtype, data = _loaded(options, device, listener)
    missing = data.not_finite()
    try:
        opened = _posed(options, model, dtype, data, device, listener, processes)
    except NumericalError as error:
        if missing is None:
            raise
        raise not_finite_error(options.data, *missing) from error
    except MismatchError as error:  # which may come of what is missing, or not
        if missing is None or isinstance(error, DeviceMismatchError):
            raise
        said = f"{error.message}; {missing[1]}"
        raise MismatchError(said, error.hint, error.instead_of) from error.__cause__
    if missing is not None:
        note(f"{missing[1]}; the model makes numbers of it")
    return opened


def _posed(
    options: ProblemOptions,
    model: SavedModel,
    dtype: torch.dtype,
    data: Data,
    device: torch.device,
    listener: NoteKeeper,
    processes: Processes,
) -> Opened:
    """The problem of a model and its data."""
    note = listener.note
    loss, arguments = loss_of(options, data, device, dtype, note)
    inputs, keywords = model_inputs(options, model, data, loss, note)
    parameters, tied, frozen = chosen_parameters(model.module, options.params, note)

    fewest, most = _batch_sizes(options, model, data, note)
    target = data.targets[1] if data.targets and loss.needs_target else None
    source = Source(
        inputs=inputs,
        keywords=keywords,
        scales=scales(options.scale, inputs, note),
        target=target,
        arguments=arguments,
        per_sample=per_sample(loss, arguments, target, data.recorded),
        range=data.range,
        recorded=data.recorded,
        fewest=fewest,
        most=most,
        device=device,
        dtype=dtype,
    )
    problem = Problem(
        model.module,
        parameters,
        (),
        loss,
        output_key=options.output_key,
        one_sample=options.unbatched,
    )
    problem, source = in_one(problem, source, model.signature, note)
    problem = of_outputs(problem, source, note)
    if options.loss == "auto" and data.targets:
        demand_no_other(problem, source, model.signature, data.targets[0])
    if data.columns:
        source = as_columns(problem, source, note)
    memory = options.memory if isinstance(options, ComputeOptions) else None
    problem, passes = in_batches(problem, source, options.batch_size, note, processes, memory)
    _demand_own_parameters(model, problem)
    problem = _as_computed(problem, note)
    problem, value = _measured(problem, processes, options, data)
    facts = _facts(options, model, data, list(inputs), problem, value)
    return Opened(options, problem, passes, tied, frozen, facts, listener)


def _loaded(
    options: ProblemOptions, device: torch.device, listener: NoteKeeper
) -> tuple[SavedModel, torch.dtype, Data]:
    """The model in the dtype asked for, that dtype, and the data."""
    model = options.model
    if not isinstance(model, SavedModel):
        model = load_model(
            model,
            arch=options.arch,
            arch_arguments=options.arch_arguments,
            allow_pickle=options.allow_pickle,
            train_mode=options.train_mode,
            device=device,
        )
    listener.note(*model.notes)
    dtype = _cast(model, options.dtype)
    named = [v for v in options.loss_arguments.values() if isinstance(v, str) and v.startswith("@")]
    data = load_data(
        options.data,
        inputs=options.inputs,
        targets=options.targets,
        unbatched=options.unbatched,
        samples=options.samples,
        model_names=model.signature.names,
        others=[value[1:] for value in named],
    )
    listener.note(*data.notes)
    return model, dtype, data


def _batch_sizes(
    options: ProblemOptions, model: SavedModel, data: Data, note: Note
) -> tuple[int, int | None]:
    """The fewest samples that the model takes at once, and the most."""
    sizes, samples = model.batch_sizes, data.samples
    # In train mode batch norm couples the samples of a batch.
    coupled = options.train_mode and sizes == (1, None)
    if not (options.unbatched or coupled):
        return sizes
    if options.batch_size not in (None, samples):
        note("--batch-size has no effect: all the data is one batch")
    return samples, samples


def _demand_own_parameters(model: SavedModel, problem: Problem) -> None:
    """Refuses the copy of a module in memory that computes with parameters of the original, or whose loss does."""
    if not (model.originals and problem.depends_on(model.originals)):
        return
    if problem.loss.function is not None:
        raise MismatchError(
            f"the loss {problem.loss.name} depends on the model's parameters, not on its output alone",
            'let forward return the loss, and say so: loss="output"',
        )
    raise MismatchError(
        f"{type(model.module).__name__}: forward finds parameters by a global name or a weak reference, "
        "so that its copy would compute with those of the original",
        "let forward find them by self",
    )


def _as_computed(problem: Problem, note: Note) -> Problem:
    """The problem in float64 throughout, if it is in float64, and at the weights that its passes write."""
    if problem.loss.wide:
        problem, _ = problem.widened()
        if problem.loss.wide:
            note("what the model itself computes in float32 is computed in float64")
    if problem.written:
        problem = protected(problem)
        names = listed(problem.written)
        note(f"the model writes to its weights ({names}): the Hessian is at what it writes")
    return problem


def _measured(
    problem: Problem, processes: Processes, options: ProblemOptions, data: Data
) -> tuple[Problem, float]:
    """The problem with what is measured, and its loss, a number, over the data of all processes."""
    measured, value = measure(processes.share_of(problem), processes.totals)
    if not math.isfinite(value):
        if data.targets:
            check_finite(options.data, *data.targets)
        raise NumericalError(f"the loss is {value}; its derivatives would mean nothing")
    denominator, functions = measured.denominator, measured.functions
    return replace(problem, denominator=denominator, functions=functions), value


def _facts(
    options: ProblemOptions,
    model: SavedModel,
    data: Data,
    inputs: list[str],
    problem: Problem,
    value: float,
) -> Document:
    """Model, data and loss, as in the JSON document; the inputs' names are in the model's order."""
    loss = problem.loss
    return {
        "curvature": CURVATURES[options.curvature].document_name,
        "model": {"path": str(options.model), "kind": model.form, "sha256": model.sha256},
        "data": {
            "path": str(options.data),
            "sha256": data.sha256,
            "samples": data.samples,
            "inputs": inputs,
            "targets": data.targets[0] if data.targets and loss.needs_target else None,
            **({"range": list(data.range)} if options.samples else {}),
            **({"scale": dict(options.scale)} if options.scale else {}),
        },
        "loss": {
            "name": loss.name,
            "arguments": printable(options.loss_arguments),
            "reduction": loss.reduction,
            "denominator": problem.denominator,
            "value": value,
            "inferred": options.loss == "auto",
        },
    }


def _cast(model: SavedModel, name: str) -> torch.dtype:
    """Brings the module to the dtype asked for, and says which one that is."""
    floating = {p.dtype for p in model.module.parameters() if p.is_floating_point()}
    if not floating and any(p.is_complex() for p in model.module.parameters()):
        raise MismatchError(
            "the model's parameters are complex; a Hessian is made of derivatives along real ones",
            "hold real and imaginary parts in one real parameter: torch.view_as_complex(w)",
        )
    if not floating:
        raise MismatchError("the model has no floating-point parameters, so there is no Hessian")
    wanted = {"float32": torch.float32, "float64": torch.float64}.get(name)
    if wanted is None:
        wanted = torch.float64 if torch.float64 in floating else torch.float32
    if floating != {wanted}:
        in_precision_(model.module, wanted)
    return wanted
