"""A plan of `hesscli compute` carried out: its blocks computed, checked and written, by one process or by several."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import BinaryIO

from hesscli.errors import (
    FileError,
    HesscliError,
    InterruptedRun,
    ResourceError,
    UsageError,
    is_out_of_memory,
)
from hesscli.files.result_names import journals
from hesscli.files.result_writer import ResultWriter
from hesscli.hessian.blocks import Block
from hesscli.hessian.first_gradient import first_gradient
from hesscli.job import documents, statistics
from hesscli.job.beside import Beside
from hesscli.job.journal import Journal, read_journal
from hesscli.job.json_form import Document, timeless
from hesscli.job.large import LargeBlock
from hesscli.job.loss import described
from hesscli.job.options import command_of
from hesscli.job.planning import Plan
from hesscli.job.team import Team, missing, shares
from hesscli.job.whole import WholeBlocks, groups
from hesscli.spectrum.eigen import extremes
from hesscli.texts import dtype_name

# What changes nothing in the file.
_ELSEWHERE = {"model", "data", "output", "force", "resume", "shard", "memory", "device"}


class Run:
    """A plan carried out.

    Args:
        plan: the plan.
        team: the processes that share it.
        merging: finishes what other processes have computed.
        stdout: where the bytes go, if there is no output file.
    """

    def __init__(
        self, plan: Plan, team: Team, merging: bool = False, stdout: BinaryIO | None = None
    ) -> None:
        self.plan, self.options = plan, plan.options
        self.team, self.merging, self.stdout = team, merging, stdout
        plan.bands = team.tell(self._begun() or plan.bands)
        self.groups = list(groups(plan))
        self.large = [LargeBlock(plan, block) for block in plan.blocks if plan.is_large(block)]
        self.parts = [(_part(group), plan.work(group)) for group in self.groups]
        self.parts += [part for block in self.large for part in block.parts()]
        self.rows = sum(block.size for block in plan.blocks)
        self.done = 0

    def _begun(self) -> dict[str, int] | None:
        """How the file that this run goes on with was cut into bands; free memory may have changed since."""
        output = self.options.output
        goes_on = self.options.resume or self.merging or self.options.shard is not None
        if output is None or not goes_on:
            return None
        for path in journals(output):
            with contextlib.suppress(FileError):  # told, or ignored, where the journal is opened
                head = read_journal(path).head
                if head is not None and head["bands"].keys() == self.plan.bands.keys():
                    return dict(head["bands"])
        return None

    def run(self) -> Document:
        """Computes, checks and writes every block."""
        plan = self.plan
        gradient, norm, unused = first_gradient(plan.problem)
        document = documents.skeleton(plan.opened, plan.structure) | {"gradient_norm": norm}
        document["blocks"] = [documents.block_facts(plan.opened, block) for block in plan.blocks]
        journal = self._journal(document)
        if plan.shared and not self.merging:
            self._contribute(document, journal)
            if self.options.shard is not None or self.team.rank > 0:
                return document
            journal.gather()
        with self._writer(document, journal, self.team.size > 1) as writer:
            if self.options.gradient:
                for name, g in gradient.items():
                    writer.write(f"gradient.{name}", g.cpu().numpy())
            try:
                document |= self._results(self._blocks(writer, journal, unused))
                document |= writer.commit(timeless(document))
            except BaseException as error:
                raise self._left(error, writer, journal) from None
            journal.remove()
            if self.options.output is None and self.stdout is not None:
                writer.copy_to(self.stdout)
        return document

    def _writer(self, document: Document, journal: Journal, shared: bool = False) -> ResultWriter:
        return ResultWriter(
            self.options.output,
            self._tensors(),
            dtype_name(self.plan.problem.dtype),
            document,
            max_shard_size=self.options.max_shard_size,
            start=journal.start,
            shared=shared,
        )

    def _journal(self, document: Document) -> Journal:
        """The journal, with what earlier runs of this very command, or its other shards, have finished."""
        command = json.loads(json.dumps(command_of(self.options), default=described))
        head = {
            "document": timeless(document),
            "options": {k: v for k, v in command.items() if k not in _ELSEWHERE},
            "bands": self.plan.bands,
        }
        names = [name for name, _ in self.parts]
        shard, output = self.options.shard, self.options.output
        writer = "-of-".join(map(str, shard)) if shard else str(self.team.rank or "")
        journal = Journal(output, head, command, names, writer)
        if self.team.rank == 0:
            journal.resume(self.options.resume, self.options.force, shard is not None, self.merging)
        if self.merging and (left := missing(names, journal.finished)):
            raise UsageError(
                f"{output}: {len(left)} of {len(names)} parts are missing, {left[0]} for one",
                "run the other shards, or one that was cut off again with --resume",
            )
        if self.team.size > 1:
            journal.join(*self.team.tell((journal.start, journal.finished)))
        return journal

    def _contribute(self, document: Document, journal: Journal) -> None:
        """Computes this process's share, and waits for the others."""
        if self.options.shard is not None:
            number, count = self.options.shard
            mine = shares(self.parts, count)[number - 1]
            if not mine:
                return
        else:
            left = set(missing([name for name, _ in self.parts], journal.finished))
            unfinished = [part for part in self.parts if part[0] in left]
            mine = shares(unfinished, self.team.size)[self.team.rank]
        with self._writer(document, journal, True) as writer:
            writer.keep()
            journal.start = writer.start
            try:
                for group in self.groups:
                    if _part(group) in mine and _part(group) not in journal.finished:
                        with Beside(enabled=False) as beside:
                            self._group(group, writer, journal, beside)
                for block in self.large:
                    block.contribute(writer, journal, mine, self._progress)
                journal.flush(writer)
                self.team.wait()
            except BaseException as error:
                if isinstance(error, HesscliError):
                    error.of_share = True
                raise self._left(error, writer, journal) from None

    def _blocks(self, writer: ResultWriter, journal: Journal, unused: set[str]) -> list[Document]:
        """Every block's facts, in model order; its values are in the file then."""
        self.plan.listener.progress(0, self.rows, "")
        finished: dict[str, Document] = {}
        with Beside(enabled=self.plan.problem.device.type != "cpu") as beside:
            for group in self.groups:
                for facts in self._group(group, writer, journal, beside):
                    finished[facts["name"]] = facts
        for large in self.large:
            facts = large.compute(writer, journal, self._progress)
            if self.options.stats == "all":
                low, high = extremes(writer.mapped(facts["name"]))
                facts |= {"eig_max": high, "eig_min": low}
            finished[facts["name"]] = facts
        every = []
        for block in self.plan.blocks:
            facts = dict(finished[block.name])  # the journal's own is not on the disk yet
            if facts.pop("zero") and unused.issuperset(block.parameters):
                facts["unused"] = True
                self.plan.opened.note(f"{block.name}: unused, its block is zero")
            every.append(facts)
        return every

    def _group(
        self, group: Sequence[Block], writer: ResultWriter, journal: Journal, beside: Beside
    ) -> list[Document]:
        """The facts of blocks that are computed together; from the journal, where they are in the file."""
        part = _part(group)
        known = journal.finished.get(part)
        if known is not None and writer.holds(known["checksums"]):
            self.plan.opened.note(*known["notes"])
            for facts in known["blocks"]:
                self._progress(facts["size"], facts["name"])
            return list(known["blocks"])
        found = []
        for facts, array in WholeBlocks(self.plan).compute(group):
            beside.run(writer.write, facts["name"], array)
            found.append(facts | {"zero": not array.any()})
            self._progress(facts["size"], facts["name"])

        def note() -> None:
            checksums = writer.checksums()
            journal.add(
                part,
                {
                    "blocks": found,
                    "notes": list(self.plan.opened.note.texts),
                    "checksums": {block.name: checksums[block.name] for block in group},
                },
                writer,
            )

        beside.run(note)
        return found

    def _progress(self, rows: int, doing: str) -> None:
        self.done += rows
        self.plan.listener.progress(self.done, self.rows, doing)

    def _left(self, error: BaseException, writer: ResultWriter, journal: Journal) -> BaseException:
        """The error to end with: where going on later makes sense, what is finished is kept, and said."""
        out_of_room = isinstance(error, ResourceError) or is_out_of_memory(error)
        if not out_of_room and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            if not self.plan.shared:
                journal.remove()
            return error
        with contextlib.suppress(HesscliError, OSError):
            journal.flush(writer)
        if not journal.finished or self.options.output is None:
            return error
        writer.keep()
        kept = f"{len(journal.finished)} of {len(journal.parts)} parts are kept"
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
            "total": statistics.total(blocks),
            "method": " + ".join(sorted({facts["method"] for facts in blocks})),
            "symmetry_error": max(errors, default=None),
            "check": documents.block_check_facts(self.plan.certificate, blocks, self.plan.diagonal),
            "notes": list(self.plan.opened.note.texts),
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


def _part(group: Sequence[Block]) -> str:
    return ", ".join(block.name for block in group)
