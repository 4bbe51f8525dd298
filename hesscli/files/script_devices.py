"""Devices that a TorchScript file names: those of the machine that it was made on."""

from __future__ import annotations

import torch


def move_constants(module: torch.jit.ScriptModule, device: torch.device) -> None:
    """Lets the code of a module, not yet called, make its tensors on a device.

    A trace names the device of every tensor that it makes, a recurrent layer's first state for one; parameters and
    buffers alone go where the file is loaded to.

    Args:
        module: changed, with all that it is made of.
        device: the only one it names from now on.
    """
    for part in module.modules():
        if not isinstance(part, torch.jit.ScriptModule):
            continue
        for name in part._c._method_names():
            for node in part._c._get_method(name).graph.findAllNodes("prim::Constant"):
                if node.output().type().kind() == "DeviceObjType":
                    node.s_("value", str(device))
