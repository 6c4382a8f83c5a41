"""Folders of images in the layout of torchvision's ImageFolder: one folder for each class.

Legend: N images, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import functional

from deepdpm.data.files import DataMissingError
from deepdpm.data.images import Pixels
from deepdpm.data.samples import Dataset

log = logging.getLogger(__name__)

MODES = {1: "L", 3: "RGB"}
TEST_FOLDERS = ("test", "val")


@dataclass(frozen=True)
class ImageFiles:
    """The image files of one part of a folder, class by class in the order of their names."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ImageFolder:
    """Read a folder of image files as rows of pixels.

    `path` holds a folder for each class, or a folder `train` (and one `test` or `val`) that does. `classes`
    keeps some of them: their names, or a text file whose lines begin with them. Images of another size are
    resized to `image_size` (height and width); without it all must be alike. `channels` is 1 for grey and 3
    for colour. A file that cannot be read is named in the log, skipped and counted.

    Raises:
        ValueError: no such folder, an empty class folder, images of another size or no readable image.
    """

    name: str = "image_folder"
    path: str = ""
    channels: int = 3
    image_size: tuple[int, int] | None = None
    classes: tuple[str, ...] | str | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            object.__setattr__(self, key, tuple(float(value) for value in getattr(self, key)))
        if self.image_size is not None:
            object.__setattr__(self, "image_size", tuple(int(value) for value in self.image_size))
            if len(self.image_size) != 2 or min(self.image_size) < 1:
                raise ValueError(
                    f"dataset.image_size must be a height and a width, not {list(self.image_size)}."
                )
        if self.channels not in MODES:
            raise ValueError(f"dataset.channels must be 1 (grey) or 3 (colour), not {self.channels}.")
        if (
            any(len(values) not in (1, self.channels) for values in (self.mean, self.std))
            or min(self.std) <= 0
        ):
            raise ValueError(
                f"dataset.mean and dataset.std must hold one value, or {self.channels} for the channels, and "
                f"dataset.std be above 0, not {list(self.mean)} and {list(self.std)}."
            )

    def load(self) -> Dataset:
        """Read the images as normalised rows."""
        train_files, test_files = self.files()
        train = self._read(train_files)
        test = None if test_files is None else self._read(test_files, tuple(train.images_NCHW.shape[2:]))
        return Dataset(
            name=self.name,
            train=train.rows(self.mean, self.std),
            test=None if test is None else test.rows(self.mean, self.std),
            class_names=train_files.class_names,
            image_shape=tuple(train.images_NCHW.shape[1:]),
        )

    def files(self) -> tuple[ImageFiles, ImageFiles | None]:
        """List the files to cluster, and those held out, if any."""
        return find_images(self.path, self.classes)

    def _read(self, files: ImageFiles, size: tuple[int, ...] | None = None) -> Pixels:
        wanted = self.image_size or size
        images, labels, broken = [], [], 0
        for path, label in zip(files.paths, files.labels, strict=True):
            image = read_image(path, self.channels)
            if image is None:
                broken += 1
                continue
            if self.image_size is not None:
                image = functional.resize(image, list(self.image_size), antialias=True)
            wanted = wanted or tuple(image.shape[1:])
            if tuple(image.shape[1:]) != wanted:
                raise ValueError(
                    f"{path} has {image.shape[1]} x {image.shape[2]} pixels and the images before it "
                    f"{wanted[0]} x {wanted[1]}; set dataset.image_size to resize them all."
                )
            images.append(image)
            labels.append(label)
        report_broken(broken, len(files.paths), self.path)
        return Pixels(torch.stack(images), torch.tensor(labels))


def find_images(
    path: str | Path, classes: Sequence[str] | str | None = None
) -> tuple[ImageFiles, ImageFiles | None]:
    """List the image files below a folder: those to cluster, and those held out, if any."""
    if not str(path):
        raise ValueError("dataset.path is not set: give the folder that holds the images.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataMissingError(f"dataset.path: there is no folder {root}.")
    if not (root / "train").is_dir():
        return _list_part(root, _class_list(classes)), None
    train = _list_part(root / "train", _class_list(classes))
    held_out = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    return train, None if held_out is None else _list_part(held_out, train.class_names)


def _class_list(classes: Sequence[str] | str | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise ValueError(f"dataset.classes: there is no file {classes}.")
        classes = [line.split()[0] for line in Path(classes).read_text("utf-8").splitlines() if line.strip()]
    names = tuple(str(name) for name in classes)
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if not names or doubled:
        raise ValueError(f"dataset.classes must name each class once; it names {doubled or 'none'}.")
    return names


def _list_part(root: Path, classes: tuple[str, ...] | None) -> ImageFiles:
    present = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    names = present if classes is None else classes
    absent = sorted(set(names) - set(present))
    if absent:
        raise ValueError(
            f"dataset.classes: {root} has no folder for {', '.join(absent[:5])}; there are {len(present)}."
        )
    if not names:
        raise ValueError(f"dataset.path: {root} holds no folders; put the images of each class into one.")
    indices = {name: index for index, name in enumerate(names)}
    samples = make_dataset(str(root), indices, extensions=IMG_EXTENSIONS, allow_empty=True)
    counts = Counter(label for _, label in samples)
    empty = [name for name, index in indices.items() if not counts[index]]
    if empty:
        raise ValueError(
            f"dataset.path: {root} has class folders without images: {', '.join(empty[:5])}; fill or delete "
            "them, or leave them out of dataset.classes."
        )
    return ImageFiles(
        tuple(Path(path) for path, _ in samples), tuple(label for _, label in samples), tuple(names)
    )


def read_image(path: Path, channels: int) -> Tensor | None:
    """Read an image file as bytes (C, H, W), or log its name and give None where it cannot be read."""
    try:
        with Image.open(path) as image:
            return functional.pil_to_tensor(image.convert(MODES[channels]))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        log.warning("Skipped %s, which cannot be read as an image (%s).", path, error)
        return None


def report_broken(broken: int, total: int, path: str | Path) -> None:
    """Log how many images were skipped.

    Raises:
        ValueError: all of them were.
    """
    if broken == total:
        raise ValueError(f"dataset.path: none of the {total} images below {path} can be read.")
    if broken:
        log.warning("Skipped %d of %d images below %s, which cannot be read.", broken, total, path)
