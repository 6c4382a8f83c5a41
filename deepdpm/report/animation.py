"""The animation of the synthetic 2-D set, one frame an epoch, and the picture of digits by cluster.

`python -m deepdpm.report.animation docs` writes both (`make gif`).

Legend: N points, K clusters.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from deepdpm.data import CodesDataModule, Dataset
from deepdpm.data.digits import Digits
from deepdpm.data.synthetic import SyntheticGrid
from deepdpm.estimator import DeepDPM, quiet_lightning
from deepdpm.module import DeepDPMModule
from deepdpm.report.single import cluster_colours

Edges = tuple[float, float, float, float]
_COLOURS = cluster_colours(200)
_GRID, _SHOWN = 160, 2500
_HELD, _MILLISECONDS, _GIF_COLOURS = 4, 170, 64

# The published moves, early and often: one can watch K grow, where the default search finds it in one step.
SETTINGS: dict[str, Any] = {
    "model": {"transform": "none", "init_k": 1},
    "prior": {"scale": "isotropic", "nu": 4.0, "kappa": 1e-4},
    "moves": {"kind": "published"},
    "schedule": {
        "start_subclusters": 0,
        "start_moves": 4,
        "moves_every": 4,
        "freeze_after_move": 1,
    },
}


@dataclass(frozen=True)
class Frame:
    """What one frame shows: the end of an epoch, after its moves."""

    epoch: int
    labels_N: np.ndarray
    means_K2: np.ndarray
    covariances_K22: np.ndarray
    ids_K: np.ndarray
    regions: np.ndarray
    moves: str


class Recorder(Checkpoint):
    """Keep a frame of every epoch; Lightning runs a `Checkpoint` after the moves."""

    def __init__(self, x_N2: Tensor, grid_G2: Tensor) -> None:
        self.x_N2, self.grid_G2 = x_N2, grid_G2
        self.frames: list[Frame] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the frame."""
        module: Any = pl_module
        mixture = module.clusters.mixture
        self.frames.append(
            Frame(
                trainer.current_epoch,
                module.assign(self.x_N2)[0].cpu().numpy(),
                mixture.means_KD.cpu().double().numpy(),
                mixture.covariances_KDD.cpu().double().numpy(),
                module.cluster_ids_K.cpu().numpy(),
                module.assign(self.grid_G2)[0].cpu().numpy().reshape(_GRID, _GRID),
                "; ".join(map(str, module.moves_of_epoch)),
            )
        )


def record(dataset: Dataset, epochs: int, seed: int = 0) -> tuple[list[Frame], Edges]:
    """Train on a 2-D set and return a frame for each epoch, and the picture's edges."""
    x_N2 = dataset.train.x
    low, high = x_N2.amin(0) - 0.5, x_N2.amax(0) + 0.5
    across, up = (torch.linspace(low[d], high[d], _GRID) for d in (0, 1))
    grid_G2 = torch.stack(torch.meshgrid(across, up, indexing="xy"), 2).reshape(-1, 2)
    recorder = Recorder(x_N2[:_SHOWN], grid_G2)
    module = DeepDPMModule(**SETTINGS, seed=seed, num_dims=2)
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            callbacks=[recorder],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=CodesDataModule(dataset, seed=seed))
    return recorder.frames, (float(low[0]), float(high[0]), float(low[1]), float(high[1]))


