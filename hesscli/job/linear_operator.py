"""The curvature of a model as SciPy knows operators: `hesscli.operator`."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from hesscli.errors import UsageError
from hesscli.hessian.autodiff import differentiable
from hesscli.job.alone import Alone
from hesscli.job.given import Data, Folder, LossFunction, Model, given
from hesscli.job.operator import Operator, open_operator
from hesscli.job.options import Listener, ProblemOptions, Silent
from hesscli.job.settings import settings_kept, settle


def operator(
    model: Model,
    data: Data,
    *,
    loss: str | LossFunction = "auto",
    device: str | torch.device | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> LinearOperator:
    """The curvature of a model's loss as a `scipy.sparse.linalg.LinearOperator`, [P, P] and symmetric.

    Rows and columns are the parameters in `named_parameters` order, each flattened row-major, restricted by
    `params=["fc1.*"]`. One product was checked against differences of gradients (`check=False` skips that). Vectors are
    real. A module is copied, and what becomes of it later changes nothing.

        H = hesscli.operator("model.pt", "data.npz", curvature="ggn")
        scipy.sparse.linalg.eigsh(H, k=3)

    Args:
        model: a module, or the path of a model file.
        data: the path of a data file; arrays by their names; (inputs, targets), or a `TensorDataset` of them; or the
            inputs alone.
        loss: a name of `hesscli eigen --loss`, or a function of output and targets.
        device: as `hesscli eigen --device`; by default, or with "auto", that of the module.
        listener: hears notes.
        options: the others of the command line, with underscores: loss_arguments, arch, params, dtype, curvature, ...

    Raises:
        HesscliError: of any kind.
    """
    known = {field.name for field in fields(ProblemOptions)} - {"model", "data"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(
            f"no option is called {unknown[0]!r}; there are: {', '.join(sorted(known))}"
        )
    folder = Folder()
    wanted = partial(ProblemOptions, loss=loss, **options)
    with given(model, data, device, folder, wanted) as (asked, saved):
        opened = open_operator(asked, listener or Silent(), Alone(saved))
    return Curvature(opened, asked, folder)


class Curvature(LinearOperator):  # type: ignore[misc]
    """An opened operator that multiplies NumPy's vectors.

    Args:
        opened: the operator.
        options: what was asked for.
        folder: of the data, if it was in memory.
    """

    def __init__(self, opened: Operator, options: ProblemOptions, folder: Folder) -> None:
        dtype = np.dtype(str(opened.problem.dtype).removeprefix("torch."))
        super().__init__(dtype, (opened.size, opened.size))
        self.opened, self.options, self.folder = opened, options, folder

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._products(x.reshape(-1))

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._products(X.T).T

    def _adjoint(self) -> LinearOperator:
        return self

    def _products(self, rows: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(rows):
            raise UsageError("a complex vector; the curvature multiplies real ones")
        with differentiable(), settings_kept():
            settle(self.options)
            vectors = torch.from_numpy(np.array(rows, self.dtype, order="C"))
            if not len(vectors):
                return np.zeros(rows.shape, self.dtype)
            vectors = vectors.to(self.opened.problem.device)
            return self.opened.products(vectors).cpu().numpy()
