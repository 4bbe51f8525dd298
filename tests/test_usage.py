"""What is refused before anything is computed, and hints that work when they are pasted."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY
from hessian_files import symmetric, write
from torch import nn

from hesscli import __main__
from hesscli.errors import FileError, UsageError
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.words import (
    FINITE_DIFFERENCE,
    GAUSS_NEWTON,
    HVP,
    PREACTIVATION,
    STRUCTURES,
)
from hesscli.job import compute as jobs
from hesscli.job import options
from hesscli.job.setup import opening
from hesscli.job.setup.parameters import chosen_parameters
from hesscli.spectrum.eigen import WHICH

NET = ("net.pt", "d.npz")


@pytest.fixture(autouse=True)
def _files(tmp_path):
    torch.manual_seed(0)
    torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))).save(str(tmp_path / "net.pt"))
    x = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
    np.savez(tmp_path / "d.npz", x=x, y=x[:, :2])
    write(tmp_path / "hessian.safetensors", {"p": symmetric(3)})


@pytest.fixture
def idle(monkeypatch):
    """Nothing is opened to be computed."""

    def fail(*_args, **_keywords):
        raise AssertionError("too late")

    for module in (jobs, opening):
        monkeypatch.setattr(module, "open_problem", fail)
    monkeypatch.setattr("hesscli.job.eigen.opened_file", fail)


WRITING = [
    ("compute", *NET, "-o", "out.safetensors"),
    ("hvp", *NET, "--vector", "random", "-o", "out.safetensors"),
    ("eigen", "-o", "out.safetensors"),
    ("eigen", *NET, "-o", "out.safetensors"),
    ("density", "-o", "out.json"),
    ("density", *NET, "-o", "out.safetensors"),
    ("density", "--plot", "out.png"),
    ("show", "--plot", "out.png"),
]


def test_options_that_are_not_given_are_as_in_python(cli, monkeypatch):
    asked = []

    def run(given, *_args, **_keywords):
        asked.append(given)
        raise UsageError("enough")

    monkeypatch.setattr(jobs, "compute", run)
    cli("compute", *NET).fails(2)
    assert asked == [options.ComputeOptions(Path("net.pt"), Path("d.npz"))]


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_a_folder_that_may_not_be_written_to(cli, idle, monkeypatch, command):
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and may(path, mode))
    assert "the folder . may not be written to" in cli(*command).fails(2)


def test_a_merge_where_nothing_may_be_written(cli, monkeypatch):
    assert cli("compute", *NET, "--shard", "1/1", "-o", "out.safetensors").code == 0
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and may(path, mode))
    assert "the folder . may not be written to" in cli("merge", "out.safetensors").fails(2)


@pytest.mark.parametrize(
    "command", [c for c in WRITING if c[0] not in ("compute", "show") and "--plot" not in c]
)
def test_only_compute_writes_to_standard_output(cli, idle, command):
    assert "only compute writes to standard output" in cli(*command[:-1], "-").fails(2)


def test_a_density_in_a_format_that_there_is_not(cli, idle):
    assert "neither .safetensors nor .json" in cli("density", "-o", "d.txt").fails(2)


@pytest.mark.parametrize(
    "command",
    [
        ("compute", "{}", "d.npz"),
        ("compute", "net.pt", "{}"),
        ("show", "{}"),
        ("show", "{}.index.json"),
        ("merge", "{}"),
    ],
)
def test_a_file_that_may_not_be_read(cli, monkeypatch, tmp_path, command):
    (tmp_path / "locked").mkdir()
    real = os.stat

    def stat(path, *args, **keywords):
        if "locked/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **keywords)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr("pathlib.Path.open", stat)
    ran = cli(*(word.format("locked/h.safetensors") for word in command))
    assert ran.fails(3).startswith("locked/")
    assert "permission denied" in ran.stderr.lower()


def test_a_hint_of_two_options_takes_the_place_of_both(cli, tmp_path):
    np.savez(tmp_path / "unnamed.npz", a=np.ones((4, 3)), b=np.ones((4, 2)), c=np.ones((4, 2)))
    ran = cli("compute", "net.pt", "unnamed.npz", "--targets", "b", "--seed", "1")
    ran.fails(2)
    assert ran.hint == "hesscli compute net.pt unnamed.npz --seed 1 --inputs a --targets b"


@pytest.mark.parametrize(
    "words",
    [
        ("compute", *NET),
        ("eigen", *NET),
        ("hvp", *NET, "--per-fedavg", "0.1", "--query", "d.npz"),
        ("diff", "hessian.safetensors", "hessian.safetensors"),
        ("merge",),
    ],
)
def test_only_opening_a_file_tells_whether_it_may_be_read(cli, monkeypatch, words):
    """Which ends with 3; as a wrong argument it would with 2."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    assert "is not readable" not in cli(*words).stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("eigen --tol 1e-9", "--tol"),
        ("eigen --max-products 9", "--max-products"),
        ("eigen --per-block", "--per-block"),
        ("eigen --dtype float64", "--dtype"),
        ("density --steps 9", "--steps"),
        ("density --probes 9", "--probes"),
        ("eigen net.pt d.npz --per-block --top 3", "--top"),
        ("eigen net.pt d.npz --per-block --which both", "--which"),
        ("eigen --force", "--force"),
        ("density net.pt d.npz --force", "--force"),
        ("show --force", "--force"),
        ("compute net.pt d.npz -o - --resume", "resume"),
        ("compute net.pt d.npz --fail-above 1 --shard 1/2", "--fail-above"),
        ("compute net.pt d.npz --unbatched --samples 1", "--samples"),
    ],
)
def test_options_that_would_change_nothing(cli, words, option):
    ran = cli(*words.split())
    assert ran.code == 2
    assert option in ran.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", "²"),
        ("--batch-size", "0"),
        ("--batch-size", "9" * 5000),
        ("--samples", "9" * 5000),
        ("--samples", "1:²"),
        ("--samples", ":2:"),
        ("--samples", ""),
        ("--scale", "1e99999999"),
        ("--scale", "1/-inf"),
        ("--scale", "nan"),
        ("--scale", "1/"),
        ("--shard", "1/" + "9" * 5000),
        ("--shard", "2/1"),
        ("--shard", "0/1"),
        ("--memory", "1.5.2GB"),
        ("--max-shard-size", "0"),
        ("--loss-arg", "delta"),
        ("--arch-arg", "=1"),
    ],
    ids=lambda word: word[:30],
)
def test_values_that_options_do_not_have(cli, option, value):
    ran = cli("compute", *NET, "--dry-run", option, value)
    assert ran.code == 2
    assert f"Invalid value for {option}: {value!r} is not " in ran.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seed", "99999999999999999999"), "Invalid value: seed is 99999999999999999999"),
        (("--threads", "99999999999"), "Invalid value for '--threads'"),
        (("--loss-arg", "a=1", "--loss-arg", "a=2"), "for --loss-arg: a is given twice"),
        (("--scale", "2", "--scale", "3"), "for --scale: an input has one factor"),
    ],
)
def test_other_values_that_options_do_not_have(cli, words, said):
    ran = cli("compute", *NET, "--dry-run", *words)
    assert ran.code == 2
    assert said in ran.stderr


