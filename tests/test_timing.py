"""Where the seconds of a run went: the phases are all there and add up, whatever the profiler."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepdpm.timing import PHASES

SMALL = ("dataset=synthetic", "dataset.num_points=600", "hydra.run.dir=run")


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "result.json").read_text())


def test_the_phases_add_up_to_the_seconds(train: Callable[..., Any], tmp_path: Path) -> None:
    assert train(*SMALL).status == 0
    result = result_of(tmp_path)
    phases = result["phases"]
    assert list(phases) == ["load", *PHASES]
    assert sum(phases[phase] for phase in PHASES) == pytest.approx(result["seconds"], abs=0.01)
    assert all(phases[phase] > 0 for phase in ("start", "training", "moves", "polishing", "prediction"))


def test_another_profiler_is_left_alone(train: Callable[..., Any], tmp_path: Path) -> None:
    assert train(*SMALL, "trainer.lightning.max_epochs=1", "+trainer.lightning.profiler=advanced").status == 0
    assert list(result_of(tmp_path)["phases"]) == ["load"]


def test_the_memory_of_the_fit_is_part_of_the_peak(train: Callable[..., Any], tmp_path: Path) -> None:
    assert train(*SMALL, "peer=kmeans").status == 0
    result = result_of(tmp_path)
    assert 0 <= result["fit_memory_mb"] < result["peak_memory_mb"]
    assert list(result["phases"]) == ["load"]
