"""`hesscli eigen` against numpy."""

from __future__ import annotations

import functools
import json
import subprocess

import numpy as np
import pytest
from cases import BY_NAME, save
from conftest import read
from hessian_files import symmetric, write
from safetensors.numpy import load_file, save_file
from scipy.sparse import linalg as sparse

from hesscli.spectrum import eigen as spectrum
from hesscli.spectrum import tiles

STRUCTURES = ["diag", "module", "full", "elements"]
ORDER = {
    "largest": lambda v: np.argsort(-v, kind="stable"),
    "smallest": lambda v: np.argsort(v, kind="stable"),
    "magnitude": lambda v: np.argsort(-np.abs(v), kind="stable"),
}


@pytest.fixture
def written(cli, tmp_path):
    """Writes the Hessian of a case: its document and tensors as float64 arrays."""

    def write(blocks: str, case: str = "mlp-tanh"):
        model, data = save(BY_NAME[case], "script", tmp_path)
        ran = cli("compute", model, data, *BY_NAME[case].arguments(), "-b", blocks)
        assert ran.code == 0, ran.stderr
        document, tensors = read(tmp_path / "hessian.safetensors")
        return document, {k: v.double().numpy() for k, v in tensors.items()}

    return write


def whole(document, tensors, names=None):
    """The block-diagonal matrix, and the block that each row lies in."""
    parts, owners = [], []
    for facts in document["blocks"]:
        if names is None or facts["name"] in names:
            part = tensors[facts["name"]]
            part = np.diag(part.ravel()) if document["structure"] == "elements" else part
            parts.append(part)
            owners += [facts["name"]] * len(part)
    n = sum(len(p) for p in parts)
    matrix, at = np.zeros((n, n)), 0
    for part in parts:
        matrix[at : at + len(part), at : at + len(part)] = part
        at += len(part)
    return matrix, owners


@pytest.mark.parametrize("which", ORDER)
@pytest.mark.parametrize("blocks", STRUCTURES)
def test_eigenvalues(cli, written, blocks, which):
    document, tensors = written(blocks)
    matrix, owners = whole(document, tensors)
    truth = np.linalg.eigvalsh(matrix)
    truth = truth[ORDER[which](truth)][:5]
    ran = cli("eigen", "--top", 5, "--which", which, "--json")
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert {"schema", "eigenvalues", "residuals", "blocks", "converged"} <= set(found)
    assert found["structure"] == document["structure"]
    np.testing.assert_allclose(found["eigenvalues"], truth, rtol=1e-9, atol=1e-12)
    assert len(found["residuals"]) == len(found["blocks"]) == 5
    assert max(found["residuals"]) < 1e-12
    assert found["converged"] is True
    assert set(found["blocks"]) <= set(owners)


@pytest.mark.parametrize("blocks", STRUCTURES)
def test_eigenvectors(cli, written, tmp_path, blocks):
    document, tensors = written(blocks)
    matrix, owners = whole(document, tensors)
    ran = cli("eigen", "--top", 6, "--json", "-o", "eigen.safetensors")
    assert ran.code == 0, ran.stderr
    found = load_file(tmp_path / "eigen.safetensors")
    assert set(found) == {"eigenvalues", "eigenvectors"}
    values, vectors = found["eigenvalues"], found["eigenvectors"]
    assert values.shape == (6,)
    assert vectors.shape == (6, len(matrix))
    assert values.dtype == vectors.dtype == np.float64
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(6), atol=1e-10)
    np.testing.assert_allclose(vectors @ matrix, values[:, None] * vectors, atol=1e-12)
    metadata, _ = read(tmp_path / "eigen.safetensors")
    assert metadata["blocks"] == ran.document["blocks"]
    for vector, name in zip(vectors, metadata["blocks"], strict=True):
        assert {owners[i] for i in np.flatnonzero(vector)} == {name}


def test_one_block(cli, written):
    _, tensors = written("diag")
    truth = np.linalg.eigvalsh(tensors["0.weight"])[::-1]
    found = cli("eigen", "--block", "0.weight", "--top", 3, "--json").document
    np.testing.assert_allclose(found["eigenvalues"], truth[:3], rtol=1e-9)
    assert found["blocks"] == ["0.weight"] * 3
    assert (found["block"], found["size"]) == ("0.weight", 12)


