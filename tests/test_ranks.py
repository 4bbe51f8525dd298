"""`torchrun -m hesscli eigen|trace|density|hvp`: data on several processes, against one process with all of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import Ran, torchrun
from interruptions import MULTIPLYING
from safetensors.numpy import load_file, save_file
from torch import nn

import hesscli
from hesscli.cli import main
from hesscli.cli.failing import report
from hesscli.errors import InterruptedRun, MismatchError, NumericalError
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.setup import many_processes, team
from hesscli.job.setup.batches import _bounds
from hesscli.job.setup.many_processes import ManyProcesses
from hesscli.job.setup.shared_problem import Product, Question
from hesscli.job.setup.team import ProcessLost

# Each rank runs the commands one after the other in one group, and keeps what it printed and its exit code.
COMMANDS = """
import contextlib, json, os, sys
from pathlib import Path
from hesscli.cli import main
from hesscli.job.setup.team import Team
group = Team().__enter__()
leave, Team.__exit__ = Team.__exit__, lambda *error: None
for name, words in json.loads(Path("commands.json").read_text()).items():
    sys.argv = ["hesscli", *words]
    at = f"{name}.{os.environ['RANK']}"
    code = 0
    with open(f"{at}.out", "w") as out, open(f"{at}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
    Path(f"{at}.code").write_text(str(int(code)))
leave(group, None, None, None)
"""


@dataclass(frozen=True)
class Rank:
    """What one rank left of one command."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.stdout)


def on_ranks(
    python: str,
    ranks: int,
    folder: Path,
    commands: dict[str, tuple[object, ...]],
    before: str = "",
) -> dict[str, list[Rank]]:
    """Runs the commands on so many ranks."""
    listed = {name: [str(word) for word in words] for name, words in commands.items()}
    (folder / "commands.json").write_text(json.dumps(listed))
    process = torchrun(python, ranks, folder, before + COMMANDS)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said.decode()

    def of(name: str, rank: int) -> Rank:
        parts = [(folder / f"{name}.{rank}.{end}").read_text() for end in ("code", "out", "err")]
        return Rank(int(parts[0]), *parts[1:])

    return {name: [of(name, rank) for rank in range(ranks)] for name in commands}


def save_net(folder: Path) -> tuple[Path, Path]:
    """A model of 706 parameters, and eleven samples."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 26), nn.Tanh(), nn.Linear(26, 6, bias=False)).eval()
    x = torch.randn(11, 20)
    torch.jit.trace(module, x).save(folder / "net.pt")
    np.savez(folder / "data.npz", x=x.numpy(), y=np.arange(11) % 6)
    np.savez(folder / "other.npz", x=x.numpy()[:5] + 1, y=np.arange(5))
    return folder / "net.pt", folder / "data.npz"


@pytest.fixture
def net(tmp_path: Path) -> tuple[Path, Path]:
    return save_net(tmp_path)


def close(a: Any, b: Any, dtype: str) -> None:
    """Equal to rounding, relative to the largest."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    assert a.shape == b.shape
    limit = {"float32": 1e-6, "float64": 1e-12}[dtype]
    assert np.abs(a - b).max() <= limit * np.abs(b).max()


def same_files(a: str, b: str, dtype: str) -> None:
    mine, theirs = load_file(a), load_file(b)
    assert mine.keys() == theirs.keys()
    for name in mine:
        close(mine[name], theirs[name], dtype)


# --- which samples are whose ----------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("most", [1, 2, 4, 100])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_sample_is_one_ranks(samples, most, ranks):
    source: Any = SimpleNamespace(samples=samples, fewest=1, most=None)
    bounds = _bounds(source, most, ranks)
    lengths = np.diff(bounds)
    assert (bounds[0], bounds[-1]) == (0, samples)
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) >= min(samples, ranks)
    batches = [Batch((torch.arange(a, b),), None) for a, b in pairwise(bounds)]
    problem = Problem(nn.Identity(), {}, batches, None)  # type: ignore[arg-type]
    processes, seen = ManyProcesses(), []
    processes.team.size = ranks
    for rank in range(ranks):
        processes.team.rank = rank
        own = processes.share_of(problem).batches
        seen.append([int(i) for index in range(len(own)) for i in own[index].inputs[0]])
        # Whatever batches another rank has room for, this one's samples are these.
        assert seen[-1] == list(range(rank * samples // ranks, (rank + 1) * samples // ranks))
    assert list(chain(*seen)) == list(range(samples))


@pytest.mark.parametrize("limits", [(1, 8), (3, None), (2, 5), (4, 8), (5, 5)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_sample_is_one_ranks_where_a_model_has_limits(limits, ranks):
    fewest, most = limits
    source: Any = SimpleNamespace(samples=30, fewest=fewest, most=most)
    shares = set()
    for room in range(1, 31):  # which each rank has its own of
        bounds = _bounds(source, room, ranks)
        assert (bounds[0], bounds[-1]) == (0, 30)
        assert all(fewest <= length <= (most or 30) for length in np.diff(bounds))
        shares.add(tuple(bounds[(len(bounds) - 1) * rank // ranks] for rank in range(ranks)))
    assert len(shares) == 1


# --- the same results -----------------------------------------------------------------------------


WRITES = ("batches", "stack", "differences", "fedavg", "train", "one")


def shared_commands(folder: Path, dtype: str) -> dict[str, tuple[object, ...]]:
    net = (folder / "net.pt", folder / "data.npz")
    base = (*net, "--dtype", dtype, "--json")
    commands: dict[str, tuple[object, ...]] = {
        "eigen": ("eigen", *base, "--top", 3, "--tol", 1e-8 if dtype == "float64" else 1e-5),
        "ends": ("eigen", *base, "--per-block", "--tol", 1e-8 if dtype == "float64" else 1e-5),
        "dense": ("eigen", *base, "--top", 4, "--params", "0.bias", "--which", "both"),
        "ggn": ("trace", *base, "--curvature", "ggn", "--method", "hvp", "--max-products", 20),
        "exact": ("trace", *base),
        "density": ("density", *base, "--probes", 2, "--steps", 6, "--curvature", "fisher"),
        "batches": ("hvp", *base, "--vector", "random", "--gradient", "--batch-size", 2),
        "stack": ("hvp", *base, "--vector", "v.safetensors", "--curvature", "ggn"),
        "differences": ("hvp", *base, "--vector", "gradient", "--method", "finite-difference"),
        "fedavg": ("hvp", *base, "--per-fedavg", 0.3, "--query", "other.npz"),
        "train": ("hvp", *base, "--vector", "gradient", "--train-mode"),
        "one": ("hvp", *base, "--vector", "gradient", "--samples", "3:4"),
        "missing": ("hvp", net[0], "nothing.npz", "--vector", "gradient"),
        "refused": ("hvp", *base, "--vector", "gradient", "--method", "gauss-newton"),
    }
    for name in (*WRITES, "eigen"):
        commands[name] += ("-o", f"{name}.{dtype}.safetensors")
    return commands


def kinked_commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """Without its bias, the first layer is zero on the images' empty half: right at its kink, whatever the step."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6()),
        *(nn.Flatten(), nn.Linear(144, 3)),
    ).eval()
    nn.init.zeros_(module[0].bias)
    x = torch.randn(15, 1, 8, 8)
    x[:, :, :4] = 0
    torch.jit.trace(module, x).save(folder / "kinked.pt")
    np.savez(folder / "kinked.npz", x=x.numpy(), y=np.arange(15) % 3)
    base = (folder / "kinked.pt", folder / "kinked.npz", "--json")
    return {
        "alone": ("compute", *base, "-o", "kinked.safetensors"),
        "trace": ("trace", *base, "--method", "hvp", "--max-products", 20),
    }


FAILING = """
from hesscli.errors import MismatchError
from hesscli.hessian.operator import Products
whole = Products.__call__
def failing(self, vectors):
    if name == "bad" and os.environ["RANK"] == "1" and self.count == 2:
        raise MismatchError("data: not here")
    return whole(self, vectors)
Products.__call__ = failing
"""

# The second rank sees, with more samples than the first has room for, that they mix; or fails while the first waits.
SEEING = """
from hesscli.job.setup import batches
tried = batches.what_mixes
def seeing(*words):
    if name.startswith("mixed") and os.environ["RANK"] == "1":
        return "the model"
    if name == "untried" and os.environ["RANK"] == "1":
        raise MismatchError("data: not tried")
    return tried(*words)
batches.what_mixes = seeing
"""

# The second rank has no memory to try what a loss that is one number is of.
TRYING = """
from hesscli.job.setup import reduction
free = reduction.available_memory
def lacking():
    return 0 if name == "number lacking" and os.environ["RANK"] == "1" else free()
reduction.available_memory = lacking
"""


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Rank]]]:
    """All that two ranks are asked, in one start: it takes longer than the commands."""
    folder = tmp_path_factory.mktemp("on-two")
    net = save_net(folder)
    save_file(
        {
            "0.weight": np.random.default_rng(0).standard_normal((3, 26, 20)),
            "0.bias": np.zeros((3, 26)),
            "2.weight": np.ones((3, 6, 26)),
        },
        folder / "v.safetensors",
    )
    commands = {
        f"{name} {dtype}": words
        for dtype in ("float32", "float64")
        for name, words in shared_commands(folder, dtype).items()
    }
    commands |= kinked_commands(folder)
    commands["bad"] = ("eigen", *net, "-o", "bad.safetensors")
    commands["good"] = ("hvp", *net, "--vector", "gradient")
    small = (*net, "--batch-size", 2, "--dtype", "float64", "--json")
    commands["untried"] = ("hvp", *small, "--vector", "gradient")
    commands["mixed"] = (*commands["untried"], "-o", "mixed.safetensors")
    commands["mixed blocks"] = ("compute", *small, "-o", "mixed-blocks.safetensors")
    (folder / "number.py").write_text("from torch.nn.functional import cross_entropy\n")
    for name in ("number", "number lacking"):
        own = ("-l", "number.py:cross_entropy", "-o", f"{name}.safetensors")
        commands[name] = (*commands["untried"], *own)
    commands["a shard"] = ("compute", *net, "-o", "shard.safetensors", "--shard", "1/2")
    found = on_ranks(sys.executable, 2, folder, commands, before=FAILING + SEEING + TRYING)
    for dtype in ("float32", "float64"):
        for name in WRITES:
            path = folder / f"{name}.{dtype}.safetensors"
            path.rename(path.with_suffix(".two"))
    return folder, found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_ranks(cli: Callable[..., Ran], on_two, monkeypatch, dtype):
    folder, shared = on_two
    monkeypatch.chdir(folder)
    for name, words in shared_commands(folder, dtype).items():
        first, second = shared[f"{name} {dtype}"]
        assert (second.stdout, second.stderr) == ("", ""), name
        alone = cli(*words)
        assert first.code == alone.code, (name, first.stderr)
        if first.code:
            assert first.stderr == alone.stderr, name
            continue
        mine, theirs = first.document, alone.document
        if name in WRITES:
            same_files(
                f"{name}.{dtype}.two",
                f"{name}.{dtype}.safetensors",
                "float32" if name == "differences" else dtype,
            )
        for key in ("loss.value", "loss.denominator", "gradient_norm"):
            a, b = mine, theirs
            for part in key.split("."):
                a, b = a[part], b[part]
            close(a, b, dtype)
        assert mine["check"]["kind"] == theirs["check"]["kind"]
        assert mine["check"]["relative_error"] < {"float32": 1e-3, "float64": 1e-6}[dtype]
        assert mine["products"] == theirs["products"] if "products" in theirs else True
        for key in ("eigenvalues", "nodes", "weights"):
            if key in theirs:
                close(mine[key], theirs[key], dtype)
        if name in ("ggn", "exact"):
            close(
                [b["trace"] for b in mine["blocks"]], [b["trace"] for b in theirs["blocks"]], dtype
            )
        idle = [note for note in mine["notes"] if "nothing to do" in note]
        assert bool(idle) == (name in ("train", "one")), name
    assert shared[f"missing {dtype}"][0].code == 2


def test_kinks_are_held_by_all(on_two):
    found = {name: on_two[1][name][0] for name in ("alone", "trace")}
    for command in found.values():
        assert command.code in (0, 5), command.stderr  # of the estimate, which may not converge
        assert command.document["check"]["relative_error"] < 1e-4
    assert found["trace"].document["method"] == "hvp"
    assert {b["method"] for b in found["alone"].document["blocks"]} == {"gauss-newton"}


def test_that_samples_mix_is_seen_by_all_where_one_sees_it(
    cli: Callable[..., Ran], on_two, monkeypatch
):
    folder, shared = on_two
    monkeypatch.chdir(folder)
    said = "the model sees several samples at once, so all the data is one batch"
    for name in ("mixed", "mixed blocks"):
        assert shared[name][0].code == 0, shared[name][0].stderr
        assert said in shared[name][0].document["notes"]
    words = ("hvp", "net.pt", "data.npz", "--dtype", "float64", "--vector", "gradient")
    assert cli(*words, "-o", "alone.safetensors").code == 0
    same_files("mixed.safetensors", "alone.safetensors", "float64")


def test_a_loss_that_is_one_number_is_the_same_to_all(cli: Callable[..., Ran], on_two, monkeypatch):
    folder, shared = on_two
    monkeypatch.chdir(folder)
    words = ("hvp", "net.pt", "data.npz", "--dtype", "float64", "--vector", "gradient")
    assert cli(*words, "-o", "inferred.safetensors").code == 0
    for name in ("number", "number lacking"):
        assert shared[name][0].code == 0, shared[name][0].stderr
        same_files(f"{name}.safetensors", "inferred.safetensors", "float64")


def test_an_error_on_one_rank_while_samples_are_tried_apart_is_the_commands(on_two):
    first, second = on_two[1]["untried"]
    assert (first.code, second.stderr) == (4, "")
    assert first.stderr.splitlines()[-1] == "error: data: not tried"


def test_a_shard_is_one_process(on_two):
    first, second = on_two[1]["a shard"]
    assert (first.code, second.code, second.stderr) == (2, 2, "")
    *_, said, hint = first.stderr.splitlines()
    assert said == "error: --shard: a share is one process's, and torchrun started 2"
    assert hint.endswith("-o shard.safetensors --shard 1/2")
    assert not list(on_two[0].glob(".shard*"))


def test_an_error_on_one_rank_is_the_commands(on_two):
    """The first says it and ends with its code; nothing is written, and the next command runs."""
    folder, found = on_two
    first, second = found["bad"]
    assert first.code == 4
    assert "error: data: not here" in first.stderr
    assert first.stdout == second.stdout == second.stderr == ""
    assert not (folder / "bad.safetensors").exists()
    assert [rank.code for rank in found["good"]] == [0, 0]


def test_fewer_samples_than_ranks(cli: Callable[..., Ran], warm, net, tmp_path):
    words = ("hvp", *net, "--samples", 2, "--vector", "random", "--dtype", "float64", "--json")
    commands = {"h": (*words, "-o", "three.safetensors")}
    first, *others = on_ranks(warm, 3, tmp_path, commands)["h"]
    assert first.code == 0, first.stderr
    assert [rank.stdout + rank.stderr for rank in others] == ["", ""]
    assert "the data is 2 batches, so 1 of 3 processes have nothing to do" in first.stderr
    assert cli(*words, "-o", "one.safetensors").code == 0
    same_files("three.safetensors", "one.safetensors", "float64")


@pytest.mark.parametrize("rank", [1, 0])
def test_what_is_not_shared_is_the_firsts(cli, net, monkeypatch, capsys, rank):
    for place in ("1/2", "2/2"):
        assert cli("compute", *net, "--shard", place).code == 0
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    for words in (("merge",), ("show",), ("diff", *["hessian.safetensors"] * 2)):
        ran = cli(*words)
        assert ran.code == 0, ran.stderr
        assert bool(ran.stdout + ran.stderr) == (rank == 0)
    monkeypatch.setattr(sys, "argv", ["hesscli", "eigen", "--nope"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.count("error: ") == (rank == 0)


@pytest.mark.parametrize("rank", [1, 0])
def test_an_interruption_is_said_once(monkeypatch, capsys, rank):
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["hesscli", "compute", "net.pt", "d.npz", "--resume"])
    assert report(InterruptedRun("interrupted; 2 of 9 parts are kept", "--resume")) == 130
    said = (
        "error: interrupted; 2 of 9 parts are kept\nhint: hesscli compute net.pt d.npz --resume\n"
    )
    assert capsys.readouterr().err == ("" if rank else said)


def test_what_a_model_prints_is_no_result(warm, tmp_path):
    (tmp_path / "talking.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        print('hello')\n"
        "        return super().forward(x)\n"
    )
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", x=np.ones((4, 3), np.float32), y=np.arange(4) % 2)
    arch = ("--arch", "talking.py:Net", "--arch-arg", "in_features=3", "--arch-arg")
    words = ("eigen", "net.pt", "data.npz", *arch, "out_features=2", "--json")
    first, second = on_ranks(warm, 2, tmp_path, {"eigen": words})["eigen"]
    assert first.document["size"] == 8
    assert second.stdout == ""
    assert "hello" in second.stderr


# --- an environment that is not torchrun's ---------------------------------------------------------


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    """As a launcher does; what it says nothing of is not set."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}, (3, 4, 1, 2)),
        ({"WORLD_SIZE": 4, "RANK": 3}, (3, 4, 3, 1)),
        ({"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": 0}, (1, 2, 1, 1)),
        ({"WORLD_SIZE": 2, "RANK": "one"}, (0, 2, 0, 1)),
        ({"WORLD_SIZE": 1, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}, (0, 1, 0, 1)),
        ({"WORLD_SIZE": "", "RANK": 1}, (0, 1, 0, 1)),
        ({"WORLD_SIZE": "many"}, (0, 1, 0, 1)),
        ({"WORLD_SIZE": 0}, (0, 1, 0, 1)),
        ({}, (0, 1, 0, 1)),
    ],
)
def test_which_process_this_is(monkeypatch, values, found):
    set_environment(monkeypatch, MASTER_ADDR="localhost", **values)
    places = team.rank, team.ranks, team.rank_here, team.ranks_here
    assert tuple(place() for place in places) == found
    set_environment(monkeypatch, **values)  # what other tools call so
    assert tuple(place() for place in places) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"MASTER_PORT": 1}, "RANK is not set; expected 0 to 1"),
        ({"MASTER_PORT": 1, "RANK": ""}, "RANK is ''; expected 0 to 1"),
        ({"MASTER_PORT": 1, "RANK": 2}, "RANK is '2'; expected 0 to 1"),
        ({"RANK": 0}, "MASTER_PORT is not set; expected 0 to 65535"),
        ({"RANK": 1, "MASTER_PORT": 65536}, "MASTER_PORT is '65536'; expected 0 to 65535"),
    ],
)
@pytest.mark.parametrize("command", ["eigen", "compute"])
def test_half_an_environment_is_refused(cli, net, monkeypatch, command, values, said):
    set_environment(monkeypatch, MASTER_ADDR="localhost", WORLD_SIZE=2, **values)
    ran = cli(command, *net)
    assert ran.fails(2).endswith(
        f"WORLD_SIZE is 2, as where torchrun started as many processes, and {said}"
    )
    assert ran.hint == "unset WORLD_SIZE"


def test_a_place_to_meet_that_is_taken(cli, net, monkeypatch):
    """Until all are there, a signal that is not ignored ends the process: PyTorch hears none."""
    heard = []
    meet = dist.rendezvous

    def meeting(*words, **options):
        heard.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        return meet(*words, **options)

    monkeypatch.setattr(dist, "rendezvous", meeting)
    before = signal.getsignal(signal.SIGINT)
    try:
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            port = taken.getsockname()[1]
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            set_environment(monkeypatch, WORLD_SIZE=2, RANK=0, **place)
            for handler in (signal.default_int_handler, signal.SIG_IGN):
                signal.signal(signal.SIGINT, handler)
                said = cli("eigen", *net).fails(6)
                assert said.startswith(
                    f"the 2 processes of WORLD_SIZE cannot meet at localhost:{port} ("
                )
                assert "[" not in said
                assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [[signal.SIG_DFL, signal.SIG_DFL], [signal.SIG_IGN, signal.SIG_DFL]]


@pytest.mark.parametrize("command", ["eigen", "compute"])
@pytest.mark.parametrize("number", [0, 1])
def test_nobody_is_waited_for_without_end(cli, net, monkeypatch, command, number):
    monkeypatch.setattr(team, "_MEETING", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    set_environment(monkeypatch, WORLD_SIZE=2, RANK=number, **place)
    ran = cli(command, *net)
    assert f"the 2 processes of WORLD_SIZE cannot meet at localhost:{port} (" in ran.fails(6)
    assert ran.hint == "unset WORLD_SIZE"


HERE = """
from hesscli.job.setup.team import Team, rank_here, ranks_here

with Team() as team:
    print(team.all_gather((rank_here(), ranks_here())))
"""


def test_a_launcher_that_does_not_say_which_processes_share_a_machine():
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = {n: v for n, v in os.environ.items() if not n.startswith("LOCAL_")}
    words |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HERE], env=words | {"RANK": str(n)}, stdout=subprocess.PIPE
        )
        for n in range(3)
    ]
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert said.decode().strip() == "[(0, 3), (1, 3), (2, 3)]"


