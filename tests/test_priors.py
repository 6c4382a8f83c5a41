"""The evidence against chains of predictive densities; empirical Bayes against the evidence it maximises."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepdpm.priors import NIG, NIW, NormalPrior, PriorSettings, fit_empirical_bayes
from deepdpm.stats import SufficientStats

N, D, K = 40, 3, 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: type[NormalPrior]) -> NormalPrior:
    root = draw(3, D, D)
    psi = root @ root.T + torch.eye(D)
    return kind(mean_D=draw(4, D), kappa=0.3, nu=D + 2.5, psi=psi if kind is NIW else psi.diagonal())


def one(x_ND: Tensor) -> SufficientStats:
    return SufficientStats.from_labels(x_ND, torch.zeros(len(x_ND), dtype=torch.long), 1)


def clusters(seed: int = 0, scale: float = 1.0) -> SufficientStats:
    x_ND, labels_N = draw(seed, 400, D), torch.arange(400) % K
    centres_KD = 5 * draw(seed + 1, K, D)
    return SufficientStats.from_labels(scale * (x_ND + centres_KD[labels_N]), labels_N, K)


def log_student_t(x_D: Tensor, freedom: float, mean_D: Tensor, shape_DD: Tensor) -> float:
    dims = len(x_D)
    distance = (x_D - mean_D) @ torch.linalg.solve(shape_DD, x_D - mean_D)
    return (
        math.lgamma((freedom + dims) / 2)
        - math.lgamma(freedom / 2)
        - dims / 2 * math.log(freedom * math.pi)
        - torch.logdet(shape_DD).item() / 2
        - (freedom + dims) / 2 * math.log1p(distance.item() / freedom)
    )


def log_predictive(prior: NormalPrior, x_D: Tensor) -> float:
    widening = (prior.kappa + 1) / prior.kappa
    if isinstance(prior, NIW):
        freedom = prior.nu - D + 1
        return log_student_t(x_D, freedom, prior.mean_D, prior.psi * widening / freedom)
    shapes_D = prior.psi * widening / prior.nu
    return sum(
        log_student_t(x_D[d : d + 1], prior.nu, prior.mean_D[d : d + 1], shapes_D[d].view(1, 1))
        for d in range(D)
    )


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_evidence_is_the_chain_of_student_t_predictives(kind: type[NormalPrior]) -> None:
    prior, x_ND = make(kind), draw(0, N, D)
    chain = 0.0
    for n in range(N):
        posterior = prior.posterior(one(x_ND[:n]), 0) if n else prior
        chain += log_predictive(posterior, x_ND[n])
    assert prior.log_marginal(one(x_ND)).item() == pytest.approx(chain, abs=1e-8)


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_evidence_of_an_empty_set_is_zero_and_order_does_not_matter(kind: type[NormalPrior]) -> None:
    prior, stats = make(kind), clusters()
    empty = SufficientStats.zeros(1, D)
    assert prior.log_marginal(empty).item() == pytest.approx(0, abs=1e-10)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(prior.log_marginal(stats[order]), prior.log_marginal(stats)[order])


def test_nig_is_niw_in_one_dimension() -> None:
    x_N1 = draw(1, N, 1)
    arguments: dict[str, Any] = {"mean_D": torch.zeros(1).double(), "kappa": 0.5, "nu": 4.0}
    wishart, gamma = NIW(**arguments, psi=torch.eye(1).double()), NIG(**arguments, psi=torch.ones(1).double())
    torch.testing.assert_close(wishart.log_marginal(one(x_N1)), gamma.log_marginal(one(x_N1)))
    torch.testing.assert_close(wishart.map_estimate(one(x_N1)), gamma.map_estimate(one(x_N1)))


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_the_map_estimate_is_the_mode_of_the_posterior(kind: type[NormalPrior]) -> None:
    prior, stats = make(kind), one(draw(5, N, D))
    posterior = prior.posterior(stats, 0)

    def log_density(mean_D: Tensor, root: Tensor) -> Tensor:
        covariance = root @ root.T if kind is NIW else torch.diag(root.diagonal().square())
        precision = torch.linalg.inv(covariance)
        offset = mean_D - posterior.mean_D
        psi = posterior.psi if kind is NIW else torch.diag(posterior.psi)
        power = posterior.nu + (D + 2 if kind is NIW else 3)
        quadratic = posterior.kappa * offset @ precision @ offset + torch.trace(psi @ precision)
        return -power / 2 * torch.logdet(covariance) - quadratic / 2

    means_KD, covariances_KDD = prior.map_estimate(stats)
    mean_D = means_KD[0].clone().requires_grad_()
    root = torch.linalg.cholesky(covariances_KDD[0]).requires_grad_()
    log_density(mean_D, root).backward()
    assert mean_D.grad is not None
    assert root.grad is not None
    assert mean_D.grad.abs().max() < 1e-9
    assert root.grad.abs().max() < 1e-9


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_noise_is_what_points_scattered_by_it_would_give(kind: type[NormalPrior]) -> None:
    # Each point as 2 D of weight 1 / (2 D), shifted along the axes: their variance is the noise's.
    noise_D, x_ND = torch.linspace(0.1, 0.7, D).double(), draw(8, N, D)
    axes_DD = torch.diag((D * noise_D).sqrt())
    step_SD = torch.cat([axes_DD, -axes_DD])
    scattered_MD = (x_ND[:, None] + step_SD).reshape(-1, D)
    scattered = SufficientStats.from_weights(scattered_MD, torch.full((2 * D * N, 1), 1 / (2 * D)))
    plain, noisy = make(kind), replace(make(kind), noise=noise_D)
    torch.testing.assert_close(noisy.log_marginal(one(x_ND)), plain.log_marginal(scattered))
    for got, expected in zip(noisy.map_estimate(one(x_ND)), plain.map_estimate(scattered), strict=True):
        torch.testing.assert_close(got, expected)
    free = ("psi", "nu", "kappa")
    fitted = fit_empirical_bayes(replace(noisy, fitted=free), one(x_ND))
    expected = fit_empirical_bayes(replace(plain, fitted=free), scattered)
    torch.testing.assert_close(fitted.psi, expected.psi)
    assert (fitted.nu, fitted.kappa) == (expected.nu, expected.kappa)


def test_a_cluster_without_points_has_the_mode_of_the_prior() -> None:
    for prior in (make(NIW), make(NIG)):
        means_KD, covariances_KDD = prior.map_estimate(SufficientStats.zeros(2, D))
        torch.testing.assert_close(means_KD[1], prior.mean_D)
        torch.testing.assert_close(covariances_KDD[1], prior.mode_covariance_DD())


def test_without_a_prior_the_estimate_is_maximum_likelihood() -> None:
    x_ND = draw(6, N, D)
    prior = replace(make(NIW), maximum_likelihood_floor=0.5)
    means_KD, covariances_KDD = prior.map_estimate(
        SufficientStats.cat([one(x_ND), SufficientStats.zeros(1, D)])
    )
    torch.testing.assert_close(means_KD[0], x_ND.mean(0))
    expected = torch.cov(x_ND.T, correction=0) + 0.5 * torch.eye(D)
    torch.testing.assert_close(covariances_KDD[0], expected)
    torch.testing.assert_close(covariances_KDD[1], prior.mode_covariance_DD())


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_grids_of_empirical_bayes_are_the_evidence_itself(kind: type[NormalPrior]) -> None:
    prior, stats = make(kind), clusters()
    for fitted, values in (
        ("nu", [prior.smallest_nu + v for v in (0, 1, 16)]),
        ("kappa", [1e-4, 1e-2, 1e-1]),
    ):
        best = fit_empirical_bayes(replace(prior, fitted=(fitted,)), stats)
        scaled = [
            replace(prior, **{fitted: v}, psi=prior.psi * (v / prior.nu if fitted == "nu" else 1))
            for v in values
        ]
        top = max(p.log_marginal(stats).sum().item() for p in scaled)
        assert best.log_marginal(stats).sum().item() >= top - 1e-8


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_empirical_bayes_finds_no_direction_of_more_evidence(kind: type[NormalPrior]) -> None:
    stats = clusters()
    fitted = fit_empirical_bayes(replace(make(kind), fitted=("psi",)), stats, iters=50)
    psi = fitted.psi.clone().requires_grad_()
    replace(fitted, psi=psi).log_marginal(stats).sum().backward()
    assert psi.grad is not None
    assert (psi.grad * psi).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("kind", ["niw", "nig"])
def test_the_default_prior_follows_the_scale_of_the_data(kind: Any, scale: float) -> None:
    fitted = []
    for stats in (clusters(), clusters(scale=scale)):
        prior = PriorSettings(kind=kind).make(stats.total())
        fitted.append(fit_empirical_bayes(prior, stats, iters=3))
    assert fitted[0].nu == fitted[1].nu
    assert fitted[0].kappa == fitted[1].kappa
    torch.testing.assert_close(fitted[1].psi, fitted[0].psi * scale**2, rtol=1e-6, atol=0)


def test_what_the_user_sets_stays() -> None:
    stats = clusters()
    settings = PriorSettings(nu=9.0, kappa=0.02)
    prior = settings.make(stats.total())
    fitted = fit_empirical_bayes(prior, stats, iters=2)
    assert (fitted.nu, fitted.kappa) == (9.0, 0.02)
    assert not torch.equal(fitted.psi, prior.psi)
    fixed = PriorSettings(scale="isotropic").make(stats.total())
    assert fit_empirical_bayes(fixed, stats) is fixed


def test_scales_of_psi() -> None:
    stats = clusters()
    std_D = (stats.total().scatter_KDD[0] / stats.total().count_K).diagonal().sqrt()
    eye = torch.eye(D).double()
    total = stats.total()
    torch.testing.assert_close(PriorSettings(scale="isotropic", sigma_scale=0.05).make(total).psi, 0.05 * eye)
    torch.testing.assert_close(PriorSettings(scale="iso_0001").make(total).psi, 1e-4 * eye)
    data_std = PriorSettings(scale="data_std", sigma_scale=2.0)
    torch.testing.assert_close(data_std.make(total).psi, 2 * torch.diag(std_D))
    stepped = replace(data_std, sigma_scale_step=2.0).make(total, earlier_clusterings=3)
    torch.testing.assert_close(stepped.psi, 2 * torch.diag(std_D) / 6)
    gamma = PriorSettings(kind="nig", scale="iso_005", nu=7.0).make(total)
    torch.testing.assert_close(gamma.psi, 7 * 0.005 * torch.ones(D).double())


def test_weights_are_smoothed_by_the_dirichlet_count() -> None:
    count_K = torch.tensor([1.0, 3.0, 0.0]).double()
    smoothed = PriorSettings(dirichlet_count=0.1).make(clusters().total()).weights_K(count_K)
    torch.testing.assert_close(smoothed, torch.tensor([0.35, 0.85, 0.1]).double() / 1.3)
    plain = PriorSettings(pi_prior="none").make(clusters().total()).weights_K(count_K)
    torch.testing.assert_close(plain, count_K / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gamma"}, "prior.kind must be one of niw, nig"),
        ({"scale": "huge"}, "prior.scale must be one of"),
        ({"kappa": 0.0}, "prior.kappa must be a positive number"),
        ({"alpha": -1.0}, "prior.alpha must be a positive number"),
        ({"dirichlet_count": -0.1}, "prior.dirichlet_count must be at least 0"),
        ({"noise": -0.1}, "prior.noise must be at least 0"),
        ({"tail_dof": 0.0}, "prior.tail_dof is 0: give a number above 0"),
        ({"tail_dof": math.nan}, "prior.tail_dof is nan: give a number above 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorSettings(**settings)


def test_nu_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prior.nu is 3.5, but codes of 3 dimensions need at least 4"):
        PriorSettings(nu=3.5).make(clusters().total())


@pytest.mark.parametrize("kind", ["niw", "nig"])
def test_degenerate_data_have_a_prior(kind: Any) -> None:
    constant = one(torch.ones(10, D))
    lines = SufficientStats.from_labels(draw(0, 20, 1) * torch.ones(D), torch.arange(20) % 2, 2)
    for stats in (constant, lines):
        prior = fit_empirical_bayes(PriorSettings(kind=kind).make(stats.total()), stats, iters=3)
        assert torch.isfinite(prior.log_marginal(stats)).all()
