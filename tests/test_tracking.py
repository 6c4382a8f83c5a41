"""What W&B is told, read back from the files of real offline runs."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from deepdpm import config

wandb = pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2  # noqa: E402
from wandb.sdk.launch.sweeps import utils as agent  # noqa: E402

SMALL = ("trainer=debug", "dataset=synthetic", "dataset.num_points=300", "tracking.log_model=false")
_BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """Yield what a .wandb file holds: a LevelDB log (7 bytes of its own, then blocks) of protocol buffers."""
    content, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def tracked(folder: Path) -> tuple[Any, list[int], dict[str, str]]:
    """Return the opening record of the one run below a folder, its exit codes and its summary (as JSON)."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = list(records(path))
    exits = [record.exit.exit_code for record in found if record.HasField("exit")]
    summary = {
        item.key: item.value_json
        for record in found
        if record.HasField("summary")
        for item in record.summary.update
    }
    return next(record.run for record in found if record.HasField("run")), exits, summary


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    for name in ("WANDB_DATA_DIR", "WANDB_RUN_GROUP", "WANDB_SWEEP_ID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # W&B reads the environment once a process


def test_each_job_of_a_sweep_is_a_finished_run_of_its_group(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    ended = train("-m", *SMALL[:-1], "tracking=wandb", "peer=none,kmeans", "hydra.sweep.dir=out/my_sweep")
    assert ended.status == 0, ended.err
    folders = sorted(path.parent for path in tmp_path.glob("out/my_sweep/*/result.json"))
    runs = [tracked(folder) for folder in folders]
    assert [run.run_group for run, _, _ in runs] == ["my_sweep", "my_sweep"]
    assert [exits for _, exits, _ in runs] == [[0], [0]]
    assert {run.display_name for run, _, _ in runs} == {"synthetic-0", "kmeans-synthetic-0"}
    assert len({run.run_id for run, _, _ in runs}) == 2
    assert all(summary["status"] == '"finished"' and "nmi" in summary for _, _, summary in runs)
    staged = [path for path in tmp_path.rglob("model.ckpt") if "wandb" in path.parts]
    assert all(path.is_relative_to(tmp_path / "out") for path in staged)
    assert wandb.run is None


def test_a_failed_job_is_a_failed_run(train: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("tracking=wandb", "peer=gmm", "peer.num_clusters=999", "hydra.run.dir=run")
    assert train(*SMALL, *arguments).status == 1
    assert tracked(tmp_path / "run")[1] == [1]


def test_a_group_in_the_environment_holds_for_a_single_run(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "embedded")
    assert train(*SMALL, "tracking=wandb", "peer=kmeans", "hydra.run.dir=run").status == 0
    assert tracked(tmp_path / "run")[0].run_group == "embedded"


def agents_command(values: dict[str, Any]) -> list[str]:
    """Return the command that W&B's agent makes of the sweep's file and some values."""
    sweep = yaml.safe_load((Path(__file__).parents[1] / "docs" / "wandb_sweep.yaml").read_text())
    arguments = agent.create_sweep_command_args({"args": {key: {"value": values[key]} for key in values}})
    command: list[str] = []
    for word in sweep["command"]:
        command += arguments.get(word[2:-1], [word]) if word.startswith("${") else [word]
    assert set(values) == set(sweep["parameters"])
    return command


def test_the_agents_command_line_composes_and_sends_what_it_finds() -> None:
    program, *overrides = agents_command({"prior.nu": 57.0, "prior.alpha": 0.25, "seed": 2})
    assert program == "deepdpm-train"
    cfg = config.compose(overrides)
    config.check(cfg, overrides)
    assert (cfg.prior.nu, cfg.prior.alpha, cfg.seed) == (57.0, 0.25, 2)
    assert OmegaConf.select(cfg, "tracking.mode") == "online", "the agent waits for the numbers"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # W&B leaves the agent's file open
def test_a_run_under_an_agent_belongs_to_its_sweep(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"prior.nu": 57.0, "prior.alpha": 0.25, "seed": 2}
    chosen = tmp_path / "chosen.yaml"
    chosen.write_text(yaml.safe_dump({"wandb_version": 1, **{k: {"value": v} for k, v in values.items()}}))
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc123")
    monkeypatch.setenv("WANDB_RUN_ID", "run456")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(chosen))
    offline = ("tracking.mode=offline", "hydra.run.dir=run")
    assert train(*agents_command(values)[1:], *SMALL, *offline).status == 0
    run, exits, _ = tracked(tmp_path / "run")
    assert (run.sweep_id, run.run_id, exits) == ("abc123", "run456", [0])
