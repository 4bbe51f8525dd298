"""Blocks in bands: the same numbers as whole ones, in memory or streamed, and the same bytes after any interruption."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES, Case
from conftest import fill_disk, read, torchrun
from interruptions import SLOW, interrupt_after
from problems import blocks_of, compute_blocks, problem_of_case, routes_of
from torch import nn

import hesscli
from hesscli.errors import NumericalError
from hesscli.files.hessians.result_writer import ResultWriter
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.layout import Layout, Part, Piece
from hesscli.hessian.routes.base import Rows
from hesscli.job.matrix import journal, large, memory, planning, run, triangles
from hesscli.job.matrix.journal import Journal, read_journal
from hesscli.job.matrix.triangles import HeldTriangle, StreamedTriangle, spans
from hesscli.job.setup.team import balanced

LAYOUT = Layout(
    (Piece(3, (Part(17, 1),)), Piece(4, (Part(0, 2), Part(8, 1))), Piece(5, (Part(12, 1),)))
)
"""Three rows that are last in the block; four neurons with two weights and a bias; five rows."""


def symmetric(n: int) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a + a.T


def test_a_layout_is_a_permutation():
    places = LAYOUT.places(0, LAYOUT.size)
    assert places.tolist() == [17, 18, 19, 0, 1, 8, 2, 3, 9, 4, 5, 10, 6, 7, 11, *range(12, 17)]
    assert LAYOUT.places(6, 12).tolist() == [2, 3, 9, 4, 5, 10]
    across = STORED_ACROSS.places(0, STORED_ACROSS.size)
    assert across.tolist() == [6, 9, 12, 0, 7, 10, 13, 1, 8, 11, 14, 2, 3, 4, 5]
    assert STORED_ACROSS.places(4, 12).tolist() == [7, 10, 13, 1, 8, 11, 14, 2]
    in_runs = STORED_IN_RUNS.places(0, STORED_IN_RUNS.size)
    assert in_runs.tolist() == [2, 3, 6, 7, 10, 11, 0, 4, 5, 8, 9, 12, 13, 1, 14]


ALONE = (Part(2, 5, runs=5), Part(7, 1))  # a column of weights and a bias, of one neuron


@pytest.mark.parametrize(
    ("pieces", "plain"),
    [
        ((Piece(2, (Part(0, 1),)), Piece(1, ALONE)), True),
        ((Piece(2, (Part(6, 1),)), Piece(1, (Part(0, 5), Part(5, 1)))), False),
        ((Piece(2, (Part(0, 1),)), Piece(1, (Part(3, 5), Part(2, 1)))), False),
        ((Piece(2, (Part(0, 4, runs=4),)),), False),
        ((Piece(2, (Part(0, 3), Part(6, 1))),), False),
        ((Piece(2, (Part(0, 4),)),), True),
    ],
)
def test_rows_that_lie_in_place_are_not_copied(pieces, plain):
    layout = Layout(pieces)
    matrix = symmetric(layout.size)
    places = layout.places(0, layout.size)
    assert plain == torch.equal(places, torch.arange(layout.size))
    ordered = layout.ordered(matrix)
    assert plain == (ordered is matrix)
    assert torch.equal(ordered[places][:, places], matrix)


@pytest.mark.parametrize("most", [1, 7, 40, 100, 10**6])
def test_bands_are_all_rows_once_and_cut_no_group(most):
    layout = Layout((Piece(3, (Part(0, 1),)), Piece(4, (Part(3, 2), Part(11, 1)))))
    bands = layout.bands(most)
    assert [row for start, stop in bands for row in range(start, stop)] == list(range(15))
    assert all((start - 3) % 3 == 0 for start, _ in bands if start >= 3)


def test_the_last_bands_have_no_more_than_twice_the_rows_of_the_first():
    layout = Layout((Piece(3, (Part(0, 1),)), Piece(4, (Part(3, 2), Part(11, 1)))))
    assert layout.bands(40) == [(0, 2), (2, 3), (3, 6), (6, 9), (9, 12), (12, 15)]
    assert layout.bands(70) == [(0, 3), (3, 6), (6, 12), (12, 15)]


@pytest.mark.parametrize("most", [1, 2, 4, 100])
def test_stretches_lie_together_and_are_no_longer_than_wanted(most):
    places = STORED_IN_RUNS.places(0, STORED_IN_RUNS.size)
    for placed in STORED_IN_RUNS.placed(0, STORED_IN_RUNS.size):
        parts = list(placed.stretches(most))
        assert all(part.runs == 1 for part in parts)
        assert all(part.size <= max(most, placed.shape[2]) for part in parts)
        found = [at for part in parts for at in range(part.place, part.place + part.size)]
        assert sorted(found) == sorted(placed.of_rows(places).flatten().tolist())


def test_spans():
    assert spans(torch.tensor([], dtype=torch.long)) == []
    assert spans(torch.tensor([4])) == [(4, 5)]
    assert spans(torch.tensor([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]


TWO_LAYERS = Layout(
    (Piece(2, (Part(13, 1),)), Piece(3, (Part(0, 2), Part(6, 1))), Piece(4, (Part(9, 1),)))
)


STORED_ACROSS = Layout((Piece(3, (Part(6, 3, runs=3), Part(0, 1))), Piece(3, (Part(3, 1),))))
"""Three neurons with three weights each, input after input, and a bias; three rows."""

STORED_IN_RUNS = Layout((Piece(2, (Part(2, 6, runs=3), Part(0, 1))), Piece(1, (Part(14, 1),))))
"""Two outputs of a transposed convolution, of three inputs with a kernel of two, and a bias; a row."""

STORED_IN_SECTIONS = Layout(
    (
        Piece(2, (Part(3, 3, runs=3), Part(0, 1))),
        Piece(2, (Part(9, 3, runs=3), Part(15, 1))),
        Piece(1, (Part(2, 1),)),
    )
)
"""Two heads of two outputs each, with three weights, input after input, and biases; a row."""


@pytest.mark.parametrize("held", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda), None])
@pytest.mark.parametrize("most", [1, 30, 10**6])
@pytest.mark.parametrize(
    "layout",
    [TWO_LAYERS, STORED_ACROSS, STORED_IN_RUNS, STORED_IN_SECTIONS, Layout.plain(15)],
    ids=["layers", "stored across", "stored in runs", "stored in sections", "plain"],
)
@pytest.mark.parametrize("tile", [40, 1 << 20], ids=["in pieces", "at once"])
def test_a_triangle_is_the_matrix(held, most, layout, tile, tmp_path, monkeypatch):
    for name in ("_READ", "_TURNED"):
        monkeypatch.setattr(triangles, name, tile)
    monkeypatch.setattr(triangles, "chunk_sizes", lambda device: SimpleNamespace(stretch=tile))
    n = layout.size
    truth = symmetric(n)  # in the block's order
    places = layout.places(0, n)
    assert sorted(places.tolist()) == list(range(n))
    ordered = truth[places][:, places]
    assert torch.equal(layout.ordered(ordered), truth)
    assert torch.equal(layout.from_block(truth), truth[:, places])
    path = tmp_path / "h.safetensors"
    with ResultWriter(path, {"before": (3,), "h": (n, n)}, "float64", {}) as writer:
        bands = layout.bands(most)
        v = torch.arange(n, dtype=torch.float64)
        device = torch.device(held or "cpu")
        kind = partial(HeldTriangle, device=device) if held else StreamedTriangle
        triangle = kind("h", layout, bands, writer, v, fresh=True)
        bits = []
        for index, (start, stop) in enumerate(bands):
            upper = ordered[start:stop, start:].to(device, copy=True)
            bits.append(triangle.put(index, upper))
            upper.fill_(torch.nan)  # the next band but one lies there
            assert not held or {first for first, _ in triangle.before} == {
                start for start, _ in bands[index + 1 :]
            }
        triangle.finish()
        assert torch.allclose(triangle.times(v + 1), truth @ (v + 1), rtol=1e-13)
        assert torch.allclose(triangle.times(v), truth @ v, rtol=1e-13)
        assert triangle.trace == pytest.approx(float(truth.trace()))
        assert triangle.squares == pytest.approx(float(truth.square().sum()))
        assert np.array_equal(writer.mapped("h"), truth.numpy())
        sums = writer.checksums()
        writer.forget("h")
        again = kind("h", layout, bands, writer, v, fresh=False)
        for index in range(len(bands)):
            again.restore(index, bits[index])
        again.finish()
        assert torch.equal(again.times(v), triangle.times(v))
        assert torch.equal(again.times(v + 1), triangle.times(v + 1))
        assert writer.checksums() == sums
        assert (again.trace, again.squares) == (triangle.trace, triangle.squares)
        writer.write("before", np.zeros(3))
        writer.commit({})
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(path)["h"], truth.numpy())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bands_of_a_route_are_its_matrix(case: Case):
    """Every route that applies gives, in bands of a few rows, what it gives at once."""
    problem = problem_of_case(case)
    routes = routes_of(problem)
    blocks = [*blocks_of(problem, "full"), *blocks_of(problem, "block_diagonal")[:2]]
    tried = 0
    for route in map(routes.get, ("preactivation", "gauss-newton", "hvp")):
        for block in blocks:
            try:
                truth = compute_blocks(route, [block])[block.name]
            except (NotApplicable, RuntimeError):
                continue
            if not block.size:
                continue
            tried += 1
            layout = route.layout(block)
            whole = torch.zeros_like(truth)
            for start, stop in layout.bands(max(1, block.size**2 // 5)):
                out = truth.new_zeros(stop - start, block.size - start)
                route.sum([Rows(block, start, stop, out)])
                whole[start:stop, start:] = out
            upper = whole.triu() + whole.triu(1).T
            error = (layout.ordered(upper) - truth).abs().max()
            assert error <= 1e-11 * max(1.0, float(truth.abs().max())), block.name
    assert tried


# From the command line


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no upper half fitted the memory."""
    monkeypatch.setattr(memory.Memory, "held_on", lambda self, block: None)


