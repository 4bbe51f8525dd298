"""Results in several files with an index: any reader of that layout reads them, nothing is half there."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fill_disk, read
from interruptions import SLOW, interrupt_after
from safetensors import safe_open
from safetensors.numpy import save_file

import hesscli
from hesscli.cli.completion import block_names
from hesscli.errors import UsageError
from hesscli.files.hessians import placed_writes, result_files
from hesscli.files.hessians.result_names import index_of_shard, into_files
from hesscli.job.matrix import memory
from hesscli.job.matrix.journal import Journal

INDEX = Path("h.safetensors.index.json")
COMMAND = ("-b", "module", "--gradient", "-o", "h.safetensors", "--max-shard-size", "1.5KB")
"""Blocks of 63, 18 and 60 rows, each in a file of its own, the two that exceed the limit first; the gradient is in a
fourth."""


def result() -> dict[str, bytes]:
    """All files here whose names begin as the result's."""
    return {path.name: path.read_bytes() for path in Path().glob("h*.safetensors*")}


def left() -> list[str]:
    return sorted(path.name for path in Path().glob(".*"))


def by_hand(index: Path) -> dict[str, np.ndarray]:
    """The tensors that an index lists, as readers of models load them: by safetensors alone."""
    places = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for name in sorted(set(places.values())):
        with safe_open(index.parent / name, "np") as file:
            assert file.metadata()["format"] == "pt"
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert tensors.keys() == places.keys()
    return tensors


@pytest.fixture
def both(cli, net) -> None:
    """One Hessian in one file, `one.safetensors`, and in several, `h.safetensors.index.json`."""
    assert cli("compute", *net, *COMMAND[:3], "-o", "one.safetensors").code == 0
    assert cli("compute", *net, *COMMAND).code == 0


# Names and division


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (None, [["a", "b", "c", "d", "e"]]),
        (10, [["a"], ["b", "c", "d"], ["e"]]),
        (12, [["a", "b"], ["c", "d"], ["e"]]),
        (5, [["a"], ["b"], ["c"], ["e"], ["d"]]),
        (27, [["a", "b", "c", "d", "e"]]),
    ],
)
def test_into_files(limit, files):
    assert into_files({"a": 9, "b": 3, "c": 4, "d": 2, "e": 9}, limit) == files


@pytest.mark.parametrize("seed", range(20))
def test_files_are_divided_as_huggingface_hub_does(seed):
    hub = pytest.importorskip("huggingface_hub")
    random = np.random.default_rng(seed)
    sizes = {f"t{i}": int(size) for i, size in enumerate(random.integers(0, 50, 30))}
    limit = int(random.integers(1, 120))
    theirs = hub.split_state_dict_into_shards_factory(
        {name: SimpleNamespace(size=size) for name, size in sizes.items()},
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="h{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert into_files(sizes, limit) == list(theirs.filename_to_tensors.values())


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("h-00001-of-00003.safetensors", "h.safetensors.index.json"),
        ("a/b-c-00012-of-00345.safetensors", "a/b-c.safetensors.index.json"),
        ("h-00001-of-00003", "h.index.json"),
        ("h.safetensors", None),
        ("h-1-of-3.safetensors", None),
    ],
)
def test_the_index_of_a_shard(shard, index):
    assert index_of_shard(Path(shard)) == (index and Path(index))


# What is written


def test_any_reader_of_the_layout_reads_it(both):
    document, tensors = read(Path("one.safetensors"))
    found = by_hand(INDEX)
    assert found.keys() == document["checksums"].keys()
    for name, tensor in tensors.items():
        assert np.array_equal(found[name], tensor.numpy()), name
    metadata = json.loads(INDEX.read_text())["metadata"]
    assert metadata["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert json.loads(metadata["hesscli"]) == document
    assert sorted(result()) == [
        "h-00001-of-00004.safetensors",
        "h-00002-of-00004.safetensors",
        "h-00003-of-00004.safetensors",
        "h-00004-of-00004.safetensors",
        "h.safetensors.index.json",
    ]
    assert not left()


def test_the_library_that_defines_the_layout_reads_it(both):
    hub = pytest.importorskip("huggingface_hub")
    torch = pytest.importorskip("torch")
    tensors = read(Path("one.safetensors"))[1]
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name.replace(".", "_"), torch.zeros_like(tensor))
    module.load_state_dict = lambda state, **options: loaded.update(state)
    loaded: dict = {}
    Path("folder").mkdir()
    for name, content in result().items():
        Path("folder", name).write_bytes(content)
    hub.load_torch_model(module, "folder", filename_pattern="h{suffix}.safetensors", safe=True)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_same_command_twice(cli, net):
    assert cli("compute", *net, *COMMAND).code == 0
    first = result()
    assert cli("compute", *net, *COMMAND).code == 0
    assert result() == first


