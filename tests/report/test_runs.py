"""What is read of a run's folder."""

from pathlib import Path

import pytest

from deepdpm.report.runs import find_runs, read_trace, variant_of


def test_runs_are_found_in_any_depth_and_once(make_run, tmp_path: Path) -> None:
    make_run("a/b/seed=0", seed=0)
    make_run("c", seed=1)
    runs = find_runs([tmp_path / "runs", tmp_path / "runs" / "a"])
    assert [run.seed for run in runs] == [0, 1]


def test_a_damaged_result_is_a_failed_run(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "finis', encoding="utf-8")
    (run,) = find_runs([tmp_path])
    assert run.status == "failed"
    assert "cannot be read" in str(run.error)


def test_a_folder_without_a_result_is_unfinished(tmp_path: Path) -> None:
    (tmp_path / "job" / ".hydra").mkdir(parents=True)
    (tmp_path / "job" / ".hydra" / "overrides.yaml").write_text("[]", encoding="utf-8")
    (run,) = find_runs([tmp_path])
    assert run.status == "unfinished"
    assert not run.finished


def test_nan_and_null_metrics_are_left_out(make_run, tmp_path: Path) -> None:
    make_run("a", nmi=float("nan"), ari=None)
    (run,) = find_runs([tmp_path])
    assert "nmi" not in run.metrics
    assert "ari" not in run.metrics
    assert run.metrics["acc"] == 0.9


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        find_runs([tmp_path / "nowhere"])


def test_seed_experiment_and_output_are_no_variant() -> None:
    assert (
        variant_of(
            ["+embedded=mnist", "seed=1", "peer=gmm", "hydra/launcher=joblib", "tracking.mode=offline"]
        )
        == ()
    )
    assert variant_of(["+prior.nu=4", "alternation.lambda_=0.1"]) == (("lambda", "0.1"), ("prior_nu", "4"))


def test_the_trace_is_read(make_run, tmp_path: Path) -> None:
    make_run("a", trace=[1, 2, 2, 4])
    make_run("b")
    with_trace, without = find_runs([tmp_path])
    assert read_trace(with_trace) == ([0, 1, 2, 3], [1, 2, 2, 4])
    assert read_trace(without) == ([], [])
