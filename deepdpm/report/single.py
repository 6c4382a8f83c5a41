"""The page of one run: K over time, the tree of moves, sizes, a map, members, the prior, and a diagnosis.

Legend: N points, M points shown, D dimensions, K clusters.
"""

import base64
import colorsys
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from deepdpm.report.clustering import Clustering, Event, events, read_run
from deepdpm.report.diagnosis import diagnose
from deepdpm.report.figures import INK, STYLE, from_zero, to_svg
from deepdpm.results import write_atomically

_POINTS_SHOWN, _MEMBERS, _MOST_LANES, _MOST_CELLS = 4000, 8, 60, 60
_NARROW_TABLE, _WORDS = 12, 8
_NOT_ITS_OWN = "#9aa0a6"


@dataclass(frozen=True)
class Shown:
    """A figure of the page: its title, what it shows in a sentence, and its panels as SVG."""

    title: str
    caption: str
    svgs: tuple[str, ...]


def write_run_report(folder: Path, path: Path, plane: str = "pca") -> Path:
    """Write the page of a run's folder; `plane` is "pca" or "umap".

    Raises:
        ValueError: the run has not finished, or its data or model cannot be read.
    """
    return write_page(read_run(folder), path, plane)


def write_page(found: Clustering, path: Path, plane: str = "pca") -> Path:
    """Write the page of a clustering whole or not at all."""
    content = page(found, plane).encode()
    write_atomically(path, lambda file: file.write(content))
    return path


