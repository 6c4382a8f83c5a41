"""Samples, data sets and sources, and the checks that every kind of input passes.

Legend: N points, D dimensions.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -1
_ROWS_NAMED = 5


@dataclass(frozen=True)
class Samples:
    """Points and, where there are any, their true labels.

    Attributes:
        x: float32, the first axis counts the N points; (N, D) for codes.
        labels: int64 (N,), where -1 means that the point has no label; None where no point has one.

    Example:
        >>> import torch
        >>> len(Samples(torch.zeros(3, 2), None))
        3
    """

    x: Tensor
    labels: Tensor | None

    def __post_init__(self) -> None:
        assert self.x.dtype == torch.float32, "use make_samples() for unchecked input"
        assert self.x.ndim >= 2
        if self.labels is not None:
            assert self.labels.dtype == torch.int64
            assert self.labels.shape == self.x.shape[:1]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Dataset:
    """A training set with what is known about it.

    Attributes:
        name: how results call the set.
        train: the points to cluster.
        test: points that are only assigned, never fitted.
        feature_names: the columns of a table.
        class_names: the name of label c is `class_names[c]`.
        image_shape: (C, H, W) where each row is a flattened image.
    """

    name: str
    train: Samples
    test: Samples | None = None
    feature_names: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.test is not None and self.test.x.shape[1:] != self.train.x.shape[1:]:
            raise ValueError(
                f"The test points of {self.name} have shape {tuple(self.test.x.shape[1:])}, but the training "
                "points "
                f"have {tuple(self.train.x.shape[1:])}: give both the same columns."
            )


class Source(Protocol):
    """What the `_target_` of a `dataset` config makes: plain settings that can load a data set."""

    @property
    def name(self) -> str:
        """The config key `dataset.name`, as written into the results."""

    def load(self) -> Dataset:
        """Read or make the data; raises ValueError with one clear sentence where that fails."""


def make_samples(x: Any, labels: Any = None, what: str = "dataset.path", minimum: int = 2) -> Samples:
    """Check points and labels of any origin and make `Samples` of them.

    Args:
        x: tensor or array (N, D); (N,) counts as N points of one dimension, further axes are flattened.
        labels: (N,) whole numbers or None; see `make_labels`.
        what: what the messages call the input: a setting, a file or both.
        minimum: how many points are needed; a test set can do with one.

    Raises:
        ValueError: text or objects in place of numbers, no point, no column, too few points, NaN or infinity
            (with the first such rows), or labels of another length.

    Example:
        >>> make_samples([[0.0, 1.0], [2.0, 3.0]], [0, 1]).labels
        tensor([0, 1])
    """
    x_ND = _float32(x, what)
    if x_ND.ndim == 0:
        raise ValueError(f"{what} holds a single number: give a table with one row for each point.")
    x_ND = x_ND.reshape(len(x_ND), -1) if x_ND.numel() else x_ND.reshape(len(x_ND), 0)
    if len(x_ND) == 0:
        raise ValueError(f"{what} is an empty set: give at least {minimum} points.")
    if x_ND.shape[1] == 0:
        raise ValueError(f"{what} has no columns of numbers to cluster by: give at least one.")
    if len(x_ND) < minimum:
        raise ValueError(f"{what} holds only one point: give at least {minimum} points.")
    _refuse_nonfinite(x_ND, what)
    return Samples(x_ND, None if labels is None else make_labels(labels, len(x_ND), what))


def make_labels(labels: Any, num_points: int, what: str = "dataset.labels") -> Tensor | None:
    """Check labels of any origin and return them as int64; None where every one is missing.

    Args:
        labels: (N,) or (N, 1) whole numbers from -1 on, of any number type; -1 and NaN mean "no label".
        num_points: the N they must match.
        what: what the messages call them.

    Raises:
        ValueError: another length, text, fractions, or numbers below -1.

    Example:
        >>> make_labels([0.0, float("nan"), 2.0], 3)
        tensor([ 0, -1,  2])
    """
    labels_N = torch.as_tensor(_numeric(labels, f"The labels of {what}"))
    if labels_N.ndim == 2 and labels_N.shape[1] == 1:
        labels_N = labels_N[:, 0]
    if labels_N.ndim != 1:
        raise ValueError(
            f"The labels of {what} have shape {tuple(labels_N.shape)}: give one whole number for each point."
        )
    if len(labels_N) != num_points:
        raise ValueError(
            f"{what} has {len(labels_N)} labels for {num_points} points: give one label for each point, "
            "-1 where there is none."
        )
    if labels_N.is_floating_point():
        labels_N = torch.where(labels_N.isnan(), float(NO_LABEL), labels_N)
        wrong_N = (labels_N != labels_N.round()) | labels_N.isinf()
        if wrong_N.any():
            raise ValueError(
                f"The labels of {what} are not whole numbers in {_name_rows(wrong_N)}: give class numbers or "
                "names."
            )
    labels_N = labels_N.to(torch.int64)
    if (wrong_N := labels_N < NO_LABEL).any():
        raise ValueError(
            f"The labels of {what} are below -1 in {_name_rows(wrong_N)}: number the classes from 0, and "
            "write -1 "
            "for no label."
        )
    return None if bool((labels_N == NO_LABEL).all()) else labels_N


def _float32(x: Any, what: str) -> Tensor:
    """Any numeric array as a float32 tensor on the CPU, without a copy where it is one already."""
    array = _numeric(x, what)
    if isinstance(array, Tensor):
        return array.to(torch.float32)
    # A value beyond float32's range becomes infinite, and is then named with its row.
    with np.errstate(over="ignore"):
        array = np.asarray(array, dtype=np.float32, order="C")
    return torch.from_numpy(array)


def _numeric(values: Any, what: str) -> Tensor | np.ndarray:
    """Tensors and arrays of real numbers pass, everything else is refused."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.is_complex() or values.layout != torch.strided or values.is_quantized:
            raise ValueError(
                f"{what} is a {values.layout} tensor of {values.dtype}: give dense real numbers."
            )
        return values
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{what} has rows of different lengths: give each point the same columns.") from None
    if array.dtype.kind not in "biuf":
        kind = "text" if array.dtype.kind in "US" else f"values of type {array.dtype}"
        raise ValueError(f"{what} holds {kind} where numbers belong: give numbers only.")
    native = array.dtype.newbyteorder("=")
    return array.astype(native, copy=not array.flags.writeable)


def _refuse_nonfinite(x_ND: Tensor, what: str) -> None:
    # A row's sum is finite only if all its values are; a sum that overflows sends a row to the slower, exact
    # look.
    suspect_N = ~x_ND.sum(1).isfinite()
    if suspect_N.any():
        suspect_N[suspect_N.clone()] = ~x_ND[suspect_N].isfinite().all(1)
    if suspect_N.any():
        raise ValueError(
            f"{what} has NaN, infinity or a value beyond float32 in {_name_rows(suspect_N)}: remove or fill "
            "them."
        )


def _name_rows(wrong_N: Tensor) -> str:
    """Say how many rows are wrong and which come first."""
    rows = wrong_N.nonzero()[:, 0].tolist()
    named = ", ".join(map(str, rows[:_ROWS_NAMED])) + (", ..." if len(rows) > _ROWS_NAMED else "")
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} ({named}; counted from 0)"
