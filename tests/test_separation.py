"""The valley between clusters: deep between real ones, absent where one cluster was cut."""

from __future__ import annotations

import math

import pytest
import torch

from deepdpm import separation
from deepdpm.kmeans import subcluster_labels
from deepdpm.mixture import Mixture
from deepdpm.separation import valley_ratios
from deepdpm.stats import SufficientStats


def ratio_of_two(x_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    stats = SufficientStats.from_labels(x_ND, labels_N, 2)
    num_dims = x_ND.shape[1]
    covariances = stats.scatter_KDD / stats.count_K[:, None, None] + 1e-6 * torch.eye(num_dims).double()
    mixture = Mixture(stats.count_K / stats.count_K.sum(), stats.mean_KD, covariances)
    return valley_ratios(x_ND, labels_N, stats, mixture, torch.tensor([[0, 1]])).item()


def two_gaussians(
    distance: float, num_dims: int = 2, num_points: int = 20_000
) -> tuple[torch.Tensor, torch.Tensor]:
    x_ND = torch.randn(num_points, num_dims, generator=torch.Generator().manual_seed(0))
    labels_N = torch.arange(num_points) % 2
    x_ND[:, 0] += distance * labels_N
    return x_ND, labels_N


@pytest.mark.parametrize("distance", [3.0, 3.5, 4.0])
def test_the_valley_of_two_gaussians_is_what_their_densities_say(distance: float) -> None:
    exact = 2 * math.exp(-(distance**2) / 8) / (1 + math.exp(-(distance**2) / 2))
    assert ratio_of_two(*two_gaussians(distance)) == pytest.approx(exact, abs=0.12)


def test_far_gaussians_have_a_deep_valley() -> None:
    assert ratio_of_two(*two_gaussians(8.0)) < 0.02


@pytest.mark.parametrize("num_dims", [1, 2, 10])
def test_one_gaussian_cut_in_two_has_none(num_dims: int) -> None:
    x_ND = torch.randn(4000, num_dims, generator=torch.Generator().manual_seed(1))
    one_N = torch.zeros(4000, dtype=torch.long)
    side_N = subcluster_labels(x_ND, one_N, SufficientStats.from_labels(x_ND, one_N, 1))
    assert ratio_of_two(x_ND, side_N) > 0.85


def test_few_points_in_many_dimensions_are_not_taken_for_apart() -> None:
    # Two random halves of 30 points in 20 dimensions: in the sample itself their means are far apart.
    x_ND = torch.randn(400, 20, generator=torch.Generator().manual_seed(2))
    labels_N = 2 + (torch.arange(400) >= 30).long()
    labels_N[:15], labels_N[15:30] = 0, 1
    stats = SufficientStats.from_labels(x_ND, labels_N, 4)
    covariances = stats.scatter_KDD / stats.count_K.clamp_min(1)[:, None, None] + 0.1 * torch.eye(20).double()
    mixture = Mixture(torch.ones(4) / 4, stats.mean_KD, covariances)
    assert valley_ratios(x_ND, labels_N, stats, mixture, torch.tensor([[0, 1]])).item() > 0.6


def test_scaling_shifting_and_turning_change_nothing() -> None:
    x_ND, labels_N = two_gaussians(3.2, num_dims=3, num_points=2000)
    turn_DD = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))[0]
    expected = ratio_of_two(x_ND, labels_N)
    assert ratio_of_two(1e2 * x_ND @ turn_DD + 7, labels_N) == pytest.approx(expected, abs=1e-3)


def test_both_orders_of_a_pair_agree_and_no_pair_gives_nothing() -> None:
    x_ND, labels_N = two_gaussians(3.2, num_points=2000)
    assert ratio_of_two(x_ND, 1 - labels_N) == pytest.approx(ratio_of_two(x_ND, labels_N), abs=0.03)
    stats = SufficientStats.from_labels(x_ND, labels_N, 2)
    mixture = Mixture(torch.ones(2) / 2, stats.mean_KD, stats.scatter_KDD / 1000)
    assert valley_ratios(x_ND, labels_N, stats, mixture, torch.zeros(0, 2, dtype=torch.long)).shape == (0,)


def test_clusters_of_one_or_two_points_say_nothing() -> None:
    x_ND = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    assert ratio_of_two(x_ND, torch.tensor([0, 0, 0, 1])) == 1.0


def test_a_pair_has_its_valley_whatever_pairs_are_asked_for_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Clusters of 3 to 1,500 points, so that pairs are padded to different lengths, and thinned.
    coins = torch.Generator().manual_seed(4)
    labels_N = torch.arange(6).repeat_interleave(torch.tensor([1500, 3, 40, 700, 9, 200]))
    x_ND = torch.randn(len(labels_N), 3, generator=coins) + 2.0 * torch.randn(6, 3, generator=coins)[labels_N]
    stats = SufficientStats.from_labels(x_ND, labels_N, 6)
    covariances = stats.scatter_KDD / stats.count_K[:, None, None] + 0.1 * torch.eye(3).double()
    mixture = Mixture(stats.count_K / stats.count_K.sum(), stats.mean_KD, covariances)
    pairs_P2 = torch.combinations(torch.arange(6), 2)
    together_P = valley_ratios(x_ND, labels_N, stats, mixture, pairs_P2)
    alone_P = torch.cat(
        [valley_ratios(x_ND, labels_N, stats, mixture, pair_12) for pair_12 in pairs_P2.split(1)]
    )
    torch.testing.assert_close(together_P, alone_P, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(separation, "_CHUNK_ELEMENTS", 5000)
    in_parts_P = valley_ratios(x_ND, labels_N, stats, mixture, pairs_P2)
    torch.testing.assert_close(together_P, in_parts_P, rtol=1e-4, atol=1e-4)
    assert together_P.max() - together_P.min() > 0.5
