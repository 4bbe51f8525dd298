"""Model file + data file + options -> the Problem, ready to be differentiated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hesscli.errors import (
    DeviceMismatchError,
    MismatchError,
    NumericalError,
    ResourceError,
    UsageError,
)
from hesscli.files.data import Data, load_data
from hesscli.files.finite import check_finite
from hesscli.files.models.model_file import SavedModel, load_model
from hesscli.hessian.aten.precision import in_precision_
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.objective.measure import measure, protected
from hesscli.hessian.objective.problem import Problem
from hesscli.job.json_form import Document
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.setup.batches import split
from hesscli.job.setup.loss import loss_of, printable
from hesscli.job.setup.parameters import chosen_parameters
from hesscli.job.setup.passing import as_columns, passed, scales
from hesscli.job.setup.processes import Processes
from hesscli.job.setup.settings import settle
from hesscli.job.setup.source import Source, per_sample
from hesscli.job.setup.team import rank_here, ranks
from hesscli.texts import listed

_THIS_ONE = Processes()


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
    chunk: int  # rows of a matrix that go through at once
    tied: dict[str, list[str]]  # first name -> the other names of the same tensor
    frozen: list[str]  # parameters left out because they do not require a gradient
    facts: Document  # model, data and loss, as in the JSON document
    listener: NoteKeeper

    @cached_property
    def double(self) -> Problem | None:
        """The problem in float64, for checks and for differences; None if the model does not run in it."""
        return self.problem.double()


def open_problem(
    options: ProblemOptions,
    listener: Listener,
    processes: Processes = _THIS_ONE,
    side_by_side: bool = False,
) -> Opened:
    """Loads model and data, settles the loss, and makes one pass over the data.

    Args:
        options: what was asked for.
        listener: hears the notes.
        processes: that have the data; and the model, where it is in place of the file that the options name.
        side_by_side: batches will be worked on side by side.

    Raises:
        HesscliError: of any kind; see `errors.py`.
    """
    device, keeper, model = device_called(options.device), NoteKeeper(listener), processes.model
    try:
        return _Opening(options, device, keeper, model).opened(processes, side_by_side)
    except DeviceMismatchError:
        if options.device != "auto":
            raise
    keeper.note("the model makes tensors on the CPU, so all is done there")
    cpu = torch.device("cpu")
    return _Opening(options, cpu, keeper, model).opened(processes, side_by_side)


class _Opening:
    """Model, data and loss on one device, and how they go together.

    Raises:
        DeviceMismatchError: the model makes tensors on another.
    """

    def __init__(
        self,
        options: ProblemOptions,
        device: torch.device,
        listener: NoteKeeper,
        model: SavedModel | None,
    ) -> None:
        self.options, self.device, self.listener = options, device, listener
        self.note = note = listener.note
        torch.manual_seed(options.seed)
        settle(options)
        if options.tf32 and device.type != "cuda":
            note(f"--tf32 has no effect: the device is {device.type}")
        self.model = model or self._load_model()
        note(*self.model.notes)
        self.dtype = _cast(self.model, options.dtype)
        self.data = self._load_data()
        note(*self.data.notes)
        self.loss, self.arguments = loss_of(options, self.data, device, self.dtype, note)
        self.inputs, self.keywords = passed(options, self.model, self.data, self.loss, note)
        self.parameters, self.tied, self.frozen = chosen_parameters(
            self.model.module, options.params, note
        )

    def opened(self, processes: Processes, side_by_side: bool) -> Opened:
        """The problem, after one pass over the data."""
        options, note, source = self.options, self.note, self._source()
        problem = Problem(
            self.model.module,
            self.parameters,
            (),
            self.loss,
            output_key=options.output_key,
            one_sample=options.unbatched,
        )
        if self.data.columns:
            source = as_columns(problem, source, note)
        problem, chunk = split(problem, source, options.batch_size, note, processes, side_by_side)
        self._demand_own_parameters(problem)
        if self.loss.wide:
            problem, _ = problem.widened()
            if problem.loss.wide:
                note("what the model itself computes in float32 is computed in float64")
        if problem.written:
            problem = protected(problem)
            note(
                f"the model writes to its weights ({listed(problem.written)}): the Hessian is at what it writes"
            )
        problem, value = self._measured(problem, processes)
        facts = self._facts(problem, value)
        return Opened(options, problem, chunk, self.tied, self.frozen, facts, self.listener)

    def _load_model(self) -> SavedModel:
        return load_model(
            self.options.model,
            arch=self.options.arch,
            arch_arguments=self.options.arch_arguments,
            allow_pickle=self.options.allow_pickle,
            train_mode=self.options.train_mode,
            device=self.device,
        )

    def _load_data(self) -> Data:
        arguments = self.options.loss_arguments.values()
        named = [text for text in arguments if isinstance(text, str) and text.startswith("@")]
        return load_data(
            self.options.data,
            inputs=self.options.inputs,
            targets=self.options.targets,
            unbatched=self.options.unbatched,
            samples=self.options.samples,
            arguments=self.model.signature.names,
            others=[text[1:] for text in named],
        )

    def _source(self) -> Source:
        """What batches are cut from."""
        data, (fewest, most) = self.data, self._batch_sizes()
        target = data.targets[1] if data.targets and self.loss.needs_target else None
        return Source(
            inputs=self.inputs,
            keywords=self.keywords,
            scales=scales(self.options.scale, self.inputs, self.note),
            target=target,
            arguments=self.arguments,
            per_sample=per_sample(self.loss, self.arguments, target, data.recorded),
            range=data.range,
            recorded=data.recorded,
            fewest=fewest,
            most=most,
            device=self.device,
            dtype=self.dtype,
        )

    def _batch_sizes(self) -> tuple[int, int | None]:
        """The fewest samples that the model takes at once, and the most."""
        options, sizes, samples = self.options, self.model.batch_sizes, self.data.samples
        # In train mode batch norm couples the samples of a batch.
        coupled = options.train_mode and sizes == (1, None)
        if not (options.unbatched or coupled):
            return sizes
        if options.batch_size not in (None, samples):
            self.note("--batch-size has no effect: all the data is one batch")
        return samples, samples

    def _demand_own_parameters(self, problem: Problem) -> None:
        """Refuses the copy of a module in memory that computes with parameters of the original."""
        if self.model.originals and problem.depends_on(self.model.originals):
            raise MismatchError(
                f"{type(self.model.module).__name__}: forward finds parameters by a global name or a weak reference, "
                "so that its copy would compute with those of the original",
                "let forward find them by self",
            )

    def _measured(self, problem: Problem, processes: Processes) -> tuple[Problem, float]:
        """The problem with its denominator, and the value of the loss, which is finite."""
        measured, value = measure(processes.own(problem), processes.totals)
        if not math.isfinite(value):
            if self.data.targets:
                check_finite(self.options.data, *self.data.targets)
            raise NumericalError(f"the loss is {value}; its derivatives would mean nothing")
        return replace(problem, denominator=measured.denominator), value

    def _facts(self, problem: Problem, value: float) -> Document:
        """Model, data and loss, as in the JSON document; the inputs' names are in the model's order."""
        options, model, data, loss = self.options, self.model, self.data, problem.loss
        return {
            "curvature": CURVATURES[options.curvature].document_name,
            "model": {"path": str(options.model), "kind": model.form, "sha256": model.sha256},
            "data": {
                "path": str(options.data),
                "sha256": data.sha256,
                "samples": data.samples,
                "inputs": list(self.inputs),
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


def device_called(name: str) -> torch.device:
    """A device of this machine, by what `--device` calls it.

    Raises:
        UsageError: it is no name of a device.
        ResourceError: this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks() > 1:  # one for each process
        name = f"cuda:{rank_here() % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no device is called {name!r}", "--device cpu") from None
    available = {
        "cpu": not device.index,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ResourceError(f"this machine has no device {name}", "--device cpu")
    return device


def _cast(model: SavedModel, name: str) -> torch.dtype:
    """Brings the module to the dtype asked for, and says which one that is."""
    floating = {p.dtype for p in model.module.parameters() if p.is_floating_point()}
    if not floating:
        raise MismatchError("the model has no floating-point parameters, so there is no Hessian")
    wanted = {"float32": torch.float32, "float64": torch.float64}.get(name)
    if wanted is None:
        wanted = torch.float64 if torch.float64 in floating else torch.float32
    if floating != {wanted}:
        in_precision_(model.module, wanted)
    return wanted
