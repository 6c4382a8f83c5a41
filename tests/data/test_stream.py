"""Files in chunks hold the same points as files read whole."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from deepdpm.data.file import read_points
from deepdpm.data.stream import stream_points

POINTS = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)
TABLE = pd.DataFrame(POINTS, columns=["a", "b", "c"]).assign(kind=["x", "y"] * 12 + ["x"])


def written(folder: Path, ending: str) -> Path:
    path = folder / f"points{ending}"
    if ending == ".npy":
        np.save(path, POINTS)
    elif ending == ".npz":
        np.savez(path, points=POINTS)
    elif ending == ".csv":
        TABLE.to_csv(path, index=False)
    else:
        TABLE.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", [".npy", ".npz", ".csv", ".parquet"])
def test_chunks_together_are_the_file(ending: str, tmp_path: Path) -> None:
    path, labels = str(written(tmp_path, ending)), "kind" if ending in (".csv", ".parquet") else ""
    stream = stream_points(path, labels, rows=10)
    chunks = list(stream.chunks)
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    assert stream.num_points == (None if ending == ".csv" else 25)
    torch.testing.assert_close(torch.cat(chunks), read_points(path, labels).x)


def test_a_file_without_header_and_one_with_row_numbers(tmp_path: Path) -> None:
    TABLE[["a", "b"]].to_csv(tmp_path / "bare.csv", index=False, header=False)
    TABLE[["a", "b"]].to_csv(tmp_path / "counted.csv")
    for name in ("bare.csv", "counted.csv"):
        chunks = list(stream_points(str(tmp_path / name), rows=10).chunks)
        torch.testing.assert_close(torch.cat(chunks), torch.from_numpy(POINTS[:, :2]))


def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns that are not numbers \(kind\)"):
        list(stream_points(str(written(tmp_path, ".csv"))).chunks)
    with pytest.raises(ValueError, match="has no column 'class'"):
        list(stream_points(str(written(tmp_path, ".parquet")), "class").chunks)
    with pytest.raises(ValueError, match="is not a file"):
        stream_points(str(tmp_path / "absent.npy"))
    (tmp_path / "b.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="damaged or not a Parquet"):
        stream_points(str(tmp_path / "b.parquet"))
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(ValueError, match="empty set"):
        list(stream_points(str(tmp_path / "e.csv")).chunks)
    holes = POINTS.copy()
    holes[17] = np.nan
    np.save(tmp_path / "h.npy", holes)
    with pytest.raises(ValueError, match="rows from 10 on"):
        list(stream_points(str(tmp_path / "h.npy"), rows=10).chunks)