def test_what_fits_one_file_is_one(cli, net):
    ran = cli("compute", *net, *COMMAND[:5], "--max-shard-size", "5GB", "--json")
    assert ran.document["output"] == "h.safetensors"
    assert list(result()) == ["h.safetensors"]


def test_what_is_said(cli, net):
    ran = cli("compute", *net, *COMMAND, "--json")
    assert ran.document["output"] == str(INDEX)
    assert "wrote: h.safetensors.index.json (" in ran.stderr
    assert "--max-shard-size" in cli("compute", *net, "--max-shard-size", "5XB").stderr
    refused = cli("compute", *net, "--max-shard-size", "5GB", "-o", "-")
    assert "pipe" in refused.fails(2)
    assert refused.hint.endswith("-o hessian.safetensors")
    refused = cli("compute", *net, "-o", INDEX)
    assert "index" in refused.fails(2)
    assert refused.hint.endswith("-o h.safetensors")


def test_more_files_than_are_open_at_once(cli, net, small_bands, monkeypatch):
    monkeypatch.setattr(memory.Memory, "held_on", lambda self, block: None)
    command = ("compute", *net, "-b", "diag", *COMMAND[2:5], "--max-shard-size", "1")
    assert cli(*command).code == 0
    once = result()
    assert len(once) == 13
    monkeypatch.setattr(result_files, "_OPEN", 1)
    assert cli(*command).code == 0
    assert result() == once


# What is read


