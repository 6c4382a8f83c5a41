"""Conjugate priors of a cluster's mean and covariance, and of the mixture's weights.

The paper's symbols: m = `mean_D`, kappa = `kappa`, nu = `nu`, Psi = `psi`, alpha = `alpha` (concentration of
the Dirichlet process). Every formula needs only `SufficientStats`, and is exact in the set's own mean.

Legend: N points, D dimensions, K sets, G values of a grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from deepdpm.checks import check_choices, check_least, check_positive
from deepdpm.linalg import cholesky, log_det_from_cholesky
from deepdpm.stats import SufficientStats

_LOG_PI = math.log(math.pi)
# Empirical Bayes: the values tried for nu above its smallest, and for kappa; the floor of Psi's diagonal.
_NU_STEPS = (0.0, *(2.0**power for power in range(11)))
_KAPPAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_RELATIVE_FLOOR = 1e-8

Hyperparameter = Literal["psi", "nu", "kappa", "tail_dof"]


@dataclass(frozen=True)
class NormalPrior(ABC):
    """What both priors share: `mu | Sigma ~ N(m, Sigma / kappa)`, and a Dirichlet prior of the weights.

    `fitted` names the hyperparameters that the data may change (`fit_empirical_bayes`; EM: `tail_dof`). With
    a `maximum_likelihood_floor` the M-step leaves the prior out (the authors' `use_priors = 0`) and adds the
    floor to the variances instead. `noise` is the variance that measuring a point adds to each column:
    wherever a scatter S of n points is used, it is `S + n diag(noise)`, its mean over the noise. So no
    cluster gains evidence without end from a column in which its points happen to be equal. `tail_dof` are
    the degrees of freedom of the mixture's components (`deepdpm.tails`).

    Shapes: mean_D (D,), psi, (D, D) or (D,), and noise, (D,) or one number for all columns, are float64;
    kappa > 0 and nu are numbers.
    """

    mean_D: Tensor
    kappa: float
    nu: float
    psi: Tensor
    alpha: float = 10.0
    dirichlet_count: float = 0.1
    fitted: tuple[Hyperparameter, ...] = ()
    maximum_likelihood_floor: float | None = None
    noise: Tensor | float = 0.0
    tail_dof: float = math.inf

    @property
    def num_dims(self) -> int:
        """D."""
        return self.mean_D.numel()

    @property
    @abstractmethod
    def smallest_nu(self) -> float:
        """The smallest nu with a prior mean of the covariance: the grid of empirical Bayes begins there."""

    @property
    @abstractmethod
    def _mode_offset(self) -> int:
        """What the joint mode of mean and covariance divides Psi by, beyond nu."""

    @abstractmethod
    def _matrices(self, psi: Tensor) -> Tensor:
        """Psi (or a stack of them) as full matrices (..., D, D)."""

    @abstractmethod
    def _psi_of(self, matrix_DD: Tensor) -> Tensor:
        """Full matrices (..., D, D) in the form of Psi."""

    @abstractmethod
    def _outer(self, offset_KD: Tensor) -> Tensor:
        """The outer products of offsets with themselves in the form of Psi, with a leading K."""

    @abstractmethod
    def _log_det(self, psi: Tensor) -> Tensor:
        """`log |Psi|` (...,)."""

    @abstractmethod
    def _log_gamma(self, half_nu: Tensor) -> Tensor:
        """The logarithm of the gamma function in the normaliser, elementwise."""

    @abstractmethod
    def _inverse(self, psi: Tensor) -> Tensor:
        """The inverse of Psi in the form of Psi."""

    @abstractmethod
    def _log_dets_of_nu(self, added: Tensor, factor_G: Tensor) -> Tensor:
        """`log |factor_g Psi + added_k|` (G, K)."""

    @abstractmethod
    def _log_dets_of_kappa(self, base: Tensor, offset_KD: Tensor, shrink_GK: Tensor) -> Tensor:
        """`log |base_k + shrink_gk offset_k offset_k^T|` (G, K)."""

    def weights_K(self, count_K: Tensor) -> Tensor:
        """Weights of the mixture, `(n_k / N + c) / sum_j (n_j / N + c)` (K,) (the authors' Dirichlet prior).

        >>> prior = NIW(torch.zeros(1).double(), 1.0, 3.0, torch.eye(1).double(), dirichlet_count=0.5)
        >>> prior.weights_K(torch.tensor([1.0, 3.0])).tolist()
        [0.375, 0.625]
        """
        raw_K = count_K / count_K.sum().clamp_min(1e-300) + self.dirichlet_count
        return raw_K / raw_K.sum().clamp_min(1e-300)

    def posterior_mean_KD(self, stats: SufficientStats) -> Tensor:
        """`m* = (kappa m + sum x) / (kappa + n)` of K sets, (K, D)."""
        return (self.kappa * self.mean_D + stats.sum_KD) / (self.kappa + stats.count_K)[:, None]

    def posterior_psi(self, stats: SufficientStats) -> Tensor:
        """`Psi* = Psi + S + kappa n / (kappa + n) (xbar - m)(xbar - m)^T` of K sets, with a leading K."""
        offset_KD = stats.mean_KD - self.mean_D
        shrink_K = self.kappa * stats.count_K / (self.kappa + stats.count_K)
        return self.psi + self.scatter(stats) + self._outer(offset_KD * shrink_K.sqrt()[:, None])

    def scatter(self, stats: SufficientStats) -> Tensor:
        """`S + n diag(noise)` of K sets in the form of Psi, with a leading K."""
        scatter_KDD = stats.scatter_KDD.clone()
        scatter_KDD.diagonal(dim1=-2, dim2=-1).add_(self.noise * stats.count_K[:, None])
        return self._psi_of(scatter_KDD)

    def posterior(self, stats: SufficientStats, k: int) -> Self:
        """The prior after set k has been seen: again a prior, with `kappa + n` and `nu + n`.

        >>> prior = NIW(torch.zeros(1).double(), 1.0, 3.0, torch.eye(1).double())
        >>> seen = prior.posterior(SufficientStats.from_labels(torch.ones(2, 1), torch.zeros(2).long(), 1), 0)
        >>> seen.kappa, seen.nu, round(seen.mean_D.item(), 4)
        (3.0, 5.0, 0.6667)
        """
        one = stats[k : k + 1]
        return replace(
            self,
            mean_D=self.posterior_mean_KD(one)[0],
            psi=self.posterior_psi(one)[0],
            kappa=self.kappa + one.count_K.item(),
            nu=self.nu + one.count_K.item(),
        )

    def map_estimate(self, stats: SufficientStats) -> tuple[Tensor, Tensor]:
        """MAP means (K, D) and covariances `Psi* / (nu + n + D + 2)` (K, D, D) of K weighted sets."""
        if self.maximum_likelihood_floor is not None:
            return self._maximum_likelihood(stats, self.maximum_likelihood_floor)
        psi = self._matrices(self.posterior_psi(stats))
        return self.posterior_mean_KD(stats), psi / (self.nu + stats.count_K + self._mode_offset)[
            :, None, None
        ]

    def _maximum_likelihood(self, stats: SufficientStats, floor: float) -> tuple[Tensor, Tensor]:
        occupied_K = stats.count_K > 0
        spread = self._matrices(self.scatter(stats)) / stats.count_K.clamp_min(1e-300)[:, None, None]
        spread = spread + floor * torch.eye(self.num_dims, dtype=spread.dtype, device=spread.device)
        means_KD = torch.where(occupied_K[:, None], stats.mean_KD, self.mean_D)
        return means_KD, torch.where(occupied_K[:, None, None], spread, self.mode_covariance_DD())

    def mode_covariance_DD(self) -> Tensor:
        """The covariance of a cluster without points, `Psi / (nu + D + 2)` (D, D)."""
        return self._matrices(self.psi) / (self.nu + self._mode_offset)

    def log_marginal(self, stats: SufficientStats) -> Tensor:
        """Log evidence `log p(set)` in nats of each of K sets, (K,); zero for an empty set.

        `-(n D / 2) log pi + logGamma_D(nu*/2) - logGamma_D(nu/2) + (nu/2) log|Psi| - (nu*/2) log|Psi*|
        + (D/2) (log kappa - log kappa*)` (Murphy 2007, eq. 266). NIG: the sum of this over dimensions, D = 1.
        """
        log_det_K = self._log_det(self.posterior_psi(stats))
        return self._log_marginal(stats.count_K, self.nu, self.kappa, self._log_det(self.psi), log_det_K)

    def _log_marginal(
        self, count_K: Tensor, nu: Tensor | float, kappa: Tensor | float, log_det: Tensor, log_det_K: Tensor
    ) -> Tensor:
        like: dict[str, Any] = {"dtype": count_K.dtype, "device": count_K.device}
        nu, kappa = torch.as_tensor(nu, **like), torch.as_tensor(kappa, **like)
        nu_K, kappa_K = nu + count_K, kappa + count_K
        return (
            -0.5 * self.num_dims * _LOG_PI * count_K
            + self._log_gamma(nu_K / 2)
            - self._log_gamma(nu / 2)
            + 0.5 * nu * log_det
            - 0.5 * nu_K * log_det_K
            + 0.5 * self.num_dims * (kappa.log() - kappa_K.log())
        )


@dataclass(frozen=True)
class NIW(NormalPrior):
    """Normal-Inverse-Wishart prior: full covariances, `Sigma ~ IW(nu, Psi)` (paper, section 4.2).

    Shapes: mean_D (D,), psi (D, D), both float64; kappa > 0 and nu > D - 1 are numbers.

    >>> prior = NIW(torch.zeros(2).double(), kappa=1.0, nu=4.0, psi=torch.eye(2).double())
    >>> stats = SufficientStats.from_labels(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]), 1)
    >>> round(prior.log_marginal(stats).item(), 4)
    -5.5853
    """

    @property
    def smallest_nu(self) -> float:
        return self.num_dims + 2.0

    @property
    def _mode_offset(self) -> int:
        return self.num_dims + 2

    def _matrices(self, psi: Tensor) -> Tensor:
        return psi

    def _psi_of(self, matrix_DD: Tensor) -> Tensor:
        return matrix_DD

    def _outer(self, offset_KD: Tensor) -> Tensor:
        return offset_KD[:, :, None] * offset_KD[:, None, :]

    def _log_det(self, psi: Tensor) -> Tensor:
        return log_det_from_cholesky(cholesky(psi))

    def _log_gamma(self, half_nu: Tensor) -> Tensor:
        return torch.mvlgamma(half_nu, self.num_dims)

    def _inverse(self, psi: Tensor) -> Tensor:
        return torch.cholesky_inverse(cholesky(psi))

    def _log_dets_of_nu(self, added: Tensor, factor_G: Tensor) -> Tensor:
        # In Psi's own axes one set of eigenvalues serves the grid: |c Psi + A| = |Psi| prod (c + lambda).
        factor_KDD = cholesky(self.psi).expand(added.shape[0], -1, -1)
        half_KDD = torch.linalg.solve_triangular(factor_KDD, added, upper=False)
        white_KDD = torch.linalg.solve_triangular(factor_KDD, half_KDD.mT, upper=False)
        lambda_KD = torch.linalg.eigvalsh((white_KDD + white_KDD.mT) / 2).clamp_min(0)
        return self._log_det(self.psi) + (factor_G[:, None, None] + lambda_KD).log().sum(2)

    def _log_dets_of_kappa(self, base: Tensor, offset_KD: Tensor, shrink_GK: Tensor) -> Tensor:
        factor_KDD = cholesky(base)
        white_KD1 = torch.linalg.solve_triangular(factor_KDD, offset_KD[:, :, None], upper=False)
        return log_det_from_cholesky(factor_KDD) + (shrink_GK * white_KD1.square().sum((1, 2))).log1p()


@dataclass(frozen=True)
class NIG(NormalPrior):
    """Normal-Inverse-Gamma in each dimension: diagonal covariances, `sigma_d^2 ~ IG(nu / 2, psi_d / 2)`.

    In the usual symbols V = 1 / kappa, a = nu / 2 and b = psi / 2 = nu sigma0^2 / 2; so each dimension is a
    Normal-Inverse-Wishart of D = 1. Shapes: mean_D (D,), psi (D,), both float64.

    >>> prior = NIG(torch.zeros(2).double(), kappa=1.0, nu=3.0, psi=torch.ones(2).double())
    >>> prior.mode_covariance_DD().diagonal().tolist()
    [0.16666666666666666, 0.16666666666666666]
    """

    @property
    def smallest_nu(self) -> float:
        return 3.0

    @property
    def _mode_offset(self) -> int:
        return 3

    def _matrices(self, psi: Tensor) -> Tensor:
        return torch.diag_embed(psi)

    def _psi_of(self, matrix_DD: Tensor) -> Tensor:
        return matrix_DD.diagonal(dim1=-2, dim2=-1)

    def _outer(self, offset_KD: Tensor) -> Tensor:
        return offset_KD.square()

    def _log_det(self, psi: Tensor) -> Tensor:
        return psi.log().sum(-1)

    def _log_gamma(self, half_nu: Tensor) -> Tensor:
        return self.num_dims * torch.lgamma(half_nu)

    def _inverse(self, psi: Tensor) -> Tensor:
        return psi.reciprocal()

    def _log_dets_of_nu(self, added: Tensor, factor_G: Tensor) -> Tensor:
        return (factor_G[:, None, None] * self.psi + added).log().sum(2)

    def _log_dets_of_kappa(self, base: Tensor, offset_KD: Tensor, shrink_GK: Tensor) -> Tensor:
        return (base + shrink_GK[:, :, None] * offset_KD.square()).log().sum(2)


def fit_empirical_bayes(prior: NormalPrior, stats: SufficientStats, iters: int = 1) -> NormalPrior:
    """The prior whose hyperparameters maximise `sum_k log p(set_k)`, the evidence of the K sets.

    In turn, `iters` times: Psi by two steps of `Psi = nu K (sum_k nu*_k inv(Psi*_k))^-1`, whose fixed point
    has no gradient; nu over a grid (Psi grows with it, so the mean covariance stays); kappa over a grid.
    Only those that `prior.fitted` names are changed. Sets below two points say nothing of a covariance and
    are left out. All is relative to the data: rescaled data give the rescaled Psi.

    >>> x_ND = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    >>> stats = SufficientStats.from_labels(x_ND, (x_ND[:, 0] > 0).long(), 2)
    >>> free = ("psi", "nu", "kappa")
    >>> wide = NIW(torch.zeros(1).double(), 0.01, 3.0, 3 * torch.eye(1).double(), fitted=free)
    >>> fitted = fit_empirical_bayes(wide, stats)
    >>> bool(fitted.log_marginal(stats).sum() > wide.log_marginal(stats).sum())
    True
    """
    stats = stats[stats.count_K >= 2]
    if not prior.fitted or stats.num_clusters == 0:
        return prior
    floor = _floor(prior, stats.total())
    if "psi" in prior.fitted:
        prior = _better_start(prior, stats, floor)
    for _ in range(iters):
        if "psi" in prior.fitted:
            prior = _fit_psi(_fit_psi(prior, stats, floor), stats, floor)
        if "nu" in prior.fitted:
            prior = _fit_nu(prior, stats)
        if "kappa" in prior.fitted:
            prior = _fit_kappa(prior, stats)
    return prior


def _floor(prior: NormalPrior, total: SufficientStats) -> Tensor:
    """What is added to Psi, so that no direction is without width: a little of the mean variance."""
    variance = (total.scatter_KDD[0] / total.count_K).diagonal().mean()
    floor = _RELATIVE_FLOOR * torch.where(variance > 0, variance, torch.ones_like(variance))
    return floor * prior._psi_of(torch.eye(prior.num_dims, dtype=floor.dtype, device=floor.device))


def _better_start(prior: NormalPrior, stats: SufficientStats, floor: Tensor) -> NormalPrior:
    # From a Psi of the wrong size the fixed point moves slowly where sets are small: offer it the pooled
    # covariance within the sets.
    within = prior.scatter(stats).sum(0) / stats.count_K.sum()
    pooled = replace(prior, psi=prior.nu * within + floor)
    return pooled if pooled.log_marginal(stats).sum() > prior.log_marginal(stats).sum() else prior


def _fit_psi(prior: NormalPrior, stats: SufficientStats, floor: Tensor) -> NormalPrior:
    inverse = prior._inverse(prior.posterior_psi(stats))
    nu_K = (prior.nu + stats.count_K).view(-1, *[1] * (inverse.ndim - 1))
    psi = prior.nu * stats.num_clusters * prior._inverse((nu_K * inverse).sum(0))
    return replace(prior, psi=((psi + psi.mT) / 2 if psi.ndim == 2 else psi) + floor)


def _fit_nu(prior: NormalPrior, stats: SufficientStats) -> NormalPrior:
    nu_G = prior.smallest_nu + torch.tensor(_NU_STEPS, dtype=torch.float64, device=prior.psi.device)
    factor_G, num_dims = nu_G / prior.nu, prior.num_dims
    log_dets_GK = prior._log_dets_of_nu(prior.posterior_psi(stats) - prior.psi, factor_G)
    log_det_G = prior._log_det(prior.psi) + num_dims * factor_G.log()
    evidence_GK = prior._log_marginal(
        stats.count_K, nu_G[:, None], prior.kappa, log_det_G[:, None], log_dets_GK
    )
    nu = nu_G[evidence_GK.sum(1).argmax()].item()
    return replace(prior, nu=nu, psi=prior.psi * (nu / prior.nu))


def _fit_kappa(prior: NormalPrior, stats: SufficientStats) -> NormalPrior:
    kappa_G = torch.tensor(_KAPPAS, dtype=torch.float64, device=prior.psi.device)[:, None]
    shrink_GK = kappa_G * stats.count_K / (kappa_G + stats.count_K)
    base = prior.psi + prior.scatter(stats)
    log_dets_GK = prior._log_dets_of_kappa(base, stats.mean_KD - prior.mean_D, shrink_GK)
    evidence_GK = prior._log_marginal(
        stats.count_K, prior.nu, kappa_G, prior._log_det(prior.psi), log_dets_GK
    )
    return replace(prior, kappa=kappa_G[evidence_GK.sum(1).argmax(), 0].item())


PriorKind = Literal["niw", "nig"]
ScaleChoice = Literal["empirical", "isotropic", "data_std", "iso_005", "iso_001", "iso_0001"]
_FIXED_SCALES = {"iso_005": 0.005, "iso_001": 0.001, "iso_0001": 0.0001}


@dataclass(frozen=True)
class PriorSettings:
    """Say which prior the clusters have; `make` builds it from the data's own statistics.

    Attributes:
        kind: "niw" (full covariances) or "nig" (diagonal ones).
        alpha: concentration of the Dirichlet process, above 0.
        nu: degrees of freedom; None takes D + 2, and lets empirical Bayes choose.
        kappa: how many points the prior mean counts for; None takes 1e-4, and lets empirical Bayes choose.
        scale: where Psi comes from. "empirical" fits it to the clusters; "isotropic" is `sigma_scale * I`,
            "data_std" `sigma_scale * diag(std of each dimension)`; "iso_005", "iso_001" and "iso_0001" are
            .005, .001 and .0001 times I. For "nig" these are sigma0^2, and Psi is nu times that.
        sigma_scale: the factor s of "isotropic" and "data_std".
        sigma_scale_step: after n earlier clusterings (joint features) s is divided by n times this.
        pi_prior: "uniform" smooths the weights by `dirichlet_count`; "none" leaves them as they are.
        dirichlet_count: the smoothing count c of the weights, in shares of the data (the authors' 0.1
            evens out unequal clusters).
        use_prior: False takes maximum-likelihood estimates in the M-step. Moves still use the prior.
        cov_const: what is then added to each variance.
        noise: of measurement, in each column: its variance over the squared difference to the nearest point
            (`deepdpm.stats.squared_spacing`). By default it is half as long as that difference: anything
            smaller says nothing of clusters, but without noise it decides the evidence (pixels that are
            blank in all images but a few, whole numbers, columns that nearly repeat each other). 0: none.
        tail_dof: degrees of freedom of the clusters' tails: Student's t of so many, above 0, or with
            infinity (`inf` on the command line, `.inf` in YAML) Gaussians. None fits them as searches go;
            under published moves it has Gaussians.

    Raises:
        ValueError: a value out of range, naming the setting.

    >>> x_ND = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> total = SufficientStats.from_labels(x_ND, torch.zeros(4).long(), 1)
    >>> PriorSettings(scale="isotropic", sigma_scale=0.5).make(total).psi.tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    kind: PriorKind = "niw"
    alpha: float = 10.0
    nu: float | None = None
    kappa: float | None = None
    scale: ScaleChoice = "empirical"
    sigma_scale: float = 0.005
    sigma_scale_step: float = 1.0
    pi_prior: Literal["uniform", "none"] = "uniform"
    dirichlet_count: float = 1e-6
    use_prior: bool = True
    cov_const: float = 0.005
    noise: float = 0.25
    tail_dof: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, "prior")
        check_positive(self, "prior", ("alpha", "kappa", "sigma_scale", "sigma_scale_step", "cov_const"))
        if self.tail_dof is not None and not self.tail_dof > 0:
            raise ValueError(
                f"prior.tail_dof is {self.tail_dof:g}: give a number above 0, inf for Gaussians, or null to "
                "fit it."
            )
        check_least(self, "prior", {"dirichlet_count": 0, "noise": 0})

    def make(
        self, total: SufficientStats, earlier_clusterings: int = 0, squared_spacing: Tensor | float = 0.0
    ) -> NormalPrior:
        """The prior for data with these statistics (one set, all points) and this squared spacing (D,).

        Raises:
            ValueError: nu below D + 1.
        """
        assert total.num_clusters == 1
        num_dims = total.num_dims
        if self.nu is not None and not num_dims + 1 <= self.nu < math.inf:
            raise ValueError(
                f"prior.nu is {self.nu:g}, but codes of {num_dims} dimensions need at least {num_dims + 1}: "
                "raise it, or leave prior.nu null for D + 2."
            )
        nu = num_dims + 2.0 if self.nu is None else float(self.nu)
        empirical = self.scale == "empirical"
        free: list[Hyperparameter] = ["psi"]
        free += ["nu"] if self.nu is None else []
        free += ["kappa"] if self.kappa is None else []
        eye_DD = torch.eye(num_dims, dtype=torch.float64, device=total.count_K.device)
        family = NIW if self.kind == "niw" else NIG
        prior: NormalPrior = family(
            mean_D=total.mean_KD[0],
            kappa=1e-4 if self.kappa is None else float(self.kappa),
            nu=nu,
            psi=eye_DD if self.kind == "niw" else eye_DD.diagonal(),
            alpha=self.alpha,
            dirichlet_count=self.dirichlet_count if self.pi_prior == "uniform" else 0.0,
            fitted=(*(free if empirical else ()), *(("tail_dof",) if self.tail_dof is None else ())),
            maximum_likelihood_floor=None if self.use_prior else self.cov_const,
            noise=self.noise * squared_spacing,
            tail_dof=math.inf if self.tail_dof is None else float(self.tail_dof),
        )
        covariance_DD = total.scatter_KDD[0] / total.count_K.clamp_min(1)
        if empirical:
            return replace(prior, psi=nu * prior._psi_of(covariance_DD) + _floor(prior, total))
        steps = max(1.0, earlier_clusterings * self.sigma_scale_step) if earlier_clusterings else 1.0
        psi_DD = self._scale_DD(covariance_DD) / steps
        return replace(prior, psi=prior._psi_of(psi_DD) * (1.0 if self.kind == "niw" else nu))

    def _scale_DD(self, covariance_DD: Tensor) -> Tensor:
        if self.scale == "data_std":
            # A constant column has no width: it gets the mean of the others.
            std_D = covariance_DD.diagonal().clamp_min(0).sqrt()
            mean = torch.where(std_D.mean() > 0, std_D.mean(), torch.ones_like(std_D.mean()))
            return self.sigma_scale * torch.diag_embed(torch.where(std_D > 0, std_D, mean))
        scale = _FIXED_SCALES.get(self.scale, self.sigma_scale)
        return scale * torch.eye(len(covariance_DD), dtype=torch.float64, device=covariance_DD.device)
