"""Tables and sweeps through the real commands, on small data."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cloudpickle
import pytest

from deepdpm import config, tables, train
from deepdpm.report import find_runs, write_report

SMALL = [
    "dataset.num_points=300",
    "trainer.lightning.max_epochs=2",
    "trainer.lightning.enable_progress_bar=false",
]
TABLE = ["synthetic", "peer=none", *SMALL, "--rows", "grid", "--seeds", "2"]


def numbers(out: Path) -> dict[tuple[str, int], tuple[float, ...]]:
    runs = find_runs([out])
    assert all(run.finished for run in runs)
    keys = ("num_clusters", "nmi", "ari", "acc")
    return {(run.method, run.seed): tuple(run.metrics[key] for key in keys) for run in runs}


def multirun(folder: Path, *overrides: str, last: Sequence[str] = ()) -> None:
    command = [sys.executable, "-m", "deepdpm.train", "--multirun", *overrides, *SMALL, *last]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=500)


@pytest.mark.slow
def test_a_killed_table_ends_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_WAIT_SECONDS", 0.2)
    for job in tables.plan("synthetic", (0, 1), tmp_path / "whole", ["peer=none", *SMALL], ["grid"]):
        train.run(config.compose(job.overrides), job.folder, job.overrides)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "deepdpm.tables", *TABLE, "--out", str(tmp_path / "killed")]
    runner = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    while not any("finished" in path.read_text() for path in (tmp_path / "killed").rglob("result.json")):
        assert runner.poll() is None, "the runner ended before it was killed"
        time.sleep(0.1)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
    results = list((tmp_path / "killed").rglob("result.json"))
    assert any(json.loads(path.read_text())["status"] == "pending" for path in results)
    tables.main([*TABLE, "--out", str(tmp_path / "killed")])
    assert (tmp_path / "killed" / "synthetic" / "report" / "report.html").is_file()
    whole = numbers(tmp_path / "whole")
    assert numbers(tmp_path / "killed") == whole
    assert set(whole) == {("deepdpm", 0), ("deepdpm", 1)}


def test_a_config_reaches_the_processes_of_a_launcher() -> None:
    pickled = cloudpickle.dumps(config.compose(["model.init_k=3"]))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).model.init_k)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], input=pickled, env=environment, capture_output=True)
    assert (done.stdout.decode().strip(), pickle.loads(pickled).model.init_k) == ("3", 3), (
        done.stderr.decode()
    )


# Two clusterings, since lambda acts in the autoencoder's training between them.
JOINT = [
    "dataset=gaussians",
    "dataset.num_dims=6",
    "dataset.num_clusters=3",
    "dataset.separation=6",
    "model.features.latent_dim=3",
    "model.features.hidden_dims=[8]",
    "model.features.pretrain_epochs=1",
    "model.moves.kind=published",
    "alternation.train_cluster_net=1",
    "alternation.ae_epochs=1",
    "trainer.lightning.max_epochs=-1",
]


@pytest.mark.slow
def test_nu_by_lambda_on_all_cores_gives_a_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    grid = ["prior.nu=4,8", "alternation.lambda_=0.01,1"]
    multirun(tmp_path, "+sweeps=prior_nu_lambda", *grid, "hydra/launcher=cores", last=JOINT)
    runs = find_runs([tmp_path])
    assert all(run.finished for run in runs)
    assert {(run.settings["prior_nu"], run.settings["lambda"]) for run in runs} == {
        (nu, weight) for nu in (4, 8) for weight in (0.01, 1)
    }
    page = write_report([tmp_path / "multirun_outputs"], tmp_path / "report")
    assert (page.parent / "figures" / "sweeps_gaussians_joint_prior_nu_lambda.svg").is_file()


@pytest.mark.slow
def test_a_sweep_for_slurm_runs_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    multirun(tmp_path, "+sweeps=alpha", "dataset=synthetic", "prior.alpha=1,10", "hydra/launcher=local")
    runs = find_runs([tmp_path])
    assert {run.settings["alpha"] for run in runs if run.finished} == {1.0, 10.0}


@pytest.mark.slow
def test_a_study_of_optuna_goes_on(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    study = ["+sweeps=optuna_prior", "dataset=synthetic", "prior.nu=range(4,8)", "hydra.sweeper.n_trials=1"]
    for _ in range(2):
        multirun(tmp_path, *study)
    storage = f"sqlite:///{tmp_path / 'optuna_prior.db'}"
    trials = optuna.load_study(study_name="optuna_prior", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
