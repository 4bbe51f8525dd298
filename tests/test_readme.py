"""The README's commands print what the README says they print."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PLAIN, Ran

from hesscli.schemas import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALLED = Path(sys.executable).parent
ENVIRONMENT = os.environ | PLAIN | {"CUDA_VISIBLE_DEVICES": ""}

# (language, code, the block without a language that follows at once, or ""), in the order in which they run
BLOCKS = re.findall(r"```(\w+)\n(.*?)```\n(?:```\n(.*?)```\n)?", README, re.DOTALL)
SHELL = [(code, shown) for language, code, shown in BLOCKS if language == "sh"]
PYTHON = [code for language, code, _ in BLOCKS if language == "python"]
READERS = [code for code in PYTHON if "import hesscli" not in code]
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
VARIABLE = [
    (r"error [\d.e+-]+", "error E"),  # rounding differs from CPU to CPU
    (r"[\d.e-]+ (s|min|h)\b", "T s"),
    (r"(?m)^(wrote: \S+) .*$", r"\1"),  # the header's size depends on versions
]


def same(shown: str, printed: str) -> bool:
    """Equal texts, but numbers to three digits, and what is next to zero as zero."""
    for pattern, constant in VARIABLE:
        shown, printed = (re.sub(pattern, constant, text) for text in (shown, printed))
    left, right = (NUMBER.split(re.sub(r" +", " ", text)) for text in (shown, printed))
    return len(left) == len(right) and all(
        math.isclose(float(a), float(b), rel_tol=1e-2, abs_tol=1e-5) if i % 2 else a == b
        for i, (a, b) in enumerate(zip(left, right, strict=True))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "sample_models", folder / "sample_models")
    return folder


def run(command: str, folder: Path, programs: Path = INSTALLED) -> str:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=ENVIRONMENT | {"PATH": os.pathsep.join([str(programs), os.environ.get("PATH", "")])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def programs(folder: Path, warm: str) -> Path:
    """Where a `hesscli` is that need not import torch."""
    (folder / "bin").mkdir()
    (folder / "bin" / "hesscli").write_text(f'#!/bin/sh\nexec {warm} -m hesscli "$@"\n')
    (folder / "bin" / "hesscli").chmod(0o700)
    return folder / "bin"


def test_commands_print_what_is_shown(folder: Path, programs: Path) -> None:
    """In the README's order: `eigen` reads what the command before it wrote. The first is as installed."""
    path = INSTALLED
    for language, code, shown in BLOCKS:
        if language == "python":
            (folder / "script.py").write_text(code)
            printed = run(f"{sys.executable} -W ignore::DeprecationWarning script.py", folder)
        elif language == "sh":
            printed = run(code.removeprefix("pip install torch==2.13.0 . && "), folder, path)
            path = programs
        else:
            continue
        assert same(shown, printed), f"{code}{printed}"
        if "--json" in code:
            json.loads(printed)


@pytest.mark.parametrize("code", READERS)
def test_the_python_reads_the_file(code: str, folder: Path, programs: Path) -> None:
    hesscli = "hesscli compute sample_models/digits_mlp.pt sample_models/digits.npz -q"
    run(hesscli, folder, programs)
    script = code + "print({name: block.shape for name, block in blocks.items()})\n"
    (folder / "read.py").write_text(script)
    assert "'fc2.bias': (10, 10)" in run(f"{sys.executable} read.py", folder)


def test_the_first_screen_is_the_contract() -> None:
    assert len(READERS) == 1
    assert len(SHELL) >= 5
    first = "hesscli compute sample_models/digits_mlp.pt sample_models/digits.npz --blocks diag\n"
    assert SHELL[0][0] == f"pip install torch==2.13.0 . && {first}"
    assert "`pip install torch==2.13.0 -e '.[test]' && pytest`" in README


def test_every_option_of_the_readme_exists(cli: Callable[..., Ran]) -> None:
    helps = [cli("--help"), *(cli(command, "--help") for command in commands())]
    assert not any(ran.code for ran in helps)
    known = "".join(ran.stdout for ran in helps)
    own = README.replace("torchrun --nproc-per-node", "")
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)):
        assert option in known, option


def test_comparison() -> None:
    assert same("check error 3e-7, 2.6 s  1.59  -1.88e-09", "check error 4e-7, 3 s 1.588 1.8e-09")
    assert not same("trace 1.59", "trace 1.64")
    assert not same("trace 1.59", "trace -")
    assert not same("fc1 1.59", "fc2 1.59")
