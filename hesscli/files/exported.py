"""Programs saved by `torch.export.save`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from hesscli.errors import FileError
from hesscli.files.exported_code import refuse_code
from hesscli.files.ties import shared, tie
from hesscli.files.torch_files import NeedsPickleError, pickled_objects, quiet, reading


def _copied(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten::copy`, which has no derivative."""
    return source.to(to).expand_as(to).clone()


_LOOSE = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.detach.default: torch.detach,
    torch.ops.aten.copy.default: _copied,
}


@dataclass(frozen=True)
class Exported:
    """A program as a module, and what its signature tells."""

    module: nn.Module
    inputs: int
    arguments: tuple[str, ...]  # what the graph calls its inputs
    keywords: tuple[str, ...]  # the inputs that are passed by name
    batch_size: int | None  # the only one it accepts; None if it accepts any


def load_exported(
    path: str | os.PathLike[str], device: torch.device, pickle_hint: str | None
) -> Exported:
    """Reads a program, moves it to the device and ties again what was tied when it was saved.

    Args:
        path: the file.
        device: where parameters and constants go.
        pickle_hint: the hint when the file would run code; None to let it.

    Raises:
        FileError: damaged, of another version, or with inputs that are no tensors.
    """
    with reading(path, "exported"):
        if pickle_hint is not None:
            try:
                refuse_code(path)
            except NeedsPickleError as error:
                raise pickled_objects(path, error.name, pickle_hint) from error
        # As an open file: torch.export.load warns about paths that do not end in .pt2.
        with quiet(), open(path, "rb") as file:
            program = torch.export.load(file)
            groups = shared(program.named_parameters())
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            module = program.module()
        _loosen(module)
        tie(module, groups)
        positional, keywords = program.call_spec.in_spec.children()
    names = tuple(str(name) for name in keywords.context or ())
    inputs = tuple(program.graph_signature.user_inputs)
    constant = [n for n, given in zip(names, inputs[-len(names) :], strict=False) if n != given]
    if constant:
        raise FileError(
            f"{path}: exported with inputs that are no tensors ({', '.join(constant)}), which no "
            "data file holds",
            "pass tensors alone: torch.export.export(model, (x, mask))",
        )
    for part in module.modules():
        # `.eval()` raises on these modules: the mode is part of the graph. The flag may still be read.
        part.training = False
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.requires_grad:  # a parameter's memory, which is moved
                part._buffers[name] = buffer.detach().clone()
    arguments = tuple(str(name) for name in inputs)
    return Exported(module, positional.num_children, arguments, names, _batch_size(program))


def _loosen(module: nn.Module) -> None:
    """Lets the graph run in another dtype and on another device than those it was exported with.

    What asserts the dtype of a tensor goes; and every view may be a copy, as the operators of another device lay their
    results out in other ways. What it detaches is detached in Python, where a `TorchFunctionMode` sees it; and what it
    copies has a derivative.
    """
    for part in module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in list(part.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                part.graph.erase_node(node)
            elif node.target in _LOOSE:
                node.target = _LOOSE[node.target]
        part.recompile()


def _batch_size(program: torch.export.ExportedProgram) -> int | None:
    names = set(program.graph_signature.user_inputs)
    sizes = [
        node.meta["val"].shape[0]
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in names
        and isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].dim()
    ]
    fixed = [size for size in sizes if isinstance(size, int)]
    return fixed[0] if fixed else None
