"""Means, standard deviations and paired tests, against numpy and scipy."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deepdpm.report import build_tables, find_runs, load_references
from deepdpm.report.aggregate import paired_p_value
from deepdpm.report.text import latex, markdown, marks, sources_of

OURS = [0.91, 0.93, 0.92, 0.95]
PEER = [0.90, 0.91, 0.93, 0.90]


@pytest.fixture
def table(make_run, tmp_path: Path):
    for seed, (ours, peer) in enumerate(zip(OURS, PEER, strict=True)):
        make_run(f"ours/{seed}", seed=seed, nmi=ours)
        make_run(f"peer/{seed}", seed=seed, nmi=peer, name="kmeans")
    make_run("ours/4", seed=4, status="failed", error="The file is not there.", nmi=None)
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    return table


def test_mean_and_std_are_numpys(table) -> None:
    cell = table.rows[0].cells["nmi"]
    assert (table.rows[0].method, table.rows[1].method) == ("deepdpm", "kmeans")
    assert cell.mean == pytest.approx(np.mean(OURS))
    assert cell.std == pytest.approx(np.std(OURS, ddof=1))
    assert cell.count == 4


def test_failed_runs_are_counted_and_not_averaged(table) -> None:
    row = table.rows[0]
    assert (row.finished, row.total, row.status) == (4, 5, "1 failed")


def test_the_best_is_marked_and_the_other_tested(table) -> None:
    ours, peer = table.rows[0].cells["nmi"], table.rows[1].cells["nmi"]
    assert ours.best
    assert ours.p_value is None
    assert not peer.best
    assert peer.p_value == pytest.approx(stats.ttest_rel(OURS, PEER).pvalue)
    assert peer.tied == (peer.p_value >= 0.05)


def test_the_literature_stands_below_with_its_source(table) -> None:
    (paper,) = [row for row in table.rows if row.title == "DeepDPM, paper"]
    assert paper.reference
    assert paper.cells["acc"].mean == 0.89
    assert paper.cells["acc"].source
    assert not any(cell.best for row in table.rows if row.reference for cell in row.cells.values())


def test_variants_are_rows_of_their_own_in_numeric_order(make_run, tmp_path: Path) -> None:
    for nu in (2, 10):
        make_run(f"nu{nu}", overrides=[f"prior.nu={nu}", "seed=0"])
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    assert [row.variant for row in table.rows if not row.reference] == [
        (("prior_nu", "2"),),
        (("prior_nu", "10"),),
    ]


def test_what_prints_alike_is_equally_good(make_run, tmp_path: Path) -> None:
    for name, acc in ((None, 0.9596), ("gmm", 0.9604), ("kmeans", 0.95)):
        make_run(str(name), name=name, acc=acc)
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    assert [row.cells["acc"].best for row in table.rows[:3]] == [True, False, True]
    assert markdown([table]).count("**0.960**") == 2


def test_every_number_of_others_has_its_source(make_run, tmp_path: Path) -> None:
    make_run("a")
    make_run("b", dataset="stl10")
    tables = build_tables(find_runs([tmp_path]), load_references())
    sources = sources_of(tables)
    written = markdown(tables)
    for row in (row for table in tables for row in table.rows if row.reference):
        assert row.sources
        assert f"\n| *{row.title}*{marks(row, sources)} " in written
    assert all(f"{number}. {source}." in written for number, source in enumerate(sources, 1))


def test_what_all_runs_share_is_said_once(make_run, tmp_path: Path) -> None:
    shared = ["model.hidden=[9]", "trainer.lightning.max_epochs=3"]
    for nu in (2, 10):
        make_run(f"nu{nu}", overrides=[*shared, f"prior.nu={nu}"])
        make_run(f"peer{nu}", overrides=["peer=gmm", *shared, f"prior.nu={nu}"], name="gmm")
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    titles = [row.title for row in table.rows if not row.reference]
    assert titles == ["DeepDPM (prior_nu=2)", "DeepDPM (prior_nu=10)", "Gaussian mixture, K given"]
    assert table.common == (("model.hidden", "[9]"), ("trainer.lightning.max_epochs", "3"))
    for written in (markdown([table]), latex([table]).replace(r"\_", "_")):
        assert "All runs of ours with model.hidden=[9], trainer.lightning.max_epochs=3." in written


def test_a_row_alone_keeps_its_settings(make_run, tmp_path: Path) -> None:
    make_run("a", overrides=["prior.nu=2"])
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    assert (table.rows[0].title, table.common) == ("DeepDPM (prior_nu=2)", ())


def test_a_seed_run_twice_counts_once(make_run, tmp_path: Path) -> None:
    make_run("a", seed=0, status="failed", nmi=None)
    make_run("b", seed=0, nmi=0.7)
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    assert (table.rows[0].finished, table.rows[0].total, table.rows[0].status) == (1, 1, "finished")
    assert table.rows[0].cells["nmi"].mean == 0.7


def test_only_missing_data_makes_a_data_missing_row(make_run, tmp_path: Path) -> None:
    make_run("a", status="failed", data_missing=True, dataset="stl10", nmi=None)
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    assert table.rows[0].status == "data missing"
    assert table.rows[0].finished == 0


def test_no_test_without_two_common_seeds() -> None:
    assert paired_p_value({0: 0.5, 1: 0.6}, {1: 0.5, 2: 0.9}) is None


def test_equal_differences_have_no_variance() -> None:
    assert paired_p_value({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}) == 1.0
    assert paired_p_value({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5}) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_the_paired_test_is_symmetric_and_a_probability(pairs: list[tuple[float, float]]) -> None:
    first, second = dict(enumerate(p[0] for p in pairs)), dict(enumerate(p[1] for p in pairs))
    p_value = paired_p_value(first, second)
    assert p_value is not None
    assert 0 <= p_value <= 1
    assert p_value == pytest.approx(paired_p_value(second, first))


def test_only_runs_on_the_same_data_are_compared(make_run, tmp_path: Path) -> None:
    for size, ours, peer in ((1000, 0.9, 0.8), (5000, 0.5, 0.6)):
        overrides = [f"dataset.num_points={size}"]
        make_run(f"ours{size}", dataset="synthetic", overrides=overrides, nmi=ours)
        make_run(f"peer{size}", dataset="synthetic", overrides=overrides, nmi=peer, name="kmeans")
    (table,) = build_tables(find_runs([tmp_path]), load_references())
    best = {(row.method, row.variant[0][1]) for row in table.rows if row.cells["nmi"].best}
    assert best == {("deepdpm", "1000"), ("kmeans", "5000")}
