"""What the plan counts of the memory that passes take, and what is done where it is not there."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hesscli.hessian.batch_size import choose_batch, choose_passes
from hesscli.hessian.chunk_sizes import ChunkSizes
from hesscli.hessian.routes import preactivation
from hesscli.hessian.routes.probes import Probed
from hesscli.job.matrix import memory
from hesscli.job.setup import batches


def saved(folder: Path, module: nn.Module, samples: int, targets: np.ndarray) -> tuple[Path, Path]:
    """A model of two inputs, traced, and its data."""
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0))
    torch.jit.trace(module.eval(), x).save(folder / "net.pt")
    np.savez(folder / "data.npz", x=x.numpy(), y=targets)
    return folder / "net.pt", folder / "data.npz"


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path]:
    """Its pass keeps 16 MiB in the largest tensor."""
    module = nn.Sequential(nn.Linear(2, 512), nn.Tanh(), nn.Linear(512, 1))
    return saved(tmp_path, module, 8192, np.zeros((8192, 1), np.float32))


def test_the_graph_of_each_thread_is_counted(cli, wide, two_threads):
    """It takes four times what a pass keeps, here the output of tanh at least."""
    words = ("compute", *wide, "-b", "elements", "--batch-size", 8192, "--dry-run", "--json")
    two = cli(*words).document["total"]["memory"]
    torch.set_num_threads(1)
    one = cli(*words).document["total"]["memory"]
    assert 4 * (16 << 20) <= two - one < 5 * (16 << 20)


def test_with_less_memory_batches_are_smaller(cli, wide, monkeypatch):
    """What passes take shrinks with what is free, and with what is given."""
    words = ("compute", *wide, "-b", "elements", "--dry-run", "--json")
    much = cli(*words).document["total"]["memory"]
    given = cli(*words, "--memory", "330MB").document["total"]["memory"]
    monkeypatch.setattr(batches, "free_memory", lambda _: 330 * 10**6 - batches.PROCESS)
    free = cli(*words).document["total"]["memory"]
    assert free == given <= 330e6 < much


def test_what_all_classes_hold_is_counted(cli, tmp_path):
    """512 gradients of 16 hidden values in each of 4096 samples: 134 MB. With batches as told, there is room."""
    module = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 512))
    net = saved(tmp_path, module, 4096, np.arange(4096) % 512)
    words = ("compute", *net, "-b", "elements", "-p", "0.weight", "--method", "gauss-newton")
    ran = cli(*words, "--memory", "350MB")
    assert "of memory" in ran.fails(6)
    assert "--batch-size" in ran.hint
    again = cli(*shlex.split(ran.hint)[1:], "--dry-run", "--json").document["total"]["memory"]
    assert again <= 350e6


def test_graphs_of_second_derivatives_are_counted_where_there_are_any(cli, tmp_path):
    """Classes take none."""
    module = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, 2))
    net = saved(tmp_path, module, 8192, np.arange(8192) % 2)
    words = ("compute", *net, "-b", "elements", "-p", "0.bias", "--dry-run", "--json")
    by_rows, by_classes = (
        cli(*words, "--method", method).document["total"]["memory"]
        for method in ("hvp", "gauss-newton")
    )
    assert by_rows - by_classes > 64 << 20


class Constant(nn.Module):
    """Has weights that are not asked for, and a buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.wide = nn.Linear(2, 4)
        self.register_buffer("shift", torch.ones(size))
        self.last = nn.Linear(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x).sum(1, keepdim=True) + self.last(self.shift)


def test_what_is_not_differentiated_by_is_counted(cli, tmp_path):
    """Each of its numbers takes 4 bytes, and 8 in the check's float64, as those of the data do; the check takes 48 for
    each that is asked for.
    """
    size = 1 << 20
    net = saved(tmp_path, Constant(size), 8, np.zeros((8, 1), np.float32))
    words = ("compute", *net, "-p", "wide.bias", "--dry-run", "--json")
    checked = cli(*words).document["total"]["memory"]
    unchecked = cli(*words, "--no-check").document["total"]["memory"]
    constants, data = 2 * size + 1 + 8, 8 * 3
    assert checked - unchecked == 8 * (constants + data) + 48 * 4
    asked = cli(*words, "-p", "last.weight", "-b", "elements").document["total"]["memory"]
    assert unchecked - batches.PROCESS >= 4 * (constants + data)
    assert asked > checked


class Twice(nn.Module):
    """What is no chain of operators."""

    def __init__(self, wide: nn.Module) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) * self.wide(-x)