def page(found: Clustering, plane: str = "pca") -> str:
    """The whole page as text; it needs no other file.

    Raises:
        ValueError: `plane` is neither "pca" nor "umap", or UMAP is not installed.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deepdpm.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    colours = cluster_colours(found.num_components)
    context = {
        "found": found,
        "sentences": diagnose(found),
        "numbers": _numbers(found),
        "figures": _figures(found, colours, plane),
        "clusters": _cluster_rows(found, colours),
        "contingency": _contingency(found),
        "members": _members(found, colours),
        "prior": _prior_rows(found),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return environment.get_template("single.html.j2").render(context)


def cluster_colours(count: int) -> list[str]:
    """A colour for each cluster, far from its neighbours and legible on light and dark paper.

    Example:
        >>> len(set(cluster_colours(40)))
        40
    """
    golden = (math.sqrt(5) - 1) / 2
    hues = [(0.58 + golden * k) % 1 for k in range(count)]
    tones = [((0.62, 0.85), (0.75, 0.68), (0.45, 0.9))[k % 3] for k in range(count)]
    return [to_hex(colorsys.hsv_to_rgb(hue, *tone)) for hue, tone in zip(hues, tones, strict=True)]


def _numbers(found: Clustering) -> list[tuple[str, str]]:
    points, dims = found.x_ND.shape
    rows = [("Clusters", str(found.num_clusters)), ("Points", f"{points:,}"), ("Dimensions", str(dims))]
    names = {
        "nmi": "NMI",
        "ari": "ARI",
        "acc": "ACC",
        "silhouette": "Silhouette",
        "log_likelihood": "Log density",
        "seconds": "Seconds",
    }
    for key, name in names.items():
        value = found.numbers.get(key)
        if value is not None:
            rows.append((name, f"{value:.1f}" if key == "seconds" else f"{value:.3f}"))
    rows.append(("Mean confidence", f"{float(found.confidence_N.mean()):.3f}"))
    return rows


# Figures ---------------------------------------------------------------------------------------------------


def _figures(found: Clustering, colours: Sequence[str], plane: str) -> dict[str, Shown | None]:
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        return {
            "history": _history(found) if found.history else None,
            "tree": _tree(found, colours),
            "map": _map(found, colours, plane),
        }


def _draw(name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=size)
    draw(figure.subplots())
    return to_svg(figure, name)


def _history(found: Clustering) -> Shown:
    epochs = [row["epoch"] for row in found.history]
    counts = [row["num_clusters"] for row in found.history]
    moves = events(found.history)

    def draw(axes: Axes) -> None:
        axes.step(epochs, counts, where="post", color="#3b82c4")
        for kind, marker, colour in (
            ("split", "^", "#3f9d63"),
            ("merge", "v", "#c9503f"),
            ("remove", "x", "#8a8f2a"),
        ):
            places = sorted({move.epoch for move in moves if move.kind == kind})
            if not places:
                continue
            heights = [counts[epochs.index(place)] for place in places]
            axes.scatter(places, heights, marker=marker, color=colour, s=36, zorder=3, label=kind)
        axes.set(xlabel="epoch", ylabel="clusters K", ylim=from_zero(axes))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if moves:
            axes.legend(fontsize=9)

    caption = f"K at the end of each of {len(epochs)} epochs, and where it changed."
    return Shown("K over time", caption, (_draw("history", (6.4, 3.2), draw),))


def _tree(found: Clustering, colours: Sequence[str]) -> Shown | None:
    """Lanes of identities over the epochs with moves: forks where they split, ends where they merge."""
    moves = events(found.history)
    lanes = lanes_of(moves)
    if not moves or len(lanes) > _MOST_LANES:
        return None
    steps = sorted({move.epoch for move in moves})
    place = {epoch: number + 1 for number, epoch in enumerate(steps)}
    last, colour_of = len(steps) + 1, dict(zip(found.ids_K.tolist(), colours, strict=True))

    def draw(axes: Axes) -> None:
        born: dict[int, int] = {}
        died: dict[int, int] = {}
        for move in moves:
            at, rows = place[move.epoch], [lanes[i] for i in {*move.parents, *move.children}]
            axes.plot([at, at], [min(rows), max(rows)], color=INK, linewidth=0.8)
            born |= {i: at for i in move.children if i not in move.parents}
            died |= {i: at for i in move.parents if i not in move.children}
        for identity, row in lanes.items():
            ends = born.get(identity, 0), died.get(identity, last)
            axes.plot(ends, [row, row], color=colour_of.get(identity, _NOT_ITS_OWN), linewidth=3)
            axes.annotate(
                str(identity), (ends[1], row), (4, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.set_xticks([0, *place.values()], ["start", *map(str, steps)])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set(xlabel="end of epoch", ylim=(len(lanes) - 0.3, -0.7), xlim=(0, last + 0.15))

    caption = (
        "Each line is a cluster with its identity; it forks where it splits, and ends where it is merged."
    )
    height = max(1.6, 0.8 + 0.2 * len(lanes))
    return Shown("Splits and merges", caption, (_draw("tree", (6.4, height), draw),))


def lanes_of(moves: Sequence[Event]) -> dict[int, int]:
    """A row for each identity, children below their parents.

    Example:
        >>> split = Event(0, "split", (0,), (0, 1, 2))
        >>> lanes_of([split, Event(3, "split", (1,), (1, 3))])
        {0: 0, 1: 1, 3: 2, 2: 3}
    """
    order: list[int] = []
    for move in moves:
        for parent in move.parents:
            if parent not in order:
                order.append(parent)
        fresh = [child for child in move.children if child not in order]
        after = order.index(move.parents[0]) + 1
        order[after:after] = fresh
    return {identity: row for row, identity in enumerate(order)}


def _map(found: Clustering, colours: Sequence[str], plane: str) -> Shown:
    generator = torch.Generator().manual_seed(0)
    chosen_M = torch.randperm(len(found.x_ND), generator=generator)[:_POINTS_SHOWN].sort().values
    xy_M2, how = to_plane(found.x_ND[chosen_M], found.codes_NE[chosen_M], plane)
    index_M = chosen_M.numpy()
    labels_M, truth_N = found.labels_N[index_M], found.truth_N
    panels: list[tuple[str, Any, dict[str, Any]]] = [
        ("clusters", [colours[k] if k >= 0 else _NOT_ITS_OWN for k in labels_M], {}),
        ("confidence", found.confidence_N[index_M], {"cmap": "viridis", "vmin": 0, "vmax": 1}),
    ]
    if truth_N is not None:
        shades = cluster_colours(int(truth_N.max()) + 1)
        of_class = [shades[c] if c >= 0 else _NOT_ITS_OWN for c in truth_N[index_M]]
        panels.append(("true labels", of_class, {}))
    svgs = []
    for title, colour, more in panels:
        figure = Figure(figsize=(3.4, 3.5))
        axes = figure.subplots()
        points = axes.scatter(xy_M2[:, 0], xy_M2[:, 1], c=colour, s=4, linewidths=0, rasterized=True, **more)
        axes.set(title=title, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        # Every panel has room for a bar, so that all are of one size.
        bar = figure.colorbar(points, ax=axes, orientation="horizontal", shrink=0.7, pad=0.04)
        bar.outline.set_visible(False)
        if not more:
            for drawn in bar.ax.collections:
                drawn.set_visible(False)
            bar.ax.tick_params(color="none", labelcolor="none")
        with mpl.rc_context({"savefig.dpi": 150}):
            svgs.append(to_svg(figure, f"map {title}"))
    counted = "all points" if len(index_M) == len(found.x_ND) else f"{len(index_M):,} points drawn at random"
    caption = f"{how}; {counted}. Confidence is the net's probability of a point's cluster."
    return Shown("Map", caption, tuple(svgs))


def to_plane(x_MD: Tensor, codes_ME: Tensor, plane: str) -> tuple[np.ndarray, str]:
    """Points in two dimensions (M, 2), and how they came there.

    Raises:
        ValueError: another plane than "pca" and "umap", or UMAP is not installed.
    """
    if plane not in ("pca", "umap"):
        raise ValueError(f"The map {plane!r} is unknown: choose pca or umap.")
    if x_MD.shape[1] == 2 and plane == "pca":
        return x_MD.numpy(), "The points themselves"
    if plane == "umap":
        try:
            import umap
        except ImportError as error:
            raise ValueError(
                "The map umap needs umap-learn: pip install 'deepdpm[embed]', or choose pca."
            ) from error
        fitted = umap.UMAP(random_state=0, n_jobs=1).fit_transform(codes_ME.numpy())
        return np.asarray(fitted), "UMAP of the codes"
    y_ME = codes_ME.double() - codes_ME.double().mean(0)
    if y_ME.shape[1] == 1:
        return torch.cat([y_ME, torch.zeros_like(y_ME)], 1).numpy(), "The only dimension"
    variance_E, axes_EE = torch.linalg.eigh(y_ME.T @ y_ME)
    share = float(variance_E[-2:].sum() / variance_E.sum().clamp_min(1e-300))
    return (
        y_ME @ axes_EE[:, [-1, -2]]
    ).numpy(), f"First two principal components of the codes ({share:.0%} of their variance)"


# Tables ----------------------------------------------------------------------------------------------------


def _cluster_rows(found: Clustering, colours: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each cluster with points, the largest first."""
    rows, table_CK = [], found.contingency_CK
    largest = max(int(found.sizes_K.max()), 1)
    for k in np.argsort(-found.sizes_K, kind="stable"):
        size = int(found.sizes_K[k])
        if size == 0:
            continue
        of_k = found.labels_N == k
        row = {
            "id": int(found.ids_K[k]),
            "colour": colours[k],
            "size": size,
            "width": 100 * size / largest,
            "share": size / len(found.labels_N),
            "confidence": float(found.confidence_N[of_k].mean()),
            "purity": None,
            "main": "",
        }
        if table_CK is not None and table_CK[:, k].sum() > 0:
            row["purity"] = float(table_CK[:, k].max() / table_CK[:, k].sum())
            row["main"] = found.class_name(int(table_CK[:, k].argmax()))
        rows.append(row)
    return rows