def test_no_such_block(cli, written):
    written("diag")
    ran = cli("eigen", "--block", "weight")
    assert "0.weight" in ran.fails(2)
    assert cli(*ran.hint.split()[1:]).code == 0


def test_more_than_there_are(cli, written):
    document, _ = written("diag")
    found = cli("eigen", "--top", 1000, "--json").document
    assert len(found["eigenvalues"]) == document["total"]["size"] == 31


def test_eigenvalues_that_are_equal(cli, written):
    """Linear regression: every eigenvalue as often as there are outputs."""
    _, tensors = written("full", "linear")
    truth = np.sort(np.linalg.eigvalsh(tensors["hessian"]))[::-1]
    assert np.ptp(truth[:3]) < 1e-12
    found = cli("eigen", "--top", 7, "--json").document
    np.testing.assert_allclose(found["eigenvalues"], truth[:7], rtol=1e-9)


@pytest.mark.parametrize("which", ORDER)
@pytest.mark.parametrize("blocks", ["diag", "full"])
def test_lanczos(cli, written, monkeypatch, blocks, which):
    document, tensors = written(blocks)
    truth = np.linalg.eigvalsh(whole(document, tensors)[0])
    truth = truth[ORDER[which](truth)][:4]
    used = []
    real = spectrum._lanczos

    def lanczos(*arguments):
        used.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(spectrum, "LAPACK_LIMIT", 3)
    monkeypatch.setattr(spectrum, "_lanczos", lanczos)
    monkeypatch.setattr(tiles, "_NUMBERS", 50)  # several tiles
    ran = cli("eigen", "--top", 4, "--which", which, "--json")
    assert ran.code == 0, ran.stderr
    assert used
    np.testing.assert_allclose(ran.document["eigenvalues"], truth, rtol=1e-7, atol=1e-9)
    assert max(ran.document["residuals"]) < 1e-8


def test_lanczos_twice_gives_the_same(cli, written, tmp_path, monkeypatch):
    written("full")
    monkeypatch.setattr(spectrum, "LAPACK_LIMIT", 3)
    contents = set()
    for _ in range(12):
        assert cli("eigen", "--top", 3, "-o", "eigen.safetensors").code == 0
        contents.add((tmp_path / "eigen.safetensors").read_bytes())
    assert len(contents) == 1


def test_lanczos_that_does_not_converge(cli, written, monkeypatch):
    written("full")
    few = functools.partial(sparse.eigsh, maxiter=1)
    monkeypatch.setattr(
        sparse, "eigsh", lambda *given, **options: few(*given, **options | {"ncv": 3})
    )
    monkeypatch.setattr(spectrum, "LAPACK_LIMIT", 3)
    assert "No convergence" in cli("eigen", "--top", 1).fails(5)


