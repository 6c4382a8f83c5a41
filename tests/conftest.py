"""What all tests share: where the published data are, and `deepdpm-train` in this process."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_weights_each_time() -> None:
    """Nets are drawn from torch's own generator, and one in fifteen had a dead layer."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the published codes; tests of them are skipped where it is absent."""
    root = Path(os.environ.get("DEEPDPM_DATA") or Path(__file__).parents[2] / "shared" / "data").resolve()
    if not (root / "embeddings").is_dir():
        pytest.skip("the published codes are not on this machine (set DEEPDPM_DATA to their folder)")
    return root


@dataclass
class Ended:
    """How a command ended: its exit status, and what it said."""

    status: int
    out: str
    err: str


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """Run `deepdpm-train` with some arguments from an empty folder, in this process."""
    from deepdpm.train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPDPM_DATA", str(tmp_path / "no_data"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["deepdpm-train", *arguments])
        os.environ.pop("HYDRA_FULL_ERROR", None)
        status = 0
        # The command shows warnings as lines; a test that wants one as an error says so.
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            try:
                main()
            except SystemExit as end:
                status = int(end.code or 0)
        said = capsys.readouterr()
        return Ended(status, said.out, said.err)

    yield call
    os.environ.pop("HYDRA_FULL_ERROR", None)
