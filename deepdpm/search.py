"""The default moves: the whole structure, found on a sample from many proposals, and checked on its halves.

1. Many k-means centres, EM, and merges for as long as the evidence grows: the finest structure that the data
   pay for. One cluster alone is always tried beside it.
2. Merges of clusters with no valley of the density between them (`separation.py`), the valley's depth asked
   for growing from step to step; EM after each round. Clusters that blur into each other are all merged at
   one depth, so a step ends when half of them are left, and the next goes on.
3. Which step to believe: the one whose clusters come back best when each half of the sample is clustered by
   itself (as Lange et al. 2004 ask, measured in nats), the mean over several ways to halve it. Gaussian
   clusters that overlap come back as they are and are not merged; the pieces into which evidence cuts a
   curved or heavy-tailed cluster do not. Where nothing is confirmed, what is wrong is weighed by all that a
   step says.
4. Satellites, small clumps within the reach of a much larger cluster, are joined to it.

Legend: M points, D dimensions, K clusters, P pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deepdpm.kmeans import kmeans_labels, subcluster_labels
from deepdpm.linalg import cholesky
from deepdpm.mixture import Mixture
from deepdpm.moves import MoveSettings, merge_log_ratios, split_log_ratios
from deepdpm.priors import NormalPrior, fit_empirical_bayes
from deepdpm.separation import valley_ratios
from deepdpm.stats import SufficientStats

_POINTS_PER_SEED = 8
_FIT_EVERY = 5
_SHARED = 3
_MOST_ROUNDS = 60
# K times D, up to which one product with all weights, most of them zeros, is faster than sums by label.
_SMALL_PRODUCT = 500
# Of the centres: with more clusters, true ones are likely to have shared a centre.
_SPARSE = 0.5
# Share of the sample's clusters that a step leaves, and, of those, of clusters in the halves.
_KEPT = 0.5
# One cluster is believed only if nothing in it was ever divided by a valley deeper than this, and so is any
# step that the halves have no say in.
_BLURRED = 0.5
# Of the entropy that a finer step has beyond a coarser one, more than so much has to be confirmed.
_CONFIRMED = 0.3
_CLUSTERS_PER_MERGE = 16
# Responsibilities below this are none: their squares are subnormal numbers, thirty times as slow.
_NOT_SHARED = 1e-15
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
        return SufficientStats.from_labels(self.x_MD, self.labels_M, self.num_clusters)

    @cached_property
    def valleys(self) -> tuple[Tensor, Tensor]:
        """Pairs of neighbours (P, 2), and the valley of the density between them (P,)."""
        pairs_P2 = neighbours(self)
        return pairs_P2, valley_ratios(self.x_MD, self.labels_M, self.stats, self.mixture, pairs_P2)

    def entropy(self) -> float:
        """Of the labels, in nats."""
        return float(torch.special.entr(torch.bincount(self.labels_M) / len(self.labels_M)).sum())


def search(
    draw: Callable[[int], Tensor],
    num_points: int,
    prior: NormalPrior,
    settings: MoveSettings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, NormalPrior]:
    """The whole structure of a sample: its x (M, D), its labels (M,) 0..K-1 and the prior that they gave.

    `draw` gives a sample of at most so many of all points. Centres and sample are doubled for as long as the
    centres turn out to be too few.

    >>> x_ND = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 9])
    >>> from deepdpm.priors import PriorSettings
    >>> prior = PriorSettings().make(SufficientStats.from_weights(x_ND, torch.ones(400, 1)))
    >>> coins = torch.Generator().manual_seed(0)
    >>> _, labels_M, _ = search(lambda most: x_ND[:most], 400, prior, MoveSettings(), coins)
    >>> labels_M.max().item()
    1
    """
    while True:
        x_MD = draw(settings.sample_size)
        can_double = len(x_MD) < num_points
        rows = _rows(x_MD, settings, generator)
        found = finest(x_MD, prior, settings, generator)
        if not can_double or found.num_clusters <= _SPARSE * settings.seeds:
            halves = [finest(x_MD[row], prior, settings, generator) for row in rows[1:]]
            found = _believed([found, *halves], settings)
            return x_MD, found.labels_M, found.prior
        settings = replace(settings, seeds=2 * settings.seeds, sample_size=2 * settings.sample_size)


def revise(
    x_MD: Tensor, labels_M: Tensor, prior: NormalPrior, settings: MoveSettings, generator: torch.Generator
) -> tuple[Tensor, NormalPrior]:
    """Labels (M,) 0..K-1 of a sample x (M, D) after one split of each cluster, or merges, and the prior.

    Without a split or merge that the halves of the sample agree on, the clusters stay what they are.

    >>> x_MD = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 9])
    >>> from deepdpm.priors import PriorSettings
    >>> one_M = torch.zeros(400, dtype=torch.long)
    >>> prior = PriorSettings().make(SufficientStats.from_labels(x_MD, one_M, 1))
    >>> revise(x_MD, one_M, prior, MoveSettings(), torch.Generator().manual_seed(0))[0].max().item()
    1
    """
    rows = _rows(x_MD, settings, generator)
    found = _revised([expectation_maximisation(x_MD[row], labels_M[row], prior, 2) for row in rows], settings)
    return found.labels_M, found.prior


def _rows(x_MD: Tensor, settings: MoveSettings, generator: torch.Generator) -> list[Tensor]:
    """The rows of the sample, and of its two halves, cut so often anew, if these are large enough."""
    num_points, half = len(x_MD), len(x_MD) // 2
    rows = [torch.arange(num_points, device=x_MD.device)]
    for _ in range(settings.halvings if half >= settings.min_half else 0):
        order_M = torch.randperm(num_points, generator=generator, device=generator.device).to(x_MD.device)
        rows += [order_M[:half], order_M[half:]]
    return rows


def _believed(step: Sequence[Partition], settings: MoveSettings) -> Partition:
    """The step of merging that the halves confirm, from the finest on: the sample's partition of it.

    Halves whose points are too few to pay for more than one cluster are silent: they cannot say which step is
    right, and merging ends before valleys are deep.
    """
    silent = len(step) > 1 and all(half.num_clusters == 1 for half in step[1:])
    step = step[:1] if silent else step
    best, finer, found = _worth(step, settings.caution), step[0], step[0]
    for threshold in settings.valleys:
        if silent and threshold < _BLURRED:
            break
        ended = False
        while not ended:
            step, ended = _coarser(step, threshold, _least_entropies(step, best - settings.tolerance))
            if threshold < _BLURRED and all(partition.num_clusters == 1 for partition in step):
                continue
            score = _worth(step, settings.caution)
            if score > best:
                best, finer = score, step[0]
            if _suffices(best - score, finer.entropy() - step[0].entropy(), settings.tolerance):
                found = step[0]
    return without_satellites(found)


def _coarser(
    step: Sequence[Partition], threshold: float, leasts: Sequence[float]
) -> tuple[list[Partition], bool]:
    """The step after this one, and whether the sample has no more to merge at this threshold.

    The step's first partition is the sample's, the others are its halves'; `leasts` as `_least_entropies`
    gives them. Without the limit, 73 pieces of an autoencoder's blurred codes fell to 6 in one step, those of
    the halves to 2 and to 12, and no two agreed. Halves that merge more easily than the sample wait for it.
    """
    fewest = int(_KEPT * step[0].num_clusters)
    first = coarsened(step[0], threshold, leasts[0], fewest)
    fewest_in_halves = int(_KEPT * first.num_clusters)
    halves = [
        coarsened(half, threshold, least, fewest_in_halves)
        for half, least in zip(step[1:], leasts[1:], strict=True)
    ]
    return [first, *halves], first.num_clusters > fewest


def _suffices(lost: float, unsaid: float, tolerance: float) -> bool:
    """Whether a coarser step is believed that is worth so much less than a finer one, and says so much less.

    `lost` is a difference of what two steps are worth (`_worth`: nats, unless nothing is confirmed), `unsaid`
    one of entropies in nats. True clusters that a coarser step joins lose nearly all that it leaves unsaid;
    pieces of a curved one, noise and dents lose little, or gain. Without halves nothing is lost.

    >>> _suffices(0.05, 0.3, 0.1), _suffices(0.01, 0.012, 0.1), _suffices(0.6, 2.9, 0.1)
    (True, False, False)
    """
    return lost <= min(tolerance, _CONFIRMED * max(unsaid, 0.0))


def _worth(step: Sequence[Partition], caution: float) -> float:
    """The agreement of a step in nats; if it is negative, the part of what the step says that is wrong.

    Steps that nothing confirms are near 0 nats merely by saying little: one large cluster and two crumbs.
    """
    score = _agreement(step, caution)
    if score >= 0:
        return score
    entropy = step[0].entropy()
    return score / entropy if entropy > 0 else -math.inf


def _pairs(num_partitions: int) -> list[tuple[int, int]]:
    """Which partitions of a sample (the first) and of its halves (two and two) are compared.

    >>> _pairs(5)
    [(0, 1), (0, 2), (1, 2), (0, 3), (0, 4), (3, 4)]
    """
    firsts = range(1, num_partitions, 2)
    return [pair for first in firsts for pair in itertools.combinations((0, first, first + 1), 2)]


def _agreement(partitions: Sequence[Partition], caution: float) -> float:
    """What partitions of a sample and of its halves tell of each other, less what they get wrong, in nats.

    `I - caution * (H(a | b) + H(b | a))` of the labels that two partitions a and b give all points of the
    sample, the mean over the pairs; 0 for one cluster, and for one partition alone. A cluster cut in two adds
    up to log 2 nats for each of its points, if every partition cuts at the same place; it takes them away if
    more than one point in 25 (at caution 1.5) lies on different sides.
    """
    x_MD = partitions[0].x_MD
    labels = [partitions[0].labels_M]
    labels += [half.mixture.log_joint_NK(x_MD).argmax(1) for half in partitions[1:]]
    sizes = [partition.num_clusters for partition in partitions]
    scores = []
    for a, b in _pairs(len(labels)):
        count_AB = torch.bincount(labels[a] * sizes[b] + labels[b], minlength=sizes[a] * sizes[b])
        share_AB = count_AB.view(sizes[a], sizes[b]) / len(x_MD)
        entropies = [
            torch.special.entr(share).sum() for share in (share_AB, share_AB.sum(0), share_AB.sum(1))
        ]
        joint, of_b, of_a = (float(entropy) for entropy in entropies)
        scores.append(of_a + of_b - joint - caution * (2 * joint - of_a - of_b))
    return sum(scores) / len(scores) if scores else 0.0


def _least_entropies(partitions: Sequence[Partition], score: float) -> list[float]:
    """The entropy that each partition needs, in nats, if merges are to leave their agreement at `score`.

    Two partitions tell of each other no more than the entropy of either, `I(a; b) <= min(H(a), H(b))`, and
    what the pairs without this one tell is at most the highest entropy, for merges add none.
    """
    pairs = _pairs(len(partitions))
    highest = max(partition.entropy() for partition in partitions)
    least = []
    for index in range(len(partitions)):
        touching = sum(index in pair for pair in pairs)
        others = len(pairs) - touching
        least.append((len(pairs) * score - others * highest) / touching if touching else -math.inf)
    return least


def expectation_maximisation(x_MD: Tensor, labels_M: Tensor, prior: NormalPrior, iters: int) -> Partition:
    """EM from hard labels, the prior refitted on the way; clusters left without a point are dropped."""
    stats = SufficientStats.from_labels(x_MD, labels_M, int(labels_M.max()) + 1)
    stats = stats[stats.count_K > 0]
    for i in range(iters):
        if i % _FIT_EVERY == 0:
            prior = fit_empirical_bayes(prior, stats)
        stats = _soft_stats(x_MD, Mixture.m_step(prior, stats).log_joint_NK(x_MD))
        stats = stats[stats.count_K >= 1]
    mixture = Mixture.m_step(prior, stats)
    log_joint_MK = mixture.log_joint_NK(x_MD)
    used_K, labels_M = log_joint_MK.argmax(1).unique(return_inverse=True)
    kept = mixture[used_K]
    kept = replace(kept, weights_K=kept.weights_K / kept.weights_K.sum())
    return Partition(x_MD, labels_M, kept, prior, log_joint_MK[:, used_K])


def _soft_stats(x_MD: Tensor, log_joint_MK: Tensor) -> SufficientStats:
    """Statistics weighted by the responsibilities of each point's three likeliest clusters.

    What the others would get is below what decides anything, and so the cost need not grow with K.
    """
    num_clusters = log_joint_MK.shape[1]
    top = log_joint_MK.topk(min(_SHARED, num_clusters), dim=1)
    weights_MS = top.values.softmax(1)
    if num_clusters * x_MD.shape[1] <= _SMALL_PRODUCT:
        weights_MK = torch.zeros_like(log_joint_MK).scatter_(1, top.indices, weights_MS)
        return SufficientStats.from_weights(x_MD, weights_MK)
    parts = [
        SufficientStats.from_labels(x_MD, top.indices[:, s], num_clusters, weights_MS[:, s])
        for s in range(weights_MS.shape[1])
    ]
    return sum(parts[1:], parts[0])


def _single(x_MD: Tensor, prior: NormalPrior) -> Partition:
    return expectation_maximisation(
        x_MD, torch.zeros(len(x_MD), dtype=torch.long, device=x_MD.device), prior, 1
    )


def finest(x_MD: Tensor, prior: NormalPrior, settings: MoveSettings, generator: torch.Generator) -> Partition:
    """The partition of greatest evidence that merges of k-means cells reach, or one cluster if better."""
    seeds = max(1, min(settings.seeds, len(x_MD) // _POINTS_PER_SEED))
    labels_M = kmeans_labels(x_MD, seeds, generator, max_iter=20)
    found = expectation_maximisation(x_MD, labels_M, prior, 8)
    for _ in range(_MOST_ROUNDS):
        if found.num_clusters < 2:
            return found
        stats, pairs_P2 = found.stats, neighbours(found)
        refitted = fit_empirical_bayes(found.prior, stats)
        gain_P = merge_log_ratios(refitted, stats, pairs_P2, refitted.alpha)
        if not (gain_P > 0).any():
            break
        found = _merged(found, pairs_P2[gain_P > 0], gain_P[gain_P > 0], share=1.0)
    one = _single(x_MD, prior)
    return found if _evidence(found) > _evidence(one) else one


def _evidence(partition: Partition) -> float:
    stats = partition.stats
    prior = fit_empirical_bayes(partition.prior, stats, 2)
    weight_K = torch.lgamma(stats.count_K) + torch.tensor(prior.alpha, dtype=torch.float64).log()
    return float((prior.log_marginal(stats) + weight_K).sum())


def neighbours(partition: Partition) -> Tensor:
    """Pairs (P, 2) worth a merge: each cluster with those it shares most points with, and the nearest."""
    num_clusters = partition.num_clusters
    posterior_MK = torch.nn.functional.threshold(partition.log_joint_MK.softmax(1), _NOT_SHARED, 0.0)
    shared_KK = (posterior_MK.T @ posterior_MK).double()
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

    Half of the merges that don't touch each other are made in each round (`_merged` says when more), those
    first that lose the least evidence a point; then EM. It ends as soon as the entropy of the labels is below
    the least, or no more than the `fewest` clusters are left.
    """
    for _ in range(_MOST_ROUNDS):
        if found.num_clusters <= max(1, fewest) or found.entropy() < least_entropy:
            break
        pairs_P2, ratio_P = found.valleys
        pairs_P2 = pairs_P2[ratio_P > threshold]
        if not len(pairs_P2):
            break
        gain_P = merge_log_ratios(found.prior, found.stats, pairs_P2, found.prior.alpha)
        found = _merged(found, pairs_P2, gain_P / found.stats.count_K[pairs_P2].amin(1), share=0.5)
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
        pairs_P2 = neighbours(found)
        pairs_P2 = pairs_P2[satellites(found, pairs_P2)]
        if not len(pairs_P2):
            break
        mean_KD = found.stats.mean_KD()
        distance_P = (mean_KD[pairs_P2[:, 0]] - mean_KD[pairs_P2[:, 1]]).norm(dim=1)
        found = _merged(found, pairs_P2, -distance_P, share=1.0)
    return found


