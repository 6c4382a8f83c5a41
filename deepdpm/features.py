"""Frozen features: the codes that a pretrained network gives of images, computed once and cached in shards.

Legend: N images, D dimensions of a code, B images in a batch, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import functional
from tqdm.auto import tqdm

from deepdpm.checks import check_least
from deepdpm.data.files import DataMissingError
from deepdpm.data.folders import ImageFiles, find_images, read_image, report_broken
from deepdpm.data.samples import Dataset, Samples
from deepdpm.data.torch_file import load_torch

log = logging.getLogger(__name__)

LAYERS = ("backbone", "projection")
# What keys of a checkpoint begin with, the most telling first: MoCo, distributed or not; parallel; plain.
PREFIXES = ("module.encoder_q.", "encoder_q.", "module.", "")
HEADS = ("fc", "classifier", "heads", "head")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE_OVER_CROP = 256 / 224


@dataclass(frozen=True)
class Network:
    """A frozen network: prepared images go in, codes come out; `checksum` tells its weights from others'."""

    module: nn.Module
    checksum: str
    image_size: int
    unit_length: bool

    @torch.inference_mode()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Give the codes (B, D) of prepared images (B, 3, H, W)."""
        device = next(self.module.parameters()).device
        codes_BD = self.module(images_BCHW.to(device)).flatten(1).float()
        return nn.functional.normalize(codes_BD).cpu() if self.unit_length else codes_BD.cpu()


def prepare_image(image_CHW: Tensor, image_size: int) -> Tensor:
    """Resize, crop and normalise bytes (C, H, W) as in the training on ImageNet; grey becomes colour.

    >>> prepare_image(torch.zeros(1, 40, 60, dtype=torch.uint8), 32).shape
    torch.Size([3, 32, 32])
    """
    resized = functional.resize(image_CHW, [round(image_size * RESIZE_OVER_CROP)], antialias=True)
    cropped = functional.center_crop(resized, [image_size, image_size])
    colour = cropped.expand(3, -1, -1).float() / 255
    return functional.normalize(colour, list(IMAGENET_MEAN), list(IMAGENET_STD))


def load_network(
    architecture: str, weights: str = "torchvision", layer: str = "backbone", image_size: int = 224
) -> Network:
    """Make a network of torchvision with torchvision's weights, or with those of a checkpoint.

    A checkpoint may be MoCo's (keys `module.encoder_q.*` under `state_dict`) or a plain state dict. `layer`
    is "backbone" (all but the classifier) or "projection" (MoCo's head `fc` of one or two layers; codes of
    length 1).

    Raises:
        ValueError: an unknown architecture or layer, or layers that do not fit, which are named.
        DataMissingError: weights that cannot be downloaded.
    """
    if architecture not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"dataset.network: torchvision has no image classifier {architecture!r}.")
    if layer not in LAYERS:
        raise ValueError(f"dataset.layer must be one of {', '.join(LAYERS)}, not {layer!r}.")
    if layer == "projection" and weights == "torchvision":
        raise ValueError("dataset.layer=projection needs a MoCo checkpoint in dataset.weights.")
    if weights == "torchvision":
        try:
            model = torchvision.models.get_model(architecture, weights="DEFAULT")
        except (OSError, RuntimeError) as error:
            raise DataMissingError(
                f"dataset.weights: the weights of {architecture} cannot be downloaded ({error}); "
                "connect once, or set dataset.weights to a file."
            ) from error
        head: nn.Module = nn.Identity()
    else:
        model = torchvision.models.get_model(architecture, weights=None)
        state = _checkpoint_state(weights)
        head = _projection(state, weights) if layer == "projection" else nn.Identity()
        _load_backbone(model, state, weights)
    setattr(model, _head_name(model, architecture), head)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().requires_grad_(False).to(device)
    return Network(model, _checksum(model), image_size, unit_length=layer == "projection")


def _head_name(model: nn.Module, architecture: str) -> str:
    name = next((name for name in HEADS if hasattr(model, name)), None)
    if name is None:
        raise ValueError(
            f"dataset.network: {architecture} has no known classifier to leave out; take a ResNet."
        )
    return name


def _checkpoint_state(path: str) -> dict[str, Tensor]:
    if not path:
        raise ValueError("dataset.weights is not set: give a checkpoint, or torchvision for its own weights.")
    try:
        loaded = load_torch(path)
    except ValueError as error:
        raise ValueError(f"dataset.weights: {error}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    tensors = (
        {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    )
    if not tensors:
        raise ValueError(f"dataset.weights: {path} holds no state dict.")
    prefix = next(prefix for prefix in PREFIXES if any(str(key).startswith(prefix) for key in tensors))
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_backbone(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    head = next((f"{name}." for name in HEADS if hasattr(model, name)), "fc.")
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}
    given = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    faults = [f"{name} is missing" for name in wanted if name not in given]
    faults += [f"{name} is not known here" for name in given if name not in wanted]
    faults += [
        f"{name} is {tuple(given[name].shape)} in the file and {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if faults:
        more = f", and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ValueError(
            f"dataset.weights: {path} does not fit dataset.network: {', '.join(faults[:6])}{more}; set "
            "dataset.network to the architecture of the file."
        )
    model.load_state_dict(given, strict=False)


def _projection(state: Mapping[str, Tensor], path: str) -> nn.Module:
    """MoCo's head: `fc` in its first version, `fc.0`, ReLU and `fc.2` in its second."""
    for names in (("fc",), ("fc.0", "fc.2")):
        if all(f"{name}.{part}" in state for name in names for part in ("weight", "bias")):
            layers: list[nn.Module] = []
            for name in names:
                weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
                linear = nn.Linear(weight.shape[1], weight.shape[0])
                linear.load_state_dict({"weight": weight, "bias": bias})
                layers += [linear, nn.ReLU()]
            return nn.Sequential(*layers[:-1])
    raise ValueError(f"dataset.weights: {path} holds no projection head fc; set dataset.layer=backbone.")


