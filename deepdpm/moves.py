"""Split and merge moves: Hastings ratios, proposals, and the Plan that all that belongs to clusters follows.

Legend: M points of a sample, D dimensions, K clusters, P pairs, U clusters that are in a pair; a final 2 is
the subclusters of a cluster, or the clusters of a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepdpm.checks import check_choices, check_fraction, check_least
from deepdpm.priors import NormalPrior
from deepdpm.stats import SufficientStats

MovesKind = Literal["search", "published"]


@dataclass(frozen=True)
class MoveSettings:
    """Say how K changes.

    Attributes:
        kind: "search" looks for the whole structure on a sample, from many proposals; "published" is the
            paper's: one split or merge step, proposed by the subclusters and by the nearest centres.
        sample_size: points that the search sees, and that fresh subclusters start from.
        seeds: "search": k-means centres that the search starts from; both are doubled for as long as more
            than half of the centres become clusters.
        valleys: "search": the steps of merging. Clusters are merged while the density's valley between them
            is higher than this fraction of its lower peak.
        caution: "search": of all steps that one is believed whose clusters come back best from the halves of
            the sample; a nat of information that differs costs so many nats that agree.
        tolerance: "search": a coarser step is believed if it is worth at most so many nats less than a finer
            one, and at most .3 of what it leaves unsaid.
        halvings: "search": so often the sample is cut in halves anew, and the mean decides; half as often
            with each doubling. With 0 the evidence decides.
        min_half: "search": halves of fewer points are not tried; then the evidence decides.
        clear_valley: "search": later steps split a cluster if the valley between its halves is lower.
        min_points: "published": both halves of a split need more points than this.
        neighbours: "published": merges are offered to each centre with so many of its nearest.
        split_prob: "published": accept a split with this probability, in place of the Hastings ratio.
        merge_prob: the same for merges.
        init_new_weights: output rows of a split cluster's children: "same" as their parent's, "random", or
            those of its "subclusters" net.
        split_init_weights_sub: subcluster nets of a split cluster's children: "random", "same" as their
            parent's, or "same_w_noise".
        merge_init_weights: output row of a merged cluster: of the parent of "highest_ll", or "random".
        merge_init_weights_sub: the same for its subcluster net.

    Raises:
        ValueError: a value out of range, naming the setting.
    """

    kind: MovesKind = "search"
    sample_size: int = 6_000
    seeds: int = 128
    valleys: tuple[float, ...] = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2)
    caution: float = 1.5
    tolerance: float = 0.1
    halvings: int = 4
    min_half: int = 50
    clear_valley: float = 0.2
    min_points: int = 5
    neighbours: int = 2
    split_prob: float | None = None
    merge_prob: float | None = None
    init_new_weights: Literal["same", "random", "subclusters"] = "same"
    split_init_weights_sub: Literal["random", "same", "same_w_noise"] = "random"
    merge_init_weights: Literal["highest_ll", "random"] = "highest_ll"
    merge_init_weights_sub: Literal["highest_ll", "random"] = "highest_ll"

    def __post_init__(self) -> None:
        object.__setattr__(self, "valleys", tuple(self.valleys))
        check_choices(self, "model.moves")
        least = {
            "sample_size": 2,
            "seeds": 1,
            "halvings": 0,
            "min_half": 2,
            "min_points": 0,
            "neighbours": 1,
            "caution": 0,
            "tolerance": 0,
        }
        check_least(self, "model.moves", least)
        check_fraction(self, "model.moves", ("valleys", "clear_valley", "split_prob", "merge_prob"))


@dataclass(frozen=True)
class Move:
    """One change of structure, by the stable ids of clusters.

    A "remove" takes away a cluster that owned no point.

    >>> print(Move("split", (3,), (3, 7)), Move("merge", (2, 5), (2,)), Move("remove", (4,), ()), sep="; ")
    split 3 -> 3, 7; merge 2 + 5 -> 2; remove 4
    """

    kind: Literal["split", "merge", "remove"]
    parents: tuple[int, ...]
    children: tuple[int, ...]

    def __str__(self) -> str:
        text = f"{self.kind} {' + '.join(map(str, self.parents))}"
        return f"{text} -> {', '.join(map(str, self.children))}" if self.children else text


@dataclass(frozen=True)
class Plan:
    """For each new cluster the old row it comes from: what nets, moments, mixture and ids all follow.

    Shapes: parents_K (K,) integers in 0..K_old-1; fresh_K (K,) bool, true for the rows that a split or merge
    made; ids_K (K,) the stable ids; next_id is the first id never used; moves tell what happened.
    """

    parents_K: Tensor
    fresh_K: Tensor
    ids_K: Tensor
    next_id: int
    moves: tuple[Move, ...]

    @property
    def num_clusters(self) -> int:
        """K after the moves."""
        return self.parents_K.numel()


def _log_gamma_or_zero(count: Tensor) -> Tensor:
    return torch.where(count > 0, torch.lgamma(count.clamp_min(1e-300)), torch.zeros_like(count))


def _log_weight(prior: NormalPrior, stats: SufficientStats) -> Tensor:
    """`lnGamma(n) + log p(set)` of each set, with lnGamma(0) = 0."""
    return _log_gamma_or_zero(stats.count_K) + prior.log_marginal(stats)


def split_log_ratios(
    prior: NormalPrior, sub_stats: SufficientStats, alpha: float, min_points: int = 5
) -> Tensor:
    """Log Hastings ratios (K,) of splitting each cluster into its two subclusters.

    `log alpha + lnGamma(n1) + log p(set1) + lnGamma(n2) + log p(set2) - lnGamma(n) - log p(set)` (paper,
    section 4.3); minus infinity unless both subclusters own more than `min_points` points.

    Shapes: sub_stats holds 2K sets, those of cluster k at 2k and 2k + 1.
    """
    num_clusters = sub_stats.num_clusters // 2
    group = torch.arange(2 * num_clusters, device=sub_stats.count_K.device) // 2
    whole_K = _log_weight(prior, sub_stats.group(group, num_clusters))
    halves_K = _log_weight(prior, sub_stats).view(num_clusters, 2).sum(1)
    allowed_K = (sub_stats.count_K.view(num_clusters, 2) > min_points).all(1)
    return torch.where(allowed_K, math.log(alpha) + halves_K - whole_K, -math.inf)


def merge_log_ratios(prior: NormalPrior, stats: SufficientStats, pairs_P2: Tensor, alpha: float) -> Tensor:
    """Log Hastings ratios (P,) of merging pairs of clusters: the negatives of the split's.

    An empty cluster's lnGamma(0) counts as zero, and two empty clusters always merge.

    Shapes: stats holds K sets, pairs (P, 2) positions of clusters.
    """
    # Of each cluster once, in however many pairs it is.
    used_U, place_P2 = pairs_P2.unique(return_inverse=True)
    apart_P = _log_weight(prior, stats[used_U])[place_P2].sum(1)
    together = stats[pairs_P2[:, 0]] + stats[pairs_P2[:, 1]]
    ratio_P = _log_weight(prior, together) - apart_P - math.log(alpha)
    return torch.where(together.count_K == 0, math.inf, ratio_P)


def nearest_pairs(means_KD: Tensor, neighbours: int = 2) -> Tensor:
    """Pairs (P, 2) of each centre with its nearest others, each pair once and in order.

    >>> nearest_pairs(torch.tensor([[0.0], [1.0], [10.0]]), neighbours=1).tolist()
    [[0, 1], [1, 2]]
    """
    num_clusters = means_KD.shape[0]
    if num_clusters < 2:
        return torch.empty(0, 2, dtype=torch.long, device=means_KD.device)
    distance_KK = torch.cdist(means_KD, means_KD).fill_diagonal_(math.inf)
    nearest_KJ = distance_KK.topk(min(neighbours, num_clusters - 1), largest=False).indices
    own_KJ = torch.arange(num_clusters, device=means_KD.device)[:, None].expand_as(nearest_KJ)
    pairs_P2 = torch.stack((own_KJ.flatten(), nearest_KJ.flatten()), 1).sort(1).values
    return pairs_P2.unique(dim=0)


def accept(log_ratios: Tensor, generator: torch.Generator, probability: float | None = None) -> Tensor:
    """Which moves are accepted: with probability min(1, H), or with a given one where a move is possible.

    The coins come from a CPU generator of the moves' own, one for each move whatever its ratio.

    >>> accept(torch.tensor([1.0, -1e9, 2.0]), torch.Generator().manual_seed(0)).tolist()
    [True, False, True]
    """
    coins = torch.rand(log_ratios.shape, generator=generator, dtype=torch.float64).to(log_ratios.device)
    if probability is not None:
        return (log_ratios > -math.inf) & (coins < probability)
    return coins.log() < log_ratios


def plan_splits(accepted_K: Tensor, ids_K: Tensor, next_id: int) -> Plan:
    """The Plan that splits the clusters of a mask (K,): child 1 keeps place and id, child 2 is last.

    >>> plan = plan_splits(torch.tensor([False, True]), torch.tensor([3, 4]), next_id=9)
    >>> plan.parents_K.tolist(), plan.ids_K.tolist(), [str(move) for move in plan.moves]
    ([0, 1, 1], [3, 4, 9], ['split 4 -> 4, 9'])
    """
    split = accepted_K.cpu().nonzero()[:, 0]
    ids_K, num_old = ids_K.cpu(), ids_K.numel()
    new_ids = torch.arange(next_id, next_id + split.numel())
    fresh_K = torch.cat((accepted_K.cpu(), torch.ones(split.numel(), dtype=torch.bool)))
    moves = tuple(
        Move("split", (old,), (old, new))
        for old, new in zip(ids_K[split].tolist(), new_ids.tolist(), strict=True)
    )
    parents_K = torch.cat((torch.arange(num_old), split))
    return Plan(parents_K, fresh_K, torch.cat((ids_K, new_ids)), next_id + split.numel(), moves)


def choose_merges(pairs_P2: Tensor, log_ratios_P: Tensor, accepted_P: Tensor) -> list[tuple[int, int]]:
    """Of the accepted pairs, best ratio first, those whose clusters take part in no other: one merge each.

    >>> choose_merges(torch.tensor([[0, 1], [1, 2]]), torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    [(1, 2)]
    """
    ranked = log_ratios_P.masked_fill(~accepted_P, -math.inf).argsort(descending=True, stable=True)
    taken: set[int] = set()
    chosen = []
    for first, second in pairs_P2[ranked[: int(accepted_P.sum())]].tolist():
        if first not in taken and second not in taken:
            taken |= {first, second}
            chosen.append((first, second))
    return chosen


def plan_merges(
    merges: list[tuple[int, int]], log_weights_K: Tensor, ids_K: Tensor, next_id: int
) -> tuple[Plan, Tensor]:
    """The Plan that merges disjoint pairs, and the new place (K_old,) of each old cluster.

    A merged cluster comes from its likelier parent: row and id are those of the higher log weight.

    >>> plan, place = plan_merges([(0, 2)], torch.tensor([1.0, 0.0, 5.0]), torch.tensor([3, 4, 5]), 9)
    >>> plan.parents_K.tolist(), plan.ids_K.tolist(), place.tolist(), str(plan.moves[0])
    ([1, 2], [4, 5], [1, 0, 1], 'merge 5 + 3 -> 5')
    """
    num_old = ids_K.numel()
    into = torch.arange(num_old)
    weights, ids = log_weights_K.tolist(), ids_K.tolist()
    fresh = torch.zeros(num_old, dtype=torch.bool)
    moves = []
    for first, second in merges:
        kept, lost = (first, second) if weights[first] >= weights[second] else (second, first)
        into[lost], fresh[kept] = kept, True
        moves.append(Move("merge", (ids[kept], ids[lost]), (ids[kept],)))
    parents_K = (into == torch.arange(num_old)).nonzero()[:, 0]
    place = torch.full((num_old,), -1)
    place[parents_K] = torch.arange(parents_K.numel())
    plan = Plan(parents_K, fresh[parents_K], ids_K.cpu()[parents_K], next_id, tuple(moves))
    return plan, place[into]


def plan_from_labels(
    old_labels_M: Tensor, new_labels_M: Tensor, num_old: int, num_new: int, ids_K: Tensor, next_id: int
) -> Plan:
    """The Plan that leads from one labelling of a sample to another, read off their contingency table.

    A new cluster's parent is the old cluster that gives it most of its points. Children of one parent are a
    split: the largest keeps the id. An old cluster that is no parent is merged into the new cluster that
    takes most of its points, or removed if it has none. Rows are fresh if a split or merge made them.

    Shapes: labels (M,) in 0..num_old-1 and 0..num_new-1, each new cluster with a point; ids (num_old,).

    >>> old, new = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 2, 2])
    >>> plan = plan_from_labels(old, new, 3, 3, ids_K=torch.tensor([0, 1, 2]), next_id=3)
    >>> plan.parents_K.tolist(), plan.ids_K.tolist(), "; ".join(map(str, plan.moves))
    ([0, 0, 2], [0, 3, 2], 'split 0 -> 0, 3; merge 2 + 1 -> 2')
    """
    old_labels_M, new_labels_M, ids_K = old_labels_M.cpu(), new_labels_M.cpu(), ids_K.cpu()
    table = torch.bincount(old_labels_M * num_new + new_labels_M, minlength=num_old * num_new)
    table = table.view(num_old, num_new)
    size_K = table.sum(0)
    assert (size_K > 0).all(), "a new cluster without points"
    parents_K = table.argmax(0)
    fresh_K = torch.bincount(parents_K, minlength=num_old)[parents_K] > 1
    # Each parent's largest child keeps its id; the others are numbered in their order.
    order = size_K.argsort(descending=True, stable=True)
    first_K = torch.zeros(num_new, dtype=torch.bool)
    heirs: dict[int, int] = {}
    for child, parent in zip(order.tolist(), parents_K[order].tolist(), strict=True):
        if heirs.setdefault(parent, child) == child:
            first_K[child] = True
    new_ids_K = ids_K[parents_K].clone()
    new_ids_K[~first_K] = torch.arange(next_id, next_id + int((~first_K).sum()))

    moves = []
    for parent, heir in sorted(heirs.items()):
        if fresh_K[heir]:
            others = ((parents_K == parent) & ~first_K).nonzero()[:, 0]
            children = (int(ids_K[parent]), *new_ids_K[others].tolist())
            moves.append(Move("split", (int(ids_K[parent]),), children))
    absorbed: dict[int, list[int]] = {}
    for row in [row for row in range(num_old) if row not in heirs]:
        if table[row].sum() == 0:
            moves.append(Move("remove", (int(ids_K[row]),), ()))
        else:
            absorbed.setdefault(int(table[row].argmax()), []).append(int(ids_K[row]))
    for child, lost in sorted(absorbed.items()):
        fresh_K[child] = True
        moves.append(Move("merge", (int(new_ids_K[child]), *lost), (int(new_ids_K[child]),)))
    return Plan(parents_K, fresh_K, new_ids_K, next_id + int((~first_K).sum()), tuple(moves))
