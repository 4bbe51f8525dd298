"""|H| as a picture: what is drawn, in the terminal and by matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hessian_files import symmetric, write
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hesscli
from hesscli.cli.heatmap import CIVIDIS, OF_256
from hesscli.files.hessians.hessian_file import HessianFile, read_hessian
from hesscli.job.figures import plot_density, plot_matrix, spread
from hesscli.job.picture import DECADES, Picture, picture
from hesscli.spectrum import tiles
from hesscli.spectrum.density import Density

PLAIN = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "COLORTERM")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in PLAIN:
        monkeypatch.delenv(name, raising=False)


def pooled(matrix: np.ndarray, k: int) -> np.ndarray:
    """The largest magnitude in each cell, entry by entry."""
    n = len(matrix)
    cells = np.zeros((k, k))
    for i in range(n):
        for j in range(n):
            at = i * k // n, j * k // n
            cells[at] = max(cells[at], abs(matrix[i, j]))
    return cells


def draw(path: Path, names: Sequence[str], pixels: int) -> Picture:
    return picture(read_hessian(path), names, pixels, lambda *_: None)


@pytest.mark.parametrize("tile", [1, 20, 1 << 22])
@pytest.mark.parametrize("pixels", [1, 4, 7, 20])
def test_cells_hold_the_largest_magnitude(tmp_path, monkeypatch, tile, pixels):
    monkeypatch.setattr(tiles, "_NUMBERS", tile)
    a, b, c = symmetric(8), symmetric(1, 1), symmetric(4, 2)
    write(tmp_path / "h", {"a": a, "b": b, "c": c})
    whole = np.zeros((13, 13))
    for start, part in ((0, a), (8, b), (9, c)):
        whole[start : start + len(part), start : start + len(part)] = part
    heard = []
    drawn = picture(
        read_hessian(tmp_path / "h"), ["a", "b", "c"], pixels, lambda *said: heard.append(said)
    )
    np.testing.assert_array_equal(drawn.cells, pooled(whole, min(pixels, 13)))
    assert heard[-1] == (13, 13, "c")
    assert [region.name for region in drawn.regions] == ["a", "b", "c"]
    edges = [edge for region in drawn.regions for edge in (region.start, region.stop)]
    assert edges == pytest.approx([x * len(drawn.cells) / 13 for x in (0, 8, 8, 9, 9, 13)])


def test_one_block_shows_its_parameters(tmp_path):
    write(tmp_path / "h", {"hessian": symmetric(10)}, "full", {"w": (2, 3), "b": (4,)})
    drawn = draw(tmp_path / "h", ["hessian"], 5)
    assert [(p.name, p.start, p.stop) for p in drawn.regions] == [("w", 0, 3), ("b", 3, 5)]


def test_elements_are_strips(tmp_path):
    blocks = {"w": np.arange(-3.0, 3.0).reshape(2, 3), "b": np.array([5.0])}
    write(tmp_path / "h", blocks, "elements")
    drawn = draw(tmp_path / "h", ["w", "b"], 3)
    np.testing.assert_array_equal(drawn.cells, [[3, 1, 2], [5, 5, 5]])
    stretched = draw(tmp_path / "h", ["w"], 12)
    np.testing.assert_array_equal(stretched.cells, [np.repeat([3.0, 2, 1, 0, 1, 2], 2)])


def test_levels(tmp_path):
    values = np.diag([1.0, 1e-3, -1e-6, 1e-9])
    write(tmp_path / "h", {"a": values})
    drawn = draw(tmp_path / "h", ["a"], 4)
    assert (drawn.high, drawn.low) == (1, 10.0**-DECADES)
    levels = drawn.levels()
    np.testing.assert_allclose(levels.diagonal(), [1, 0.5, 0, 0])
    assert np.isnan(levels[0, 1])
    write(tmp_path / "h", {"a": np.diag([2.0, 2.0])})
    np.testing.assert_array_equal(draw(tmp_path / "h", ["a"], 4).levels().diagonal(), [1, 1])


def test_what_is_not_finite_is_not_drawn(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(HessianFile, "verified", HessianFile.tensor)
    write(tmp_path / "h", {"a": symmetric(3)})
    data = bytearray((tmp_path / "h").read_bytes())
    data[-8:] = np.array([np.nan]).tobytes()
    (tmp_path / "h").write_bytes(data)
    assert "not finite" in cli("show", "h", "--heatmap").stderr


# --- in the terminal --------------------------------------------------------------------------


def drawn_lines(text: str) -> list[str]:
    """The lines between the table and the scale."""
    return text.split("\n\n")[2].splitlines()


@pytest.mark.parametrize("columns", [30, 80, 200])
@pytest.mark.parametrize("structure", ["block_diagonal", "elements"])
def test_it_fits_the_width(cli, tmp_path, monkeypatch, columns, structure):
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "encoder.layers.0.self_attention.in_proj_weight"
    blocks = {name: symmetric(120), "short": symmetric(60, 1)}
    if structure == "elements":
        blocks = {k: b.ravel() for k, b in blocks.items()}
    write(tmp_path / "h", blocks, structure)
    text = cli("show", "h", "--heatmap").stdout
    lines = drawn_lines(text)
    assert max(map(len, lines)) <= columns
    assert "short" in text
    assert re.search(r"\n[\d.e+-]+ [^\n]+ [\d.e+-]+\n\|H\|", text)


def test_control_characters_in_names_are_escaped(cli, tmp_path):
    write(tmp_path / "h", {"w\x1b[31m": symmetric(4), "b": symmetric(4)})
    for words in ((), ("--md",), ("--heatmap",), ("--block", "w\x1b[31m", "--heatmap")):
        text = cli("show", "h", *words).stdout
        assert text.count(r"w\x1b[31m") == 1 + ("--heatmap" in words)
        assert "\x1b" not in text


def test_structure_survives(cli, tmp_path, monkeypatch):
    """One large entry among zeros is seen however few cells there are."""
    monkeypatch.setenv("COLUMNS", "30")
    matrix = np.zeros((500, 500))
    matrix[3, 3] = 1.0
    write(tmp_path / "h", {"a": matrix})
    lines = drawn_lines(cli("show", "h", "--heatmap").stdout)
    assert sum(line.count("\N{FULL BLOCK}") for line in lines) == 1
    assert lines[0].startswith("\N{FULL BLOCK}")


def test_a_small_matrix_is_large_enough_to_see(cli, tmp_path):
    write(tmp_path / "h", {"a": np.diag([1.0, 1e-3])})
    lines = drawn_lines(cli("show", "h", "--heatmap").stdout)
    full, dim = "\N{FULL BLOCK}", "\N{MEDIUM SHADE}\N{DARK SHADE}\N{LIGHT SHADE}"
    assert len(lines) >= 8
    assert set(lines[0].split()[0]) == {full}
    assert set(lines[-1].strip()) <= set(dim)


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({"FORCE_COLOR": "1", "COLORTERM": "truecolor"}, "\033[38;2;254;232;56m"),
        ({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, "\033[38;5;"),
        ({"FORCE_COLOR": "1", "TERM": "xterm"}, None),
        ({"FORCE_COLOR": "1", "COLORTERM": "truecolor", "NO_COLOR": "1"}, None),
        ({"COLORTERM": "truecolor"}, None),
    ],
)
def test_colours(cli, tmp_path, monkeypatch, environment, code):
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write(tmp_path / "h", {"a": symmetric(6)})
    text = cli("show", "h", "--heatmap").stdout
    # The header of the table has a colour too, so only the picture counts.
    lines = drawn_lines(text)
    assert any(code in line for line in lines) if code else "\033" not in "".join(lines)
    assert "\033" not in cli("show", "h", "--heatmap", "--md").stdout
    assert "\033" not in cli("show", "h", "--heatmap", "--json").stdout


def test_zeros_are_blank_in_colour_too(cli, tmp_path, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "COLUMNS": "27"}.items():
        monkeypatch.setenv(name, value)
    write(tmp_path / "h", {"a": np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])})
    lines = drawn_lines(cli("show", "h", "--heatmap").stdout)[:8]  # 15 rows, two in a line
    shown = [re.sub("\033[^m]*m", "", line).partition("  a")[0].rstrip() for line in lines]
    upper, lower, last = (
        5 * "\N{UPPER HALF BLOCK}",
        5 * "\N{LOWER HALF BLOCK}",
        "\033[38;2;254;232;56m",
    )
    assert shown[:3] == [2 * upper, 2 * upper, 2 * upper + lower]
    assert shown[3:] == 2 * [3 * upper] + 3 * [5 * " " + 2 * upper]
    for line, half in ((lines[2], lower), (lines[7], upper)):
        assert f"\033[0m{last}{half}" in line  # without the background before it


@pytest.mark.parametrize("command", [("show", "h", "--heatmap"), ("density", "h")])
@pytest.mark.parametrize(
    ("environment", "plain"),
    [
        ({"LC_ALL": "C"}, True),
        ({"LC_CTYPE": "POSIX", "LANG": "C.UTF-8"}, True),
        ({"LC_ALL": "C.UTF-8", "LANG": "C"}, False),
        ({"LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}, False),
        ({}, False),
    ],
)
def test_ascii(cli, tmp_path, monkeypatch, command, environment, plain):
    """In the C locale, where Python writes UTF-8 nevertheless; unless it is told to."""
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write(tmp_path / "h", {"a": symmetric(6)})
    assert cli(*command).stdout.isascii() == plain


def test_zero(cli, tmp_path):
    write(tmp_path / "h", {"a": np.zeros((3, 3))})
    assert cli("show", "h", "--heatmap").stdout.endswith("every entry is zero\n")


@pytest.mark.parametrize("blocks", ["diag", "elements"])
def test_blocks_without_rows(cli, tmp_path, blocks):
    model = nn.Linear(2, 1)
    model.register_parameter("none", nn.Parameter(torch.zeros(0, 3)))
    data = torch.ones(3, 2), torch.ones(3, 1)
    hesscli.compute(model, data, blocks=blocks, output=tmp_path / "h.safetensors")
    for block, names in (("weight", {"weight"}), ("none", set()), (None, {"weight", "bias"})):
        one = ("--block", block) if block else ()
        ran = cli("show", "h.safetensors", *one, "--heatmap", "--plot", "h.svg")
        assert ran.code == 0, ran.stderr
        assert ("every entry is zero" in ran.stdout) == (block == "none")
        said = (tmp_path / "h.svg").read_text()
        assert {name for name in ("weight", "bias", "none") if f"<!-- {name} -->" in said} == names


def test_colours_grow_lighter():
    """So that they read the same without colour, too."""
    steps = (0, 95, 135, 175, 215, 255)
    shown = [
        [8 + 10 * (code - 232)] * 3 if code >= 232 else [steps[(code - 16) // d % 6] for d in (36, 6, 1)]
        for code in OF_256
    ]  # fmt: skip
    for colours in (CIVIDIS, shown):
        light = [0.21 * r + 0.72 * g + 0.07 * b for r, g, b in colours]
        assert all(b - a > 9 for a, b in pairwise(light))


# --- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_figures(cli, tmp_path, suffix, begins):
    write(tmp_path / "h", {"a": symmetric(6), "b$_{x": symmetric(2)})
    ran = cli("show", "h", "--plot", f"h.{suffix}", "-q")
    assert (ran.code, ran.stdout, ran.stderr) == (0, "", "")
    first = (tmp_path / f"h.{suffix}").read_bytes()
    assert first.startswith(begins)
    assert cli("show", "h", "--plot", f"h.{suffix}", "-q").code == 0  # hesscli drew it
    assert (tmp_path / f"h.{suffix}").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"h", f"h.{suffix}"}


@pytest.mark.parametrize(
    ("structure", "blocks", "curvature", "title"),
    [
        ("full", {"hessian": symmetric(3)}, "hessian", "Hessian, full, 3 rows, mse, float64"),
        ("block_diagonal", {"a": symmetric(3)}, "ggn", "matrix, block a, 3 rows, mse, float64"),
        (
            "block_diagonal",
            {"a": symmetric(3), "b": symmetric(2)},
            "empirical_fisher",
            "empirical Fisher matrix, block_diagonal, 5 rows, mse, float64",
        ),
    ],
)
def test_a_figure_says_what_the_matrix_is(cli, tmp_path, structure, blocks, curvature, title):
    import matplotlib as mpl

    parameters = {"w": (3,)} if structure == "full" else None
    write(tmp_path / "h", blocks, structure, parameters, curvature=curvature)
    with mpl.rc_context({"svg.fonttype": "none"}):
        assert cli("show", "h", "--plot", "h.svg", "-q").code == 0
    assert f"{title}</text>" in (tmp_path / "h.svg").read_text()


def test_a_figure_holds_every_name(cli, tmp_path):
    blocks = {f"layers.{i}.weight": symmetric(1 + i % 4, i) for i in range(60)}
    write(tmp_path / "h", blocks)
    # As text, to be found.
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        assert cli("show", "h", "--plot", "h.svg", "-q").code == 0
    svg = (tmp_path / "h.svg").read_text()
    assert [name for name in blocks if f">{name}</text>" not in svg] == []


def test_the_figure_of_a_density_says_how_it_was_made(cli, tmp_path):
    import matplotlib as mpl

    x = np.random.default_rng(0).standard_normal((9, 600))
    torch.jit.trace(nn.Linear(600, 1).double(), torch.from_numpy(x)).save(tmp_path / "net.pt")
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros((9, 1)))
    write(tmp_path / "h", {"a": np.diag([1.0, 2.0, 2.0, 3.0, 4.0, 7.0])})
    model = ("net.pt", "d.npz", "--steps", 7)
    fisher = "empirical Fisher matrix"
    for words, title, matrix in (
        (("h",), "6 eigenvalues (exact)", "Hessian"),
        ((*model, "--probes", 2), "601 eigenvalues (2 probes, 7 steps)", "Hessian"),
        (
            (*model, "--probes", 1, "--curvature", "fisher"),
            "601 eigenvalues (1 probe, 7 steps)",
            fisher,
        ),
    ):
        with mpl.rc_context({"svg.fonttype": "none"}):
            ran = cli("density", *words, "--plot", "d.svg")
        assert ran.code == 0, ran.stderr
        drawn = (tmp_path / "d.svg").read_text()
        assert f"{title}</text>" in drawn
        assert f"eigenvalue of the {matrix}</text>" in drawn
        assert ("share of eigenvalues in a bin of 0.05</text>" in drawn) == (words == ("h",))


def seen(monkeypatch, owner, method, look):
    """What `look` gives of the arguments of each call of a method, as the calls come."""
    found, original = [], getattr(owner, method)

    def called(*words, **named):
        found.append(look(*words, **named))
        return original(*words, **named)

    monkeypatch.setattr(owner, method, called)
    return found


def test_the_figure_of_a_density_begins_at_a_tenth_of_an_eigenvalue(tmp_path, monkeypatch):
    """As the bars of the terminal do: what is less is rounding, or chance."""
    from matplotlib.axes import Axes

    shown = seen(monkeypatch, Axes, "draw", lambda axes, drawer: axes.get_ylim())
    document = {"size": 100, "curvature": "hessian", "steps": 3}
    for least, begins in ((1e-12, 0.1 / 100 / 2), (1e-2, 1e-2 / 2)):
        density = Density(np.array([0.0, 1.0]), np.array([1 - least, least]), False, 1)
        plot_density(tmp_path / "d.png", document, density)
        assert shown[-1][0] == pytest.approx(begins)


def test_colours_that_end_before_the_smallest_entries_say_so(tmp_path, monkeypatch):
    """Six decades have colours of their own; what is below has that of the lowest."""
    from matplotlib.figure import Figure

    ends = seen(monkeypatch, Figure, "colorbar", lambda *words, **named: named["extend"])
    for least in (1e-9, 1e-3):
        shown = Picture(np.array([[1.0, least], [least, 0.0]]), (), 2, diagonal=False)
        plot_matrix(tmp_path / "h.png", shown, "")
    assert ends == ["min", "neither"]


def test_names_for_which_a_figure_has_no_room(cli, tmp_path):
    write(tmp_path / "h", {f"p{i}": symmetric(1) for i in range(200)})
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        assert cli("show", "h", "--plot", "h.svg", "-q").code == 0
    svg = (tmp_path / "h.svg").read_text()
    named = sum(f">p{i}</text>" in svg for i in range(200))
    assert 50 < named < 200
    assert f">and {200 - named} smaller</text>" in svg


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=50).map(sorted),
    st.floats(0.01, 2),
)
def test_names_do_not_overlap(centres, gap):
    places = spread(centres, gap, 100)
    assert all(b - a >= gap * 0.999 for a, b in pairwise(places))
    assert places[0] >= gap / 2 * 0.999 - 1e-9
    assert places[-1] <= 100 - gap / 2 * 0.999


def test_names_stay_where_there_is_room():
    assert spread([10, 50, 90], 2, 100) == [10, 50, 90]


def test_refused_figures(cli, tmp_path, monkeypatch):
    write(tmp_path / "h", {"a": symmetric(3)})
    ran = cli("show", "h", "--plot", "h.jpg")
    assert "a picture is .png, .svg, .pdf" in ran.fails(2)
    (tmp_path / "mine.png").write_bytes(b"\x89PNG, drawn by hand")
    assert "hesscli did not write it" in cli("show", "h", "--plot", "mine.png").fails(2)
    assert cli("show", "h", "--plot", "mine.png", "--force", "-q").code == 0
    assert "no such folder" in cli("show", "h", "--plot", "none/h.png").fails(2)
    write(tmp_path / "h.png", {"a": symmetric(3)})
    for command in ("show", "density"):
        ran = cli(command, "h.png", "--plot", "h.png", "--force")
        assert "h.png: is an input of this command" in ran.fails(2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = cli("show", "h", "--plot", "other.png")
    assert "matplotlib is not installed" in ran.fails(2)
    assert ran.hint == "pip install 'hesscli[plot]'"