def _contingency(found: Clustering) -> dict[str, Any] | None:
    """The contingency table, columns ordered by main class; None without labels, or if it is too large."""
    table_CK = found.contingency_CK
    if table_CK is None or max(table_CK.shape) > _MOST_CELLS:
        return None
    used = [int(k) for k in np.flatnonzero(found.sizes_K)]
    order = sorted(used, key=lambda k: (int(table_CK[:, k].argmax()), -int(table_CK[:, k].max())))
    shares = table_CK / table_CK.sum(1, keepdims=True).clip(1)
    return {
        "ids": [int(found.ids_K[k]) for k in order],
        "rows": [
            (found.class_name(label), [(int(table_CK[label, k]), float(shares[label, k])) for k in order])
            for label in range(len(table_CK))
        ],
    }


def _members(found: Clustering, colours: Sequence[str]) -> list[dict[str, Any]]:
    """For each cluster its nearest members and the least certain ones, as pictures, rows or words."""
    groups = []
    joint_NK = found.log_joint_NK.numpy()
    for k in np.argsort(-found.sizes_K, kind="stable"):
        index = np.flatnonzero(found.labels_N == k)
        if len(index) == 0:
            continue
        nearest = index[np.argsort(-joint_NK[index, k], kind="stable")[:_MEMBERS]]
        unsure = index[np.argsort(found.confidence_N[index], kind="stable")[:_MEMBERS]]
        group: dict[str, Any] = {"id": int(found.ids_K[k]), "colour": colours[k], "words": None}
        if found.x_ND.shape[1] > _NARROW_TABLE and not found.dataset.image_shape:
            group["words"] = _standing_out(found, index)
        group["parts"] = [
            (title, _show(found, rows)) for title, rows in (("nearest", nearest), ("least certain", unsure))
        ]
        groups.append(group)
    return groups