@pytest.mark.parametrize("words", [("compute", *NET, "-o", ""), ("show", ""), ("diff", "", "a")])
def test_a_variable_that_is_not_set(words):
    command = [sys.executable, "-m", "hesscli", *words]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "error: an argument is empty" in ran.stderr


@pytest.mark.parametrize("option", ["--unbatched", "--train-mode"])
def test_a_batch_size_without_effect(cli, option):
    ran = cli("compute", *NET, "--dry-run", option, "--batch-size", 2)
    assert "--batch-size has no effect: all the data is one batch" in ran.notes


def test_options_of_another_device(cli):
    assert (
        "--tf32 has no effect: the device is cpu"
        in cli("compute", *NET, "--dry-run", "-d", "cpu", "--tf32").notes
    )
    assert "has no device cpu:3" in cli("compute", *NET, "--dry-run", "-d", "cpu:3").fails(6)


def test_the_plan_of_a_shard(cli):
    ran = cli("compute", *NET, "--dry-run", "--shard", "1/2")
    assert "--shard has no effect on a plan: it is of the whole Hessian" in ran.notes
    ran = cli("compute", *NET, "--dry-run", "--fail-above", 1)
    assert "--fail-above has no effect on a plan: nothing is computed" in ran.notes


def test_targets_of_a_loss_that_takes_none(cli):
    (Path.cwd() / "nets.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Linear):\n"
        "    def forward(self, x):\n        return super().forward(x).square().mean()\n"
    )
    torch.save(nn.Linear(3, 2).state_dict(), "weights.pt")
    words = ("-a", "nets.py:Net", "--arch-arg", "in_features=3", "--arch-arg", "out_features=2")
    ran = cli("trace", "weights.pt", "d.npz", *words, "--loss", "output", "--targets", "y")
    assert ran.code == 0, ran.stderr
    assert any(note.startswith("--targets has no effect") for note in ran.notes)


