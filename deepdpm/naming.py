"""The names of runs' folders and of the user's own data sets; the configuration calls both (`config.py`)."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

_LONGEST = 100


def job_folder(name: str | None, dataset: str, overrides: Sequence[str]) -> str:
    """Return the folder of one job of a sweep, named by its data set and by what was overridden.

    Example:
        >>> job_folder(None, "digits", ["dataset=digits", "seed=1", "model.init_k=3"])
        'digits,seed=1,model.init_k=3'
        >>> job_folder("kmeans", "mnist", ["+embedded=mnist", "seed=1"])
        'kmeans,mnist,embedded=mnist,seed=1'
    """
    changed = [override.lstrip("+~") for override in overrides if not override.startswith("dataset=")]
    full = ",".join([*([name] if name else []), dataset, *changed])
    safe = re.sub(r"[^\w.,=+\[\]-]+", "_", full)
    if safe == full and len(safe) <= _LONGEST:
        return safe
    return f"{safe[:_LONGEST]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def stem(path: str, otherwise: str) -> str:
    """Return the name of a file or folder without an ending of letters, fit for a folder's name.

    Example:
        >>> stem("data/my shops.csv", "file"), stem("codes/v1.2", "embeddings"), stem("", "file")
        ('my_shops', 'v1.2', 'file')
    """
    return re.sub(r"[^\w.-]+", "_", re.sub(r"\.[a-z]+$", "", Path(str(path)).name)) or otherwise
