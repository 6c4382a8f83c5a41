"""The command ``deepdpm-report``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from deepdpm.report.single import write_run_report
from deepdpm.report.write import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the folders named on the command line."""
    parser = argparse.ArgumentParser(
        prog="deepdpm-report",
        description="Write Markdown, CSV, LaTeX and one HTML page from folders of runs. Only "
        "result.json is read, and trace.csv for the figures. The folder of one run gets a page of its own, "
        "report.html, from its model and data.",
    )
    parser.add_argument(
        "folders", nargs="*", default=["multirun_outputs"], help="folders of runs (multirun_outputs)"
    )
    parser.add_argument("-o", "--out", type=Path, help="where to write (the first folder's report/)")
    parser.add_argument("--title", default="DeepDPM: results", help="the page's title")
    parser.add_argument(
        "--map", default="pca", choices=["pca", "umap"], help="the map on the page of one run"
    )
    options = parser.parse_args(arguments)
    first = Path(options.folders[0])
    try:
        if len(options.folders) == 1 and (first / "result.json").is_file():
            page = write_run_report(first, options.out or first / "report.html", options.map)
        else:
            page = write_report(options.folders, options.out or first / "report", options.title)
    except (ValueError, OSError) as error:
        print(f"deepdpm-report: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    Console().print(f"Report: {page}", soft_wrap=True)


if __name__ == "__main__":
    main()