@pytest.mark.parametrize("error", [None, FileError("d.npz: damaged"), RecursionError()], ids=repr)
def test_ctrl_c_that_ends_in_something_else(cli, monkeypatch, error):
    """In a finalizer, of which Python drops the exceptions, or in an import that somebody tries."""

    def trace(*_, **__):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if error:
            raise error
        return {"converged": True, "interrupted": False}

    monkeypatch.setattr("hesscli.job.trace.trace", trace)
    monkeypatch.setattr(sys.modules["hesscli.cli.trace"], "print_traces", lambda *_: None)
    assert cli("trace", *NET).fails(130) == "interrupted"


@pytest.mark.parametrize("module", ["typer", "numpy.linalg"])
def test_ctrl_c_while_something_is_imported(tmp_path, module):
    code = """
import signal, sys

modules = [sys.argv.pop()]

class Interrupt:
    def find_spec(name, *_):
        if name in modules:
            modules.clear()
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
from hesscli.__main__ import main
main()
"""
    words = ["compute", *NET, module]
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert (ran.returncode, ran.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    ("cores", "given", "policy"),
    [(2, None, "passive"), (None, None, "passive"), (64, None, None), (2, "active", "active")],
)
def test_threads_wait_asleep_where_cores_are_few(monkeypatch, cores, given, policy):
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_WAIT_POLICY": given})
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr("hesscli.cli.run", lambda: None)
    __main__.main()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_tolerances_are_finite(cli, value):
    for words in (("eigen", *NET, f"--tol={value}"), ("trace", *NET, f"--rel-error={value}")):
        assert cli(*words).code == 2


def test_values_that_options_have(cli):
    for words in (("2",), (":",), ("1:",), (":3",), ("1:3",)):
        assert cli("compute", *NET, "--dry-run", "--samples", *words).code == 0
    words = ("--seed", 2**64 - 1, "--scale", "1e-3 / 2", "--batch-size", 10**17)
    assert cli("compute", *NET, "--dry-run", *words).code == 0


@pytest.mark.parametrize("alpha", ["nan", "inf"])
def test_a_step_is_finite(cli, alpha):
    assert cli("hvp", *NET, "--per-fedavg", alpha).code == 2