def _merged(found: Partition, pairs_P2: Tensor, score_P: Tensor, share: float) -> Partition:
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


def _revised(step: Sequence[Partition], settings: MoveSettings) -> Partition:
    """The first partition after splits or merges, if the halves confirm the splits or suffer the merges.

    One rule says which of two steps is believed: so no merge undoes a split.
    """
    score, entropy = _agreement(step, settings.caution), step[0].entropy()
    split = [_split(partition, settings) for partition in step]
    if split[0].num_clusters > step[0].num_clusters:
        gain = _agreement(split, settings.caution) - score
        if len(step) == 1 or not _suffices(gain, split[0].entropy() - entropy, settings.tolerance):
            return split[0]
    merged = [_merged_by_evidence(partition) for partition in step]
    if merged[0].num_clusters < step[0].num_clusters:
        lost = score - _agreement(merged, settings.caution)
        if _suffices(lost, entropy - merged[0].entropy(), settings.tolerance):
            return merged[0]
    return step[0]


def _split(found: Partition, settings: MoveSettings) -> Partition:
    """The partition with each cluster cut in two whose halves the evidence and the density hold apart."""
    stats, num_clusters = found.stats, found.num_clusters
    side_M = subcluster_labels(found.x_MD, found.labels_M, stats)
    halves = SufficientStats.from_labels(found.x_MD, 2 * found.labels_M + side_M, 2 * num_clusters)
    first_K = 2 * torch.arange(num_clusters, device=side_M.device)
    pairs_K2 = torch.stack([first_K, first_K + 1], 1)
    # A prior fitted to clusters that are too wide would hold their halves wide.
    prior = fit_empirical_bayes(found.prior, halves)
    gain_K = split_log_ratios(prior, halves, prior.alpha, settings.min_points)
    mixture = Mixture.m_step(prior, halves)
    ratio_K = valley_ratios(found.x_MD, 2 * found.labels_M + side_M, halves, mixture, pairs_K2)
    accepted_K = (gain_K > 0) & (ratio_K < settings.clear_valley)
    if not accepted_K.any():
        return found
    side_M = torch.where(accepted_K[found.labels_M], side_M, 0)
    labels_M = (2 * found.labels_M + side_M).unique(return_inverse=True)[1]
    return without_satellites(expectation_maximisation(found.x_MD, labels_M, prior, 8))


def _merged_by_evidence(found: Partition) -> Partition:
    """The partition after the merges that the evidence asks for."""
    if found.num_clusters < 2:
        return found
    pairs_P2 = neighbours(found)
    gain_P = merge_log_ratios(found.prior, found.stats, pairs_P2, found.prior.alpha)
    if not (gain_P > 0).any():
        return found
    return _merged(found, pairs_P2[gain_P > 0], gain_P[gain_P > 0], share=1.0)
