"""Student's t against scipy.stats, its precisions by quadrature, and EM that ends where nothing is gained."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from deepdpm import tails
from deepdpm.mixture import Mixture
from deepdpm.partition import evidence, expectation_maximisation
from deepdpm.priors import PriorSettings
from deepdpm.stats import SufficientStats

D = 3
DOFS = (1.0, 4.0, 30.0, math.inf)


def t_points(num_points: int, dof: float, seed: int = 0) -> Tensor:
    """Points (N, D) of Student's t; N Gaussians if nu is infinite."""
    x_ND = stats.multivariate_t(np.zeros(D), np.eye(D), dof, seed=seed).rvs(num_points)
    return torch.from_numpy(np.asarray(x_ND, dtype=np.float32))


def clusters(num_clusters: int, each: int, dof: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels_N = torch.arange(num_clusters).repeat_interleave(each)
    centres_KD = 12 * torch.stack([torch.arange(num_clusters) % 3, torch.arange(num_clusters) // 3], 1)
    x_ND = t_points(len(labels_N), dof, seed)
    x_ND[:, :2] += centres_KD[labels_N]
    return x_ND, labels_N


@pytest.mark.parametrize("dof", DOFS)
def test_densities_are_those_of_scipy(dof: float) -> None:
    generator = torch.Generator().manual_seed(0)
    means_KD = torch.randn(2, D, generator=generator).double()
    roots_KDD = torch.randn(2, D, D, generator=generator).double()
    covariances_KDD = roots_KDD @ roots_KDD.mT + torch.eye(D)
    mixture = Mixture(torch.tensor([0.3, 0.7]).double(), means_KD, covariances_KDD, dof)
    x_ND = 5 * torch.randn(50, D, generator=generator)
    expected_NK = [
        stats.multivariate_t(mean, cov, dof).logpdf(x_ND.double()) + math.log(weight)
        for mean, cov, weight in zip(means_KD, covariances_KDD, (0.3, 0.7), strict=True)
    ]
    log_joint_NK = mixture.log_joint_NK(x_ND)
    np.testing.assert_allclose(log_joint_NK, np.stack(expected_NK, 1), rtol=1e-4, atol=1e-4)
    offset_NKD = x_ND[:, None].double() - means_KD
    squares_NK = torch.einsum("nkd,kde,nke->nk", offset_NKD, covariances_KDD.inverse(), offset_NKD).float()
    torch.testing.assert_close(mixture.squares(log_joint_NK), squares_NK, rtol=1e-3, atol=1e-3)
    index_N1 = log_joint_NK.argmin(1, keepdim=True)
    some_N1 = mixture.squares(log_joint_NK.gather(1, index_N1), index_N1)
    torch.testing.assert_close(some_N1, squares_NK.gather(1, index_N1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dof", [2.0, 7.0])
@pytest.mark.parametrize("square", [0.1, 3.0, 60.0])
def test_precision_and_its_evidence_are_those_of_the_posterior_of_u(dof: float, square: float) -> None:
    prior = stats.gamma(dof / 2, scale=2 / dof)
    posterior = stats.gamma((dof + D) / 2, scale=2 / (dof + square))

    def mean_of(value: object) -> float:
        return integrate.quad(lambda u: posterior.pdf(u) * value(u), 0, math.inf, limit=200)[0]  # type: ignore[operator]

    squares = torch.tensor([square]).double()
    assert tails.precisions(squares, D, dof).item() == pytest.approx(mean_of(lambda u: u), rel=1e-5)
    divergence = mean_of(lambda u: posterior.logpdf(u) - prior.logpdf(u))
    expected = 0.5 * D * mean_of(math.log) - divergence
    assert tails.log_scale_evidence(squares, D, dof).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_squared_distances_are_means_over_the_noise_of_points() -> None:
    generator = torch.Generator().manual_seed(1)
    root_DD = torch.randn(D, D, generator=generator).double()
    noise_D = torch.tensor([0.0, 0.5, 3.0]).double()
    mixture = Mixture(torch.ones(1), torch.zeros(1, D), (root_DD @ root_DD.mT + torch.eye(D))[None], 4.0)
    x_ND = torch.randn(20, D, generator=generator)
    # 2 D points about each have the moments of the noise.
    step_SD = torch.cat([torch.diag((D * noise_D).sqrt()), -torch.diag((D * noise_D).sqrt())]).float()
    about_MD = (x_ND[:, None] + step_SD).reshape(-1, D)
    expected_N = mixture.squares(mixture.log_joint_NK(about_MD)).view(20, 2 * D).mean(1)
    noisy = replace(mixture, noise=noise_D)
    torch.testing.assert_close(
        noisy.squares(noisy.log_joint_NK(x_ND))[:, 0], expected_N, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dof", [2.0, 5.0, math.inf])
def test_evidence_of_one_cluster_is_below_the_integral_over_mean_and_variance(dof: float) -> None:
    x_N1 = torch.tensor([[-1.2], [-0.4], [0.1], [0.3], [0.9], [4.0]]).double()
    one_N = torch.zeros(6, dtype=torch.long)
    settings = PriorSettings(tail_dof=dof, scale="isotropic", sigma_scale=1.0, kappa=0.3, nu=4.0, noise=0)
    prior = settings.make(SufficientStats.from_labels(x_N1, one_N, 1))
    partition = expectation_maximisation(x_N1, one_N, prior, 100)
    label_evidence = math.log(prior.alpha) + math.lgamma(6)

    mean_A1, variance_B = np.linspace(-15, 15, 3001)[:, None], np.exp(np.linspace(-8, 12, 1001))
    likelihood_AB = np.prod([stats.t(dof, mean_A1, variance_B**0.5).pdf(x) for x in x_N1[:, 0].tolist()], 0)
    of_mean_AB = stats.norm(prior.mean_D.item(), (variance_B / prior.kappa) ** 0.5).pdf(mean_A1)
    of_variance_B = stats.invgamma(prior.nu / 2, scale=0.5).pdf(variance_B) * variance_B
    joint_AB = likelihood_AB * of_mean_AB * of_variance_B
    steps = (mean_A1[1, 0] - mean_A1[0, 0]) * np.log(variance_B[1] / variance_B[0])
    exact = math.log(joint_AB.sum() * steps)
    bound = evidence(partition) - label_evidence
    assert bound == pytest.approx(exact, abs=1e-3) if math.isinf(dof) else exact - 1 < bound < exact


@pytest.mark.parametrize(("dof", "low", "high"), [(1.0, 1, 1), (4.0, 3, 6), (math.inf, 64, math.inf)])
def test_the_degrees_of_freedom_that_made_points_are_found(dof: float, low: float, high: float) -> None:
    squares_N = t_points(5000, dof).double().square().sum(1)
    assert low <= tails.fit_dof(squares_N, torch.ones(5000), D) <= high
    # Weights count: those of other points do not.
    both_M = torch.cat([squares_N, 1e4 * squares_N])
    assert low <= tails.fit_dof(both_M, (torch.arange(10_000) < 5000).float(), D) <= high


@pytest.mark.parametrize("dof", [3.0, math.inf])
def test_em_ends_where_the_likelihood_has_no_slope(dof: float) -> None:
    """By autograd, in means and covariances of three clusters that overlap in their tails."""
    x_ND, labels_N = clusters(3, 300, 3.0)
    prior = replace(
        PriorSettings(tail_dof=dof, use_prior=False, pi_prior="none", noise=0).make(
            SufficientStats.from_labels(x_ND, 0 * labels_N, 1)
        ),
        maximum_likelihood_floor=0.0,
    )
    mixture = expectation_maximisation(x_ND, labels_N, prior, 200).mixture
    means_KD = mixture.means_KD.clone().requires_grad_()
    roots_KDD = torch.linalg.cholesky(mixture.covariances_KDD).requires_grad_()
    log_joint = []
    for mean_D, root_DD, weight in zip(means_KD, roots_KDD, mixture.weights_K, strict=True):
        white_ND = torch.linalg.solve_triangular(root_DD, (x_ND.double() - mean_D).T, upper=False).T
        fall_N = tails.log_fall(white_ND.square().sum(1), D, dof)
        peak = tails.log_peak(D, dof) - root_DD.diagonal().log().sum() + weight.log()
        log_joint.append(peak - fall_N)
    torch.stack(log_joint, 1).logsumexp(1).mean().backward()  # type: ignore[no-untyped-call]
    assert means_KD.grad is not None
    assert roots_KDD.grad is not None
    assert means_KD.grad.abs().max() < 1e-5
    assert roots_KDD.grad.tril().abs().max() < 1e-5


def test_tails_are_fitted_only_where_they_are_free() -> None:
    x_ND, labels_N = clusters(3, 500, 3.0)
    total = SufficientStats.from_labels(x_ND, 0 * labels_N, 1)
    free, gaussian, fixed = (PriorSettings(tail_dof=dof).make(total) for dof in (None, math.inf, 7.5))
    found = [expectation_maximisation(x_ND, labels_N, prior, 10) for prior in (free, gaussian, fixed)]
    assert found[0].mixture.tail_dof in (2.0, 3.0, 4.0)
    assert [partition.mixture.tail_dof for partition in found[1:]] == [math.inf, 7.5]
    assert found[1].precisions_M is None


def test_a_far_point_moves_a_heavy_tailed_cluster_little() -> None:
    x_ND, labels_N = clusters(1, 300, 5.0)
    x_ND[0] = 1e3
    total = SufficientStats.from_labels(x_ND, labels_N, 1)
    priors = [PriorSettings(tail_dof=dof).make(total) for dof in (4.0, math.inf)]
    heavy, gaussian = [expectation_maximisation(x_ND, labels_N, prior, 50).mixture for prior in priors]
    assert gaussian.means_KD.abs().max() > 3
    assert heavy.means_KD.abs().max() < 0.3


def test_evidence_of_heavy_tails_is_that_of_few_clusters() -> None:
    """Gaussians gain by cutting each cluster in core and halo; Student's t loses, and has more evidence."""
    x_ND, labels_N = clusters(3, 400, 3.0)
    middle_KD = torch.stack([x_ND[labels_N == k].median(0).values for k in range(3)])
    halved_N = 2 * labels_N + ((x_ND - middle_KD[labels_N]).norm(dim=1) < 2.5)
    total = SufficientStats.from_labels(x_ND, 0 * labels_N, 1)
    found = {}
    for name, dof in (("gaussian", math.inf), ("heavy", None)):
        prior = PriorSettings(tail_dof=dof).make(total)
        found[name] = [
            evidence(expectation_maximisation(x_ND, labels, prior, 30)) for labels in (labels_N, halved_N)
        ]
    assert found["gaussian"][1] > found["gaussian"][0] + 50
    assert found["heavy"][0] > found["heavy"][1] + 5
    assert found["heavy"][0] > found["gaussian"][1]
