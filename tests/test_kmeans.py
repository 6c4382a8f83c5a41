"""Starts: the 1-D cut against all cuts, k-means on points that coincide."""

from __future__ import annotations

import pytest
import torch

from deepdpm.kmeans import Backend, cluster_labels, kmeans_labels, subcluster_labels
from deepdpm.stats import SufficientStats

BACKENDS: list[Backend] = ["sklearn", "kmeans_pytorch"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def spread(t: torch.Tensor) -> float:
    return ((t - t.mean(0)) ** 2).sum().item() if len(t) else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_cut_is_the_best_of_all_cuts_in_every_cluster(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    labels_M = torch.randint(5, (150,), generator=draws)
    # Repeated numbers among them, and a cluster of one point.
    t_M = torch.randn(150, generator=draws).mul(4).round().div(2).double()
    labels_M[labels_M == 4] = 3
    labels_M[0] = 4
    stats = SufficientStats.from_labels(t_M[:, None], labels_M, 5)
    side_M = subcluster_labels(t_M[:, None], labels_M, stats)
    for k in range(4):
        t, side = t_M[labels_M == k], side_M[labels_M == k]
        best = min(spread(t[t <= v]) + spread(t[t > v]) for v in t.unique())
        assert spread(t[side == 0]) + spread(t[side == 1]) == pytest.approx(best)
        assert {0, 1} == set(side.tolist())
    assert side_M[0] == 0


def test_the_cut_lies_along_the_first_principal_component() -> None:
    x_MD = torch.randn(400, 3, generator=generator()) * torch.tensor([0.1, 5.0, 0.3])
    labels_M = torch.zeros(400, dtype=torch.long)
    side_M = subcluster_labels(x_MD, labels_M, SufficientStats.from_labels(x_MD, labels_M, 1))
    groups = [x_MD[side_M == side, 1] for side in (0, 1)]
    low, high = sorted(groups, key=lambda group: group.mean().item())
    assert low.max() < high.min() + 0.5


def test_points_that_coincide_are_not_cut() -> None:
    x_MD, labels_M = torch.ones(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    stats = SufficientStats.from_labels(x_MD, labels_M, 2)
    for in_full in (False, True):
        assert subcluster_labels(x_MD, labels_M, stats, in_full).sum() == 0


def test_in_full_is_two_means_in_all_dimensions() -> None:
    draws = generator()
    labels_M = torch.arange(300) % 3
    x_MD = torch.randn(300, 4, generator=draws).double()
    stats = SufficientStats.from_labels(x_MD, labels_M, 3)
    start_M, side_M = (subcluster_labels(x_MD, labels_M, stats, full) for full in (False, True))
    for k in range(3):
        x, side = x_MD[labels_M == k], side_M[labels_M == k]
        centres = torch.stack([x[side == 0].mean(0), x[side == 1].mean(0)])
        assert torch.equal(torch.cdist(x, centres).argmin(1), side)  # a fixed point of Lloyd's
        start = start_M[labels_M == k]
        assert sum(spread(x[side == s]) for s in (0, 1)) <= sum(spread(x[start == s]) for s in (0, 1)) + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_clear_clusters_are_found_at_any_scale(backend: Backend, scale: float) -> None:
    truth_M = torch.arange(300) % 3
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x_MD = scale * (torch.randn(300, 2, generator=generator()) * 0.3 + centres[truth_M])
    labels_M = kmeans_labels(x_MD, 3, generator(), backend)
    assert len({tuple(pair) for pair in torch.stack((truth_M, labels_M), 1).tolist()}) == 3
    assert torch.equal(labels_M, kmeans_labels(x_MD, 3, generator(), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_distinct_points_than_centres(backend: Backend) -> None:
    two = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).repeat(10, 1)  # duplicates, and a constant column
    for x_MD, distinct in ((two, 2), (torch.ones(20, 2), 1)):
        labels_M = kmeans_labels(x_MD, 5, generator(), backend)
        assert len(labels_M.unique()) <= 5
        assert (
            len({(x, label) for x, label in zip(x_MD[:, 0].tolist(), labels_M.tolist(), strict=True)})
            == distinct
        )


@pytest.mark.parametrize("how", ["kmeans", "kmeans_1d"])
def test_starts_of_clusters(how: str) -> None:
    x_MD = torch.cat((torch.zeros(20, 3), torch.ones(20, 3) * 9)) + torch.rand(40, 3, generator=generator())
    labels_M = cluster_labels(x_MD, 2, how, generator())  # type: ignore[arg-type]
    assert labels_M[:20].unique().numel() == labels_M[20:].unique().numel() == 1
    assert labels_M[0] != labels_M[-1]
