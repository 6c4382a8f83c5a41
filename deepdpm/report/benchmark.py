"""The tables of `make benchmark`: quality, time and memory beside peers, growth with N, D and K, and phases.

All numbers are those of the runs' `result.json` and `trace.csv`, but for the start-up of a command and the
speed of a matrix product, which are measured here.

Legend: N points, D dimensions, K clusters, H hidden units.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from deepdpm.config import compose
from deepdpm.report.references import References, load_references
from deepdpm.report.text import number
from deepdpm.results import git_revision, now, read_json, versions, write_text
from deepdpm.timing import PHASES
from deepdpm.transforms import most_axes

_SCORES = {"num_clusters": "K", "nmi": "NMI", "ari": "ARI", "acc": "ACC"}
_MEMORY = {"fit_memory_mb": "Fit, MB", "peak_memory_mb": "Peak, MB"}
_GROWTH = {"points": ("num_points", "N"), "dimensions": ("num_dims", "D"), "clusters": ("classes", "K")}
_BOUNDS = {"points": "1 is linear", "dimensions": "2 is quadratic", "clusters": "1 is linear"}
# Columns of words, the others hold numbers.
_WORDS = ("Set", "Method", "Phase", "Growth", "Runs", "", "Command")
_START_UPS = {
    "import scikit-learn": ["-c", "import sklearn.cluster, sklearn.mixture"],
    "import DeepDPM": ["-c", "from deepdpm import DeepDPM; DeepDPM()"],
    "deepdpm-train, before the data": [
        "-c",
        "import deepdpm.train, deepdpm.callbacks, deepdpm.data, deepdpm.joint, deepdpm.phases\n"
        "import deepdpm.tracking\n"
        "deepdpm.config.compose()",
    ],
}


def read_runs(folder: Path) -> pd.DataFrame:
    """Return one line for each job below a folder: what it was to do, how it ended and what it measured.

    Columns: those of `result.json`, its phases as `phases.NAME`; `kind` (the experiment without its suffix),
    `classes` (the K of generated data), `set` (a title of the data), `hidden`, `init_k`, `seeds`, `sample`
    and `folder`.

    Raises:
        ValueError: there is no run.
    """
    found = []
    for path in sorted(folder.rglob("result.json")):
        result = read_json(path) or {}
        overrides = result.get("overrides") or []
        rows = [text.partition("=")[2] for text in overrides if text.startswith("+benchmarks=")]
        if rows:
            found.append(
                {
                    **result,
                    **_of_settings(overrides),
                    "kind": rows[0].partition("_")[0],
                    "folder": path.parent,
                }
            )
    if not found:
        raise ValueError(f"There is no run of the benchmark below {folder}: say make benchmark.")
    return pd.json_normalize(found)


def _of_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the size of the data where a job's settings tell it, and the sizes of nets and search."""
    cfg = compose(overrides)
    data, known = cfg.dataset, {}
    if data.name == "gaussians":
        known = {"num_points": data.num_points, "num_dims": data.num_dims, "classes": data.num_clusters}
        title = f"Gaussians, N {data.num_points:,}, D {data.num_dims}, K {data.num_clusters}"
    else:
        title = data.name + ("_imbalanced" if data.get("imbalanced") else "")
    moves = cfg.model.moves
    sizes = {
        "hidden": sum(cfg.model.hidden),
        "init_k": cfg.model.init_k,
        "sample": moves.sample_size,
        "seeds": moves.seeds,
    }
    return {"name": cfg.name or cfg.peer.get("name") or "deepdpm", "set": title, **known, **sizes}


def codes_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each set of published codes and each method."""
    references = load_references()
    codes = runs[~runs["kind"].isin(list(_GROWTH))]
    lines = []
    for title in sorted(codes.set.unique(), key=references.dataset_order):
        for name in _methods(codes, references):
            chosen = codes[(codes.set == title) & (codes.name == name)]
            line = {"Set": references.dataset_title(title), "Method": references.method_title(name)}
            lines.append(line | _cells(chosen, {"seconds": "Seconds", **_SCORES, **_MEMORY}))
    return pd.DataFrame(lines)


def growth_table(runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return a line for each size and each method of a kind of growth: points, dimensions or clusters."""
    references = load_references()
    key, letter = _GROWTH[kind]
    chosen = runs[runs["kind"] == kind]
    lines = []
    for size in sorted(chosen[key].dropna().unique()) if key in chosen else []:
        for name in _methods(chosen, references):
            one = chosen[(chosen[key] == size) & (chosen.name == name)]
            line = {letter: f"{int(size):,}", "Method": references.method_title(name)}
            cells = _cells(one, {"seconds": "Seconds", "num_clusters": "K found", "nmi": "NMI", **_MEMORY})
            finished = one[one.status == "finished"]
            point = (finished.seconds / finished.num_points * 1e6).mean() if len(finished) else float("nan")
            cells = {"Seconds": cells.pop("Seconds"), "µs a point": _number("seconds", point), **cells}
            lines.append(line | cells)
    return pd.DataFrame(lines)