@pytest.mark.parametrize("blocks", ["full", "diag", "module"])
@pytest.mark.parametrize("method", ["auto", "hvp"])
def test_bands_are_what_whole_blocks_are(cli, net, blocks, method, small_bands, monkeypatch):
    command = (
        "compute",
        *net,
        "-b",
        blocks,
        "--method",
        method,
        "--dtype",
        "float64",
        "--gradient",
    )
    ran = cli(*command, "--json", "-o", "held.safetensors")
    assert ran.code == 0, ran.stderr
    with monkeypatch.context() as patch:
        patch.setattr(memory.Memory, "held_on", lambda self, block: None)
        assert cli(*command, "-o", "streamed.safetensors").code == 0
    monkeypatch.setattr(planning, "LARGE", 4096)
    assert cli(*command, "-o", "whole.safetensors").code == 0
    held, _, whole = (read(Path(f"{name}.safetensors")) for name in ("held", "streamed", "whole"))
    assert Path("held.safetensors").read_bytes() == Path("streamed.safetensors").read_bytes()
    for key, tensor in whole[1].items():
        assert torch.allclose(held[1][key], tensor, rtol=1e-12, atol=1e-14), key
        assert key.startswith("gradient") or torch.equal(held[1][key], held[1][key].T)
    for mine, theirs in zip(held[0]["blocks"], whole[0]["blocks"], strict=True):
        for key in ("trace", "fro_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-12)
        for key in ("name", "shape", "size", "bytes", "method"):
            assert mine[key] == theirs[key]
        assert mine["check_error"] < 1e-6
    assert not list(Path().glob(".*"))


def test_extremes_of_a_large_block(cli, net, small_bands):
    assert cli("compute", *net, "-b", "full", "--stats", "all").code == 0
    document, tensors = read(Path("hessian.safetensors"))
    values = torch.linalg.eigvalsh(tensors["hessian"].double())
    (block,) = document["blocks"]
    assert block["eig_max"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert block["eig_min"] == pytest.approx(float(values[0]), rel=1e-6)


def break_bands(monkeypatch: pytest.MonkeyPatch, always: bool = False) -> list[str]:
    """Makes the first route's bands wrong, or always all; gives the routes tried, band by band."""
    whole, tried = large.LargeBlock._band, []

    def wrong(self, route, start, stop, room):
        upper, facts = whole(self, route, start, stop, room)
        tried.append(route.name)
        if route.name == tried[0] or always:
            upper *= 1.01
        return upper, facts

    monkeypatch.setattr(large.LargeBlock, "_band", wrong)
    return tried


def test_a_wrong_band_is_found(cli, net, small_bands, monkeypatch):
    """The check sees large blocks too; here it leads to the next route, and then to code 5."""
    tried = break_bands(monkeypatch)
    ran = cli("compute", *net, "-b", "full")
    assert ran.code == 0
    assert f"{tried[0]} differs from gradients" in " ".join(ran.notes)
    found = hesscli.load("hessian.safetensors")
    assert found.metadata["method"] == tried[-1] != tried[0]
    found.verify()
    break_bands(monkeypatch, always=True)
    assert "nothing was written" in cli("compute", *net, "-b", "full", "-o", "b.safetensors").fails(
        5
    )
    assert not Path("b.safetensors").exists()
    assert not list(Path().glob(".*"))


def test_no_band_is_computed_where_one_is_being_written(cli, net, small_bands, monkeypatch):
    """Nor of some that are a process's own, every other one say."""
    whole, rooms = large.LargeBlock._band, []
    monkeypatch.setattr(
        large.LargeBlock, "_band", lambda *a: rooms.append(a[-1].data_ptr()) or whole(*a)
    )
    monkeypatch.setattr(run, "balanced", lambda parts, _: [{name for name, _ in parts[::2]}, set()])
    for words in ((), ("--shard", "1/2")):
        rooms.clear()
        assert cli("compute", *net, "-b", "full", "--method", "hvp", *words).code == 0
        assert len(rooms) > 2
        assert all(one != next_one for one, next_one in itertools.pairwise(rooms))


@pytest.mark.parametrize("first", [True, False])
def test_a_method_that_turns_out_not_to_apply(cli, net, small_bands, monkeypatch, first):
    """It gives way to the next one; of shards, one or both find out."""
    whole, tried = large.LargeBlock._band, []

    def band(self, route, start, stop, room):
        tried.append(route.name)
        if route.name == tried[0] and (first or start):
            raise NotApplicable("it has no derivative")
        return whole(self, route, start, stop, room)

    monkeypatch.setattr(large.LargeBlock, "_band", band)
    command = ("compute", *net, "-b", "full", "-o", "h", "--method")
    ran = cli(*command, "auto")
    (said,) = (note for note in ran.notes if "instead" in note)
    assert said == f"it has no derivative: {tried[-1]} instead of {tried[0]}"
    undisturbed = Path("h").read_bytes()
    Path("h").unlink()
    for shard in ("1/2", "2/2"):
        ran = cli(*command, "auto", "--shard", shard)
        assert ran.code == 0, ran.stderr
    computed = len(tried)
    assert cli(*command, "auto", "--shard", "2/2", "--resume").code == 0
    assert len(tried) == computed  # it is not tried again
    ran = cli("merge", "h")
    assert ran.code == 0, ran.stderr
    assert Path("h").read_bytes() == undisturbed
    assert not list(Path().glob(".*"))
    tried[0] = "hvp"  # of which there are several bands
    for words in ((), ("--shard", "1/1")):
        ran = cli(*command, "hvp", "-f", *words)
        assert "is not exact here: it has no derivative" in ran.fails(5)


def test_symmetry_errors_of_large_blocks(cli, net, small_bands, monkeypatch):
    words = ("compute", *net, "-b", "full", "--method", "hvp", "--json")
    bands = cli(*words).document["symmetry_error"]
    monkeypatch.setattr(planning, "LARGE", 4096)
    whole = cli(*words).document["symmetry_error"]
    assert 0 < whole / 30 < bands < 30 * whole


@pytest.mark.parametrize(("size", "finite"), [(3e10, True), (1e20, False)])
def test_large_blocks_whose_squares_leave_float32(cli, small_bands, size, finite):
    model = nn.Linear(12, 1)
    nn.init.zeros_(model.weight)
    torch.jit.script(model).save("m.pt")
    x = size * np.random.default_rng(0).normal(size=(20, 12)).astype("f4")
    x[:, 6:] *= 1e-12  # rows whose squares stay within
    np.savez("d.npz", x=x, y=np.zeros((20, 1)))
    ran = cli("compute", "m.pt", "d.npz", "-b", "full", "--no-check", "--json")
    if not finite:
        assert "its Hessian is not finite" in ran.fails(5)
        return
    assert ran.code == 0, ran.stderr
    found = np.linalg.norm(hesscli.load("hessian.safetensors").matrix().astype(float))
    assert ran.document["blocks"][0]["fro_norm"] == pytest.approx(found)


# Interruptions


COMMAND = ("-b", "full", "--gradient", "-o", "h.safetensors")


@pytest.mark.parametrize("mode", ["held", "streamed"])
@pytest.mark.parametrize("bands", [1, 3, 5])
def test_resume_gives_the_same_bytes(cli, net, small_bands, monkeypatch, mode, bands):
    if mode == "streamed":
        monkeypatch.setattr(memory.Memory, "held_on", lambda self, block: None)
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    Path("h.safetensors").unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, bands, KeyboardInterrupt())
        ran = cli("compute", *net, *COMMAND)
    assert f"{bands} of" in ran.fails(130)
    assert ran.hint.endswith("--resume")
    assert {p.name for p in Path().glob(".*")} == {
        ".h.safetensors.journal",
        ".h.safetensors.partial",
    }
    # Without --resume, it is named and left alone.
    again = cli("compute", *net, *COMMAND)
    assert f"an interrupted run left {bands} finished part" in again.fails(2)
    computed = []
    whole = large.LargeBlock._band
    monkeypatch.setattr(large.LargeBlock, "_band", lambda *a: computed.append(a[2:4]) or whole(*a))
    more = ["--force"] if bands == 3 else []  # of what can be continued nothing is thrown away
    resumed = cli(*shlex.split(again.hint)[1:], *more)
    assert resumed.code == 0, resumed.stderr
    assert Path("h.safetensors").read_bytes() == undisturbed
    assert min(start for start, _ in computed) > 0  # the first band was there
    assert not list(Path().glob(".*"))


def test_an_interruption_before_anything_is_finished_leaves_nothing(
    cli, net, small_bands, monkeypatch
):
    interrupt_after(monkeypatch, 0, KeyboardInterrupt())
    ran = cli("compute", *net, *COMMAND)
    assert ran.code == 130
    assert "kept" not in ran.stderr
    assert not list(Path().glob(".*"))


def test_what_a_shard_has_finished_is_not_thrown_away(cli, net, small_bands):
    assert cli("compute", *net, *COMMAND, "--shard", "2/2").code == 0
    before = {path: path.read_bytes() for path in Path().glob(".*")}
    assert "an interrupted run left" in cli("compute", *net, *COMMAND).fails(2)
    assert {path: path.read_bytes() for path in Path().glob(".*")} == before


ONCE = """
import torch
from torch.autograd.function import once_differentiable

class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(12, 4), torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.b(Sine.apply(self.a(x)))
"""


def test_a_resumed_run_says_the_same_and_does_not_try_again(
    cli, tmp_path, small_bands, monkeypatch
):
    """Of a small block and of a large one, of both of which the first method is wrong."""
    (tmp_path / "nets.py").write_text(ONCE)
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(4, 12), "a.bias": torch.randn(4)}
    torch.save(weights | {"b.weight": torch.randn(1, 4), "b.bias": torch.randn(1)}, "net.pt")
    np.savez("data.npz", x=np.sin(np.arange(60.0)).reshape(5, 12), y=np.ones((5, 1)))
    command = ("compute", "net.pt", "data.npz", "-a", "nets.py:Net", "-o", "h")
    computed, whole = [], large.LargeBlock._band
    monkeypatch.setattr(
        large.LargeBlock, "_band", lambda *a: computed.append((a[1].name, *a[2:4])) or whole(*a)
    )
    assert cli(*command).code == 0
    undisturbed, every = Path("h").read_bytes(), list(computed)
    assert {name for name, *_ in every} == {"hvp", "finite-difference"}
    notes = read(Path("h"))[0]["notes"]
    assert [note.split(":")[0] for note in notes if "instead" in note] == ["a.bias", "a.weight"]
    for count in range(1, len(every)):
        Path("h").unlink()
        with monkeypatch.context() as patch:
            interrupt_after(patch, count, KeyboardInterrupt())
            assert cli(*command).code == 130
        computed.clear()
        assert cli(*command, "--resume").code == 0
        assert Path("h").read_bytes() == undisturbed
        assert computed == every[count:]


