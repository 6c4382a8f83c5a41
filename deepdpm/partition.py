"""One clustering of a sample: EM, its evidence, merges by evidence, valleys and satellites, and dissolution.

Legend: M points, D dimensions, K clusters, P pairs, S clusters that share a point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deepdpm.kmeans import kmeans_labels
from deepdpm.linalg import cholesky, inverse_cholesky
from deepdpm.mixture import Mixture
from deepdpm.moves import MoveSettings, merge_log_ratios
from deepdpm.priors import NormalPrior, fit_empirical_bayes
from deepdpm.separation import valley_ratios
from deepdpm.stats import SufficientStats

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
_ASKED = 6000
_NEIGHBOURS = 10
_OWN_NEIGHBOURS = 0.5
_AT_HOME = 2 / 3


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
        return SufficientStats.from_labels(self.x_MD, self.labels_M, self.num_clusters)

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
        """The log evidence in nats that merging each two neighbours gives (P,), the prior refitted."""
        prior = fit_empirical_bayes(self.prior, self.stats)
        return merge_log_ratios(prior, self.stats, self.neighbours_P2, prior.alpha)

    def entropy(self) -> float:
        """Of the labels, in nats."""
        return float(torch.special.entr(torch.bincount(self.labels_M) / len(self.labels_M)).sum())


def expectation_maximisation(x_MD: Tensor, labels_M: Tensor, prior: NormalPrior, iters: int) -> Partition:
    """EM from hard labels, the prior refitted on the way; clusters left without a point are dropped."""
    stats = SufficientStats.from_labels(x_MD, labels_M, int(labels_M.max()) + 1)
    stats = stats[stats.count_K > 0]
    for i in range(iters):
        if i % _FIT_EVERY == 0:
            prior = fit_empirical_bayes(prior, stats)
        log_joint_MK = Mixture.m_step(prior, stats).log_joint_NK(x_MD)
        stats = _soft_stats(x_MD, *_shared(log_joint_MK), log_joint_MK.shape[1])
        stats = stats[stats.count_K >= 1]
    mixture = Mixture.m_step(prior, stats)
    log_joint_MK = mixture.log_joint_NK(x_MD)
    used_K, labels_M = log_joint_MK.argmax(1).unique(return_inverse=True)
    kept = mixture[used_K]
    kept = replace(kept, weights_K=kept.weights_K / kept.weights_K.sum())
    return Partition(x_MD, labels_M, kept, prior, log_joint_MK[:, used_K])


def _shared(log_joint_MK: Tensor, most: int = _SHARED) -> tuple[Tensor, Tensor]:
    """Each point's likeliest clusters (M, S), and its responsibilities for them (M, S).

    What the others would get is below what decides anything, and so the cost need not grow with K.
    """
    top = log_joint_MK.topk(min(most, log_joint_MK.shape[1]), dim=1)
    return top.indices, top.values.softmax(1)


def _soft_stats(x_MD: Tensor, index_MS: Tensor, weights_MS: Tensor, num_clusters: int) -> SufficientStats:
    """Statistics of K clusters, of points (M, D) shared as `_shared` says."""
    if num_clusters * x_MD.shape[1] <= _SMALL_PRODUCT:
        weights_MK = weights_MS.new_zeros(len(x_MD), num_clusters).scatter_(1, index_MS, weights_MS)
        return SufficientStats.from_weights(x_MD, weights_MK)
    parts = [
        SufficientStats.from_labels(x_MD, index_MS[:, s], num_clusters, weights_MS[:, s])
        for s in range(weights_MS.shape[1])
    ]
    return sum(parts[1:], parts[0])


def evidence(partition: Partition) -> float:
    """A lower bound of the log evidence: `sum_k [ln alpha + lnGamma(n_k) + ln p(X_k)] + H(q)`, in nats.

    The statistics are weighted by the responsibilities q, and the prior is refitted to them. lnGamma and ln p
    are convex in the statistics, so by Jensen's inequality this is at most `E_q[ln p(X, z)] + H(q)`, and that
    at most `ln p(X)`. With hard labels (H = 0) clusters that overlap would pay for each point between them.
    """
    index_MS, weights_MS = _shared(partition.log_joint_MK)
    stats = _soft_stats(partition.x_MD, index_MS, weights_MS, partition.num_clusters)
    prior = fit_empirical_bayes(partition.prior, stats, 2)
    weight_K = torch.lgamma(stats.count_K) + math.log(prior.alpha)
    entropy = torch.special.entr(weights_MS.double()).sum()
    return float((prior.log_marginal(stats) + weight_K).sum() + entropy)


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
    index_MS, weights_MS = _shared(partition.log_joint_MK, _NEAR)
    weights_MS = weights_MS.double()
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
    mean_KD, count_K = stats.mean_KD(), stats.count_K
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
        mean_KD = found.stats.mean_KD()
        distance_P = (mean_KD[pairs_P2[:, 0]] - mean_KD[pairs_P2[:, 1]]).norm(dim=1)
        found = merged(found, pairs_P2, -distance_P, share=1.0)
    return found


def scattered(found: Partition) -> Tensor:
    """Which clusters (K,) are scattered among others.

    By the clusters' common covariance, most of the nearest neighbours of such a cluster's points are in
    others, and of a third of its points or more the nearest centre is another's. Asked are the ten nearest
    among up to 6,000 points, or half as many as a cluster has there. Neighbours alone do not tell: in many
    dimensions those of a true cluster's points can be in a tighter one beside it.
    """
    step = math.ceil(len(found.x_MD) / _ASKED)
    labels_M = found.labels_M[::step]
    inverse_DD = inverse_cholesky(_common_covariance(found.mixture)[None])[0]
    centre_D = found.x_MD.mean(0).double()
    white_MD = ((found.x_MD[::step] - centre_D) @ inverse_DD.T).float()
    white_KD = ((found.mixture.means_KD.double() - centre_D) @ inverse_DD.T).float()
    at_home_M = torch.cdist(white_MD, white_KD).argmin(1) == labels_M
    is_scattered_K = torch.zeros(found.num_clusters, dtype=torch.bool, device=labels_M.device)
    for k in range(found.num_clusters):
        own_B = (labels_M == k).nonzero()[:, 0]
        if len(own_B) < 2 or at_home_M[own_B].double().mean() > _AT_HOME:
            continue
        distance_BM = torch.cdist(white_MD[own_B], white_MD)
        distance_BM[torch.arange(len(own_B), device=own_B.device), own_B] = torch.inf
        nearest = distance_BM.topk(min(_NEIGHBOURS, len(own_B) // 2), largest=False).indices
        is_scattered_K[k] = (labels_M[nearest] == k).double().mean() < _OWN_NEIGHBOURS
    return is_scattered_K


def _common_covariance(mixture: Mixture) -> Tensor:
    weights_K = (mixture.weights_K / mixture.weights_K.sum()).double()
    return (weights_K[:, None, None] * mixture.covariances_KDD.double()).sum(0)


def without_scattered(found: Partition) -> Partition:
    """The partition without clusters that are scattered among others, the widest first, and EM.

    EM widens a small cluster by what no tight one reaches, such as the tails of all of them. Its points go to
    the likeliest other cluster if all had their common covariance; else they would go to the next wide one.
    """
    while found.num_clusters > 1 and (is_scattered_K := scattered(found)).any():
        width_K = found.mixture.covariances_KDD.diagonal(dim1=1, dim2=2).sum(1)
        widest = int(width_K.where(is_scattered_K, -1).argmax())
        kept_K = torch.arange(found.num_clusters, device=width_K.device) != widest
        others = found.mixture[kept_K]
        alike = replace(others, covariances_KDD=_common_covariance(others).expand_as(others.covariances_KDD))
        second_M = alike.log_joint_NK(found.x_MD).argmax(1)
        labels_M = torch.where(found.labels_M == widest, second_M, (kept_K.cumsum(0) - 1)[found.labels_M])
        found = expectation_maximisation(found.x_MD, labels_M, found.prior, 2)
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
    return expectation_maximisation(found.x_MD, labels_M, found.prior, 2)
