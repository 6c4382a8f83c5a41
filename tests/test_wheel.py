"""A wheel, built and unpacked elsewhere, carries its configuration and runs outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as an installation would lay it out."""
    pytest.importorskip("build", reason="the package `build` makes the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_carries_every_config_and_nothing_else(unpacked: Path) -> None:
    for name in ("conf", "experiments"):
        ours = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*.yaml")}
        assert ours == {
            path.relative_to(unpacked / "deepdpm" / name)
            for path in (unpacked / "deepdpm" / name).rglob("*.yaml")
        }
    assert (unpacked / "deepdpm" / "py.typed").is_file()
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"deepdpm"}


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_outside_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}

    def run(module: str, *arguments: str) -> str:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "embedded: " in run("deepdpm.train", "--help")
    small = ("trainer=debug", "seed=0,1", "hydra.sweep.dir=sweep")
    assert "NMI" in run("deepdpm.train", "-m", "+synthetic=glob(*grid)", *small)
    models = list(tmp_path.glob("sweep/*/model.ckpt"))
    assert len(models) == 2
    (tmp_path / "new.csv").write_text("a,b\n0,0\n5,5\n")
    run("deepdpm.predict", str(models[0]), "new.csv", "-o", "labels.csv")
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 3
