"""`hesscli diff` against numpy."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hessian_files import document, symmetric, write
from safetensors.numpy import save_file

from hesscli.spectrum import tiles
from hesscli.spectrum.difference import difference


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Writes two files."""
    monkeypatch.chdir(tmp_path)

    def both(a, b, **changes):
        write(tmp_path / "a", a)
        write(tmp_path / "b", b, **changes)

    return both


@pytest.mark.parametrize("tile", [1, 7, 1 << 22])
@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("float32", "float64")])
def test_numbers(cli, pair, monkeypatch, tile, dtypes):
    monkeypatch.setattr(tiles, "_NUMBERS", tile)
    a = {"p": symmetric(5, dtype=dtypes[0]), "q": symmetric(3, 1, dtypes[0])}
    b = {"p": symmetric(5, 2, dtypes[1]), "q": a["q"].astype(dtypes[1])}
    pair(a, b)
    ran = cli("diff", "a", "b", "--json")
    assert ran.code == 1
    document = json.loads(ran.stdout)
    p, q = document["blocks"]
    change = b["p"].astype(float) - a["p"]
    assert p["rel_diff"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(a["p"]))
    assert p["max_diff"] == pytest.approx(np.abs(change).max())
    assert p["d_trace"] == pytest.approx(np.trace(change))
    ends = [np.linalg.eigvalsh(m.astype(float))[[0, -1]] for m in (a["p"], b["p"])]
    assert [p["d_eig_min"], p["d_eig_max"]] == pytest.approx(list(ends[1] - ends[0]))
    assert (p["equal"], q["equal"], document["equal"]) == (False, True, False)
    assert [q[key] for key in ("rel_diff", "max_diff", "d_trace")] == [0, 0, 0]


def test_equal_files(cli, pair):
    a = {"p": symmetric(5)}
    pair(a, a)
    ran = cli("diff", "a", "b")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1].split()[-1] == "yes"
    assert cli("diff", "a", "b", "-q").stdout == ""


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--rtol", "1e-3"), 0),
        (("--rtol", "1e-5", "--atol", "0"), 1),
        (("--rtol", "0", "--atol", "1e-3"), 0),
        (("--rtol", "0", "--atol", "1e-5"), 1),
    ],
)
def test_tolerances(cli, pair, options, code):
    a = np.diag([1.0, 2.0, 3.0])
    pair({"p": a}, {"p": a + np.diag([0, 0, 5e-4])})
    ran = cli("diff", "a", "b", *options)
    assert ran.code == code, ran.stderr
    if code:
        (line,) = ran.stderr.splitlines()
        assert line.startswith("error: b: 1 of 1 blocks differ, p by 1.3e-04; --rtol is ")


def test_the_verdict_names_what_differs_most(cli, pair):
    a = np.diag([3.0, 4.0])
    pair(
        {"p": a, "q": a, "r": a},
        {"p": a * 1.001, "q": a * 1.25, "r": a, "new": a},
    )
    said = "2 of 3 blocks differ, q by 2.5e-01; --rtol is 1e-05; only in b: new"
    assert cli("diff", "a", "b").stderr == f"error: b: {said}\n"


def test_what_only_one_file_has(cli, pair):
    same = symmetric(3)
    pair(
        {"same": same, "mine": symmetric(2), "grown": symmetric(2)},
        {"same": same, "theirs": symmetric(2), "grown": symmetric(4)},
    )
    ran = cli("diff", "a", "b")
    assert ran.code == 1
    assert "only in a   mine\nonly in b   theirs\nother size  grown\n" in ran.stdout
    assert "only in a: mine; only in b: theirs; other size: grown" in ran.stderr
    document = json.loads(cli("diff", "a", "b", "--json").stdout)
    assert [document[key] for key in ("only_a", "only_b", "other_size")] == [
        ["mine"],
        ["theirs"],
        ["grown"],
    ]
    assert [block["name"] for block in document["blocks"]] == ["same"]


