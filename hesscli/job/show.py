"""`hesscli show`: what a Hessian file says about itself. Importing this loads no torch, and little else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hesscli.files.hessians.hessian_file import HessianFile
from hesscli.job.json_form import Document
from hesscli.job.options import Progress
from hesscli.job.stored import chosen, opened_file, values_of

if TYPE_CHECKING:
    from hesscli.job.picture import Picture


QUICK = 64 << 20
"""Bytes of tensors up to which they are always compared with their checksums: a few hundredths of a second."""

_PIXELS = 1200
"""Rows and columns of a figure, at most."""


def show(
    source: str,
    block: str | None,
    wide: bool,
    screen: int | None,
    figure: bool,
    verify: bool,
    progress: Progress,
) -> tuple[Document, Picture | None, Picture | None]:
    """The document of a Hessian file, and |H| as a heatmap and as a figure, as far as they were asked for.

    Args:
        source: the file's path, or "-" for standard input.
        block: this block alone.
        wide: with `mean_eig` and `condition` of every block. What the file lacks is computed for blocks
            that are small enough for it to be quick.
        screen: draw |H| as a heatmap of so many rows and columns at most.
        figure: draw |H| as a figure.
        verify: compare every tensor with its checksum, also in a large file.
        progress: hears how much of a picture is done.

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
        heatmap = _picture(file, names, screen, progress)
        return document, heatmap, _picture(file, names, _PIXELS if figure else None, progress)


def _picture(
    file: HessianFile, names: Sequence[str], pixels: int | None, progress: Progress
) -> Picture | None:
    if pixels is None:
        return None
    from hesscli.job.picture import picture

    return picture(file, names, pixels, progress)


def _wide(file: HessianFile, facts: Document) -> Document:
    from hesscli.job import statistics
    from hesscli.spectrum.statistics import QUICK_LIMIT

    known = facts.get("negative") is not None
    if not known and 0 < facts["size"] <= QUICK_LIMIT:
        values = values_of(file, facts["name"])
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