@pytest.mark.parametrize("number", [0, 1])
def test_the_package_works_alone(monkeypatch, number):
    """Where a script that torchrun started calls it, on some of its processes or on all."""
    torch.manual_seed(0)
    module, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    alone = hesscli.compute(module, data)
    set_environment(monkeypatch, MASTER_ADDR="localhost", MASTER_PORT=1, WORLD_SIZE=2, RANK=number)
    among = hesscli.compute(module, data)
    assert np.array_equal(among.block("weight"), alone.block("weight"))


# --- what one process says is heard by all ---------------------------------------------------------


class Scripted:
    """A team of two, of which the other one says what is foreseen."""

    size = 2

    def __init__(self, rank: int, said: list[Any], fails: str = "") -> None:
        self.rank, self.said, self.fails, self.told = rank, said, fails, list[Any]()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.left = error

    def broadcast(self, value: Any) -> Any:
        self.told.append(value)
        return self.said.pop(0) if self.rank else value

    def all_gather(self, value: Any) -> list[Any]:
        return [value, self.said.pop(0)] if self.rank == 0 else [self.said.pop(0), value]

    def broadcast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sent("broadcast", tensor)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._sent("reduce", tensor)

    def _sent(self, how: str, tensor: torch.Tensor) -> torch.Tensor:
        if how == self.fails:
            raise MemoryError(how)
        return tensor


