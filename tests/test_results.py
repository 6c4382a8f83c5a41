"""What a run leaves behind is whole or not there, and says where it came from."""

import errno
import json
import os
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from deepdpm import results


def test_json_keeps_what_it_can_say_and_nulls_what_it_cannot(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    results.write_json(
        path,
        {"a": np.float32(0.5), "b": float("inf"), "c": [np.int64(3), None], "d": {"e": Path("x"), "f": True}},
    )
    assert json.loads(path.read_text()) == {"a": 0.5, "b": None, "c": [3, None], "d": {"e": "x", "f": True}}
    assert results.read_json(path) == json.loads(path.read_text())


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_missing_or_damaged_json_is_none(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    assert results.read_json(path) is None


def test_a_failure_while_writing_leaves_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    results.write_text(path, "old")

    def write_half(file: IO[bytes]) -> None:
        file.write(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        ValueError, match=r"a\.txt could not be written \(No space left on device\): make room"
    ):
        results.write_atomically(path, write_half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not be written"):
        results.write_text(tmp_path / "file" / "a.txt", "text")


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    results.write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_arrays_come_back(tmp_path: Path) -> None:
    results.write_arrays(tmp_path / "a.npz", labels=np.arange(3), confidence=np.ones(3, np.float32))
    with np.load(tmp_path / "a.npz") as found:
        assert sorted(found.files) == ["confidence", "labels"]
        assert found["labels"].tolist() == [0, 1, 2]


def test_peak_memory_sees_what_was_taken_since_the_reset() -> None:
    results.reset_peak_memory()
    before = results.peak_memory_mb()
    assert before is not None
    taken = np.ones(20_000_000)  # 160 MB, so 152 of 1024^2 bytes
    after = results.peak_memory_mb()
    assert after is not None
    assert after - before > 100
    del taken


def test_versions_name_what_a_result_depends_on() -> None:
    assert {"python", "torch", "pytorch-lightning", "numpy"} <= set(results.versions())