@pytest.mark.parametrize("more", [(), ("--resume",), ("--force",), ("--shard", "1/2")])
def test_a_run_that_goes_on_keeps_its_journal(cli, net, small_bands, monkeypatch, more):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt())
        assert cli("compute", *net, *COMMAND).code == 130
    journal = Path(".h.safetensors.journal")
    before = journal.read_bytes()
    with open(".h.safetensors.partial") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)  # as if it had not been interrupted
        other = cli("compute", *net, *COMMAND, *more)
    assert other.fails(2) == "h.safetensors: another run is writing it"
    assert journal.read_bytes() == before


def changed(path):
    """One bit of the last tensor, which lies before the space at the end."""
    content = bytearray(path.read_bytes())
    place = max(i for i, byte in enumerate(content) if byte)
    content[place] ^= 1
    path.write_bytes(content)


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damaged", [None, changed, cut_off])
def test_resume_of_what_only_lacked_its_name(cli, net, monkeypatch, damaged):
    """What is in the file is compared with what was written, and computed again where it differs."""
    command = ("compute", *net, "-b", "diag", "-o", "h.safetensors")
    assert cli(*command).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    Path("h.safetensors").unlink()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultWriter, "commit", interrupted)
        ran = cli(*command)
    assert "are kept" in ran.fails(130)
    # Another command does not write over what is kept.
    other = cli("hvp", *net, "--vector", "random", "-o", "h.safetensors")
    assert "interrupted compute" in other.fails(2)
    assert cli(*shlex.split(other.hint)[1:]).code == 0
    if damaged is not None:
        damaged(Path(".h.safetensors.partial"))
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed


def test_interrupted_again_while_gradients_are_written(cli, net, small_bands, monkeypatch):
    command = ("compute", *net, *COMMAND)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt())
        assert "3 of" in cli(*command).fails(130)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultWriter, "write", interrupted)
        assert "3 of" in cli(*command, "--resume").fails(130)
    assert cli(*command, "--resume").code == 0


def test_resume_with_less_memory_cuts_as_the_first_run_did(cli, net, small_bands, monkeypatch):
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt())
        assert cli("compute", *net, *COMMAND).code == 130
    monkeypatch.setattr(memory, "BAND", 500)
    assert cli("compute", *net, *COMMAND, "--resume").code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_journal_alone_is_of_a_finished_file(cli, net, small_bands, monkeypatch, more):
    """The run was killed after the file had its name and before its journal was gone."""
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "remove", lambda self: None)
        assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    assert Path(".h.safetensors.journal").exists()
    assert cli("compute", *net, *COMMAND, *more).code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed
    assert not list(Path().glob(".*"))


def test_nothing_is_kept_once_the_file_has_its_name(cli, net, small_bands, monkeypatch):
    whole = ResultWriter.commit

    def interrupted(self, document):
        whole(self, document)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultWriter, "commit", interrupted)
        ran = cli("compute", *net, *COMMAND)
    assert ran.fails(130) == "interrupted"
    assert "hint: " not in ran.stderr
    assert cli("show", "h.safetensors", "--verify").code == 0
    assert cli("compute", *net, *COMMAND).code == 0


