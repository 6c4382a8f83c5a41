"""The default moves: the whole structure, found on a sample from many proposals, and checked on its halves.

1. Many k-means centres, EM, and merges from these down to one cluster: where the evidence is greatest on this
   path is the finest structure that the data pay for (`partition.py`).
2. Merges of clusters with no valley of the density between them (`separation.py`), the valley's depth asked
   for growing from step to step; EM after each round. Clusters that blur into each other are all merged at
   one depth, so a step ends when half of them are left, and the next goes on.
3. Which step to believe: the one whose clusters come back best when each half of the sample is clustered by
   itself (as Lange et al. 2004 ask, measured in nats), the mean over several ways to halve it. Gaussian
   clusters that overlap come back as they are and are not merged; the pieces into which evidence cuts a
   curved or heavy-tailed cluster do not. Where nothing is confirmed, what is wrong is weighed by all that a
   step says. Where the halves agree on other clusters than the sample's, theirs are taken. Where they have
   too few points to say anything, the evidence decides.
4. Satellites, small clumps within the reach of a much larger cluster, are joined to it.

Legend: M points, D dimensions, K clusters, P pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deepdpm.kmeans import subcluster_labels
from deepdpm.mixture import Mixture
from deepdpm.moves import MoveSettings, split_log_ratios
from deepdpm.partition import (
    Partition,
    coarsened,
    evidence,
    expectation_maximisation,
    finest,
    merged_by_evidence,
    pieces,
    without_satellites,
)
from deepdpm.priors import NormalPrior, fit_empirical_bayes
from deepdpm.separation import valley_ratios

# Of the centres: with more clusters, true ones are likely to have shared a centre.
_SPARSE = 0.5
# Share of the sample's clusters that a step leaves, and, of those, of clusters in the halves.
_KEPT = 0.5
# One cluster is believed only if nothing in it was ever divided by a valley deeper than this, and so is any
# step that the halves have no say in.
_BLURRED = 0.5
# And only if more than so much of what any finer step says is wrong: it cannot be wrong itself.
_WRONG = 0.1
# A half that pays for no more than this share of the sample's clusters has no say in which of them are right.
_KNOWN = 1 / 3
# Where the evidence speaks alone, a coarser step may lose so many nats of it a point.
_SPARED = 0.03
# Of the entropy that a finer step has beyond a coarser one, more than so much has to be confirmed.
_CONFIRMED = 0.3


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
    >>> from deepdpm.stats import SufficientStats
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
        whole = pieces(x_MD, prior, settings, generator)
        if not can_double or whole.num_clusters <= _SPARSE * settings.seeds:
            halves = [pieces(x_MD[row], prior, settings, generator) for row in rows[1:]]
            found = _believed([finest(each) for each in (whole, *halves)], settings)
            return x_MD, found.labels_M, found.prior
        settings = replace(
            settings,
            seeds=2 * settings.seeds,
            sample_size=2 * settings.sample_size,
            halvings=(settings.halvings + 1) // 2,
        )


def revise(
    x_MD: Tensor, labels_M: Tensor, prior: NormalPrior, settings: MoveSettings, generator: torch.Generator
) -> tuple[Tensor, NormalPrior]:
    """Labels (M,) 0..K-1 of a sample x (M, D) after one split of each cluster, or merges, and the prior.

    Without a split or merge that the halves of the sample agree on, the clusters stay what they are.

    >>> x_MD = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 9])
    >>> from deepdpm.priors import PriorSettings
    >>> from deepdpm.stats import SufficientStats
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

    Halves are silent if half of them or more have too few points to pay for more than a third of the sample's
    clusters, or for more than one: they cannot say which step is right. Then the evidence speaks, and merging
    ends before valleys are deep.
    """
    known = max(1, int(_KNOWN * step[0].num_clusters))
    alone = 2 * sum(half.num_clusters <= known for half in step[1:]) >= len(step) - 1
    step, tolerance = (step[:1], _SPARED) if alone else (step, settings.tolerance)
    best, finer, found = _worth(step, settings.caution), step, step
    for threshold in settings.valleys:
        if alone and threshold < _BLURRED:
            break
        ended = False
        while not ended:
            step, ended = _coarser(step, threshold, _least_entropies(step, best - tolerance))
            if threshold < _BLURRED and all(partition.num_clusters == 1 for partition in step):
                continue
            if step[0].num_clusters == 1 and best >= -_WRONG and not alone:
                continue
            score = _worth(step, settings.caution)
            if score > best:
                best, finer, found = score, step, step
            # Among steps that nothing confirms, one that is nearly as wrong is not as good.
            elif alone or best >= 0:
                unsaid = finer[0].entropy() - step[0].entropy()
                found = step if _suffices(best - score, unsaid, tolerance) else found
    return without_satellites(_typical(found, settings))


def _typical(step: Sequence[Partition], settings: MoveSettings) -> Partition:
    """The sample's partition of a step; or, where halves agree with each other and not with it, the best one.

    The best one agrees most with all others on the mean; the sample's has to come to half of that. So merges
    are undone that went one way in the sample and another in most of its halves: six classes of soil became
    two, where the halves agreed on three.
    """
    if len(step) == 1:
        return step[0]
    labels = _labels_of(step)
    scores = [
        sum(_agree(one, other, settings.caution) for j, other in enumerate(labels) if j != i)
        / (len(labels) - 1)
        for i, one in enumerate(labels)
    ]
    best = max(range(len(scores)), key=scores.__getitem__)
    if scores[0] >= scores[best] / 2 or scores[best] <= settings.tolerance:
        return step[0]
    return expectation_maximisation(step[0].x_MD, labels[best], step[best].prior, 8)


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
    pieces of a curved one, noise and dents lose little, or gain.

    >>> _suffices(0.05, 0.3, 0.1), _suffices(0.01, 0.012, 0.1), _suffices(0.6, 2.9, 0.1)
    (True, False, False)
    """
    return lost <= min(tolerance, _CONFIRMED * max(unsaid, 0.0))


