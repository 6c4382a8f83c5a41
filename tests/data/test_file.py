"""The user's own files: every kind, with and without labels, and what is wrong said in one sentence."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from deepdpm.data.file import DataFile, has_header, read_points

X = np.arange(12.0).reshape(6, 2) ** 2
LABELS = np.array([0, 1, 2, 2, 1, -1])
NAMES = ["cat", "dog", "emu", "emu", "dog", ""]


def write(folder: Path, suffix: str, labels: Any = None) -> str:
    """Write X, and labels inside it where there are any (column or key `kind`)."""
    path = folder / f"points.{suffix}"
    table = pd.DataFrame(X, columns=["a", "b"])
    if labels is not None:
        table["kind"] = labels
    arrays = {"x": X} if labels is None else {"x": X, "kind": np.asarray(labels)}
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "npz":
        np.savez(path, **arrays)
    elif suffix == "pt":
        torch.save(
            torch.tensor(X) if labels is None else {k: torch.tensor(v) for k, v in arrays.items()}, path
        )
    else:
        np.save(path, X)
    return str(path)


@pytest.mark.parametrize("suffix", ["npy", "npz", "csv", "parquet", "pt"])
def test_each_kind_is_read_without_labels(tmp_path: Path, suffix: str) -> None:
    data = DataFile(path=write(tmp_path, suffix)).load()
    assert np.array_equal(data.train.x.numpy(), X)
    assert data.train.labels is None
    assert data.feature_names == (("a", "b") if suffix in ("csv", "parquet") else None)


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet", "pt"])
def test_labels_inside_the_file_are_no_feature(tmp_path: Path, suffix: str) -> None:
    data = DataFile(path=write(tmp_path, suffix, LABELS), labels="kind").load()
    assert np.array_equal(data.train.x.numpy(), X)
    assert data.train.labels.tolist() == LABELS.tolist()
    assert data.class_names is None


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_names_become_numbers_and_missing_ones_minus_one(tmp_path: Path, suffix: str) -> None:
    data = DataFile(path=write(tmp_path, suffix, NAMES), labels="kind").load()
    assert data.train.labels.tolist() == [0, 1, 2, 2, 1, -1]
    assert data.class_names == ("cat", "dog", "emu")


def test_missing_number_labels_are_minus_one(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    labels = pd.array([0, 1, None, 2], dtype="Int64")
    pd.DataFrame({"a": range(4), "b": [True, False] * 2, "kind": labels}).to_parquet(path)
    assert DataFile(path=str(path), labels="kind").load().train.labels.tolist() == [0, 1, -1, 2]


@pytest.mark.parametrize(
    "kind", ["npy", "npy names", "csv", "csv header", "csv names", "pt", "npz", "parquet"]
)
@pytest.mark.parametrize("suffix", ["npy", "csv", "npz"])
def test_labels_in_a_second_file(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"labels.{kind.split()[0]}"
    if kind == "npy":
        np.save(path, LABELS)
    elif kind == "npy names":
        np.save(path, np.array(NAMES))
    elif kind.startswith("csv"):
        values = ["cat", "dog", "emu", "emu", "dog", "emu"] if kind == "csv names" else LABELS
        pd.Series(values, name="kind").to_csv(path, index=False, header=kind == "csv header")
    elif kind == "pt":
        torch.save(torch.tensor(LABELS, dtype=torch.float64), path)
    elif kind == "npz":
        np.savez(path, any=LABELS)
    else:
        pd.DataFrame({"kind": LABELS}).to_parquet(path)
    data = DataFile(path=write(tmp_path, suffix), labels=str(path)).load()
    assert data.train.labels.tolist() == [0, 1, 2, 2, 1, 2 if kind == "csv names" else -1]
    assert data.class_names == (("cat", "dog", "emu") if "names" in kind else None)


def test_a_csv_without_header_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "iris.csv"
    path.write_text("5.1,3.5,cat\n4.9,3.0,dog\n4.7,3.2,cat\n")
    data = DataFile(path=str(path), labels="2").load()
    assert data.train.x.tolist() == pytest.approx(np.array([[5.1, 3.5], [4.9, 3.0], [4.7, 3.2]]))
    assert data.train.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("a,b,c", True), ("1,2,3", False), ("5.1,3.5,cat", False), ("0,1,2", True), ("0,1,2,kind", True),
        ("0,1", False), (",0,1,2", True), ("nan,1.5", False), ('"a b","c,d"', True),
    ],
)  # fmt: skip
def test_a_header_is_told_from_numbers(tmp_path: Path, line: str, named: bool) -> None:
    path = tmp_path / "t.csv"
    path.write_text(line + "\n")
    assert has_header(path) == named


@pytest.mark.parametrize("header", [True, False])
def test_the_setting_decides_about_the_header(tmp_path: Path, header: bool) -> None:
    path = tmp_path / "t.csv"
    path.write_text("0,1\n2,3\n4,5\n")
    assert len(DataFile(path=str(path), header=header).load().train) == (2 if header else 3)


def test_row_numbers_written_by_pandas_are_no_feature(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    pd.DataFrame(X, columns=["a", "b"]).to_csv(path)
    with pytest.warns(UserWarning, match="counts the rows"):
        data = DataFile(path=str(path)).load()
    assert data.feature_names == ("a", "b")
    assert np.array_equal(data.train.x.numpy(), X)


def test_images_are_flattened_and_keep_their_shape(tmp_path: Path) -> None:
    for shape, image_shape in (((3, 4, 5), (1, 4, 5)), ((3, 2, 4, 5), (2, 4, 5))):
        np.save(tmp_path / "images.npy", np.zeros(shape))
        data = DataFile(path=str(tmp_path / "images.npy")).load()
        assert data.image_shape == image_shape
        assert data.train.x.shape == (3, np.prod(shape[1:]))


def test_a_key_picks_one_of_several_arrays(tmp_path: Path) -> None:
    path = str(tmp_path / "many.npz")
    np.savez(path, x=X, y=X + 1, kind=LABELS)
    assert np.array_equal(DataFile(path=path, key="y", labels="kind").load().train.x.numpy(), X + 1)
    with pytest.raises(ValueError, match=r"arrays x, y: say with dataset\.key"):
        DataFile(path=path, labels="kind").load()
    with pytest.raises(ValueError, match=r"dataset\.key=z is not in .*x, y, kind"):
        DataFile(path=path, key="z").load()


def test_test_points_share_columns_and_class_numbers(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("a,b,kind\n1,2,dog\n3,4,emu\n")
    test.write_text("kind,b,a\ncat,20,10\n")
    data = DataFile(path=str(train), labels="kind", test_path=str(test)).load()
    assert data.test is not None
    assert data.test.x.tolist() == [[10, 20]]
    assert data.class_names == ("cat", "dog", "emu")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([1, 2], [0])
    test.write_text("a,c\n1,2\n")
    with pytest.raises(ValueError, match=r"dataset\.test_path=.*other columns.*b, c"):
        DataFile(path=str(train), labels="kind", test_path=str(test)).load()
    test.write_text("a,b\n1,2\n")
    assert DataFile(path=str(train), labels="kind", test_path=str(test)).load().test.labels is None


def test_test_labels_may_lie_in_their_own_file(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", LABELS)
    np.save(tmp_path / "test.npy", LABELS[::-1])
    path = write(tmp_path, "npy")
    source = DataFile(
        path=path, labels=str(tmp_path / "train.npy"), test_path=path, test_labels=str(tmp_path / "test.npy")
    )
    assert source.load().test.labels.tolist() == LABELS[::-1].tolist()


def test_one_point_can_be_assigned_but_not_clustered(tmp_path: Path) -> None:
    path = str(tmp_path / "one.npy")
    np.save(path, X[:1])
    assert len(read_points(path)) == 1
    with pytest.raises(ValueError, match="only one point"):
        DataFile(path=path).load()


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt"])
def test_pickled_objects_never_run(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"points.{suffix}"
    bad = np.array([Malicious(tmp_path / "trace")], dtype=object)
    if suffix == "pt":
        torch.save(bad, path)
    else:
        (np.save if suffix == "npy" else np.savez)(path, bad)
    with pytest.raises(ValueError, match="pickled object"):
        DataFile(path=str(path)).load()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", ["npy", "npz", "csv", "parquet", "pt"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00hello", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"points.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"points\.\w+") as caught:
        DataFile(path=str(path)).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "empty set"),
        ("a,b\n1,2\n3,Paris\n", r"'Paris' in column b \(row 1, counted from 0\)"),
        ("a,b\n1,2\n3,\n4,inf\n", r"2 rows \(1, 2;"),
        ("1,2\n3,4,5\n", "cannot be read"),
        ("1;2\n3;4\n", "where numbers belong"),
    ],
)
def test_unusable_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        DataFile(path=str(path)).load()


def test_columns_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    for column in (pd.to_datetime(["2020-01-01", "2020-01-02"]), [[1.0], [2.0]], [1j, 2j]):
        path = tmp_path / "t.parquet"
        try:
            pd.DataFrame({"a": [1, 2], "b": column}).to_parquet(path)
        except Exception:  # Parquet has no complex numbers
            continue
        with pytest.raises(ValueError, match=r"in column b .* where numbers belong"):
            DataFile(path=str(path)).load()


def test_settings_that_cannot_work_are_named(tmp_path: Path) -> None:
    npy, csv = write(tmp_path, "npy"), write(tmp_path, "csv")
    np.save(tmp_path / "short.npy", LABELS[:4])
    (tmp_path / "points.txt").write_text("1 2")
    pd.DataFrame(X).to_csv(tmp_path / "wide.csv", index=False)
    cases = [
        (DataFile(), r"dataset\.path is not set"),
        (DataFile(path="none.npy"), r"dataset\.path=none\.npy is not a file"),
        (DataFile(path=str(tmp_path / "points.txt")), "no known kind"),
        (DataFile(path=npy, labels="kind"), r"dataset\.labels=kind is neither"),
        (DataFile(path=csv, labels="kind"), r"dataset\.labels=kind is neither.*one of a, b"),
        (DataFile(path=csv, labels=str(tmp_path / "wide.csv")), "2 columns"),
        (DataFile(path=npy, labels=str(tmp_path / "short.npy")), "4 labels for 6 points"),
        (DataFile(path=npy, key="x"), r"dataset\.key=x has no effect"),
        (DataFile(path=npy, header=True), r"dataset\.header=True has no effect"),
        (DataFile(path=npy, test_labels="x"), r"dataset\.test_labels is set without"),
        (DataFile(path=npy, test_path="none.npy"), r"dataset\.test_path=none\.npy is not a file"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            source.load()
