"""Callbacks of a run: its trace, its checkpoints, and a stop on request.

All of them look at an epoch after the module's own `on_train_epoch_end`, that is after the moves. Lightning
calls a callback there only if it is a `Checkpoint`.

Legend: N points.
"""

import csv
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from deepdpm.metrics import evaluate
from deepdpm.results import unwritable, write_text

TRACE_COLUMNS = ("epoch", "num_clusters", "cluster_loss", "subcluster_loss", "moves", "nmi", "ari", "acc")


class Trace(Checkpoint):
    """Keep one row for each epoch, in memory and in `trace.csv`; a resumed run goes on with the rows it had.

    Args:
        path: of the .csv; None keeps the rows in memory only.
        labels_N: true labels (N,) with -1 for none, or None.
        evaluate_every: epochs between two evaluations of NMI, ARI and ACC (from the training passes).
        more_columns: what the module's `extra_numbers` adds to each row.
    """

    def __init__(
        self,
        path: Path | None,
        labels_N: Tensor | None = None,
        evaluate_every: int = 1,
        more_columns: tuple[str, ...] = (),
    ) -> None:
        if evaluate_every < 1:
            raise ValueError(
                f"trainer.evaluate_every_n_epochs is {evaluate_every}: give a number of epochs from 1 on."
            )
        self.path, self.labels_N, self.evaluate_every = path, labels_N, evaluate_every
        self.columns = TRACE_COLUMNS + more_columns
        self.rows: list[dict[str, Any]] = []
        self._earlier_seconds, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resumption included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to count seconds: before the module starts from the data, which is the method's work."""
        self._started = time.perf_counter()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the file, with the rows that a checkpoint brought."""
        if self.path is not None and trainer.is_global_zero:
            names = dict(zip(self.columns, self.columns, strict=True))
            write_text(self.path, _csv_lines([names, *self.rows], self.columns))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of the epoch."""
        row = self._row(trainer, pl_module)
        self.rows.append(row)
        if self.path is not None and trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_csv_lines([row], self.columns))

    def _row(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        epoch, metrics = trainer.current_epoch, trainer.callback_metrics
        due = (epoch + 1) % self.evaluate_every == 0 and self.labels_N is not None
        # While an autoencoder is pretrained, no point has a cluster.
        due = due and bool((module.labels_N >= 0).all())
        scores = evaluate(self.labels_N, module.labels_N) if due else dict.fromkeys(("nmi", "ari", "acc"))
        losses = {name: _finite(metrics.get(name)) for name in ("cluster_loss", "subcluster_loss")}
        moves = "; ".join(map(str, module.moves_of_epoch))
        row = {"epoch": epoch, "num_clusters": int(module.num_clusters), "moves": moves, **losses, **scores}
        return row | module.extra_numbers

    def state_dict(self) -> dict[str, Any]:
        """Return rows and seconds for the checkpoint."""
        return {"rows": [dict(row) for row in self.rows], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over rows and seconds."""
        self.rows, self._earlier_seconds = list(state_dict["rows"]), float(state_dict["seconds"])


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if np.isfinite(number) else None


def _csv_lines(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


class StopOnSignal(Checkpoint):
    """End training after the epoch in progress when Ctrl-C or SIGTERM comes; the second one ends it at once.

    Args:
        say: what tells the user that the signal was heard.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.signum: int | None = None
        self._say = say
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen; only the main thread may."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[signum] = signal.signal(signum, self._hear)
            except ValueError:
                return

    def _hear(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        self._say("Stopping at the end of this epoch; once more stops at once, and loses the epoch.")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if asked; all processes of a distributed run stop together."""
        asked = torch.tensor(float(self.signum is not None), device=pl_module.device)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce(asked, reduce_op="sum")
        if asked > 0:
            self.signum = self.signum or signal.SIGTERM
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())


class LastCheckpoint(Checkpoint):
    """Write `last.ckpt` every so many epochs, and when a stop was asked for.

    Args:
        path: of the checkpoint.
        every: epochs between two of them.
        config_hash: of the run's settings, kept in the checkpoint.
        stop: tells whether a stop was asked for.
    """

    def __init__(self, path: Path, every: int, config_hash: str, stop: StopOnSignal) -> None:
        if every < 1:
            raise ValueError(
                f"trainer.checkpoint_every_n_epochs is {every}: give a number of epochs from 1 on."
            )
        self.path, self.every, self.config_hash, self.stop = path, every, config_hash, stop

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it if it is due."""
        if self.stop.signum is not None or (trainer.current_epoch + 1) % self.every == 0:
            save_checkpoint(trainer, self.path)

    def state_dict(self) -> dict[str, Any]:
        """Return what tells one run from another."""
        return {"config_hash": self.config_hash}


def save_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """Write a checkpoint whole or not at all; every process of a distributed run must call it.

    Raises:
        ValueError: the folder is not writable or the disk is full.
    """
    written = path.with_name(f".{path.name}.new")
    try:
        trainer.save_checkpoint(written)
        if trainer.is_global_zero:
            os.replace(written, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError.
        raise unwritable(path, error) from error
    finally:
        if trainer.is_global_zero:
            written.unlink(missing_ok=True)
