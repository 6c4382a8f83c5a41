"""`deepdpm-predict` on files of each kind gives what the model itself says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deepdpm import DeepDPM
from deepdpm.predict import main

POINTS = np.random.default_rng(0).normal(size=(70_000, 3)).astype(np.float32)


def test_a_file_of_several_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = DeepDPM(max_epochs=1).fit(POINTS[:300])
    model.save(tmp_path / "model.pt")
    np.save(tmp_path / "points.npy", POINTS)
    pd.DataFrame(POINTS, columns=["a", "b", "c"]).to_parquet(tmp_path / "points.parquet")
    for points, out in (("points.npy", "a.parquet"), ("points.parquet", "b.parquet")):
        main([str(tmp_path / "model.pt"), str(tmp_path / points), "-o", str(tmp_path / out)])
        assert "70000 points assigned" in capsys.readouterr().out
        found = pd.read_parquet(tmp_path / out)
        np.testing.assert_array_equal(found["label"], model.predict(POINTS))
    np.save(tmp_path / "two.npy", POINTS[:, :2])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model.pt"), str(tmp_path / "two.npy"), "-o", str(tmp_path / "c.csv")])
    assert "The points have 2 columns, but the model was trained on 3" in capsys.readouterr().err
    assert not (tmp_path / "c.csv").exists()
