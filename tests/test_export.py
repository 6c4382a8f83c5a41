"""Exported assigners give the probabilities of the model, in other programs and by the card's formula."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from deepdpm import DeepDPM
from deepdpm.export import export, main
from deepdpm.transforms import TransformKind

POINTS = (make_blobs(300, n_features=4, centers=4, random_state=0)[0] * 3 + 50).astype(np.float32)
KINDS = get_args(TransformKind)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> DeepDPM:
    return DeepDPM(transform_kind=request.param, hidden=(20, 10), max_epochs=4).fit(POINTS)


def test_onnx_gives_the_probabilities_of_the_model(model: DeepDPM, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = export(model.module_, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (300, 1, 7):
        (found,) = session.run(None, {"points": POINTS[:count]})
        np.testing.assert_allclose(found, model.predict_proba(POINTS[:count]), atol=1e-5)


def test_safetensors_give_them_by_the_formula_of_the_card(model: DeepDPM, tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    path = export(model.module_, tmp_path / "a.safetensors")
    tensors = numpy_files.load_file(path)
    card = json.loads((tmp_path / "a.safetensors.json").read_text())
    assert {name: list(value.shape) for name, value in tensors.items()} == card["tensors"]
    assert card["cluster_ids"] == model.cluster_ids_.tolist()
    np.testing.assert_allclose(by_card(POINTS, tensors, card), model.predict_proba(POINTS), atol=1e-5)


def by_card(x: np.ndarray, tensors: dict[str, np.ndarray], card: dict[str, Any]) -> np.ndarray:
    y = x
    if card["transform"] not in ("none", "normalize"):
        y = ((x.astype(np.float64) - tensors["transform.shift_D"]) * tensors["transform.scale_D"]).astype(
            np.float32
        )
    if card["transform"] == "principal":
        y = y @ tensors["transform.axes_DE"]
    if "normalize" in card["transform"]:
        y = y / np.linalg.norm(y, axis=1, keepdims=True)
    *hidden, last = [(tensors[weight], tensors[bias]) for weight, bias in card["layers"]]
    for weight, bias in hidden:
        y = np.maximum(y @ weight.T + bias, 0)
    logits = y @ last[0].T + last[1]
    return torch.from_numpy(logits / card["temperature"]).softmax(1).numpy()


def test_the_command_exports_what_the_estimator_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    DeepDPM(max_epochs=1).fit(POINTS).save(tmp_path / "model.pt")
    main([str(tmp_path / "model.pt"), str(tmp_path / "a.safetensors")])
    assert "exported" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model.pt"), str(tmp_path / "a.txt")])
    assert "of no known kind" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent.ckpt"), str(tmp_path / "a.onnx")])
    assert "There is no checkpoint" in capsys.readouterr().err
