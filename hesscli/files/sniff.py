"""What a file is, told from its content. Loads neither torch nor numpy."""

from __future__ import annotations

import os
import re
import shlex
import stat
import zipfile
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from hesscli.errors import FileError, UsageError


class Kind(Enum):
    """What a file may be, with its article, to follow "net.pt: " or "expected"."""

    TORCHSCRIPT = "a TorchScript model"
    EXPORTED = "a torch.export program"
    AOTINDUCTOR = "an AOTInductor package: compiled code, without a graph to differentiate"
    TORCH_ZIP = "a torch.save file"
    TORCH_LEGACY = "a torch.save file of the old format"
    PICKLE = "a plain Python pickle, which torch.save did not write"
    SAFETENSORS = "a safetensors file"
    NPZ = "an npz archive"
    NPY = "an npy array"
    ZIP = "a zip archive that neither PyTorch nor NumPy wrote"
    ZIP_DAMAGED = "a zip archive that is damaged or cut off"
    HDF5 = "an HDF5 file"
    ONNX = "an ONNX model"
    GGUF = "a GGUF model"
    GZIP = "a gzip file"
    UTF16 = "a text file in UTF-16"
    HTML = "an HTML page"
    LFS_POINTER = "a Git LFS pointer, not the file itself"
    PARQUET = "a Parquet file"
    ARROW = "an Arrow file"
    WEIGHTS_INDEX = "the index of weights in several files"
    JSON = "a JSON file"
    TEXT = "a text file"
    EMPTY = "an empty file"
    TRANSFORMERS = "a Hugging Face model folder"
    DATASET = "a Hugging Face datasets folder"
    DATASET_SPLITS = "a Hugging Face datasets folder of several splits"
    NPY_FOLDER = "a folder of npy arrays"
    FOLDER = "a folder"
    SPECIAL = "not a regular file"
    UNKNOWN = "a file of unknown format"


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
            return Kind.SPECIAL
        if status.st_size == 0:
            return Kind.EMPTY
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


def file_beside(listing: Path, name: object, hint: str) -> Path:
    """The file of this name in the folder of the file that lists it; FileError where the name leads elsewhere."""
    if not isinstance(name, str) or Path(name).name != name:
        raise FileError(f"{listing}: names a file {name!r} outside of its folder", hint)
    return listing.parent / name


def unsupported(path: Path | str, kind: Kind, wanted: str, hint: str) -> FileError:
    """The refusal of a file of the wrong kind. A hint about the file itself goes before `hint`."""
    name, plain, utf8 = (shlex.quote(f"{path}{end}") for end in ("", ".unpacked", ".utf8"))
    hints: dict[Kind, str] = {
        Kind.LFS_POINTER: f"git lfs pull --include {shlex.quote(os.path.basename(path))}",
        Kind.ZIP_DAMAGED: COPY_AGAIN,
        Kind.HTML: "the download failed: fetch the file again",
        Kind.GZIP: f"gunzip < {name} > {plain}",
        Kind.UTF16: f"iconv -f UTF-16 -t UTF-8 {name} > {utf8}",
    }
    return FileError(f"{path}: {kind.value}; expected {wanted}", hints.get(kind, hint))


def _kind_of_content(file: BinaryIO) -> Kind:
    head = file.read(_HEAD)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(file)
    if _LEGACY_MAGIC in head[:40]:
        return Kind.TORCH_LEGACY
    if head.startswith(b"\x93NUMPY"):
        return Kind.NPY
    if head[8:10] in (b'{"', b"{}"):
        return Kind.SAFETENSORS
    if head.startswith(b"version https://git-lfs"):
        return Kind.LFS_POINTER
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return Kind.HTML
    signatures: dict[bytes, Kind] = {
        b"\x89HDF\r\n\x1a\n": Kind.HDF5,
        b"GGUF": Kind.GGUF,
        b"PAR1": Kind.PARQUET,
        b"ARROW1": Kind.ARROW,
        b"\xff\xff\xff\xff": Kind.ARROW,  # a stream
        b"\x1f\x8b": Kind.GZIP,
        b"\xff\xfe": Kind.UTF16,
        b"\xfe\xff": Kind.UTF16,
        **{bytes((0x80, protocol)): Kind.PICKLE for protocol in (2, 3, 4, 5)},
    }
    for signature, kind in signatures.items():
        if head.startswith(signature):
            return kind
    # ONNX is a protobuf without a signature: field 1 (the version, a small number), then another.
    if len(head) > 2 and head[0] == 0x08 and head[1] < 0x20 and head[2] in (0x12, 0x1A, 0x3A):
        return Kind.ONNX
    if not _is_text(head):
        return Kind.UNKNOWN
    if head.startswith(b"{") and b'"metadata"' in head:  # it may be long, and comes first
        head += file.read(_LONGEST_INDEX)
    if not _JSON.match(head):
        return Kind.TEXT
    return Kind.WEIGHTS_INDEX if head.startswith(b"{") and b'"weight_map"' in head else Kind.JSON


def _kind_of_folder(path: Path | str) -> Kind:
    names = os.listdir(path)
    if "dataset_dict.json" in names:
        return Kind.DATASET_SPLITS
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        return Kind.DATASET
    if any(name.endswith((".safetensors", ".index.json", ".bin")) for name in names):
        return Kind.TRANSFORMERS
    return Kind.NPY_FOLDER if any(name.endswith(".npy") for name in names) else Kind.FOLDER


def _kind_of_zip(file: BinaryIO) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError):
        return Kind.ZIP_DAMAGED
    # PyTorch puts everything into one folder named after the file.
    inner = {name.partition("/")[2] or name for name in names}
    if "serialized_exported_program.json" in inner:  # torch.export before 2.8
        return Kind.EXPORTED
    if "archive_format" in inner:
        has_graph = any(name.startswith("models/") and name.endswith(".json") for name in inner)
        return Kind.EXPORTED if has_graph else Kind.AOTINDUCTOR
    if "constants.pkl" in inner:  # what torch.load itself goes by
        return Kind.TORCHSCRIPT
    if "data.pkl" in inner:
        return Kind.TORCH_ZIP
    if not names or any(name.endswith(".npy") for name in names):
        return Kind.NPZ
    return Kind.ZIP


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # A character cut in two by the end of what was read is no sign of a binary file.
        return error.start >= len(head) - 3 and len(head) == _HEAD
    return True
