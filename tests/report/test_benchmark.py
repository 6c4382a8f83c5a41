"""The tables of the benchmark, from the smallest runs: its numbers are those of the result.json files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdpm.jobs import write_result
from deepdpm.report import benchmark
from deepdpm.results import read_json
from deepdpm.tables import Job, plan

SIZES = (300, 600)


@pytest.fixture
def jobs(train: Callable[..., Any], tmp_path: Path) -> list[Job]:
    """The jobs of the smallest benchmark: growth with N, run, and one set of codes whose data are missing."""
    small = [f"dataset.num_points={SIZES[0]},{SIZES[1]}", "dataset.num_dims=3", "dataset.num_clusters=4"]
    ours = plan(
        "benchmarks", (0,), tmp_path, [*small, "peer=none", "trainer.lightning.max_epochs=2"], ["points"]
    )
    jobs = ours + plan("benchmarks", (0,), tmp_path, [*small, "peer=kmeans"], ["points"])
    for job in jobs:
        assert train(*job.overrides, f"hydra.run.dir={job.folder}").status == 0
    missing = plan("benchmarks", (0,), tmp_path, ["peer=kmeans"], ["usps"])
    slow = plan("benchmarks", (0,), tmp_path, ["dataset.num_points=600", *small[1:]], ["points_dp"])
    for job, fate in zip([*missing, *slow], ({"data_missing": True}, {"too_slow": 60}), strict=True):
        record = {"status": "failed", "overrides": job.overrides, "name": job.method, "dataset": job.dataset}
        write_result(job.folder, {**record, "overrides": list(job.overrides), **fate})
    return jobs


def test_the_numbers_are_those_of_the_runs(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_START_UPS", {"nothing": ["-c", "pass"]})
    folder = tmp_path / "benchmarks"
    runs = benchmark.read_runs(folder)
    results = {(job.method, read_json(job.folder / "result.json")["num_points"]): job for job in jobs}
    results = {key: read_json(job.folder / "result.json") for key, job in results.items()}
    table = benchmark.growth_table(runs, "points")
    finished = table[table.Runs == "1 of 1"]
    assert len(finished) == len(results) == 4
    titles = {"DeepDPM": "deepdpm", "K-means, K given": "kmeans"}
    for _, line in finished.iterrows():
        result = results[titles[line.Method], int(line.N)]
        assert float(line.Seconds) == pytest.approx(result["seconds"], abs=0.006, rel=0.01)
        assert float(line["µs a point"]) == pytest.approx(1e6 * result["seconds"] / int(line.N), rel=0.06)
        assert float(line["K found"]) == result["num_clusters"]
        assert float(line.NMI) == pytest.approx(result["nmi"], abs=0.001)
        assert float(line["Fit, MB"]) == pytest.approx(result["fit_memory_mb"], abs=0.6)
    of_dp = table[table.Method.str.startswith("DP")]
    assert dict(zip(of_dp.N, of_dp.Runs, strict=True)) == {"300": "not run (too slow)", "600": "over 60 s"}
    assert benchmark.codes_table(runs).Runs.tolist() == ["data missing"]

    slopes = benchmark.slopes_table(runs).set_index("Method").Slope.astype(float)
    for title, name in titles.items():
        first, last = (results[name, size]["seconds"] for size in SIZES)
        assert slopes[title] == pytest.approx(math.log(last / first) / math.log(2), abs=0.006)

    phases = benchmark.phases_table(runs)
    ours = [results["deepdpm", size] for size in SIZES]
    assert phases.Moves.astype(float).tolist() == pytest.approx(
        [result["phases"]["moves"] for result in ours], abs=0.06
    )

    benchmark.main([str(folder)])
    text = capsys.readouterr().out
    assert (folder / "benchmark.md").read_text() == text[:-1]
    assert benchmark.markdown(table) in text
    assert all(
        f"\n## {title}" in text for title in ("Start-up", "Codes", "Growth with N", "Slopes", "Against")
    )


def test_the_arithmetic_is_that_of_the_epochs(tmp_path: Path) -> None:
    trace = "epoch,num_clusters\n0,4\n1,4\n2,4\n"
    (tmp_path / "trace.csv").write_text(trace)
    run = benchmark.pd.Series(
        {"num_points": 100, "num_dims": 3, "hidden": 5, "init_k": 1, "polish_epochs": 1, "sample": 50}
        | {"seeds": 8, "folder": tmp_path}
    )
    counts = (1, 4, 4)
    passes = [100 * k * 3 * 4 for k in counts]
    net = [2 * 100 * (3 * 5 + 5 * k) for k in counts]
    found = {key: value * 1e9 for key, value in benchmark.arithmetic(run).items()}
    assert found == pytest.approx(
        {
            "training": 2 * sum(passes[:2]) + 3 * sum(net[:2]),
            "polishing": passes[2] + 3 * net[2],
            "prediction": net[2],
            "moves": 50 * 8 * 3 * 4,
        }
    )


def test_a_matrix_product_has_a_speed() -> None:
    threads = torch.get_num_threads()
    assert 0.01 < benchmark.matrix_product_gflops(size=128, seconds=0.05) < 1e5
    assert torch.get_num_threads() == threads


def test_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"status": "finished", "overrides": ["seed=0"]}))
    with pytest.raises(SystemExit):
        benchmark.main([str(tmp_path)])
    assert "say make benchmark" in capsys.readouterr().err
