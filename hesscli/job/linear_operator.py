"""The curvature of a model as SciPy knows operators: `hesscli.operator`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from hesscli.errors import UsageError
from hesscli.hessian.autodiff import differentiable
from hesscli.job.operator import Operator, open_operator
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.setup.given import DataLike, LossFunction, Model, given
from hesscli.job.setup.processes import Processes
from hesscli.job.setup.settings import as_written, random_kept, settings_kept, settle
from hesscli.texts import dtype_name


@as_written
def operator(
    model: Model,
    data: DataLike,
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
    options["loss"] = loss
    with given(model, data, device, ProblemOptions, options, kept=True) as asked:
        return CurvatureOperator(open_operator(asked, listener or Listener(), Processes()))


class CurvatureOperator(LinearOperator):  # type: ignore[misc]
    """An opened operator that multiplies NumPy's vectors."""

    def __init__(self, operator: Operator) -> None:
        dtype = np.dtype(dtype_name(operator.problem.dtype))
        super().__init__(dtype, (operator.size, operator.size))
        self.operator = operator

    def __copy__(self) -> CurvatureOperator:
        return self  # which never changes

    def __deepcopy__(self, memo: object) -> CurvatureOperator:
        return self

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._products(x.reshape(-1))

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._products(X.T).T

    def _adjoint(self) -> LinearOperator:
        return self

    @as_written
    def _products(self, rows: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(rows):
            raise UsageError("a complex vector; the curvature multiplies real ones")
        with settings_kept(), differentiable(), random_kept():
            settle(self.operator.opened.options)
            vectors = torch.from_numpy(np.array(rows, self.dtype, order="C"))
            if not len(vectors):
                return np.zeros(rows.shape, self.dtype)
            vectors = vectors.to(self.operator.problem.device)
            return self.operator.products(vectors).cpu().numpy()
