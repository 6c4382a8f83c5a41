"""What a trained model can do: codes of points, their clusters, and their density.

Legend: N points, B points of a batch, D raw dimensions, E dimensions of a code, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from deepdpm.nets import ClusterNet
from deepdpm.state import ClusterState, to_device
from deepdpm.transforms import Transform

CHUNK = 65_536


class ClusteringModel(pl.LightningModule):
    """The parts of a model that prediction needs; `DeepDPMModule` makes and trains them.

    Attributes:
        num_dims: D; None until it is known.
        transform: of the codes.
        cluster_net: from transformed codes to clusters.
        state: None until training has started.
    """

    num_dims: int | None
    transform: Transform
    cluster_net: ClusterNet
    state: ClusterState | None

    @property
    def num_clusters(self) -> int:
        """K, the components of the mixture."""
        return self.cluster_net.num_clusters

    @property
    def cluster_ids_K(self) -> Tensor:
        """Identities (K,) that stay the same across moves."""
        return torch.arange(self.num_clusters) if self.state is None else self.state.ids_K

    @property
    def clusters(self) -> ClusterState:
        """Prior, mixture and subclusters; they exist once training has started."""
        assert self.state is not None, "fit the module, or load a checkpoint"
        return self.state

    def codes(self, x: Tensor) -> Tensor:
        """Transformed codes (N, E) of raw points (N, D)."""
        return cast(Tensor, self.transform(self.raw_codes(x)))

    def raw_codes(self, x: Tensor) -> Tensor:
        """Codes before the transform: here the points themselves."""
        return x.flatten(1)

    def _predicting(self, x: Tensor, batch_size: int) -> Iterator[Tensor]:
        num_dims = math.prod(x.shape[1:])
        if self.num_dims is not None and num_dims != self.num_dims:
            raise ValueError(
                f"The points have {num_dims} dimensions, but the model was trained on {self.num_dims}: give "
                "points of the same kind."
            )
        for x_BD in x.split(batch_size):
            yield self.codes(x_BD.to(self.device))

    @torch.no_grad()
    def assign(self, x_ND: Tensor, batch_size: int = CHUNK) -> tuple[Tensor, Tensor]:
        """The clusters (N,) of raw points (N, D), in 0..K-1, and the net's probability of each (N,).

        Raises:
            ValueError: points of another D.
        """
        # Made at once: parts kept between batches would leave holes that the next batch doesn't fit into.
        labels_N = torch.empty(len(x_ND), dtype=torch.int64, device=self.device)
        confidence_N = torch.empty(len(x_ND), device=self.device)
        parts = zip(labels_N.split(batch_size), confidence_N.split(batch_size), strict=True)
        for code, (labels_B, confidence_B) in zip(self._predicting(x_ND, batch_size), parts, strict=True):
            log_r_B, best_B = self.cluster_net.log_prob(code).max(1)
            labels_B.copy_(best_B), confidence_B.copy_(log_r_B.exp())
        return labels_N, confidence_N

    @torch.no_grad()
    def predict_proba(self, x_ND: Tensor, batch_size: int = CHUNK) -> Tensor:
        """The net's responsibilities (N, K) of raw points (N, D).

        Raises:
            ValueError: points of another D.
        """
        parts = [self.cluster_net.log_prob(code).exp() for code in self._predicting(x_ND, batch_size)]
        return torch.cat([torch.empty(0, self.num_clusters, device=self.device), *parts])

    @torch.no_grad()
    def score_samples(self, x_ND: Tensor, batch_size: int = CHUNK) -> Tensor:
        """Log density (N,) of raw points (N, D) under the mixture, in nats.

        With the transform "normalize" or "standard_normalize" it is the density of the transformed codes, and
        with "principal" that on the axes kept.

        Raises:
            ValueError: points of another D.
        """
        mixture = to_device(self.clusters.mixture, self.device)
        log_density_N = torch.empty(len(x_ND), device=self.device)
        parts = log_density_N.split(batch_size)
        for code, log_density_B in zip(self._predicting(x_ND, batch_size), parts, strict=True):
            log_density_B.copy_(mixture.log_prob(code))
        return log_density_N + self.transform.log_volume