def test_blocks_of_another_size_are_a_difference(cli, pair):
    same = symmetric(3)
    pair({"same": same, "grown": symmetric(2)}, {"same": same, "grown": symmetric(4)})
    ran = cli("diff", "a", "b", "--force")
    assert ran.code == 1
    assert ran.stderr == "error: b: other size: grown\n"


LOSS = {
    "name": "mse",
    "arguments": {},
    "reduction": "mean",
    "denominator": 6.0,
    "value": 0.5,
    "inferred": True,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": LOSS | {"name": "huber"}}, "another loss (huber, not mse)"),
        ({"loss": LOSS | {"reduction": "sum"}}, "another loss reduction (sum, not mean)"),
        ({"loss": LOSS | {"arguments": {"delta": 2}}}, "another loss arguments ({'delta': 2}"),
        ({"curvature": "ggn"}, "another curvature (ggn, not hessian)"),
    ],
)
def test_unlike_files_need_force(cli, pair, changes, said):
    a = {"p": symmetric(3)}
    pair(a, a, **changes)
    ran = cli("diff", "a", "b")
    assert said in ran.fails(2)
    assert ran.hint == "hesscli diff a b --force"
    assert cli("diff", "a", "b", "--force").code == 0


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"q": (2,), "p": (3,)}, "the same parameters in another order (q, not p) than"),
        ({"p": (3,), "r": (2,)}, "other parameters (r, not q) than"),
        ({"p": (3,)}, "other parameters (none, not q) than"),
    ],
)
def test_rows_of_other_parameters_need_force(cli, pair, parameters, said):
    whole = {"hessian": symmetric(5)}
    pair(whole, whole)
    for name, shapes in (("a", {"p": (3,), "q": (2,)}), ("b", parameters)):
        write(Path(name), whole, structure="full", parameters=shapes)
    assert said in cli("diff", "a", "b").fails(2)
    assert cli("diff", "a", "b", "--force").code == 0
    assert cli("diff", "a", "a").code == 0


def test_blocks_of_another_shape_need_force(cli, pair):
    a = {"p": symmetric(6)}
    pair(a, a, parameters={"p": (2, 3)})
    assert "another shape of p ([2, 3], not [6])" in cli("diff", "a", "b").fails(2)


def test_other_data_compare(cli, pair):
    """That is what the command is for: before and after."""
    a = {"p": symmetric(3)}
    pair(a, a, loss=LOSS | {"value": 0.1, "denominator": 12.0, "inferred": False})
    assert cli("diff", "a", "b").code == 0


def test_zero_and_nan(cli, pair):
    nan = np.array([[np.nan, 0], [0, 1]])
    zero = np.zeros((2, 2))
    pair({"p": zero, "q": zero}, {"p": zero, "q": np.eye(2)})
    p, q = json.loads(cli("diff", "a", "b", "--json").stdout)["blocks"]
    assert (p["rel_diff"], p["equal"]) == (0, True)
    assert (q["rel_diff"], q["max_diff"], q["equal"]) == (None, 1, False)
    assert difference(nan, np.eye(2)).relative != 0
    assert np.isnan(difference(nan, np.eye(2)).largest)
    assert np.isnan(difference(np.eye(2), nan).relative)


def test_elements(cli, tmp_path):
    a = {"p": np.arange(6.0).reshape(2, 3), "scale": np.array(2.0)}
    write(tmp_path / "a", a, "elements")
    write(tmp_path / "b", {"p": a["p"] + 1, "scale": a["scale"]}, "elements")
    p, scale = json.loads(cli("diff", "a", "b", "--json").stdout)["blocks"]
    assert (p["d_trace"], p["max_diff"], scale["equal"]) == (6, 1, True)


SHAPES = {"m.w": (2, 3), "n.w": (4,), "m.b": (2,)}  # m's rows are not side by side
ROWS = {"m.w": [*range(6)], "n.w": [*range(6, 10)], "m.b": [10, 11]}
ROWS |= {"m": [*ROWS["m.w"], *ROWS["m.b"]], "n": ROWS["n.w"]}