def test_resume_after_a_route_that_failed(cli, net, small_bands, monkeypatch):
    tried = break_bands(monkeypatch)
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, tried.count(tried[0]) + 2, KeyboardInterrupt())
        assert cli("compute", *net, *COMMAND).code == 130
    first, before = tried[0], len(tried)
    assert cli("compute", *net, *COMMAND, "--resume").code == 0
    assert first not in tried[before:]
    assert Path("h.safetensors").read_bytes() == undisturbed


def test_resume_of_another_command_is_refused(cli, net, small_bands, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt())
        assert cli("compute", *net, *COMMAND).code == 130
    left = {p.name: p.read_bytes() for p in Path().glob(".*")}
    for words in ((), ("--resume",)):  # which would not go on with it either
        ran = cli("compute", *net, *COMMAND, *words, "--reduction", "sum")
        assert "another command began it: document.loss.reduction" in ran.fails(2)
        assert ran.hint.endswith("--force")
    ran = cli("compute", *net, *COMMAND, "-b", "module", "--resume")  # of other large blocks
    assert "another command" in ran.fails(2)
    assert {p.name: p.read_bytes() for p in Path().glob(".*")} == left
    assert cli("compute", *net, *COMMAND, "--force", "--reduction", "sum").code == 0
    assert not list(Path().glob(".*"))


def test_resume_with_nothing_left_is_a_run(cli, net, small_bands):
    assert cli("compute", *net, *COMMAND, "--resume").code == 0


def test_a_torn_journal_line_is_a_band_to_compute(cli, net, small_bands, monkeypatch):
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, KeyboardInterrupt())
        assert cli("compute", *net, *COMMAND).code == 130
    lines = Path(".h.safetensors.journal").read_bytes()
    Path(".h.safetensors.journal").write_bytes(lines[:-7])
    with monkeypatch.context() as patch:  # and others that follow it are whole
        interrupt_after(patch, 2, KeyboardInterrupt())
        assert cli("compute", *net, *COMMAND, "--resume").code == 130
    assert cli("compute", *net, *COMMAND, "--resume").code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("options", [(), ("--resume",), ("--force",)])
