"""Mutated files of every kind: each loads as what it holds, or ends in one sentence; none ends in a traceback."""

from __future__ import annotations

import csv
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from hesscli.errors import HesscliError
from hesscli.files.data import load_data
from hesscli.files.models.model_file import load_model

X = np.arange(12, dtype=np.float32).reshape(4, 3) / 8
Y = np.array([0, 1, 1, 0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * self.scale


def saved(write: Callable[[str], object]) -> Callable[[Path], None]:
    return lambda path: write(str(path))


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _parquet(path: str) -> None:
    table = pa.table({"x": X.tolist(), "y": Y})
    pq.write_table(table, path)


def _npz(path: str, save: Callable[..., None] = np.savez) -> None:
    with open(path, "wb") as file:
        save(file, x=X, y=Y)


def _npy(path: str) -> None:
    with open(path, "wb") as file:
        np.save(file, X)


def _arrow(path: str, write: Callable[..., object] = pa.ipc.new_stream) -> None:
    table = pa.table({"x": X.tolist(), "y": Y})
    with pa.OSFile(path, "wb") as file, write(file, table.schema) as stream:
        stream.write_table(table)


def _index(path: str) -> None:
    places = dict.fromkeys(_net().state_dict(), "a.safetensors")
    Path(path).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": places}))


MODELS: dict[str, Callable[[str], object]] = {
    "script": lambda p: torch.jit.script(_net()).save(p),
    "trace": lambda p: torch.jit.trace(_net(), torch.ones(2, 3)).save(p),
    "state_dict": lambda p: torch.save(_net().state_dict(), p),
    "checkpoint": lambda p: torch.save({"epoch": 3, "model": _net().state_dict()}, p),
    "legacy": lambda p: torch.save(_net().state_dict(), p, _use_new_zipfile_serialization=False),
    "safetensors": lambda p: save_file(_net().state_dict(), p),
    "pt2": lambda p: torch.export.save(
        torch.export.export(_net(), (torch.ones(2, 3),)), io.FileIO(p, "w")
    ),
    "index": _index,
}
DATA: dict[str, Callable[[str], object]] = {
    "npz": _npz,
    "compressed": lambda p: _npz(p, np.savez_compressed),
    "npy": _npy,
    "csv": lambda p: Path(p).write_text("a,b,y\n1.5,2,0\n-3,4e1,1\n0.25,1,1\n"),
    "parquet": _parquet,
    "arrow": _arrow,
    "arrow_file": lambda p: _arrow(p, pa.ipc.new_file),
    "state": lambda p: Path(p).write_text('{"_data_files": [{"filename": "data.arrow"}]}'),
    "data_safetensors": lambda p: save_file({"x": torch.tensor(X), "y": torch.tensor(Y)}, p),
    "data_zip": lambda p: torch.save({"x": torch.tensor(X), "y": torch.tensor(Y)}, p),
}
KINDS = {**MODELS, **DATA}
# Files that lie in a folder with others: where, and what else is there.
PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "index": (
        "model.safetensors.index.json",
        lambda folder: save_file(_net().state_dict(), folder / "a.safetensors"),
    ),
    "arrow": (
        "data.arrow",
        lambda folder: (folder / "state.json").write_text(
            '{"_data_files": [{"filename": "data.arrow"}]}'
        ),
    ),
    "state": ("state.json", lambda folder: _arrow(str(folder / "data.arrow"))),
}


@cache
def original(kind: str) -> bytes:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".pt2") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KINDS[kind](file.name)
        return Path(file.name).read_bytes()


INTERESTING = [0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a few places changed, cut, doubled or overwritten."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not changed:
            break
        at = draw(st.integers(0, len(changed) - 1))
        what = draw(st.sampled_from(["flip", "byte", "cut", "end", "double", "number", "text"]))
        length = draw(st.integers(1, 16))
        if what == "flip":
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "byte":
            changed[at] = draw(st.integers(0, 255))
        elif what == "cut":
            del changed[at : at + length]
        elif what == "end":
            del changed[at:]
        elif what == "double":
            changed[at:at] = changed[at : at + length]
        elif what == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(INTERESTING)) % 256**size
            changed[at : at + size] = number.to_bytes(size, "little")
        else:
            changed[at:at] = draw(st.sampled_from([b"\0", b"\n", b'"', b"{", b"../", b"9" * 20]))
    return bytes(changed)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes, str]:
    """A kind, its bytes with changes, and the part of the archive that was changed behind its checksum."""
    kind = draw(st.sampled_from(list(KINDS)))
    content = original(kind)
    if not content.startswith(b"PK") or draw(st.booleans()):
        return kind, draw(mutations(content)), ""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    part = draw(st.sampled_from(sorted(parts)))
    if not parts[part]:
        return kind, draw(mutations(content)), ""
    parts[part] = draw(mutations(parts[part]))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, value in parts.items():
            archive.writestr(name, value)
    return kind, target.getvalue(), part


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        left, right = found[name], value
        assert left.shape == right.shape, name
        assert torch.equal(torch.nan_to_num(left.double()), torch.nan_to_num(right.double())), name