def scripted(rank: int, said: list[Any], fails: str = "") -> tuple[ManyProcesses, Scripted]:
    """One of two processes, which answers with what it is asked for."""
    processes, others = ManyProcesses(), Scripted(rank, said, fails)
    processes.team = others  # type: ignore[assignment]
    opened: Any = SimpleNamespace(problem=SimpleNamespace(device=torch.device("cpu")))
    processes.opened = [opened]
    processes._answer = lambda question, tensor: tensor  # type: ignore[method-assign]
    return processes, others


QUESTION = Question(Product("hessian"), 0, torch.float32, (), (3,))


@pytest.mark.parametrize("fails", ["broadcast", "reduce"])
def test_an_error_that_the_others_have_not_heard_ends_the_process(fails):
    """They wait for it in the middle of a question, so it must not wait for the next."""
    processes, _ = scripted(1, [QUESTION, None], fails)
    with pytest.raises(MemoryError, match=fails):
        processes.serve()
    first, others = scripted(0, [None], fails)
    with pytest.raises(MemoryError, match=fails), first:
        first.ask(QUESTION, torch.ones(3))
    assert others.told == [QUESTION]
    assert others.left[0] is MemoryError


def test_an_error_that_the_others_have_heard_does_not():
    said = MismatchError("data: not here")
    processes, _ = scripted(1, [QUESTION, said, QUESTION, None, None])
    assert processes.serve()
    assert processes.team.said == []
    first, others = scripted(0, [said])
    with pytest.raises(MismatchError, match="not here"), first:
        first.ask(QUESTION, torch.ones(3))
    assert others.told == [QUESTION, None]
    assert others.left == (None, None, None)


