"""A mixture of Gaussians, or of Student's t where clusters have heavy tails: densities, E-step and M-step.

Legend: N points, D dimensions, K components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deepdpm import tails
from deepdpm.linalg import inverse_cholesky
from deepdpm.priors import NormalPrior
from deepdpm.stats import SufficientStats

# Pieces of 2 MB: larger ones leave a processor's cache, and take two to five times as long.
_CACHED_ELEMENTS = 500_000
# Elsewhere a piece only has to fit.
_CHUNK_ELEMENTS = 64_000_000
# Whitened dimensions of one product: those before its last are all that a triangular whitener needs.
_BLOCK_DIMS = 16


@dataclass(frozen=True)
class Whitening:
    """What densities need of a mixture: whiteners `L^-1` of the covariances `L L^T`, in float64.

    Shapes: inverse_KDD (K, D, D), lower triangular; log_scale_K (K,) is the log joint density of the means,
    `log weight + log |L^-1| - (D / 2) log(2 pi)` for Gaussians.
    """

    inverse_KDD: Tensor
    log_scale_K: Tensor


@dataclass(frozen=True)
class Mixture:
    """Weights, means and covariances of K components; the factors of the covariances are computed once.

    A component is `t(x; mu_k, Sigma_k)` with `tail_dof` degrees of freedom, nu, the same for all: a Gaussian
    `N(mu_k, Sigma_k / u)` whose precision u each point draws anew, `u ~ Gamma(nu / 2, nu / 2)` (Peel and
    McLachlan 2000, section 3). With nu infinite it is the Gaussian itself.

    `noise` is the variance that measuring a point adds to each column (`deepdpm.priors`).

    Shapes: weights_K (K,), means_KD (K, D), covariances_KDD (K, D, D), noise (D,) or one number.

    >>> mixture = Mixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    >>> round(mixture.log_prob(torch.zeros(1, 2)).item(), 4)
    -1.8379
    """

    weights_K: Tensor
    means_KD: Tensor
    covariances_KDD: Tensor
    tail_dof: float = math.inf
    noise: Tensor | float = 0.0

    @classmethod
    def m_step(cls, prior: NormalPrior, stats: SufficientStats) -> Mixture:
        """The MAP mixture given the statistics of K weighted sets (paper, section 4.2).

        >>> from deepdpm.priors import NIW
        >>> prior = NIW(torch.zeros(1).double(), 1.0, 3.0, torch.eye(1).double(), dirichlet_count=0.0)
        >>> stats = SufficientStats.from_labels(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]), 1)
        >>> Mixture.m_step(prior, stats).means_KD.item()
        2.0
        """
        means_KD, covariances_KDD = prior.map_estimate(stats)
        weights_K = prior.weights_K(stats.count_K)
        return cls(weights_K, means_KD, covariances_KDD, prior.tail_dof, prior.noise)

    @property
    def num_components(self) -> int:
        """K."""
        return self.weights_K.numel()

    def __getitem__(self, index: Tensor | slice) -> Mixture:
        """Some of the components, with their weights as they are."""
        return replace(
            self,
            weights_K=self.weights_K[index],
            means_KD=self.means_KD[index],
            covariances_KDD=self.covariances_KDD[index],
        )

    @cached_property
    def whitening(self) -> Whitening:
        """The factors, on first use.

        Raises:
            NotPositiveDefiniteError: a covariance that no jitter helps.
        """
        inverse_KDD = inverse_cholesky(self.covariances_KDD.double())
        num_dims = inverse_KDD.shape[-1]
        log_det_K = inverse_KDD.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_weight_K = self.weights_K.double().clamp_min(torch.finfo(torch.float64).tiny).log()
        return Whitening(inverse_KDD, log_weight_K + log_det_K + tails.log_peak(num_dims, self.tail_dof))

    @cached_property
    def _product(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Float32 carries the product; what it multiplies is centred among the means first, with one centre
        # that is itself a float32, so that codes far from the origin keep their digits.
        centre_D = self.means_KD.double().mean(0).float()
        inverse_KDD = self.whitening.inverse_KDD
        offset_KD1 = inverse_KDD @ (self.means_KD.double() - centre_D.double())[:, :, None]
        # Whitened dimensions first, so that sums over them run along contiguous points.
        stacked_ED = inverse_KDD.transpose(0, 1).reshape(-1, centre_D.numel()).float()
        offset_E1 = offset_KD1.transpose(0, 1).reshape(-1, 1).float()
        return centre_D, stacked_ED, -offset_E1, self.whitening.log_scale_K.float()

    def log_joint_NK(self, x_ND: Tensor) -> Tensor:
        """`log (weight_k t(x_i; mu_k, Sigma_k))` (N, K) of codes (N, D), in float32.

        With `d^2` the squared distance `(x - mu)^T Sigma^-1 (x - mu)`, a Gaussian's falls with `d^2 / 2`, and
        that of Student's t with `(nu + D) / 2 log(1 + d^2 / nu)`.

        Matrix products against the K stacked whiteners, in pieces of bounded memory, and in blocks of
        whitened dimensions without the zeros of the triangles to their right.
        """
        centre_D, stacked_ED, offset_E1, log_scale_K = self._product
        num_clusters, num_dims = self.means_KD.shape
        out_NK = torch.empty(x_ND.shape[0], num_clusters, dtype=torch.float32, device=x_ND.device)
        elements = _CACHED_ELEMENTS if x_ND.device.type == "cpu" else _CHUNK_ELEMENTS
        step = max(1, elements // (num_clusters * min(num_dims, _BLOCK_DIMS)))
        for start in range(0, x_ND.shape[0], step):
            x_BD = (x_ND[start : start + step] - centre_D).float()
            square_KB = torch.zeros(num_clusters, len(x_BD), dtype=torch.float32, device=x_ND.device)
            for first in range(0, num_dims, _BLOCK_DIMS):
                last = min(first + _BLOCK_DIMS, num_dims)
                rows = slice(first * num_clusters, last * num_clusters)
                white_DKB = torch.addmm(offset_E1[rows], stacked_ED[rows, :last], x_BD[:, :last].T)
                square_KB += white_DKB.view(last - first, num_clusters, -1).square_().sum(0)
            out_NK[start : start + step] = log_scale_K - tails.log_fall(square_KB.T, num_dims, self.tail_dof)
        return out_NK

    def squares(self, log_joint: Tensor, index: Tensor | None = None) -> Tensor:
        """Squared distances `(x - mu)^T Sigma^-1 (x - mu)` of points whose log joint densities are given.

        Their means over the noise of the points: what a scatter holds, a distance has to hold too. Without
        it EM gave points of clusters narrower than the noise weights of 1.6 on the mean instead of 1.
        Shapes: (N, K), or (N, S) of S components for each point, and their index (N, S).

        >>> mixture = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1), tail_dof=4.0)
        >>> round(mixture.squares(mixture.log_joint_NK(torch.tensor([[3.0]]))).item(), 4)
        9.0
        """
        every = slice(None) if index is None else index
        fall = self.whitening.log_scale_K.to(log_joint)[every] - log_joint
        squares = tails.squares_of(fall, self.means_KD.shape[1], self.tail_dof).clamp_min_(0)
        return squares + self._noise_squares_K.to(squares)[every]

    @cached_property
    def _noise_squares_K(self) -> Tensor:
        """`tr(Sigma_k^-1 diag(noise))` (K,)."""
        return (self.whitening.inverse_KDD.square() * self.noise).sum((1, 2))

    def precisions(self, log_joint: Tensor, index: Tensor | None = None) -> Tensor | None:
        """What the points of `squares` count for in each component's M-step; None, one, for Gaussians.

        Shapes: as there.
        """
        if math.isinf(self.tail_dof):
            return None
        return tails.precisions(self.squares(log_joint, index), self.means_KD.shape[1], self.tail_dof)

    def log_prob(self, x_ND: Tensor) -> Tensor:
        """Log density (N,) of codes (N, D)."""
        return self.log_joint_NK(x_ND).logsumexp(1)

    def responsibilities_NK(self, x_ND: Tensor) -> Tensor:
        """Posterior probabilities of the components (N, K): the E-step.

        >>> mixture = Mixture(torch.ones(2) / 2, torch.tensor([[0.0], [2.0]]), torch.ones(2, 1, 1))
        >>> mixture.responsibilities_NK(torch.tensor([[1.0]])).tolist()
        [[0.5, 0.5]]
        """
        return self.log_joint_NK(x_ND).softmax(1)
