"""What a run leaves in its folder, written whole or not at all."""

import contextlib
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

_VERSIONS_OF = (
    "deepdpm",
    "torch",
    "pytorch-lightning",
    "numpy",
    "scikit-learn",
    "hydra-core",
    "kmeans-pytorch",
)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: to a temporary file beside it, which then takes its name.

    Raises:
        ValueError: the folder is not writable or the disk is full; what stood there stays.

    Example:
        >>> write_atomically(Path(tempfile.mkdtemp()) / "a.txt", lambda file: file.write(b"text"))
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> ValueError:
    """Return the error that says why a file could not be written, and what to do."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return ValueError(f"{path} could not be written ({reason}): make room there, or choose another folder.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN and infinity, which JSON does not know, become null.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> write_json(path, {"nmi": float("nan"), "ari": 0.5})
        >>> json.loads(path.read_text())
        {'nmi': None, 'ari': 0.5}
    """
    write_text(path, json.dumps(_jsonable(values), indent=2, allow_nan=False) + "\n")


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write a compressed .npz atomically."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None where there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def now() -> str:
    """Return the time as ISO 8601 with the zone, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def git_revision() -> str | None:
    """Return the commit of the checkout that runs, `-dirty` where tracked files differ; None in a wheel."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=Path(__file__).parent,
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed wheel may lie in somebody else's repository, in its .venv.
    return described.stdout.strip() if tracked.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Return the accelerator's name, or "cpu".

    Example:
        >>> device_name(torch.device("cpu"))
        'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def reset_peak_memory() -> None:
    """Begin to measure anew, where the system allows it: a sweep runs many jobs in one process."""
    gc.collect()  # else what an earlier job has left may be given back while this one is measured
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> float | None:
    """Return the greatest resident memory of this process in MB, without what is taken on a CUDA device."""
    found = _memory_mb("VmHWM:")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _memory_mb(name: str) -> float | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return round(int(line.split()[1]) / 1024, 1)
    except OSError:
        pass
    return None


class Memory:
    """The memory of a run in MB: its peak, and the peak beyond what the process held with the data loaded."""

    def __init__(self) -> None:
        self._loading_peak_mb = 0.0
        self._loaded_mb: float | None = None

    def begin(self) -> None:
        """The run begins."""
        reset_peak_memory()

    def loaded(self) -> None:
        """The data are loaded."""
        self._loading_peak_mb = peak_memory_mb() or 0.0
        reset_peak_memory()
        self._loaded_mb = _memory_mb("VmRSS:")

    def since_loaded_mb(self) -> float | None:
        """Return how far memory has risen above that with the data loaded, None where no system tells."""
        peak = peak_memory_mb()
        return None if peak is None or self._loaded_mb is None else round(peak - self._loaded_mb, 1)

    def peak_mb(self) -> float | None:
        """Return the peak of the whole run, loading included."""
        peak = peak_memory_mb()
        return None if peak is None else max(peak, self._loading_peak_mb)


def peak_device_memory_mb() -> float | None:
    """Return the greatest memory taken on the CUDA device in MB, None without one."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return round(torch.cuda.max_memory_allocated() / 1024**2, 1)
