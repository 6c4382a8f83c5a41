"""Starts: k-means on codes for the clusters, an exact 2-means on one axis for the subclusters.

Legend: N points, M points of a sample, D dimensions, K clusters; a final 2 is the subclusters of a cluster.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from deepdpm.stats import SufficientStats

Backend = Literal["sklearn", "kmeans_pytorch"]

MOST_POINTS = 200_000
_ITERATIONS = 300
_CHUNK_ELEMENTS = 16_000_000


def kmeans_labels(
    x_MD: Tensor,
    num_clusters: int,
    generator: torch.Generator,
    backend: Backend = "sklearn",
    max_iter: int = _ITERATIONS,
) -> Tensor:
    """Labels (M,) in 0..K-1 of a k-means++ start and at most `max_iter` of Lloyd's iterations.

    Where there are fewer distinct points than centres, some labels are not used. "sklearn" runs on the CPU,
    "kmeans_pytorch" where the codes are.

    Shapes: x (M, D), finite, M >= K.

    >>> x_MD = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
    >>> labels_M = kmeans_labels(x_MD, 2, torch.Generator().manual_seed(0))
    >>> bool(labels_M[0] == labels_M[1] != labels_M[2] == labels_M[3])
    True
    """
    assert 0 < num_clusters <= x_MD.shape[0]
    if num_clusters == 1:
        return torch.zeros(x_MD.shape[0], dtype=torch.long, device=x_MD.device)
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    # Of unit size, so that a library's absolute tolerances mean the same for codes of any scale.
    x_MD = x_MD.double() - x_MD.double().mean(0)
    x_MD = (x_MD / x_MD.square().mean().sqrt().clamp_min(1e-300)).float()
    return (
        _sklearn(x_MD, num_clusters, seed, max_iter)
        if backend == "sklearn"
        else _lloyd(x_MD, num_clusters, seed, max_iter)
    )


def _sklearn(x_MD: Tensor, num_clusters: int, seed: int, max_iter: int) -> Tensor:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than centres: it goes on
        labels = KMeans(num_clusters, n_init=1, max_iter=max_iter, random_state=seed).fit_predict(
            x_MD.cpu().numpy()
        )
    return torch.as_tensor(labels, dtype=torch.long, device=x_MD.device)


def _lloyd(x_MD: Tensor, num_clusters: int, seed: int, max_iter: int) -> Tensor:
    # The loop of kmeans_pytorch.kmeans takes no centres and no limit, gives NaN where a cluster empties, and
    # holds all M x K x D differences: its distances are used in chunks, in a loop with an end.
    from kmeans_pytorch import pairwise_distance
    from sklearn.cluster import kmeans_plusplus

    num_points, num_dims = x_MD.shape
    centres, _ = kmeans_plusplus(x_MD.cpu().numpy(), num_clusters, random_state=seed)
    centres_KD = torch.as_tensor(centres, device=x_MD.device)
    step = max(1, _CHUNK_ELEMENTS // (num_clusters * num_dims))
    labels_M = torch.full((num_points,), -1, device=x_MD.device)
    for _ in range(_ITERATIONS):
        distances = [
            pairwise_distance(chunk, centres_KD, device=x_MD.device).reshape(-1, num_clusters).argmin(1)
            for chunk in x_MD.split(step)
        ]
        before_M, labels_M = labels_M, torch.cat(distances)
        if torch.equal(before_M, labels_M):
            break
        count_K = torch.bincount(labels_M, minlength=num_clusters)[:, None]
        sum_KD = torch.zeros_like(centres_KD).index_add_(0, labels_M, x_MD)
        centres_KD = torch.where(count_K > 0, sum_KD / count_K.clamp_min(1), centres_KD)
    return labels_M


def first_axis(x_MD: Tensor) -> Tensor:
    """Projections (M, 1) of codes on their first principal component."""
    centred_MD = x_MD.double() - x_MD.double().mean(0)
    axis_D1 = torch.linalg.eigh(centred_MD.T @ centred_MD).eigenvectors[:, -1:]
    return (centred_MD @ axis_D1).float()


def cluster_labels(
    x_MD: Tensor,
    num_clusters: int,
    how: Literal["kmeans", "kmeans_1d"],
    generator: torch.Generator,
    backend: Backend = "sklearn",
) -> Tensor:
    """Labels (M,) that start K clusters: k-means on the codes, or on their first principal component.

    >>> cluster_labels(torch.tensor([[0.0], [1.0]]), 1, "kmeans", torch.Generator()).tolist()
    [0, 0]
    """
    return kmeans_labels(x_MD if how == "kmeans" else first_axis(x_MD), num_clusters, generator, backend)


def subcluster_labels(
    x_MD: Tensor, labels_M: Tensor, stats: SufficientStats, in_full: bool = False
) -> Tensor:
    """Labels (M,) in {0, 1} that start the two subclusters of every cluster at once.

    Each cluster's points are projected on its first principal component and cut where the exact 2-means of
    the projections cuts them (published code, "kmeans_1d"). `in_full` goes on from there with Lloyd's
    iterations in all dimensions ("kmeans"). A cluster whose points coincide is not cut: its subcluster 1 is
    empty.

    Shapes: x (M, D), labels (M,) in 0..K-1, stats of K sets (for the means and axes).

    >>> x_MD = torch.tensor([[0.0], [0.2], [5.0], [100.0], [100.0], [103.0]])
    >>> labels_M = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> stats = SufficientStats.from_labels(x_MD, labels_M, 2)
    >>> subcluster_labels(x_MD, labels_M, stats).tolist()
    [0, 0, 1, 0, 0, 1]
    """
    axes_KD = torch.linalg.eigh(stats.scatter_KDD).eigenvectors[:, :, -1]
    offset_MD = x_MD.double() - stats.mean_KD[labels_M]
    side_M = _cut_on_axis((offset_MD * axes_KD[labels_M]).sum(1), labels_M, stats.num_clusters)
    if in_full:
        side_M = _two_means(offset_MD, labels_M, side_M, stats.num_clusters)
    return side_M


def _cut_on_axis(t_M: Tensor, labels_M: Tensor, num_clusters: int) -> Tensor:
    """Exact 2-means of each cluster's numbers: the cut of the sorted numbers of greatest gain."""
    order_M = t_M.argsort(stable=True)
    order_M = order_M[labels_M[order_M].argsort(stable=True)]
    sorted_M, owner_M = t_M[order_M], labels_M[order_M]
    count_K = torch.bincount(labels_M, minlength=num_clusters)
    first_M = (count_K.cumsum(0) - count_K)[owner_M]
    rank_M = torch.arange(len(t_M), device=t_M.device) - first_M
    total_K = torch.zeros(num_clusters, dtype=t_M.dtype, device=t_M.device).index_add_(0, labels_M, t_M)
    running_M = sorted_M.cumsum(0)
    left_M = running_M - (running_M - sorted_M)[first_M]
    n_M, n_left_M = count_K[owner_M].double(), (rank_M + 1).double()
    n_right_M = n_M - n_left_M
    right_M = total_K[owner_M] - left_M
    # Sum of squares between the halves: n1 n2 / n (m1 - m2)^2. Equal numbers stay together.
    gain_M = n_left_M * n_right_M / n_M * (left_M / n_left_M - right_M / n_right_M.clamp_min(1)).square()
    next_M = torch.cat((sorted_M[1:], sorted_M[-1:]))
    gain_M = gain_M.masked_fill((n_right_M == 0) | (next_M <= sorted_M), -1)
    best_K = torch.full_like(total_K, -1).scatter_reduce(0, owner_M, gain_M, "amax")
    is_best_M = (gain_M == best_K[owner_M]) & (gain_M >= 0)
    none_K = torch.full((num_clusters,), len(t_M), device=t_M.device)
    cut_K = none_K.scatter_reduce(0, owner_M, torch.where(is_best_M, rank_M, len(t_M)), "amin")
    side_M = torch.empty_like(labels_M)
    side_M[order_M] = (rank_M > cut_K[owner_M]).long()
    return side_M


def _two_means(x_MD: Tensor, labels_M: Tensor, side_M: Tensor, num_clusters: int) -> Tensor:
    """Lloyd's iterations within every cluster at once, from given sides."""
    for _ in range(_ITERATIONS):
        owner_M = 2 * labels_M + side_M
        count_S = torch.bincount(owner_M, minlength=2 * num_clusters)
        sum_SD = x_MD.new_zeros(2 * num_clusters, x_MD.shape[1]).index_add_(0, owner_M, x_MD)
        centres_K2D = (sum_SD / count_S.clamp_min(1)[:, None]).view(num_clusters, 2, -1)
        # The nearer of two centres, as the side of the plane between them that a point lies on.
        normal_KD = centres_K2D[:, 1] - centres_K2D[:, 0]
        middle_K = (normal_KD * centres_K2D.mean(1)).sum(1)
        whole_K = (count_S.view(-1, 2) == 0).any(1)
        new_M = ((x_MD * normal_KD[labels_M]).sum(1) > middle_K[labels_M]).long()
        new_M = torch.where(whole_K[labels_M], side_M, new_M)
        if torch.equal(new_M, side_M):
            break
        side_M = new_M
    return side_M
