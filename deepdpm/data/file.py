"""The user's own files: .npy, .npz, .csv, .parquet and .pt.

Legend: N points, D dimensions.
"""

import csv
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from deepdpm.data.files import DataMissingError
from deepdpm.data.samples import NO_LABEL, Dataset, Samples, make_samples
from deepdpm.data.torch_file import load_torch

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DataFile:
    """Points from a file of the user's own.

    Attributes:
        name: how results call the set.
        path: .npy, .npz, .csv, .parquet or .pt; one row for each point.
        labels: where the true labels are, if there are any: a column (.csv, .parquet; columns of a file
            without header are called 0, 1, ...), a key (.npz, .pt with a dictionary), or a second file of
            labels alone.
        key: which array of a .npz or of a dictionary holds the points, where there is more than one.
        header: whether a .csv begins with a line of names; None finds out (see `has_header`).
        test_path: a file of the same kind with points that are only assigned.
        test_labels: as `labels`, for `test_path`; empty means the same column or key, where it is there.
    """

    name: str = "file"
    path: str = ""
    labels: str = ""
    key: str = ""
    header: bool | None = None
    test_path: str = ""
    test_labels: str = ""

    def load(self) -> Dataset:
        """Read the files; raises ValueError with one clear sentence where that fails."""
        if not self.path:
            raise ValueError("dataset.path is not set: give a .npy, .npz, .csv, .parquet or .pt file.")
        if self.test_labels and not self.test_path:
            raise ValueError(
                "dataset.test_labels is set without dataset.test_path: give the file with the test points."
            )
        train = _read(self.path, self.labels, self.key, self.header)
        test = None
        if self.test_path:
            wanted = self.test_labels or self.labels
            test = _read(self.test_path, wanted, self.key, self.header, "dataset.test_", not self.test_labels)
            test = _in_order_of(train.columns, test)
        numbered, class_names = _number(train.labels, None if test is None else test.labels)
        samples = make_samples(train.points, numbered[0], train.what)
        shape = np.shape(train.points)
        return Dataset(
            self.name,
            samples,
            None if test is None else make_samples(test.points, numbered[1], test.what, minimum=1),
            feature_names=train.columns,
            class_names=class_names,
            image_shape=(1,) * (4 - len(shape)) + tuple(shape[1:]) if len(shape) in (3, 4) else None,
        )


def read_points(path: str, labels: str = "", key: str = "", header: bool | None = None) -> Samples:
    """Read points to assign from one file: as `DataFile`, but one point is enough.

    Raises:
        ValueError: the file is missing, cannot be read, or does not hold points.
    """
    raw = _read(path, labels, key, header, prefix="")
    return make_samples(raw.points, _number(raw.labels)[0][0], raw.what, minimum=1)


@dataclass(frozen=True)
class _Raw:
    """What a file held: points and labels unchecked, columns of a table, and what messages call the file."""

    points: Any
    labels: Any
    columns: tuple[str, ...] | None
    what: str


def _read(
    path: str, labels: str, key: str, header: bool | None, prefix: str = "dataset.", optional: bool = False
) -> _Raw:
    """Read points and labels; `optional` labels are those that the file has inside, or none."""
    what = f"{prefix}path={path}"
    content = _open(path, what, header)
    inside = bool(labels) and _has(content, labels)
    columns = None
    if key and not isinstance(content, dict):
        raise ValueError(f"dataset.key={key} has no effect on {path}, which holds one table: leave it out.")
    if isinstance(content, dict):
        points = _pick(content, key, labels if inside else "", what)
    elif _is_table(content):
        table = content.drop(columns=labels) if inside else content
        points, columns = _table_values(table, what), tuple(map(str, table.columns))
    else:
        points = content
    if inside:
        return _Raw(points, content[labels], columns, what)
    if not labels or optional:
        return _Raw(points, None, columns, what)
    return _Raw(points, _label_file(labels, f"{prefix}labels={labels}", content, points), columns, what)


