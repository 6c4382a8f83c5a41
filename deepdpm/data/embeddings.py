"""Codes that somebody embedded already: the authors' published sets, and any folder of the same layout.

A folder holds `train_data.pt` (N, D) and, if there are any, `train_labels.pt`, `test_data.pt`,
`test_labels.pt`.

Legend: N points, D dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepdpm.data.files import DataMissingError, embedding_file
from deepdpm.data.samples import Dataset, Samples, make_samples
from deepdpm.data.torch_file import load_torch

_DIGITS = tuple(map(str, range(10)))
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CLASS_NAMES = {"mnist": _DIGITS, "fashion_mnist": tuple(_CLOTHES.split(",")), "usps": _DIGITS}
_FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FASHION", "usps": "USPS"}

# The authors' rule: which share of a class an imbalanced set keeps.
_KEPT_DIGITS = {8: 0.10, 2: 0.05, 5: 0.20, 9: 0.30}
IMBALANCE: dict[str, dict[int, float]] = {
    "mnist": _KEPT_DIGITS,
    "fashion_mnist": {0: 0.37, 5: 0.42, 7: 0.54, 8: 0.19, 3: 0.19},
    "usps": _KEPT_DIGITS,
}
# The authors' USPS_IMBALANCED holds rows of Fashion-MNIST, so that one is made from USPS.
_SHIPPED_IMBALANCED = ("mnist", "fashion_mnist")


@dataclass(frozen=True)
class PublishedCodes:
    """The authors' 10-D codes of MNIST, Fashion-MNIST or USPS (UMAP of an autoencoder's code).

    Files not on disk are downloaded once; see `deepdpm.data.files`.

    Attributes:
        name: how results call the set; an imbalanced set is called `<name>_imbalanced`.
        collection: mnist, fashion_mnist or usps.
        imbalanced: take the imbalanced version (the authors' file, for USPS their rule).
    """

    name: str = "mnist_n2d"
    collection: str = "mnist"
    imbalanced: bool = False

    def load(self) -> Dataset:
        """Read the set; raises ValueError where a file cannot be had or read."""
        if self.collection not in _FOLDERS:
            raise ValueError(f"dataset.collection is {self.collection}: give one of {', '.join(_FOLDERS)}.")
        shipped = self.imbalanced and self.collection in _SHIPPED_IMBALANCED
        folder = _FOLDERS[self.collection] + ("_IMBALANCED" if shipped else "")
        data, labels = (embedding_file(f"{folder}/train_{part}.pt") for part in ("data", "labels"))
        train = read_pair(data, labels)
        if self.imbalanced and not shipped:
            assert train.labels is not None
            kept_N = imbalanced_rows(train.labels, IMBALANCE[self.collection])
            train = Samples(train.x[kept_N], train.labels[kept_N])
        name = f"{self.name}_imbalanced" if self.imbalanced else self.name
        return Dataset(name, train, class_names=_CLASS_NAMES[self.collection])


@dataclass(frozen=True)
class EmbeddingFolder:
    """Any folder with `train_data.pt`, with or without labels and test files.

    Attributes:
        name: how results call the set.
        path: the folder.
    """

    name: str = "embeddings"
    path: str = ""

    def load(self) -> Dataset:
        """Read the folder; raises ValueError where a file is missing or cannot be used."""
        if not self.path:
            raise ValueError("dataset.path is not set: give the folder that holds train_data.pt.")
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise DataMissingError(
                f"dataset.path={self.path} is not a folder: give the folder that holds train_data.pt."
            )
        if not (folder / "train_data.pt").is_file():
            raise DataMissingError(
                f"dataset.path={self.path} has no train_data.pt: put the codes there, or use dataset=file."
            )
        test_data = folder / "test_data.pt"
        return Dataset(
            self.name,
            read_pair(folder / "train_data.pt", folder / "train_labels.pt"),
            read_pair(test_data, folder / "test_labels.pt", minimum=1) if test_data.is_file() else None,
        )


def read_pair(data: Path, labels: Path, minimum: int = 2) -> Samples:
    """Read codes from one `.pt` file, and their labels from a second one if it exists.

    Raises:
        ValueError: a file is damaged, holds objects, or does not hold one tensor or array of the right kind.
    """
    return make_samples(
        _one_array(data), _one_array(labels) if labels.is_file() else None, str(data), minimum
    )


def imbalanced_rows(labels_N: Tensor, kept: Mapping[int, float]) -> Tensor:
    """The authors' rule for imbalanced sets: of each listed class drop the first `int(n (1 - kept))` points.

    Args:
        labels_N: int64 (N,), in file order.
        kept: the share to keep of each listed class.

    Returns:
        bool (N,), true for the points kept.

    Example:
        >>> imbalanced_rows(torch.tensor([7, 8, 8, 7, 8, 8]), {8: 0.25}).tolist()
        [True, False, False, True, False, True]
    """
    kept_N = torch.ones_like(labels_N, dtype=torch.bool)
    for label, share in kept.items():
        rows = (labels_N == label).nonzero()[:, 0]
        kept_N[rows[: int(len(rows) * (1 - share))]] = False
    return kept_N


def _one_array(path: Path) -> Tensor | np.ndarray:
    value = load_torch(path)
    if not isinstance(value, Tensor | np.ndarray):
        raise ValueError(
            f"{path} holds a {type(value).__name__} in place of one tensor or array: save one alone."
        )
    return value
