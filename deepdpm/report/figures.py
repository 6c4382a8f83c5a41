"""Figures as SVG text that follows the page's colours: lines and letters are drawn in ``currentColor``."""

import io
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepdpm.report.aggregate import Row, Table
from deepdpm.report.runs import Run, read_trace

INK = "#010203"  # replaced by currentColor in the SVG
_PALETTE = ("#3b82c4", "#d97a2b", "#3f9d63", "#b65fb8", "#c9503f", "#7d7fd1", "#8a8f2a", "#2a9d9d")
_LEGEND_LETTERS = 72  # as many as fit below a figure
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deepdpm",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=_PALETTE),
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A finished figure: its table, a name for its file, a title, a sentence below it, the SVG text."""

    table: str
    name: str
    title: str
    caption: str
    svg: str


def build_figures(tables: Sequence[Table]) -> list[Picture]:
    """Return every figure that the runs behind the tables allow."""
    pictures: list[Picture] = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for table in tables:
            for draw in (clusters_by_epoch, clusters_by_init_k, time_by_size):
                picture = draw(table)
                if picture is not None:
                    pictures.append(picture)
            pictures += heat_maps(table)
    return pictures


def clusters_by_epoch(table: Table) -> Picture | None:
    """Draw K against the epoch, one line a seed, one colour a method; None where no run left a trace."""
    traces = [(row, [(run.seed, *read_trace(run)) for run in row.runs if run.finished]) for row in table.rows]
    traces = [(row, [line for line in lines if line[1]]) for row, lines in traces]
    traces = [(row, lines) for row, lines in traces if lines]
    if not traces:
        return None
    shown = traces[: len(_PALETTE)]

    def draw(axes: Axes) -> None:
        for (row, lines), colour in zip(shown, _PALETTE, strict=False):
            for number, (_, epochs, clusters) in enumerate(lines):
                label = row.title if number == 0 else None
                axes.step(
                    epochs, clusters, where="post", color=colour, alpha=0.75, linewidth=1.3, label=label
                )
        _true_k_line(axes, table)
        axes.set(xlabel="epoch", ylabel="clusters K", ylim=from_zero(axes))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)

    left_out = len(traces) - len(shown)
    caption = "One line a seed." + (f" {left_out} further rows are not drawn." if left_out else "")
    return _picture(table, f"{table.key}_k_by_epoch", f"{table.title}: K while training", caption, draw)


def clusters_by_init_k(table: Table) -> Picture | None:
    """Draw the final K (and NMI) against init_k; None unless at least two values of init_k were run."""
    points: dict[str, dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for row in table.rows:
        if [key for key, _ in row.shown] != ["init_k"]:
            continue
        for run in row.runs:
            if run.finished and "init_k" in run.settings:
                points[row.name][run.settings["init_k"]].append(run)
    points = {method: found for method, found in points.items() if len(found) > 1}
    if not points:
        return None

    def draw(axes: Axes) -> None:
        for method, found in points.items():
            starts = sorted(found)
            _band(
                axes,
                starts,
                [[run.metrics["num_clusters"] for run in found[start]] for start in starts],
                method,
            )
        _true_k_line(axes, table)
        axes.set(xlabel="init_k", ylabel="final K", ylim=from_zero(axes))
        _legend(axes)

    caption = "Mean and range over seeds. A flat line says that the start does not matter."
    return _picture(
        table, f"{table.key}_k_by_init_k", f"{table.title}: final K against init_k", caption, draw
    )


def time_by_size(table: Table) -> Picture | None:
    """Draw seconds against N, both logarithmic; None unless some method was run at two sizes or more."""
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in table.rows:
        for run in row.runs:
            size = run.settings.get("N", run.num_points)
            if run.finished and size and "seconds" in run.metrics:
                points[row.title_for_any_size][float(size)].append(run.metrics["seconds"])
    points = {title: found for title, found in points.items() if len(found) > 1}
    if not points:
        return None

    def draw(axes: Axes) -> None:
        for title, found in points.items():
            sizes = sorted(found)
            _band(axes, sizes, [found[size] for size in sizes], title)
        axes.set(xscale="log", yscale="log", xlabel="points N", ylabel="seconds")
        _legend(axes)

    caption = "Fit and final prediction, without imports and loading. Mean and range over seeds."
    return _picture(table, f"{table.key}_time_by_n", f"{table.title}: time against N", caption, draw)


def heat_maps(table: Table) -> list[Picture]:
    """Draw NMI (or K where there are no labels) over each pair of settings that a sweep varied together."""
    pictures = []
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        if row.finished:
            by_method[row.method].append(row)
    for rows in by_method.values():
        keys = sorted({key for row in rows for run in row.runs for key in run.settings if run.finished})
        for pair in combinations(sorted(keys, key=lambda key: (key != "prior_nu", key)), 2):
            grid = _grid(rows, pair)
            if len({x for x, _ in grid}) > 1 and len({y for _, y in grid}) > 1:
                pictures.append(_heat_map(table, rows[0], pair, grid))
    return pictures


def _grid(rows: Sequence[Row], pair: tuple[str, str]) -> dict[tuple[float, float], list[Run]]:
    """Return the finished runs at each combination of the two settings."""
    grid: dict[tuple[float, float], list[Run]] = defaultdict(list)
    for row in rows:
        for run in row.runs:
            if run.finished and all(key in run.settings for key in pair):
                grid[run.settings[pair[0]], run.settings[pair[1]]].append(run)
    return grid


def _heat_map(
    table: Table, row: Row, pair: tuple[str, str], grid: dict[tuple[float, float], list[Run]]
) -> Picture:
    columns, lines = sorted({x for x, _ in grid}), sorted({y for _, y in grid})
    metric = "nmi" if all("nmi" in run.metrics for runs in grid.values() for run in runs) else "num_clusters"
    values = np.full((len(lines), len(columns)), np.nan)
    counts = np.full_like(values, np.nan)
    for (x, y), runs in grid.items():
        place = lines.index(y), columns.index(x)
        values[place] = np.mean([run.metrics.get(metric, np.nan) for run in runs])
        counts[place] = np.mean([run.metrics.get("num_clusters", np.nan) for run in runs])

    def draw(axes: Axes) -> None:
        colours = axes.pcolormesh(np.ma.masked_invalid(values), cmap="viridis", edgecolors=INK, linewidth=0.2)
        middle = float(np.nanmin(values) + np.nanmax(values)) / 2
        for line, column in np.argwhere(np.isfinite(values)):
            value, count = values[line, column], counts[line, column]
            text = f"{value:.3f}\nK {count:.1f}" if metric == "nmi" else f"K {count:.1f}"
            colour = "#ffffff" if value <= middle else "#101010"
            axes.text(column + 0.5, line + 0.5, text, ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(np.arange(len(columns)) + 0.5, [f"{value:g}" for value in columns])
        axes.set_yticks(np.arange(len(lines)) + 0.5, [f"{value:g}" for value in lines])
        axes.set(xlabel=pair[0], ylabel=pair[1])
        bar = axes.figure.colorbar(colours, ax=axes, label="NMI" if metric == "nmi" else "K")
        bar.outline.set_visible(False)

    file = re.sub(r"[^A-Za-z0-9]+", "_", f"{table.key}_{row.method}_{pair[0]}_{pair[1]}")
    caption = "Mean over seeds; K is the mean number of clusters. An empty cell has no finished run."
    return _picture(table, file, f"{table.title}: {pair[0]} and {pair[1]} ({row.name})", caption, draw)


def _band(axes: Axes, places: Sequence[float], values: Sequence[Sequence[float]], label: str) -> None:
    """Draw the mean over seeds as a line and the range over seeds as a band."""
    line = axes.plot(
        places, [float(np.mean(group)) for group in values], marker="o", markersize=4, label=label
    )[0]
    lower, upper = [min(group) for group in values], [max(group) for group in values]
    axes.fill_between(list(places), lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)


def _true_k_line(axes: Axes, table: Table) -> None:
    if table.true_k is not None:
        axes.axhline(table.true_k, color=INK, linewidth=0.8, linestyle=":", label=f"classes: {table.true_k}")


def _legend(axes: Axes) -> None:
    """Draw the legend below; long labels get lines of their own, so that they don't make the figure wide."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        labels = [textwrap.fill(label, _LEGEND_LETTERS) for label in labels]
        ncols = 2 if max(map(len, labels)) <= _LEGEND_LETTERS // 2 else 1
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=ncols, fontsize=9)


def _picture(table: Table, name: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Picture:
    """Draw on a fresh figure and return it as a picture."""
    figure = Figure(figsize=(6.4, 4.0))
    draw(figure.subplots())
    return Picture(table.key, name, title, caption, to_svg(figure, name))


def from_zero(axes: Axes) -> tuple[float, float]:
    """Return limits from 0 to a little above the highest point drawn so far."""
    return 0.0, 1.08 * axes.dataLim.y1


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG that fits any width; its ids begin with the name."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return _with_own_ids(svg, name)


def _with_own_ids(svg: str, name: str) -> str:
    """Prefix every id, since several figures share one page."""
    prefix = re.sub(r"[^A-Za-z0-9]+", "_", name)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}_\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}_\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{prefix}_\1"', svg)
