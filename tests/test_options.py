"""The table of the authors' options is whole, and names settings that exist."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from deepdpm import config

ROOT = Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| `(--[\w-]+)` \| (?:`([\w.]+)`|-) \|", (ROOT / "docs" / "options.md").read_text(), re.M
)
# Arguments of Lightning's trainer that only exist once they are given.
ADDED = ("trainer.lightning.limit_train_batches",)


def test_every_option_of_the_authors_has_a_place() -> None:
    flags = ROOT.parent / "shared" / "flags.md"
    if not flags.is_file():
        pytest.skip("the list of the authors' options is not on this machine")
    wanted = set(re.findall(r"^\| (--[\w-]+) \|", flags.read_text(), re.M))
    assert wanted == {option for option, _ in ROWS}


def test_every_setting_of_the_table_exists() -> None:
    choices = ["tracking=wandb", "alternation=joint", "dataset=file"]
    cfg = config.compose([*choices, *(f"+{name}=1" for name in ADDED)])
    keys = {key for _, key in ROWS if key}
    assert keys
    assert not {key for key in keys if OmegaConf.select(cfg, key, default="missing") == "missing"}
