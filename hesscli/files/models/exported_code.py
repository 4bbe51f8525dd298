"""Whether loading a `.pt2` file would run code of the file's choice.

`torch.export.load` unpickles parts of the file without limits, evaluates expressions written in it,
imports modules and opens libraries that it brings up, and makes Python code of its names. So
everything of that kind is looked at first.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hesscli.files.torch_files import NeedsPickleError, load_weights_only

_PICKLES = ("serialized_state_dict.json", "serialized_constants.json")  # as old files call them
# Calls that a graph is made of. Anything else under `torch.` could be `torch.load`.
_TARGET = re.compile(
    r"torch\.ops\.\w+\.\w+(\.\w+)?|torch\.sym_\w+|_operator\.\w+|math\.\w+"
    r"|torch\._functorch\.predispatch\.(_add_batch_dim|_remove_batch_dim"  # what vmap leaves
    r"|_vmap_increment_nesting|_vmap_decrement_nesting|lazy_load_decompositions)"
)
_BITWISE = re.compile(r"torch\.ops\.aten\.__i?(and|or|xor|lshift|rshift)__\.\w+")  # attention masks
_UNSAFE_TARGET = re.compile(
    r"__|_operator\.(call|attrgetter|methodcaller)"
    r"|torch\.ops\.(aten\.(from_file|save)|debugprims)\b"  # these open files by name
)
# Names become Python code, which only with these does more than name something; and texts that do not become code, or
# that are looked at by themselves.
_UNSAFE_NAME = re.compile(r"[\"'\\()\[\]{}=,;#\x00-\x1f]")
_TEXTS = {
    *("metadata", "as_string", "as_strings"),
    *("expr_str", "guards_code", "in_spec", "out_spec", "context"),
}
_SAFE_BUILTINS = {"abs", "bool", "float", "int", "len", "max", "min", "pow", "round", "sum"}
_SAFE_ATTRIBUTES = {
    *("size", "stride", "storage_offset", "shape", "ndim", "dim", "numel", "dtype", "device"),
    *("floor", "ceil", "trunc", "sqrt", "log2", "inf"),
}
_SAFE_NODES = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop,
    ast.Compare, ast.cmpop, ast.IfExp, ast.Tuple, ast.List, ast.Load, ast.Call, ast.keyword,
    ast.Subscript, ast.Constant, ast.Name, ast.Attribute,
)  # fmt: skip


def refuse_code(path: Path) -> None:
    """Looks at every part of the file that `torch.export.load` unpickles, evaluates or imports.

    Raises:
        NeedsPickleError: one of them could run code.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            lower = name.lower()  # PyTorch's reader finds names in any case
            base = lower.rpartition("/")[2]
            if "data/aotinductor/" in lower:  # loaded too, though nothing calls it
                raise NeedsPickleError("compiled code")
            if base.startswith("opaque_obj"):
                raise NeedsPickleError("opaque object")
            if base.endswith(".pt") or base in _PICKLES:
                load_weights_only(io.BytesIO(archive.read(name)))
            if base.endswith("_config.json"):
                for pickled in _pickled_tensors(json.loads(archive.read(name))):
                    content = archive.read(name.rpartition("/")[0] + "/" + pickled)
                    load_weights_only(io.BytesIO(content))
            if "models/" in lower or base == "serialized_exported_program.json":
                _refuse_program(json.loads(archive.read(name)))


def _pickled_tensors(config: dict[str, dict[str, dict[str, object]]]) -> Iterator[str]:
    for entry in config["config"].values():
        name = str(entry["path_name"])
        # Custom objects go through TorchScript's unpickler, which knows no Python.
        if entry["use_pickle"] and not name.startswith("custom_obj"):
            yield name


def _refuse_program(program: object) -> None:
    """Looks at all names and entries of a program, however deep they lie."""
    pending = [program]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, str) and _UNSAFE_NAME.search(value):
            raise NeedsPickleError(f"name {value[:60]!r}")
        elif isinstance(value, dict):
            pending.extend(item for key, item in value.items() if key not in _TEXTS)
            for key in ("in_spec", "out_spec", "context"):
                spec = value.get(key)
                with suppress(ValueError):  # mostly JSON in JSON
                    pending.append(json.loads(spec) if isinstance(spec, str) else spec)
            _refuse_entry(value)


def _refuse_entry(entry: dict[str, Any]) -> None:
    """Looks at what one entry of a program would import, evaluate or call."""
    if "__enum__" in entry or "default_factory_module" in entry:  # of keys and of dicts
        module = entry.get("default_factory_module", entry.get("fqn"))
        raise NeedsPickleError(f"import of {str(module)[:60]}")
    expression = entry.get("expr_str")
    if isinstance(expression, str) and not _is_arithmetic(expression):
        raise NeedsPickleError(f"expression {expression[:60]!r}")
    for guard in entry.get("guards_code") or ():
        if not _is_arithmetic(str(guard), attributes=True):
            raise NeedsPickleError(f"expression {guard[:60]!r}")
    # Only nodes of the graph carry both; "target" alone names a parameter.
    target = entry.get("target") if "inputs" in entry else entry.get("as_operator")
    if isinstance(target, str) and not _is_operator(target):
        raise NeedsPickleError(f"call of {target[:60]}")


def _is_operator(target: str) -> bool:
    safe = _TARGET.fullmatch(target) and not _UNSAFE_TARGET.search(target)
    return bool(safe or _BITWISE.fullmatch(target))


def _is_arithmetic(text: str, attributes: bool = False) -> bool:
    """Whether the expression is about sizes only.

    These are sympy's, as in `Symbol('s7', integer=True)`; with `attributes` also tensors', as in
    `L['x'].size()[0] == 7`. A string may be a plain word: both are evaluated in their turn.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    words = []
    for node in ast.walk(tree):
        if not isinstance(node, _SAFE_NODES):
            return False
        if isinstance(node, ast.Attribute) and not (attributes and node.attr in _SAFE_ATTRIBUTES):
            return False
        if isinstance(node, ast.Name) and (
            node.id.startswith("__")
            or (node.id in vars(builtins) and node.id not in _SAFE_BUILTINS)
        ):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.append(node.value)
    return all(re.fullmatch(r"[\w.\-]+", word) for word in words)
