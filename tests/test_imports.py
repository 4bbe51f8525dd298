"""Who imports whom, and what is loaded to print a help."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import REPOSITORY

# Each room, and the rooms that it may import from.
ROOMS = {
    "errors": set(),
    "texts": set(),
    "gradients": set(),
    "widest": set(),
    "hessian": {"errors", "texts", "gradients", "widest"},
    "files": {"errors", "texts", "gradients"},
    "spectrum": {"errors", "widest"},
    "job": {"errors", "texts", "widest", "hessian", "files", "spectrum", ""},
    "cli": {"errors", "job", "schemas", ""},
    "schemas": set(),
    "__main__": {"errors", "cli"},
    "": {"errors", "job"},
}

# The folders inside a room, from the ground up: each may import from those before it.
FLOORS = {
    "hessian": "aten objective recording proofs differences routes".split(),
    "files": "hessians models".split(),
    "job": "setup matrix".split(),
}


def test_rooms_import_downwards_only():
    package, seen = REPOSITORY / "hesscli", set()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        room = "" if parts == ("__init__",) else parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module]
                if node.module == "hesscli":
                    names = [f"hesscli.{alias.name}" for alias in node.names]
            for name in names:
                words = name.split(".")
                if words[0] == "hesscli":
                    other = words[1] if len(words) > 1 else ""
                    seen.add((room, other))
                    allowed = ROOMS[room] | {room}
                    assert other in allowed or other.startswith("__"), f"{path}: {name}"
                elif words[0] in ("typer", "click", "rich"):
                    assert room == "cli", f"{path}: {name}"
                elif words[0] == "torch":
                    assert room in ("gradients", "widest", "hessian", "files", "spectrum", "job"), (
                        f"{path}: {name}"
                    )
    assert {("cli", "job"), ("job", "hessian"), ("job", "files"), ("job", "spectrum")} <= seen
    assert {p.name for p in package.iterdir() if p.is_dir()} - {"__pycache__"} <= set(ROOMS)


@pytest.mark.parametrize("room", FLOORS)
def test_folders_import_downwards_only(room):
    folder, floors, seen = REPOSITORY / "hesscli" / room, FLOORS[room], set()
    assert {p.name for p in folder.iterdir() if p.is_dir()} - {"__pycache__"} == set(floors)
    for path in folder.glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            words = f"{node.module}.{node.names[0].name}".split(".")
            if words[:2] == ["hesscli", room] and words[2] in floors:
                seen.add(words[2])
                assert floors.index(words[2]) <= floors.index(path.parent.name), (
                    f"{path}: {node.module}"
                )
    assert seen == set(floors)


@pytest.mark.parametrize("words", [["--help"], ["compute", "--help"], ["eigen", "--help"], []])
def test_help_imports_nothing_heavy(words, tmp_path):
    code = (
        "import sys; sys.argv = ['hesscli', *sys.argv[1:]]\n"
        "from hesscli.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'safetensors', 'rich.table'} & set(sys.modules)\n"
        "print('loaded', sorted(heavy), code, file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert f"loaded [] {0 if words else 2}" in ran.stderr
    assert "Usage: " in ran.stdout + ran.stderr
    assert "\x1b" not in ran.stdout
