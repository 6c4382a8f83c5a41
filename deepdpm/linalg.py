"""Linear algebra that forgives: a Cholesky factor that adds jitter only where one fails.

Legend: D dimensions; leading dimensions are batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_JITTER = 1e-10
_ATTEMPTS = 9


class NotPositiveDefiniteError(ValueError):
    """A covariance is not positive definite, whatever jitter is added to it."""


def cholesky(matrix_DD: Tensor) -> Tensor:
    """Lower Cholesky factors `L L^T = matrix`, with jitter on the diagonals of those that need it.

    The jitter starts at 1e-10 of the entry's mean diagonal and grows tenfold at each attempt.

    Shapes: matrix (..., D, D) to L (..., D, D). Raises NotPositiveDefiniteError for NaN or after 1e-2.

    >>> cholesky(torch.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    factor_DD, failed = torch.linalg.cholesky_ex(matrix_DD)
    if not failed.any():
        return factor_DD
    if not torch.isfinite(matrix_DD).all():
        raise NotPositiveDefiniteError(
            "a covariance holds NaN or infinity: check the codes for extreme values"
        )
    diagonal = matrix_DD.diagonal(dim1=-2, dim2=-1)
    size = diagonal.abs().mean(-1).clamp_min(torch.finfo(matrix_DD.dtype).tiny)
    for attempt in range(_ATTEMPTS):
        jitter = torch.where(failed > 0, size * _FIRST_JITTER * 10.0**attempt, torch.zeros_like(size))
        jitter_DD = torch.diag_embed(jitter[..., None].expand_as(diagonal))
        factor_DD, still_failed = torch.linalg.cholesky_ex(matrix_DD + jitter_DD)
        if not still_failed.any():
            return factor_DD
        failed = torch.maximum(failed, still_failed)
    raise NotPositiveDefiniteError(
        "a covariance is not positive definite even with jitter: raise prior.sigma_scale or prior.nu"
    )


def inverse_cholesky(matrix_DD: Tensor) -> Tensor:
    """Inverses `L^-1` of lower Cholesky factors `L L^T = matrix`: `L^-1 x` are whitened points.

    One small inverse and a product: a triangular solve for every point takes many times as long.

    Shapes: matrix (..., D, D) to L^-1 (..., D, D). Raises NotPositiveDefiniteError as `cholesky` does.

    >>> inverse_cholesky(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    factor_DD = cholesky(matrix_DD)
    eye_DD = torch.eye(factor_DD.shape[-1], dtype=factor_DD.dtype, device=factor_DD.device)
    return torch.linalg.solve_triangular(factor_DD, eye_DD.expand_as(factor_DD), upper=False)


def log_det_from_cholesky(factor_DD: Tensor) -> Tensor:
    """`log |L L^T|` (...,) of Cholesky factors (..., D, D).

    >>> round(log_det_from_cholesky(2 * torch.eye(3)).item(), 4)
    4.1589
    """
    return 2 * factor_DD.diagonal(dim1=-2, dim2=-1).log().sum(-1)
