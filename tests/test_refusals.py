"""Broken and hostile files: one sentence, the right exit code, nothing executed, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ran
from safetensors.torch import save_file
from torch import nn
from torch._export.serde.schema import SCHEMA_VERSION
from torch._export.serde.serialize import serialize

from hesscli.files import zip_files

X, Y = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Path("ran").absolute()),)


@pytest.fixture
def refuses(cli: Callable[..., Ran], tmp_path: Path) -> Callable[..., str]:
    """Runs `compute` beside a good model or good data; checks how it fails; gives error and hint."""

    def run(file: str, *words: str, code: int, as_data: bool = False) -> str:
        if as_data:
            torch.jit.script(nn.Linear(3, 2)).save("good.pt")
        else:
            np.savez("good.npz", x=X, y=Y)
        before = listing(tmp_path)
        names = ("good.pt", file) if as_data else (file, "good.npz")
        ran = cli("compute", *names, *words)
        assert listing(tmp_path) == before
        return f"{ran.fails(code)}\n{ran.hint}"

    return run


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every name with its size and its time of change."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
    }


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def zipped(path: str, parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def parts_of(path: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def torch_saved(content: object) -> bytes:
    torch.save(content, stream := io.BytesIO())
    return stream.getvalue()


PROGRAM = torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),))


@pytest.fixture
def old_program() -> dict[str, bytes]:
    """The parts of a program as torch.export saved it before PyTorch 2.8."""
    saved = serialize(PROGRAM)
    return {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": saved.exported_program,
        "serialized_state_dict.pt": saved.state_dict,
        "serialized_constants.pt": saved.constants,
        "serialized_example_inputs.pt": saved.example_inputs,
    }


def test_an_old_exported_program(cli, old_program):
    zipped("f.pt2", old_program)
    np.savez("d.npz", x=X, y=Y)
    assert cli("compute", "f.pt2", "d.npz", "--blocks", "full").code == 0


# --- code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("as_data", [True, False])
@pytest.mark.parametrize("where", ["w", "state_dict"])
def test_pickles_with_code(refuses, tmp_path, new, as_data, where):
    content = {where: Trap() if where == "w" else {"w": Trap()}, "x": torch.ones(2)}
    torch.save(content, tmp_path / "f.pt", _use_new_zipfile_serialization=new)
    message = refuses("f.pt", "--arch", "mlp", code=3, as_data=as_data)
    assert "f.pt: holds pickled Python objects" in message
    assert "which run code when loaded" in message
    assert not Path("ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles(refuses, tmp_path, protocol):
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(Trap(), protocol))
    refuses("f.pkl", "--arch", "mlp", code=3)
    refuses("f.pkl", code=3, as_data=True)
    assert not Path("ran").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_object_arrays(refuses, tmp_path, save):
    save(tmp_path / "f.npz", x=np.array([Trap(), Trap()], dtype=object), y=Y)
    message = refuses("f.npz", code=3, as_data=True)
    assert "array x holds Python objects, which run code when loaded" in message
    np.save(tmp_path / "f.npy", np.array([Trap()], dtype=object))
    assert "array f holds Python objects" in refuses("f.npy", code=3, as_data=True)
    assert not Path("ran").exists()


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "ran")
        return self.fc(x)


class Reader(Writer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + torch.from_file("ran", True, 2)


@pytest.mark.parametrize(("net", "operator"), [(Writer, "save"), (Reader, "from_file")])
def test_torchscript_that_opens_files(refuses, tmp_path, net, operator):
    """The interpreter knows no Python, but it does know operators that write to any path."""
    torch.jit.script(net()).save(str(tmp_path / "f.pt"))
    message = refuses("f.pt", code=3)
    assert f"f.pt: TorchScript that opens other files ({operator})" in message
    assert "--allow-pickle" in message
    assert not Path("ran").exists()


def test_exported_programs_that_open_files(refuses, tmp_path):
    torch.export.save(PROGRAM, tmp_path / "f.pt2")
    parts = parts_of("f.pt2")
    graph = next(name for name in parts if name.endswith("models/model.json"))
    changed = parts[graph].replace(
        b"torch.ops.aten.linear.default", b"torch.ops.aten.from_file.out"
    )
    assert changed != parts[graph]
    zipped(str(tmp_path / "f.pt2"), {**parts, graph: changed})
    assert "call of torch.ops.aten.from_file.out" in refuses("f.pt2", code=3)
    changed = parts[graph].replace(b'"as_tensor"', b'"as_operator": "torch.save", "as_tensor"')
    zipped(str(tmp_path / "f.pt2"), {**parts, graph: changed})
    assert "call of torch.save" in refuses("f.pt2", code=3)


@pytest.mark.parametrize("end", ["pt", "json"])
@pytest.mark.parametrize("name", ["state_dict", "constants"])
def test_pickles_with_code_in_old_exported_programs(refuses, old_program, name, end):
    zipped("f.pt2", old_program | {f"serialized_{name}.{end}": torch_saved(Trap())})
    assert "f.pt2: holds pickled Python objects" in refuses("f.pt2", code=3)
    assert not Path("ran").exists()


def test_pickles_with_code_by_names_in_capitals(refuses):
    """PyTorch's reader finds names in any case."""
    torch.export.save(PROGRAM, "f.pt2")
    parts = parts_of("f.pt2")
    inputs = next(name for name in parts if name.endswith(".pt"))
    del parts[inputs]
    zipped("f.pt2", parts | {f"{inputs[:-3]}.PT": torch_saved(Trap())})
    assert "f.pt2: holds pickled Python objects" in refuses("f.pt2", code=3)
    zipped("f.pt2", parts | {"f/data/constants/OPAQUE_OBJ_0": torch_saved(Trap())})
    assert "f.pt2: holds pickled Python objects (opaque" in refuses("f.pt2", code=3)
    torch.jit.script(Writer()).save("f.pt")
    zipped("f.pt", {name.replace(".py", ".PY"): each for name, each in parts_of("f.pt").items()})
    assert "f.pt: TorchScript that opens other files (save)" in refuses("f.pt", code=3)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("weight", 'w") or getattr(__import__("os"),"mkdir")("ran") or getattr(self,"w'),
        ("weight", "w\\"),
        ("input", "x=getattr(__import__('os'),'mkdir')('ran')"),
        ("input", "x\n"),
    ],
)
def test_exported_programs_with_code_in_names(refuses, name, instead):
    """PyTorch makes Python code of a program, with its names as they are."""
    torch.export.save(PROGRAM, "f.pt2")
    old, new = json.dumps(name).encode(), json.dumps(instead).encode()
    parts = {part: content.replace(old, new) for part, content in parts_of("f.pt2").items()}
    zipped("f.pt2", parts)
    assert f"holds pickled Python objects (name {instead[:60]!r})" in refuses("f.pt2", code=3)
    assert not Path("ran").exists()


