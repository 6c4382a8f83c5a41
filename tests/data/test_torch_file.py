"""Files of torch.save: tensors and numbers are read, objects never run."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdpm.data.torch_file import load_torch


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: {"x": [o]}, lambda o: np.array([o], dtype=object)])
def test_a_pickled_object_never_runs(tmp_path: Path, wrap: object, zipped: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "codes.pt"
    torch.save(wrap(Malicious(trace)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pickled object"):
        load_torch(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap works where it is sprung
    assert trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_never_runs(tmp_path: Path, protocol: int) -> None:
    trace, path = tmp_path / "trace", tmp_path / "codes.pt"
    path.write_bytes(pickle.dumps(Malicious(trace), protocol))
    with pytest.raises(ValueError, match=r"codes\.pt"):
        load_torch(path)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [*"?bBhHiIlLqQefd", ">f4", ">i8"])
def test_pickled_arrays_of_numbers_are_read(tmp_path: Path, kind: str, zipped: bool) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    torch.save({"x": array}, tmp_path / "codes.pt", _use_new_zipfile_serialization=zipped)
    found = load_torch(tmp_path / "codes.pt")["x"]
    assert found.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(found, array)


@pytest.mark.parametrize("old", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_pickled_by_numpy_1_and_2_are_read(tmp_path: Path, old: bytes) -> None:
    """The old format is a plain pickle, so the name in it can be exchanged."""
    path = tmp_path / "codes.pt"
    torch.save(np.eye(2), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    written = next(name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray") if name in content)
    path.write_bytes(content.replace(written, old))
    assert np.array_equal(load_torch(path), np.eye(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read(tmp_path: Path, zipped: bool) -> None:
    tensor = torch.arange(6, dtype=torch.uint8).view(3, 2)
    torch.save(tensor, tmp_path / "codes.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_torch(tmp_path / "codes.pt"), tensor)


@pytest.mark.parametrize(
    "value", [np.array(["a"]), np.zeros(2, dtype=[("a", "f4")]), torch.nn.Linear(1, 1), np.datetime64(0, "s")]
)
def test_other_objects_are_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "codes.pt")
    with pytest.raises(ValueError, match="pickled object"):
        load_torch(tmp_path / "codes.pt")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "codes.pt"
    torch.save(torch.ones(100), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-30], b"\x80\x02junk"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"codes\.pt is damaged"):
            load_torch(path)
    with pytest.raises(ValueError, match="no file"):
        load_torch(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="no file"):
        load_torch(tmp_path)
