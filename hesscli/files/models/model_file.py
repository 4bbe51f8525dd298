"""Model files of every kind, loaded into one form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from hesscli.errors import FileError, UsageError
from hesscli.files.digest import sha256_of_all
from hesscli.files.models.architectures import build
from hesscli.files.models.call_signature import CallSignature, signature_of
from hesscli.files.models.checkpoints import (
    fitted,
    saved_arguments,
    unwrap,
    versions,
    without_wrappers,
)
from hesscli.files.models.exported import load_exported
from hesscli.files.models.importing import as_main, importable, module_of
from hesscli.files.models.inert_checkpoints import weights_beside_objects
from hesscli.files.models.libraries import arch_of
from hesscli.files.models.mlp import MLP
from hesscli.files.models.shards import load_folder, load_shards
from hesscli.files.models.ties import tie, tied_groups
from hesscli.files.models.torchscript import is_trace, load_torchscript
from hesscli.files.models.weights import load_weights
from hesscli.files.safetensors_files import load_safetensors
from hesscli.files.sniff import Kind, kind_of, unsupported
from hesscli.files.torch_files import (
    NeedsPickleError,
    quiet,
    read_torch_file,
    reading,
)
from hesscli.texts import dtype_name, first_line, listed

_NO_ARGUMENTS: Mapping[str, object] = MappingProxyType({})
_CPU = torch.device("cpu")
_DATA = (Kind.NPZ, Kind.NPY, Kind.NPY_FOLDER, Kind.PARQUET, Kind.ARROW, Kind.DATASET)
Form = Literal["torchscript", "state_dict", "exported", "pickle", "module"]


@dataclass(frozen=True)
class SavedModel:
    """A model as it was saved, ready to be called."""

    module: nn.Module  # on the device; in eval mode unless train mode was asked for
    form: Form
    sha256: str
    notes: tuple[str, ...]  # what the user should know, one line each
    signature: CallSignature
    batch_sizes: tuple[int, int | None] = (1, None)  # the fewest samples it takes, and the most
    originals: tuple[nn.Parameter, ...] = ()  # of a module in memory that it is a copy of

    def __str__(self) -> str:
        return type(self.module).__name__


def load_model(
    path: Path,
    *,
    arch: str | None = None,
    arch_arguments: Mapping[str, object] = _NO_ARGUMENTS,
    allow_pickle: bool = False,
    train_mode: bool = False,
    device: torch.device = _CPU,
) -> SavedModel:
    """Loads a model file, told by its content: TorchScript, state dict, `.pt2` or pickled module.

    Parameters keep their names and their `requires_grad`. Weights narrower than float32 are
    widened to it.

    Args:
        arch: what the weights of a state dict belong to; see `architectures.build`.
        allow_pickle: whether the file may run code of its own when loaded.

    Raises:
        UsageError: no such file, or an architecture that cannot be built.
        FileError: damaged, unsupported, or unsafe without `allow_pickle`.
        MismatchError: the weights do not fit the architecture.
    """
    kind, notes = kind_of(path), list[str]()
    pickle_hint = None if allow_pickle else "--allow-pickle"
    files: tuple[Path, ...] = (path,)
    signature: CallSignature | None = None
    batch_sizes: tuple[int, int | None] = (1, None)
    form: Form
    told = False  # whether `arch` said where the file's classes are
    if kind is Kind.TORCHSCRIPT:
        module, form = load_torchscript(path, device, pickle_hint), "torchscript"
        if train_mode and is_trace(path):
            notes.append("train mode has no effect: a traced model keeps the mode it had")
    elif kind is Kind.EXPORTED:
        module, signature, batch_sizes = load_exported(path, device, pickle_hint)
        form = "exported"
        if train_mode:
            notes.append("train mode has no effect: an exported model keeps the mode it had")
    else:
        found, files, told = _content(path, kind, pickle_hint, arch, notes)
        content = unwrap(found, notes)
        if isinstance(content, nn.Module):
            tie(content, tied_groups(content.named_parameters()))
            module, form = content, "pickle"
        else:
            saved = saved_arguments(found)
            module = _with_architecture(path, content, arch, arch_arguments, saved, notes)
            form = "state_dict"
    if told:
        notes.append(f"classes of the script that saved {path.name}: those of --arch {arch}")
    idle = "--arch-arg" if arch_arguments else ""
    if arch is not None and not told:
        idle = f"--arch {arch}"
    if form != "state_dict" and idle:
        notes.append(f"{idle} has no effect: {path} holds its own architecture")
    if next(module.parameters(), None) is None:
        raise without_parameters(path, form)
    prepare(module, notes)
    module.to(device)
    if form != "exported":
        module.train(train_mode)
    signature = signature or signature_of(module)
    return SavedModel(module, form, sha256_of_all(files), tuple(notes), signature, batch_sizes)


def _content(
    path: Path, kind: Kind, pickle_hint: str | None, arch: str | None, notes: list[str]
) -> tuple[object, tuple[Path, ...], bool]:
    """What weights, or a module, were saved as; the files that were read; whether their classes are where `arch` is."""
    if kind is Kind.TRANSFORMERS:
        return *load_folder(path), False
    if kind is Kind.WEIGHTS_INDEX:
        return *load_shards(path), False
    if kind is Kind.SAFETENSORS:
        return load_safetensors(path), (path,), False
    if kind not in (Kind.TORCH_ZIP, Kind.TORCH_LEGACY):
        wanted = "a TorchScript, state dict, safetensors or .pt2 model"
        raise unsupported(path, kind, wanted, _hint(path, kind))
    try:
        return read_torch_file(path, kind, None), (path,), False
    except NeedsPickleError as error:
        name = str(error)
    if pickle_hint is None:
        content, told = _unpickle(path, kind, arch)
        return content, (path,), told
    found = weights_beside_objects(path, kind, name)
    if found is None:
        return (
            read_torch_file(path, kind, pickle_hint),
            (path,),
            False,
        )  # which says what it refuses
    content, note = found
    notes.append(note)
    return content, (path,), False


def _hint(path: Path, kind: Kind) -> str:
    if kind in _DATA or path.suffix in (".csv", ".tsv"):
        return "the model comes first: hesscli compute MODEL DATA"
    if kind is Kind.ONNX:  # its converters do not keep up with it, and lose the parameters' names
        return "export it as .pt2: torch.export.save(torch.export.export(model, (x,)), 'net.pt2')"
    return "torch.jit.script(model).save('net.pt'), or save model.state_dict()"


def _unpickle(path: Path, kind: Kind, arch: str | None) -> tuple[object, bool]:
    """What the file holds, loaded by running what code it brings; and whether its classes are where `arch` is.

    A script that was run saves them as those of `__main__`: they are looked for there then.
    """
    load = partial(torch.load, path, map_location="cpu", weights_only=False)
    told = False
    with reading(path, kind), quiet(), importable(), _classes_importable(path):
        try:
            content = load()
        except AttributeError as error:
            missing = re.search(r"attribute '(\w+)' on <module '[\w.]*__main__'", str(error))
            if missing is None:
                raise
            if arch is None or ":" not in arch:
                raise FileError(
                    f"{path}: its class {missing[1]} is of the script that saved it",
                    f"--arch FILE.py:{missing[1]}",
                ) from error
            with as_main(module_of("--arch", arch)):
                content = load()
            told = True
    if not isinstance(content, (nn.Module, Mapping)):
        raise FileError(
            f"{path}: holds a {type(content).__name__}; expected an nn.Module or a state dict",
            "torch.save(model.state_dict(), 'net.pt')",
        )
    return content, told


@contextmanager
def _classes_importable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise FileError(
            f"{path}: its classes cannot be imported: {first_line(error)}",
            "run hesscli in the folder of the code, or save model.state_dict() and "
            "name the class: --arch FILE.py:CLASS",
        ) from error


def _with_architecture(
    path: Path,
    content: object,
    arch: str | None,
    arch_arguments: Mapping[str, object],
    saved: tuple[Mapping[str, object], str],
    notes: list[str],
) -> nn.Module:
    weights = _state_dict(path, content)
    if arch is None:
        named = Path(path, "config.json").is_file()
        hint = arch_of(path) if named else "--arch mypkg.nets:make_mlp"
        raise FileError(f"{path}: a state dict holds weights but no architecture", hint)
    if arch == "mlp":
        weights = without_wrappers(weights, notes)
    module = build(arch, arch_arguments, weights, path, *saved, notes.append)
    if any(p.is_meta for p in module.parameters()):
        raise UsageError(
            f"--arch {arch}: builds its parameters on the meta device, without memory",
            "build the module on the CPU",
        )
    if isinstance(module, MLP):
        notes.append(f"mlp: {module}, in this order")
    narrow = _narrow(weights.values())
    weights = fitted(path, module, weights, notes)
    others = content if isinstance(content, Mapping) else {}
    load_weights(path, module, weights, others, versions(content, weights))
    if narrow:
        notes.append(_narrow_note(narrow))
    return module


def _state_dict(path: Path, content: object) -> dict[str, torch.Tensor]:
    hint = "torch.save(model.state_dict(), 'net.pt')"
    if not isinstance(content, Mapping):
        raise FileError(f"{path}: holds a {type(content).__name__}; expected a state dict", hint)
    weights = {str(key): t for key, t in content.items() if isinstance(t, torch.Tensor)}
    if not weights:
        entries = listed(f"{key} ({type(each).__name__})" for key, each in content.items())
        what = f"it holds {entries}" if entries else "it is empty"
        raise FileError(f"{path}: no weights at its top level; {what}", hint)
    if _of_adapter_alone(weights):
        raise FileError(
            f"{path}: an adapter's weights (PEFT) without those of the model that it adapts",
            "model.merge_and_unload().save_pretrained('folder')",
        )
    nested = [name for name, t in weights.items() if t.is_nested]
    if nested:  # they have no shape
        raise FileError(f"{path}: {nested[0]} is a nested tensor; expected a dense one", hint)
    return weights


def _of_adapter_alone(names: Iterable[str]) -> bool:
    """Whether they are those that PEFT's `save_pretrained` gives LoRA's factors; the whole has `base_layer` too."""
    factors = any(".lora_A." in name for name in names)
    return factors and all(
        name.startswith("base_model.") and ".base_layer." not in name for name in names
    )


def _narrow(tensors: Iterable[torch.Tensor]) -> set[torch.dtype]:
    return {t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize < 4}


def prepare(module: nn.Module, notes: list[str]) -> None:
    """Widens float16 and bfloat16, which have too few digits for second derivatives."""
    narrow = _narrow(module.parameters())
    if not narrow and not _narrow(module.buffers()):
        return
    # To the widest that is there, so that nothing else is rounded.
    wide = any(p.dtype is torch.float64 for p in module.parameters())
    widest = torch.float64 if wide else torch.float32
    module._apply(lambda t: t.to(widest) if t.is_floating_point() else t)
    if narrow:
        notes.append(_narrow_note(narrow))


def _narrow_note(narrow: set[torch.dtype]) -> str:
    return f"weights stored in {' and '.join(sorted(map(dtype_name, narrow)))}, and widened"


def without_parameters(path: Path | str, form: Form) -> FileError:
    if form == "torchscript":
        return FileError(
            f"{path}: a TorchScript model without parameters; frozen and quantised models "
            "hold their weights as constants",
            "save it before torch.jit.freeze or quantising: torch.jit.script(model).save('net.pt')",
        )
    return FileError(
        f"{path}: a model without parameters has no Hessian; quantised models hold their weights as integers",
        "save it as it was before it was quantised, or register its weights as torch.nn.Parameter",
    )