def test_an_empty_journal_is_nothing_that_is_finished(cli, net, options):
    """As a run leaves it that is killed between opening and writing it."""
    for end in ("partial", "journal"):
        Path(f".h.safetensors.{end}").touch()
    assert cli("compute", *net, *COMMAND, *options).code == 0
    assert not list(Path.cwd().glob(".h.safetensors.*"))


@pytest.mark.parametrize("options", [(), ("--resume",), ("--force",)])
def test_a_journal_without_a_part_is_nothing_that_is_finished(
    cli, net, small_bands, monkeypatch, options
):
    """As a run leaves it that is killed while it writes the first one; another command is not kept from its file."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        assert cli("compute", *net, *COMMAND).code == 130
    journal = Path(".h.safetensors.journal")
    journal.write_text("".join(journal.read_text().splitlines(True)[:1]))
    assert cli("compute", *net, *COMMAND, "--reduction", "sum", *options).code == 0
    assert not list(Path.cwd().glob(".h.safetensors.*"))


def test_a_disk_that_fills_up(cli, net, small_bands, streamed, monkeypatch):
    """Code 6, what was finished is kept, and with room again the run goes on to the same bytes."""
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    Path("h.safetensors").unlink()
    with monkeypatch.context() as patch:
        fill_disk(patch, 60_000)
        ran = cli("compute", *net, *COMMAND)
    assert "No space left" in ran.fails(6)
    assert "parts are kept" in ran.stderr
    assert not Path("h.safetensors").exists()
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_runs_out(cli, net, small_bands, monkeypatch, error):
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    Path("h.safetensors").unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, error())
        ran = cli("compute", *net, *COMMAND)
    assert ran.fails(6).startswith("out of memory; 3 of ")
    assert ran.hint.endswith("--resume")
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_resumed(cli, warm, net, small_bands, tmp_path, sent):
    """A process of its own, ended from outside as soon as it has finished something."""
    assert cli("compute", *net, *COMMAND).code == 0
    result = tmp_path / "h.safetensors"
    undisturbed = result.read_bytes()
    result.unlink()
    process = subprocess.Popen(
        [warm, "-c", SLOW, "compute", *map(str, net), *COMMAND, "-q"],
        stderr=subprocess.PIPE,
    )
    left = tmp_path / ".h.safetensors.journal"
    deadline = time.monotonic() + 60
    while not left.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert not result.exists()
    assert left.exists()
    assert cli("compute", *net, *COMMAND, "--resume").code == 0
    assert result.read_bytes() == undisturbed
    assert not list(tmp_path.glob(".*"))


def test_two_runs_into_one_file(cli, net, small_bands):
    with ResultWriter(Path("h.safetensors"), {"h": (2, 2)}, "float32", {}):
        assert "another run" in cli("compute", *net, *COMMAND).fails(2)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("4096", 4096),
        ("2k", 2000),
        ("1", 1),
    ],
)
def test_sizes(text, bytes_):
    from hesscli.job.sizes import parse_size

    assert parse_size(text) == bytes_


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (4_310_000, "4.31 MB"),
        (999_999_999, "1 GB"),
        (2e12, "2 TB"),
    ],
)
def test_sizes_for_people(count, text):
    from hesscli.job.sizes import size

    assert size(count) == text


@pytest.mark.parametrize("text", ["", "GiB", "4XB", "-1GB", "nan", "1e400", "abc", "0.2"])
def test_what_is_no_size(cli, net, text):
    ran = cli("compute", *net, "--memory", text)
    assert "--memory" in ran.stderr
    assert ran.code == 2


def test_memory_is_kept(cli, net, small_bands):
    """Less memory than the bands take: refused beforehand; a little more: streamed."""
    ran = cli("compute", *net, *COMMAND, "--memory", "1MB")
    assert "may be used" in ran.fails(6)
    plan = cli("compute", *net, "-b", "full", "--dry-run", "--json", "--memory", "300MB").document
    assert plan["total"]["memory"] <= 300e6


# Many processes


def test_shares():
    parts = [("a", 5.0), ("b", 4.0), ("c", 3.0), ("d", 3.0), ("e", 1.0)]
    assert balanced(parts, 2) == [{"a", "d"}, {"b", "c", "e"}]
    assert balanced(parts, 1) == [set("abcde")]
    assert sorted(map(len, balanced(parts, 7))) == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_are_merged_to_the_same_bytes(cli, net, small_bands, blocks, count):
    command = ("compute", *net, "-b", blocks, "--gradient", "-o", "h.safetensors")
    assert cli(*command).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    Path("h.safetensors").unlink()
    for number in reversed(range(1, count + 1)):
        if number < count:
            refused = cli("merge", "h.safetensors")
            assert "missing" in refused.fails(2) or "no shards" in refused.stderr
        ran = cli(*command, "--shard", f"{number}/{count}")
        assert ran.code == 0, ran.stderr
        assert ran.stdout == ""
        assert "hesscli merge h.safetensors" in ran.notes[-1]
        assert not Path("h.safetensors").exists()
    merged = cli("merge", "h.safetensors")
    assert merged.code == 0, merged.stderr
    assert "check" in merged.stdout
    assert Path("h.safetensors").read_bytes() == undisturbed
    assert not list(Path().glob(".*"))


FACTORY = """
from torch import nn

