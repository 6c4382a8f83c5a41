"""A trained module as plain values and tensors: what pickles and files of an estimator hold.

The format is that of Lightning's checkpoints, so `deepdpm-predict` reads what an estimator saved, and an
estimator what `deepdpm-train` left.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepdpm.joint import module_class
from deepdpm.module import DeepDPMModule
from deepdpm.results import write_atomically

Saved = dict[str, Any]


def saved_state(module: DeepDPMModule) -> Saved:
    """All of a trained module but its optimizers: hyperparameters, clusters and weights."""
    return {
        "pytorch-lightning_version": metadata.version("pytorch-lightning"),
        "hyper_parameters": dict(module.hparams),
        "state_dict": _on_cpu(module.state_dict()),
    }


def restore(saved: Saved) -> DeepDPMModule:
    """The module that `saved_state` took apart, on the CPU, ready to predict or to train on."""
    module = module_class(saved["hyper_parameters"])(**saved["hyper_parameters"])
    module.load_state_dict(saved["state_dict"])
    return module.eval()


def write_checkpoint(path: Path, saved: Saved) -> None:
    """Write a file whole or not at all.

    Raises:
        ValueError: the folder is not writable or the disk is full.
    """
    write_atomically(path, lambda file: torch.save(saved, file))


def read_checkpoint(path: Path) -> Saved:
    """Read a checkpoint to the CPU; nothing in it is executed.

    Raises:
        ValueError: the file is missing, damaged, or no checkpoint of DeepDPM.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give one that save() wrote, or the model.ckpt of a run.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        complete = bool(saved["hyper_parameters"]) and bool(saved["state_dict"]["_extra_state"])
    except Exception as error:
        # A damaged file can fail anywhere in the readers of zip, pickle and torch.
        raise ValueError(
            f"{path} is damaged or no model: give one that save() wrote, or a model.ckpt."
        ) from error
    if not complete:
        raise ValueError(f"{path} holds no trained model: fit it first.")
    return dict(saved)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_cpu(inner) for name, inner in value.items()}
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def arrays_to_plain(value: Any) -> Any:
    """Arrays and names as tensors and lists, which `torch.load(weights_only=True)` reads."""
    if isinstance(value, dict):
        return {str(key): arrays_to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(arrays_to_plain, value))
    if isinstance(value, np.ndarray):
        return (
            {"names": value.tolist()} if value.dtype == object else {"array": torch.from_numpy(value.copy())}
        )
    return value.item() if isinstance(value, np.generic) else value


def arrays_from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"array"}:
            return value["array"].numpy()
        if set(value) == {"names"}:
            return np.array(value["names"], dtype=object)
        return {key: arrays_from_plain(inner) for key, inner in value.items()}
    return type(value)(map(arrays_from_plain, value)) if isinstance(value, list | tuple) else value
