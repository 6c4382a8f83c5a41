"""Tables as Markdown, CSV and LaTeX text."""

import csv
import io
from collections.abc import Sequence

from tabulate import tabulate

from deepdpm.report.aggregate import COMPARED, DIGITS, SIGNIFICANCE, Cell, Row, Table, variant_label
from deepdpm.report.runs import METRICS

COLUMNS = (("num_clusters", "K"), ("nmi", "NMI"), ("ari", "ARI"), ("acc", "ACC"), ("seconds", "Seconds"))
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
}

LEGEND = (
    "Mean ± standard deviation over seeds. Bold: the best mean of the runs made here, to the digits shown. "
    f"≈: a paired t-test over the common seeds does not tell it from the best (p ≥ {SIGNIFICANCE}). "
    "Runs: finished of all. Seconds: fit and final prediction. In italics, with their source: numbers of "
    "others, not tested; * marks a value whose source was not at hand (unverified)."
)


def number(metric: str, value: float) -> str:
    """Return a value with the digits that suit its metric.

    Example:
        >>> number("nmi", 0.93456), number("num_clusters", 10.0), number("seconds", 1448.2)
        ('0.935', '10.0', '1448')
    """
    if metric in ("nmi", "ari", "acc", "silhouette"):
        return f"{value:.{DIGITS}f}"
    return f"{value:.0f}" if metric != "num_clusters" and abs(value) >= 100 else f"{value:.1f}"


def cell_text(metric: str, cell: Cell | None, plus_minus: str = " ± ") -> str:
    """Return mean and standard deviation as text, a dash for no value; published values keep their digits."""
    if cell is None:
        return "–"
    numbers = [cell.mean] if cell.std is None else [cell.mean, cell.std]
    if cell.source and metric in COMPARED and all(round(value, 2) == value for value in numbers):
        return plus_minus.join(f"{value:.2f}" for value in numbers)
    return plus_minus.join(number(metric, value) for value in numbers)


def runs_text(row: Row) -> str:
    """Return how many of how many runs finished, and what became of the others."""
    if row.reference:
        return "–"
    if row.status == "data missing":
        return "data missing"
    return f"{row.finished} of {row.total}" + ("" if row.status == "finished" else f" ({row.status})")


def columns_of(table: Table) -> list[tuple[str, str]]:
    """Return the columns of a table; NMI, ARI and ACC give way to the silhouette where nothing has labels."""
    if any(metric in row.cells for row in table.rows for metric in COMPARED):
        return list(COLUMNS)
    without = [column for column in COLUMNS if column[0] not in COMPARED]
    return [without[0], ("silhouette", "Silhouette"), ("log_likelihood", "Log-likelihood"), *without[1:]]


def heading(table: Table) -> str:
    """Return the title of a table with the number of classes."""
    return table.title if table.true_k is None else f"{table.title} (true K: {table.true_k})"


def note(table: Table) -> str:
    """Return the sentence below a heading that names the settings of all runs; empty where there are none."""
    return f"All runs of ours with {variant_label(table.common)}." if table.common else ""


def markdown(tables: Sequence[Table]) -> str:
    """Return all tables as Markdown."""
    parts = [LEGEND.replace("*", "\\*"), ""]
    sources = sources_of(tables)
    for table in tables:
        columns = columns_of(table)
        parts += [
            f"## {heading(table)}",
            "",
            *([note(table), ""] if table.common else []),
            _markdown_table(table, columns, sources),
            "",
        ]
    if sources:
        parts += ["## Sources of the numbers of others", ""]
        parts += [f"{number}. {source}." for number, source in enumerate(sources, 1)] + [""]
    return "\n".join(parts)


