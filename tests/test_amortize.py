"""The start of the cluster net from a mixture: closed form, linear discriminants, and which of them is taken.

Legend: N points, B of a batch, D dimensions, K clusters, H hidden units.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from deepdpm.amortize import fit_net_to_mixture, fit_output_layer, take_discriminants
from deepdpm.losses import kl_loss
from deepdpm.mixture import Mixture
from deepdpm.nets import ClusterNet

D, H, K = 3, 5, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(mixture: Mixture, num_points: int) -> Tensor:
    z_N = torch.multinomial(mixture.weights_K.float(), num_points, replacement=True)
    factor_KDD = torch.linalg.cholesky(mixture.covariances_KDD)
    return (
        mixture.means_KD[z_N]
        + (factor_KDD[z_N] @ torch.randn(num_points, mixture.means_KD.shape[1], 1))[..., 0]
    )


def equal_covariances(num_clusters: int, num_dims: int, spread: float) -> Mixture:
    root_DD = torch.randn(num_dims, num_dims) + 2 * torch.eye(num_dims)
    covariance_DD = root_DD @ root_DD.T
    weight_K = torch.rand(num_clusters) + 0.2
    means_KD = spread * torch.randn(num_clusters, num_dims) + 50
    return Mixture(weight_K / weight_K.sum(), means_KD, covariance_DD.expand(num_clusters, -1, -1).clone())


def sine(num_clusters: int) -> Mixture:
    """Narrow clusters along a sine, as in the benchmark set Birch 2."""
    k_K = torch.arange(num_clusters)
    means_KD = torch.stack((5.66 * k_K, 25 * torch.sin(2 * torch.pi * k_K / 25)), 1) / 200
    return Mixture(
        torch.ones(num_clusters) / num_clusters, means_KD, torch.eye(2).expand(num_clusters, 2, 2) / 200**2
    )


def agreement(net: ClusterNet, mixture: Mixture, x_ND: Tensor) -> float:
    return float((net(x_ND).argmax(1) == mixture.log_joint_NK(x_ND).argmax(1)).float().mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("num_clusters", "num_dims"), [(2, 4), (4, 3), (9, 2), (12, 6)])
def test_discriminants_are_the_posterior_of_clusters_of_equal_covariance(
    num_clusters: int, num_dims: int, temperature: float
) -> None:
    mixture = equal_covariances(num_clusters, num_dims, spread=6.0)
    x_ND = draw(mixture, 500)
    net = ClusterNet(num_dims, [50], num_clusters, temperature)
    assert take_discriminants(net, mixture, x_ND)
    torch.testing.assert_close(
        net.log_prob(x_ND), mixture.log_joint_NK(x_ND).float().log_softmax(1), rtol=1e-3, atol=2e-3
    )
    assert torch.isfinite(net(x_ND * 1e3)).all()


def test_discriminants_that_leave_directions_out_keep_the_leading_ones() -> None:
    mixture = equal_covariances(20, 12, spread=0.1)
    mixture = Mixture(mixture.weights_K, mixture.means_KD.clone(), torch.eye(12).expand(20, 12, 12).clone())
    mixture.means_KD[:, :2] = 40 * torch.randn(20, 2)
    x_ND = draw(mixture, 1000)
    net = ClusterNet(12, [4], 20)
    assert take_discriminants(net, mixture, x_ND)
    assert agreement(net, mixture, x_ND) > 0.99


@pytest.mark.parametrize(("hidden", "num_clusters"), [([8, 8], 3), ([1], 3), ([8], 1)])
def test_nets_without_room_stay_as_they_were(hidden: list[int], num_clusters: int) -> None:
    mixture = equal_covariances(num_clusters, D, spread=5.0)
    net = ClusterNet(D, hidden, num_clusters)
    before = copy.deepcopy(net.state_dict())
    x_ND = draw(mixture, 100)
    assert not take_discriminants(net, mixture, x_ND)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    fit_net_to_mixture(net, mixture, x_ND)
    assert torch.isfinite(net(x_ND)).all()


def test_many_narrow_clusters_start_from_discriminants_and_keep_every_label() -> None:
    mixture = sine(100)
    x_ND = draw(mixture, 5000)
    closed_form, net = ClusterNet(2, [50], 100), ClusterNet(2, [50], 100)
    target_NK = mixture.log_joint_NK(x_ND).float().log_softmax(1)
    fit_output_layer(closed_form, [(x_ND, target_NK, torch.ones(5000))])
    fit_net_to_mixture(net, mixture, x_ND)
    assert agreement(closed_form, mixture, x_ND) < 0.7
    assert agreement(net, mixture, x_ND) > 0.999


def test_few_clusters_of_different_shapes_start_from_the_closed_form() -> None:
    means_KD = torch.tensor([[0.0, 0.0], [0.5, 0.0], [3.0, 3.0]])
    variance_KD = torch.tensor([[0.01, 4.0], [4.0, 0.01], [1.0, 1.0]])
    mixture = Mixture(torch.ones(3) / 3, means_KD, torch.diag_embed(variance_KD))
    x_ND = draw(mixture, 2000)
    net = ClusterNet(2, [50], 3)
    closed_form, discriminants = copy.deepcopy(net), copy.deepcopy(net)
    target_NK = mixture.log_joint_NK(x_ND).float().log_softmax(1)
    fit_output_layer(closed_form, [(x_ND, target_NK, torch.ones(2000))])
    assert take_discriminants(discriminants, mixture, x_ND)
    fit_net_to_mixture(net, mixture, x_ND)
    divergence = [
        kl_loss(one.log_prob(x_ND), target_NK.exp()).item() for one in (net, closed_form, discriminants)
    ]
    assert divergence[0] == pytest.approx(divergence[1], rel=1e-5)
    assert divergence[0] < divergence[2]


def test_moments_are_zero_after_a_start() -> None:
    mixture = sine(30)
    x_ND = draw(mixture, 600)
    net = ClusterNet(2, [50], 30)
    optimizer = torch.optim.Adam(net.parameters())
    net(x_ND).square().mean().backward()
    optimizer.step()
    fit_net_to_mixture(net, mixture, x_ND, optimizer)
    assert [optimizer.state[one]["exp_avg"].abs().sum().item() for one in net.parameters()] == [0.0] * 4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_fitted_rows_solve_the_augmented_least_squares_problem(temperature: float) -> None:
    net = ClusterNet(D, [H], K, temperature)
    x_ND, weight_N = torch.randn(200, D), torch.rand(200)
    log_prob_NK = (4 * torch.randn(200, K)).log_softmax(1)
    fit_output_layer(net, zip(x_ND.split(64), log_prob_NK.split(64), weight_N.split(64), strict=True), 1e-3)

    hidden_NH = net.hidden(x_ND).detach().double()
    target_NK = log_prob_NK.double().clamp_min(torch.tensor(1e-4).double().log())
    target_NK = temperature * (target_NK - target_NK.mean(1, keepdim=True))
    share_N1 = (weight_N / weight_N.sum()).double()[:, None]
    variance = (share_N1 * (hidden_NH - (share_N1 * hidden_NH).sum(0)).square()).sum(0).mean()
    penalty_HE = torch.cat((torch.zeros(H, 1), torch.eye(H)), 1).double() * (1e-3 * variance).sqrt()
    design = torch.cat((share_N1.sqrt() * torch.cat((torch.ones(200, 1), hidden_NH), 1), penalty_HE))
    right = torch.cat((share_N1.sqrt() * target_NK, torch.zeros(H, K).double()))
    solution = torch.linalg.lstsq(design, right).solution
    torch.testing.assert_close(net.output_bias.double(), solution[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.output_weight.double(), solution[1:].T, rtol=1e-4, atol=1e-5)


def test_fit_recovers_responsibilities_that_the_net_can_express() -> None:
    net, teacher = ClusterNet(D, [H], K), ClusterNet(D, [H], K)
    teacher.hidden.load_state_dict(net.hidden.state_dict())
    x_ND = torch.randn(500, D)
    target_NK = teacher.log_prob(x_ND).detach()
    fit_output_layer(net, [(x_ND, target_NK, torch.ones(500))], ridge=1e-9)
    torch.testing.assert_close(net.log_prob(x_ND), target_NK, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_clusters", [1, K])
def test_fit_on_constant_codes_and_impossible_clusters_is_finite(num_clusters: int) -> None:
    net = ClusterNet(D, [H], num_clusters)
    log_prob_NK = torch.full((10, num_clusters), -torch.inf)
    log_prob_NK[:, 0] = 0
    fit_output_layer(net, [(torch.ones(10, D), log_prob_NK, torch.ones(10))])
    responsibilities = net.log_prob(torch.ones(1, D)).exp()[0]
    assert responsibilities[0] > 0.99