def _show(found: Clustering, rows: np.ndarray) -> dict[str, Any]:
    sure = [f"{found.confidence_N[row]:.2f}" for row in rows]
    if found.dataset.image_shape:
        return {
            "pictures": [picture(found.x_ND[int(row)], found.dataset.image_shape) for row in rows],
            "sure": sure,
        }
    columns = list(range(min(found.x_ND.shape[1], _NARROW_TABLE)))
    return {
        "columns": [found.feature_name(column) for column in columns],
        "rows": [
            (int(row), [f"{found.x_ND[int(row), c]:.4g}" for c in columns], one)
            for row, one in zip(rows, sure, strict=True)
        ],
    }


def _standing_out(found: Clustering, index: np.ndarray) -> str:
    """The columns in which a cluster lies furthest above or below all points, in units of their spread."""
    x_ND = found.x_ND.double()
    spread_D = x_ND.std(0, correction=0).clamp_min(1e-300)
    offset_D = (x_ND[torch.from_numpy(index)].mean(0) - x_ND.mean(0)) / spread_D
    if x_ND.shape[1] > 100 and found.dataset.feature_names is not None and bool((x_ND >= 0).all()):
        order = offset_D.argsort(descending=True)[:_WORDS].tolist()
        return ", ".join(found.feature_name(column) for column in order)
    order = offset_D.abs().argsort(descending=True)[:_WORDS].tolist()
    return ", ".join(f"{found.feature_name(column)} {offset_D[column]:+.1f}" for column in order)


def picture(x_D: Tensor, shape: Sequence[int]) -> str:
    """A flattened image (C, H, W) as the data URI of a PNG, its values stretched to black and white."""
    from PIL import Image

    image_CHW = x_D.reshape(*shape).double()
    low, high = image_CHW.min(), image_CHW.max()
    image_CHW = (image_CHW - low) / (high - low).clamp_min(1e-12) * 255
    pixels = image_CHW.round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3]).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _prior_rows(found: Clustering) -> list[tuple[str, str, str]]:
    """What the prior assumed against what was found, in units of the codes."""
    prior, mixture = found.module.clusters.prior, found.module.clusters.mixture
    spread_K = mixture.covariances_KDD.double().diagonal(dim1=-2, dim2=-1).mean(-1).sqrt().cpu().numpy()
    assumed = float(prior.mode_covariance_DD().diagonal().mean().sqrt())
    count, alpha = len(found.labels_N), prior.alpha
    expected = alpha * math.log1p(count / alpha)
    distance_K = (mixture.means_KD.double() - prior.mean_D).norm(dim=1).cpu().numpy()
    far = float(np.sqrt(np.trace(prior.mode_covariance_DD().cpu().numpy()) / prior.kappa))
    family = {"NIW": "Normal-Inverse-Wishart", "NIG": "Normal-Inverse-Gamma"}[type(prior).__name__]
    fitted, dof = ", ".join(prior.fitted), mixture.tail_dof
    return [
        ("Family", family, f"fitted to the clusters: {fitted}" if fitted else "as set"),
        ("Clusters", f"about {expected:.0f} (alpha = {alpha:g})", str(found.num_clusters)),
        ("Spread of a cluster", f"{assumed:.3g}", _range(spread_K)),
        (
            "Distance of a centre from the middle",
            f"about {far:.3g} (kappa = {prior.kappa:g})",
            _range(distance_K),
        ),
        (
            "Points the spread counts for",
            f"nu = {prior.nu:g}",
            f"sizes {_range(found.sizes_K[found.sizes_K > 0])}",
        ),
        (
            "Tails",
            "chosen by the data" if "tail_dof" in prior.fitted else "as set",
            "Gaussian" if math.isinf(dof) else f"Student's t, {dof:g} degrees of freedom",
        ),
    ]


def _range(values: np.ndarray) -> str:
    return f"{np.min(values):.3g} to {np.max(values):.3g} (median {np.median(values):.3g})"
