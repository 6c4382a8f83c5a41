"""One folder, one run: a lock that ends with its process, and what an earlier run left behind."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deepdpm.results import read_json, write_json

_LOCK = ".lock"
log = logging.getLogger(__name__)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the `result.json` of a folder, None where there is none or it cannot be read."""
    return read_json(folder / "result.json")


def finished_result(folder: Path, config_hash: str) -> dict[str, Any] | None:
    """Return the result of a run of exactly these settings that came to its end in the folder, or None.

    Example:
        >>> finished_result(Path("no/such/folder"), "00ff") is None
        True
    """
    result = read_result(folder)
    if result is None or result.get("status") != "finished" or result.get("config_hash") != config_hash:
        return None
    return result


def resume_from(ckpt_path: str | None, folder: Path, config_hash: str) -> Path | None:
    """Return the checkpoint to go on from: the one named, or `last.ckpt` of the same run's folder, or None.

    Raises:
        ValueError: it is missing or damaged, or the folder holds a stopped run of other settings.
    """
    import torch

    path = folder / "last.ckpt" if ckpt_path is None else Path(ckpt_path).expanduser()
    if path.is_dir():
        path = path / "last.ckpt" if (path / "last.ckpt").is_file() else path / "model.ckpt"
    if not path.is_file():
        if ckpt_path is None:
            return None
        raise ValueError(
            f"ckpt_path={ckpt_path} is not there: give the last.ckpt of a stopped run, or its folder."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = state["callbacks"]["LastCheckpoint"]["config_hash"]
    except Exception as error:
        # A damaged file can fail anywhere in the readers of zip, pickle and torch.
        raise ValueError(
            f"{path} is damaged or no checkpoint of a run: remove it, or name another one."
        ) from error
    if ckpt_path is None and found != config_hash:
        raise ValueError(
            f"{folder} holds a stopped run of other settings: choose another hydra.run.dir, say "
            f"ckpt_path={path} to go on with it under the new settings, or remove that file."
        )
    return path


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second process waits until the first one ends, however it ends.

    The kernel holds the lock (`flock`), so that a killed process leaves none behind. The helper processes of
    distributed training belong to the run that holds the lock, and don't ask for it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("Another process runs the job in %s: waiting for it.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def in_progress(folder: Path) -> bool:
    """Return whether another process holds the folder now."""
    if not (folder / _LOCK).exists():
        return False
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json` whole or not at all."""
    write_json(folder / "result.json", result)