def test_lanczos_of_nothing(cli, written, monkeypatch):
    """A zero block has eigenvalues too: zeros."""
    written("diag", "l1-of-linear")
    monkeypatch.setattr(spectrum, "LAPACK_LIMIT", 3)
    ran = cli("eigen", "--top", 3, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["eigenvalues"] == [0, 0, 0]


@pytest.mark.parametrize("command", ["eigen", "density"])
def test_values_that_are_not_finite(cli, tmp_path, command):
    facts = {"name": "p", "shape": [2], "size": 2}
    values = {"p": np.array([1.0, np.inf])}
    write(tmp_path / "h.safetensors", values, "elements", blocks=[facts], total={})
    assert "p: holds values that are not finite" in cli(command, "h.safetensors").fails(5)


def test_a_density_for_which_there_is_no_memory(cli, tmp_path, monkeypatch):
    write(tmp_path / "h.safetensors", {"p": symmetric(10)})
    monkeypatch.setattr("hesscli.job.eigen.available_memory", lambda: 1599)
    ran = cli("density", "h.safetensors")
    assert "p: all eigenvalues of 10 x 10 take 1.6 kB of memory" in ran.fails(6)


def test_the_table(cli, written):
    written("diag")
    ran = cli("eigen", "--top", 3)
    assert ran.code == 0
    lines = [line.split() for line in ran.stdout.splitlines()]
    header = lines.index(["#", "eigenvalue", "residual", "block"])
    values = cli("eigen", "--top", 3, "--json").document["eigenvalues"]
    rows = lines[header + 1 :]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [float(row[1]) for row in rows] == pytest.approx(values, rel=1e-5)
    assert "\x1b" not in ran.stdout
    assert cli("eigen", "-q").stdout == ""


def test_standard_input(cli, written, tmp_path):
    written("module")
    data = (tmp_path / "hessian.safetensors").read_bytes()
    direct = cli("eigen", "--json").document
    piped = cli("eigen", "-", "--json", stdin=data)
    assert piped.code == 0, piped.stderr
    assert piped.document["eigenvalues"] == direct["eigenvalues"]


def test_standard_input_a_little_longer_than_its_parts(cli, tmp_path):
    """It is copied by 64 KiB, and what is left must not stay in a buffer."""
    file, matrix, part = tmp_path / "h", symmetric(90), 1 << 16
    write(file, {"p": matrix})
    write(file, {"p": matrix}, notes=["x" * (1000 - file.stat().st_size % part + part)])
    assert 0 < file.stat().st_size % part < 4096
    piped = cli("eigen", "-", "--top", 1, "--json", stdin=file.read_bytes())
    assert piped.code == 0, piped.stderr
    assert piped.document["eigenvalues"] == pytest.approx(np.linalg.eigvalsh(matrix)[-1:])


def test_a_pipe(warm, tmp_path):
    """The card's pipe, through processes."""
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    hesscli = [warm, "-m", "hesscli"]
    compute = [*hesscli, "compute", str(model), str(data), "-l", "cross-entropy", "-o", "-"]
    with subprocess.Popen(
        compute, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as first:
        second = subprocess.run(
            [*hesscli, "eigen", "-", "--top", "3", "--json"],
            stdin=first.stdout, capture_output=True, cwd=tmp_path, check=True,
        )  # fmt: skip
        assert b"block_diagonal" in first.stderr.read()  # the table gave way to the bytes
    assert first.returncode == 0
    assert len(json.loads(second.stdout)["eigenvalues"]) == 3
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".npz", ".pt"]


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, 2), (b"", 3), (b"nothing of the kind", 3), ("foreign", 3), ("cut", 3)],
)
def test_what_is_no_hessian(cli, written, tmp_path, content, code):
    path = tmp_path / "x.safetensors"
    if content == "foreign":
        save_file({"w": np.ones((2, 2))}, path)
    elif content == "cut":
        written("full")
        path.write_bytes((tmp_path / "hessian.safetensors").read_bytes()[:-9])
    elif content is not None:
        path.write_bytes(content)
    assert "x.safetensors" in cli("eigen", path).fails(code)


def test_an_output_that_is_not_ours(cli, written, tmp_path):
    written("full")
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    assert "precious.txt" in cli("eigen", "-o", path).fails(2)
    assert path.read_text() == "precious"
    assert cli("eigen", "-o", path, "--force").code == 0
    assert set(load_file(path)) == {"eigenvalues", "eigenvectors"}


def test_the_hessian_is_not_replaced_by_its_eigenvalues(cli, written, tmp_path):
    written("full")
    before = (tmp_path / "hessian.safetensors").read_bytes()
    cli("eigen", "-o", "hessian.safetensors").fails(2)
    assert (tmp_path / "hessian.safetensors").read_bytes() == before


def test_an_eigen_file_is_no_hessian(cli, written, tmp_path):
    written("full")
    assert cli("eigen", "-o", "eigen.safetensors").code == 0
    cli("eigen", "eigen.safetensors").fails(3)


@pytest.mark.parametrize("place", ["data", "document", "end"])
def test_what_was_altered_later_is_not_believed(cli, written, tmp_path, place):
    written("diag")
    path = tmp_path / "hessian.safetensors"
    content = bytearray(path.read_bytes())
    if place == "data":
        content[-9] ^= 1
    elif place == "document":
        at = content.index(b"trace")
        digit = next(i for i in range(at, len(content)) if chr(content[i]).isdigit())
        content[digit] = ord("7") if content[digit] != ord("7") else ord("3")
    else:
        del content[-8:]
    path.write_bytes(content)
    assert str(path) in cli("eigen", path).fails(3)
