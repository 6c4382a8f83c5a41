"""Points as an estimator is given them: arrays, data frames or torch tensors, checked.

Legend: N points, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data
from torch import Tensor


def points_of(estimator: BaseEstimator, X: Any, *, reset: bool, least: int = 1) -> Tensor:
    """Checked points as float32 (N, D); a tensor stays on its device.

    With `reset` the estimator learns D and the names of the columns; without it they must be the same.

    Raises:
        ValueError: too few, not finite, no numbers, or of another D.

    >>> points_of(BaseEstimator(), [[1, 2], [3, 4]], reset=True)
    tensor([[1., 2.],
            [3., 4.]])
    """
    if not isinstance(X, Tensor):
        array = validate_data(
            estimator, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=least
        )
        with np.errstate(over="ignore"):
            x_ND = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    else:
        x_ND = X.detach().flatten(1) if X.ndim > 2 else X.detach()
        _check_shape(estimator, x_ND, reset, least)
        x_ND = x_ND.to(torch.float32)
    if not bool(x_ND.isfinite().all()):
        raise ValueError("X has NaN, infinity or values beyond float32: remove or fill them.")
    return x_ND


def _check_shape(estimator: Any, x_ND: Tensor, reset: bool, least: int) -> None:
    """What scikit-learn's own check does, for tensors, which have no names of columns."""
    if x_ND.ndim != 2 or x_ND.shape[1] == 0:
        raise ValueError(f"X has the shape {tuple(x_ND.shape)}: give a row for each point.")
    if len(x_ND) < least:
        raise ValueError(f"X has {len(x_ND)} points: give at least {least}.")
    if reset:
        estimator.n_features_in_ = x_ND.shape[1]
        estimator.__dict__.pop("feature_names_in_", None)
    elif x_ND.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {x_ND.shape[1]} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features."
        )


def draw_rows(x_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many random rows, in their order; all of them if there are no more.

    >>> draw_rows(torch.arange(4)[:, None], 9, torch.Generator()).flatten().tolist()
    [0, 1, 2, 3]
    """
    if len(x_ND) <= count:
        return x_ND
    return x_ND[torch.randperm(len(x_ND), generator=generator)[:count].sort().values.to(x_ND.device)]


def as_given(X: Any, values: Tensor) -> Any:
    """Values as the points X came: a tensor on their device, or an array.

    >>> as_given([[1.0]], torch.zeros(1))
    array([0.], dtype=float32)
    """
    return values.to(X.device) if isinstance(X, Tensor) else values.cpu().numpy()