def animate(path: Path, dataset: Dataset, epochs: int, seed: int = 0) -> list[Frame]:
    """Write the animation: assignments, centres and ellipses; true labels and the net's regions."""
    assert dataset.train.labels is not None
    frames, edges = record(dataset, epochs, seed)
    x_N2, truth_N = dataset.train.x[:_SHOWN].numpy(), dataset.train.labels[:_SHOWN].numpy()
    figure = Figure(figsize=(7.2, 3.8), dpi=80, layout="constrained")
    canvas, panels = FigureCanvasAgg(figure), figure.subplots(1, 2)
    pictures, milliseconds = [], []
    for frame in frames:
        draw(figure, panels, frame, x_N2, truth_N, edges)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
        milliseconds.append(_MILLISECONDS * (_HELD if frame.moves or frame is frames[-1] else 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_gif(path, pictures, milliseconds)
    return frames


def save_gif(path: Path, pictures: Sequence[Image.Image], milliseconds: Sequence[int]) -> None:
    """Write pictures of one size as a GIF, each shown for its time.

    All have the same few colours, so that the file holds no more of a frame than what has changed in it.
    """
    width, height = pictures[0].size
    all_below = Image.new("RGB", (width, height * len(pictures)))
    for row, picture in enumerate(pictures):
        all_below.paste(picture, (0, row * height))
    palette = all_below.quantize(_GIF_COLOURS)
    reduced = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    reduced[0].save(
        path, save_all=True, append_images=reduced[1:], duration=list(milliseconds), loop=0, optimize=True
    )


def draw(
    figure: Figure,
    panels: Sequence[Axes],
    frame: Frame,
    x_N2: np.ndarray,
    truth_N: np.ndarray,
    edges: Edges,
) -> None:
    """Draw one frame on the two panels."""
    colour_K = [_COLOURS[int(i) % len(_COLOURS)] for i in frame.ids_K]
    for axes in panels:
        axes.clear()
        axes.set(xlim=edges[:2], ylim=edges[2:], xticks=[], yticks=[])
    left, right = panels
    left.scatter(x_N2[:, 0], x_N2[:, 1], c=[colour_K[k] for k in frame.labels_N], s=2, linewidths=0)
    for mean, covariance, colour in zip(frame.means_K2, frame.covariances_K22, colour_K, strict=True):
        left.add_patch(ellipse(mean, covariance, colour))
        left.plot(*mean, marker="+", color="black", markersize=6)
    image = np.array([to_rgb(colour) for colour in colour_K])[frame.regions]
    right.imshow(image, extent=edges, origin="lower", alpha=0.35, aspect="auto")
    shades = cluster_colours(int(truth_N.max()) + 1)
    right.scatter(x_N2[:, 0], x_N2[:, 1], c=[shades[c] for c in truth_N], s=2, linewidths=0)
    left.set_title(f"assignments, K = {len(frame.ids_K)}", fontsize=10)
    right.set_title("true labels, the net's regions", fontsize=10)
    shown = frame.moves if len(frame.moves) <= 60 else frame.moves[:57] + "..."
    title = f"epoch {frame.epoch}" + (f"   {shown}" if shown else "")
    figure.suptitle(title, fontsize=10, color="#b3261e" if shown else "black", x=0.02, ha="left")


def ellipse(mean: np.ndarray, covariance: np.ndarray, colour: str) -> Ellipse:
    """The ellipse of two standard deviations.

    Example:
        >>> one = ellipse(np.zeros(2), np.diag([1.0, 4.0]), "red")
        >>> one.width, one.height
        (8.0, 4.0)
    """
    variance, axes = np.linalg.eigh(covariance)
    angle = float(np.degrees(np.arctan2(axes[1, 1], axes[0, 1])))
    wide, high = 4 * np.sqrt(np.maximum(variance[::-1], 0))
    return Ellipse(
        (float(mean[0]), float(mean[1])),
        float(wide),
        float(high),
        angle=angle,
        fill=False,
        edgecolor=colour,
        linewidth=1.2,
    )


def digits_by_cluster(path: Path, max_epochs: int = 200, columns: int = 20) -> int:
    """Write a picture with a row of digits for each cluster found, the most certain ones; return K."""
    points = Digits().load().train.x
    model = DeepDPM(max_epochs=max_epochs).fit(points)
    labels_N, density_N = model.labels_.numpy(), model.score_samples(points).numpy()
    order = [k for k in np.argsort(-np.bincount(labels_N)) if (labels_N == k).any()]
    figure = Figure(figsize=(columns * 0.3, len(order) * 0.3))
    canvas = np.zeros((len(order) * 9, columns * 9))
    for row, k in enumerate(order):
        members = np.flatnonzero(labels_N == k)
        for column, member in enumerate(members[np.argsort(-density_N[members])][:columns]):
            canvas[row * 9 : row * 9 + 8, column * 9 : column * 9 + 8] = points[int(member)].reshape(8, 8)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, cmap="gray_r")
    axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return len(order)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `synthetic.gif` and `digits.png` into a folder."""
    parser = argparse.ArgumentParser(prog="python -m deepdpm.report.animation")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs"))
    parser.add_argument("--epochs", type=int, default=56)
    parser.add_argument("--points", type=int, default=3000)
    options = parser.parse_args(arguments)
    gif = options.folder / "synthetic.gif"
    frames = animate(gif, SyntheticGrid(num_points=options.points).load(), options.epochs)
    print(f"{gif}: {gif.stat().st_size / 1e6:.1f} MB, K = {len(frames[-1].ids_K)}")
    print(f"{options.folder / 'digits.png'}: K = {digits_by_cluster(options.folder / 'digits.png')}")


if __name__ == "__main__":
    main()
