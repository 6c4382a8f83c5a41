"""The written report: every form says the same, and the page needs no other file."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from deepdpm.report import load_references, write_report
from deepdpm.report.cli import main

NMIS = [0.91, 0.93, 0.92]


@pytest.fixture
def report(make_run, tmp_path: Path) -> Path:
    for seed, nmi in enumerate(NMIS):
        make_run(f"ours/{seed}", trace=[1, 2, 4, 10], seed=seed, nmi=nmi)
        make_run(f"peer/{seed}", seed=seed, nmi=0.8, name="kmeans")
    make_run("ours/3", seed=3, status="failed", error="Row 7 holds <NaN>.", nmi=None)
    make_run("stl", dataset="stl10", status="failed", data_missing=True, error="No STL-10 codes.", nmi=None)
    for nu in (12, 20):
        for lambda_ in (0.1, 0.5):
            overrides = [f"prior.nu={nu}", f"alternation.lambda_={lambda_}"]
            make_run(f"sweep/{nu}_{lambda_}", dataset="digits", nmi=nu / 100 + lambda_, overrides=overrides)
    for start in (1, 20):
        make_run(f"starts/{start}", dataset="mnist_n2d", overrides=[f"model.init_k={start}"])
    for size in (1000, 10000):
        overrides = [f"dataset.num_points={size}"]
        make_run(f"sizes/{size}", dataset="synthetic", seconds=size / 100, overrides=overrides)
    return write_report([tmp_path / "runs"], tmp_path / "out").parent


def test_csv_holds_the_numbers(report: Path) -> None:
    with (report / "report.csv").open(newline="") as file:
        rows = {(row["dataset"], row["method"], row["kind"]): row for row in csv.DictReader(file)}
    ours = rows["usps_n2d", "deepdpm", "run"]
    assert float(ours["nmi_mean"]) == pytest.approx(np.mean(NMIS))
    assert float(ours["nmi_std"]) == pytest.approx(np.std(NMIS, ddof=1))
    assert (ours["finished"], ours["total"]) == ("3", "4")
    assert float(rows["usps_n2d", "DeepDPM, paper", "reference"]["acc_mean"]) == 0.89
    assert rows["stl10", "deepdpm", "run"]["status"] == "data missing"
    assert "nmi" in rows["stl10", "DeepDPM, paper", "reference"]["unverified"]


def test_markdown_shows_best_count_and_failures(report: Path) -> None:
    page = (report / "report.md").read_text(encoding="utf-8")
    assert "| DeepDPM | 10.0 ± 0.0 | **0.920 ± 0.010** |" in re.sub(" +", " ", page)
    assert "3 of 4 (1 failed)" in page
    assert "Row 7 holds <NaN>." in page
    assert "data missing" in page
    widths = {
        line.count("|") - line.count("\\|")
        for line in page.splitlines()
        if line.startswith("| ") and "±" in line
    }
    assert widths == {8}


def test_latex_is_balanced_and_escaped(report: Path) -> None:
    page = (report / "report.tex").read_text(encoding="utf-8")
    assert page.count(r"\begin{") == page.count(r"\end{")
    assert page.count("{") == page.count("}")
    assert r"$\mathbf{0.920 \pm 0.010}$" in page
    assert not re.search(r"(?<!\\)_", page.replace("$_", ""))


def test_the_page_is_self_contained_and_escaped(report: Path) -> None:
    page = (report / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "@import" not in page
    assert "url(http" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "Row 7 holds &lt;NaN&gt;." in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    HTMLParser().feed(page)


@pytest.mark.parametrize(
    "name",
    ["usps_n2d_k_by_epoch", "mnist_n2d_k_by_init_k", "digits_deepdpm_prior_nu_lambda", "synthetic_time_by_n"],
)
def test_figures_are_svg_in_the_colour_of_the_page(report: Path, name: str) -> None:
    svg = (report / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "currentColor" in svg
    assert svg in (report / "report.html").read_text(encoding="utf-8")


def test_the_heat_map_holds_each_cell(report: Path) -> None:
    svg = (report / "figures" / "digits_deepdpm_prior_nu_lambda.svg").read_text(encoding="utf-8")
    for value in ("0.220", "0.300", "0.620", "0.700"):
        assert value in svg


def test_no_runs_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 1
    assert "There is no run" in capsys.readouterr().err


def test_the_command_writes_into_the_first_folder(make_run, tmp_path: Path) -> None:
    make_run("a")
    main([str(tmp_path / "runs")])
    assert (tmp_path / "runs" / "report" / "report.html").is_file()


def test_every_reference_has_a_known_data_set_and_source() -> None:
    references = load_references()
    for value in references.values:
        assert value.dataset in references.datasets
        assert value.source in references.sources
        assert value.metric in ("num_clusters", "seconds") or 0 <= value.mean <= 1
    unverified = {(v.dataset, v.metric) for v in references.values if v.unverified}
    assert ("stl10", "nmi") in unverified
    assert ("usps_n2d", "acc") not in unverified
