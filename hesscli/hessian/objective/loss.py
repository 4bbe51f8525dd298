"""What is differentiated: one of PyTorch's losses with its arguments, the user's own, or what the model returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hesscli.errors import MismatchError
from hesscli.hessian.aten.precision import in_precision_, staying_wide
from hesscli.hessian.guests import guest
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.copies import copied
from hesscli.hessian.objective.losses import LOSSES, Total
from hesscli.hessian.objective.outputs import described, entries_of
from hesscli.hessian.objective.refusals import on_other_device
from hesscli.hessian.objective.state import state_kept
from hesscli.texts import dtype_name

_INSTEAD: dict[type | tuple[type, ...], str] = {
    type(None): "end it with: return loss",
    (int, float, np.number): "return the tensor itself, without .item() and float()",
    np.ndarray: "compute it with torch, without .numpy(): NumPy has no gradients",
    tuple: "return the first alone: return loss, not return loss, other",
    list: "return torch.stack(terms)",
    Mapping: "return the loss alone: return losses['loss']",
}
"""What a loss of the user's own is to return, by what it returns."""

MEAN, SUM, OF_ALL = "mean", "sum", "of all"


@dataclass(frozen=True)
class Loss:
    """A loss: `total(output, batch) -> (sum over the batch, divisor of the mean)`, with the arguments of the batch."""

    name: str  # of one of `LOSSES`, `output` where the model's output is the loss itself, or of the user's own
    reduction: str = "mean"  # "mean" or "sum", over all the data
    # The user's own, `(output, target, **arguments) -> Tensor`; None for the others. What it returns, or the model,
    # with one axis per sample is summed, and its mean divides by its number of elements.
    function: Callable[..., Tensor] | None = None
    # Of a single number, what it is of: `MEAN` or `SUM` of what the loss makes of each sample, or `OF_ALL`, reduced
    # already, so that the data must not be split into batches; empty where it is no single number.
    reduced: str = ""
    # The user's own takes all that the model returns, where that is several tensors; to all that follows, it is a part
    # of the model.
    whole: bool = False
    wide: bool = False  # what the user's own, or the model, computes in less than float64 is computed in that

    def reads_others(self, output: Tensor, batch: Batch) -> bool:
        """Whether the user's own loss depends on tensors with gradients of their own, which are constants here."""
        if self.is_output:
            return False
        with torch.enable_grad():
            return self.terms(output.detach(), batch).requires_grad

    def doubled(self) -> Loss:
        """The same in float64."""
        if not isinstance(self.function, nn.Module):
            return self
        return replace(self, function=in_precision_(copied(self.function), torch.float64))

    @property
    def is_output(self) -> bool:
        """Whether the output is the loss itself: the model returns it, or it takes all that the model returns."""
        return self.name == "output" or self.whole

    @property
    def is_one_number(self) -> bool:
        """Whether the output is the loss itself, reduced already."""
        return self.is_output and self.reduced != ""

    @property
    def needs_target(self) -> bool:
        return self.name != "output"

    def total(self, output: Tensor, batch: Batch) -> Total:
        """The sum of the batch's loss terms, and its share of what the mean divides by.

        Raises:
            UsageError: the loss does not take its arguments.
            MismatchError: nor the output, or the target; or they are complex.
        """
        if self.name in LOSSES:
            self._demand_real(output, batch)
            return LOSSES[self.name](output, batch.target, **batch.loss_arguments)
        return self.total_of(self.terms(output, batch), batch)

    def total_of(self, terms: Tensor, batch: Batch) -> Total:
        """The same of terms that the batch was found to have."""
        if self.reduced in (MEAN, SUM):
            count = len(batch)
            return terms.sum() * (count if self.reduced == MEAN else 1), float(count)
        return terms.sum(), float(terms.numel())

    def _demand_real(self, output: Tensor, batch: Batch) -> None:
        """Refuses complex numbers, of some of which the real part alone would count; |f - y| is of both."""
        given = {f"its argument {name}": x for name, x in batch.loss_arguments.items()}
        if not (self.name == "l1" and output.is_complex()):
            given |= {"the model's output": output, "the target": batch.target}
        for what, value in given.items():
            if isinstance(value, Tensor) and value.is_complex():
                raise MismatchError(
                    f"the loss {self.name} is of real numbers, and {what} is {dtype_name(value.dtype)}",
                    "--loss FILE.py:FN",
                )

    def terms(self, output: Tensor, batch: Batch) -> Tensor:
        """What is summed, of a loss that is the user's own or the model's.

        Raises:
            MismatchError: the user's own fails, or does not return a tensor that depends on the output.
        """
        if self.is_output:
            return output
        if output.is_leaf and output.requires_grad:  # which nothing may be written to
            output = output.clone()
        terms = self.called(output, batch)
        # A new tensor of zeros stands for a batch with nothing to compare.
        constant = not terms.requires_grad or (terms.is_leaf and bool(terms.any()))
        if torch.is_grad_enabled() and output.requires_grad and constant:
            raise MismatchError(
                f"the loss {self.name} has no gradient: it detaches, rounds, returns a new tensor, or "
                "turns gradients off",
                "take out .item(), .detach(), .numpy(), argmax, round, torch.tensor(...) and torch.no_grad()",
            )
        return terms

    def called(self, output: object, batch: Batch) -> Tensor:
        """What the user's own function makes of an output, or of all that the model returns.

        Raises:
            MismatchError: it fails, or does not return a tensor; DeviceMismatchError where what it makes itself lies
                on another device.
        """
        assert self.function is not None
        with (
            staying_wide() if self.wide else nullcontext(),
            state_kept(self.function),
            guest(partial(self._failed, output, batch.target)),
        ):
            terms: object = self.function(output, batch.target, **batch.loss_arguments)
        if not isinstance(terms, Tensor):
            hint = next((hint for kind, hint in _INSTEAD.items() if isinstance(terms, kind)), None)
            returned = "nothing" if terms is None else f"a {type(terms).__name__}"
            raise MismatchError(
                f"the loss {self.name} returned {returned}; expected a tensor", hint
            )
        return terms

    def _failed(
        self, output: object, target: Tensor | None, reason: str, error: BaseException
    ) -> MismatchError:
        if elsewhere := on_other_device(f"the loss {self.name}", reason, error):
            return elsewhere
        made = output if isinstance(output, Tensor) else None
        given = [f"output {described(output) if made is None else list(made.shape)}"]
        given += [] if target is None else [f"target {list(target.shape)}"]
        own = reason.startswith(f"{getattr(self.function, '__qualname__', None)}() missing")
        missing = re.findall(r"'(\w+)'", reason) if own else []
        hint = " ".join(f"--loss-arg {name}=VALUE" for name in missing)
        if not hint and self.whole and entries_of(output):
            hint = f"--output-key {next(iter(entries_of(output)))}"
        if "does not require grad" in reason:
            hint = "return the loss: leave out loss.backward(), and other gradients of it"
        same = made is not None and target is not None and made.numel() == target.numel()
        if made is not None and same and "broadcasting" in reason:
            hint = f"store the targets with shape {list(made.shape)}; broadcasting would be wrong"
        return MismatchError(
            f"the loss {self.name} does not accept {' and '.join(given)}: {reason}", hint or None
        )