def read_safetensors(content: bytes) -> dict[str, Tensor]:
    """By the format's description."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    dtypes = {"F32": "<f4", "I64": "<i8", "F64": "<f8", "I32": "<i4", "U8": "<u1", "F16": "<f2"}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            raw = content[8 + length + start : 8 + length + stop]
            found[name] = torch.from_numpy(
                np.frombuffer(raw, dtypes[entry["dtype"]]).reshape(entry["shape"]).copy()
            )
    return found


def read_numpy(content: bytes) -> dict[str, Tensor]:
    read = np.load(io.BytesIO(content))
    arrays = dict(read) if isinstance(read, np.lib.npyio.NpzFile) else {"file": read}
    return {
        name: torch.from_numpy(np.array(a, a.dtype.newbyteorder("="))) for name, a in arrays.items()
    }


def check_model(kind: str, content: bytes, part: str, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(
            path, arch=f"{__name__}:Net" if kind not in ("script", "trace", "pt2") else None
        )
    found = {name: t.detach() for name, t in model.module.named_parameters()}
    if kind == "safetensors":
        expected = read_safetensors(content)
        same(found, {name: expected[name] for name in found})
    elif kind in ("state_dict", "checkpoint") and "/data/" in part:
        name = list(_net().state_dict())[int(part[-1])]
        stored = model.module.state_dict()[name].flatten()
        with zipfile.ZipFile(path) as archive:
            values = np.frombuffer(archive.read(part)[: stored.nbytes], np.float32)
        same({name: stored}, {name: torch.tensor(values)})
    elif not part and kind not in ("legacy", "index"):
        same(found, dict(_net().named_parameters()))  # its checksums held: it is as it was written
    event(f"{kind} loads")


def check_data(kind: str, content: bytes, path: Path) -> None:
    data = load_data(path, inputs=["file"] if kind == "npy" else ())
    if kind in ("npz", "compressed", "npy"):
        expected = read_numpy(content)
        same(data.arrays, {name: expected[name] for name in data.arrays})
    elif kind == "data_safetensors":
        expected = read_safetensors(content)
        same(data.arrays, {name: expected[name] for name in data.arrays})
    elif kind == "csv":
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
        for name, array in data.arrays.items():
            # With an entry for the first line, too, that is one of numbers, and names are places.
            if rows and name in rows[0] and len(array) == len(rows):
                numbers = [float(row[name].strip() or "nan") for row in rows]  # none is missing
                same({name: array}, {name: torch.tensor(numbers, dtype=torch.float64)})
    event(f"{kind} loads")


def run(kind: str, content: bytes, part: str, folder: Path) -> None:
    for old in folder.iterdir():
        old.unlink()
    path = folder / "file"
    if kind in PLACES:
        name, accompany = PLACES[kind]
        accompany(folder)
        (folder / name).write_bytes(content)
        path = folder if kind != "index" else folder / name
    else:
        path.write_bytes(content)
    before = sorted(folder.iterdir())
    refusal = None
    try:
        if kind in MODELS:
            check_model(kind, content, part, path)
        else:
            check_data(kind, content, path)
    except HesscliError as error:
        refusal = error
    if refusal is not None:
        assert refusal.exit_code in (2, 3, 4, 5, 6)
        assert "\n" not in refusal.message
        assert str(folder) in refusal.message
        event(f"{kind} refused")
    assert sorted(folder.iterdir()) == before


SETTINGS = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@settings(SETTINGS, max_examples=300)
@given(case=mutated())
def test_mutated_files(case: tuple[str, bytes, str], tmp_path: Path) -> None:
    run(*case, tmp_path)


@pytest.mark.long
@settings(SETTINGS, max_examples=21_000, derandomize=False, print_blob=True)
@given(case=mutated())
def test_many_mutated_files(case: tuple[str, bytes, str], tmp_path: Path) -> None:
    run(*case, tmp_path)