def slopes_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return how the seconds of each method grow: the slope of a line through log seconds and log size."""
    references = load_references()
    lines = []
    for kind, (key, letter) in _GROWTH.items():
        chosen = runs[(runs["kind"] == kind) & (runs.status == "finished")]
        for name in _methods(chosen, references):
            means = chosen[chosen.name == name].groupby(key).seconds.mean()
            if len(means) > 1:
                slope = float(np.polyfit(np.log(means.index.astype(float)), np.log(means.to_numpy()), 1)[0])
                sizes = f"{letter} {int(means.index.min()):,} to {int(means.index.max()):,}"
                title = references.method_title(name)
                lines.append({"Growth": sizes, "Method": title, "Slope": f"{slope:.2f}", "": _BOUNDS[kind]})
    return pd.DataFrame(lines)


def phases_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return where DeepDPM's seconds went, for each set of data: a column for each phase."""
    names = {f"phases.{phase}": phase.capitalize() for phase in ("load", *PHASES)}
    lines = []
    for title, chosen in _ours(runs):
        line = {"Set": title, **{text: _number("seconds", chosen[key].mean()) for key, text in names.items()}}
        lines.append(line | {"Seconds": _number("seconds", chosen.seconds.mean())})
    return pd.DataFrame(lines)


def arithmetic_table(runs: pd.DataFrame, matmul: float) -> pd.DataFrame:
    """Return the arithmetic that DeepDPM's phases must do against the seconds they took.

    Args:
        runs: of `read_runs`.
        matmul: GFLOP a second of a plain matrix product on this machine.
    """
    lines = []
    for title, chosen in _ours(runs):
        work = pd.DataFrame([arithmetic(run) for _, run in chosen.iterrows()]).mean()
        for phase in ("training", "polishing", "prediction", "moves"):
            seconds = chosen[f"phases.{phase}"].mean()
            speed = work[phase] / seconds if seconds > 0 else float("nan")
            line = {"Set": title, "Phase": phase if phase != "moves" else "moves: one E-step of the sample"}
            line |= {"GFLOP": f"{work[phase]:.3g}", "Seconds": _number("seconds", seconds)}
            if phase == "moves":
                ideal = work[phase] / matmul
                line |= {"GFLOP/s": "–", "Of a matrix product": f"as long as {seconds / ideal:.0f} passes"}
            else:
                line |= {"GFLOP/s": f"{speed:.3g}", "Of a matrix product": f"{speed / matmul:.0%}"}
            lines.append(line)
    return pd.DataFrame(lines)


def arithmetic(run: "pd.Series[Any]") -> dict[str, float]:
    """Return the GFLOP that each phase of a run must do; a multiplication and an addition are two.

    A pass of training: the E-step, N K D (D + 1), of triangular matrices; the sums of the M-step, as many, of
    symmetric ones; a step of the net forwards and backwards, 6 N (D H + H K). Polishing: the same without the
    sums. Prediction: the net forwards. Moves: one E-step of the sample over as many clusters as the search
    has seeds, since the number of passes is not recorded. K is that of each epoch, in `trace.csv`; D is that
    of the transformed codes.
    """
    points, hidden = int(run.num_points), int(run.hidden)
    dims = min(int(run.num_dims), most_axes(points))
    after = pd.read_csv(run.folder / "trace.csv").num_clusters.tolist()
    before = [int(run.init_k), *after[:-1]]
    first_polished = len(before) - int(run.polish_epochs)
    passes = [points * k * dims * (dims + 1) for k in before]
    net = [2 * points * hidden * (dims + k) for k in [*before, after[-1]]]
    sample = min(int(run["sample"]), points)
    flop = {
        "training": 2 * sum(passes[:first_polished]),
        "polishing": sum(passes[first_polished:]),
        "prediction": net[-1],
        "moves": sample * min(int(run.seeds), sample) * dims * (dims + 1),
    }
    flop["training"] += 3 * sum(net[:first_polished])
    flop["polishing"] += 3 * sum(net[first_polished:-1])
    return {phase: count / 1e9 for phase, count in flop.items()}


