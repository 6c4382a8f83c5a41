"""Sweeps over groups: keys that only the swept choices have reach the jobs, everything else is untouched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from deepdpm.multirun import for_sweep


def test_a_key_that_only_the_swept_choices_have_reaches_every_job(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    swept = ("peer=kmeans,gmm", "peer.num_clusters=4", "dataset=synthetic,gaussians")
    ended = train("-m", *swept, "dataset.num_points=200", "hydra.sweep.dir=out")
    assert ended.status == 0, ended.err
    results = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/result.json")]
    found = {(result["name"], result["dataset"]) for result in results}
    assert found == {(peer, data) for peer in ("kmeans", "gmm") for data in ("synthetic", "gaussians")}
    assert {(result["num_components"], result["num_points"]) for result in results} == {(4, 200)}
    assert all("dataset.num_points=200" in result["overrides"] for result in results)


def test_a_wrong_key_of_a_sweep_over_groups_is_one_sentence(train: Callable[..., Any]) -> None:
    ended = train("-m", "peer=kmeans,gmm", "dataset=synthetic,gaussians", "dataset.points=200")
    assert ended.status == 1
    assert "dataset.points" in ended.err


@pytest.mark.parametrize(
    "value", ["true", "3", "'a, b'", "[1,2]", "{a:1}", "/a/b.csv", "a\\,b", "''", "null"]
)
def test_a_job_gets_the_value_that_was_meant(value: str) -> None:
    def meant(text: str) -> Any:
        return OverridesParser.create().parse_override(text).value()

    argument = f"dataset.path={value}"
    *_, changed = for_sweep(["-m", "dataset=file,synthetic", argument])
    override = OverridesParser.create().parse_override(changed)
    if override.is_sweep_override():
        (told,) = override.sweep_string_iterator()
        assert meant(f"dataset.path={told}") == meant(argument)
    else:
        assert changed == argument


@pytest.mark.parametrize(
    "arguments",
    [
        ["+embedded=usps", "dataset.imbalanced=true"],
        ["-m", "seed=0,1", "dataset.num_points=300"],
        ["-m", "prior.nu=20,40", "dataset.num_points=300"],
        ["-m", "dataset=digits,synthetic", "prior.nu=20", "seed=1", "~peer", "--cfg=job", "model.hidden=[5"],
    ],
)
def test_what_needs_no_change_is_not_changed(arguments: list[str]) -> None:
    assert for_sweep(arguments) == arguments