def test_exported_programs_with_compiled_code(refuses):
    """PyTorch opens the library together with the program, and with that runs what is in it."""
    torch.export.save(PROGRAM, "f.pt2")
    metadata = b'{"AOTI_DEVICE_KEY": "cpu"}'
    library = {"model.so": b"\x7fELF", "model_metadata.json": metadata}
    parts = {f"f/data/aotinductor/model/{name}": content for name, content in library.items()}
    zipped("f.pt2", parts_of("f.pt2") | parts)
    message = refuses("f.pt2", code=3)
    assert "f.pt2: holds pickled Python objects (compiled code)" in message


@pytest.mark.parametrize(
    ("kind", "context", "said"),
    [
        ("builtins.dict", json.dumps([{"__enum__": True, "fqn": "trap:A", "name": "a"}]), "trap:A"),
        (
            "collections.defaultdict",
            {
                "default_factory_module": "trap",
                "default_factory_name": "A",
                "dict_context": json.dumps([]),
            },
            "trap",
        ),
    ],
)
@pytest.mark.parametrize("spec", ["in_spec", "out_spec"])
def test_exported_programs_that_import_modules(
    refuses, tmp_path, monkeypatch, kind, context, said, spec
):
    """What names the keys of dicts, or makes their values, is looked up by the name of its module."""
    (tmp_path / "trap.py").write_text("import os\n\nos.mkdir('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.export.save(PROGRAM, "f.pt2")
    parts = parts_of("f.pt2")
    graph = next(name for name in parts if name.endswith("models/model.json"))
    program = json.loads(parts[graph])
    inner = {"type": kind, "context": context, "children_spec": []}
    outer = {"type": "builtins.tuple", "context": "null", "children_spec": [inner]}
    program["graph_module"]["module_call_graph"][0]["signature"][spec] = json.dumps([1, outer])
    zipped("f.pt2", parts | {graph: json.dumps(program).encode()})
    assert f"f.pt2: holds pickled Python objects (import of {said})" in refuses("f.pt2", code=3)
    assert not Path("ran").exists()


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_data", [True, False])
def test_zip_bombs_are_not_unpacked(refuses, tmp_path, monkeypatch, as_data):
    """40 MB of zeros in 40 kB, for a machine with 10 MB."""
    if as_data:
        np.savez_compressed(tmp_path / "f.npz", x=np.zeros((10 << 20, 1), np.float32))
    else:
        content = {"a/data.pkl": bytes(40 << 20), "a/version": b"3"}
        zipped("f.npz", content, zipfile.ZIP_DEFLATED)
    read, unpacked = zipfile.ZipExtFile.read, []

    def counted(self, n=-1):
        unpacked.append(len(content := read(self, n)))
        return content

    monkeypatch.setattr(zip_files, "available_memory", lambda: 10 << 20)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    message = refuses("f.npz", "--arch", "mlp", code=6, as_data=as_data)
    assert "bytes that unpack to 4194" in message
    assert sum(unpacked) < 1 << 20


@pytest.mark.parametrize(
    ("fields", "words"),
    [([(16, 28), (42, 46)], "its parts claim"), ([(24, 28)], "'y.npy' claims")],
    ids=["over-each-other", "cut"],
)
def test_members_that_claim_more_than_there_is(refuses, tmp_path, fields, words):
    """The listing's second entry has the bytes of the first; or its size alone."""
    np.savez(tmp_path / "f.npz", x=np.ones((1000, 3)), y=np.ones((10, 3)))
    content = bytearray((tmp_path / "f.npz").read_bytes())
    first = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", first + 4)
    for start, stop in fields:
        content[second + start : second + stop] = content[first + start : first + stop]
    (tmp_path / "f.npz").write_bytes(content)
    assert f"f.npz: damaged: {words}" in refuses("f.npz", code=3, as_data=True)


def test_shapes_that_the_file_does_not_hold(refuses, tmp_path):
    for shape in (
        "(1000000000000, 3)",
        "(5, 3)",
        "(3, 3)",
        "(-4, -3)",
        "(18446744073709551617, 3)",
    ):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        (tmp_path / "f.npy").write_bytes(npy(header, X.tobytes()))
        message = refuses("f.npy", code=3, as_data=True)
        assert "f.npy: array f is damaged" in message or "cut off" in message
        zipped("f.npz", {"x.npy": npy(header, X.tobytes())})
        assert "array x is damaged" in refuses("f.npz", code=3, as_data=True)


def test_headers_that_are_code(refuses, tmp_path):
    for header in ("__import__('os').mkdir('ran')", "{'descr': [('a', '<f4')]}", "{" * 500, "1"):
        (tmp_path / "f.npy").write_bytes(npy(header, X.tobytes()))
        assert "f.npy: an npy array that cannot be read" in refuses("f.npy", code=3, as_data=True)
    assert not Path("ran").exists()


@pytest.mark.parametrize("as_data", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}, bytes(8)),
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**63]}}, bytes(8)),
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
        safetensors({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"w": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors(
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)
        ),
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        safetensors(b'{"w": ' + b"[" * 100_000, bytes(8)),
        safetensors({}, bytes(8), length=2**63),
        safetensors({}, bytes(8), length=101_000_000),
        safetensors(b"{" + b'"": {}, ' * 12_600_000, length=100_800_000)[:1000],
    ],
    ids=[
        *("beyond", "overflow", "backwards", "shape", "negative", "dtype", "overlap", "hole"),
        *("nested", "endless", "large", "cut"),
    ],
)
def test_safetensors(refuses, tmp_path, content, as_data):
    (tmp_path / "f").write_bytes(content)
    message = refuses("f", "--arch", "mlp", code=3, as_data=as_data)
    assert "f: a safetensors file that cannot be read" in message