@pytest.mark.parametrize("others", [None, NumericalError("the loss is nan")])
def test_an_error_where_a_problem_is_opened_is_heard(monkeypatch, others):
    """By one that waits for what this one says of the data, or that has come to the same."""
    mine = NumericalError("the loss is nan")
    monkeypatch.setattr(many_processes, "open_problem", Mock(side_effect=mine))
    options = ProblemOptions(Path("net.pt"), Path("data.npz"))
    processes, team_of_two = scripted(1, [options, others, QUESTION, None, None])
    assert processes.serve()
    assert team_of_two.said == []
    first, team_of_two = scripted(0, [others])
    with pytest.raises(NumericalError, match="nan"), first:
        first.open(options, Listener())
    assert team_of_two.told == [options, None]


def test_that_another_is_lost_where_a_problem_is_opened_is_not_told(monkeypatch):
    monkeypatch.setattr(many_processes, "open_problem", Mock(side_effect=ProcessLost("lost")))
    options = ProblemOptions(Path("net.pt"), Path("data.npz"))
    for number, said in ((1, [options]), (0, [])):
        processes, _ = scripted(number, said)
        with pytest.raises(ProcessLost), processes:
            processes.open(options, Listener()) if number == 0 else processes.serve()


def test_what_is_kept_for_products_is_let_go():
    processes, _ = scripted(1, ["let go", None])
    processes.kept = QUESTION, None  # type: ignore[assignment]
    assert processes.serve()
    assert processes.kept is None
    first, others = scripted(0, [])
    first.kept = QUESTION, None  # type: ignore[assignment]
    first.let_go()
    assert first.kept is None
    assert others.told == ["let go"]