def _ours(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return DeepDPM's finished runs by the title of their data: codes first, then generated data by size."""
    ours = runs[(runs.name == "deepdpm") & (runs.status == "finished")]
    if "phases.training" not in ours:
        return []
    ours = ours.dropna(subset=["phases.training"]).sort_values(
        ["kind", "num_points", "num_dims", "num_clusters"]
    )
    references = load_references()
    groups = sorted(ours.groupby("set", sort=False), key=lambda group: group[1].kind.iloc[0] in _GROWTH)
    return [(references.dataset_title(title), chosen) for title, chosen in groups]


def _methods(runs: pd.DataFrame, references: References) -> list[str]:
    return sorted(runs.name.unique(), key=references.method_order)


def _cells(runs: pd.DataFrame, columns: dict[str, str]) -> dict[str, str]:
    """Return means and standard deviations of the finished runs as text, and what became of the others."""
    finished = runs[runs.status == "finished"]
    cells = {}
    for key, title in columns.items():
        values = finished[key].dropna().astype(float) if key in finished else pd.Series(dtype=float)
        text = _number(key, values.mean())
        cells[title] = f"{text} ± {_number(key, values.std())}" if len(values) > 1 else text
    words = [_fate(run) for _, run in runs[runs.status != "finished"].iterrows()]
    ended = [f"{len(finished)} of {len(runs)}"] if len(finished) or not words else []
    return cells | {"Runs": ", ".join([*ended, *sorted(set(words))]) if len(runs) else "not run (too slow)"}


def _fate(run: "pd.Series[Any]") -> str:
    """Return what became of a run that did not finish."""
    if run.get("data_missing") is True:
        return "data missing"
    limit = run.get("too_slow")
    return f"over {limit:.0f} s" if isinstance(limit, int | float) and limit > 0 else str(run.status)


def _number(metric: str, value: float) -> str:
    """Return a value with the digits that suit it, a dash for none."""
    if not np.isfinite(value):
        return "–"
    small = metric == "seconds" and abs(value) < 10
    return f"{value:.2f}" if small else number(metric, value)


def markdown(table: pd.DataFrame) -> str:
    """Return a table of texts as Markdown.

    Example:
        >>> print(markdown(pd.DataFrame([{"Set": "USPS", "K": "10"}])))
        | Set   |   K |
        |:------|----:|
        | USPS  |  10 |
    """
    sides = ["left" if title in _WORDS else "right" for title in table.columns]
    return table.to_markdown(index=False, disable_numparse=True, colalign=sides)


def start_up_table(repeats: int = 3) -> pd.DataFrame:
    """Return the seconds that a process takes to start and to import, the median of some."""
    lines = []
    for title, arguments in _START_UPS.items():
        start = partial(subprocess.run, [sys.executable, *arguments], check=True)
        seconds = statistics.median(_seconds(start) for _ in range(repeats))
        lines.append({"Command": title, "Seconds": _number("seconds", seconds)})
    return pd.DataFrame(lines)


def matrix_product_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Return the greatest GFLOP a second of a product of two square float32 matrices within some seconds."""
    first, out = torch.rand(size, size), torch.empty(size, size)
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        best = min(best, _seconds(partial(torch.mm, first, first, out=out)))
    return 2 * size**3 / best / 1e9


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _machine() -> str:
    """Return what the figures were measured on, in a line."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    packages = ", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "scikit-learn"))
    threads = torch.get_num_threads()
    return f"{now()}, revision {git_revision()}. {processor}, {threads} threads. {packages}."


def page(folder: Path) -> str:
    """Return all tables as Markdown."""
    runs, speed = read_runs(folder), matrix_product_gflops()
    parts = [
        "# Benchmark",
        _machine(),
        f"A product of two float32 matrices of 1024 x 1024: {speed:.0f} GFLOP/s.",
    ]
    tables = [
        ("Start-up, not counted below", start_up_table()),
        ("Codes", codes_table(runs)),
        *((f"Growth with {letter}", growth_table(runs, kind)) for kind, (_, letter) in _GROWTH.items()),
        ("Slopes: the exponent of seconds against size", slopes_table(runs)),
        ("Where DeepDPM's seconds went", phases_table(runs)),
        ("Against the arithmetic that must be done", arithmetic_table(runs, speed)),
    ]
    parts += [f"## {title}\n\n{markdown(table)}" for title, table in tables if len(table)]
    return "\n\n".join([*parts, _LEGEND]) + "\n"


_LEGEND = (
    "Seconds: fit and final prediction, without start-up, loading and scores. Fit, MB: how far memory rose "
    "above that with the data loaded, libraries that the method loads included. Peak, MB: of the process, "
    "scores included. K-means (the best of ten starts) and the Gaussian mixture are given K."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the benchmark's runs, and write them to `benchmark.md` beside the runs."""
    parser = argparse.ArgumentParser(prog="python -m deepdpm.report.benchmark", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("multirun_outputs/benchmarks"))
    folder = parser.parse_args(arguments).folder
    try:
        text = page(folder)
        write_text(folder / "benchmark.md", text)
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(text)


if __name__ == "__main__":
    main()
