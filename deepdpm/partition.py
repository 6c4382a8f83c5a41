"""One clustering of a sample: EM, its evidence, merges by evidence, valleys and satellites.

Legend: M points, D dimensions, K clusters, P pairs, S clusters that share a point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deepdpm.kmeans import kmeans_labels
from deepdpm.linalg import cholesky
from deepdpm.mixture import Mixture
from deepdpm.moves import MoveSettings, merge_log_ratios
from deepdpm.priors import NormalPrior, fit_empirical_bayes
from deepdpm.separation import valley_ratios
from deepdpm.stats import SufficientStats
from deepdpm.tails import fit_dof, log_scale_evidence

# A cluster of ten points has five in a half of the sample: it should have a centre there.
_POINTS_PER_SEED = 4
_FIT_EVERY = 5
# Clusters that a point is shared among in EM, and where it is asked which clusters are neighbours.
_SHARED = 3
_NEAR = 8
_MOST_ROUNDS = 60
# K times D, up to which one product with all weights, most of them zeros, is faster than sums by label.
_SMALL_PRODUCT = 500
_CLUSTERS_PER_MERGE = 16
# Share of the possible merges that are made where none gains evidence.
_FORCED = 0.5
_SATELLITE_POINTS = 0.2
_SATELLITE_RADIUS = 0.4
_SATELLITE_REACH = 4.0


@dataclass(frozen=True)
class Partition:
    """A sample in clusters: labels_M 0..K-1 (each with a point), their mixture, and the prior they gave."""

    x_MD: Tensor
    labels_M: Tensor
    mixture: Mixture
    prior: NormalPrior
    log_joint_MK: Tensor

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.mixture.num_components

    @cached_property
    def stats(self) -> SufficientStats:
        """Statistics of the hard labels."""
        return self.stats_of(self.labels_M, self.num_clusters)

    def stats_of(self, labels_M: Tensor, num_clusters: int) -> SufficientStats:
        """Statistics of other hard labels, as finer ones (M,), with the points' precisions as they are."""
        return _hard_stats(self.x_MD, labels_M, num_clusters, self.precisions_M)

    @cached_property
    def precisions_M(self) -> Tensor | None:
        """What each point counts for in its own cluster; None, one, without heavy tails."""
        own_M1 = self.labels_M[:, None]
        precisions_M1 = self.mixture.precisions(self.log_joint_MK.gather(1, own_M1), own_M1)
        return None if precisions_M1 is None else precisions_M1[:, 0]

    @cached_property
    def neighbours_P2(self) -> Tensor:
        """Pairs (P, 2) of clusters worth a merge."""
        return _neighbours(self)

    @cached_property
    def valleys_P(self) -> Tensor:
        """The valley of the density between the neighbours (P,), as a share of the lower peak."""
        return valley_ratios(self.x_MD, self.labels_M, self.stats, self.mixture, self.neighbours_P2)

    @cached_property
    def merge_gains_P(self) -> Tensor:
        """The log evidence in nats that merging each two neighbours gives (P,), the prior refitted.

        With heavy tails points count as in the clusters that they come from, so a merged one's is too low.
        """
        prior = fit_empirical_bayes(self.prior, self.stats)
        return merge_log_ratios(prior, self.stats, self.neighbours_P2, prior.alpha)

    def entropy(self) -> float:
        """Of the labels, in nats."""
        return float(torch.special.entr(torch.bincount(self.labels_M) / len(self.labels_M)).sum())


@dataclass(frozen=True)
class _Shared:
    """Each point's likeliest clusters of a mixture (M, S), and its log joint densities with them.

    What the others would get is below what decides anything, and so the cost need not grow with K.
    """

    mixture: Mixture
    index_MS: Tensor
    log_joint_MS: Tensor

    @classmethod
    def of(cls, mixture: Mixture, log_joint_MK: Tensor, most: int = _SHARED) -> _Shared:
        top = log_joint_MK.topk(min(most, log_joint_MK.shape[1]), dim=1)
        return cls(mixture, top.indices, top.values)

    @cached_property
    def weights_MS(self) -> Tensor:
        """Responsibilities."""
        return self.log_joint_MS.softmax(1)

    @cached_property
    def squares_MS(self) -> Tensor:
        """Squared distances."""
        return self.mixture.squares(self.log_joint_MS, self.index_MS)

    @cached_property
    def precisions_MS(self) -> Tensor | None:
        """What points count for; None, one, without heavy tails."""
        return self.mixture.precisions(self.log_joint_MS, self.index_MS)

    def sums_K(self, values_MS: Tensor) -> Tensor:
        """Sums of values (M, S) by cluster (K,)."""
        sums_K = torch.zeros(self.mixture.num_components, dtype=torch.float64, device=values_MS.device)
        return sums_K.index_add_(0, self.index_MS.flatten(), values_MS.double().flatten())