def _open(path: str, what: str, header: bool | None) -> Any:
    """A DataFrame for tables, a dictionary for archives, else one array or tensor."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataMissingError(f"{what} is not a file: give a .npy, .npz, .csv, .parquet or .pt file.")
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _read_numpy,
        ".npz": _read_numpy,
        ".csv": lambda csv_file: _read_csv(csv_file, header),
        ".parquet": _read_parquet,
        ".pt": load_torch,
    }
    if file.suffix.lower() not in readers:
        raise ValueError(f"{what} is of no known kind: give one of {', '.join(readers)}.")
    if header is not None and file.suffix.lower() != ".csv":
        raise ValueError(
            f"dataset.header={header} has no effect on {path}: it is for .csv files, leave it out."
        )
    content = readers[file.suffix.lower()](file)
    if not (isinstance(content, Tensor | np.ndarray | dict | list) or _is_table(content)):
        raise ValueError(f"{what} holds a {type(content).__name__}: give a tensor, an array or a dictionary.")
    return content


def _read_numpy(file: Path) -> Any:
    try:
        # Opened here: of a damaged file numpy would leave its own handle open.
        with file.open("rb") as opened:
            content = np.load(opened, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content
            return {name: content[name] for name in content.files}
    except ValueError as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise ValueError(
                f"{file} holds pickled objects, which could run any code and were not loaded: save numbers."
            ) from None
        raise ValueError(f"{file} is damaged or not a NumPy file: write it again with numpy.save.") from None
    except (OSError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{file} is damaged or not a NumPy file: write it again with numpy.save.") from None


def _read_csv(file: Path, header: bool | None) -> "pd.DataFrame":
    import pandas as pd

    named = has_header(file) if header is None else header
    try:
        table = pd.read_csv(file, header=0 if named else None, low_memory=False)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{file} is an empty set: give one line for each point.") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as comma-separated UTF-8 text: {str(error).strip()}."
        ) from None
    table.columns = table.columns.map(str)
    first = table.columns[0]
    if named and first.startswith("Unnamed: ") and np.array_equal(table[first], np.arange(len(table))):
        warnings.warn(
            f"The first column of {file} has no name and counts the rows: it is left out; give it a name to "
            "keep it.",
            stacklevel=2,
        )
        table = table.drop(columns=first)
    return table


def _read_parquet(file: Path) -> "pd.DataFrame":
    import pandas as pd
    import pyarrow

    try:
        table = pd.read_parquet(file, engine="pyarrow")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or not a Parquet file: {str(error).splitlines()[0]}") from None
    table.columns = table.columns.map(str)
    return table


def has_header(file: Path) -> bool:
    """Whether the first line of a .csv names the columns.

    It does if none of its cells is a number, or if those that are number three or more columns by their
    position (as tables without names are often written). `dataset.header` overrides this.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            cells = [cell.strip() for cell in next(csv.reader(lines), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as comma-separated UTF-8 text: {error}.") from None
    numbers = [(place, cell) for place, cell in enumerate(cells) if _is_number(cell)]
    positions = [str(place) for place, _ in numbers]
    shifted = [str(place - 1) for place, _ in numbers]  # after a first, nameless column of row numbers
    names = [cell for _, cell in numbers]
    return not numbers or (len(numbers) >= 3 and names in ([*positions], [*shifted]))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _has(content: Any, name: str) -> bool:
    return name in content.columns if _is_table(content) else isinstance(content, dict) and name in content


def _names(content: Any) -> str:
    names = list(map(str, content.columns if _is_table(content) else content))
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _pick(arrays: dict[Any, Any], key: str, labels: str, what: str) -> Any:
    """The array of points among those of an archive."""
    if key:
        if key not in arrays:
            raise ValueError(f"dataset.key={key} is not in {what}: it holds {_names(arrays)}.")
        return arrays[key]
    left = [name for name in arrays if name != labels]
    if len(left) != 1:
        raise ValueError(
            f"{what} holds the arrays {_names(left)}: say with dataset.key which one has the points."
        )
    return arrays[left[0]]


def _table_values(table: "pd.DataFrame", what: str) -> np.ndarray:
    """The columns as floats; missing cells become NaN, which the check of samples names by their rows."""
    import pandas as pd

    if table.empty:
        return np.empty(table.shape)
    for name in table.columns:
        column = table[name]
        if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_complex_dtype(column):
            readable = pd.to_numeric(column.astype("string"), errors="coerce").notna()
            row = int(np.argmax(column.notna() & ~readable))
            raise ValueError(
                f"{what} holds {column.iloc[row]!r} in column {name} (row {row}, counted from 0) where "
                "numbers belong: leave the column out, or name it as dataset.labels."
            )
    return table.to_numpy(dtype=np.float64, na_value=np.nan)


def _label_file(labels: str, what: str, content: Any, points: Any) -> Any:
    """Labels from a file that holds nothing else; a .csv may or may not begin with a name."""
    file = Path(labels).expanduser()
    if not file.is_file():
        named = isinstance(content, dict) or _is_table(content)
        choices = f"one of {_names(content)}, or a file" if named else "a file"
        raise ValueError(
            f"{what} is neither in the data file nor a file: give {choices} that has the labels."
        )
    is_csv = file.suffix.lower() == ".csv"
    found = _open(labels, what, header=False if is_csv else None)
    if isinstance(found, dict):
        return _pick(found, "", "", what)
    if not _is_table(found):
        return found
    if found.shape[1] != 1:
        raise ValueError(f"{what} has {found.shape[1]} columns: give a file with the labels alone.")
    column = found.iloc[:, 0]
    return column.iloc[1:] if is_csv and len(column) == len(points) + 1 else column


def _is_table(content: Any) -> bool:
    return hasattr(content, "columns")


def _in_order_of(columns: tuple[str, ...] | None, test: _Raw) -> _Raw:
    """The test table with the columns of the training table, in their order."""
    if columns is None or test.columns is None or columns == test.columns:
        return test
    if set(columns) != set(test.columns):
        other = sorted(set(columns) ^ set(test.columns))
        raise ValueError(
            f"{test.what} has other columns than dataset.path ({', '.join(other[:5])}): give the same."
        )
    order = [test.columns.index(name) for name in columns]
    return _Raw(test.points[:, order], test.labels, columns, test.what)


def _number(*found: Any) -> tuple[list[Any], tuple[str, ...] | None]:
    """Labels that are names become numbers, the same for all sets; missing ones become -1.

    Numbers written as text ("0", "1.0") stay numbers.
    """
    import pandas as pd

    columns = [
        None if labels is None or isinstance(labels, Tensor) else pd.Series(np.ravel(labels))
        for labels in found
    ]
    texts = [c for c in columns if c is not None and not pd.api.types.is_numeric_dtype(c)]
    if not texts:
        return [_plain(labels) for labels in found], None
    everything = pd.concat([c.astype("object").where(c.notna(), "") for c in columns if c is not None])
    words = everything.map(str).str.strip()
    values = pd.to_numeric(words.replace("", str(NO_LABEL)), errors="coerce")
    if values.notna().all():
        codes, names = values.to_numpy(), None
    else:
        codes, classes = pd.factorize(words.where(words != "", None), sort=True)
        names = tuple(map(str, classes))
    parts = iter(np.split(codes, np.cumsum([len(c) for c in columns if c is not None])[:-1]))
    return [None if c is None else next(parts) for c in columns], names


def _plain(labels: Any) -> Any:
    """A numeric pandas column, which may have its own mark for missing values, as an array."""
    if hasattr(labels, "to_numpy"):
        return labels.to_numpy(dtype=np.float64, na_value=np.nan)
    return labels