@pytest.mark.parametrize("blocks", ["diag", "elements"])
def test_few_directions_go_at_once_where_large_values_are_behind(
    cli, tmp_path, monkeypatch, blocks
):
    """Along each of 4 neurons, 64 samples meet 5 x 512 values: two of them make all that there is room for."""
    chunks: list[int] = []

    def along(self: Probed, delta: Tensor, inputs: Sequence[Tensor], seeds: Tensor) -> Any:
        chunks.append(len(seeds))
        return known(self, delta, inputs, seeds)

    known, room = Probed.along, ChunkSizes(directions=2 * 64 * 2600)
    monkeypatch.setattr(Probed, "along", along)
    monkeypatch.setattr(preactivation, "chunk_sizes", lambda _: room)
    wide = nn.Sequential(nn.Linear(4, 512), nn.GELU())
    module = nn.Sequential(nn.Linear(2, 4), nn.GELU(), Twice(wide), nn.Linear(512, 1))
    net = saved(tmp_path, module, 64, np.zeros((64, 1), np.float32))
    words = ("-b", blocks, "-p", "0.weight", "--method", "preactivation", "--dtype", "float64")
    assert cli("compute", *net, *words).code == 0
    assert set(chunks) == {2}


def test_few_directions_go_at_once_where_each_moves_many_patches(cli, tmp_path, monkeypatch):
    """Along each of 4 neurons, 64 samples make 4 x 4 values for three inputs, and 4 patches of 9: two fit."""
    chunks: list[int] = []

    def along(self: Probed, delta: Tensor, inputs: Sequence[Tensor], seeds: Tensor) -> Any:
        chunks.append(len(seeds))
        return known(self, delta, inputs, seeds)

    known, room = Probed.along, ChunkSizes(directions=2 * 64 * (4 * 4 * 3 + 4 * 9))
    monkeypatch.setattr(Probed, "along", along)
    monkeypatch.setattr(preactivation, "chunk_sizes", lambda _: room)
    image = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 3, padding=1), nn.Flatten())
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Tanh(), image, nn.Tanh())
    net = saved(tmp_path, module, 64, np.zeros((64, 4), np.float32))
    words = ("-b", "full", "-p", "*weight", "--method", "preactivation", "--dtype", "float64")
    assert cli("compute", *net, *words).code == 0
    assert chunks[0] == 2


def test_what_directions_make_is_counted_and_rows_only_where_they_are_made(cli, wide):
    """512 neurons of 8192 samples make more numbers than directions may; a row by products is a pass of its own."""
    words = ("compute", *wide, "-b", "elements", "-p", "0.weight", "--dry-run", "--json")
    options = ("--no-check", "--batch-size", 8192)
    along, by_rows = (
        cli(*words, *options, "--method", method).document["total"]["memory"]
        for method in ("preactivation", "hvp")
    )
    graph = 4 * (4 << 22)  # of which the pass keeps 16 MiB
    assert by_rows > along > batches.PROCESS + graph