def expectation_maximisation(
    x_MD: Tensor, labels_M: Tensor, prior: NormalPrior, iters: int, precisions_M: Tensor | None = None
) -> Partition:
    """EM from hard labels, the prior refitted on the way; clusters left without a point are dropped.

    The points count for one, or for their precisions (M,), in the statistics that it starts from.
    """
    stats = _hard_stats(x_MD, labels_M, int(labels_M.max()) + 1, precisions_M)
    stats = stats[stats.count_K > 0]
    for i in range(iters):
        if i % _FIT_EVERY == 0:
            prior = fit_empirical_bayes(prior, stats)
        mixture = Mixture.m_step(prior, stats)
        shared = _Shared.of(mixture, mixture.log_joint_NK(x_MD))
        if i % _FIT_EVERY == 0 and "tail_dof" in prior.fitted:
            prior = replace(prior, tail_dof=fit_dof(shared.squares_MS, shared.weights_MS, prior.num_dims))
        stats = _soft_stats(x_MD, shared)
        stats = stats[stats.count_K >= 1]
    mixture = Mixture.m_step(prior, stats)
    log_joint_MK = mixture.log_joint_NK(x_MD)
    used_K, labels_M = log_joint_MK.argmax(1).unique(return_inverse=True)
    kept = mixture[used_K]
    total = kept.weights_K.sum()
    kept = replace(kept, weights_K=kept.weights_K / total)
    return Partition(x_MD, labels_M, kept, prior, log_joint_MK[:, used_K] - float(total.log()))


def _hard_stats(
    x_MD: Tensor, labels_M: Tensor, num_clusters: int, precisions_M: Tensor | None
) -> SufficientStats:
    """Statistics of K clusters, whose points count for one on the mean."""
    stats = SufficientStats.from_labels(x_MD, labels_M, num_clusters, precisions_M)
    if precisions_M is None:
        return stats
    return stats.recounted(torch.bincount(labels_M, minlength=num_clusters).double())


def _soft_stats(x_MD: Tensor, shared: _Shared) -> SufficientStats:
    """Statistics of K clusters, whose points count for one on the mean, of points that clusters share."""
    num_clusters, index_MS, weights_MS = shared.mixture.num_components, shared.index_MS, shared.weights_MS
    if shared.precisions_MS is not None:
        weights_MS = weights_MS * shared.precisions_MS
    if num_clusters * x_MD.shape[1] <= _SMALL_PRODUCT:
        weights_MK = weights_MS.new_zeros(len(x_MD), num_clusters).scatter_(1, index_MS, weights_MS)
        stats = SufficientStats.from_weights(x_MD, weights_MK)
    else:
        parts = [
            SufficientStats.from_labels(x_MD, index_MS[:, s], num_clusters, weights_MS[:, s])
            for s in range(weights_MS.shape[1])
        ]
        stats = sum(parts[1:], parts[0])
    if shared.precisions_MS is None:
        return stats
    return stats.recounted(shared.sums_K(shared.weights_MS))


def evidence(partition: Partition) -> float:
    """A lower bound of the log evidence: `sum_k [ln alpha + lnGamma(n_k) + ln p(X_k)] + H(q)`, in nats.

    The statistics are weighted by the responsibilities q, and the prior is refitted to them. lnGamma and ln p
    are convex in the statistics, so by Jensen's inequality this is at most `E_q[ln p(X, z)] + H(q)`, and that
    at most `ln p(X)`. With hard labels (H = 0) clusters that overlap would pay for each point between them.
    With heavy tails points are weighted by their precisions too, and what these add is part of it.
    """
    shared = _Shared.of(partition.mixture, partition.log_joint_MK)
    stats = _soft_stats(partition.x_MD, shared)
    prior = fit_empirical_bayes(partition.prior, stats, 2)
    weight_K = torch.lgamma(stats.count_K) + math.log(prior.alpha)
    entropy = torch.special.entr(shared.weights_MS.double()).sum()
    return float((prior.log_marginal(stats) + weight_K).sum() + entropy + _tail_evidence(shared))


