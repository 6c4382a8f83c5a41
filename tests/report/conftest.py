"""Small made folders of runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run folder below ``tmp_path / "runs"``."""

    def make(where: str, trace: list[int] | None = None, **fields: Any) -> Path:
        folder = tmp_path / "runs" / where
        folder.mkdir(parents=True)
        result = {
            "status": "finished",
            "error": None,
            "dataset": "usps_n2d",
            "name": None,
            "seed": 0,
            "num_clusters": 10,
            "nmi": 0.9,
            "ari": 0.9,
            "acc": 0.9,
            "seconds": 12.0,
            "overrides": [],
        }
        (folder / "result.json").write_text(json.dumps(result | fields), encoding="utf-8")
        if trace is not None:
            lines = ["epoch,num_clusters,cluster_loss"] + [
                f"{epoch},{count},0.1" for epoch, count in enumerate(trace)
            ]
            (folder / "trace.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return make
