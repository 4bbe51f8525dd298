"""`hesscli show`: the summary, one block, and what is computed on demand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from cases import BY_NAME, save
from conftest import read
from hessian_files import checksum, symmetric, write
from safetensors import safe_open
from safetensors.numpy import save_file

from hesscli.files.hessians import checksums
from hesscli.files.hessians.checksums import Checksum

STRUCTURES = ["diag", "module", "full", "elements"]


@pytest.fixture
def computed(cli, tmp_path):
    """What `compute` prints of a model, by structure."""

    def run(blocks: str, *options: str):
        model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
        done = cli("compute", model, data, *BY_NAME["mlp-tanh"].arguments(), "-b", blocks, *options)
        assert done.code == 0, done.stderr
        return done

    return run


@pytest.mark.parametrize("blocks", STRUCTURES)
def test_show_prints_what_compute_printed(cli, computed, blocks):
    before = computed(blocks).stdout.split("\n\n")
    after = cli("show")
    assert after.code == 0, after.stderr
    facts, table = after.stdout.split("\n\n")
    assert table == before[1]
    # The paths and the time are not in the file.
    first, *others = facts.splitlines()
    assert first.startswith("model    sha256:")
    kept = before[0].splitlines()[1:]
    assert others[:2] == kept[:2]
    assert kept[2].startswith(others[2])


@pytest.mark.parametrize("blocks", STRUCTURES)
def test_json_is_the_document(cli, computed, tmp_path, blocks):
    computed(blocks)
    document, _ = read(tmp_path / "hessian.safetensors")
    assert cli("show", "--json").document == document | {"hessian": "hessian.safetensors"}


def test_standard_input(cli, computed):
    written = computed("diag", "-o", "-", "-q").bytes
    ran = cli("show", "-", "--json", stdin=written)
    assert ran.document["hessian"] == "-"
    assert len(ran.document["blocks"]) > 1


@pytest.mark.parametrize("blocks", STRUCTURES)
def test_wide_against_the_spectrum(cli, computed, tmp_path, blocks):
    computed(blocks)
    document, tensors = read(tmp_path / "hessian.safetensors")
    shown = cli("show", "--wide", "--json").document
    for facts in shown["blocks"]:
        values = tensors[facts["name"]].double().numpy()
        values = np.sort(values.ravel()) if blocks == "elements" else np.linalg.eigvalsh(values)
        rounding = len(values) * np.finfo(document["dtype"]).eps * np.abs(values).max()
        assert facts["mean_eig"] == pytest.approx(values.mean(), abs=1e-12)
        assert facts["negative"] == (values < -rounding).sum()
        least = np.abs(values).min()
        if least > rounding:
            condition = np.abs(values).max() / least
            assert facts["condition"] == pytest.approx(condition, rel=1e-6)
        else:
            assert facts["condition"] is None
    total = shown["total"]
    assert total["mean_eig"] == pytest.approx(total["trace"] / total["size"])


@pytest.mark.parametrize("level", ["none", "basic", "all"])
def test_wide_computes_what_the_file_lacks(cli, computed, tmp_path, level):
    computed("diag")
    expected = cli("show", "--wide", "--json").document["blocks"]
    computed("diag", "--stats", level)
    found = cli("show", "--wide", "--json").document["blocks"]
    for a, b in zip(expected, found, strict=True):
        assert a == pytest.approx(b) if isinstance(a, float) else a == b
    plain = cli("show", "--json").document["blocks"][0]
    assert (plain["trace"] is None) == (level == "none")
    assert "condition" not in plain


def test_wide_says_what_is_too_large(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("hesscli.spectrum.statistics.QUICK_LIMIT", 3)
    write(tmp_path / "hessian.safetensors", {"small": symmetric(3), "large": symmetric(4)})
    small, large = cli("show", "--wide", "--json").document["blocks"]
    assert isinstance(small["negative"], int)
    assert (large["negative"], large["condition"]) == (None, None)
    assert large["mean_eig"] == pytest.approx(large["trace"] / 4)
    row = [line for line in cli("show", "--wide").stdout.splitlines() if line.startswith("large")]
    assert row[0].split()[-4:-1] == ["-", "-", "-"]  # negative, condition, symmetry_error


def test_signs_and_singular_blocks(cli, tmp_path):
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))
    blocks = {
        "indefinite": rotation @ np.diag([-2.0, -1e-3, 1.0, 4.0]) @ rotation.T,
        "singular": rotation @ np.diag([0.0, 1.0, 2.0, 3.0]) @ rotation.T,
        "negative": rotation @ np.diag([0.0, -1.0, -2.0, -3.0]) @ rotation.T,
        "zero": np.zeros((2, 2)),
    }
    write(tmp_path / "hessian.safetensors", {k: (b + b.T) / 2 for k, b in blocks.items()})
    found = {b["name"]: b for b in cli("show", "--wide", "--json").document["blocks"]}
    assert [found[name]["negative"] for name in blocks] == [2, 0, 3, 0]
    assert found["indefinite"]["condition"] == pytest.approx(4e3)
    assert found["singular"]["condition"] is None
    rows = [line.split() for line in cli("show", "--wide").stdout.splitlines()[-5:-1]]
    assert [row[-3] for row in rows] == ["4e+03", "inf", "inf", "inf"]


def test_one_block(cli, tmp_path):
    blocks = {"first": symmetric(3), "second": symmetric(5, seed=1)}
    write(tmp_path / "hessian.safetensors", blocks)
    document = cli("show", "--block", "second", "--json").document
    (facts,) = document["blocks"]
    assert facts["name"] == "second"
    assert document["total"]["trace"] == facts["trace"] == pytest.approx(np.trace(blocks["second"]))
    assert facts["negative"] == (np.linalg.eigvalsh(blocks["second"]) < 0).sum()
    text = cli("show", "--block", "second").stdout
    assert "block           second\n" in text
    assert f"negative        {facts['negative']}\n" in text
    assert "check_error     -" in text
    assert "first" not in text


def test_no_such_block(cli, tmp_path):
    write(tmp_path / "hessian.safetensors", {"first": symmetric(3)})
    ran = cli("show", "--block", "third")
    assert "has no block 'third'; it has: first" in ran.fails(2)
    assert ran.hint == "hesscli show --block first"


def test_markdown(cli, tmp_path):
    write(tmp_path / "hessian.safetensors", {"a|b`c": symmetric(3), "fc.weight": symmetric(2)})
    text = cli("show", "--md").stdout
    facts, table = text.split("\n\n")
    assert facts.startswith("- model: `sha256:")
    head, rule, first, second, total = table.splitlines()
    assert head.startswith("| block | shape | size | trace |")
    assert rule.split("|")[1:4] == [" --- ", " --- ", " ---: "]
    assert first.startswith(r"| `` a\|b`c `` |")
    assert second.startswith("| `fc.weight` | 2 | 2 |")
    assert total.startswith("| `total` |")
    counts = {line.replace(r"\|", "").count("|") for line in table.splitlines()}
    assert len(counts) == 1
    assert "--json and --md" in cli("show", "--md", "--json").fails(2)


def test_errors(cli, tmp_path):
    ran = cli("show")
    assert "no such file" in ran.fails(2)
    write(tmp_path / "hessian.safetensors", {"first": symmetric(40)})
    whole = (tmp_path / "hessian.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    ran = cli("show", "cut.safetensors")
    assert "cut short" in ran.fails(3)
    assert ran.hint == "compute it again, or copy the file again"
    (tmp_path / "other.safetensors").write_bytes(b"something else, and long enough")
    assert "a text file; expected a Hessian file" in cli("show", "other.safetensors").fails(3)
    for name in ("folder", "folder.index.json"):
        (tmp_path / name).mkdir()
        assert cli("show", name).fails(3) == f"{name}: not a regular file"
    (tmp_path / "other.safetensors").write_bytes(bytes(range(256)))
    assert "not a Hessian file" in cli("show", "other.safetensors").fails(3)


def test_another_format(cli, tmp_path):
    """A later one may mean something else by the same names."""
    write(tmp_path / "h", {"p": symmetric(3)}, schema="hesscli.hessian/2")
    said = "h: written in the format hesscli.hessian/2; this hesscli reads hesscli.hessian/1"
    assert cli("show", "h").fails(3) == said
    write(tmp_path / "h", {"p": symmetric(3).astype(np.float16)})
    assert cli("show", "h").fails(3) == "h: holds tensors of type F16"
    save_file({"p": symmetric(3)}, tmp_path / "h", {"hesscli": "{}"})
    assert "not one that hesscli wrote" in cli("show", "h").fails(3)


@pytest.mark.parametrize("command", [("show",), ("show", "--verify"), ("eigen",), ("density",)])
def test_a_tensor_that_is_missing(cli, computed, tmp_path, command):
    computed("diag")
    with safe_open(tmp_path / "hessian.safetensors", "np") as file:
        name, *others = file.keys()
        kept = {key: file.get_tensor(key) for key in others}
        save_file(kept, tmp_path / "less.safetensors", file.metadata())
    ran = cli(*command, "less.safetensors")
    assert f"less.safetensors: lacks the tensor {name}" in ran.fails(3)


@pytest.mark.parametrize("options", [(), ("--verify",), ("--heatmap",)])
def test_what_was_altered_is_noticed(cli, computed, tmp_path, options):
    computed("diag")
    assert cli("show", *options).code == 0
    written = bytearray((tmp_path / "hessian.safetensors").read_bytes())
    written[-3] ^= 1
    (tmp_path / "hessian.safetensors").write_bytes(written)
    assert "is not what was written" in cli("show", *options).fails(3)
    assert "is not what was written" in cli("show", "--verify", "-q").fails(3)


@pytest.mark.parametrize("options", [("show",), ("show", "--verify"), ("eigen",)])
def test_a_file_without_checksums_is_not_believed(cli, computed, tmp_path, options):
    computed("diag")
    document, tensors = read(tmp_path / "hessian.safetensors")
    del document["checksum"], document["checksums"]
    lacking = {"format": "pt", "hesscli": json.dumps(document)}
    safetensors.torch.save_file(tensors, tmp_path / "hessian.safetensors", lacking)
    assert "its metadata lacks checksums, checksum" in cli(*options).fails(3)


@pytest.mark.parametrize("tile", [1, 50, 1 << 26])
@pytest.mark.parametrize("shape", [(7, 5), (7, 2, 3), (9,), (), (0, 3)], ids=str)
def test_checksums_of_tiles(monkeypatch, tile, shape):
    monkeypatch.setattr(checksums, "_TILE", tile)
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), np.float32)
    assert str(Checksum.of(array)) == checksum(array)


def test_checksums_of_many_rows_begin_anew_at_two_to_the_64():
    rows, first = np.arange(6.0).reshape(2, 3), 1 << 40
    found = Checksum((first + 2, 3))
    found.add(rows, first)
    sums = [zlib.crc32(row.tobytes()) for row in rows]
    total = (2 * first + 1) * sums[0] + (2 * first + 3) * sums[1]
    assert total >= 1 << 64
    assert str(found) == f"{total % (1 << 64):016x}"


def test_each_tensor_is_compared_once(cli, computed, monkeypatch):
    computed("diag")
    compared: list[tuple[int, ...]] = []
    whole = Checksum.of
    monkeypatch.setattr(Checksum, "of", lambda a: compared.append(a.shape) or whole(a))
    assert cli("show", "--wide", "--heatmap", "--plot", "h.png").code == 0
    assert len(compared) == len(BY_NAME["mlp-tanh"].make().state_dict())


def test_a_large_file_is_compared_when_asked(cli, computed, tmp_path, monkeypatch):
    monkeypatch.setattr("hesscli.job.show.QUICK", 100)
    computed("diag")
    written = bytearray((tmp_path / "hessian.safetensors").read_bytes())
    written[-3] ^= 1
    (tmp_path / "hessian.safetensors").write_bytes(written)
    assert cli("show").code == 0
    assert "is not what was written" in cli("show", "--verify").fails(3)


def test_it_loads_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"first": symmetric(3)})
    code = (
        "import sys; from hesscli.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print('loaded:', sorted({'torch', 'scipy', 'matplotlib'} & sys.modules.keys()))"
    )
    for command in (
        ["show", "a.safetensors", "--wide", "--heatmap"],
        ["diff", "a.safetensors", "a.safetensors"],
        ["density", "a.safetensors"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            cwd=tmp_path, env=os.environ, capture_output=True, encoding="utf-8", timeout=60,
            check=True,
        )  # fmt: skip
        assert done.stdout.endswith("loaded: []\n")


@pytest.mark.parametrize("command", ["show", "eigen", "density"])
def test_a_document_that_is_no_json(cli, tmp_path, command):
    write(tmp_path / "h", {"p": symmetric(3)}, versions={"torch": float("inf")})
    assert "not one that hesscli wrote" in cli(command, "h").fails(3)