def _markdown_table(table: Table, columns: Sequence[tuple[str, str]], sources: Sequence[str]) -> str:
    lines = []
    for row in table.rows:
        title = f"*{row.title}*{marks(row, sources)}" if row.reference else row.title
        cells = [_markdown_cell(metric, row) for metric, _ in columns]
        lines.append([title.replace("|", r"\|"), *cells, runs_text(row)])
    headers = ["Method", *(title for _, title in columns), "Runs"]
    sides = ["left", *["right"] * len(columns), "left"]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=sides)


def sources_of(tables: Sequence[Table]) -> list[str]:
    """Return the sources of all references, in the order of the tables."""
    return list(dict.fromkeys(source for table in tables for row in table.rows for source in row.sources))


def marks(row: Row, sources: Sequence[str]) -> str:
    """Return the numbers of a row's sources, such as " [2]"."""
    return "".join(f" [{sources.index(source) + 1}]" for source in row.sources)


def _markdown_cell(metric: str, row: Row) -> str:
    cell = row.cells.get(metric)
    text = cell_text(metric, cell)
    if cell is None:
        return text
    if cell.best:
        return f"**{text}**"
    return text + (" ≈" if cell.tied else "") + (" \\*" if cell.unverified else "")


def comma_separated(tables: Sequence[Table]) -> str:
    """Return all rows as one CSV file: a line a method, columns for mean, std and p of each metric."""
    buffer = io.StringIO()
    header = ["table", "dataset", "method", "variant", "kind", "finished", "total", "status"]
    header += [f"{metric}_{what}" for metric in METRICS for what in ("mean", "std")]
    header += [f"{metric}_p" for metric in COMPARED] + ["unverified", "source"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for table in tables:
        for row in table.rows:
            kind = "reference" if row.reference else "run"
            line: list[object] = [table.key, table.dataset, row.method, variant_label(row.variant), kind]
            line += ["", "", ""] if row.reference else [row.finished, row.total, row.status]
            for metric in METRICS:
                cell = row.cells.get(metric)
                line += ["", ""] if cell is None else [cell.mean, "" if cell.std is None else cell.std]
            for metric in COMPARED:
                cell = row.cells.get(metric)
                line.append("" if cell is None or cell.p_value is None else cell.p_value)
            line.append(" ".join(metric for metric, cell in row.cells.items() if cell.unverified))
            line.append("; ".join(row.sources))
            writer.writerow(line)
    return buffer.getvalue()


def latex(tables: Sequence[Table]) -> str:
    """Return all tables as LaTeX with booktabs rules."""
    parts = [r"% Needs \usepackage{booktabs}.", "% " + LEGEND.replace("±", "+-").replace("≈", "approx")]
    for table in tables:
        columns = columns_of(table)
        parts += [
            r"\begin{table}[t]",
            r"  \centering",
            rf"  \caption{{{_escape(f'{heading(table)}. {note(table)}'.strip())}}}",
            rf"  \begin{{tabular}}{{l{'r' * len(columns)}l}}",
            r"    \toprule",
            "    Method & " + " & ".join(title for _, title in columns) + r" & Runs \\",
            r"    \midrule",
        ]
        for before, row in zip((None, *table.rows), table.rows, strict=False):
            if row.reference and before is not None and not before.reference:
                parts.append(r"    \midrule")
            cells = [_latex_cell(metric, row) for metric, _ in columns]
            title = rf"\textit{{{_escape(row.title)}}}" if row.reference else _escape(row.title)
            parts.append(f"    {title} & " + " & ".join(cells) + f" & {_escape(runs_text(row))} \\\\")
        parts += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    return "\n".join(parts)


def _latex_cell(metric: str, row: Row) -> str:
    cell = row.cells.get(metric)
    if cell is None:
        return "--"
    text = cell_text(metric, cell, plus_minus=r" \pm ")
    if cell.best:
        return rf"$\mathbf{{{text}}}$"
    return f"${text}$" + (r" $\approx$" if cell.tied else "") + ("$^{*}$" if cell.unverified else "")


def _escape(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text).replace("–", "--")