def test_a_header_of_100_megabytes(refuses, tmp_path):
    (tmp_path / "f").write_bytes(
        safetensors(b'{"__metadata__":{"a":"' + b" " * 100_000_100 + b'"}}')
    )
    assert "f: a safetensors file that cannot be read" in refuses("f", "--arch", "mlp", code=3)


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../ran", "/ran", "a/../../ran", "C:\\ran", "\\ran"])
def test_archives_that_point_out_of_themselves(refuses, tmp_path, name):
    np.savez(tmp_path / "f.npz", x=X, y=Y)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "f.pt")
    torch.jit.script(nn.Linear(3, 2)).save(str(tmp_path / "s.pt"))
    for file in ("f.npz", "f.pt", "s.pt"):
        with zipfile.ZipFile(tmp_path / file, "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"x")
    assert "which points outside it" in refuses("f.npz", code=3, as_data=True)
    assert "which points outside it" in refuses("f.pt", "--arch", "mlp", code=3)
    assert "which points outside it" in refuses("s.pt", code=3)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(refuses, tmp_path):
    np.savez(tmp_path / "f.npz", x=X, y=Y)
    with zipfile.ZipFile(tmp_path / "f.npz", "a") as archive:
        archive.writestr("x.npy", archive.read("x.npy"))
    assert "holds two files called 'x.npy'" in refuses("f.npz", code=3, as_data=True)


def test_members_that_pytorch_takes_for_each_other(refuses, cli):
    """It compares the bytes of names, in any case; NumPy tells `x` from `X`."""
    torch.save(nn.Linear(3, 2).state_dict(), "f.pt")
    parts = parts_of("f.pt")
    zipped("f.pt", parts | {"F/data/0": b"x"})
    assert "holds two files called 'F/data/0'" in refuses("f.pt", "--arch", "mlp", code=3)
    zipped("f.pt", parts | {"f/\N{LATIN SMALL LETTER E WITH ACUTE}": b"x", "f/..": b"x"})
    content = Path("f.pt").read_bytes()
    Path("f.pt").write_bytes(
        content.replace(b"f/..", "f/\N{LATIN SMALL LETTER E WITH ACUTE}".encode())
    )
    assert "holds two files called" in refuses("f.pt", "--arch", "mlp", code=3)
    Path("f.pt").write_bytes(content.replace(b"f/..", b"f/\0a"))
    assert "holds a file called 'f/\\x00a'" in refuses("f.pt", "--arch", "mlp", code=3)
    torch.jit.script(nn.Linear(3, 2)).save("good.pt")
    np.savez("good.npz", x=X, X=X, y=Y)
    assert cli("compute", "good.pt", "good.npz", "--inputs", "X").code == 0


def test_an_index_that_points_out_of_its_folder(refuses, tmp_path):
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "secret.safetensors")
    (tmp_path / "net").mkdir()
    index = {"metadata": {}, "weight_map": {"weight": "../secret.safetensors"}}
    (tmp_path / "net" / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refuses("net", "--arch", "mlp", code=3)
    assert "names a file '../secret.safetensors' outside of its folder" in message


def test_control_characters_are_escaped(cli, tmp_path):
    torch.jit.script(nn.Linear(3, 2)).save("net.pt")
    np.savez("data.npz", **{"x\x1b[2J\n": X, "b\x07": X})
    ran = cli("compute", "net.pt", "data.npz")
    message = ran.fails(2)
    assert "x\\x1b[2J\\n" in message
    assert "\x1b" not in ran.stderr
    save_file({"w\x1b[31m": torch.ones(2, 3)}, "net.safetensors")
    assert "\x1b" not in cli("compute", "net.safetensors", "data.npz", "--arch", "mlp").stderr
    name = "evil\x1b]0;name\x07.pt"
    Path(name).write_bytes(b"")
    assert "\x1b" not in cli("compute", name, "data.npz").stderr


# --- what is no regular file ------------------------------------------------------------------


def test_links(cli, refuses, tmp_path):
    torch.jit.script(nn.Linear(3, 2)).save("net.pt")
    np.savez("data.npz", x=X, y=Y)
    Path("link.pt").symlink_to("net.pt")
    Path("link.npz").symlink_to(tmp_path / "data.npz")
    assert cli("compute", "link.pt", "link.npz", "-o", "h.safetensors").code == 0
    Path("h.safetensors").unlink()
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    for as_data in (True, False):
        assert "dangling: no such file" in refuses_without_hint(cli, "dangling", 2, as_data)
        assert "loop: " in refuses_without_hint(cli, "loop", 3, as_data)


def refuses_without_hint(cli: Callable[..., Ran], file: str, code: int, as_data: bool) -> str:
    names = ("net.pt", file) if as_data else (file, "data.npz")
    return cli("compute", *names).fails(code)


@pytest.mark.parametrize("as_data", [True, False])
def test_pipes_devices_and_folders(refuses, tmp_path, as_data):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    assert "pipe: not a regular file" in refuses("pipe", code=3, as_data=as_data)
    assert "/dev/zero: not a regular file" in refuses("/dev/zero", code=3, as_data=as_data)
    assert "folder: a folder" in refuses("folder", code=3, as_data=as_data)
    assert "empty: an empty file" in refuses("empty", code=3, as_data=as_data)


# --- cut off ----------------------------------------------------------------------------------


def _legacy(path: str) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=False)


