"""What a person sees of joint features: a line, numbers and pictures at the end of each phase.

Legend: N points, B images shown, D raw dimensions, K clusters.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from rich.console import Console
from torch import Tensor

from deepdpm.callbacks import Trace
from deepdpm.data import Dataset
from deepdpm.joint import JointModule
from deepdpm.tracking import WandbTracking

_TITLES = {"pretrain": "pretraining", "cluster": "clustering", "features": "features"}
_ROWS_SHOWN, _COLUMNS_SHOWN = 10, 10


class PhaseEnds(Checkpoint):
    """Say at the end of each phase what it has come to; track it, with reconstructions and samples.

    Args:
        trace: whose last row is told.
        console: where to; None says nothing.
        dataset: what is trained on; pictures are of data sets of images.
        tracking: an open run of W&B, or None.
    """

    def __init__(
        self,
        trace: Trace,
        console: Console | None,
        dataset: Dataset,
        tracking: WandbTracking | None = None,
    ) -> None:
        self.trace, self.console, self.tracking = trace, console, tracking
        self.x_ND, self.image_shape = dataset.train.x, dataset.image_shape

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of the phase if it ends here."""
        assert isinstance(pl_module, JointModule)
        # A clustering whose moves have come to rest ends sooner, and its phase says so by now.
        if not pl_module.phase.is_last_epoch or not trainer.is_global_zero:
            return
        row = self.trace.rows[-1]
        if self.console is not None:
            line = phase_line(row, pl_module.alternation.number_of_alternations)
            self.console.print(line, markup=False, soft_wrap=True)
        if self.tracking is not None and self.tracking.logger is not None:
            self.tracking.logger.experiment.log(self._tracked(row, pl_module))

    def _tracked(self, row: dict[str, Any], module: JointModule) -> dict[str, Any]:
        import wandb

        told = {name: value for name, value in row.items() if name not in ("epoch", "moves")}
        tracked = {f"phase_end/{name}": value for name, value in told.items() if value is not None}
        if self.image_shape is not None:
            pairs_2BD = reconstructions(module, self.x_ND[:_COLUMNS_SHOWN].flatten(1))
            tracked["phase_end/reconstructions"] = wandb.Image(_grid(pairs_2BD, self.image_shape))
            if row["phase"] != "pretrain":
                samples_KBD = samples_of_clusters(self.x_ND.flatten(1), module.labels_N.cpu())
                tracked["phase_end/samples"] = wandb.Image(_grid(samples_KBD, self.image_shape))
        return tracked


def phase_line(row: dict[str, Any], alternations: int) -> str:
    """One line of what a phase has come to.

    >>> row = {"phase": "cluster", "alternation": 0, "epoch": 9, "num_clusters": 4, "nmi": 0.5, "ari": None,
    ...        "acc": 0.25, "reconstruction_loss": None, "regularization_loss": None, "cluster_loss": 0.125}
    >>> phase_line(row, 3)
    'clustering 1 of 3 ended with epoch 9: K 4, cluster loss 0.125, NMI 0.500, ACC 0.250'
    """
    number = "" if row["phase"] == "pretrain" else f" {row['alternation'] + 1} of {alternations}"
    parts = [] if row["phase"] == "pretrain" else [f"K {row['num_clusters']}"]
    losses = {"reconstruction_loss": "reconstruction", "regularization_loss": "distance"}
    losses |= {"cluster_loss": "cluster loss"}
    parts += [f"{name} {row[key]:.3g}" for key, name in losses.items() if row[key] is not None]
    parts += [f"{key.upper()} {row[key]:.3f}" for key in ("nmi", "ari", "acc") if row[key] is not None]
    return f"{_TITLES[row['phase']]}{number} ended with epoch {row['epoch']}: {', '.join(parts)}"


@torch.no_grad()
def reconstructions(module: JointModule, x_BD: Tensor) -> Tensor:
    """Points and what the autoencoder makes of them (2, B, D)."""
    was_training = module.autoencoder.training
    module.autoencoder.eval()
    back_BD = module.autoencoder(x_BD.to(module.device))[1].cpu()
    module.autoencoder.train(was_training)
    return torch.stack((x_BD.cpu(), back_BD))


def samples_of_clusters(x_ND: Tensor, labels_N: Tensor) -> Tensor:
    """The first points of each of the largest clusters (K, B, D); a cluster of fewer is filled up by zeros.

    >>> samples_of_clusters(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 1]))[:, :2, 0].tolist()
    [[2.0, 3.0], [1.0, 0.0]]
    """
    labels_K, counts_K = labels_N[labels_N >= 0].unique(return_counts=True)
    largest_K = labels_K[counts_K.argsort(descending=True, stable=True)[:_ROWS_SHOWN]]
    samples_KBD = x_ND.new_zeros(len(largest_K), _COLUMNS_SHOWN, x_ND.shape[1])
    for row, label in enumerate(largest_K.tolist()):
        index_B = (labels_N == label).nonzero()[:_COLUMNS_SHOWN, 0]
        samples_KBD[row, : len(index_B)] = x_ND[index_B.to(x_ND.device)].to(samples_KBD)
    return samples_KBD


def _grid(images_RBD: Tensor, image_shape: tuple[int, ...]) -> Any:
    """A figure of images in rows."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    images_MCHW = images_RBD.flatten(0, 1).unflatten(1, image_shape)
    grid_CHW = make_grid(images_MCHW, nrow=images_RBD.shape[1], normalize=True)
    figure = Figure(figsize=(6, 6 * grid_CHW.shape[1] / grid_CHW.shape[2]), layout="tight")
    axes = figure.subplots()
    axes.imshow(grid_CHW.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    return figure