def shell(
    line: str, folder: Path, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line.replace("hesscli", f"{shlex.quote(python)} -m hesscli")],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command", ["", *"compute eigen trace density hvp merge show diff".split()]
)
def test_a_help_fits_eighty_columns(cli, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    ran = cli(*command.split(), "--help")
    assert max(len(line) for line in ran.stdout.splitlines()) in range(60, 81)


def test_a_help_says_what_the_files_are(cli):
    words = " ".join(cli("compute", "--help").stdout.split())
    assert "or a Hugging Face folder. [required]" in words
    assert "or a datasets folder. [required]" in words


def test_closed_standard_input(tmp_path):
    done = shell("hesscli show - <&-", tmp_path)
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr


def test_a_model_on_standard_input(tmp_path):
    """It has no name that could be pasted."""
    done = shell(f"hesscli eigen - < {REPOSITORY / 'sample_models' / 'digits_mlp.pt'}", tmp_path)
    assert done.returncode == 3
    assert "standard input: a TorchScript model; expected a Hessian file" in done.stderr
    assert done.stderr.splitlines()[-1] == "hint: hesscli compute model.pt data.npz"


def test_no_room_for_what_comes_from_standard_input(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    done = shell("head -c 200000 /dev/zero | (ulimit -f 64; hesscli show -)", tmp_path)
    assert done.returncode == 6
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: {tmp_path}: standard input cannot be kept there")
    assert hint == "hint: TMPDIR=FOLDER hesscli show -"
    assert sorted(tmp_path.iterdir()) == before


def test_no_folder_for_temporary_files(cli, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    ran = cli("show", "-", stdin=b"")
    assert ran.fails(6) == "no folder for temporary files can be written to"
    assert ran.hint == "TMPDIR=FOLDER hesscli show -"


def test_closed_standard_output(tmp_path):
    samples = REPOSITORY / "sample_models"
    files = f"{samples / 'digits_mlp.pt'} {samples / 'digits.npz'}"
    done = shell(f"hesscli compute {files} -o - >&-", tmp_path)
    assert done.returncode == 2
    assert "standard output is closed" in done.stderr


@pytest.mark.parametrize("option", ["--help", "--version", "--schema eigen"])
def test_a_reader_that_has_gone(tmp_path, option):
    done = shell(f"(sleep 1; hesscli {option}; echo $? > rc) | true", tmp_path)
    assert (done.stderr, (tmp_path / "rc").read_text()) == ("", "0\n")


@pytest.mark.parametrize(("bound", "code"), [("1e-9", 1), ("1e9", 0)])
def test_a_gate_holds_where_the_reader_has_gone(warm, tmp_path, bound, code):
    samples = REPOSITORY / "sample_models"
    files = f"{samples / 'digits_mlp.pt'} {samples / 'digits.npz'}"
    command = f"hesscli trace {files} -q --json --fail-above {bound}"
    shell(f"(sleep 1; {command}; echo $? > rc) | true", tmp_path, warm)
    assert (tmp_path / "rc").read_text() == f"{code}\n"


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "-", "hessian.safetensors"),
        ("diff", "hessian.safetensors", "-"),
        ("merge", "-"),
        ("compute", "-", "data.npz"),
        ("compute", "net.pt", "-"),
    ],
)
def test_what_does_not_read_standard_input(net, cli, words):
    ran = cli(*words)
    assert "standard input" in ran.fails(2)
    assert "hint: " not in ran.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("eigen net.pt d.npz --block 0.weight", "eigen net.pt d.npz --params 0.weight"),
        ("eigen net.pt d.npz --block=0.weight", "eigen net.pt d.npz --params 0.weight"),
        (
            "hvp net.pt d.npz --vector random --per-fedavg 1",
            "hvp net.pt d.npz --vector random",
        ),
        ("hvp net.pt d.npz", "hvp net.pt d.npz --vector gradient"),
        ("hvp net.pt d.npz --vector random --query d.npz", "hvp net.pt d.npz --query d.npz --per-fedavg 0.01"),
        ("hvp net.pt d.npz --vector d.npz", "hvp net.pt d.npz --vector gradient"),
        ("hvp net.pt d.npz --vector net.pt", "hvp net.pt d.npz --vector gradient"),
        ("trace net.pt d.npz -p 'zz*' -p'!0.*'", "trace net.pt d.npz --params 1.weight"),
        ("trace -p 'zz*' -- net.pt d.npz", "trace --params 0.weight -- net.pt d.npz"),
        ("trace net.pt d.npz -p 0", "trace net.pt d.npz --params '0.*'"),
        ("trace net.pt d.npz -p 0 -p 1 -p '!*s'", "trace net.pt d.npz --params '0.*' --params '1.*' --params '!*s'"),
        ("trace net.pt d.npz --scale z=1/2", "trace net.pt d.npz --scale x=0.5"),
        ("trace weights.pt d.npz", "trace weights.pt d.npz --arch mypkg.nets:make_mlp"),
        ("hvp net.pt two.npz --vector random", "hvp net.pt two.npz --vector random --inputs a --targets c"),
        ("trace d.npz net.pt", "the model comes first: hesscli trace MODEL DATA"),
        ("compute net.pt d.npz -o /dev/stdout", "compute net.pt d.npz -o -"),
        ("eigen net.pt", "compute net.pt data.npz"),
        ("eigen net.pt d.npz -o .", "eigen net.pt d.npz -o eigen.safetensors"),
        ("hvp net.pt d.npz --vector random -o .", "hvp net.pt d.npz --vector random -o hvp.safetensors"),
        ("show --plot .", "show --plot figure.png"),
        ("density net.pt d.npz --plot ''", "density net.pt d.npz --plot figure.png"),
        ("hvp net.pt d.npz --per-fedavg 1e40", "hvp net.pt d.npz --per-fedavg 1e40 --dtype float64"),
        ("compute net.pt d.npz -b full --method gauss-newton", "compute net.pt d.npz -b full --method auto"),
        (
            "compute net.pt d.npz --curvature fisher --method preactivation",
            "compute net.pt d.npz --curvature fisher --method auto",
        ),
        ("show d.npz", "compute model.pt data.npz"),
        ("compute net.pt d.npz -o 'a b/h'", "mkdir -p 'a b'"),
        ("compute net.pt d.npz -o d.npz/a/h", "compute net.pt d.npz -o hessian.safetensors"),
        ("show --plot 'a b.pn'", "show --plot 'a b.png'"),
        ("show --plot 'a dir.png'", "show --plot 'a dir.png/hessian.png'"),
        ("show 'a b'", "compute model.pt data.npz -o 'a b'"),
        ("compute net.pt d.npz -o pipe", "compute net.pt d.npz -o hessian.safetensors"),  # as /dev/null is
        ("density -o net.pt", "density -o density.safetensors"),
        ("compute weights.pt d.npz -a nets.py:Net --arch-arg k=3", "compute weights.pt d.npz --arch nets.py:Net"),
    ],
)  # fmt: skip
def test_hints(cli, tmp_path, words, hint):
    (tmp_path / "a dir.png").mkdir()
    os.mkfifo(tmp_path / "pipe")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "nets.py").write_text(CODE)
    np.savez(tmp_path / "two.npz", a=np.ones((4, 3)), b=np.ones((4, 2)), c=np.ones((4, 3)))
    ran = cli(*shlex.split(words))
    assert ran.code in (2, 3, 4, 5), ran.stderr
    assert ran.hint.removeprefix("hesscli ") == hint
    if "net.pt d.npz" in hint or "nets.py" in hint:
        assert cli(*shlex.split(hint)).code == 0