WRITERS = {
    "script": lambda path: torch.jit.script(nn.Linear(3, 2)).save(path),
    "zip": lambda path: torch.save(nn.Linear(3, 2).state_dict(), path),
    "legacy": _legacy,
    "safetensors": lambda path: save_file(nn.Linear(3, 2).state_dict(), path),
    "npz": lambda path: np.savez(path, x=X, y=Y),
    "npy": lambda path: np.save(path, X),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_cut_off_anywhere(refuses, tmp_path, kind):
    as_data = kind in ("npz", "npy")
    path = tmp_path / ("f." + kind)
    WRITERS[kind](str(path))
    content = path.read_bytes()
    for part in range(1, 8):
        path.write_bytes(content[: len(content) * part // 8])
        refuses(path.name, "--arch", "mlp", code=3, as_data=as_data)
    path.write_bytes(content[:-1])
    refuses(path.name, "--arch", "mlp", code=3, as_data=as_data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,y\n1,2\n", "line 2 has 2 fields, the first line has 3"),
        ('a,b,y\n1,"2\n",3\n1,2\n', "line 4 has 2 fields, the first line has 3"),
        ("a,a,y\n1,2,3\n", "two columns are called 'a'"),
        ("a,b,y\n", "a line of names of 3 columns, and no samples"),
        ('a,b,y\n1,"2,3\n', "cannot be read"),
        ("a,b,y\none,two,three\n", "a text file; expected data"),
        ("a,b,y\n1,2," + "9" * 200_000 + "\n", "cannot be read"),
    ],
)
def test_tables(refuses, tmp_path, text, words):
    (tmp_path / "f.csv").write_text(text)
    assert words in refuses("f.csv", code=3, as_data=True)


def test_text_that_is_none(refuses, tmp_path):
    (tmp_path / "f.csv").write_bytes(b"a,b,y\n" + b"1,2,3\n" * 200 + b"1,\xff,3\n")
    assert "f.csv: a text file that cannot be read" in refuses("f.csv", code=3, as_data=True)


def test_a_folder_of_several_weights(refuses, tmp_path):
    (tmp_path / "f").mkdir()
    for name in "ab":
        save_file(nn.Linear(3, 2).state_dict(), tmp_path / "f" / f"{name}.safetensors")
    message = refuses("f", "--arch", "mlp", code=3)
    assert "f: holds a.safetensors, b.safetensors; expected one file of weights" in message


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda path: torch.save([torch.ones(2)], path), "f.bin: holds a list; expected a state"),
        (lambda path: np.save(path.open("wb"), X), "f.bin: an npy array; expected weights in"),
    ],
    ids=["list", "npy"],
)
def test_an_index_of_other_files(refuses, tmp_path, part, words):
    part(tmp_path / "f.bin")
    (tmp_path / "f.index.json").write_text(json.dumps({"weight_map": {"weight": "f.bin"}}))
    assert words in refuses("f.index.json", "--arch", "mlp", code=3)


