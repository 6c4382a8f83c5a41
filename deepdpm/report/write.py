"""Write the report: Markdown, CSV, LaTeX, the figures, and one HTML page that needs no other file."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from deepdpm.report import text
from deepdpm.report.aggregate import Table, build_tables
from deepdpm.report.figures import Picture, build_figures
from deepdpm.report.references import load_references
from deepdpm.report.runs import Run, find_runs


def write_report(folders: Iterable[Path | str], out: Path | str, title: str = "DeepDPM: results") -> Path:
    """Read the runs below the folders, write the report into ``out`` and return the path of its HTML page.

    Raises:
        ValueError: a folder does not exist, or there is no run below the folders.
    """
    folders = [Path(folder) for folder in folders]
    runs = find_runs(folders)
    if not runs:
        places = ", ".join(map(str, folders))
        raise ValueError(
            f"There is no run (no result.json) below {places}: run deepdpm-train, or name other folders."
        )
    tables = build_tables(runs, load_references())
    pictures = build_figures(tables)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.md", f"# {title}\n\n{text.markdown(tables)}{_markdown_problems(runs)}")
    _write(out / "report.csv", text.comma_separated(tables))
    _write(out / "report.tex", text.latex(tables))
    for picture in pictures:
        _write(out / "figures" / f"{picture.name}.svg", picture.svg)
    _write(out / "report.html", html(tables, pictures, runs, title))
    return out / "report.html"


def html(
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    runs: Sequence[Run],
    title: str,
) -> str:
    """Return the whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deepdpm.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    context: dict[str, Any] = {
        "title": title,
        "tables": tables,
        "pictures": {table.key: [p for p in pictures if p.table == table.key] for table in tables},
        "problems": problems(runs),
        "sources": text.sources_of(tables),
        "num_runs": len(runs),
        "num_finished": sum(run.finished for run in runs),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "text": text,
    }
    return environment.get_template("page.html.j2").render(context)


def problems(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that did not finish."""
    return [run for run in runs if not run.finished]


def _markdown_problems(runs: Sequence[Run]) -> str:
    lines = [
        f"| {run.folder} | {'data missing' if run.data_missing else run.status} | {run.error or ''} |"
        for run in problems(runs)
    ]
    if not lines:
        return ""
    return "\n".join(
        ["\n## Runs without a result", "", "| Folder | Status | Reason |", "|---|---|---|", *lines, ""]
    )


def _write(path: Path, content: str) -> None:
    """Write a whole file or nothing: a reader never sees half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
