"""Tables, figures and one HTML page from folders of runs; a run's ``result.json`` is all that is read."""

from deepdpm.report.aggregate import Cell, Row, Table, build_tables
from deepdpm.report.references import References, load_references
from deepdpm.report.runs import Run, find_runs
from deepdpm.report.write import write_report

__all__ = [
    "Cell",
    "References",
    "Row",
    "Run",
    "Table",
    "build_tables",
    "find_runs",
    "load_references",
    "write_report",
]
