"""What is said where a model does not accept its data, or has no gradient: PyTorch's message, and what to do."""

from __future__ import annotations

import re

import torch

from hesscli.errors import DeviceMismatchError, MismatchError
from hesscli.hessian.objective.batch import Batch
from hesscli.texts import dtype_name

_OTHER_DEVICE = re.compile(
    r"the same device|the expected device|torch\.cuda\.\w+Tensor|device type tensor to numpy|"
    r"but expected on|on MPS device!|CPU tensor to MPS op"
)
_UNLIKE = re.compile(
    r"same (dtype|scalar type)|dtypes must be the same|self\.dtype to be equal|"
    r"expected scalar type \w+ but found (Float|Double|Half|BFloat16)"
)

UNREGISTERED = "an autograd kernel was not registered"
"""What PyTorch warns of where it passes no gradient through an operator that has none, as if it were a constant."""


def on_other_device(what: str, reason: str, error: BaseException) -> DeviceMismatchError | None:
    """What is said where model or loss fail because they make tensors on another device than their inputs'."""
    if not _OTHER_DEVICE.search(str(error)):
        return None
    return DeviceMismatchError(f"{what} makes tensors on another device: {reason}", "--device cpu")


def not_accepted(batch: Batch, reason: str, error: BaseException) -> MismatchError:
    """What is said where a model does not accept a batch's inputs."""
    if elsewhere := on_other_device("the model", reason, error):
        return elsewhere
    shapes = ", ".join(f"{dtype_name(x.dtype)} {list(x.shape)}" for x in batch.inputs)
    return MismatchError(
        f"the model does not accept the inputs {shapes}: {reason}", _type_hint(str(error), batch)
    )


def _type_hint(error: str, batch: Batch) -> str | None:
    """What to do about numbers that the model does not take as they are."""
    if "'indices'" in error or "embedding" in error:
        return "store indices as int64: x.astype(np.int64)"
    wide = any(x.dtype is torch.float64 for x in batch.inputs)
    mixed = re.search("Half|BFloat16|[Dd]ouble.*[Ff]loat|[Ff]loat.*[Dd]ouble", error)
    if _UNLIKE.search(error) and (wide or mixed):
        return f"--dtype {'float32' if wide else 'float64'}"  # in which all casts stay wide
    if any(x.dtype is torch.uint8 for x in batch.inputs):
        return "--scale 1/255"
    integers = [x for x in batch.inputs if not (x.is_floating_point() or x.is_complex())]
    if len(batch.inputs) > 1:  # then bools are a mask
        integers = [x for x in integers if x.dtype is not torch.bool]
    name = r"\b([Ll]ong|[Ii]nt|[Ss]hort|[Cc]har|[Bb]ool)(Tensor|\d+)?\b"
    floats = "([Ff]loat|[Dd]ouble)"
    floats_wanted = re.search(
        rf"not implemented for '{name}'|mixed dtype|[Tt]ype.*{name}.*{floats}|{floats}.*(found|[Gg]ot):? {name}",
        error,
    )
    # --scale makes floats of all inputs: where there are several of integers, some may be indices.
    return "--scale 1" if len(integers) == 1 and floats_wanted else None


def behind_reentrant(what: str) -> MismatchError:
    """What is said where something has a gradient that `backward()` alone reaches."""
    return MismatchError(
        f"{what}: its gradient comes by backward() alone, as behind a reentrant checkpoint; "
        "it cannot be differentiated again",
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    )


def gradients_off() -> MismatchError:
    """What is said where the loss depends on the parameters, and to autograd on none of them."""
    return MismatchError(
        "the loss has no gradient by any parameter, though it depends on them: the model or the loss computes where "
        "gradients are off, or detaches all",
        "leave torch.no_grad and torch.set_grad_enabled(False) out of forward, and out of the loss",
    )


def no_gradient(reason: str, error: BaseException) -> MismatchError:
    """What is said where a plain gradient fails."""
    if "use_reentrant=True" in str(error):
        return behind_reentrant("the model")
    unregistered = re.match(rf"(\S+): {UNREGISTERED}", str(error))
    if unregistered:
        reason = f"{unregistered[1]} has none"
    return MismatchError(f"the gradient of the model cannot be taken: {reason}")
