"""The command `deepdpm-predict`: labels and probabilities of new points, without the training data.

Legend: N points, D dimensions, K clusters, B points at a time.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from deepdpm.results import write_atomically

if TYPE_CHECKING:
    from deepdpm.module import DeepDPMModule

Chunks = Iterator[tuple[np.ndarray, np.ndarray]]


def load_model(path: Path, device: str = "cpu") -> "DeepDPMModule":
    """Load a checkpoint (`model.ckpt`) for prediction; nothing in it is executed.

    Raises:
        ValueError: the file is missing, damaged, or no checkpoint of DeepDPM.
    """
    from deepdpm.joint import module_class

    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}: give the model.ckpt of a finished run.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
        module = module_class(saved).load_from_checkpoint(path, map_location=device, weights_only=True)
    except Exception as error:
        # A damaged file can fail anywhere in the readers of zip, pickle and torch.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged or no checkpoint of DeepDPM ({reason[:200]}): "
            "give the model.ckpt of a finished run."
        ) from error
    return module.eval()


def predict(module: "DeepDPMModule", batches: Iterable[Tensor], seen: Callable[[int], None]) -> Chunks:
    """Yield labels (B,) and probabilities (B, K) of points (B, D); `seen` is told how many came.

    Raises:
        ValueError: the points have another D than those the model was trained on.
    """
    for x_BD in batches:
        wanted, got = module.num_dims, int(np.prod(x_BD.shape[1:]))
        if wanted != got:
            raise ValueError(
                f"The points have {got} columns, but the model was trained on {wanted}: give the same."
            )
        with torch.inference_mode():
            r_BK = module.predict_proba(x_BD.to(module.device)).cpu()
        seen(len(x_BD))
        yield r_BK.argmax(1).numpy(), r_BK.numpy()


def _write_npz(file: IO[bytes], chunks: Chunks, cluster_ids_K: np.ndarray) -> None:
    labels, probabilities = zip(*chunks, strict=True)
    np.savez_compressed(
        file,
        labels=np.concatenate(labels),
        probabilities=np.concatenate(probabilities),
        cluster_ids=cluster_ids_K,
    )


def _write_npy(file: IO[bytes], chunks: Chunks, cluster_ids_K: np.ndarray) -> None:
    kind = np.dtype([("label", np.int64), ("probabilities", np.float32, (len(cluster_ids_K),))])
    np.save(file, np.concatenate([_records(kind, *chunk) for chunk in chunks]))


def _records(kind: np.dtype, labels_B: np.ndarray, r_BK: np.ndarray) -> np.ndarray:
    records_B = np.empty(len(labels_B), kind)
    records_B["label"], records_B["probabilities"] = labels_B, r_BK
    return records_B


def _write_csv(file: IO[bytes], chunks: Chunks, cluster_ids_K: np.ndarray) -> None:
    for number, chunk in enumerate(chunks):
        _table(*chunk, cluster_ids_K).to_csv(file, index=False, header=number == 0, float_format="%.6g")


def _write_parquet(file: IO[bytes], chunks: Chunks, cluster_ids_K: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for chunk in chunks:
        table = pa.Table.from_pandas(_table(*chunk, cluster_ids_K), preserve_index=False)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _table(labels_B: np.ndarray, r_BK: np.ndarray, cluster_ids_K: np.ndarray) -> Any:
    import pandas as pd

    probabilities = {f"p_{place}": r_BK[:, place] for place in range(len(cluster_ids_K))}
    return pd.DataFrame({"label": labels_B, "cluster_id": cluster_ids_K[labels_B], **probabilities})


_WRITERS: dict[str, Callable[[IO[bytes], Chunks, np.ndarray], None]] = {
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def predict_file(model: Path, data: str, out: Path, **reading: Any) -> tuple[int, float]:
    """Assign the points of a file and write labels and probabilities; return N and the seconds of that.

    The seconds count reading, assigning and writing, not start-up and loading the model.

    Of a .npy, .parquet or .csv only some rows are in memory at a time; so are those of a .csv or .parquet
    that is written, while .npz and .npy hold the results until the end.

    `.npz` has `labels` (N,), `probabilities` (N, K) and `cluster_ids` (K,); `.npy` a record `label`,
    `probabilities` for each point; `.csv` and `.parquet` the columns `label`, `cluster_id`, `p_0`, `p_1`, ...

    Raises:
        ValueError: a file cannot be read or written, or the points do not fit the model.
    """
    from deepdpm.data.stream import stream_points

    if out.suffix.lower() not in _WRITERS:
        raise ValueError(f"{out} is of no known kind: give one of {', '.join(_WRITERS)}.")
    module = load_model(model)
    points = stream_points(data, **reading)
    write = _WRITERS[out.suffix.lower()]
    cluster_ids_K = module.cluster_ids_K.cpu().numpy()
    with _progress() as progress:
        task = progress.add_task("", total=points.num_points)
        started = time.perf_counter()
        chunks = predict(module, points.chunks, lambda count: progress.advance(task, count))
        write_atomically(out, lambda file: write(file, chunks, cluster_ids_K))
        return int(progress.tasks[0].completed), time.perf_counter() - started


def _progress() -> Progress:
    """A bar over the points, where the standard error is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("points"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepdpm-predict",
        description="Assign new points to the clusters of a trained model.",
        epilog="Example: deepdpm-predict outputs/digits/RUN/model.ckpt new.csv -o labels.csv",
    )
    parser.add_argument("model", type=Path, help="the model.ckpt of a finished run")
    parser.add_argument("data", help="points: .npy, .npz, .csv, .parquet or .pt, one row for each")
    parser.add_argument("-o", "--out", type=Path, required=True, help=f"where to: {', '.join(_WRITERS)}")
    parser.add_argument(
        "--labels", default="", help="a column or key of DATA that holds labels, to leave out"
    )
    parser.add_argument("--key", default="", help="which array of a .npz or .pt dictionary holds the points")
    header = parser.add_mutually_exclusive_group()
    header.add_argument("--header", action="store_true", default=None, help="the .csv begins with names")
    header.add_argument(
        "--no-header", dest="header", action="store_false", help="the .csv begins with a point"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user ends it with one sentence and status 1."""
    options = _parser().parse_args(arguments)
    reading = {"labels": options.labels, "key": options.key, "header": options.header}
    try:
        count, seconds = predict_file(options.model, options.data, options.out, **reading)
    except (ValueError, OSError) as error:
        print(f"deepdpm-predict: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{count} points assigned, {count / seconds:,.0f} a second: {options.out}")


if __name__ == "__main__":
    main()