def make(widths, names, kinds, word, number, none):
    assert (type(widths), type(kinds), word, number, none) == (tuple, set, "2", 1e999, None)
    return nn.Sequential(nn.Linear(*widths), getattr(nn, names[1])(), nn.Linear(widths[1], 2))
"""


def test_shards_have_arguments_as_they_were_given(cli, tmp_path):
    """Tuples, sets, and dicts by numbers, which JSON does not have."""
    (tmp_path / "nets.py").write_text(FACTORY)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    torch.save(net.state_dict(), "net.pt")
    np.savez("data.npz", x=np.ones((4, 3), np.float32), y=np.ones((4, 2), np.float32))
    command = ["compute", "net.pt", "data.npz", "-o", "h", "--arch", "nets.py:make"]
    for value in (
        "widths=(3, 2)",
        "names={1: 'Tanh'}",
        "kinds={1}",
        "word='2'",
        "number=1e999",
        "none=None",
    ):
        command += ["--arch-arg", value]
    assert cli(*command, "--loss", "huber", "--loss-arg", "delta=0.5").code == 0
    whole = Path("h").read_bytes()
    Path("h").unlink()
    for shard in ("1/2", "2/2"):
        words = ("--loss", "huber", "--loss-arg", "delta=0.5", "--shard", shard)
        ran = cli(*command, *words)
        assert ran.code == 0, ran.stderr
    ran = cli("merge", "h")
    assert ran.code == 0, ran.stderr
    assert Path("h").read_bytes() == whole


def test_shards_with_less_memory_cut_as_the_first_one_did(cli, net, small_bands, monkeypatch):
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    assert cli("compute", *net, *COMMAND, "--shard", "1/2").code == 0
    monkeypatch.setattr(memory, "BAND", 500)
    assert cli("compute", *net, *COMMAND, "--shard", "2/2").code == 0
    assert cli("merge", "h.safetensors").code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed


def test_a_shard_that_was_cut_off_is_resumed(cli, net, small_bands, monkeypatch):
    assert cli("compute", *net, *COMMAND).code == 0
    undisturbed = Path("h.safetensors").read_bytes()
    assert cli("compute", *net, *COMMAND, "--shard", "2/2").code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        ran = cli("compute", *net, *COMMAND, "--shard", "1/2")
    ran.fails(130)
    assert "--shard 1/2 --resume" in ran.hint
    assert "interrupted run" in cli("compute", *net, *COMMAND, "--shard", "1/2").fails(2)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert cli("merge", "h.safetensors").code == 0
    assert Path("h.safetensors").read_bytes() == undisturbed


def test_a_shard_of_another_command_is_refused(cli, net, small_bands):
    assert cli("compute", *net, *COMMAND, "--shard", "1/2").code == 0
    ran = cli("compute", *net, *COMMAND, "--shard", "2/2", "--reduction", "sum")
    assert "loss.reduction" in ran.fails(2)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0  # --force


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", "options.seed"),
        ("{", "garbage", "cannot be read"),
        ("journal/2", "journal/9", "it is of the format hesscli.journal/9"),
    ],
)
def test_what_cannot_be_resumed_is_thrown_away(cli, net, small_bands, monkeypatch, old, new, said):
    """Left by another command or another version, or not to be read."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        cli("compute", *net, *COMMAND).fails(130)
    path = Path(".h.safetensors.journal")
    path.write_text(path.read_text().replace(old, new, 1))
    ran = cli("compute", *net, *COMMAND, "--seed", "3", "--resume")
    assert said in ran.fails(3 if new else 2)
    if new:
        assert ran.hint == "rm .h.safetensors.journal"
    assert cli("compute", *net, *COMMAND, "--seed", "3", "--resume", "--force").code == 0
    assert not list(Path().glob(".*"))


def test_a_shard_done_again_leaves_the_others(cli, net, small_bands):
    for words in (("1/2",), ("2/2",), ("2/2", "--force")):
        assert cli("compute", *net, *COMMAND, "--shard", *words).code == 0
    assert cli("merge", "h.safetensors").code == 0


@pytest.mark.parametrize("number", ["gradient_norm", "value", "denominator"])
def test_shards_may_round_in_other_ways(cli, net, small_bands, number):
    """As processes with another number of threads do; more than that is another model."""
    for shard in ("1/2", "2/2"):
        assert cli("compute", *net, *COMMAND, "--shard", shard).code == 0
    journal = Path(".h.safetensors.journal.2-of-2")
    first, *others = journal.read_text().splitlines(True)

    def change(factor: float) -> None:
        line = json.loads(first)
        document = line["head"]["document"]
        place = document if number in document else document["loss"]
        place[number] *= factor
        journal.write_text(json.dumps(line) + "\n" + "".join(others))

    change(1 + 1e-4)
    assert f"{number} differ" in cli("merge", "h.safetensors").fails(2)
    change(1 + 1e-6)
    assert cli("merge", "h.safetensors").code == 0


def test_a_process_goes_on_with_its_own_journal(tmp_path):
    """What it finished before it was cut off stays in there, if it is cut off again."""
    for finished, part in (({}, "a"), ({"a": {}}, "b")):
        journal = Journal(tmp_path / "h", {}, {}, "1")
        journal.join(4096, finished)
        journal.append({part: {}})
    assert journal.path is not None
    lines = read_journal(journal.path)
    assert (lines.start, list(lines.finished)) == (4096, ["a", "b"])


