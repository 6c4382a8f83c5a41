"""The YAML files of `conf/dataset` name every setting of their class, with its default."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf/dataset"
NAMES = (
    "digits", "synthetic", "gaussians", "mnist_n2d", "fashion_n2d", "usps_n2d", "embeddings", "file",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_every_setting(name: str) -> None:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    source = get_class(config._target_)
    assert set(config) - {"_target_"} == {field.name for field in fields(source)}
    assert config.name == name
    apart = {"name", "collection"} if name.endswith("_n2d") else set()
    defaults = asdict(source())
    for key, value in asdict(instantiate(config)).items():
        assert value == defaults[key] or key in apart, key


def test_a_setting_of_a_config_reaches_the_data() -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / "gaussians.yaml"), {"num_points": 30, "num_dims": 4})
    assert instantiate(config).load().train.x.shape == (30, 4)