# --- when something goes wrong on one of them -----------------------------------------------------

LATE = """
import os
from hesscli.errors import MismatchError
from hesscli.job.matrix import small
def failing(plan, group):
    raise MismatchError("the model: not here")
if os.environ["RANK"] == "1":
    small.compute_blocks = failing
from hesscli.cli import main
main()
"""


def test_an_error_in_a_share_of_the_blocks_says_whose(warm, net, tmp_path):
    process = torchrun(warm, 2, tmp_path, LATE, "compute", *net, "-o", "h.safetensors")
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"error: rank 1: the model: not here" in said
    assert not (tmp_path / "h.safetensors").exists()


def test_what_the_first_process_refuses_is_said_once(warm, net, tmp_path):
    """It alone looks at what an earlier run left."""
    (tmp_path / ".h.safetensors.partial").write_bytes(b"")
    (tmp_path / ".h.safetensors.journal").write_text("{}\n")
    script = "from hesscli.cli import main; main()"
    process = torchrun(warm, 2, tmp_path, script, "compute", *net, "-o", "h.safetensors")
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    (error,) = (line for line in said.decode().splitlines() if line.startswith("error: "))
    assert ".h.safetensors.journal: cannot be read" in error


DYING = """
import os, signal, sys
from hesscli.hessian.operator import Products
whole = Products.__call__
def dying(self, vectors):
    if os.environ["RANK"] == os.environ["DIES"] and self.count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, vectors)
Products.__call__ = dying
from hesscli.cli import main
main()
"""


