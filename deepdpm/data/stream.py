"""Points of a file larger than memory, some rows at a time: .npy, .parquet and .csv.

Legend: N points, D dimensions, B rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deepdpm.data.file import has_header, read_points
from deepdpm.data.samples import make_samples

STREAMED = (".npy", ".parquet", ".csv")


@dataclass(frozen=True)
class PointStream:
    """Points of a file in chunks (B, D), and N where the file tells it without being read (None for .csv)."""

    chunks: Iterator[Tensor]
    num_points: int | None


def stream_points(
    path: str, labels: str = "", key: str = "", header: bool | None = None, rows: int = 65_536
) -> PointStream:
    """Open a file of points; the kinds that cannot be streamed (.npz, .pt) are read whole.

    Arguments as `deepdpm.data.file.read_points`.

    Raises:
        ValueError: the file is missing or cannot be read; while it is read also for rows that are no points.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in STREAMED or not file.is_file() or key or (labels and file.suffix == ".npy"):
        points = read_points(path, labels, key, header).x
        return PointStream(iter(points.split(rows)), len(points))
    if file.suffix.lower() == ".csv":
        return PointStream(_csv(file, labels, header, rows), None)
    if header is not None:
        raise ValueError(f"header={header} has no effect on {path}: it is for .csv files, leave it out.")
    return _parquet(file, labels, rows) if file.suffix.lower() == ".parquet" else _npy(file, rows)


def _npy(file: Path, rows: int) -> PointStream:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        # Pickled or damaged: the reader of whole files has the sentence for each.
        array = read_points(str(file)).x.numpy()
    count = len(array) if array.ndim else 0
    if count == 0:
        return PointStream(iter([read_points(str(file)).x]), 0)
    return PointStream(
        (_checked(array[start : start + rows], file, start) for start in range(0, count, rows)), count
    )


def _parquet(file: Path, labels: str, rows: int) -> PointStream:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged or not a Parquet file: {str(error).splitlines()[0]}") from None

    def chunks() -> Iterator[Tensor]:
        start = 0
        with content:
            for batch in content.iter_batches(rows):
                yield _checked(_values(batch.to_pandas(), labels, file), file, start)
                start += len(batch)

    return PointStream(chunks(), content.metadata.num_rows)


def _csv(file: Path, labels: str, header: bool | None, rows: int) -> Iterator[Tensor]:
    import pandas as pd

    named = has_header(file) if header is None else header
    start = 0
    try:
        with pd.read_csv(file, header=0 if named else None, chunksize=rows) as reader:
            for table in reader:
                table.columns = table.columns.map(str)
                first = table.columns[0]
                if named and first.startswith("Unnamed: ") and np.array_equal(table[first], table.index):
                    table = table.drop(columns=first)
                yield _checked(_values(table, labels, file), file, start)
                start += len(table)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{file} is an empty set: give one line for each point.") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} cannot be read as comma-separated UTF-8 text: {str(error).strip()}."
        ) from None


def _values(table: Any, labels: str, file: Path) -> np.ndarray:
    import pandas as pd

    table.columns = table.columns.map(str)
    if labels:
        if labels not in table.columns:
            raise ValueError(f"{file} has no column {labels!r}: it has {', '.join(table.columns[:10])}.")
        table = table.drop(columns=labels)
    text = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    if text:
        raise ValueError(
            f"{file} has columns that are not numbers ({', '.join(text[:5])}): leave them out, or name the "
            "labels with --labels."
        )
    return np.asarray(table.to_numpy(dtype=np.float32, na_value=np.nan))


def _checked(points: np.ndarray, file: Path, start: int) -> Tensor:
    rows = f"{file} (rows from {start} on)" if start else str(file)
    return make_samples(np.array(points), what=rows, minimum=1).x
