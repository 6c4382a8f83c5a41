"""What one epoch adds up, on the device and over all processes: sums of losses, and statistics of clusters.

Legend: B points of a batch, D dimensions, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepdpm.processes import sum_over_processes
from deepdpm.stats import SufficientStats


@dataclass
class EpochSums:
    """Sums over the points of an epoch: how many, their log density, their losses, and sufficient statistics.

    `stats` are weighted by the responsibilities that the M-step takes, times a point's precision
    (`Mixture.precisions`), and `counts_K` by the responsibilities alone; `sub_stats` (2K sets) by the
    subcluster nets among each point's own cluster; `hard_stats` (2K sets) count every point for its best
    subcluster. Statistics are None in an epoch that does not need them.
    """

    totals_4: Tensor
    counts_K: Tensor
    stats: SufficientStats | None
    sub_stats: SufficientStats | None
    hard_stats: SufficientStats | None

    @classmethod
    def zeros(
        cls, num_clusters: int, num_dims: int, device: torch.device, wants: tuple[bool, bool, bool]
    ) -> EpochSums:
        """Sums of nothing; `wants` says which of the three statistics are kept."""
        sizes = (num_clusters, 2 * num_clusters, 2 * num_clusters)
        parts = [
            SufficientStats.zeros(size, num_dims, device) if wanted else None
            for size, wanted in zip(sizes, wants, strict=True)
        ]
        totals_4 = torch.zeros(4, dtype=torch.float64, device=device)
        return cls(totals_4, totals_4.new_zeros(num_clusters), *parts)

    def add_batch(self, log_density_B: Tensor, cluster_loss: Tensor, subcluster_loss: Tensor | None) -> None:
        """Add a batch's points to the totals; losses are means over the batch."""
        count = torch.full_like(self.totals_4[0], len(log_density_B))
        second = torch.zeros_like(count) if subcluster_loss is None else subcluster_loss.detach()
        losses = torch.stack((cluster_loss.detach().to(count), second.to(count))) * count
        self.totals_4 += torch.cat((torch.stack((count, log_density_B.sum().to(count))), losses))

    def add_stats(self, x_BD: Tensor, r_BK: Tensor, precisions_BK: Tensor | None) -> None:
        """Add a batch (B, D) to the clusters' statistics, by responsibilities and precisions (B, K)."""
        assert self.stats is not None, "an epoch without an M-step"
        weights_BK = r_BK if precisions_BK is None else r_BK * precisions_BK
        self.stats = self.stats + SufficientStats.from_weights(x_BD, weights_BK)
        self.counts_K += r_BK.double().sum(0)

    def cluster_stats(self) -> SufficientStats | None:
        """The clusters' statistics as the M-step takes them: of points that count for one on the mean.

        Scaling the weights leaves where EM ends as it is, and it comes there sooner (Kent, Tyler and Vardi
        1994). A prior that pulls covariances down would else pull them down without end, nu being small.
        """
        return None if self.stats is None else self.stats.recounted(self.counts_K)

    def add_sub_stats(self, x_BD: Tensor, z_B: Tensor, rsub_B2: Tensor) -> None:
        """Add a batch to the subclusters' statistics, soft and hard; z (B,) are the points' clusters."""
        if self.sub_stats is not None:
            num_clusters = self.sub_stats.num_clusters // 2
            # Two passes over the points, whatever K: all of the cluster, and the part of subcluster 1.
            whole = SufficientStats.from_labels(x_BD, z_B, num_clusters)
            second = SufficientStats.from_labels(x_BD, z_B, num_clusters, rsub_B2[:, 1])
            both = SufficientStats.cat([whole - second, second])
            order = torch.arange(2 * num_clusters, device=z_B.device).view(2, -1).T.flatten()
            self.sub_stats = self.sub_stats + both[order]
        if self.hard_stats is not None:
            labels_B = 2 * z_B + rsub_B2.argmax(1)
            self.hard_stats = self.hard_stats + SufficientStats.from_labels(
                x_BD, labels_B, self.hard_stats.num_clusters
            )

    def reduce(self) -> None:
        """Sum over all processes."""
        sum_over_processes(self.totals_4)
        sum_over_processes(self.counts_K)
        for stats in (self.stats, self.sub_stats, self.hard_stats):
            if stats is not None:
                for tensor in (stats.count_K, stats.sum_KD, stats.outer_KDD):
                    sum_over_processes(tensor)

    def means(self) -> tuple[float, float, float]:
        """Mean log density, cluster loss and subcluster loss of a point."""
        count, *sums = self.totals_4.tolist()
        log_density, cluster_loss, subcluster_loss = (value / max(count, 1.0) for value in sums)
        return log_density, cluster_loss, subcluster_loss
