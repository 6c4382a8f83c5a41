"""What a person sees of a run: a bar over the epochs, each move as a line above it, one table at its end."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from deepdpm.callbacks import Trace

_LINES_WITHOUT_TERMINAL = 10
_LONGEST_LINE = 300


class EpochProgress(Checkpoint):
    """Show epoch, K, loss and, with labels, NMI; where the output is no terminal, some ten plain lines.

    Lightning runs a `Checkpoint` callback after the module's own end of an epoch, so what is shown is the
    state after the moves.

    Args:
        trace: whose last row is shown.
        console: where to; None for the standard error.
    """

    def __init__(self, trace: Trace, console: Console | None = None) -> None:
        self.trace = trace
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("epoch"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        total = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
        self._bar.add_task("", total=total, completed=trainer.current_epoch, numbers="")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the moves of the epoch and renew the numbers."""
        if not trainer.is_global_zero or not self.trace.rows:
            return
        row = self.trace.rows[-1]
        if row["moves"]:
            moves = textwrap.shorten(row["moves"], _LONGEST_LINE, placeholder=" ...")
            # Broken by the terminal, if need be: a line of a log stays a line.
            self.console.print(f"epoch {row['epoch']}: {moves}", markup=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=row["epoch"] + 1, numbers=numbers(row))
        elif self._is_due(trainer, row["epoch"]):
            self.console.print(f"epoch {row['epoch'] + 1}/{trainer.max_epochs}: {numbers(row)}", markup=False)

    def _is_due(self, trainer: pl.Trainer, epoch: int) -> bool:
        step = max((trainer.max_epochs or 1) // _LINES_WITHOUT_TERMINAL, 1)
        return (epoch + 1) % step == 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def numbers(row: dict[str, Any]) -> str:
    """Return the numbers of one epoch as text.

    Example:
        >>> numbers({"num_clusters": 10, "cluster_loss": 0.1234, "nmi": 0.9})
        'K 10  loss 0.123  NMI 0.900'
        >>> numbers({"num_clusters": 1, "cluster_loss": None, "nmi": None})
        'K 1'
        >>> numbers({"num_clusters": 1, "cluster_loss": None, "nmi": None, "phase": "pretrain",
        ...          "alternation": 0, "reconstruction_loss": 3.25})
        'pretrain  K 1  reconstruction 3.25'
    """
    parts = [f"K {row['num_clusters']}"]
    if "phase" in row:
        parts.insert(
            0, row["phase"] if row["phase"] == "pretrain" else f"{row['phase']} {row['alternation'] + 1}"
        )
    if row.get("reconstruction_loss") is not None:
        parts.append(f"reconstruction {row['reconstruction_loss']:.3g}")
    if row["cluster_loss"] is not None:
        parts.append(f"loss {row['cluster_loss']:.3g}")
    if row["nmi"] is not None:
        parts.append(f"NMI {row['nmi']:.3f}")
    return "  ".join(parts)


def closing_table(result: Mapping[str, Any], folder: Path) -> Table:
    """Return the table that ends a run: K found, NMI, ARI, ACC, seconds, and where the outputs lie.

    Without labels, the silhouette and the mean log density of a point stand in for NMI, ARI and ACC.
    """
    title, caption = f"{result['dataset']}, seed {result['seed']}", f"outputs: {_shortest(folder)}"
    # As wide as the path is long, so that it can be copied whole.
    table = Table(
        title=title, caption=caption, min_width=len(caption), title_justify="left", caption_justify="left"
    )
    scores = [("NMI", "nmi", ".3f"), ("ARI", "ari", ".3f"), ("ACC", "acc", ".3f")]
    if result["nmi"] is None:
        scores = [("silhouette", "silhouette", ".3f"), ("log density", "log_likelihood", ".3f")]
    columns = [("K", "num_clusters", "d"), *scores, ("seconds", "seconds", ".1f")]
    rows = {"train": result}
    if result.get("test"):
        rows["test"] = result["test"]
        table.add_column("")
    for title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = ["-" if row.get(key) is None else format(row[key], form) for _, key, form in columns]
        table.add_row(*([name] if len(rows) > 1 else []), *cells)
    return table


def _shortest(folder: Path) -> str:
    """Return the folder as seen from the working directory, where it lies below."""
    try:
        return str(folder.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(folder)
