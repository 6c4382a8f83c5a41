"""Group runs by data set and method; means, standard deviations and paired tests over seeds."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from deepdpm.report.references import References
from deepdpm.report.runs import METRICS, Run

COMPARED = ("nmi", "ari", "acc")
"""The metrics in which the highest mean is the best."""

SIGNIFICANCE = 0.05
DIGITS = 3
"""Decimals of the compared metrics; what agrees in all of them is equally good."""

Variant = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cell:
    """One metric of one method: mean and standard deviation over seeds.

    ``p_value`` is that of the paired test against the best method of the table, None where there is none.
    """

    mean: float
    std: float | None = None
    count: int = 1
    best: bool = False
    p_value: float | None = None
    unverified: bool = False
    source: str | None = None

    @property
    def tied(self) -> bool:
        """Whether the test does not tell the method from the best one."""
        return self.p_value is not None and self.p_value >= SIGNIFICANCE


@dataclass(frozen=True)
class Row:
    """One line of a table: a method of ours, a peer, or a value of the literature (``reference``).

    ``common`` are the settings of ``variant`` that all methods of the table share, which need no naming.
    """

    method: str
    name: str
    variant: Variant = ()
    cells: Mapping[str, Cell] = field(default_factory=dict)
    finished: int = 0
    total: int = 0
    status: str = "finished"
    reference: bool = False
    runs: tuple[Run, ...] = ()
    common: Variant = ()

    @property
    def sources(self) -> list[str]:
        """Where a reference's values were read."""
        return list(dict.fromkeys(cell.source for cell in self.cells.values() if cell.source))

    @property
    def shown(self) -> Variant:
        """The settings that tell the row from others."""
        return tuple(item for item in self.variant if item not in self.common)

    @property
    def title(self) -> str:
        """The printed name of the method, with the settings that tell it from others."""
        return self.name + (f" ({variant_label(self.shown)})" if self.shown else "")

    @property
    def title_for_any_size(self) -> str:
        """The title without N, for a curve over N."""
        return replace(self, variant=tuple(item for item in self.variant if item[0] != "N")).title


@dataclass(frozen=True)
class Table:
    """All rows of one data set in one experiment; ``key`` names it in files and links.

    ``common`` are the settings that all runs share, but for those of peers that know no such setting.
    """

    key: str
    dataset: str
    title: str
    true_k: int | None
    rows: tuple[Row, ...]
    common: Variant = ()


