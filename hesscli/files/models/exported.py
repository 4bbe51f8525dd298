"""Programs saved by `torch.export.save`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.export.passes import move_to_device_pass

from hesscli.errors import FileError
from hesscli.files.models.call_signature import CallSignature
from hesscli.files.models.exported_code import refuse_code
from hesscli.files.models.ties import tie, tied_groups
from hesscli.files.sniff import Kind
from hesscli.files.torch_files import quiet, reading
from hesscli.files.zip_files import check_zip

Body = Callable[..., Sequence[Tensor]]


def _copied(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten::copy`, which has no derivative."""
    return source.to(to).expand_as(to).clone()


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return torch.log_softmax(x.float() if half_to_float else x, dim)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    momentum: float,
    eps: float,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.batch_norm(x, weight, bias, mean, variance, training, momentum, eps, False)
    return y, x.new_empty(0), x.new_empty(0)  # as on a CPU: nothing is saved


def _own_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, weight, bias, None, None, momentum, eps, training)


def _cond(predicate: Any, true: Body, false: Body, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    return (true if predicate else false)(*operands)


def _while_loop(
    goes_on: Callable[..., Any], body: Body, carried: Sequence[Tensor], others: Sequence[Tensor]
) -> Sequence[Tensor]:
    while goes_on(*carried, *others):
        carried = body(*carried, *others)
    return carried


def _map(body: Body, rows: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return _stacked(body(*row, *others) for row in zip(*rows, strict=True))


def _scan(
    combine: Body, carried: Sequence[Tensor], rows: Sequence[Tensor], others: Sequence[Tensor]
) -> list[Tensor]:
    count, made = len(carried), []
    for row in zip(*rows, strict=True):
        result = combine(*carried, *row, *others)
        carried = result[:count]
        made.append(result[count:])
    return [*carried, *_stacked(made)]


def _stacked(results: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


_IN_PYTHON = {"cond": _cond, "while_loop": _while_loop, "map_impl": _map, "scan": _scan}
"""Control flow, which PyTorch's own operators trace anew and without a second derivative."""


_REPLACED = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.detach.default: torch.detach,
    torch.ops.aten.copy.default: _copied,
    torch.ops.aten._log_softmax.default: _log_softmax,
    torch.ops.aten._native_batch_norm_legit_no_training.default: _batch_norm,
    torch.ops.aten._native_batch_norm_legit.no_stats: _own_batch_norm,
}


_UNLIMITED = 1 << 31  # samples


def load_exported(
    path: Path, device: torch.device, pickle_hint: str | None
) -> tuple[nn.Module, CallSignature, tuple[int, int | None]]:
    """Reads a program, moves it to the device and ties again what was tied when it was saved.

    Args:
        pickle_hint: the hint when the file would run code; None to let it.

    Returns:
        the program as a module; its signature, with the names that the graph gives its inputs; and the fewest and the
        most samples that it takes.

    Raises:
        FileError: damaged, of another version, or with numbers among its inputs that vary.
    """
    check_zip(path)
    with reading(path, Kind.EXPORTED, pickle_hint):
        if pickle_hint is not None:
            refuse_code(path)
        # As an open file: torch.export.load warns about paths that do not end in .pt2.
        with quiet(), open(path, "rb") as file:
            program = torch.export.load(file)
            groups = tied_groups(program.named_parameters())
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            module = program.module()
        _loosen(module)
        tie(module, groups)
        given = [
            spec.arg
            for spec in program.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        ]
    if unknown := [a.name for a in given if not isinstance(a, (TensorArgument, ConstantArgument))]:
        raise FileError(
            f"{path}: exported with a number as an input that varies ({', '.join(unknown)}), which no data file holds",
            "pass a tensor, or a constant: torch.export.export(model, (x, 3))",
        )
    signature = _taking_tensors(module, program.call_spec.in_spec, given)
    for part in module.modules():
        # `.eval()` raises on these modules: the mode is part of the graph. The flag may still be read.
        part.training = False
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.requires_grad:  # a parameter's memory, which is moved
                part._buffers[name] = buffer.detach().clone()
    return module, signature, _batch_sizes(program)


def _taking_tensors(
    module: nn.Module, spec: pytree.TreeSpec, given: Sequence[TensorArgument | ConstantArgument]
) -> CallSignature:
    """Makes the module take its tensors one by one, be they exported inside a dict, say, or beside constants; `spec` is
    of its arguments by position and by name, and `given` stands for each of their leaves.
    """
    positional, keywords = spec.children()
    names = tuple(str(name) for name in keywords.context or ())
    tensors = tuple(argument.name for argument in given if isinstance(argument, TensorArgument))
    count = positional.num_children
    if len(tensors) == len(given) <= count + len(names):
        return CallSignature(count, tensors, keywords=names)
    hook = partial(_as_exported, spec, given)
    module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    return CallSignature(len(tensors), tensors)


def _as_exported(
    spec: pytree.TreeSpec,
    given: Sequence[TensorArgument | ConstantArgument],
    module: nn.Module,
    tensors: tuple[Tensor, ...],
    named: dict[str, Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors, in the order in which the graph has them, where they were when it was exported: in a dict, say; and
    constants beside them.
    """
    names = [argument.name for argument in given if isinstance(argument, TensorArgument)]
    if named or len(tensors) != len(names):
        raise TypeError(f"takes {', '.join(names)}; {len(tensors) + len(named)} were given")
    left = iter(tensors)
    leaves = [each.value if isinstance(each, ConstantArgument) else next(left) for each in given]
    positional, keywords = pytree.tree_unflatten(leaves, spec)
    return positional, keywords


def _loosen(module: nn.Module) -> None:
    """Lets the graph run in another dtype and on another device than those it was exported with.

    What asserts the dtype of a tensor goes; and every view may be a copy, as the operators of another device lay their
    results out in other ways. What it detaches is detached in Python, where a `TorchFunctionMode` sees it; what it
    copies has a derivative; branches and loops are Python's; and what was decomposed into an operator's kernel is that
    operator again, of which more is known.
    """
    for part in module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in list(part.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                part.graph.erase_node(node)
            elif node.target in _REPLACED:
                node.target = _REPLACED[node.target]
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                node.target = _IN_PYTHON.get(node.target.name(), node.target)
        part.recompile()


def _batch_sizes(program: torch.export.ExportedProgram) -> tuple[int, int | None]:
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
    if fixed:
        return fixed[0], fixed[0]
    for size in sizes:
        limits = program.range_constraints.get(size.node.expr)
        if limits is not None:
            # Two is what torch.export says where nothing was; one is accepted then.
            fewest = int(limits.lower) if limits.lower > 2 else 1
            return fewest, int(limits.upper) if limits.upper < _UNLIMITED else None
    return 1, None