def test_a_script_without_forward(refuses):
    class Other(nn.Module):
        @torch.jit.export
        def other(self, x: torch.Tensor) -> torch.Tensor:
            return x

    script = torch.jit.script(Other())
    script.save("f.pt")
    assert "f.pt: a TorchScript file without a forward method" in refuses("f.pt", code=3)


def test_parameters_without_memory(refuses, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside the script
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "f.pt")
    (tmp_path / "nets.py").write_text(
        "import torch\n\n\ndef make():\n    return torch.nn.Linear(3, 2, device='meta')\n"
    )
    message = refuses("f.pt", "--arch", "nets.py:make", code=2)
    assert "--arch nets.py:make: builds its parameters on the meta device" in message


@pytest.mark.parametrize("as_data", [True, False])
def test_a_pickle_that_is_none(refuses, as_data):
    zipped("f.pt", {"a/data.pkl": b"none", "a/version": b"3"})
    message = refuses("f.pt", "--arch", "mlp", code=3, as_data=as_data)
    assert "f.pt: damaged: a/data.pkl is no pickle" in message


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_storage_shorter_than_its_tensor(refuses, tmp_path, how):
    """The checksum is right: a reader that trusts the pickle reads behind the end of the memory."""
    layer = nn.Linear(3, 200)
    torch.save({"weight": layer.weight.detach()}, tmp_path / "f.pt")
    torch.jit.script(layer).save(str(tmp_path / "s.pt"))
    for file in ("f.pt", "s.pt"):
        parts = parts_of(file)
        data = next(name for name in parts if name.endswith("/data/0"))
        zipped(file, {**parts, data: parts[data][:40]}, how)
    words = "data/0 should hold 2400 bytes, 40 are there"
    assert words in refuses("f.pt", "--arch", "mlp", code=3)
    assert words in refuses("f.pt", code=3, as_data=True)
    assert words in refuses("s.pt", code=3)
    capitals = {
        name.replace("/data.pkl", "/DATA.PKL"): each for name, each in parts_of("s.pt").items()
    }
    zipped("s.pt", capitals, how)
    assert "s/DATA/0 should hold 2400 bytes, it is missing" in refuses("s.pt", code=3)
