"""What is printed, to the letter: tables against golden files, numbers, streams of every kind."""

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hesscli.cli import output
from hesscli.cli.density import print_density
from hesscli.cli.diff import print_difference
from hesscli.cli.eigen import print_eigenpairs, print_extremes
from hesscli.cli.heatmap import draw, room
from hesscli.cli.hvp import print_products
from hesscli.cli.numbers import error, number, seconds
from hesscli.cli.output import Output
from hesscli.cli.summary import WIDE, print_block, print_hessian, print_plan
from hesscli.cli.trace import print_traces
from hesscli.job.model_eigen import reporting
from hesscli.job.options import Listener
from hesscli.job.picture import Picture, Region
from hesscli.job.sizes import size
from hesscli.job.trace import report

GOLDEN = Path(__file__).parent / "golden"
PRINTERS = {
    "compute": print_hessian,
    "plan": print_plan,
    "eigen": print_eigenpairs,
    "eigen_of_model": print_eigenpairs,
    "extremes": print_extremes,
    "wide": partial(print_hessian, columns=WIDE),
    "block": print_block,
    "diff": print_difference,
    "trace": print_traces,
    "density": print_density,
    "density_of_model": print_density,
    "products": print_products,
    "term": print_products,
    "heatmap": draw,
    "heatmap_of_elements": draw,
}


