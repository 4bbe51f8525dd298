"""TorchScript files.

TorchScript's interpreter knows no Python modules. But of PyTorch's operators some open files by name, for reading or
writing, and a model can call them when it is loaded or run.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library

from hesscli.errors import FileError
from hesscli.files.sniff import Kind
from hesscli.files.torch_files import quiet, reading
from hesscli.files.zip_files import check_storages, check_zip, read

# Every operator that takes the name of a file. As words anywhere, for there is more than one way to name an operator.
_FILES = re.compile(rb"\b(from_file|save|load_tensor)\b")

_ARITHMETIC = ("aten::add", "aten::sub", "aten::mul", "aten::div")

_LIBRARY = Library("hesscli", "DEF")
_LIBRARY.define("detach(Tensor(a) x) -> Tensor(a)")
_LIBRARY.define("detach_(Tensor(a!) x) -> Tensor(a!)")
_OURS = {
    "aten::detach": "hesscli::detach",
    "prim::data": "hesscli::detach",
    "aten::detach_": "hesscli::detach_",
}


@torch.library.impl(_LIBRARY, "detach", "CompositeImplicitAutograd")
def _detach(x: Tensor) -> Tensor:
    return x.detach()


@torch.library.impl(_LIBRARY, "detach_", "CompositeImplicitAutograd")
def _detach_(x: Tensor) -> Tensor:
    return x.detach_()


def load_torchscript(path: Path, device: torch.device, pickle_hint: str | None) -> nn.Module:
    """Reads a module onto the device; one that would open other files only if there is no hint against that.

    Raises:
        FileError: damaged, unsafe, or without a forward method.
    """
    check_zip(path)
    check_storages(path)
    if pickle_hint is not None:
        _refuse_files(path, pickle_hint)
    with reading(path, Kind.TORCHSCRIPT), quiet():
        module = torch.jit.load(path, map_location=device)
    if not hasattr(module, "forward"):
        raise FileError(
            f"{path}: a TorchScript file without a forward method",
            "save the model itself: torch.jit.script(model).save('net.pt')",
        )
    _adapt(module, device)
    return module


def is_trace(path: Path) -> bool:
    """Whether the model was traced, and so keeps the mode that it had."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("traced_inputs.pkl") for name in archive.namelist())


def _refuse_files(path: Path, hint: str) -> None:
    """Looks at all the code in the archive before any of it is run."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            is_code = member.filename.lower().endswith(".py")  # in any case, as PyTorch reads it
            code = read(archive, member) if is_code else b""
            if found := _FILES.search(code):
                raise FileError(
                    f"{path}: TorchScript that opens other files ({found[1].decode()})", hint
                )


def _adapt(module: torch.jit.ScriptModule, device: torch.device) -> None:
    """Lets a module, not yet called, make its tensors on a device, detach them in Python, and know numbers as such.

    A trace names the device of every tensor that it makes, a recurrent layer's first state for one; parameters and
    buffers alone go where the file is loaded to. And what TorchScript detaches no `TorchFunctionMode` sees.
    """
    graph = module._c._get_method("forward").graph
    torch._C._jit_pass_inline(graph)
    for node in graph.findAllNodes("prim::Constant"):
        if node.output().type().kind() == "DeviceObjType":
            node.s_("value", str(device))
    _make_numbers(graph)
    for node in (node for kind in _OURS for node in graph.findAllNodes(kind)):
        ours = graph.create(_OURS[node.kind()], list(node.inputs()), 1)
        ours.insertBefore(node)
        node.output().replaceAllUsesWith(ours.output())
        node.destroy()


def _make_numbers(graph: Any) -> None:
    """Makes numbers again of the tensors without axes that a trace keeps them as.

    As TorchScript's optimiser does (`CanonicalizeOps`), under which alone traces are right: whole numbers times one of
    float64 are of float64, which no weight of float32 meets.
    """
    for node in (node for kind in _ARITHMETIC for node in graph.findAllNodes(kind)):
        _, other, *_ = node.inputs()
        constant = other.node()
        known = constant.kind() == "prim::Constant" and other.type().kind() == "TensorType"
        if known and constant.t("value").dim() == 0:
            number = graph.insertConstant(constant.t("value").item())
            number.node().moveBefore(node)
            node.replaceInput(1, number)
