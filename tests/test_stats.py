"""Statistics are plain sums: the loop over points, in any order, is their oracle."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from deepdpm.linalg import NotPositiveDefiniteError, cholesky
from deepdpm.stats import SufficientStats, squared_spacing

N, D, K = 300, 4, 5


@pytest.fixture
def x_ND() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels_N() -> Tensor:
    # The last set is empty, and -1 belongs to none.
    return torch.randint(-1, K - 1, (N,), generator=torch.Generator().manual_seed(1))


def loop(x_ND: Tensor, weights_NK: Tensor) -> SufficientStats:
    stats = SufficientStats.zeros(weights_NK.shape[1], x_ND.shape[1])
    for x_D, weights_K in zip(x_ND.double(), weights_NK.double(), strict=True):
        stats.count_K.add_(weights_K)
        stats.sum_KD.add_(weights_K[:, None] * x_D)
        stats.outer_KDD.add_(weights_K[:, None, None] * x_D[:, None] * x_D)
    return stats


def assert_equal(a: SufficientStats, b: SufficientStats) -> None:
    torch.testing.assert_close(a.count_K, b.count_K)
    torch.testing.assert_close(a.sum_KD, b.sum_KD)
    torch.testing.assert_close(a.outer_KDD, b.outer_KDD)


@pytest.mark.parametrize("num_sets", [1, D, K])
def test_soft_sets_are_the_loop(x_ND: Tensor, num_sets: int) -> None:
    weights_NK = torch.rand(N, num_sets)
    assert_equal(SufficientStats.from_weights(x_ND, weights_NK), loop(x_ND, weights_NK))


@pytest.mark.parametrize("size", [0, 1, 7, N])
def test_hard_sets_are_the_loop(x_ND: Tensor, labels_N: Tensor, size: int) -> None:
    x_ND, labels_N = x_ND[:size], labels_N[:size]
    weights_NK = (labels_N[:, None] == torch.arange(K)).double()
    assert_equal(SufficientStats.from_labels(x_ND, labels_N, K), loop(x_ND, weights_NK))


def test_weighted_hard_sets_are_the_loop(x_ND: Tensor, labels_N: Tensor) -> None:
    weight_N = torch.rand(N)
    weights_NK = (labels_N[:, None] == torch.arange(K)) * weight_N[:, None]
    assert_equal(SufficientStats.from_labels(x_ND, labels_N, K, weight_N), loop(x_ND, weights_NK))


def test_the_order_of_points_and_the_cut_into_batches_do_not_matter(x_ND: Tensor, labels_N: Tensor) -> None:
    whole = SufficientStats.from_labels(x_ND, labels_N, K)
    order = torch.randperm(N)
    parts = [SufficientStats.from_labels(x_ND[i], labels_N[i], K) for i in order.split(70)]
    assert_equal(parts[0] + parts[1] + parts[2] + parts[3] + parts[4], whole)


def test_a_split_then_a_merge_restores_the_statistics(x_ND: Tensor, labels_N: Tensor) -> None:
    whole = SufficientStats.from_labels(x_ND, labels_N, K)
    side_N = (x_ND[:, 0] > 0).long()
    halves = SufficientStats.from_labels(x_ND, torch.where(labels_N < 0, -1, 2 * labels_N + side_N), 2 * K)
    assert_equal(halves.group(torch.arange(2 * K) // 2, K), whole)
    assert_equal(whole - halves[1::2], halves[::2])
    assert_equal(SufficientStats.cat([halves[:3], halves[3:]]), halves)
    assert_equal(whole.scaled(2.0), whole + whole)


def test_scatter_is_about_the_mean(x_ND: Tensor) -> None:
    stats = SufficientStats.from_labels(x_ND, torch.zeros(N, dtype=torch.long), 1)
    torch.testing.assert_close(stats.scatter_KDD[0] / (N - 1), torch.cov(x_ND.double().T))
    torch.testing.assert_close(stats.mean_KD[0], x_ND.double().mean(0))
    assert SufficientStats.zeros(2, D).scatter_KDD.abs().max() == 0


def test_jitter_goes_only_where_a_factor_fails() -> None:
    good, singular = torch.eye(3).double() * 2, torch.ones(3, 3).double()
    factors = cholesky(torch.stack((good, singular)))
    assert torch.equal(factors[0], torch.linalg.cholesky(good))
    torch.testing.assert_close(factors[1] @ factors[1].T, singular, atol=1e-6, rtol=0)


@pytest.mark.parametrize("matrix", [-torch.eye(2), torch.full((2, 2), float("nan"))])
def test_what_cannot_be_factored_is_said(matrix: Tensor) -> None:
    with pytest.raises(NotPositiveDefiniteError, match="covariance"):
        cholesky(matrix)


def test_the_spacing_is_the_difference_to_the_nearest_point_that_differs(x_ND: Tensor) -> None:
    distance_N, index_N = (found[:, 0] for found in NearestNeighbors(n_neighbors=2).fit(x_ND).kneighbors())
    median = torch.from_numpy(distance_N).double().quantile(0.5, interpolation="lower")
    squares_ND = (x_ND - x_ND[index_N]).double().square()
    expected_D = median**2 * (squares_ND / squares_ND.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(squared_spacing(x_ND), expected_D, rtol=1e-5, atol=0)
    torch.testing.assert_close(squared_spacing(torch.cat([x_ND, x_ND])), expected_D, rtol=1e-5, atol=0)
    torch.testing.assert_close(squared_spacing(100 * x_ND + 5), 1e4 * expected_D, rtol=1e-4, atol=0)
    assert squared_spacing(torch.ones(7, 2)).tolist() == [0, 0]


def test_a_column_in_large_units_does_not_blur_one_in_small_units(x_ND: Tensor) -> None:
    units_D = torch.tensor([1.0, 1.0, 1.0, 300.0])
    spacing_D = squared_spacing(x_ND * units_D) / units_D.square()
    assert (spacing_D[:3] < 3 * x_ND.double().var(0)[:3]).all()
    assert spacing_D[3] < 0.01
