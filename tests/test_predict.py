"""The command `deepdpm-predict`: the training's own labels again, in every format, and clear sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from deepdpm.predict import load_model, main, predict


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on 2-D points, which lie in it as points.npy."""
    from deepdpm import config, train

    folder = tmp_path_factory.mktemp("run")
    centres = np.array([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]])
    points = centres[np.arange(300) % 3] + np.random.default_rng(0).normal(size=(300, 2))
    np.save(folder / "points.npy", points.astype(np.float32))
    path = f"dataset.path={folder / 'points.npy'}"
    cfg = config.compose(["trainer=debug", "dataset=file", path, "model.init_k=3"])
    assert train.run(cfg, folder)["status"] == "finished"
    return folder


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and probabilities (N, K) of any format."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return file["labels"], file["probabilities"]
    if path.suffix == ".npy":
        records_N = np.load(path)
        return records_N["label"], records_N["probabilities"]
    table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    return table["label"].to_numpy(), table.filter(like="p_").to_numpy()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv", ".parquet"])
def test_the_points_of_the_training_get_their_labels_again(
    suffix: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"labels{suffix}"
    main([str(fitted / "model.ckpt"), str(fitted / "points.npy"), "-o", str(out)])
    assert "300 points" in capsys.readouterr().out
    labels_N, r_NK = _read(out)
    with np.load(fitted / "assignments.npz") as file:
        trained = dict(file)
    np.testing.assert_array_equal(labels_N, trained["labels"])
    np.testing.assert_allclose(r_NK.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(r_NK.max(1), trained["confidence"], atol=1e-5)
    assert r_NK.shape[1] == len(trained["cluster_ids"])


def test_parts_of_the_points_give_what_the_whole_gives(fitted: Path) -> None:
    module = load_model(fitted / "model.ckpt")
    x_ND = torch.from_numpy(np.load(fitted / "points.npy"))
    seen: list[int] = []
    (whole,) = predict(module, [x_ND], seen.append)
    parts = list(predict(module, x_ND.split(70), seen.append))
    assert [len(labels) for labels, _ in parts] == [70, 70, 70, 70, 20]
    assert seen == [300, 70, 70, 70, 70, 20]
    np.testing.assert_array_equal(np.concatenate([labels for labels, _ in parts]), whole[0])


def test_one_point_and_a_label_column(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("a,b,kind\n30,0,x\n")
    arguments = [str(fitted / "model.ckpt"), str(tmp_path / "one.csv"), "-o", str(tmp_path / "out.csv")]
    main([*arguments, "--labels", "kind", "--header"])
    assert len(pd.read_csv(tmp_path / "out.csv")) == 1


def _ckpt(content: bytes) -> Callable[[Path, Path], list[str]]:
    def make(fitted: Path, folder: Path) -> list[str]:
        (folder / "bad.ckpt").write_bytes(content)
        return [str(folder / "bad.ckpt"), str(fitted / "points.npy"), "-o", str(folder / "out.csv")]

    return make


def _truncated(fitted: Path, folder: Path) -> list[str]:
    (folder / "half.ckpt").write_bytes((fitted / "model.ckpt").read_bytes()[:3000])
    return [str(folder / "half.ckpt"), str(fitted / "points.npy"), "-o", str(folder / "out.csv")]


def _other_dimensions(fitted: Path, folder: Path) -> list[str]:
    np.save(folder / "wide.npy", np.zeros((4, 5)))
    return [str(fitted / "model.ckpt"), str(folder / "wide.npy"), "-o", str(folder / "out.csv")]


def _with_nan(fitted: Path, folder: Path) -> list[str]:
    np.save(folder / "nan.npy", np.array([[0.0, np.nan], [0.0, 0.0]]))
    return [str(fitted / "model.ckpt"), str(folder / "nan.npy"), "-o", str(folder / "out.csv")]


def _pickled(fitted: Path, folder: Path) -> list[str]:
    torch.save({"state_dict": {}, "evil": Path("x")}, folder / "evil.ckpt")
    return [str(folder / "evil.ckpt"), str(fitted / "points.npy"), "-o", str(folder / "out.csv")]


def _missing_data(fitted: Path, folder: Path) -> list[str]:
    return [str(fitted / "model.ckpt"), str(folder / "none.npy"), "-o", str(folder / "out.csv")]


def _missing_model(fitted: Path, folder: Path) -> list[str]:
    return [str(folder / "none.ckpt"), str(fitted / "points.npy"), "-o", str(folder / "out.csv")]


def _unknown_format(fitted: Path, folder: Path) -> list[str]:
    return [str(fitted / "model.ckpt"), str(fitted / "points.npy"), "-o", str(folder / "out.xls")]


def _unwritable(fitted: Path, folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [str(fitted / "model.ckpt"), str(fitted / "points.npy"), "-o", str(folder / "file" / "out.csv")]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (_ckpt(b""), ["damaged"]),
        (_ckpt(b"PK\x03\x04 no zip"), ["damaged"]),
        (_truncated, ["damaged"]),
        (_pickled, ["no checkpoint of DeepDPM"]),
        (_other_dimensions, ["5 columns", "trained on 2"]),
        (_with_nan, ["NaN", "1 row (0"]),
        (_missing_data, ["none.npy"]),
        (_missing_model, ["none.ckpt"]),
        (_unknown_format, ["out.xls", ".parquet"]),
        (_unwritable, ["could not be written"]),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_leaves_nothing(
    make: Callable[[Path, Path], list[str]],
    parts: list[str],
    fitted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = make(fitted, tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.startswith("deepdpm-predict: ")
    assert said.count("\n") == 1
    assert all(part in said for part in parts), said
    assert set(tmp_path.iterdir()) == before


def test_prediction_needs_no_training_data(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepdpm.data.file import DataFile

    def refuse(self: Any) -> None:
        raise AssertionError("the training data were asked for")

    monkeypatch.setattr(DataFile, "load", refuse)
    np.save(tmp_path / "new.npy", np.zeros((2, 2)))
    main([str(fitted / "model.ckpt"), str(tmp_path / "new.npy"), "-o", str(tmp_path / "out.npz")])
    assert _read(tmp_path / "out.npz")[0].shape == (2,)
