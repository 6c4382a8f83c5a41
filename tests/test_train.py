"""The command `deepdpm-train`: what it leaves behind, how it says what is wrong, and how it goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from deepdpm import config
from deepdpm.metrics import evaluate
from deepdpm.results import read_json

SMALL = ("trainer=debug", "dataset=synthetic", "dataset.num_points=600")
# The published moves, early: K changes in few epochs.
GROWING = (
    "trainer.optimizer.cluster_lr=0.02",
    "dataset=synthetic",
    "dataset.num_points=600",
    "trainer.batch_size=128",
    "model.init_k=3",
    "prior.scale=isotropic",
    "prior.sigma_scale=0.05",
    "model.moves.kind=published",
    "trainer.schedule.moves_every=2",
    "trainer.schedule.freeze_after_move=1",
    "trainer.lightning.accelerator=cpu",
    "trainer.lightning.max_epochs=16",
)


def result_of(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "result.json")
    assert found is not None
    return found


def trace_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trace.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, which is closed again."""
    with np.load(path) as file:
        return dict(file)


def same(one: Any, other: Any) -> bool:
    """Whether two plain values of a checkpoint are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_a_run_leaves_all_that_is_promised(train: Callable[..., Any], tmp_path: Path) -> None:
    ended = train(*SMALL, "seed=0", "hydra.run.dir=run")
    assert ended.status == 0
    assert all(word in ended.out for word in ("K", "NMI", "ARI", "ACC", "seconds", "outputs: run"))
    folder = tmp_path / "run"
    result = result_of(folder)
    assert (result["status"], result["error"], result["seed"], result["dataset"]) == (
        "finished",
        None,
        0,
        "synthetic",
    )
    arrays = arrays_of(folder / "assignments.npz")
    assert arrays["labels"].shape == arrays["confidence"].shape == (600,)
    assert arrays["cluster_ids"].shape == (result["num_components"],)
    assert result["num_clusters"] == len(np.unique(arrays["labels"]))
    assert 0 <= arrays["labels"].min() <= arrays["labels"].max() < result["num_components"]
    truth = config.hydra.utils.instantiate(config.compose(SMALL).dataset).load().train.labels
    assert {key: result[key] for key in ("nmi", "ari", "acc")} == evaluate(truth, arrays["labels"])
    trace = trace_of(folder)
    assert list(trace[0]) == [
        "epoch",
        "num_clusters",
        "cluster_loss",
        "subcluster_loss",
        "moves",
        "nmi",
        "ari",
        "acc",
    ]
    assert [int(row["epoch"]) for row in trace] == list(range(result["epochs"]))
    assert result["seconds"] > 0
    assert result["peak_memory_mb"] > 0
    assert result["config_hash"] == config.config_hash(config.compose([*SMALL, "seed=0"]))
    assert OmegaConf.load(folder / "config.yaml").dataset.num_points == 600
    assert (folder / ".hydra" / "config.yaml").is_file()
    assert not (folder / "last.ckpt").exists()
    state = torch.load(folder / "model.ckpt", weights_only=True)
    assert state["hyper_parameters"]["seed"] == 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(*GROWING, f"seed={seed}", f"hydra.run.dir={folder}").status == 0
    a, b, c = ((tmp_path / name / "trace.csv").read_text() for name in "abc")
    assert a == b
    assert a != c


def test_a_finished_run_is_not_run_again(train: Callable[..., Any], tmp_path: Path) -> None:
    train(*SMALL, "hydra.run.dir=run")
    before = result_of(tmp_path / "run")
    ended = train(*SMALL, "hydra.run.dir=run")
    assert ended.status == 0
    assert result_of(tmp_path / "run") == before
    train(*SMALL, "seed=1", "hydra.run.dir=run")
    assert result_of(tmp_path / "run")["seed"] == 1


def test_a_stopped_run_goes_on_to_the_bit_across_changes_of_k(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    assert train(*GROWING, "hydra.run.dir=whole").status == 0
    half = [part for part in GROWING if "max_epochs" not in part]
    assert train(*half, "trainer.lightning.max_epochs=7", "hydra.run.dir=half").status == 0
    assert train(*GROWING, "ckpt_path=half", "hydra.run.dir=rest").status == 0
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    clusters = [int(row["num_clusters"]) for row in trace_of(whole)]
    assert clusters[6] != clusters[-1], "the test is to cross a change of K"
    assert (whole / "trace.csv").read_text() == (rest / "trace.csv").read_text()
    for name in ("labels", "confidence", "cluster_ids"):
        np.testing.assert_array_equal(
            arrays_of(whole / "assignments.npz")[name], arrays_of(rest / "assignments.npz")[name]
        )
    states = [torch.load(folder / "model.ckpt", weights_only=True)["state_dict"] for folder in (whole, rest)]
    assert same(*states)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_epoch_and_the_same_folder_goes_on(
    signum: int, train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepdpm.callbacks import Trace

    assert train(*GROWING, "hydra.run.dir=whole").status == 0
    add_row = Trace.on_train_epoch_end

    def add_row_and_send(self: Trace, trainer: Any, module: Any) -> None:
        add_row(self, trainer, module)
        if trainer.current_epoch == 5:
            os.kill(os.getpid(), signum)

    with monkeypatch.context() as patched:
        patched.setattr(Trace, "on_train_epoch_end", add_row_and_send)
        ended = train(*GROWING, "hydra.run.dir=run")
    assert ended.status == 128 + signum
    stopped = result_of(tmp_path / "run")
    assert (stopped["status"], stopped["epochs"]) == ("stopped", 6)
    assert stopped["num_clusters"] == int(trace_of(tmp_path / "run")[-1]["num_clusters"])
    config = (tmp_path / "run" / "config.yaml").read_text()
    other = train(*GROWING, "seed=1", "hydra.run.dir=run")
    assert other.status == 1
    assert "stopped run of other settings" in other.err
    assert result_of(tmp_path / "run") == stopped
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    assert train(*GROWING, "hydra.run.dir=run").status == 0
    assert (tmp_path / "run" / "trace.csv").read_text() == (tmp_path / "whole" / "trace.csv").read_text()
    assert result_of(tmp_path / "run")["status"] == "finished"
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.slow
def test_ctrl_c_from_outside(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "deepdpm.train",
        *GROWING,
        "trainer.lightning.max_epochs=100000",
        "hydra.run.dir=run",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=_environment())
    deadline = time.monotonic() + 240
    while (
        not (tmp_path / "run" / "trace.csv").exists()
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert result_of(tmp_path / "run")["status"] == "stopped"
    assert (tmp_path / "run" / "last.ckpt").is_file()


def _environment() -> dict[str, str]:
    """The environment of this process, with the package to be found wherever the command runs."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_a_crash_leaves_a_result_that_says_so(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepdpm.callbacks import Trace

    def crash(self: Trace, trainer: Any, module: Any) -> None:
        raise FloatingPointError("the sky fell")

    monkeypatch.setattr(Trace, "on_train_epoch_end", crash)
    with pytest.raises(FloatingPointError):
        train(*SMALL, "hydra.run.dir=run")
    result = result_of(tmp_path / "run")
    assert (result["status"], result["error"]) == ("failed", "FloatingPointError: the sky fell")
    assert not (tmp_path / "run" / "assignments.npz").exists()