def _tail_evidence(shared: _Shared) -> Tensor:
    """What the points' precisions add to the evidence, in nats.

    By `tails.log_scale_evidence`; but the statistics weigh the points of cluster k by c_k times their
    expected precisions, for a mean weight of 1. The bound holds for any distribution of the precisions, so
    for those scaled by c_k, which adds `n_k [(D + nu) / 2 log c_k - (nu / 2) (1 - 1 / c_k)]`.
    """
    if shared.precisions_MS is None:
        return shared.weights_MS.new_zeros(())
    dof, num_dims = shared.mixture.tail_dof, shared.mixture.means_KD.shape[1]
    own = shared.weights_MS.double() * log_scale_evidence(shared.squares_MS.double(), num_dims, dof)
    count_K = shared.sums_K(shared.weights_MS)
    mass_K = shared.sums_K(shared.weights_MS * shared.precisions_MS)
    inverse_K = torch.where(count_K > 0, mass_K / count_K, 1.0)
    scaled_K = -0.5 * (num_dims + dof) * inverse_K.log() - 0.5 * dof * (1 - inverse_K)
    return own.sum() + (count_K * scaled_K).sum()


def pieces(x_MD: Tensor, prior: NormalPrior, settings: MoveSettings, generator: torch.Generator) -> Partition:
    """The k-means cells of a sample (M, D) after EM, and merges for as long as these gain evidence."""
    seeds = max(1, min(settings.seeds, len(x_MD) // _POINTS_PER_SEED))
    labels_M = kmeans_labels(x_MD, seeds, generator, max_iter=20)
    return _settled(expectation_maximisation(x_MD, labels_M, prior, 8))


def merged_by_evidence(found: Partition) -> Partition:
    """The partition after merges that gain evidence, all that don't touch each other; itself if none does."""
    if found.num_clusters < 2:
        return found
    gain_P = found.merge_gains_P
    if not (gain_P > 0).any():
        return found
    return merged(found, found.neighbours_P2[gain_P > 0], gain_P[gain_P > 0], share=1.0)


def _settled(found: Partition) -> Partition:
    while (after := merged_by_evidence(found)) is not found:
        found = after
    return found


def finest(found: Partition) -> Partition:
    """The partition of greatest evidence on a path of merges from this one down to one cluster.

    Where no merge gains evidence, half of the possible ones are made all the same, the best first: a prior
    fitted to many pieces of a cluster wants clusters as small as these, and two Gaussians stayed in 61.
    """
    best, greatest = found, evidence(found)
    while found.num_clusters > 1:
        found = _settled(merged(found, found.neighbours_P2, found.merge_gains_P, share=_FORCED))
        if (reached := evidence(found)) > greatest:
            best, greatest = found, reached
    return best


def _neighbours(partition: Partition) -> Tensor:
    """Pairs (P, 2) worth a merge: each cluster with those it shares most points with, and the nearest."""
    num_clusters = partition.num_clusters
    shared = _Shared.of(partition.mixture, partition.log_joint_MK, _NEAR)
    index_MS, weights_MS = shared.index_MS, shared.weights_MS.double()
    pair_MSS = num_clusters * index_MS[:, :, None] + index_MS[:, None, :]
    product_MSS = weights_MS[:, :, None] * weights_MS[:, None, :]
    shared_KK = product_MSS.new_zeros(num_clusters**2).index_add_(
        0, pair_MSS.flatten(), product_MSS.flatten()
    )
    shared_KK = shared_KK.view(num_clusters, num_clusters)
    own_K = shared_KK.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    shared_KK = shared_KK / own_K[:, None] / own_K
    pooled_DD = partition.mixture.covariances_KDD.double().mean(0)
    white_KD = torch.linalg.solve_triangular(
        cholesky(pooled_DD), partition.mixture.means_KD.double().T, upper=False
    ).T
    distance_KK = torch.cdist(white_KD, white_KD)
    eye_KK = torch.eye(num_clusters, dtype=torch.bool, device=distance_KK.device)
    by_share = (
        (shared_KK + 1e-12 / (1 + distance_KK)).masked_fill(eye_KK, -1).topk(min(4, num_clusters - 1)).indices
    )
    nearest = distance_KK.masked_fill(eye_KK, torch.inf).topk(min(2, num_clusters - 1), largest=False).indices
    partners_KC = torch.cat([by_share, nearest], 1)
    own_KC = torch.arange(num_clusters, device=partners_KC.device)[:, None].expand_as(partners_KC)
    return torch.stack([own_KC, partners_KC], 2).reshape(-1, 2).sort(1).values.unique(dim=0)


def coarsened(found: Partition, threshold: float, least_entropy: float, fewest: int) -> Partition:
    """The partition after merges of all neighbours whose valley is above `threshold` of the lower peak.

    Half of the merges that don't touch each other are made in each round (`merged` says when more), those
    first that lose the least evidence a point; then EM. It ends as soon as the entropy of the labels is below
    the least, or no more than the `fewest` clusters are left.
    """
    for _ in range(_MOST_ROUNDS):
        if found.num_clusters <= max(1, fewest) or found.entropy() < least_entropy:
            break
        pairs_P2 = found.neighbours_P2[found.valleys_P > threshold]
        if not len(pairs_P2):
            break
        gain_P = merge_log_ratios(found.prior, found.stats, pairs_P2, found.prior.alpha)
        found = merged(found, pairs_P2, gain_P / found.stats.count_K[pairs_P2].amin(1), share=0.5)
    return found


def satellites(found: Partition, pairs_P2: Tensor) -> Tensor:
    """Which pairs (P,) of clusters (P, 2) are a cluster and its satellite.

    A satellite has less than a fifth of the other's points, less than two fifths of its radius (the median
    distance from the mean, so that stray points don't count), and its mean lies within four of those radii.
    Clusters that are merely small have radii like their neighbours'.
    """
    stats = found.stats
    mean_KD, count_K = stats.mean_KD, stats.count_K
    distance_M = (found.x_MD - mean_KD.to(found.x_MD)[found.labels_M]).norm(dim=1)
    by_distance_M = distance_M.argsort()
    order_M = by_distance_M[found.labels_M[by_distance_M].argsort(stable=True)]
    middle_K = (count_K.cumsum(0) - count_K / 2).long()
    radius_K = distance_M[order_M[middle_K]]
    left_P, right_P = pairs_P2.unbind(1)
    small_P = torch.where(count_K[left_P] < count_K[right_P], left_P, right_P)
    large_P = left_P + right_P - small_P
    between_P = (mean_KD[small_P] - mean_KD[large_P]).norm(dim=1)
    return (
        (count_K[small_P] < _SATELLITE_POINTS * count_K[large_P])
        & (radius_K[small_P] < _SATELLITE_RADIUS * radius_K[large_P])
        & (between_P < _SATELLITE_REACH * radius_K[large_P])
    )


def without_satellites(found: Partition) -> Partition:
    """The partition with each satellite joined to its cluster, the nearest ones first, and EM."""
    for _ in range(_MOST_ROUNDS):
        if found.num_clusters < 2:
            break
        pairs_P2 = found.neighbours_P2[satellites(found, found.neighbours_P2)]
        if not len(pairs_P2):
            break
        mean_KD = found.stats.mean_KD
        distance_P = (mean_KD[pairs_P2[:, 0]] - mean_KD[pairs_P2[:, 1]]).norm(dim=1)
        found = merged(found, pairs_P2, -distance_P, share=1.0)
    return found


def merged(found: Partition, pairs_P2: Tensor, score_P: Tensor, share: float) -> Partition:
    """The partition after the best-scored merges of pairs that don't touch each other, and EM.

    Of the merges that are possible at once this share is made, but at least one for every 16 clusters: where
    all pairs touch one large cluster, rounds of a single merge take most of the time.
    """
    target = list(range(found.num_clusters))
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for first, second in pairs_P2[score_P.argsort(descending=True)].tolist():
        if first not in used and second not in used:
            used |= {first, second}
            chosen.append((first, second))
    least = max(1, found.num_clusters // _CLUSTERS_PER_MERGE)
    for first, second in chosen[: max(least, int(len(chosen) * share))]:
        target[second] = first
    target_K = torch.tensor(target, device=found.labels_M.device)
    labels_M = target_K[found.labels_M].unique(return_inverse=True)[1]
    return expectation_maximisation(found.x_MD, labels_M, found.prior, 2, found.precisions_M)