def _checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Pictures(TorchDataset):
    """Prepared images by number, with None for those that cannot be read."""

    def __init__(self, num_images: int, read: Callable[[int], Tensor | None], image_size: int) -> None:
        self.num_images, self.read, self.image_size = num_images, read, image_size

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        image_CHW = self.read(row)
        return row, None if image_CHW is None else prepare_image(image_CHW, self.image_size)


@dataclass(frozen=True)
class FeatureCache:
    """Codes in shards on disk, each with a checksum, so that a computation goes on where it stopped.

    The folder `<root>/<name>-<key>` is named after everything that decides the codes (`identity`).
    """

    root: Path
    name: str
    identity: Mapping[str, Any]
    shard_size: int = 4096

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return self.root / f"{self.name}-{key[:12]}"

    def codes(
        self, pictures: Pictures, network: Network, batch_size: int, workers: int
    ) -> tuple[Tensor, Tensor]:
        """Give codes (M, D) and the rows (M,) they belong to; images that cannot be read have none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = range(0, len(pictures), self.shard_size)
        sums = self._sums()
        parts: list[dict[str, Tensor]] = []
        with tqdm(total=len(pictures), desc=f"Features of {self.name}", unit="image", disable=None) as bar:
            for number, start in enumerate(shards):
                stop = min(start + self.shard_size, len(pictures))
                path = self.folder / f"shard_{number:05d}.pt"
                if sums.get(path.name) is None or not _has_sum(path, sums[path.name]):
                    rows = range(start, stop)
                    part = _compute(pictures, rows, network, batch_size, workers, bar.update)
                    sums[path.name] = _save_shard(path, part)
                    _write_atomically(self.folder / "checksums.json", json.dumps(sums, indent=1).encode())
                else:
                    part = load_torch(path)
                    bar.update(stop - start)
                parts.append(part)
        codes_MD = [part["codes"] for part in parts if len(part["rows"])]
        rows_M = torch.cat([part["rows"] for part in parts])
        return torch.cat(codes_MD) if codes_MD else torch.empty(0, 0), rows_M

    def _sums(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / "checksums.json").read_text("utf-8")))
        except (OSError, ValueError):
            return {}


def _compute(
    pictures: Pictures,
    rows: Sequence[int],
    network: Network,
    batch_size: int,
    workers: int,
    advance: Callable[[int], Any],
) -> dict[str, Tensor]:
    loader = DataLoader(
        torch.utils.data.Subset(pictures, rows), batch_size, num_workers=workers, collate_fn=list
    )
    codes: list[Tensor] = []
    kept: list[int] = []
    for batch in loader:
        readable = [(row, image) for row, image in batch if image is not None]
        if readable:
            codes.append(network.encode(torch.stack([image for _, image in readable])))
            kept += [row for row, _ in readable]
        advance(len(batch))
    return {
        "codes": torch.cat(codes) if codes else torch.empty(0, 0),
        "rows": torch.tensor(kept, dtype=torch.int64),
    }


def _save_shard(path: Path, part: dict[str, Tensor]) -> str:
    partial = path.with_suffix(".part")
    torch.save(part, partial)
    digest = _file_sum(partial)
    os.replace(partial, path)
    return digest


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".part")
    partial.write_bytes(content)
    os.replace(partial, path)


def _has_sum(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    if _file_sum(path) == digest:
        return True
    log.warning("%s does not have its checksum and is computed anew.", path)
    return False


def _file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FrozenFeatures:
    """Read a folder of images as the codes of a pretrained network.

    `path` and `classes` are those of `deepdpm.data.folders.ImageFolder`; `network`, `weights`, `layer` and
    `image_size` those of `load_network`. The codes are kept below `cache`, and computed only where they are
    not.

    Raises:
        ValueError: no such folder or weights, an empty class folder, or no readable image.
    """

    name: str = "image_features"
    path: str = ""
    network: str = "resnet50"
    weights: str = "torchvision"
    layer: str = "backbone"
    classes: tuple[str, ...] | str | None = None
    image_size: int = 224
    batch_size: int = 64
    workers: int = 0
    cache: str = "data/features"

    def __post_init__(self) -> None:
        check_least(self, "dataset", {"image_size": 1, "batch_size": 1, "workers": 0})

    def load(self) -> Dataset:
        """Compute the codes, or read them from the cache."""
        train_files, test_files = find_images(self.path, self.classes)
        network = load_network(self.network, self.weights, self.layer, self.image_size)
        return Dataset(
            name=self.name,
            train=self._codes(train_files, network),
            test=None if test_files is None else self._codes(test_files, network),
            class_names=train_files.class_names,
        )

    def _codes(self, files: ImageFiles, network: Network) -> Samples:
        pictures = Pictures(len(files.paths), partial(_read_file, files.paths), self.image_size)
        identity = {
            "weights": network.checksum,
            "image_size": self.image_size,
            "unit_length": network.unit_length,
            "files": list(_file_states(files.paths)),
        }
        cache = FeatureCache(Path(self.cache), self.name, identity)
        codes_MD, rows_M = cache.codes(pictures, network, self.batch_size, self.workers)
        report_broken(len(files.paths) - len(rows_M), len(files.paths), self.path)
        return Samples(codes_MD, torch.tensor(files.labels)[rows_M])


def _read_file(paths: Sequence[Path], row: int) -> Tensor | None:
    return read_image(paths[row], channels=3)


def _file_states(paths: Sequence[Path]) -> Iterator[tuple[str, int, int]]:
    for path in paths:
        state = path.stat()
        yield str(path), state.st_size, state.st_mtime_ns


def pixel_features(
    images_NCHW: Tensor, name: str, network: Network, cache: Path, batch_size: int = 256
) -> Tensor:
    """Give the codes (N, D) that a frozen network has for images in memory, bytes (N, C, H, W)."""
    pictures = Pictures(len(images_NCHW), images_NCHW.__getitem__, network.image_size)
    identity = {
        "weights": network.checksum,
        "image_size": network.image_size,
        "unit_length": network.unit_length,
        "pixels": hashlib.sha256(images_NCHW.contiguous().numpy().tobytes()).hexdigest(),
    }
    return FeatureCache(cache, name, identity).codes(pictures, network, batch_size, workers=0)[0]