@pytest.mark.parametrize("loss", ["auto", "mse"])
@pytest.mark.parametrize(
    ("file", "option"), [("x.npz", "x"), ("x.npy", "y.npy"), ("z.npz", "'the end'")]
)
def test_no_targets(cli, loss, file, option):
    np.savez("x.npz", x=np.ones((4, 3), np.float32))
    np.save("x.npy", np.ones((4, 3), np.float32))
    ones = np.ones((4, 3), np.float32)
    np.savez("z.npz", **{"x": ones, "the end": ones, "more": ones})
    ran = cli("compute", "net.pt", file, "--loss", loss)
    assert f"{file}: holds no targets" in ran.fails(2)
    assert f"--targets {option}" in ran.hint


def test_frozen_parameters(cli):
    net = nn.Linear(3, 2).requires_grad_(False)
    torch.jit.script(net).save("net.pt")
    ran = cli("compute", *NET)
    assert ran.fails(2).startswith("every parameter is frozen (requires_grad=False): weight, bias")
    assert cli(*shlex.split(ran.hint)[1:]).code == 0


def test_parameters_that_are_integers(cli):
    net = nn.Linear(3, 2).requires_grad_(False)
    net.weight.data, net.bias.data = net.weight.data.long(), net.bias.data.long()
    torch.jit.script(net).save("net.pt")
    assert "no floating-point parameters" in cli("compute", *NET).fails(4)


def test_patterns_that_match_nothing(cli):
    words = ("-p", "0.*", "-p", "zz*", "-p", "!1.bias", "-p", "!yy")
    ran = cli("compute", *NET, "--dry-run", *words)
    assert [note for note in ran.notes if "matches" in note] == [
        "no parameter matches zz*",
        "no parameter matches !yy",
    ]


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (("!a.*",), ["c.weight"]),
        (("!b.*",), ["c.weight"]),
        (("b.*",), ["a.weight"]),
        (("*", "!b.weight"), ["c.weight"]),
    ],
)
def test_a_tied_parameter_goes_by_any_of_its_names(patterns, chosen):
    layers = {name: nn.Linear(2, 2, bias=False) for name in "abc"}
    layers["b"].weight = layers["a"].weight
    found, _, _ = chosen_parameters(nn.ModuleDict(layers), patterns, print)
    assert list(found) == chosen