def test_what_a_large_block_takes_of_the_memory(cli, tmp_path, monkeypatch):
    """A quarter of it and bands beside it; or three bands, as long as they may be; or as long as they fit.

    The directions of 1250 neurons take as much as directions may.
    """
    module = nn.Sequential(nn.Linear(2, 1250), nn.Tanh(), nn.Linear(1250, 1))
    net = saved(tmp_path, module, 2, np.zeros((2, 1), np.float32))
    words = ("compute", *net, "-b", "full", "--dry-run", "--json", "--no-check", "--memory")
    held, streamed, fitted = (
        cli(*words, given).document["total"]["memory"] for given in ("700MB", "470MB", "400MB")
    )
    band, size = memory.BAND, 5001
    assert held - streamed == 4 * (size**2 // 4 + 2 * band + 2**24 - 3 * band)
    directions = 4 * ChunkSizes().directions
    assert 0 < streamed - (batches.PROCESS + 12 * band + directions) < 10e6  # the passes
    assert 400e6 - 12 < fitted <= 400e6
    monkeypatch.setattr(memory, "available_memory", lambda: 65 * 10**7)
    for ranks, expected in ((1, held), (2, streamed)):
        monkeypatch.setattr(memory, "ranks_here", lambda ranks=ranks: ranks)
        assert cli(*words[:-1]).document["total"]["memory"] == expected


_PEAK = """
import sys
from pathlib import Path
from hesscli.__main__ import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) << 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_large_block_takes_no_more_than_it_may(tmp_path):
    """Where memory is short, what is freed between bands is not kept: that took 50 MB more."""
    module = nn.Sequential(nn.Linear(2, 1800), nn.Tanh(), nn.Linear(1800, 1))
    net = saved(tmp_path, module, 2, np.zeros((2, 1), np.float32))
    words = ("compute", *net, "-b", "full", "-q", "--memory", "400MB", "-o", tmp_path / "h")

    def peak(*more: str) -> int:
        code = [sys.executable, "-c", _PEAK, *words, *more]
        done = subprocess.run(code, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    assert peak() - peak("--dry-run") < 400e6 - batches.PROCESS


def test_no_more_rows_are_counted_than_a_block_has(cli):
    """Two rows that go by hvp were counted as 128, at all of the activations."""
    file = "import torch\nclass Net(torch.nn.Module):\n"
    file += "    def __init__(self):\n        super().__init__()\n"
    file += "        self.w = torch.nn.Parameter(torch.ones(ROWS))\n"
    file += "    def forward(self, x):\n        for _ in range(40):\n"
    file += "            x = torch.tanh(x * self.w.mean())\n        return x\n"
    np.savez("d.npz", x=np.ones((500, 100), "f4"), y=np.ones((500, 100), "f4"))
    needed = {}
    for rows in (2, 64):
        Path(f"net{rows}.py").write_text(file.replace("ROWS", str(rows)))
        torch.save({"w": torch.ones(rows)}, "w.pt")
        words = ("w.pt", "d.npz", "--arch", f"net{rows}.py:Net", "--method", "hvp")
        needed[rows] = cli("compute", *words, "--dry-run", "--json").document["total"]["memory"]
    # Of each, four times what autograd keeps of a pass: 40 values of 500 x 100 numbers at least.
    assert needed[64] - needed[2] > 10 * 4 * 40 * 500 * 100 * 4


@pytest.mark.parametrize(
    ("samples", "sample", "saved", "memory", "expected"),
    [
        (10**6, 0, 1 << 10, 1 << 40, 1 << 15),  # no more than a batch may have
        (300, 0, 1 << 10, 1 << 40, 300),
        (10**6, 0, 1 << 20, 1 << 40, 64),  # a gibibyte: 4 graphs of 4 rows
        (10**6, 0, 1 << 20, 1 << 30, 16),  # a quarter of what is free
        (10**6, 0, 1 << 20, 0, 1),
        (10**6, 1 << 20, 0, 1 << 40, 1 << 10),  # the data of wide samples
    ],
)
def test_samples_of_a_batch(samples, sample, saved, memory, expected):
    assert choose_batch(samples, sample, saved, memory, ChunkSizes(), rows=4) == expected


def test_wide_samples_are_in_batches_that_fit(cli):
    """A model that keeps little of each sample had all of them in one batch, and in float64 once more."""
    pooled = nn.Sequential(nn.AvgPool1d(1000), nn.Flatten(), nn.Linear(10, 1))
    torch.jit.script(pooled).save("net.pt")
    np.savez("d.npz", x=np.ones((3000, 1, 10000), "f4"), y=np.ones((3000, 1), "f4"))
    words = ("compute", "net.pt", "d.npz", "--dry-run", "--json", "--memory", "330MB")
    assert cli(*words).document["total"]["memory"] <= 330e6


@pytest.mark.parametrize(
    ("saved", "largest", "size", "memory", "rows", "graphs", "cuts"),
    [
        (1 << 24, 1 << 10, 0, 1 << 40, 16, 2, 1 << 29),  # of a gibibyte
        (0, 1 << 10, 1 << 22, 1 << 40, 21, 2, 1 << 29),  # and three rows of the block beside each
        (1 << 24, 1 << 10, 0, 1 << 28, 1, 1, 1 << 25),  # of a quarter of what is free
    ],
)
def test_rows_of_a_chunk_take_no_more_than_activations_may(
    saved, largest, size, memory, rows, graphs, cuts
):
    passes = choose_passes(saved, largest, size, 4, memory, ChunkSizes(), graphs=2)
    assert (passes.rows, passes.graphs, passes.cuts) == (rows, graphs, cuts)
    assert passes.bytes == 4 * (graphs + rows) * saved


def test_bands_leave_room_for_the_check(cli, tmp_path):
    """At any limit that holds a row at a time, what is needed is no more."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    torch.jit.script(net).save("m.pt")
    np.savez("d.npz", x=np.ones((4, 64), "f4"), y=np.ones(4, "i8"))
    words = ("compute", "m.pt", "d.npz", "-b", "full")
    ran = cli(*words, "--memory", "200MB")
    assert "of memory" in ran.fails(6)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    for limit in (271, 280, 300):
        plan = cli(*words, "--memory", f"{limit}MB", "--dry-run", "--json").document
        assert plan["total"]["memory"] <= limit * 1e6