@pytest.mark.parametrize(
    "words",
    [
        ("eigen", "--top", 5),
        ("eigen", "--block", "2", "--top", 3),
        ("density",),
        ("show",),
        ("show", "--wide"),
        ("show", "--block", "0"),
        ("show", "--verify", "--heatmap"),
        ("show", "--json"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_commands_say_the_same_of_both_layouts(cli, both, words):
    command, *options = words
    plain = cli(command, "one.safetensors", *options)
    assert plain.code == 0, plain.stderr

    def same(text: str, name: str) -> bool:
        lines = zip(plain.stdout.splitlines(), text.splitlines(), strict=True)
        named = [(a.replace("one.safetensors", name), b) for a, b in lines]
        return all(a == b for a, b in named if " s," not in a and not a.endswith(" s"))

    for name in ("h.safetensors", str(INDEX)):
        ran = cli(command, name, *options)
        assert ran.code == 0, ran.stderr
        assert same(ran.stdout, name)
    # The default argument.
    for path in Path().glob("h[-.]*safetensors*"):
        path.rename(path.name.replace("h", "hessian", 1))
    index = Path("hessian.safetensors.index.json")
    index.write_text(index.read_text().replace('"h-', '"hessian-'))
    ran = cli(command, *options)
    assert ran.code == 0, ran.stderr
    assert same(ran.stdout, "hessian.safetensors")


def test_diff_of_both_layouts(cli, both):
    for a, b in [("one.safetensors", "h.safetensors"), (INDEX, "one.safetensors")]:
        ran = cli("diff", a, b, "--json")
        assert ran.code == 0, ran.stderr
        assert all(block["max_diff"] == 0 for block in ran.document["blocks"])


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_load(both, framework):
    plain = hesscli.load("one.safetensors", framework)
    for name in ("h.safetensors", INDEX):
        several = hesscli.load(name, framework)
        several.verify()
        assert several.path == INDEX
        assert several.metadata == plain.metadata
        assert (several.matrix() == plain.matrix()).all()
        for parameter in plain.parameters:
            assert (several.gradient(parameter) == plain.gradient(parameter)).all()


def test_compute_in_python(net, tmp_path):
    plain = hesscli.compute(*net)
    several = hesscli.compute(*net, max_shard_size=1000)
    named = hesscli.compute(*net, max_shard_size=1000, output=tmp_path / "h.safetensors")
    assert several.path.name == "hessian.safetensors.index.json"
    assert named.path == tmp_path / INDEX
    for name in plain.blocks:
        assert np.array_equal(plain.block(name), several.block(name))


def test_completion(both):
    for words in (["h.safetensors"], [str(INDEX)]):
        assert block_names(SimpleNamespace(args=words), "") == ["0", "2", "3"]


def test_one_of_the_files_is_no_hessian(cli, both):
    ran = cli("show", "h-00002-of-00004.safetensors")
    assert "a part of a Hessian (2 of 4)" in ran.fails(3)
    assert ran.hint == "hesscli show h.safetensors.index.json"
    for file in ("h-00002-of-00004.safetensors", INDEX):
        refused = cli("compute", file, "data.npz", "--arch", "mlp")
        assert "a Hessian that hesscli wrote" in refused.fails(3)
        assert refused.hint == "hesscli show h.safetensors.index.json"


@pytest.mark.parametrize("part", ["[" * 100_000, "NaN", "[]"], ids=["deep", "NaN", "list"])
def test_a_file_whose_document_is_damaged(cli, both, part):
    save_file({"w": np.ones(1)}, "h-00002-of-00004.safetensors", {"hesscli": part})
    for words in (("show", INDEX), ("eigen", INDEX), ("diff", INDEX, "one.safetensors")):
        assert "h-00002-of-00004.safetensors: does not belong to the Hessian" in cli(*words).fails(
            3
        )


# Earlier results and other files


def test_an_earlier_result_in_other_files_goes(cli, net):
    assert cli("compute", *net, *COMMAND[:5]).code == 0
    (plain,) = result().values()
    assert cli("compute", *net, *COMMAND).code == 0
    several = result()
    assert len(several) == 5  # in place of the one
    assert cli("compute", *net, *COMMAND[:-1], "1").code == 0
    assert len(result()) == 10  # in place of the four
    assert cli("compute", *net, *COMMAND).code == 0
    assert result() == several
    assert cli("compute", *net, *COMMAND[:5]).code == 0
    assert result() == {"h.safetensors": plain}


@pytest.mark.parametrize(
    "name", ["h.safetensors", "h-00001-of-00004.safetensors", "h-00001-of-00009.safetensors", INDEX]
)
@pytest.mark.parametrize("words", [COMMAND, COMMAND[:5]], ids=["several", "one"])
def test_files_of_others_stay(cli, net, name, words):
    if name == INDEX:
        INDEX.write_text('{"metadata": {"total_size": 4}, "weight_map": {"w": "h.bin"}}')
    else:
        save_file({"w": np.ones(1, np.float32)}, name)
    before = result()
    ran = cli("compute", *net, *words)
    assert f"{name}: exists" in ran.fails(2)
    assert result() == before
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert cli("show", "h.safetensors").code == 0
    after = result()
    # --force replaces what has a name of the result, and removes nothing else.
    if name == "h-00001-of-00009.safetensors" or (words != COMMAND and name != "h.safetensors"):
        assert after[str(name)] == before[str(name)]
    elif (words == COMMAND) == (name == "h.safetensors"):
        assert str(name) not in after
    else:
        assert after[str(name)] != before[str(name)]


def test_what_is_replaced_keeps_its_permissions(cli, net):
    assert cli("compute", *net, *COMMAND).code == 0
    for name in result():
        Path(name).chmod(0o600)
    assert cli("compute", *net, *COMMAND).code == 0
    assert {Path(name).stat().st_mode & 0o777 for name in result()} == {0o600}


def test_results_that_are_read_are_not_replaced(cli, net, both):
    before = result()
    assert "input" in cli("eigen", "h.safetensors", "-o", "h.safetensors").fails(2)
    assert "input" in cli("eigen", INDEX, "-o", "h.safetensors", "--force").fails(2)
    shard = "h-00001-of-00004.safetensors"
    assert "is an input" in cli("eigen", INDEX, "-o", shard).fails(2)
    assert "is a part of a Hessian" in cli("compute", *net, "-o", shard).fails(2)
    assert result() == before


def test_an_earlier_result_survives_a_failure(cli, net, small_bands, monkeypatch):
    assert cli("compute", *net, *COMMAND).code == 0
    before = result()
    interrupt_after(monkeypatch, 2, ZeroDivisionError())
    assert cli("compute", *net, *COMMAND, "--reduction", "sum").code == 70
    assert result() == before
    assert not left()


# Interruptions


@pytest.fixture
def undisturbed(cli, net, small_bands) -> dict[str, bytes]:
    assert cli("compute", *net, *COMMAND).code == 0
    found = result()
    for name in found:
        Path(name).unlink()
    return found


@pytest.mark.parametrize("mode", ["held", "streamed"])
@pytest.mark.parametrize("bands", [1, 4, 6])
def test_interrupted_and_resumed(cli, net, undisturbed, monkeypatch, mode, bands):
    if mode == "streamed":
        monkeypatch.setattr(memory.Memory, "held_on", lambda self, block: None)
    with monkeypatch.context() as patch:
        interrupt_after(patch, bands, KeyboardInterrupt())
        ran = cli("compute", *net, *COMMAND)
    assert f"{bands} of" in ran.fails(130)
    assert not result()
    assert len(left()) == 6  # four files, room for the index, the journal
    assert "interrupted run" in cli("compute", *net, *COMMAND).fails(2)
    assert "max_shard_size" in cli("compute", *net, *COMMAND[:-1], "9KB", "--resume").fails(2)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert result() == undisturbed
    assert not left()


def test_another_layout_after_an_interruption(cli, net, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt())
        cli("compute", *net, *COMMAND).fails(130)
    assert cli("compute", *net, *COMMAND[:5], "--force").code == 0
    assert list(result()) == ["h.safetensors"]
    assert not left()


def test_a_part_of_what_was_left_is_gone(cli, net, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt())
        cli("compute", *net, *COMMAND).fails(130)
    Path(".h-00003-of-00004.safetensors.partial").unlink()
    ran = cli("compute", *net, *COMMAND, "--resume")
    assert ".h-00003-of-00004.safetensors.partial: is gone" in ran.fails(3)
    assert cli("compute", *net, *COMMAND, "--force").code == 0
    assert result() == undisturbed


@pytest.mark.parametrize("moves", range(5))
@pytest.mark.parametrize("earlier", [False, True], ids=["first", "again"])
def test_interrupted_while_files_get_their_names(
    cli,
    net,
    undisturbed,
    monkeypatch,
    moves,
    earlier,
):
    """Whatever is there is one whole result or none, and the run goes on to the same bytes."""
    if earlier:
        assert cli("compute", *net, *COMMAND, "--reduction", "sum").code == 0
    real, count = os.replace, [moves]

    def replace(source, target):
        if not count[0]:
            raise KeyboardInterrupt
        count[0] -= 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(result_files.os, "replace", replace)
        ran = cli("compute", *net, *COMMAND)
    ran.fails(130)
    assert not INDEX.exists()
    assert cli("show", "h.safetensors").code == 2
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert result() == undisturbed
    assert not left()


@pytest.mark.parametrize("words", [COMMAND, COMMAND[:5]], ids=["several", "one"])
def test_what_is_written_is_on_the_disk_before_anything_tells_of_it(
    cli, net, small_bands, monkeypatch, words
):
    done = []

    def noted(name, function):
        return lambda *arguments: done.append(name) or function(*arguments)

    monkeypatch.setattr(os, "pwrite", noted("write", os.pwrite))
    monkeypatch.setattr(os, "fdatasync", noted("sync", os.fdatasync))
    monkeypatch.setattr(Journal, "append", noted("journal", Journal.append))
    assert cli("compute", *net, *words).code == 0
    before = [done[place - 1] for place, name in enumerate(done) if name == "journal"]
    assert len(before) > 3
    assert set(before) == {"sync"}
    assert done[-1] == "sync"  # of the header, or the index, before the result has its name


def test_names_are_on_the_disk_before_the_index_lists_them(cli, net, monkeypatch):
    seen = []
    monkeypatch.setattr(result_files, "sync_folder", lambda folder: seen.append(sorted(result())))
    assert cli("compute", *net, *COMMAND).code == 0
    *files, index = sorted(result())
    assert (index, seen) == (str(INDEX), [files, [*files, index]])


def test_without_links(cli, net, undisturbed, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(result_files.os, "link", link)
    assert cli("compute", *net, *COMMAND).code == 0
    assert result() == undisturbed
    assert not left()


@pytest.mark.parametrize("room", [12_000, 40_000])
def test_a_disk_that_fills_up(cli, net, undisturbed, monkeypatch, room):
    monkeypatch.setattr(memory.Memory, "held_on", lambda self, block: None)
    with monkeypatch.context() as patch:
        fill_disk(patch, room)
        ran = cli("compute", *net, *COMMAND)
    assert "No space left" in ran.fails(6)
    assert not result()
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert result() == undisturbed


def test_no_room_from_the_start(cli, net, monkeypatch):
    calls = [3]
    real = os.posix_fallocate

    def fallocate(descriptor, offset, length):
        calls[0] -= 1
        if calls[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, offset, length)

    monkeypatch.setattr(placed_writes.os, "posix_fallocate", fallocate)
    assert "No space left" in cli("compute", *net, *COMMAND).fails(6)
    assert not left()
    assert not result()


@pytest.mark.parametrize("words", [COMMAND, COMMAND[:5]], ids=["several", "one"])
def test_what_is_finished_is_kept_where_there_is_no_room_to_go_on(
    cli, net, small_bands, monkeypatch, words
):
    assert cli("compute", *net, *words).code == 0
    undisturbed = result()
    for name in undisturbed:
        Path(name).unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt())
        assert cli("compute", *net, *words).code == 130
    kept = {name: Path(name).read_bytes() for name in left()}

    def fallocate(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(placed_writes.os, "posix_fallocate", fallocate)
        assert "No space left" in cli("compute", *net, *words, "--resume").fails(6)
    assert {name: Path(name).read_bytes() for name in left()} == kept
    assert cli("compute", *net, *words, "--resume").code == 0
    assert result() == undisturbed


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(cli, warm, net, undisturbed, tmp_path, sent):
    """A process of its own, ended from outside as soon as it has finished something."""
    process = subprocess.Popen(
        [warm, "-c", SLOW, "compute", *map(str, net), *COMMAND, "-q"],
        stderr=subprocess.PIPE,
    )
    journal = Path(".h.safetensors.journal")
    deadline = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    process.communicate()
    assert not result()
    assert journal.exists()
    assert cli("compute", *net, *COMMAND, "--resume").code == 0
    assert result() == undisturbed
    assert not left()


@pytest.mark.parametrize("count", [1, 3])
def test_shares_of_the_work_are_merged(cli, net, undisturbed, count):
    """--shard divides the work, --max-shard-size the result; they do not know of each other."""
    for number in range(1, count + 1):
        ran = cli("compute", *net, *COMMAND, "--shard", f"{number}/{count}")
        assert ran.code == 0, ran.stderr
        assert not result()
    merged = cli("merge", "h.safetensors")
    assert merged.code == 0, merged.stderr
    assert "wrote: h.safetensors.index.json" in merged.stderr
    assert result() == undisturbed
    assert not left()


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def alter_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def alter_header(path: Path) -> None:
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"of', b'"oq'))
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "cut short"),
        (alter_tensor, "not what was written"),
        (alter_header, "does not belong to the Hessian"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("command", ["eigen", "density", "show --verify", "diff"])
def test_damaged_files_are_refused(cli, both, damage, said, command):
    damage(Path("h-00003-of-00004.safetensors"))
    words = command.split()
    sources = ["one.safetensors", "h.safetensors"] if command == "diff" else ["h.safetensors"]
    error = cli(words[0], *sources, *words[1:]).fails(3)
    assert said in error
    assert error.startswith("h")


def test_a_file_of_another_result_is_refused(cli, net, both):
    name = "h-00001-of-00004.safetensors"
    other = Path(name).read_bytes()
    assert cli("compute", *net, *COMMAND, "--reduction", "sum").code == 0
    Path(name).write_bytes(other)
    assert f"{name}: does not belong to the Hessian" in cli("show", "h.safetensors").fails(3)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"h-00002-of', '"../h-00002-of', "outside of its folder"),
        ('"h-00003-of', '"h-00004-of', "other tensors than are in its files"),
        ("cross-entropy", "cross-entropx", "its metadata is not what was written"),
        ('"weight_map"', '"weights"', "not the index"),
        ('"weight_map": {', '"weight_map": {"x": 3,', "not the index"),
        ('"hesscli"', '"hesscle"', "not one that hesscli wrote"),
        ("}", "", "cut short"),
    ],
)
def test_damaged_indices_are_refused(cli, both, old, new, said):
    text = INDEX.read_text()
    INDEX.write_text(text.replace(old, new))
    assert INDEX.read_text() != text
    assert said in cli("show", "h.safetensors").fails(3)


@pytest.mark.parametrize("text", ["[]", "3", '{"weight_map": []}', "{}", "[" * 100_000])
def test_what_is_no_index_is_refused(cli, tmp_path, text):
    INDEX.write_text(text)
    assert "not the index of a Hessian" in cli("show", INDEX).fails(3)


def test_no_such_file(both):
    for name in ("other.safetensors", "other.safetensors.index.json"):
        with pytest.raises(UsageError, match="no such file"):
            hesscli.load(name)
