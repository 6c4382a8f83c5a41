"""Sufficient statistics of weighted sets of points: all that the mixture, the priors and the moves ever see.

Legend: N points, D dimensions, K sets (clusters or subclusters), B points of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1_000_000
_MOST_SPACED = 2000


@dataclass(frozen=True)
class SufficientStats:
    """Count, sum and second moment of K weighted sets: `n`, `sum r x`, `sum r x x^T` (float64).

    They add over batches, devices and merged sets. Points should be centred (on the data's mean, say) before
    they are accumulated: the second moment of far-away points loses the digits that the scatter needs.

    Shapes: count_K (K,), sum_KD (K, D), outer_KDD (K, D, D).

    >>> x_ND = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]])
    >>> stats = SufficientStats.from_labels(x_ND, torch.tensor([0, 0, 1]), num_clusters=2)
    >>> stats.count_K.tolist(), stats.mean_KD.tolist()
    ([2.0, 1.0], [[1.0, 1.0], [5.0, 5.0]])
    """

    count_K: Tensor
    sum_KD: Tensor
    outer_KDD: Tensor

    @classmethod
    def zeros(
        cls, num_clusters: int, num_dims: int, device: torch.device | str | None = None
    ) -> SufficientStats:
        """The statistics of `num_clusters` empty sets."""
        like = torch.empty(0, dtype=torch.float64, device=device)
        return cls(
            like.new_zeros(num_clusters),
            like.new_zeros(num_clusters, num_dims),
            like.new_zeros(num_clusters, num_dims, num_dims),
        )

    @classmethod
    def from_weights(cls, x_ND: Tensor, weights_NK: Tensor) -> SufficientStats:
        """Statistics of the K sets in which point i has weight `weights_NK[i, k]`.

        One matrix product, 2 N K D^2 operations, in chunks that stay in a processor's cache: of the weights
        and x x^T, or of r x and x, whichever is smaller.

        Shapes: x (N, D), weights (N, K).
        """
        num_points, num_dims = x_ND.shape
        num_clusters = weights_NK.shape[1]
        count_K = torch.zeros(num_clusters, dtype=torch.float64, device=x_ND.device)
        sum_KD = torch.zeros(num_clusters, num_dims, dtype=torch.float64, device=x_ND.device)
        outer_KDD = torch.zeros(num_clusters, num_dims, num_dims, dtype=torch.float64, device=x_ND.device)
        step = max(1, _CHUNK_ELEMENTS // (min(num_clusters, num_dims) * num_dims))
        for start in range(0, num_points, step):
            x_BD = x_ND[start : start + step].double()
            weights_BK = weights_NK[start : start + step].double()
            count_K += weights_BK.sum(0)
            sum_KD += weights_BK.T @ x_BD
            if num_dims < num_clusters:
                product = weights_BK.T @ (x_BD[:, :, None] * x_BD[:, None, :]).flatten(1)
            else:
                product = (weights_BK[:, :, None] * x_BD[:, None, :]).flatten(1).T @ x_BD
            outer_KDD += product.view_as(outer_KDD)
        outer_KDD = (outer_KDD + outer_KDD.mT) / 2
        return cls(count_K, sum_KD, outer_KDD)

    @classmethod
    def from_labels(
        cls, x_ND: Tensor, labels_N: Tensor, num_clusters: int, weights_N: Tensor | None = None
    ) -> SufficientStats:
        """Statistics of the sets that hard labels 0..K-1 make; a negative label leaves its point out.

        A point counts for one, or for its weight. Points are sorted by label and each set is padded to a
        multiple of one block, so the cost is N D^2 whatever K.

        Shapes: x (N, D), labels (N,), weights (N,) or None.
        """
        num_dims = x_ND.shape[1]
        kept_M = (labels_N >= 0).nonzero().squeeze(1)
        order_M = kept_M[labels_N[kept_M].argsort(stable=True)]
        counts_K = torch.bincount(labels_N[kept_M], minlength=num_clusters)
        root_N = None if weights_N is None else weights_N.double().sqrt()
        stats = cls.zeros(num_clusters, num_dims, x_ND.device)
        if order_M.numel() == 0:
            return stats
        block = 64 if order_M.numel() >= 64 * num_clusters else 8
        blocks_K = (counts_K + block - 1) // block
        owner_P = torch.repeat_interleave(torch.arange(num_clusters, device=x_ND.device), blocks_K)
        first_K = counts_K.cumsum(0) - counts_K
        first_block_K = blocks_K.cumsum(0) - blocks_K
        within_P = torch.arange(owner_P.numel(), device=x_ND.device) - first_block_K[owner_P]
        offset_PB = within_P[:, None] * block + torch.arange(block, device=x_ND.device)
        valid_PB = offset_PB < counts_K[owner_P, None]
        index_PB = order_M[(first_K[owner_P, None] + offset_PB).clamp_max(order_M.numel() - 1)]
        count_K, sum_KD, outer_KDD = stats.count_K, stats.sum_KD, stats.outer_KDD
        step = max(1, _CHUNK_ELEMENTS // (max(block, num_dims) * num_dims))
        for start in range(0, owner_P.numel(), step):
            chunk = slice(start, start + step)
            root_PB = valid_PB[chunk].double()
            if root_N is not None:
                root_PB *= root_N[index_PB[chunk]]
            x_PBD = x_ND[index_PB[chunk]].double() * root_PB[:, :, None]
            if root_N is not None:
                count_K.index_add_(0, owner_P[chunk], root_PB.square().sum(1))
            sum_KD.index_add_(0, owner_P[chunk], (x_PBD * root_PB[:, :, None]).sum(1))
            outer_KDD.index_add_(0, owner_P[chunk], x_PBD.mT @ x_PBD)
        return cls(counts_K.double() if root_N is None else count_K, sum_KD, outer_KDD)

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.count_K.numel()

    @property
    def num_dims(self) -> int:
        """D."""
        return self.sum_KD.shape[1]

    def __add__(self, other: SufficientStats) -> SufficientStats:
        return SufficientStats(
            self.count_K + other.count_K, self.sum_KD + other.sum_KD, self.outer_KDD + other.outer_KDD
        )

    def __sub__(self, other: SufficientStats) -> SufficientStats:
        return SufficientStats(
            self.count_K - other.count_K, self.sum_KD - other.sum_KD, self.outer_KDD - other.outer_KDD
        )

    def scaled(self, factor: float | Tensor) -> SufficientStats:
        """The statistics with every weight multiplied by a number, or by one number for each set (K,)."""
        factor_K = self.count_K.new_ones(()).mul(factor).expand_as(self.count_K)
        return SufficientStats(
            self.count_K * factor_K, self.sum_KD * factor_K[:, None], self.outer_KDD * factor_K[:, None, None]
        )

    def recounted(self, count_K: Tensor) -> SufficientStats:
        """The statistics with every set's weights scaled so that they add up to these counts (K,)."""
        return self.scaled(count_K / self.count_K.clamp_min(torch.finfo(torch.float64).tiny))

    def __getitem__(self, index: Tensor | slice) -> SufficientStats:
        """The statistics of some of the sets, by position or mask."""
        return SufficientStats(self.count_K[index], self.sum_KD[index], self.outer_KDD[index])

    def total(self) -> SufficientStats:
        """The statistics of the union, as K = 1."""
        return SufficientStats(
            self.count_K.sum(0, keepdim=True),
            self.sum_KD.sum(0, keepdim=True),
            self.outer_KDD.sum(0, keepdim=True),
        )

    def group(self, groups_K: Tensor, num_groups: int) -> SufficientStats:
        """The statistics of unions: set k goes into group `groups_K[k]`; negative leaves it out."""
        kept_K = groups_K >= 0
        out = SufficientStats.zeros(num_groups, self.num_dims, self.count_K.device)
        out.count_K.index_add_(0, groups_K[kept_K], self.count_K[kept_K])
        out.sum_KD.index_add_(0, groups_K[kept_K], self.sum_KD[kept_K])
        out.outer_KDD.index_add_(0, groups_K[kept_K], self.outer_KDD[kept_K])
        return out

    @staticmethod
    def cat(parts: list[SufficientStats]) -> SufficientStats:
        """The sets of several statistics, one after another."""
        return SufficientStats(
            torch.cat([part.count_K for part in parts]),
            torch.cat([part.sum_KD for part in parts]),
            torch.cat([part.outer_KDD for part in parts]),
        )

    @cached_property
    def mean_KD(self) -> Tensor:
        """Means (K, D); zero for an empty set."""
        return self.sum_KD / self.count_K.clamp_min(torch.finfo(torch.float64).tiny)[:, None]

    @cached_property
    def scatter_KDD(self) -> Tensor:
        """Scatter about the mean, `sum (x - xbar)(x - xbar)^T` (K, D, D), symmetric."""
        mean_KD = self.mean_KD
        scatter_KDD = self.outer_KDD - self.count_K[:, None, None] * mean_KD[:, :, None] * mean_KD[:, None, :]
        return (scatter_KDD + scatter_KDD.mT) / 2


def squared_spacing(x_ND: Tensor) -> Tensor:
    """The squared distance from a point to the nearest that differs from it, as the columns share it (D,).

    Its median over at most 2,000 points, evenly taken, times the mean share that each column has in it: so no
    column in large units blurs one in small units. 0 if no two points differ. In squared units of x, float64.
    Shapes: x (N, D).

    >>> squared_spacing(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0], [5.0, 2.0]])).tolist()
    [1.0, 3.0]
    """
    x_MD = x_ND[:: math.ceil(len(x_ND) / _MOST_SPACED)]
    # Products would leave equal points some rounding error apart.
    distance_MM = torch.cdist(x_MD, x_MD, compute_mode="donot_use_mm_for_euclid_dist")
    nearest_M, neighbour_M = distance_MM.masked_fill(distance_MM == 0, math.inf).min(1)
    if not nearest_M.isfinite().all():
        return torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    squares_MD = (x_MD - x_MD[neighbour_M]).double().square()
    return nearest_M.median().double().square() * (squares_MD / squares_MD.sum(1, keepdim=True)).mean(0)
