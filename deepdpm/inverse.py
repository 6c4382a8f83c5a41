"""From codes back to the space of the points, for every transform.

Legend: D dimensions of a point, E dimensions of a code, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepdpm.transforms import Transform


def means_of_points(transform: Transform, y_KE: Tensor) -> Tensor:
    """Points (K, D) that have these codes; on the sphere of "normalize" the points of that length."""
    if transform.kind not in ("normalize", "standard_normalize"):
        return transform.inverse_means(y_KE)
    return y_KE.double() * _width(transform) + transform.shift_D


def covariances_of_points(transform: Transform, covariances_KEE: Tensor) -> Tensor:
    """The same for covariances (K, D, D)."""
    if transform.kind not in ("normalize", "standard_normalize"):
        return transform.inverse_covariances(covariances_KEE)
    width_D = _width(transform)
    return covariances_KEE.double() * width_D[:, None] * width_D


def _width(transform: Transform) -> Tensor:
    return torch.where(transform.scale_D > 0, 1 / transform.scale_D.clamp_min(1e-300), 0)