def _worth(step: Sequence[Partition], caution: float) -> float:
    """The agreement of a step in nats; if it is negative, the part of what the step says that is wrong.

    Steps that nothing confirms are near 0 nats merely by saying little: one large cluster and two crumbs.
    Of a sample alone, without halves, it is the log evidence of a point.
    """
    if len(step) == 1:
        return evidence(step[0]) / len(step[0].x_MD)
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
    labels = _labels_of(partitions)
    scores = [_agree(labels[a], labels[b], caution) for a, b in _pairs(len(labels))]
    return sum(scores) / len(scores) if scores else 0.0


def _labels_of(partitions: Sequence[Partition]) -> list[Tensor]:
    """The labels (M,) that each partition, of the sample or a half, gives all points of the sample."""
    x_MD = partitions[0].x_MD
    halves = [half.mixture.log_joint_NK(x_MD).argmax(1) for half in partitions[1:]]
    return [partitions[0].labels_M, *halves]


def _agree(first_M: Tensor, second_M: Tensor, caution: float) -> float:
    """`I(a; b) - caution * (H(a | b) + H(b | a))` of two labellings, in nats.

    >>> round(_agree(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0]), 1.5), 4)
    0.6931
    """
    sizes = int(first_M.max()) + 1, int(second_M.max()) + 1
    count_AB = torch.bincount(first_M * sizes[1] + second_M, minlength=sizes[0] * sizes[1])
    share_AB = count_AB.view(*sizes) / len(first_M)
    joint, of_b, of_a = (
        float(torch.special.entr(share).sum()) for share in (share_AB, share_AB.sum(0), share_AB.sum(1))
    )
    return of_a + of_b - joint - caution * (2 * joint - of_a - of_b)


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
    merged = [merged_by_evidence(partition) for partition in step]
    if merged[0].num_clusters < step[0].num_clusters:
        lost = score - _agreement(merged, settings.caution)
        if _suffices(lost, entropy - merged[0].entropy(), settings.tolerance):
            return merged[0]
    return step[0]


def _split(found: Partition, settings: MoveSettings) -> Partition:
    """The partition with each cluster cut in two whose halves the evidence and the density hold apart."""
    stats, num_clusters = found.stats, found.num_clusters
    side_M = subcluster_labels(found.x_MD, found.labels_M, stats)
    halves = found.stats_of(2 * found.labels_M + side_M, 2 * num_clusters)
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
    split = expectation_maximisation(found.x_MD, labels_M, prior, 8, found.precisions_M)
    return without_satellites(split)
