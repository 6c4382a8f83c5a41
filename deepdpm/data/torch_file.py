"""Files of `torch.save`, read without ever running what a pickle asks for.

`torch.load(weights_only=True)` reads tensors. Some published codes are NumPy arrays pickled by `torch.save`;
for these a fixed list of NumPy's own constructors is allowed, under the names of NumPy 1 and 2. Everything
else is refused.
"""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

_NUMERIC = [np.dtype(code) for code in "?bBhHiIlLqQefd"]


def _plain_dtype(*arguments: Any) -> np.dtype:
    """Stands in for `numpy.dtype` in a pickle: only numbers, so no array of objects can be built."""
    dtype = np.dtype(*arguments)
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.{dtype.type.__name__}")
    return dtype


def _allowed() -> list[Any]:
    # Protocol-2 pickles reach the constructor through this public method of any pickled array.
    reconstruct = np.empty(0).__reduce__()[0]
    constructors = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (_plain_dtype, "numpy.dtype"),
    ]
    return [*constructors, np.ndarray, *{type(dtype) for dtype in _NUMERIC}]


def load_torch(path: str | Path) -> Any:
    """Read a `.pt` file of tensors or numeric arrays, or a dictionary of them.

    Old files (before the zip format) are read too. Tensors arrive on the CPU.

    Raises:
        ValueError: the file is missing, damaged, or asks for any object beside tensors and numeric arrays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.ones(2), f"{folder}/codes.pt")
        ...     load_torch(f"{folder}/codes.pt")
        tensor([1., 1.])
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        with safe_globals(_allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that torch.save does not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None and "Unsupported" not in str(error) and "blocked" not in str(error):
            raise _damaged(path) from None
        asked = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{path} holds a pickled object{asked}, which could run any code and was not loaded: save a "
            "tensor or "
            "a NumPy array of numbers instead."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception:
        # A broken pickle can fail in any way at all; none of them ran foreign code.
        raise _damaged(path) from None


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged or was not written by torch.save: write or download it again.")