def test_a_name_that_reads_as_a_pattern():
    module = nn.Module()
    module.register_parameter("w[0]", nn.Parameter(torch.ones(2)))
    with pytest.raises(UsageError) as refused:
        chosen_parameters(module, ("zz*",), print)
    assert refused.value.hint == "--params 'w[[]0]'"
    assert list(chosen_parameters(module, ("w[[]0]",), print)[0]) == ["w[0]"]


CODE = """
import torch
class Net(torch.nn.Linear):
    def __init__(self): super().__init__(3, 2)
def mul(output, target): return output.square().sum(1)
"""


def test_less_memory_than_anything_takes(cli):
    ran = cli("compute", *NET, "--memory", "100MB", "-b", "elements")
    assert "needs" in ran.fails(6)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0


def test_a_link_is_written_through(cli, tmp_path):
    (tmp_path / "disk").mkdir()
    for link, command in {
        "hessian.safetensors": ("compute", *NET),
        "hvp.safetensors": ("hvp", *NET, "--vector", "random"),
        "pairs": ("eigen", *NET, "-o", "pairs"),
        "of_file": ("eigen", "-o", "of_file"),
        "density.json": ("density", *NET, "-o", "density.json"),
        "density.png": ("density", *NET, "--plot", "density.png"),
    }.items():
        path = tmp_path / link
        path.unlink(missing_ok=True)
        path.symlink_to(f"disk/{link}")
        ran = cli(*command)
        assert ran.code == 0, ran.stderr
        assert path.is_symlink()
        assert path.stat().st_size


@pytest.mark.parametrize(
    ("option", "name", "target"),
    [("-o", "d.json", "d"), ("-o", "d.safetensors", "d.json"), ("--plot", "d.png", "disk/d.bin")],
)
def test_a_link_to_a_name_that_says_another_format(cli, tmp_path, option, name, target):
    """What is there would be of one format, and called by the other."""
    (tmp_path / "disk").mkdir()
    (tmp_path / name).symlink_to(target)
    ran = cli("density", *NET, option, name)
    assert f"{name}: leads to {tmp_path / target}" in ran.fails(2)
    assert not (tmp_path / target).exists()
    assert cli(*ran.hint.split()[1:]).code == 0


def test_targets_that_are_words(cli, tmp_path):
    (tmp_path / "t.csv").write_text("a,b,c,y\n1,2,3,cat\n4,5,6,dog\n")
    said = cli("compute", "net.pt", "t.csv").fails(3)
    assert said == "t.csv: the targets y are not numbers ('cat' in line 2)"


def test_a_matrix_that_is_no_hessian_is_not_called_one(cli):
    assert cli("compute", *NET, "--curvature", "ggn", "-o", "g").code == 0
    for command in ("eigen", "density", "show"):
        ran = cli(command, "g")
        assert "matrix   ggn, " in ran.stdout
        assert cli(command, "g", "--json").document["curvature"] == "ggn"


@pytest.mark.parametrize(
    "output", ["y.npy", "nets.py", "folder/x.npy", "folder/earlier", "w-00001-of-00001.safetensors"]
)
def test_no_input_is_replaced(cli, tmp_path, output):
    (tmp_path / "nets.py").write_text(CODE)
    (tmp_path / "folder").mkdir()
    np.save("folder/x.npy", np.ones((4, 3), np.float32))
    np.save("y.npy", np.ones(4, np.int64))
    torch.save(torch.nn.Linear(3, 2).state_dict(), "net.pt")
    command = ("compute", "net.pt", "folder", "--arch", "nets.py:Net", "--loss", "nets.py:mul",
               "--targets", "y.npy", "--force", "-o", output)  # fmt: skip
    if output == "folder/earlier":  # a result may be
        assert cli(*command).code == 0
        assert cli(*command).code == 0
        return
    if output.startswith("w-"):
        weights = torch.nn.Linear(3, 2).state_dict()
        safetensors.torch.save_file(weights, output)
        Path("w.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(weights, output)})
        )
        command = tuple(
            "w.safetensors.index.json" if word == "net.pt" else word for word in command
        )
    before = Path(output).read_bytes()
    assert "is an input of this command" in cli(*command).fails(2)
    assert Path(output).read_bytes() == before