class Stream(io.StringIO):
    """A text stream that is, or is not, a terminal of some encoding."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = False) -> None:
        super().__init__()
        self._encoding, self._terminal = encoding, terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


def block(name: str, shape: list[int], size: int, *numbers: float | None) -> dict[str, Any]:
    trace, eig_max, eig_min, fro_norm = numbers
    return {
        "name": name,
        "shape": shape,
        "size": size,
        "trace": trace,
        "eig_max": eig_max,
        "eig_min": eig_min,
        "fro_norm": fro_norm,
        "bytes": 4 * size**2,
        "plan": "preactivation (16 seeds)",
    }


def compute() -> dict[str, Any]:
    return {
        "model": {"path": "net.pt"},
        "data": {"path": "digits.npz", "samples": 300},
        "loss": {
            "name": "cross-entropy",
            "arguments": {"label_smoothing": 0.1},
            "reduction": "mean",
            "value": 0.10914,
        },
        "structure": "block_diagonal",
        "curvature": "hessian",
        "dtype": "float32",
        "device": "cpu",
        "gradient_norm": 0.176,
        "method": "gauss-newton + preactivation",
        "check": {"relative_error": 3.51e-7},
        "symmetry_error": 0.0,
        "seconds": 2.6,
        "blocks": [
            block("fc1.weight", [16, 64], 1024, 7.63, 1.5861, -0.0512, 2.231),
            block("fc1.bias", [16], 16, -0.0381234, 0.134, -1.8812e-09, 1234567.0),
            block(
                "encoder.layers.0.self_attention.in_proj", [96, 32], 3072, 1e3, None, None, 1e-12
            ),
            block("scale", [], 1, 0.0, 0.0, 0.0, 0.0),
        ],
        "total": {
            "size": 4113,
            "trace": 8.82,
            "eig_max": 1.5861,
            "eig_min": -0.0512,
            "fro_norm": None,
            "bytes": 41944068,
            "memory": 273000000,
            "estimated_seconds": 0.0251,
        },
    }


def plan() -> dict[str, Any]:
    left_out = ("gradient_norm", "method", "check", "symmetry_error")
    return {key: value for key, value in compute().items() if key not in left_out}


def wide() -> dict[str, Any]:
    document = compute()
    document["model"] = document["data"] | {"sha256": "0123456789abcdef" * 4}
    document["data"] = {"samples": 300, "sha256": "fedcba9876543210" * 4}
    del document["seconds"], document["model"]["path"]
    facts = [
        (0.00745, 108, float("inf"), 2.1e-8),
        (-0.00238, 1, 4.2e9, 0.0),
        (0.326, None, None, None),
    ]
    keys = ("mean_eig", "negative", "condition", "symmetry_error")
    for block, values in zip(document["blocks"], facts, strict=False):
        block |= dict(zip(keys, values, strict=True))
    document["total"]["mean_eig"] = 0.00214
    return document


def one() -> dict[str, Any]:
    document = wide()
    return document | {"blocks": [document["blocks"][0] | {"method": "hvp", "check_error": 3e-9}]}


def diff() -> dict[str, Any]:
    def side(path: str, dtype: str, value: float) -> dict[str, Any]:
        loss = {"name": "mse", "value": value}
        return {
            "path": path,
            "structure": "block_diagonal",
            "curvature": "hessian",
            "dtype": dtype,
            "loss": loss,
            "gradient_norm": 0.176,
        }

    def row(name: str, equal: bool, *numbers: float | None) -> dict[str, Any]:
        keys = ("rel_diff", "max_diff", "d_trace", "d_eig_max", "d_eig_min")
        return {"name": name, "size": 1024, "equal": equal, **dict(zip(keys, numbers, strict=True))}

    return {
        "a": side("before.safetensors", "float32", 0.109),
        "b": side("after.safetensors", "float64", 0.112),
        "blocks": [
            row("fc1.weight", True, 2.5e-7, 1.7e-8, 3.47e-7, 4.37e-8, -1.6e-8),
            row(
                "encoder.layers.0.self_attention.in_proj",
                False,
                float("inf"),
                1.5,
                -12.0,
                None,
                None,
            ),
        ],
        "only_a": ["fc2.weight", "fc2.bias"],
        "only_b": [],
        "other_size": ["fc3.weight"],
    }


def eigen() -> dict[str, Any]:
    return {
        "hessian": "-",
        "structure": "block_diagonal",
        "curvature": "hessian",
        "which": "magnitude",
        "eigenvalues": [-12.5, 0.0931234567, 1e-9],
        "residuals": [3.1e-16, 0.0, 1e-10],
        "blocks": ["fc1.weight", "fc1.bias", "fc1.bias"],
        "block": None,
        "size": 1210,
    }


def of_model() -> dict[str, Any]:
    """What every command says that forms no matrix."""
    parameters = [{"name": each["name"], "shape": each["shape"]} for each in compute()["blocks"]]
    return compute() | {"size": 4113, "method": "hvp", "products": 81, "parameters": parameters}


def eigen_of_model() -> dict[str, Any]:
    found = {"which": "both", "eigenvalues": [12.5, -0.25], "residuals": [2e-4, 1e-3]}
    return of_model() | found | {"blocks": ["hessian"] * 2, "products": 1}


def extremes() -> dict[str, Any]:
    return of_model() | {
        "eigenvalues": [1.5861, -0.0512345678, 2.5],
        "residuals": [1e-4, 3e-4, 0.0],
        "blocks": ["fc1.weight", "fc1.weight", "scale"],
    }


def trace() -> dict[str, Any]:
    rows = [
        (7.6312, 0.0, 0.00745),
        (-0.0381234, 0.00123, -0.00238),
        (float("nan"),) * 3,
        (0.0,) * 3,
    ]
    keys = ("trace", "standard_error", "mean")
    document = of_model()
    for block, row in zip(document["blocks"], rows, strict=True):
        block |= dict(zip(keys, row, strict=True))
    document["total"] |= dict(zip(keys, (1008.8214, 12.3, 0.245), strict=True))
    return document


def density() -> dict[str, Any]:
    mass = [0.0, 1e-17, 0.01, 0.02, 0.0, 0.6, 0.27, 0.1]
    edges = [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    file = {"hessian": "h.safetensors", "structure": "full", "curvature": "ggn", "size": 100}
    return file | {"exact": True, "histogram": {"edges": edges, "mass": mass}}


def density_of_model() -> dict[str, Any]:
    found = {"edges": [-1e-9, 1e-9, 3e-9], "mass": [0.25, 0.75]}
    return of_model() | {"exact": False, "probes": 1, "steps": 80, "histogram": found}


def products() -> dict[str, Any]:
    document = of_model() | {"per_fedavg": None, "vector": "v.safetensors"}
    for i, facts in enumerate([*document["blocks"], document["total"]]):
        facts |= {"vector_norm": 10.0 * i, "product_norm": 0.125 * i}
    return document | {"rayleigh": [1.5, -2.0, None, 3.0, 4.0, 5.0]}


def term() -> dict[str, Any]:
    return products() | {"per_fedavg": 0.01, "query": {"path": "query.npz"}, "vector": None}


def heatmap() -> Picture:
    cells = np.array([[1.0, 0.1, 0.0], [0.1, 1e-3, 1e-6], [0.0, 1e-6, 1e-9]])
    regions = (Region("first", 0, 2), Region("a.long.name" * 5, 2, 2.01), Region("third", 2.01, 3))
    return Picture(cells, regions, 300, diagonal=False)


def heatmap_of_elements() -> Picture:
    cells = np.array([[2.0, 0.0, 1.0, 1e-3], [1.0, 0.5, 0.25, 0.125]])
    return Picture(cells, (Region("weight", 0, 1), Region("bias", 1, 2)), 12, diagonal=True)


def show(
    table: str,
    document: dict[str, Any] | Picture,
    stream: Stream,
    markdown: bool = False,
    **options: Any,
) -> str:
    with Output(**options) as out:
        out.use_markdown(markdown)
        out.stream = stream
        out.result(document, PRINTERS[table])
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


DOCUMENTS = {
    "compute": compute,
    "plan": plan,
    "eigen": eigen,
    "eigen_of_model": eigen_of_model,
    "extremes": extremes,
    "wide": wide,
    "block": one,
    "diff": diff,
    "trace": trace,
    "density": density,
    "density_of_model": density_of_model,
    "products": products,
    "term": term,
    "heatmap": heatmap,
    "heatmap_of_elements": heatmap_of_elements,
}


@pytest.mark.parametrize("table", PRINTERS)
def test_golden_table(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")  # where rich would force colours
    printed = show(table, DOCUMENTS[table](), Stream())
    golden = GOLDEN / f"{table}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(printed)
    assert printed == golden.read_text()
    assert "\033" not in printed
    assert all(line == line.rstrip() for line in printed.splitlines())


@pytest.mark.parametrize("table", ["compute", "diff", "heatmap"])
def test_golden_markdown(table: str) -> None:
    printed = show(table, DOCUMENTS[table](), Stream(), markdown=True)
    golden = GOLDEN / f"{table}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(printed)
    assert printed == golden.read_text()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_folds_names_and_cuts_no_number(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    printed = show("compute", compute(), Stream(terminal=True))
    rows = printed.split("\n\n")[1].splitlines()
    if columns >= 80:
        assert max(len(row) for row in rows) <= columns
    assert len(rows) == 6 if columns == 200 else len(rows) > 6
    for cell in ("-0.0381", "-1.88e-09", "1.23e+06", "37748736", ">=1.59", "<=-0.0512"):
        assert cell in printed
    names = [row[: row.index("  ")] if "  " in row else row for row in rows]
    assert "encoder.layers.0.self_attention.in_proj" in "".join(names)


def test_a_table_that_does_not_fit_is_printed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    printed = show("wide", wide(), Stream(terminal=True))
    _, first, second = printed.split("\n\n")
    assert max(map(len, (first + "\n" + second).splitlines())) <= 80
    headers = [part.splitlines()[0].split() for part in (first, second)]
    assert headers[1][0] == "block"
    assert headers[0] + headers[1][1:] == ["block", "shape", "size", *WIDE, "bytes"]
    row = second.splitlines()[1].split()
    assert row == ["fc1.weight", "108", "inf", "2.1e-08", "4194304"]
    assert show("wide", wide(), Stream()).count("\n\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "coloured"),
    [("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("TERM", "dumb", False)],
)
def test_colour_is_for_terminals_that_want_it(
    variable: str, value: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert ("\033" in show("eigen", eigen(), Stream(terminal=True))) == coloured


def test_force_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert show("eigen", eigen(), Stream()).count("\033[1m") == 1
    assert "\033" not in show("eigen", eigen(), Stream(), json=True)
    assert "\033" not in show("eigen", eigen(), Stream(), markdown=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in show("eigen", eigen(), Stream())


def test_names_cannot_steer_the_terminal() -> None:
    document = compute()
    document["blocks"][0]["name"] = "\033[31mred\nnext\u202e"
    document["model"]["path"] = "a\rb.pt"
    printed = show("compute", document, Stream())
    assert r"\x1b[31mred\nnext\u202e" in printed
    assert r"a\rb.pt" in printed
    assert "\033" not in printed


def test_ascii_streams() -> None:
    document = compute()
    document["blocks"][0]["name"] = "\N{GREEK SMALL LETTER LAMDA}.weight"
    printed = show("compute", document, Stream("ascii"))
    assert printed.isascii()
    assert r"\u03bb.weight" in printed
    assert "\N{GREEK SMALL LETTER LAMDA}.weight" in show("compute", document, Stream())


def test_bars_in_ascii() -> None:
    printed = show("density", density(), Stream("ascii"))
    bars = [line.partition("%")[0].count("#") for line in printed.splitlines() if " to " in line]
    drawn = [line.count("█") for line in show("density", density(), Stream()).splitlines()]
    assert printed.isascii()
    assert [abs(a - b) <= 1 for a, b in zip(bars, drawn[-8:], strict=True)] == [True] * 8
    assert max(bars) > 40


@pytest.mark.parametrize(("columns", "longest"), [(40, 38), (70, 68), (300, 98)])
def test_bars_end_at_the_edge_of_a_terminal(
    columns: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    document = density()
    document["histogram"]["mass"] = [1.0] + [0.0] * 7
    lines = show("density", document, Stream(terminal=True)).splitlines()
    assert len(next(line for line in lines if "█" in line)) == longest


@pytest.mark.parametrize(
    ("columns", "lines", "terminal", "cells"),
    [
        (100, 40, True, 60),
        (100, 20, True, 48),
        (100, 40, False, 74),
        (20, 40, True, 12),
        (9, 9, True, 8),
    ],
)
def test_a_heatmap_fits_a_terminal(
    columns: int, lines: int, terminal: bool, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    with Output() as out:
        out.stream = Stream(terminal=terminal)
        assert room(out) == cells


def test_one_block_has_no_total() -> None:
    document = compute()
    document["blocks"] = document["blocks"][:1]
    assert ">=" not in show("compute", document, Stream())


def test_bounds_of_what_was_not_computed() -> None:
    document = compute()
    document["total"] |= {"eig_max": None, "eig_min": None}
    total = show("compute", document, Stream()).splitlines()[-1]
    assert total.split() == ["total", "4113", "8.82", "-", "-", "-", "41944068"]


def test_unchecked_is_said() -> None:
    assert "check    not done" in show("compute", compute() | {"check": None}, Stream())


def test_quiet_prints_nothing() -> None:
    assert show("compute", compute(), Stream(), quiet=True) == ""


def test_json_has_null_for_what_is_not_finite() -> None:
    document = compute() | {"seconds": float("nan"), "symmetry_error": float("inf")}
    printed = json.loads(show("compute", document, Stream(), json=True))
    assert printed["seconds"] is None
    assert printed["symmetry_error"] is None
    assert printed["blocks"] == document["blocks"]


def test_numbers() -> None:
    values = {None: "-", float("nan"): "-", float("inf"): "-", 0.0: "0", -0.03812: "-0.0381"}
    assert {value: number(value) for value in values} == values
    assert [number(x) for x in (1234567.0, 999.4, 1e-12)] == ["1.23e+06", "999", "1e-12"]
    assert [error(x) for x in (None, 0.0, 3.51e-7)] == ["-", "0", "3.5e-07"]
    assert [seconds(x) for x in (0.0251, 9.94, 59.6, 600, 7300)] == [
        "0.025 s",
        "9.9 s",
        "60 s",
        "10 min",
        "2.0 h",
    ]
    assert [size(x) for x in (999, 4314512, 8e10, 2e15)] == [
        "999 B",
        "4.31 MB",
        "80 GB",
        "2e+03 TB",
    ]


def test_talk_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Output() as out:
        out.note("two\nlines")
        out.wrote("hessian.safetensors", 4314512)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "note: two\\nlines\nwrote: hessian.safetensors (4.31 MB)\n"


def test_no_bar_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Output() as out:
        out.progress(1, 2, "fc1.weight")
    assert capsys.readouterr() == ("", "")


def test_a_bar_that_never_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=True)
    monkeypatch.setattr(output.sys, "stderr", stream)
    with Output() as out:
        out.progress(0, 2, "")
        out.progress(2, 2, "fc1.weight")
    assert stream.getvalue() == ""


def hesscli(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "hesscli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((), "Commands:"),
        (("compute",), "error: missing argument 'MODEL'\nhint: hesscli compute --help"),
        (("nothing",), "error: no such command 'nothing'\nhint: hesscli --help"),
        (("compute", "a", "b", "--blocks", "c"), "error: invalid value for '--blocks'"),
        (("compute", "no.pt", "no.npz"), "error: no.pt: no such file"),
        (("eigen", "no.st"), "error: no.st: no such file\nhint: "),
    ],
)
def test_usage_errors(warm: str, arguments: tuple[str, ...], found: str) -> None:
    done = hesscli(warm, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert found.lower() in done.stderr.replace("python -m hesscli", "hesscli").lower()


@pytest.mark.parametrize("command", [(), ("compute",), ("eigen",), ("show",), ("diff",)])
def test_help_is_plain_and_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys; from hesscli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('loaded:', sorted({'torch', 'numpy', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"],
        env=os.environ | {"GITHUB_ACTIONS": "true", "FORCE_COLOR": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.endswith("loaded: []\n")
    assert "\033" not in done.stdout
    assert "Example:" in done.stdout


def test_how_far_a_search_has_come():
    """A residual by its logarithm, up to 99 %, as it is not done yet; a standard error as its samples grow; either by
    its products, where these run out first.
    """
    heard = []
    listener = Listener()
    listener.progress = lambda done, total, doing: heard.append((done / total, doing))
    residual = reporting(listener, 100)
    for worst in (1e-1, 1.0, 1e-2, 1e-4, 1e-5):
        residual(7, worst, 1e-4)
    assert [come for come, _ in heard] == pytest.approx([0.07, 0.07, 0.5, 0.99, 0.99], abs=2e-3)
    assert heard[2][1] == "7 products, residual 1.0e-02"
    heard.clear()
    residual(80, 1e-2, 1e-4)  # of 100, which end it
    assert heard[0][0] == pytest.approx(0.8)
    heard.clear()
    for relative in (0.1, 0.02, 0.01, 0.005, 0.0):
        report(listener, 100, 7, relative, 0.01)
    assert [come for come, _ in heard] == pytest.approx([0.07, 0.25, 1, 1, 1], abs=2e-3)
    assert heard[1][1] == "7 products, standard error 2.0%"
    heard.clear()
    report(listener, 100, 80, 0.1, 0.01)
    assert heard[0][0] == pytest.approx(0.8)
    heard.clear()
    reporting(listener, 100)(1, 0.0, 0.0)
    assert heard[0][0] <= 1