def test_a_shard_that_fails_leaves_the_others(cli, net, small_bands, monkeypatch):
    assert cli("compute", *net, *COMMAND, "--shard", "1/2").code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0, NumericalError("not finite"))
        cli("compute", *net, *COMMAND, "--shard", "2/2").fails(5)
    assert cli("compute", *net, *COMMAND, "--shard", "2/2").code == 0
    assert cli("merge", "h.safetensors").code == 0


def test_what_cannot_be_merged_is_kept(cli, net, small_bands):
    for number in (1, 2):
        assert cli("compute", *net, *COMMAND, "--shard", f"{number}/2").code == 0
    kept = set(Path().glob(".*"))
    Path(".h.safetensors.partial").rename("aside")
    assert "no such file" in cli("merge", "h.safetensors").fails(2)
    Path("aside").rename(".h.safetensors.partial")
    data = Path(net[1]).read_bytes()
    with np.load(net[1]) as arrays:
        changed = {name: array[::-1] for name, array in arrays.items()}
    np.savez(net[1], **changed)
    ran = cli("merge", "h.safetensors")
    assert "model and data must be as they were" in ran.fails(2)
    assert "--force" not in ran.hint
    Path(net[1]).write_bytes(data)
    assert set(Path().glob(".*")) == kept
    assert cli("merge", "h.safetensors").code == 0


@pytest.mark.parametrize("at", [8, 9 * 149 * 4])  # in the first band, and in its mirror image
@pytest.mark.parametrize("mode", ["held", "streamed", "merged"])
def test_a_band_that_was_damaged_is_not_believed(cli, net, small_bands, monkeypatch, mode, at):
    command = ("compute", *net, *COMMAND, "--method", "hvp")
    shards = [("--shard", "1/2"), ("--shard", "2/2")] if mode == "merged" else [()]
    if mode == "streamed":
        monkeypatch.setattr(memory.Memory, "held_on", lambda self, block: None)
    with monkeypatch.context() as patch:
        if mode != "merged":
            interrupt_after(patch, 3, KeyboardInterrupt())
        for words in shards:
            assert cli(*command, *words).code == (0 if words else 130)
    again = ("merge", "h.safetensors") if mode == "merged" else (*command, "--resume")
    first = next(Path().glob(".h.safetensors.journal*")).read_text().splitlines()[0]
    with Path(".h.safetensors.partial").open("r+b") as file:
        place = json.loads(first)["start"] + at
        file.seek(place)
        last = file.read(1)[0] ^ 1  # another last digit
        file.seek(place)
        file.write(bytes([last]))
    assert "what was finished of hessian has changed" in cli(*again).fails(3)
    assert not Path("h.safetensors").exists()
    for words in shards:
        assert cli(*command, *words).code == 0
    assert mode != "merged" or cli(*again).code == 0


def test_a_share_of_nothing_leaves_nothing(cli, net):
    assert cli("compute", *net, "-b", "full", "--shard", "2/2").code == 0
    assert not list(Path().glob(".*"))


def test_nothing_to_merge(cli, tmp_path):
    assert "no shards" in cli("merge").fails(2)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_what_is_no_shard(cli, net, text):
    ran = cli("compute", *net, "--shard", text)
    assert ran.code == 2
    assert "--shard" in ran.stderr


def test_two_ranks_write_the_bytes_of_one(cli, warm, net, small_bands, tmp_path):
    words = ("compute", *net, *COMMAND)
    alone = cli(*words)
    result = tmp_path / "h.safetensors"
    undisturbed = result.read_bytes()
    result.unlink()
    process = torchrun(warm, 2, tmp_path, SLOW, *words)
    printed, said = process.communicate()
    assert process.returncode == 0, said.decode()
    assert result.read_bytes() == undisturbed
    assert printed.count(b"hessian  full") == 1  # one of them prints
    bands = re.findall(rb"band from \d+", said)
    assert len(bands) == len({*bands}) > 2  # no band is computed twice
    assert printed.decode().splitlines()[-1] == alone.stdout.splitlines()[-1]
    assert not list(tmp_path.glob(".*"))


DIES = SLOW.replace(
    "    time.sleep(0.15)\n",
    "    time.sleep(0.15)\n"
    "    import os\n"
    "    calls.append(1)\n"
    "    if os.environ['RANK'] == '1' and len(calls) == 2: os._exit(9)\n",
).replace("import sys, time", "import sys, time\ncalls = []")


def test_a_rank_that_dies_ends_the_job_and_others_go_on(cli, warm, net, small_bands, tmp_path):
    words = ("compute", *net, *COMMAND)
    assert cli(*words).code == 0
    result = tmp_path / "h.safetensors"
    undisturbed = result.read_bytes()
    result.unlink()
    process = torchrun(warm, 2, tmp_path, DIES, *words)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not result.exists()
    assert b"exitcode  : 9" in said or b"exitcode: 9" in said
    left = list(tmp_path.glob(".h.safetensors.journal*"))
    assert left
    process = torchrun(warm, 3, tmp_path, SLOW, *words, "--resume")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()
    bands = re.findall(rb"band from \d+", said)
    assert len(bands) == len({*bands}) > 0
    assert result.read_bytes() == undisturbed
    assert not list(tmp_path.glob(".*"))