def test_a_full_disk_is_a_clear_sentence(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pytorch_lightning as pl

    def refuse(self: Any, path: Path, *rest: Any, **more: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", refuse)
    ended = train(*SMALL, "hydra.run.dir=run")
    assert ended.status == 1
    assert "could not be written (No space left on device): make room there" in ended.err
    assert "Traceback" not in ended.err
    assert result_of(tmp_path / "run")["status"] == "failed"
    assert not [path.name for path in (tmp_path / "run").iterdir() if "ckpt" in path.name]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("model.foo=1",), ["model.foo", "init_k"]),
        (("dataset=foo",), ["dataset=foo", "digits"]),
        (("model.init_k=0",), ["model.init_k"]),
        (("model.init_k=601",), ["model.init_k", "601", "600"]),
        (("prior.nu=1",), ["prior.nu"]),
        (("dataset=file",), ["dataset.path"]),
        (("dataset=file", "dataset.path=missing.csv"), ["missing.csv"]),
        (("dataset=mnist_n2d",), ["DEEPDPM_DATA"]),
        (("ckpt_path=missing.ckpt",), ["ckpt_path", "missing.ckpt"]),
        (("trainer.lightning.accelerator=abacus",), ["trainer.lightning", "abacus"]),
        (("trainer.lightning.max_epochs=abc",), ["trainer.lightning"]),
        (("hydra.run.dir=occupied/run",), ["occupied"]),
        (("tracking=wandb", "tracking.mode=online"), ["tracking.mode", "wandb login"]),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_status_1(
    arguments: tuple[str, ...],
    parts: list[str],
    train: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "occupied").write_text("")
    small = ("trainer=debug",) if any(a.startswith("dataset=") for a in arguments) else SMALL
    folder = () if any(a.startswith("hydra.run.dir") for a in arguments) else ("hydra.run.dir=run",)
    ended = train(*small, *folder, *arguments)
    said = [line for line in ended.err.splitlines() if line.startswith("deepdpm-train: ")]
    assert ended.status == 1
    assert len(said) == 1
    assert all(part in said[0] for part in parts), said
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("run/*.npz")) + list(tmp_path.glob("run/*.ckpt"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"no checkpoint at all"])
def test_a_damaged_checkpoint_is_refused(content: bytes, train: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(content)
    ended = train(*SMALL, "ckpt_path=bad.ckpt", "hydra.run.dir=run")
    assert ended.status == 1
    assert "damaged or no checkpoint" in ended.err


def test_a_checkpoint_of_other_dimensions_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    train(*SMALL, "hydra.run.dir=run")
    ended = train("trainer=debug", "ckpt_path=run", "hydra.run.dir=other")
    assert ended.status == 1
    assert "2 dimensions" in ended.err
    assert "64" in ended.err


def test_a_failed_start_spares_an_earlier_result(train: Callable[..., Any], tmp_path: Path) -> None:
    train(*SMALL, "hydra.run.dir=run")
    assert train(*SMALL, "model.init_k=0", "hydra.run.dir=run").status == 1
    assert result_of(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    "dataset",
    [
        ["dataset=embeddings", "dataset.path=gone"],
        ["dataset=embeddings", "dataset.path=."],
        ["dataset=file", "dataset.path=gone.npy"],
        ["dataset=image_folder", "dataset.path=gone"],
        ["dataset=text_folder", "dataset.path=gone"],
        ["dataset=reuters10k", "dataset.path=gone.npy"],
        ["+stl10=moco"],
    ],
)
def test_missing_data_are_told_from_other_failures(
    dataset: list[str], train: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"status": "pending"}')
    for settings, missing in ((["seed=0"], True), (["seed=-1"], False)):
        assert train(*dataset, *settings, "peer=kmeans", "hydra.run.dir=run").status == 1
        result = result_of(tmp_path / "run")
        assert (result["status"], result["data_missing"]) == ("failed", missing)


def test_a_sweep_has_one_folder_a_job_and_outlives_a_failure(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    ended = train("-m", *SMALL, "model.init_k=0,1,2", "hydra.sweep.dir=sweep")
    assert ended.status == 1
    results = {
        path.parent.name: result_of(path.parent) for path in (tmp_path / "sweep").glob("*/result.json")
    }
    assert len(results) == 3
    assert all(name.startswith("synthetic,") and "model.init_k=" in name for name in results)
    assert sorted(result["status"] for result in results.values()) == ["failed", "finished", "finished"]


def test_sweeps_and_runs_land_where_the_readme_says(train: Callable[..., Any], tmp_path: Path) -> None:
    train("-m", *SMALL, "seed=1")
    train(*SMALL)
    assert len(list(tmp_path.glob("multirun_outputs/*/*seed=1*/result.json"))) == 1
    assert len(list(tmp_path.glob("outputs/synthetic/*/result.json"))) == 1


def test_a_run_without_labels_tells_what_needs_none(train: Callable[..., Any], tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(200, 2)) + np.repeat([[0.0], [9.0]], 100, 0)
    np.save(tmp_path / "two blobs.npy", points)
    ended = train("trainer=debug", "dataset=file", "dataset.path=two blobs.npy", "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    assert all(
        word in ended.out for word in ("two_blobs, seed 0", "silhouette", "log density", "outputs: run")
    )
    assert "NMI" not in ended.out
    result = result_of(tmp_path / "run")
    assert result["dataset"] == "two_blobs"
    assert result["nmi"] is None
    assert f"{result['silhouette']:.3f}" in ended.out


def test_a_test_set_is_only_assigned(train: Callable[..., Any], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 2
        np.savez(
            tmp_path / f"{name}.npz", x=generator.normal(size=(count, 3)) + 20 * labels[:, None], y=labels
        )
    ended = train(
        "trainer=debug",
        "dataset=file",
        "dataset.path=train.npz",
        "dataset.labels=y",
        "dataset.test_path=test.npz",
        "hydra.run.dir=run",
    )
    assert ended.status == 0, ended.err
    result = result_of(tmp_path / "run")
    assert set(result["test"]) >= {"nmi", "ari", "acc", "num_clusters"}
    assert "test" in ended.out


def test_without_labels_metrics_that_need_none_are_there(train: Callable[..., Any], tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(80, 3)))
    train("trainer=debug", "dataset=file", "dataset.path=points.npy", "model.init_k=2", "hydra.run.dir=run")
    result = result_of(tmp_path / "run")
    assert (result["status"], result["nmi"], result["acc"]) == ("finished", None, None)
    assert isinstance(result["log_likelihood"], float)
    assert all(row["nmi"] == "" for row in trace_of(tmp_path / "run"))


def test_a_peer_writes_the_same_files(train: Callable[..., Any], tmp_path: Path) -> None:
    assert train("dataset=synthetic", "peer=kmeans", "hydra.run.dir=run").status == 0
    result = result_of(tmp_path / "run")
    assert (result["name"], result["num_clusters"], result["status"]) == ("kmeans", 15, "finished")
    assert arrays_of(tmp_path / "run" / "assignments.npz")["labels"].shape == (10000,)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_tracking_without_an_account(
    mode: str, train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    logged: list[str] = []
    send = wandb.Run.log

    def keep(self: wandb.Run, data: dict[str, Any], *rest: Any, **more: Any) -> None:
        logged.extend(data)
        send(self, data, *rest, **more)

    monkeypatch.setattr(wandb.Run, "log", keep)
    ended = train(
        "-m", *SMALL, "seed=0,1", "tracking=wandb", f"tracking.mode={mode}", "hydra.sweep.dir=sweep"
    )
    assert ended.status == 0, ended.err
    assert wandb.run is None
    runs = list((tmp_path / "sweep").glob("*/wandb/offline-run-*/*.wandb"))
    assert len(runs) == (2 if mode == "offline" else 0)
    assert all(path.stat().st_size > 10_000 for path in runs)
    if mode == "offline":
        assert {"trace/num_clusters", "trace/nmi", "clusters", "cluster_loss"} <= set(logged)


def test_tracking_is_off_unless_asked_for(train: Callable[..., Any], tmp_path: Path) -> None:
    train(*SMALL, "hydra.run.dir=run")
    assert not (tmp_path / "run" / "wandb").exists()


def test_help_lists_groups_and_experiments(train: Callable[..., Any]) -> None:
    said = train("--help").out
    assert all(
        word in said for word in ("dataset: digits", "embedded: ", "prior: ", "init_k: 1", "--multirun"[:2])
    )


def test_progress_shows_moves_as_lines(train: Callable[..., Any], tmp_path: Path) -> None:
    said = train(*GROWING, "hydra.run.dir=run").err
    moves = [f"epoch {row['epoch']}: {row['moves']}" for row in trace_of(tmp_path / "run") if row["moves"]]
    assert moves
    assert all(line in said for line in moves)
    assert (
        train(*GROWING, "seed=1", "trainer.lightning.enable_progress_bar=false", "hydra.run.dir=b").err == ""
    )


def test_every_group_choice_dev_runs(train: Callable[..., Any], tmp_path: Path) -> None:
    for number, choice in enumerate(["prior=nig", "model=default", "tracking=none", "alternation=none"]):
        ended = train(*SMALL, choice, f"hydra.run.dir=run{number}")
        assert ended.status == 0, ended.err
        assert json.loads((tmp_path / f"run{number}" / "result.json").read_text())["status"] == "finished"
