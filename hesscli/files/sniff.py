"""What a file is, told from its content. Loads neither torch nor numpy."""

from __future__ import annotations

import os
import re
import shlex
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO, Literal

from hesscli.errors import FileError, UsageError

Kind = Literal[
    "torchscript",
    "exported",
    "aotinductor",
    "torch_zip",
    "torch_legacy",
    "pickle",
    "safetensors",
    "npz",
    "npy",
    "zip",
    "zip_damaged",
    "hdf5",
    "onnx",
    "gguf",
    "gzip",
    "html",
    "lfs_pointer",
    "parquet",
    "arrow",
    "weights_index",
    "json",
    "text",
    "empty",
    "transformers",
    "dataset",
    "dataset_splits",
    "npy_folder",
    "folder",
    "special",
    "unknown",
]

# With its article, to follow "net.pt: " or "expected".
DESCRIPTIONS: dict[Kind, str] = {
    "torchscript": "a TorchScript model",
    "exported": "a torch.export program",
    "aotinductor": "an AOTInductor package: compiled code, without a graph to differentiate",
    "torch_zip": "a torch.save file",
    "torch_legacy": "a torch.save file of the old format",
    "pickle": "a plain Python pickle, which torch.save did not write",
    "safetensors": "a safetensors file",
    "npz": "an npz archive",
    "npy": "an npy array",
    "zip": "a zip archive that neither PyTorch nor NumPy wrote",
    "zip_damaged": "a zip archive that is damaged or cut off",
    "hdf5": "an HDF5 file",
    "onnx": "an ONNX model",
    "gguf": "a GGUF model",
    "gzip": "a gzip file",
    "html": "an HTML page",
    "lfs_pointer": "a Git LFS pointer, not the file itself",
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "weights_index": "the index of weights in several files",
    "json": "a JSON file",
    "text": "a text file",
    "empty": "an empty file",
    "transformers": "a Hugging Face model folder",
    "dataset": "a Hugging Face datasets folder",
    "dataset_splits": "a Hugging Face datasets folder of several splits",
    "npy_folder": "a folder of npy arrays",
    "folder": "a folder",
    "special": "not a regular file",
    "unknown": "a file of unknown format",
}

COPY_AGAIN = "copy or download the file again"
"""The way out of a damaged file."""

_HEAD = 512
_LONGEST_INDEX = 1 << 24
_JSON = re.compile(rb"\s*(\{\s*[\"}]|\[\s*[\[{])")  # a table may begin with [a name]
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled


def kind_of(path: Path | str) -> Kind:
    """What the file holds. Its name plays no part. A pipe or a device is never opened.

    Raises:
        UsageError: there is no such file.
        FileError: the file may not be opened.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return _kind_of_folder(path)
        if not stat.S_ISREG(status.st_mode):
            return "special"
        if status.st_size == 0:
            return "empty"
        with open(path, "rb") as file:
            return _kind_of_content(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_such_file(path) from error
    except OSError as error:
        raise FileError(f"{path}: cannot be opened: {error.strerror or error}") from error


def no_such_file(path: Path | str, hint: str | None = None) -> UsageError:
    """What is said where there is no file."""
    if str(path) == "-":
        return UsageError("-: only show, eigen and density read standard input")
    return UsageError(f"{path}: no such file", hint)


def beside(listing: Path, name: object, hint: str) -> Path:
    """The file of this name in the folder of the file that lists it, and in no other.

    Raises:
        FileError: the name is that of a file elsewhere, or none.
    """
    if not isinstance(name, str) or Path(name).name != name:
        raise FileError(f"{listing}: names a file {name!r} outside of its folder", hint)
    return listing.parent / name


def unsupported(path: Path | str, kind: Kind, wanted: str, hint: str) -> FileError:
    """The refusal of a file of the wrong kind. A hint about the file itself goes before `hint`."""
    hints: dict[Kind, str] = {
        "lfs_pointer": f"git lfs pull --include {shlex.quote(os.path.basename(path))}",
        "zip_damaged": COPY_AGAIN,
        "html": "the download failed: fetch the file again",
    }
    return FileError(f"{path}: {DESCRIPTIONS[kind]}; expected {wanted}", hints.get(kind, hint))


def _kind_of_content(file: BinaryIO) -> Kind:
    head = file.read(_HEAD)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(file)
    if _LEGACY_MAGIC in head[:40]:
        return "torch_legacy"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head[8:10] in (b'{"', b"{}"):
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        return "lfs_pointer"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "html"
    signatures: dict[bytes, Kind] = {
        b"\x89HDF\r\n\x1a\n": "hdf5",
        b"GGUF": "gguf",
        b"PAR1": "parquet",
        b"ARROW1": "arrow",
        b"\x1f\x8b": "gzip",
        b"\x80\x02": "pickle",
        b"\x80\x03": "pickle",
        b"\x80\x04": "pickle",
        b"\x80\x05": "pickle",
    }
    for signature, kind in signatures.items():
        if head.startswith(signature):
            return kind
    # ONNX is a protobuf without a signature: field 1 (the version, a small number), then another.
    if len(head) > 2 and head[0] == 0x08 and head[1] < 0x20 and head[2] in (0x12, 0x1A, 0x3A):
        return "onnx"
    if not _is_text(head):
        return "unknown"
    if head.startswith(b"{") and b'"metadata"' in head:  # it may be long, and comes first
        head += file.read(_LONGEST_INDEX)
    if not _JSON.match(head):
        return "text"
    return "weights_index" if head.startswith(b"{") and b'"weight_map"' in head else "json"


def _kind_of_folder(path: Path | str) -> Kind:
    names = os.listdir(path)
    if "dataset_dict.json" in names:
        return "dataset_splits"
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        return "dataset"
    if any(name.endswith((".safetensors", ".index.json", ".bin")) for name in names):
        return "transformers"
    return "npy_folder" if any(name.endswith(".npy") for name in names) else "folder"


def _kind_of_zip(file: BinaryIO) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError):
        return "zip_damaged"
    # PyTorch puts everything into one folder named after the file.
    inner = {name.partition("/")[2] or name for name in names}
    if "serialized_exported_program.json" in inner:  # torch.export before 2.8
        return "exported"
    if "archive_format" in inner:
        has_graph = any(name.startswith("models/") and name.endswith(".json") for name in inner)
        return "exported" if has_graph else "aotinductor"
    if "constants.pkl" in inner:  # what torch.load itself goes by
        return "torchscript"
    if "data.pkl" in inner:
        return "torch_zip"
    if not names or any(name.endswith(".npy") for name in names):
        return "npz"
    return "zip"


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # A character cut in two by the end of what was read is no sign of a binary file.
        return error.start >= len(head) - 3 and len(head) == _HEAD
    return True