def test_a_dead_rank_ends_the_job(warm, net, tmp_path, monkeypatch):
    monkeypatch.setenv("DIES", "1")
    process = torchrun(warm, 2, tmp_path, DYING, "eigen", *net, "-o", "e.safetensors")
    printed, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert printed == b""
    assert b"Signal 9" in said
    assert b"this is a bug" not in said
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("dies", [0, 1])
def test_what_the_other_rank_says(warm, net, tmp_path, dies):
    """Under a launcher that only sets the environment, the one that is left ends by itself.

    It says how many share the machine, and with it a GPU, if there is one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "DIES": str(dies)}
    processes = [
        subprocess.Popen(
            [warm, "-c", DYING, "eigen", *map(str, net), "-o", "e.safetensors"],
            cwd=tmp_path,
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [process.communicate(timeout=60) for process in processes]
    assert processes[dies].returncode == -signal.SIGKILL
    assert processes[1 - dies].returncode == 6
    printed, said = found[1 - dies]
    assert printed == ""
    who = "" if dies else "rank 1: "
    assert f"error: {who}another process has ended early (" in said
    assert not (tmp_path / "e.safetensors").exists()


def test_interrupted(warm, net, tmp_path):
    model, data = net
    wide = nn.Sequential(nn.Linear(20, 200), nn.Tanh(), nn.Linear(200, 6)).eval()  # 5406: not exact
    torch.jit.trace(wide, torch.randn(11, 20)).save(model)
    words = ("density", model, data, "--probes", 100000, "--steps", 4, "--json")
    process = torchrun(warm, 2, tmp_path, MULTIPLYING, *words)
    assert process.stderr is not None
    while b"multiplying" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    document = json.loads(printed)
    assert document["interrupted"] is True
    assert document["probes"] > 1
    assert said.count(b"error: interrupted") == 1
