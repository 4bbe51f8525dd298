"""`hesscli compute`: the Hessian of a saved model, block by block, checked and written."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from hesscli.errors import HesscliError, InterruptedRun, NumericalError, ResourceError
from hesscli.files.hessian_writer import HessianWriter
from hesscli.hessian.blocks import Block
from hesscli.hessian.check import Certificate
from hesscli.job import document as documents
from hesscli.job.beside import Beside
from hesscli.job.document import Document
from hesscli.job.journal import Journal
from hesscli.job.large import LargeBlock
from hesscli.job.opening import open_problem
from hesscli.job.options import ComputeOptions, Listener
from hesscli.job.planning import Plan
from hesscli.job.whole import WholeBlocks, groups
from hesscli.job.writing import may_write
from hesscli.spectrum.eigen import DENSE_LIMIT, extremes

# What changes nothing in the file.
_ELSEWHERE = {"model", "data", "output", "force", "resume", "loss_arguments", "arch_arguments"}


def compute(options: ComputeOptions, listener: Listener, dry_run: bool = False) -> Document:
    """Computes the Hessian that the options ask for and writes it; with `dry_run`, only says what that takes.

    Returns:
        the JSON document.

    Raises:
        HesscliError: of any kind; nothing is written then.
    """
    started = time.perf_counter()
    if options.output is not None and not dry_run:
        may_write(options.output, options.force, (options.model, options.data))
    plan = Plan(options, open_problem(options, listener), listener)
    if dry_run:
        document = plan.dry_run()
    else:
        plan.fits()
        document = _Run(plan).run()
    document["seconds"] = time.perf_counter() - started
    document["output"] = str(options.output) if options.output else "-"
    return document


class _Run:
    """A plan carried out."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.options = plan, plan.options
        self.groups = list(groups(plan))
        self.large = [LargeBlock(plan, block) for block in plan.blocks if plan.is_large(block)]
        self.rows = sum(block.size for block in plan.blocks)
        self.done = 0
        self.certificate: Certificate | None = None
        if self.options.check:
            self.certificate = Certificate(plan.reference, plan.problem.dtype, self.options.seed)

    def run(self) -> Document:
        """Computes, checks and writes every block."""
        plan = self.plan
        gradient = plan.problem.gradient(list(plan.shapes))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        if not math.isfinite(norm):
            raise NumericalError(f"the gradient's norm is {norm}; the Hessian would mean nothing")
        document = documents.skeleton(plan.opened, plan.structure) | {"gradient_norm": norm}
        document["blocks"] = [documents.block_facts(plan.opened, block) for block in plan.blocks]
        journal = self._journal(document)
        dtype = str(plan.problem.dtype).removeprefix("torch.")
        with HessianWriter(
            self.options.output, self._tensors(), dtype, document, start=journal.start
        ) as writer:
            if self.options.gradient:
                for name, g in gradient.items():
                    writer.write(f"gradient.{name}", g.cpu().numpy())
            try:
                blocks = self._blocks(writer, journal, gradient)
            except BaseException as error:
                raise self._left(error, writer, journal) from None
            document |= self._results(blocks) | {"checksums": writer.checksums()}
            writer.commit(documents.timeless(document))
            journal.remove()
            if self.options.output is None:
                writer.copy_to(sys.stdout.buffer)
        return document

    def _journal(self, document: Document) -> Journal:
        """The journal, with what an earlier run of this very command left."""
        options = {k: v for k, v in asdict(self.options).items() if k not in _ELSEWHERE}
        head = {"document": documents.timeless(document), "options": options}
        parts = len(self.groups) + sum(block.count() for block in self.large)
        journal = Journal(self.options.output, head, parts)
        journal.resume(self.options.resume, self.options.force)
        return journal

    def _blocks(
        self, writer: HessianWriter, journal: Journal, gradient: Mapping[str, Tensor]
    ) -> list[Document]:
        """Every block's facts, in model order; its values are in the file then."""
        self.plan.listener.progress(0, self.rows, "")
        finished: dict[str, Document] = {}
        with Beside(enabled=self.plan.problem.device.type != "cpu") as beside:
            for group in self.groups:
                for facts in self._group(group, writer, journal, beside):
                    finished[facts["name"]] = facts
        for block in self.large:
            facts = block.compute(writer, journal, self.certificate, self._progress)
            if self.options.stats == "all":
                low, high = extremes(writer.mapped(facts["name"]), DENSE_LIMIT)
                facts |= {"eig_max": high, "eig_min": low}
            finished[facts["name"]] = facts
        for facts in finished.values():
            names = next(b.parameters for b in self.plan.blocks if b.name == facts["name"])
            if facts.pop("zero") and not any(bool(gradient[name].any()) for name in names):
                facts["unused"] = True
                self.plan.note(f"{facts['name']}: unused, its block is zero")
        return [finished[block.name] for block in self.plan.blocks]

    def _group(
        self, group: Sequence[Block], writer: HessianWriter, journal: Journal, beside: Beside
    ) -> list[Document]:
        """The facts of blocks that are computed together; from the journal, where they are in the file."""
        part = ", ".join(block.name for block in group)
        known = journal.finished.get(part)
        if known is not None:
            self.plan.recall(known["notes"])
            writer.believe(known["checksums"])
            for facts in known["blocks"]:
                self._progress(facts["size"], facts["name"])
            return list(known["blocks"])
        found = []
        for facts, array in WholeBlocks(self.plan, self.certificate).compute(group):
            beside.run(writer.write, facts["name"], array)
            found.append(facts | {"zero": not array.any()})
            self._progress(facts["size"], facts["name"])

        def note() -> None:
            checksums = writer.checksums()
            journal.add(
                part,
                {
                    "blocks": found,
                    "notes": list(self.plan.opened.notes),
                    "checksums": {block.name: checksums[block.name] for block in group},
                },
                writer,
            )

        beside.run(note)
        return found

    def _progress(self, rows: int, doing: str) -> None:
        self.done += rows
        self.plan.listener.progress(self.done, self.rows, doing)

    def _left(self, error: BaseException, writer: HessianWriter, journal: Journal) -> BaseException:
        """The error to end with: where going on later makes sense, what is finished is kept, and said."""
        out_of_room = isinstance(error, (ResourceError, MemoryError, torch.OutOfMemoryError))
        if not out_of_room and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            journal.remove()
            return error
        with contextlib.suppress(HesscliError, OSError):
            journal.flush(writer)
        if not journal.finished or self.options.output is None:
            journal.remove()
            return error
        writer.keep()
        kept = f"{len(journal.finished)} of {journal.parts} parts are kept"
        if isinstance(error, KeyboardInterrupt):
            return InterruptedRun(f"interrupted; {kept}", "--resume")
        if isinstance(error, SystemExit):
            self.plan.listener.note(f"terminated; {kept}, and --resume goes on with them")
            return error
        return ResourceError(f"{getattr(error, 'message', 'out of memory')}; {kept}", "--resume")

    def _results(self, blocks: list[Document]) -> Document:
        errors = [
            facts["symmetry_error"] for facts in blocks if facts["symmetry_error"] is not None
        ]
        return {
            "blocks": blocks,
            "total": documents.total(blocks),
            "method": " + ".join(sorted({facts["method"] for facts in blocks})),
            "symmetry_error": max(errors, default=None),
            "check": documents.check_facts(self.certificate, blocks),
            "notes": list(self.plan.opened.notes),
        }

    def _tensors(self) -> dict[str, tuple[int, ...]]:
        shapes, diagonal = self.plan.shapes, self.plan.diagonal
        tensors = {
            block.name: shapes[block.name] if diagonal else (block.size, block.size)
            for block in self.plan.blocks
        }
        if self.options.gradient:
            tensors |= {f"gradient.{name}": shape for name, shape in shapes.items()}
        return tensors
