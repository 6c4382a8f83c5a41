"""Heavy tails: Student's t of squared distances, what a point counts for in it, and its degrees of freedom.

All take squared distances from a component's mean in its covariance, `d^2 = (x - mu)^T Sigma^-1 (x - mu)`,
the number of dimensions D and the degrees of freedom nu; with nu infinite all is a Gaussian's. Elementwise
but for `fit_dof`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Above these, tails are a Gaussian's.
_DOFS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, math.inf)


def log_peak(num_dims: int, dof: float) -> float:
    """The log density at the mean, of unit covariance: for a Gaussian `-(D / 2) log(2 pi)`.

    >>> round(log_peak(2, math.inf), 4), round(log_peak(2, 3.0), 4)
    (-1.8379, -1.8379)
    """
    if math.isinf(dof):
        return -0.5 * num_dims * math.log(2 * math.pi)
    return math.lgamma((dof + num_dims) / 2) - math.lgamma(dof / 2) - 0.5 * num_dims * math.log(dof * math.pi)


def log_fall(squares: Tensor, num_dims: int, dof: float) -> Tensor:
    """How far the log density has fallen from its peak: `(nu + D) / 2 log(1 + d^2 / nu)`.

    >>> [round(log_fall(torch.tensor([3.0]), 1, dof).item(), 4) for dof in (3.0, math.inf)]
    [1.3863, 1.5]
    """
    if math.isinf(dof):
        return 0.5 * squares
    return (squares / dof).log1p_().mul_(0.5 * (dof + num_dims))


def squares_of(fall: Tensor, num_dims: int, dof: float) -> Tensor:
    """The squared distances at which the log density has fallen so far: the inverse of `log_fall`.

    >>> round(squares_of(log_fall(torch.tensor([5.0]), 2, 4.0), 2, 4.0).item(), 4)
    5.0
    """
    if math.isinf(dof):
        return 2 * fall
    return (fall * (2 / (dof + num_dims))).expm1_().mul_(dof)


def precisions(squares: Tensor, num_dims: int, dof: float) -> Tensor:
    """`E[u | x] = (nu + D) / (nu + d^2)`, what a point counts for in the M-step; 1 for Gaussians.

    A point of Student's t is one of a Gaussian with covariance `Sigma / u`, where `u ~ Gamma(nu / 2, nu / 2)`
    (Peel and McLachlan 2000, section 3).

    >>> precisions(torch.tensor([0.0, 2.0, 14.0]), 2, 4.0).tolist()
    [1.5, 1.0, 0.3333333432674408]
    """
    if math.isinf(dof):
        return torch.ones_like(squares)
    return (dof + num_dims) / (dof + squares)


def log_scale_evidence(squares: Tensor, num_dims: int, dof: float) -> Tensor:
    """What points' own precisions u add to the evidence of Gaussians, where each counts for `E[u | x]`.

    `(D / 2) E[log u] - KL(p(u | x) || p(u)) = log t(d^2) - log N(0) + E[u | x] d^2 / 2`, in nats: with it the
    evidence of points that are weighted so is a lower bound of that of Student's t.

    >>> log_scale_evidence(torch.tensor([1.0]), 1, math.inf).item()
    0.0
    """
    gaussian = 0.5 * precisions(squares, num_dims, dof) * squares - log_peak(num_dims, math.inf)
    return log_peak(num_dims, dof) - log_fall(squares, num_dims, dof) + gaussian


def fit_dof(squares: Tensor, weights: Tensor, num_dims: int) -> float:
    """The degrees of freedom of greatest likelihood on a grid from 1 to 64, or infinity.

    `max_nu sum_ik r_ik log t(d_ik^2; nu)`, with means and covariances as they are: a step of ECM, so EM
    between such steps goes on to greater likelihoods (Liu and Rubin 1995). Shapes: any, the weights r alike.

    >>> x_ND = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    >>> fit_dof(x_ND.square().sum(1), torch.ones(2000), 5)
    inf
    >>> u_N = torch.rand(2000, generator=torch.Generator().manual_seed(1)).log().neg()  # of 2 degrees
    >>> fit_dof(x_ND.square().sum(1) / u_N, torch.ones(2000), 5)
    2.0
    """
    share, squares = weights.double() / weights.double().sum(), squares.double()
    means = [log_peak(num_dims, dof) - (share * log_fall(squares, num_dims, dof)).sum() for dof in _DOFS]
    return _DOFS[int(torch.stack(means).argmax())]
