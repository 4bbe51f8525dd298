"""A plan of `hesscli compute` carried out: its blocks computed, checked and written, by one process or by several."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import BinaryIO

from hesscli.errors import FileError, HesscliError, UsageError
from hesscli.files.hessians.result_names import journals
from hesscli.files.hessians.result_writer import ResultWriter, demand_idle
from hesscli.hessian.objective.first_gradient import first_gradient
from hesscli.job import documents, statistics
from hesscli.job.json_form import Document, timeless
from hesscli.job.matrix.background import Background
from hesscli.job.matrix.journal import Journal, read_journal
from hesscli.job.matrix.large import LargeBlock
from hesscli.job.matrix.planning import Advance, Plan
from hesscli.job.matrix.small import Group, groups
from hesscli.job.matrix.unfinished import Unfinished
from hesscli.job.options import command_of
from hesscli.job.setup.loss import described
from hesscli.job.setup.team import Team, balanced
from hesscli.texts import dtype_name, listed

# What changes nothing in the file.
_ELSEWHERE = {"model", "data", "output", "force", "resume", "shard", "memory", "device"}


@dataclass
class Run:
    """A plan carried out."""

    plan: Plan
    team: Team  # the processes that share it
    merging: bool = False  # finishes what other processes have computed
    stdout: BinaryIO | None = None  # where the bytes go, if there is no output file

    def __post_init__(self) -> None:
        plan, self.options = self.plan, self.plan.options
        self.sharing = plan.divided and not self.merging  # other processes write to the file now
        self.bands: dict[str, int] = self.team.broadcast(self._bands())
        self.advance = _progress(plan)
        self.groups = [Group(plan, blocks, self.advance) for blocks in groups(plan)]
        self.large = [
            LargeBlock(plan, block, self.bands[block.name], self.advance) for block in plan.large
        ]
        self.work: list[Group | LargeBlock] = [*self.groups, *self.large]
        self.parts = [part for each in self.work for part in each.parts()]

    def _bands(self) -> dict[str, int]:
        """Numbers per band of each large block: as in the file that this run goes on with, or as many as fit now."""
        bands = {block.name: self.plan.memory.band(block) for block in self.plan.large}
        output = self.options.output
        goes_on = self.options.resume or self.options.shard is not None
        for path in journals(output) if output is not None and goes_on else ():
            with contextlib.suppress(FileError):  # told, or ignored, where the journal is opened
                head = read_journal(path).head
                if head is not None and head["bands"].keys() == bands.keys():
                    return dict(head["bands"])
        return bands

    def run(self) -> Document:
        """Computes, checks and writes every block."""
        plan = self.plan
        gradient, norm, unused = first_gradient(plan.problem)
        document = documents.skeleton(plan.opened, plan.structure) | {"gradient_norm": norm}
        document["blocks"] = [documents.block_facts(plan.opened, block) for block in plan.blocks]
        journal = self._journal(document)
        if self.sharing:
            self._contribute(document, journal)
            if self.options.shard is not None or self.team.rank > 0:
                return document
            journal.gather()
        with self._unfinished(document, journal) as unfinished:
            if self.options.gradient:
                for name, g in gradient.items():
                    unfinished.writer.write(f"gradient.{name}", g.cpu().numpy())
            blocks = self._blocks(unfinished, unused)
            symmetry_error = statistics.symmetry_error(blocks)
            for facts in blocks:
                del facts["norm"]
            document |= {
                "blocks": blocks,
                "total": statistics.total(blocks),
                "method": documents.methods(blocks),
                "symmetry_error": symmetry_error,
                "check": documents.block_check_facts(plan.certificate, blocks),
                "notes": list(plan.opened.listener.notes),
            }
            document |= unfinished.commit(timeless(document))
            if self.options.output is None and self.stdout is not None:
                unfinished.writer.copy_to(self.stdout)
        return document

    def _unfinished(self, document: Document, journal: Journal) -> Unfinished:
        writer = ResultWriter(
            self.options.output,
            self._tensors(),
            dtype_name(self.plan.problem.dtype),
            document,
            max_shard_size=self.options.max_shard_size,
            start=journal.start,
            shared=self.sharing,
        )
        return Unfinished(
            writer, journal, len(self.parts), self.plan.divided, self.plan.opened.listener
        )

    def _journal(self, document: Document) -> Journal:
        """The journal, with what earlier runs of this very command, or its other shards, have finished."""
        command = json.loads(json.dumps(command_of(self.options), default=described))
        head = {
            "document": timeless(document),
            "options": {k: v for k, v in command.items() if k not in _ELSEWHERE},
            "bands": self.bands,
        }
        shard, output = self.options.shard, self.options.output
        writer = "-of-".join(map(str, shard)) if shard else str(self.team.rank or "")
        journal = Journal(output, head, command, writer)
        if self.merging:
            journal.merge()
        else:
            with self.team.first() as first:  # alone looks at what is left
                if first:
                    if output is not None:  # what a run that goes on has finished is no left-over
                        demand_idle(output, self.sharing)
                    journal.resume(self.options.resume, self.options.force)
        given_up = [each for each in self.large if each.is_given_up(journal.finished)]
        parts = [name for each in self.work if each not in given_up for name, _ in each.parts()]
        left = [name for name in parts if name not in journal.finished]
        if self.merging and left:
            raise UsageError(
                f"{output}: {len(left)} of {len(self.parts)} parts are missing, {left[0]} for one",
                "run the other shards, or one that was cut off again with --resume",
            )
        if self.team.size > 1:
            journal.join(*self.team.broadcast((journal.start, journal.finished)))
        return journal

    def _contribute(self, document: Document, journal: Journal) -> None:
        """Computes this process's share, and waits for the others."""
        if self.options.shard is not None:
            number, count = self.options.shard
            mine = balanced(self.parts, count)[number - 1]
            if not mine:
                return
        else:
            left = [part for part in self.parts if part[0] not in journal.finished]
            mine = balanced(left, self.team.size)[self.team.rank]
        with self._unfinished(document, journal) as unfinished:
            unfinished.writer.keep()
            try:
                for each in self.work:
                    each.contribute(unfinished, mine)
                unfinished.flush()
                self.team.all_gather(None)  # until all are here
            except HesscliError as error:
                error.of_share = True
                raise

    def _blocks(self, unfinished: Unfinished, unused: set[str]) -> list[Document]:
        """Every block's facts, in model order; its values are in the file then."""
        self.advance(0, "")
        found: list[Document] = []
        with Background(enabled=self.plan.problem.device.type != "cpu") as background:
            for group in self.groups:
                found += group.compute(unfinished, background)
        found += [large.compute(unfinished) for large in self.large]
        finished = {facts["name"]: facts for facts in found}
        every: list[Document] = []
        zero: list[str] = []
        for block in self.plan.blocks:
            facts = dict(finished[block.name])  # the journal's own is not on the disk yet
            if not facts["norm"] and unused.issuperset(block.parameters):
                facts["unused"] = True
                zero.append(block.name)
            every.append(facts)
        if zero:
            so = "its block is zero" if len(zero) == 1 else "their blocks are zero"
            self.plan.opened.listener.note(
                f"{listed(zero)}: unused, detached or under torch.no_grad, so {so}"
            )
        return every

    def _tensors(self) -> dict[str, tuple[int, ...]]:
        shapes, diagonal = self.plan.shapes, self.plan.diagonal
        tensors = {
            block.name: shapes[block.name] if diagonal else (block.size, block.size)
            for block in self.plan.blocks
        }
        if self.options.gradient:
            tensors |= {f"gradient.{name}": shape for name, shape in shapes.items()}
        return tensors


def _progress(plan: Plan) -> Advance:
    """Tells a plan's listener how many of its rows are done."""
    listener, every, done = plan.opened.listener, sum(block.size for block in plan.blocks), 0

    def advance(rows: int, doing: str) -> None:
        nonlocal done
        done += rows
        listener.progress(done, every, doing)

    return advance
