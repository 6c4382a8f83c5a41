"""Raw MNIST, Fashion-MNIST, USPS and STL-10: read where they lie, or downloaded through torchvision.

Legend: N images, C channels, H and W height and width in pixels, D = C * H * W.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_url

from deepdpm.data.embeddings import IMBALANCE, imbalanced_rows
from deepdpm.data.files import DataMissingError, cache_root, data_root
from deepdpm.data.samples import Dataset, Samples

KINDS = ("mnist", "fashion_mnist", "usps", "stl10")
IDX_SETS: dict[str, type[datasets.MNIST]] = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}
IDX_DIMENSIONS = {"images": 3, "labels": 1}
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
STL10_SHAPE = (3, 96, 96)
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Pixels:
    """Images as bytes: `images_NCHW` uint8 (N, C, H, W) and `labels_N` int64 (N,)."""

    images_NCHW: Tensor
    labels_N: Tensor

    def rows(self, mean: Sequence[float], std: Sequence[float]) -> Samples:
        """Flatten the images to rows (N, D): pixels in 0..1, less `mean`, over `std`, for each channel."""
        x_NCHW = self.images_NCHW.float().div_(255)
        shape = (1, -1, 1, 1)
        x_NCHW.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
        return Samples(x_NCHW.flatten(1), self.labels_N)


@dataclass(frozen=True)
class RawImages:
    """Read one of the customary image sets as rows of pixels.

    The files are sought in `root` and its folder `torchvision` and downloaded there if missing, or into the
    user's cache where the root may not be written. All images are clustered, in file order, the train part
    first.

    Attributes:
        name: how results call the set; an imbalanced set is called `<name>_imbalanced`.
        kind: mnist, fashion_mnist, usps or stl10.
        root: where the files lie; None for the environment variable DEEPDPM_DATA, else `data/`.
        mean: what is taken off the pixels, which are in 0..1, for each channel.
        std: what the pixels are then divided by, for each channel.
        imbalanced: drop images of some classes by the published rule.
        held_out: keep the test part for the test scores.

    Raises:
        ValueError: an unknown kind or a setting out of range.
    """

    name: str
    kind: str
    root: str | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    imbalanced: bool = False
    held_out: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.kind not in KINDS:
            raise ValueError(f"dataset.kind must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if min(self.std, default=0.0) <= 0:
            raise ValueError(f"dataset.std must be above 0 for each channel, not {list(self.std)}.")
        if self.imbalanced and self.kind not in IMBALANCE:
            raise ValueError(
                f"dataset.imbalanced: {self.kind} has no published rule; set it for one of "
                f"{', '.join(IMBALANCE)}."
            )

    def load(self) -> Dataset:
        """Read the images as normalised rows.

        Raises:
            ValueError: a damaged file, or files missing that cannot be downloaded.
        """
        train, test = self.load_pixels()
        image_shape = tuple(train.images_NCHW.shape[1:])
        if not len(self.mean) == len(self.std) == image_shape[0]:
            raise ValueError(
                f"dataset.mean and dataset.std must hold one value for each channel of {self.name}, which "
                f"has {image_shape[0]}, not {len(self.mean)} and {len(self.std)}."
            )
        return Dataset(
            name=f"{self.name}_imbalanced" if self.imbalanced else self.name,
            train=train.rows(self.mean, self.std),
            test=None if test is None else test.rows(self.mean, self.std),
            class_names=_class_names(self.kind),
            image_shape=image_shape,
        )

    def load_pixels(self) -> tuple[Pixels, Pixels | None]:
        """Read the images as bytes: those to cluster, and those held out, if any."""
        train, test = (self._read(part) for part in ("train", "test"))
        if not self.held_out:
            images_NCHW = torch.cat([train.images_NCHW, test.images_NCHW])
            train = Pixels(images_NCHW, torch.cat([train.labels_N, test.labels_N]))
        if self.imbalanced:
            kept_N = imbalanced_rows(train.labels_N, IMBALANCE[self.kind])
            train = Pixels(train.images_NCHW[kept_N], train.labels_N[kept_N])
        return train, test if self.held_out else None

    def _read(self, part: str) -> Pixels:
        root = data_root(self.root)
        if self.kind == "usps":
            return _read_usps(root, part)
        if self.kind == "stl10":
            return _read_stl10(root, part)
        return _read_idx_pair(root, part, IDX_SETS[self.kind])


def _class_names(kind: str) -> tuple[str, ...]:
    if kind == "fashion_mnist":
        return tuple(datasets.FashionMNIST.classes)
    return STL10_CLASSES if kind == "stl10" else DIGITS


def _read_idx_pair(root: Path, part: str, source: type[datasets.MNIST]) -> Pixels:
    prefix = "train" if part == "train" else "t10k"
    arrays = []
    for content, dimensions in IDX_DIMENSIONS.items():
        stem = f"{prefix}-{content}-idx{dimensions}-ubyte"
        (md5,) = (md5 for name, md5 in source.resources if name == f"{stem}.gz")
        folder = Path(source.__name__) / "raw"
        urls = [f"{mirror}{stem}.gz" for mirror in source.mirrors]
        path = _find(root, [folder / stem, folder / f"{stem}.gz"]) or _download(root, folder, urls, md5)
        arrays.append(read_idx(path, dimensions))
    images, labels = arrays
    return _checked(images[:, None], labels, root)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file of the idx format, gzipped or not, as a uint8 tensor with so many axes.

    Raises:
        ValueError: a file that is cut short or of another format.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it downloaded again.") from error
    header = 4 + 4 * dimensions
    # Two zero bytes, 8 for unsigned bytes, the number of axes; then the length of each axis, big-endian.
    if content[:4] == bytes([0, 0, 8, dimensions]) and len(content) >= header:
        shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int).tolist()
        if math.prod(shape) == len(content) - header:
            return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
    raise ValueError(f"{path} is not an idx file of bytes with {dimensions} axes, or is cut short.")


def _read_usps(root: Path, part: str) -> Pixels:
    url, filename, md5 = datasets.USPS.split_list[part]
    path = _find(root, [Path(filename)]) or _download(root, Path(), [url], md5)
    try:
        usps = datasets.USPS(path.parent, train=part == "train", download=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it downloaded again.") from error
    return _checked(torch.from_numpy(usps.data)[:, None], torch.tensor(usps.targets), root)


def _read_stl10(root: Path, part: str) -> Pixels:
    source = datasets.STL10
    folder = Path(source.base_folder)
    wanted = [folder / f"{part}_{content}.bin" for content in ("X", "y")]
    if any(_find(root, [name]) is None for name in wanted):
        _download(root, Path(), [source.url], source.tgz_md5, unpack=source.base_folder)
    images, labels = (np.fromfile(_find(root, [name]) or name, np.uint8) for name in wanted)
    if images.size != labels.size * math.prod(STL10_SHAPE):
        raise ValueError(
            f"{wanted[0]} and {wanted[1]} below {root} do not hold equally many images and labels."
        )
    # The files hold each channel column by column.
    pixels = torch.from_numpy(images).view(-1, *STL10_SHAPE).transpose(2, 3).contiguous()
    return _checked(pixels, torch.from_numpy(labels) - 1, root)


def _checked(images_NCHW: Tensor, labels_N: Tensor, root: Path) -> Pixels:
    if len(images_NCHW) != len(labels_N):
        raise ValueError(f"{len(images_NCHW)} images and {len(labels_N)} labels below {root} do not match.")
    return Pixels(images_NCHW, labels_N.long())


def _find(root: Path, names: Sequence[Path]) -> Path | None:
    places = [folder / name for folder in _folders(root) for name in names]
    return next((path for path in places if path.exists()), None)


def _folders(root: Path) -> list[Path]:
    return [root / "torchvision", root, cache_root() / "torchvision"]


def _download(root: Path, folder: Path, urls: Sequence[str], md5: str, unpack: str | None = None) -> Path:
    """Download a file whole or not at all; `unpack` names the folder that an archive holds."""
    base = root / "torchvision"
    if not os.access(next(path for path in (base, *base.absolute().parents) if path.exists()), os.W_OK):
        base = cache_root() / "torchvision"
    target = base / folder / Path(urls[0]).name
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as partial:
        for url in urls:
            try:
                download_url(url, partial, target.name, md5=md5)
            except (OSError, RuntimeError) as error:
                reasons.append(f"{url}: {error}")
                continue
            if unpack is None:
                return Path(shutil.move(Path(partial) / target.name, target))
            with tarfile.open(Path(partial) / target.name) as archive:
                # Python before 3.11.4 has no filters.
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(partial)
            return Path(shutil.move(Path(partial) / unpack, target.parent / unpack))
    raise DataMissingError(
        f"{target.name} is not below {root} and cannot be downloaded ({'; '.join(reasons)}); put it into "
        f"{target.parent}, or set dataset.root or DEEPDPM_DATA to where it lies."
    )