def paired_p_value(first: Mapping[int, float], second: Mapping[int, float]) -> float | None:
    """Return the two-sided p value of the paired t-test over the seeds that both have; None below two seeds.

    Equal values on every seed give 1; the same difference on every seed, which has no variance, gives 0.

    Example:
        >>> round(paired_p_value({0: 0.90, 1: 0.91, 2: 0.92}, {0: 0.80, 1: 0.83, 2: 0.81}), 4)
        0.0082
        >>> paired_p_value({0: 0.90}, {0: 0.80}) is None
        True
    """
    seeds = sorted(set(first) & set(second))
    if len(seeds) < 2:
        return None
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    if np.ptp(differences) <= 1e-12:
        return 1.0 if abs(float(differences[0])) <= 1e-12 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def build_tables(runs: Iterable[Run], references: References) -> list[Table]:
    """Return one table for each experiment and data set: runs with the best marked, then published values."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.status != "unfinished":
            groups[run.experiment or "", run.dataset].append(run)
    tables = []
    for experiment, dataset in sorted(groups, key=lambda key: (key[0], references.dataset_order(key[1]))):
        rows = _mark_best(_run_rows(groups[experiment, dataset], references))
        common = _common(rows)
        rows = [replace(row, common=common) for row in rows]
        rows += _reference_rows(dataset, references)
        title = references.dataset_title(dataset)
        if experiment not in ("", "embedded"):
            title += f" · {experiment}"
        key = f"{experiment}_{dataset}".lstrip("_")
        tables.append(Table(key, dataset, title, references.true_k(dataset), tuple(rows), common))
    return tables


def _run_rows(runs: Iterable[Run], references: References) -> list[Row]:
    """Return one row for each method and variant, ours first, the peers last."""
    groups: dict[tuple[str, Variant], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.method, run.variant].append(run)
    keys = sorted(groups, key=lambda key: (references.method_order(key[0]), _variant_order(key[1])))
    return [_row(method, variant, groups[method, variant], references) for method, variant in keys]


def _common(rows: Sequence[Row]) -> Variant:
    """Return the settings that all rows share; those of the nets, which peers lack, of ours alone."""
    ours = [row.variant for row in rows if not row.runs[0].peer] or [row.variant for row in rows]
    if len(rows) < 2:
        return ()
    return tuple(item for item in ours[0] if all(item in variant for variant in ours))


def variant_label(variant: Sequence[tuple[str, str]]) -> str:
    """Return a variant as text.

    Example:
        >>> variant_label((("lambda", "0.1"), ("prior_nu", "20")))
        'lambda=0.1, prior_nu=20'
    """
    return ", ".join(f"{key}={value}" for key, value in variant)


def _variant_order(variant: Variant) -> list[tuple[str, float, str]]:
    """Return a sorting key that puts 2 before 10."""
    order = []
    for key, value in variant:
        try:
            order.append((key, float(value), value))
        except ValueError:
            order.append((key, float("inf"), value))
    return order


def _row(method: str, variant: Variant, runs: list[Run], references: References) -> Row:
    """Return the row of one group; a seed that was run twice counts once, by its last finished folder."""
    by_seed: dict[int, Run] = {}
    for run in runs:
        if run.finished or run.seed not in by_seed or not by_seed[run.seed].finished:
            by_seed[run.seed] = run
    chosen = tuple(by_seed[seed] for seed in sorted(by_seed))
    finished = [run for run in chosen if run.finished]
    cells = {}
    for metric in METRICS:
        values = [run.metrics[metric] for run in finished if metric in run.metrics]
        if values:
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            cells[metric] = Cell(float(np.mean(values)), std, len(values))
    name = references.method_title(method)
    return Row(method, name, variant, cells, len(finished), len(chosen), _status(chosen), False, chosen)


def _status(runs: Sequence[Run]) -> str:
    """Return "finished", or in words what happened to the other runs."""
    if runs and all(run.data_missing and not run.finished for run in runs):
        return "data missing"
    words = Counter("data missing" if run.data_missing else run.status for run in runs if not run.finished)
    return ", ".join(f"{count} {word}" for word, count in sorted(words.items())) or "finished"


def _mark_best(rows: list[Row]) -> list[Row]:
    """Mark the highest mean of each compared metric among the rows on the same data, and test the others."""
    data = [row.runs[0].data for row in rows]
    for metric in COMPARED:
        for kind in set(data):
            having = [row for row, of in zip(rows, data, strict=True) if of == kind and metric in row.cells]
            if len(having) > 1:
                best = max(having, key=lambda row: row.cells[metric].mean)
                rows = [_compared(row, best, metric) if row in having else row for row in rows]
    return rows


def _compared(row: Row, best: Row, metric: str) -> Row:
    """Return the row with its cell marked as best, or with the p value of its difference from the best."""
    cell = row.cells[metric]
    if round(cell.mean, DIGITS) == round(best.cells[metric].mean, DIGITS):
        cell = replace(cell, best=True)
    else:
        cell = replace(
            cell, p_value=paired_p_value(_values_by_seed(best, metric), _values_by_seed(row, metric))
        )
    return replace(row, cells={**row.cells, metric: cell})


def _values_by_seed(row: Row, metric: str) -> dict[int, float]:
    return {run.seed: run.metrics[metric] for run in row.runs if run.finished and metric in run.metrics}


def _reference_rows(dataset: str, references: References) -> list[Row]:
    """Return one row for each method that the literature reports on the data set."""
    cells: dict[str, dict[str, Cell]] = defaultdict(dict)
    for value in references.of(dataset):
        source = references.sources[value.source]
        cell = Cell(value.mean, value.std, 0, unverified=value.unverified, source=source)
        cells[value.method][value.metric] = cell
    return [Row(method, method, cells=found, reference=True) for method, found in cells.items()]
