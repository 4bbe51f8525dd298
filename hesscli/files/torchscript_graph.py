"""What the code of a TorchScript file names: devices of the machine it was made on, and calls hidden from Python."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

_LIBRARY = Library("hesscli", "DEF")
_LIBRARY.define("detach(Tensor(a) x) -> Tensor(a)")


@torch.library.impl(_LIBRARY, "detach", "CompositeImplicitAutograd")
def _detach(x: Tensor) -> Tensor:
    return x.detach()


def adapt(module: torch.jit.ScriptModule, device: torch.device) -> None:
    """Lets a module, not yet called, make its tensors on a device, and detach them in Python.

    A trace names the device of every tensor that it makes, a recurrent layer's first state for one; parameters and
    buffers alone go where the file is loaded to. And what TorchScript detaches no `TorchFunctionMode` sees.

    Args:
        module: whose `forward` is changed.
        device: the only one it names from now on.
    """
    graph = module._c._get_method("forward").graph
    torch._C._jit_pass_inline(graph)
    for node in graph.findAllNodes("prim::Constant"):
        if node.output().type().kind() == "DeviceObjType":
            node.s_("value", str(device))
    for node in (*graph.findAllNodes("aten::detach"), *graph.findAllNodes("prim::data")):
        ours = graph.create("hesscli::detach", list(node.inputs()), 1)
        ours.insertBefore(node)
        ours.output().setType(node.output().type())
        node.output().replaceAllUsesWith(ours.output())
        node.destroy()