@pytest.mark.parametrize("command", ["compute", "eigen"])
def test_a_pipe_is_not_replaced(cli, command):
    """As `-o >(command)` names it."""
    ends = os.pipe()
    try:
        name = f"/dev/fd/{ends[1]}"
        said = cli(command, *NET, "-q", "-o", name).fails(2)
        assert said == f"{name}: is not a regular file; not replaced"
    finally:
        for end in ends:
            os.close(end)


def test_a_folder_in_the_place_of_a_part_is_not_replaced(cli, tmp_path):
    (tmp_path / "h-00001-of-00002.safetensors").mkdir()
    said = cli("compute", *NET, "-q", "-o", "h.safetensors").fails(2)
    assert said == "h-00001-of-00002.safetensors: is not a regular file; not replaced"


@pytest.mark.parametrize(
    "text",
    [
        '{"tasks": ["run hesscli"]}',
        '{"schema": "another.density/1"}',
        '["hesscli."]',
        "hesscli. is no JSON",
        "[" * 100_000,
    ],
    ids=lambda text: text[:10],
)
def test_a_file_that_only_speaks_of_hesscli_is_not_replaced(cli, tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    words = ("density", *NET, "-q", "-o", "settings.json")
    assert "hesscli did not write it" in cli(*words).fails(2)
    assert cli(*words, "--force").code == 0
    assert cli(*words).code == 0


def test_a_result_for_which_there_is_no_room(cli, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    before = sorted(tmp_path.iterdir())
    said = cli("density", *NET, "-q", "-o", "d.json").fails(6)
    assert said == "d.json: No space left on device"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("compute",), "out.safetensors"),
        (("eigen", "-q"), "out.safetensors"),
        (("hvp", "--vector", "random"), "out.safetensors"),
        (("density",), "out.json"),
    ],
)
def test_what_is_replaced_keeps_its_permissions(cli, tmp_path, command, name):
    words = (*command[:1], *NET, *command[1:], "-o", name)
    assert cli(*words).code == 0
    (tmp_path / name).chmod(0o600)
    assert cli(*words).code == 0
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", [("compute",), ("eigen", "-q"), ("hvp", "--vector", "random")])
def test_names_too_long_for_the_file_system(cli, tmp_path, command):
    """An index of the name must fit too, which is eleven longer."""
    words = (*command[:1], *NET, *command[1:], "-o")
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    for length in (longest + 1, longest, longest - 10):
        ran = cli(*words, "b" * length)
        assert ran.fails(2) == f"{'b' * length}: a longer name than can be written here"
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert cli(*words, "b" * (longest - 11)).code == 0


def test_a_link_that_leads_to_itself(cli, tmp_path):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    assert "leads to itself" in cli("compute", *NET, "-o", "loop.safetensors").fails(2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_talk_that_cannot_be_written_stops_nothing(warm, tmp_path):
    line = "hesscli compute net.pt d.npz 2>/dev/full; hesscli show no 2>/dev/full"
    ran = shell(line, tmp_path, warm)
    assert ran.returncode == 2
    assert "total" in ran.stdout
    assert (tmp_path / "hessian.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize(
    "words", ["show --json", "compute net.pt d.npz -q -o -", "trace net.pt d.npz", "--help"]
)
def test_a_result_that_cannot_be_printed(warm, tmp_path, words):
    ran = shell(f"hesscli {words} >/dev/full", tmp_path, warm)
    assert ran.returncode == 6
    assert ran.stderr.splitlines()[-1] == "error: standard output: No space left on device"


def test_an_architecture_s_arguments_without_use(cli):
    ran = cli("compute", *NET, "--arch-arg", "a=1")
    assert "--arch-arg has no effect: net.pt holds its own architecture" in ran.notes


def test_the_options_offer_every_word():
    methods = PREACTIVATION, GAUSS_NEWTON, HVP, FINITE_DIFFERENCE
    assert get_args(options.Method) == ("auto", *methods)
    assert get_args(options.Blocks) == tuple(STRUCTURES)
    assert get_args(options.Curvature) == tuple(CURVATURES)
    assert get_args(options.Which) == tuple(WHICH)
