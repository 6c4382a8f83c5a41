"""Tracking of a run with Weights & Biases: online, offline or not at all.

Legend: N points, D dimensions.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from deepdpm.callbacks import Trace

_MODES = ("online", "offline", "disabled")
_POINTS_SHOWN = 5000


@dataclass(frozen=True)
class WandbSettings:
    """How a run is tracked.

    Attributes:
        mode: "offline" keeps everything in the run's folder and needs no account, "online" sends it,
            "disabled" does neither.
        project: the project of W&B.
        entity: the team or user; None for the account's own.
        group: what runs of one sweep share; None for the sweep's folder, or the table's name.
        tags: labels to find the run by.
        picture_every_n_epochs: epochs between two pictures of the clusters.
        log_model: whether the final model becomes an artifact.

    Raises:
        ValueError: a value out of range, naming the setting.
    """

    mode: str = "offline"
    project: str = "deepdpm"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    picture_every_n_epochs: int = 50
    log_model: bool = True

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"tracking.mode={self.mode}: choose one of {', '.join(_MODES)}.")
        if self.picture_every_n_epochs < 1:
            raise ValueError(
                f"tracking.picture_every_n_epochs is {self.picture_every_n_epochs}: give a number from 1 on."
            )


class WandbTracking:
    """One tracked run: opened by `start`, fed by Lightning and `Pictures`, closed by `finish`.

    Args:
        settings: how to track.
        folder: the run's folder; W&B's own files go there too.
        name: of the run.
        group: used where the settings name none.
    """

    def __init__(self, settings: WandbSettings, folder: Path, name: str, group: str | None = None) -> None:
        self.settings, self.folder, self.name, self.group = settings, folder, name, settings.group or group
        self.logger: WandbLogger | None = None
        self._own_data_folder = "WANDB_DATA_DIR" not in os.environ

    def start(self, config: Mapping[str, Any]) -> WandbLogger:
        """Open the run and send the whole configuration.

        Raises:
            ValueError: W&B refuses the run, for want of an account or of a connection.
        """
        import wandb

        # W&B stages artifacts in the user's home unless told otherwise; an offline run should be whole.
        if self._own_data_folder:
            os.environ["WANDB_DATA_DIR"] = str(self.folder / "wandb")
        logging.getLogger("wandb").setLevel(logging.ERROR)
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                name=self.name,
                dir=self.folder,
                project=self.settings.project,
                entity=self.settings.entity,
                group=self.group,
                tags=list(self.settings.tags),
                mode=self.settings.mode,  # type: ignore[arg-type]
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise ValueError(
                f"tracking.mode={self.settings.mode}: W&B could not start the run ({_first_line(error)}): "
                "log in with `wandb login`, or say tracking.mode=offline."
            ) from error
        # WandbLogger would open the run itself, with arguments that newer versions of W&B warn of.
        self.logger = WandbLogger(experiment=run, save_dir=self.folder, project=self.settings.project)
        return self.logger

    def summarize(self, result: Mapping[str, Any], checkpoint: Path) -> None:
        """Add the final numbers, and the model as an artifact."""
        assert self.logger is not None, "start() comes first"
        run = self.logger.experiment
        if self.settings.mode == "disabled":
            return
        import wandb

        numbers = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
        run.summary.update(numbers)
        if self.settings.log_model and checkpoint.is_file():
            artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=numbers)
            artifact.add_file(str(checkpoint))
            run.log_artifact(artifact)

    def finish(self, failed: bool = False) -> None:
        """Close the run: without it the jobs of a sweep would run into one."""
        if self.logger is not None:
            self.logger.experiment.finish(exit_code=int(failed))
            self.logger = None
        if self._own_data_folder:
            os.environ.pop("WANDB_DATA_DIR", None)


class Pictures(Checkpoint):
    """Track K and moves of each epoch, and now and then a picture of the clusters in 2-D.

    Args:
        tracking: an open run.
        trace: whose last row is tracked.
        x_ND: the points of the training set.
    """

    def __init__(self, tracking: WandbTracking, trace: Trace, x_ND: Tensor) -> None:
        self.tracking, self.trace = tracking, trace
        chosen = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(0))[:_POINTS_SHOWN]
        self.chosen_n = chosen.sort().values
        self.xy_n2 = to_plane(x_ND[self.chosen_n].flatten(1))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Track the last row of the trace."""
        if trainer.is_global_zero and self.trace.rows:
            row = self.trace.rows[-1]
            values = {f"trace/{key}": value for key, value in row.items() if value not in (None, "")}
            if (row["epoch"] + 1) % self.tracking.settings.picture_every_n_epochs == 0:
                values["clusters"] = self._picture(pl_module)
            self._log(values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Track a last picture."""
        if trainer.is_global_zero:
            self._log({"clusters": self._picture(pl_module)})

    def _log(self, values: dict[str, Any]) -> None:
        assert self.tracking.logger is not None
        self.tracking.logger.experiment.log(values)

    def _picture(self, module: Any) -> Any:
        import wandb
        from matplotlib.figure import Figure

        labels_n = module.labels_N[self.chosen_n.to(module.labels_N.device)].cpu().numpy()
        figure = Figure(figsize=(5, 5), layout="tight")
        axes = figure.subplots()
        axes.scatter(self.xy_n2[:, 0], self.xy_n2[:, 1], c=labels_n, s=3, cmap="nipy_spectral", linewidths=0)
        axes.set_title(f"K = {int(module.num_clusters)}")
        axes.set_axis_off()
        return wandb.Image(figure)


def to_plane(x_ND: Tensor) -> np.ndarray:
    """Return points in two dimensions: as they are, or by their first two principal components; (N, 2).

    Example:
        >>> to_plane(torch.tensor([[0.0, 0.0, 1.0], [0.0, 3.0, 1.0]])).shape
        (2, 2)
    """
    x_ND = x_ND.double().cpu()
    if x_ND.shape[1] == 1:
        x_ND = torch.cat([x_ND, torch.zeros_like(x_ND)], dim=1)
    if x_ND.shape[1] > 2:
        x_ND = x_ND - x_ND.mean(0)
        x_ND = x_ND @ torch.linalg.eigh(x_ND.T @ x_ND).eigenvectors[:, [-1, -2]]
    return x_ND.numpy()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