def in_structure(matrix, structure):
    """The blocks of a whole matrix."""
    if structure == "full":
        return {"hessian": matrix}
    if structure == "elements":
        return {
            name: matrix.diagonal()[ROWS[name]].reshape(shape) for name, shape in SHAPES.items()
        }
    names = ("m", "n") if structure == "module" else SHAPES
    return {name: matrix[np.ix_(ROWS[name], ROWS[name])] for name in names}


FROM_FINEST = ("elements", "block_diagonal", "module", "full")


@pytest.mark.parametrize(("fine", "coarse"), [*combinations(FROM_FINEST, 2)])
def test_of_two_structures_the_blocks_of_the_finer_compare(
    cli, tmp_path, monkeypatch, fine, coarse
):
    monkeypatch.chdir(tmp_path)
    a, b = symmetric(12), symmetric(12, 1)
    write(tmp_path / "a", in_structure(a, fine), fine, SHAPES)
    write(tmp_path / "same", in_structure(a, coarse), coarse, SHAPES)
    write(tmp_path / "b", in_structure(b, coarse), coarse, SHAPES)
    ran = cli("diff", "a", "same")
    assert f"another structure ({coarse}, not {fine})" in ran.fails(2)
    assert ran.hint == "hesscli diff a same --force"
    ran = cli("diff", "a", "same", "--force")
    assert (ran.code, ran.stderr) == (0, "")
    assert f"compared  the blocks of {fine}, which both have\n" in ran.stdout
    for words, sign in ((("a", "b"), 1), (("b", "a"), -1)):
        found = json.loads(cli("diff", *words, "--force", "--json").stdout)
        pairs = zip(in_structure(a, fine).items(), in_structure(b, fine).values(), strict=True)
        for facts, ((name, ours), theirs) in zip(found["blocks"], pairs, strict=True):
            assert (facts["name"], facts["size"], facts["equal"]) == (name, len(ROWS[name]), False)
            if sign == -1:  # of the coarser file, as `compute` writes it
                assert facts["shape"] == list(SHAPES.get(name, [len(ROWS[name])]))
            base = ours if sign == 1 else theirs
            norms = [np.linalg.norm(x.ravel()) for x in (theirs - ours, base)]
            assert facts["rel_diff"] == pytest.approx(norms[0] / norms[1])
            trace = (np.sum if fine == "elements" else np.trace)(theirs - ours)
            assert facts["d_trace"] == pytest.approx(sign * trace)
            assert facts["d_eig_max"] is None  # the coarser file says that of its own blocks alone
        assert (found["structure"], found["only_a"], found["only_b"]) == (fine, [], [])


def test_what_the_finer_structure_lacks(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = symmetric(12)
    write(tmp_path / "a", {"hessian": a}, "full", SHAPES)
    write(tmp_path / "b", {"m.w": a[:6, :6], "new": symmetric(2)})
    ran = cli("diff", "a", "b", "--force")
    assert ran.code == 1
    assert "only in a  n.w, m.b\nonly in b  new\n" in ran.stdout
    assert ran.stdout.splitlines()[-1].split()[0] == "m.w"
    assert ran.stdout.splitlines()[-1].split()[-1] == "yes"


def test_files_that_are_missing(cli, pair):
    pair({"p": symmetric(3)}, {"p": symmetric(3)})
    assert "none: no such file" in cli("diff", "a", "none").fails(2)
    assert cli("diff", "a", "b", "--rtol", "-1").code == 2


@pytest.mark.parametrize("key", ["loss", "parameters", "gradient_norm", "blocks", "curvature"])
@pytest.mark.parametrize("words", [("diff", "a", "a"), ("show", "a"), ("eigen", "a")])
def test_a_document_that_lacks_something(cli, tmp_path, words, key):
    lacking = document({"p": symmetric(3)})
    del lacking[key]
    save_file({"p": symmetric(3)}, tmp_path / "a", {"hesscli": json.dumps(lacking)})
    assert f"a: its metadata lacks {key}" in cli(*words).fails(3)
