"""Transforms of the codes, fitted once on the training codes and kept with the model.

Legend: N points, D dimensions of a raw code, E dimensions of a transformed one, K clusters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deepdpm.moves import MoveSettings

TransformKind = Literal["none", "normalize", "min_max", "standard", "standard_normalize", "principal"]

# Principal axes with less of the largest variance than this are rounding errors.
_RELATIVE_VARIANCE = 1e-10
_NORMALIZING = ("normalize", "standard_normalize")

Chunks = Callable[[], Iterable[Tensor]]


def most_axes(num_points: int) -> int:
    """How many principal axes so many points can tell apart: `sqrt(N)`, at least 2 and at most 77.

    A covariance of d dimensions has d^2 / 2 free numbers, and the search for clusters sees no more than its
    sample at first, 6,000 points by default.

    >>> most_axes(100), most_axes(70_000)
    (10, 77)
    """
    return max(2, math.isqrt(min(num_points, MoveSettings.sample_size)))


class Transform(nn.Module):
    """Map raw codes to those that are clustered: `y = (x - shift) * scale @ axes`, or that over its norm.

    - "none"; "normalize": each code over its L2 norm; "min_max": each dimension to 0..1; "standard": each to
      mean 0 and variance 1; "standard_normalize": that, then over the norm. A constant dimension becomes 0.
    - "principal": centred and rotated to the principal axes, each pointing where its third moment is
      positive, all divided by the root of their mean variance. So codes that are scaled, shifted or rotated
      give the same result. Axes of no variance are left out, and at most `sqrt(N)` are kept, of 6,000 points
      or more 77 (`most_axes`).

    Shapes: (N, D) to (N, E) float32. A state dict of other dimensions resizes the buffers.

    >>> transform = Transform("standard").fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    >>> transform(torch.tensor([[4.0, 5.0]])).tolist()
    [[3.0, 0.0]]
    """

    shift_D: Tensor
    scale_D: Tensor
    axes_DE: Tensor

    def __init__(self, kind: TransformKind = "principal", num_dims: int = 1) -> None:
        super().__init__()
        assert kind in get_args(TransformKind), kind
        self.kind = kind
        self.register_buffer("shift_D", torch.zeros(num_dims, dtype=torch.float64))
        self.register_buffer("scale_D", torch.ones(num_dims, dtype=torch.float64))
        self.register_buffer("axes_DE", torch.empty(0, 0))

    @property
    def num_dims(self) -> int:
        """E, the dimensions of a transformed code."""
        return self.axes_DE.shape[1] if self.kind == "principal" else self.shift_D.numel()

    def fit(self, x_ND: Tensor | Chunks) -> Transform:
        """Fit to codes (N, D), or to a function that gives them in chunks, each time from the beginning."""
        chunks: Chunks = (lambda: (x_ND,)) if isinstance(x_ND, Tensor) else x_ND
        count, self.shift_D, lowest_D, highest_D = _range_of(chunks)
        self.scale_D = torch.ones_like(self.shift_D)
        if self.kind == "min_max":
            self.shift_D, width_D = lowest_D, highest_D - lowest_D
            self.scale_D = torch.where(width_D > 0, 1 / width_D.clamp_min(1e-300), torch.zeros_like(width_D))
        elif self.kind in ("standard", "standard_normalize"):
            variance_D = _mean_over(chunks, count, lambda x_BD: (x_BD - self.shift_D).square().sum(0))
            constant_D = highest_D == lowest_D
            self.scale_D = torch.where(constant_D, 0, variance_D.clamp_min(1e-300).rsqrt())
        elif self.kind == "principal":
            self._fit_axes(chunks, count)
        else:
            self.shift_D = torch.zeros_like(self.shift_D)
        return self

    def _fit_axes(self, chunks: Chunks, count: int) -> None:
        def second_moment(x_BD: Tensor) -> Tensor:
            centred_BD = x_BD - self.shift_D
            return centred_BD.T @ centred_BD

        covariance_DD = _mean_over(chunks, count, second_moment)
        variance_E, axes_DE = torch.linalg.eigh(covariance_DD)
        variance_E, axes_DE = variance_E.flip(0).clamp_min(0), axes_DE.flip(1)
        kept = int((variance_E > _RELATIVE_VARIANCE * variance_E[0]).sum())
        kept = max(1, min(kept, most_axes(count)))
        axes_DE = axes_DE[:, :kept]
        third_E = _mean_over(chunks, count, lambda x_BD: ((x_BD - self.shift_D) @ axes_DE).pow(3).sum(0))
        axes_DE = torch.where(third_E < 0, -axes_DE, axes_DE)
        variance = variance_E[:kept].mean()
        scale = torch.where(variance > 0, variance.clamp_min(1e-300).rsqrt(), torch.ones_like(variance))
        self.scale_D = scale.expand_as(self.shift_D).contiguous()
        self.axes_DE = axes_DE.float().contiguous()

    def forward(self, x_ND: Tensor) -> Tensor:
        y_ND = x_ND
        if self.kind in ("min_max", "standard", "standard_normalize", "principal"):
            # The difference needs float64 where codes lie far from the origin; the product does not.
            y_ND = ((x_ND.double() - self.shift_D) * self.scale_D).float()
        if self.kind == "principal":
            y_ND = y_ND @ self.axes_DE
        if self.kind in _NORMALIZING:
            y_ND = nn.functional.normalize(y_ND.float(), dim=1, eps=torch.finfo(torch.float32).tiny)
        return y_ND.float()

    @property
    def log_volume(self) -> float:
        """What a log density of transformed codes needs to be one of raw codes (on the kept axes), in nats.

        Zero where the transform has no such factor: the L2 norm leaves the density on the sphere.
        """
        if self.kind in _NORMALIZING or self.kind == "none":
            return 0.0
        if self.kind == "principal":
            return self.num_dims * self.scale_D[0].log().item()
        return self.scale_D[self.scale_D > 0].log().sum().item()

    def inverse_means(self, means_KE: Tensor) -> Tensor:
        """Centres in raw codes (K, D).

        Raises:
            ValueError: the L2 norm has no inverse.
        """
        raw_KD = self._unrotate(means_KE.double())
        return torch.where(self.scale_D > 0, raw_KD / self.scale_D.clamp_min(1e-300), 0) + self.shift_D

    def inverse_covariances(self, covariances_KEE: Tensor) -> Tensor:
        """Covariances in raw codes (K, D, D), of rank E.

        Raises:
            ValueError: the L2 norm has no inverse.
        """
        half_KED = self._unrotate(covariances_KEE.double())
        raw_KDD = self._unrotate(half_KED.mT)
        width_D = torch.where(self.scale_D > 0, 1 / self.scale_D.clamp_min(1e-300), 0)
        return raw_KDD * width_D[:, None] * width_D

    def _unrotate(self, y: Tensor) -> Tensor:
        if self.kind in _NORMALIZING:
            raise ValueError(f"model.transform={self.kind} has no inverse: choose standard or principal.")
        return y @ self.axes_DE.double().T if self.kind == "principal" else y

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("shift_D", "scale_D", "axes_DE"):
            if prefix + name in state_dict:
                buffer = getattr(self, name)
                setattr(self, name, buffer.new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _range_of(chunks: Chunks) -> tuple[int, Tensor, Tensor, Tensor]:
    """Count, mean, smallest and largest values of each dimension, in float64."""
    count, sum_D = 0, torch.zeros(0)
    for x_BD in chunks():
        low_D, high_D = x_BD.double().amin(0), x_BD.double().amax(0)
        if count == 0:
            sum_D, lowest_D, highest_D = torch.zeros_like(low_D), low_D, high_D
        count, sum_D = count + x_BD.shape[0], sum_D + x_BD.double().sum(0)
        lowest_D, highest_D = torch.minimum(low_D, lowest_D), torch.maximum(high_D, highest_D)
    assert count > 0, "no codes"
    return count, sum_D / count, lowest_D, highest_D


def _mean_over(chunks: Chunks, count: int, of: Callable[[Tensor], Tensor]) -> Tensor:
    return functools.reduce(torch.add, (of(x_BD.double()) / count for x_BD in chunks()))
