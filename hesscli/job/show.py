"""`hesscli show`: what a Hessian file says about itself. Importing this loads no torch, and little else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hesscli.files.hessians.hessian_file import HessianFile
from hesscli.job.json_form import Document
from hesscli.job.options import Progress
from hesscli.job.stored import chosen, opened_file

if TYPE_CHECKING:
    from hesscli.job.picture import Picture

QUICK = 64 << 20
"""Bytes of tensors up to which they are always compared with their checksums: a few hundredths of a second."""


def show(
    source: str,
    block: str | None,
    wide: bool,
    pixels: Sequence[int],
    verify: bool,
    progress: Progress,
) -> tuple[Document, list[Picture]]:
    """The document of a Hessian file, and pictures of |H|.

    Args:
        wide: with `mean_eig` and `condition` of every block. What the file lacks is computed for blocks
            that are small enough for it to be quick.
        pixels: the rows and columns of each picture, at most.
        verify: compare every tensor with its checksum, also in a large file.

    Raises:
        FileError: it is not a Hessian file, or not as it was written.
        UsageError: there is no such file, or no such block.
    """
    with opened_file(source, "show") as file:
        held = sum(end - start for start, end in (e["data_offsets"] for e in file.entries.values()))
        if verify or held <= QUICK:
            for name in file.entries:
                file.verified(name)
        document = file.document | {"hessian": source}
        document["blocks"] = chosen(file.document, block, source)
        if block is not None or wide:
            from hesscli.job import statistics

            document["blocks"] = [_wide(file, facts) for facts in document["blocks"]]
            document["total"] = statistics.total(document["blocks"])
            document["total"]["mean_eig"] = _mean(document["total"])
        names = [facts["name"] for facts in document["blocks"]]
        if not pixels:
            return document, []
        from hesscli.job.picture import picture

        return document, [picture(file, names, most, progress) for most in pixels]


def _wide(file: HessianFile, facts: Document) -> Document:
    from hesscli.job import statistics
    from hesscli.spectrum.statistics import QUICK_LIMIT

    known = facts.get("negative") is not None
    if not known and 0 < facts["size"] <= QUICK_LIMIT:
        values = file.values(facts["name"])
        facts = facts | statistics.of_block(values, values.ndim == 1, "auto")
    return facts | {
        "mean_eig": _mean(facts),
        "negative": facts.get("negative"),
        "condition": _condition(facts),
    }


def _mean(facts: Document) -> float | None:
    return facts["trace"] / facts["size"] if facts["trace"] is not None and facts["size"] else None


def _condition(facts: Document) -> float | None:
    """The largest magnitude of an eigenvalue over the smallest; infinite for a singular block."""
    least = facts.get("eig_abs_min")
    if least is None:
        return None
    return max(abs(facts["eig_max"]), abs(facts["eig_min"])) / least if least else math.inf
