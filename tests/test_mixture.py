"""Densities against torch.distributions, and the M-step against expectation maximisation's own promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from deepdpm.mixture import Mixture
from deepdpm.priors import PriorSettings
from deepdpm.stats import SufficientStats

N, D, K = 200, 3, 4


def make(seed: int = 0, offset: float = 0.0, num_dims: int = D) -> tuple[Tensor, Mixture]:
    generator = torch.Generator().manual_seed(seed)
    means_KD = 3 * torch.randn(K, num_dims, generator=generator).double() + offset
    roots_KDD = torch.randn(K, num_dims, num_dims, generator=generator).double()
    weights_K = torch.rand(K, generator=generator).double()
    x_ND = means_KD[torch.arange(N) % K] + torch.randn(N, num_dims, generator=generator)
    covariances_KDD = roots_KDD @ roots_KDD.mT + 0.1 * torch.eye(num_dims)
    return x_ND.float(), Mixture(weights_K / weights_K.sum(), means_KD, covariances_KDD)


def reference(mixture: Mixture, x_ND: Tensor) -> Tensor:
    normals = [
        MultivariateNormal(mean, cov)
        for mean, cov in zip(mixture.means_KD, mixture.covariances_KDD, strict=True)
    ]
    return torch.stack([one.log_prob(x_ND.double()) for one in normals], 1) + mixture.weights_K.log()


@pytest.mark.parametrize("num_dims", [D, 16, 17, 40])
def test_densities_are_those_of_torch_distributions(num_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Points in several pieces, dimensions in several blocks, and the last of each smaller.
    monkeypatch.setattr("deepdpm.mixture._CACHED_ELEMENTS", 3_000)
    x_ND, mixture = make(num_dims=num_dims)
    expected_NK = reference(mixture, x_ND).float()
    torch.testing.assert_close(mixture.log_joint_NK(x_ND), expected_NK, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mixture.log_prob(x_ND), expected_NK.logsumexp(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mixture.responsibilities_NK(x_ND).sum(1), torch.ones(N), rtol=1e-5, atol=1e-5)


def test_codes_far_from_the_origin_keep_their_digits() -> None:
    x_ND, mixture = make(offset=1e4)
    expected_NK = reference(mixture, x_ND).float()
    torch.testing.assert_close(mixture.log_joint_NK(x_ND), expected_NK, rtol=1e-3, atol=1e-2)


def test_the_order_of_clusters_is_only_an_order() -> None:
    x_ND, mixture = make()
    order = torch.tensor([2, 3, 0, 1])
    torch.testing.assert_close(
        mixture[order].log_joint_NK(x_ND), mixture.log_joint_NK(x_ND)[:, order], rtol=1e-4, atol=1e-3
    )


def test_expectation_maximisation_never_lowers_the_posterior() -> None:
    x_ND, mixture = make()
    total = SufficientStats.from_labels(x_ND, torch.zeros(N, dtype=torch.long), 1)
    prior = PriorSettings(scale="isotropic", sigma_scale=1.0, pi_prior="none").make(total)
    before = -torch.inf
    for _ in range(15):
        mixture = Mixture.m_step(prior, SufficientStats.from_weights(x_ND, mixture.responsibilities_NK(x_ND)))
        precision_KDD = torch.linalg.inv(mixture.covariances_KDD)
        offset_KD = mixture.means_KD - prior.mean_D
        log_prior = -0.5 * (
            (prior.nu + D + 2) * torch.logdet(mixture.covariances_KDD).sum()
            + (prior.psi * precision_KDD).sum()
            + prior.kappa * torch.einsum("kd,kde,ke->", offset_KD, precision_KDD, offset_KD)
        )
        now = reference(mixture, x_ND).logsumexp(1).sum() + log_prior
        assert now > before - 1e-2
        before = now


def test_a_component_without_weight_has_no_density_but_no_nan() -> None:
    x_ND, mixture = make()
    weights_K = torch.tensor([0.5, 0.5, 0.0, 0.0]).double()
    log_joint_NK = Mixture(weights_K, mixture.means_KD, mixture.covariances_KDD).log_joint_NK(x_ND)
    assert torch.isfinite(log_joint_NK.logsumexp(1)).all()
    assert log_joint_NK.softmax(1)[:, 2:].max() < 1e-30
