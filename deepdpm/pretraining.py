"""Pretraining an autoencoder by reconstruction or contrast, as a Lightning module, and encoding with it.

Legend: N points, D dimensions of an input row, L dimensions of a code, B points in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor

from deepdpm.autoencoder import Autoencoder, FeaturesSettings, build_autoencoder, features_loss
from deepdpm.neighbours import Partners
from deepdpm.state import generator_at


class Pretraining(pl.LightningModule):
    """Train an autoencoder by `features_loss`, with noise on the rows, or images moved, if so set.

    Batches are pairs of rows (B, D) and their numbers (B,). The disturbance is a pure function of seed, epoch
    and batch, so that a resumed training sees the one that an uninterrupted one would have seen.
    """

    def __init__(
        self,
        features: FeaturesSettings | Mapping[str, Any],
        num_dims: int,
        image_shape: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        plain = asdict(features) if isinstance(features, FeaturesSettings) else dict(features)
        plain |= {name: list(plain[name]) for name in ("hidden_dims", "filters") if name in plain}
        shape = None if image_shape is None else [int(length) for length in image_shape]
        self.save_hyperparameters(
            {"features": plain, "num_dims": num_dims, "image_shape": shape, "seed": seed}
        )
        self.features = FeaturesSettings(**plain)
        self.seed, self.image_shape = seed, shape
        # Manual, since automatic optimization cannot leave out a batch without a warning.
        self.automatic_optimization = False
        self.autoencoder = build_autoencoder(self.features, num_dims, shape)
        self._partners: Partners | None = None

    def on_fit_start(self) -> None:
        """Find the nearest neighbours of all points, where these are to be partners."""
        if self.features.neighbours > 0:
            x_ND = self.trainer.datamodule.dataset.train.x  # type: ignore[attr-defined]
            self._partners = Partners(x_ND, self.features.neighbours)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Take one step down the loss of a batch, and log the mean squared error of a point.

        A last batch of a single row is left out: it has no variance for the batch normalisation.
        """
        x_BD, index_B = batch
        if len(x_BD) < 2:
            return
        generator = generator_at(self.seed, self.current_epoch, batch_index)
        partner_BD = None if self._partners is None else self._partners.rows(index_B, generator).to(x_BD)
        loss, reconstruction, _ = features_loss(
            self.autoencoder, x_BD, self.features, self.image_shape, generator, partner_BD
        )
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        mean = reconstruction.detach() / len(x_BD)
        self.log(
            "reconstruction_loss", mean, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(x_BD)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give Adam over all layers."""
        return torch.optim.Adam(
            self.autoencoder.parameters(),
            lr=self.features.pretrain_lr,
            weight_decay=self.features.weight_decay,
            fused=True,  # a third of a step's time on a CPU otherwise
        )


@torch.inference_mode()
def encode_rows(model: Autoencoder, x_ND: Tensor, batch_size: int = 8192) -> Tensor:
    """Give the codes (N, L) of rows (N, D) with the batch normalisation frozen, on the CPU.

    >>> from deepdpm.autoencoder import DenseAutoencoder
    >>> encode_rows(DenseAutoencoder(4, (3,), 2), torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    codes = [model.encode(x_BD.to(device)).cpu() for x_BD in x_ND.split(batch_size)]
    model.train(was_training)
    return torch.cat(codes)
