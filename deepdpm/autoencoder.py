"""Feature extractors: a dense and a convolutional autoencoder, their losses and their weight files.

Legend: B points in a batch, D dimensions of an input row, L dimensions of a code, C image channels,
H and W image height and width, F filters, P pooled cells.
"""

from __future__ import annotations

import itertools
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepdpm.augment import augmented

KINDS = ("none", "dense", "conv")
FILTERS = 32
KERNEL = 5


@dataclass(frozen=True)
class FeaturesSettings:
    """Say which autoencoder stands before the clustering, and how it is pretrained.

    `kind` is "none" (the data are codes already), "dense" or "conv". `hidden_dims` are the widths between
    input and code, for the dense one. `noise` is the standard deviation of the Gaussian noise added to the
    inputs while pretraining; `augment` is the strength of the random shifts, turns and the like of images
    (`deepdpm.augment`), which the reconstruction must undo. `weights` is a weight file; with it nothing is
    pretrained.

    Raises:
        ValueError: a value out of range, naming the setting.

    >>> FeaturesSettings(kind="dense", latent_dim=10).hidden_dims
    (500, 500, 2000)
    """

    kind: str = "none"
    latent_dim: int = 10
    hidden_dims: tuple[int, ...] = (500, 500, 2000)
    noise: float = 0.0
    augment: float = 0.0
    pretrain_epochs: int = 50
    pretrain_batch_size: int = 1024
    pretrain_lr: float = 0.002
    weight_decay: float = 0.0005
    weights: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", tuple(int(width) for width in self.hidden_dims))
        if self.kind not in KINDS:
            raise ValueError(f"model.features.kind must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if self.latent_dim < 1:
            raise ValueError(f"model.features.latent_dim must be at least 1, not {self.latent_dim}.")
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(
                "model.features.hidden_dims must list one or more positive widths, "
                f"not {list(self.hidden_dims)}."
            )
        if self.pretrain_batch_size < 2:
            raise ValueError(
                "model.features.pretrain_batch_size must be at least 2, since batch normalisation needs "
                f"two rows, not {self.pretrain_batch_size}."
            )
        if self.pretrain_lr <= 0:
            raise ValueError(f"model.features.pretrain_lr must be above 0, not {self.pretrain_lr}.")
        for key in ("noise", "augment", "pretrain_epochs", "weight_decay"):
            if getattr(self, key) < 0:
                raise ValueError(f"model.features.{key} must not be negative, not {getattr(self, key)}.")


class DenseAutoencoder(nn.Module):
    """Map rows to codes and back by two mirrored stacks of linear, ReLU and BatchNorm layers.

    The first layer has no BatchNorm, the output is linear alone, and the code has ReLU and BatchNorm too, as
    in the authors' weight files, whose names of layers (`encoder.linear0`, `encoder.bn1`, ...) are these.

    >>> code_BL, reconstruction_BD = DenseAutoencoder(6, hidden_dims=(5, 4), latent_dim=2)(torch.zeros(3, 6))
    >>> tuple(code_BL.shape), tuple(reconstruction_BD.shape)
    ((3, 2), (3, 6))
    """

    def __init__(
        self, num_dims: int, hidden_dims: Sequence[int] = (500, 500, 2000), latent_dim: int = 10
    ) -> None:
        super().__init__()
        self.num_dims, self.latent_dim = num_dims, latent_dim
        widths = [num_dims, *hidden_dims, latent_dim]
        self.encoder = _stack(widths, without_bn=0, linear_last=False)
        self.decoder = _stack(widths[::-1], without_bn=None, linear_last=True)

    def encode(self, x_BD: Tensor) -> Tensor:
        """Give the codes (B, L) of rows (B, D)."""
        return self.encoder(x_BD)

    def decode(self, code_BL: Tensor) -> Tensor:
        """Give the rows (B, D) that codes (B, L) stand for."""
        return self.decoder(code_BL)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Give the codes (B, L) and the reconstructions (B, D) of rows (B, D)."""
        code_BL = self.encode(x_BD)
        return code_BL, self.decode(code_BL)


def _stack(widths: Sequence[int], without_bn: int | None, linear_last: bool) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    last = len(widths) - 2
    for index, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        layers[f"linear{index}"] = nn.Linear(width_in, width_out)
        if linear_last and index == last:
            break
        layers[f"relu{index}"] = nn.ReLU()
        if index != without_bn:
            layers[f"bn{index}"] = nn.BatchNorm1d(width_out)
    return nn.Sequential(layers)


class ConvAutoencoder(nn.Module):
    """Map small images, given as flat rows, to codes and back by one convolution with pooling.

    Forth: convolution 5 x 5 to 32 channels, BatchNorm, ReLU, max-pooling by 2, linear. Back: linear,
    un-pooling to the cells the maxima came from, ReLU, BatchNorm, transposed convolution 5 x 5.

    Raises:
        ValueError: images too small for the convolution and the pooling.

    >>> code_BL, reconstruction_BD = ConvAutoencoder((1, 16, 16), latent_dim=10)(torch.zeros(3, 256))
    >>> tuple(code_BL.shape), tuple(reconstruction_BD.shape)
    ((3, 10), (3, 256))
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int = 10) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape[1:]) < KERNEL + 1:
            raise ValueError(
                "model.features.kind=conv needs images of at least 6 x 6 pixels, given as channels, height "
                f"and width, not {tuple(image_shape)}; take model.features.kind=dense."
            )
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.num_dims, self.latent_dim = channels * height * width, latent_dim
        self.map_size = (height - KERNEL + 1, width - KERNEL + 1)
        self.pooled_shape = (FILTERS, self.map_size[0] // 2, self.map_size[1] // 2)
        pooled = FILTERS * self.pooled_shape[1] * self.pooled_shape[2]
        self.encoder_conv = nn.Conv2d(channels, FILTERS, KERNEL)
        self.encoder_bn = nn.BatchNorm2d(FILTERS)
        self.encoder_linear = nn.Linear(pooled, latent_dim)
        self.decoder_linear = nn.Linear(latent_dim, pooled)
        self.decoder_bn = nn.BatchNorm2d(FILTERS)
        self.decoder_conv = nn.ConvTranspose2d(FILTERS, channels, KERNEL)

    def encode(self, x_BD: Tensor) -> Tensor:
        """Give the codes (B, L) of flat images (B, C * H * W)."""
        return self._pool(x_BD)[0]

    def decode(self, code_BL: Tensor, cells_BFPP: Tensor | None = None) -> Tensor:
        """Give the flat images (B, C * H * W) that codes (B, L) stand for.

        `cells_BFPP` says for each pooled cell which pixel of its 2 x 2 window the maximum came from, as a
        flat index. Codes that come from no image, such as centres of clusters, have none: then it is the
        upper left one.
        """
        pooled_BFPP = self.decoder_linear(code_BL).unflatten(1, self.pooled_shape)
        if cells_BFPP is None:
            rows = 2 * torch.arange(self.pooled_shape[1], device=code_BL.device)
            columns = 2 * torch.arange(self.pooled_shape[2], device=code_BL.device)
            cells_BFPP = (rows[:, None] * self.map_size[1] + columns).expand_as(pooled_BFPP)
        map_BFHW = nn.functional.max_unpool2d(pooled_BFPP, cells_BFPP, [2, 2], output_size=self.map_size)
        return self.decoder_conv(self.decoder_bn(map_BFHW.relu())).flatten(1)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Give the codes (B, L) and the reconstructions (B, C * H * W) of flat images (B, C * H * W)."""
        code_BL, cells_BFPP = self._pool(x_BD)
        return code_BL, self.decode(code_BL, cells_BFPP)

    def _pool(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        map_BFHW = self.encoder_bn(self.encoder_conv(x_BD.unflatten(1, self.image_shape))).relu()
        pooled_BFPP, cells_BFPP = nn.functional.max_pool2d(map_BFHW, 2, return_indices=True)
        return self.encoder_linear(pooled_BFPP.flatten(1)), cells_BFPP


Autoencoder = DenseAutoencoder | ConvAutoencoder


def build_autoencoder(
    settings: FeaturesSettings,
    num_dims: int,
    image_shape: Sequence[int] | None = None,
    with_weights: bool = True,
) -> Autoencoder:
    """Make the autoencoder of some settings, `with_weights` with its weight file loaded where one is set.

    Raises:
        ValueError: kind "none", a convolution or an augmentation of rows that are not images, or a weight
            file that does not fit.

    >>> settings = FeaturesSettings(kind="dense", hidden_dims=(8,), latent_dim=2)
    >>> build_autoencoder(settings, num_dims=5).latent_dim
    2
    """
    model: Autoencoder
    if settings.augment > 0 and image_shape is None:
        raise ValueError("model.features.augment needs a data set of images; set it to 0.")
    if settings.kind == "dense":
        model = DenseAutoencoder(num_dims, settings.hidden_dims, settings.latent_dim)
    elif settings.kind == "conv":
        if image_shape is None:
            raise ValueError(
                "model.features.kind=conv needs a data set of images; take model.features.kind=dense."
            )
        model = ConvAutoencoder(image_shape, settings.latent_dim)
    else:
        raise ValueError("model.features.kind=none has no autoencoder; set it to dense or conv.")
    if with_weights and settings.weights is not None:
        load_published_weights(model, settings.weights)
    return model


def reconstruction_loss(x_BD: Tensor, reconstruction_BD: Tensor) -> Tensor:
    """Sum the squared error over the batch: `sum_i ||x_i - xhat_i||^2`, a scalar.

    >>> reconstruction_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
    6.0
    """
    return (x_BD - reconstruction_BD).square().sum()


def denoising_loss(
    model: Autoencoder,
    x_BD: Tensor,
    noise: float,
    generator: torch.Generator | None = None,
    augment: float = 0.0,
    image_shape: Sequence[int] | None = None,
) -> Tensor:
    """Sum the squared error between clean rows (B, D) and the reconstructions of disturbed ones.

    `noise` is the standard deviation of the Gaussian noise; 0 adds none. `augment` is the strength with which
    images of `image_shape` are moved first; since the target stays where it was, a code has to leave out
    where and how slanted the image is. The generator lives on the CPU, so that both are the same on every
    device.

    >>> denoising_loss(DenseAutoencoder(4, (3,), 2), torch.zeros(5, 4), noise=0.1).shape
    torch.Size([])
    """
    input_BD = x_BD
    if augment > 0:
        assert image_shape is not None, "build_autoencoder refuses this"
        input_BD = augmented(x_BD, image_shape, augment, generator)
    if noise > 0:
        input_BD = input_BD + noise * torch.randn(x_BD.shape, generator=generator).to(x_BD)
    return reconstruction_loss(x_BD, model(input_BD)[1])


PUBLISHED_CONV_NAMES = {
    "encoder_conv.1.": "encoder_conv.",
    "encoder_conv.2.": "encoder_bn.",
    "encoder_linear.1.": "encoder_linear.",
    "decoder_linear.0.": "decoder_linear.",
    "decoder_conv.1.": "decoder_bn.",
    "decoder_conv.2.": "decoder_conv.",
}


def load_published_weights(model: Autoencoder, path: str | Path) -> None:
    """Load a weight file of the authors' form into an autoencoder.

    The file is a zipped torch state dict whose keys begin with `autoencoder.` or
    `feature_extractor.autoencoder.`; other keys are left alone. It is read without running pickled code, and
    nothing is loaded unless all fits.

    Raises:
        ValueError: no such file, not a state dict, or layers that do not fit, which are named.
    """
    state = _published_state(path)
    if isinstance(model, ConvAutoencoder):
        state = {_our_conv_name(name): tensor for name, tensor in state.items()}
    wanted = model.state_dict()
    faults = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults += [f"{name} is missing" for name in wanted if name not in state]
    faults += [f"{name} is not known here" for name in state if name not in wanted]
    if faults:
        more = f", and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ValueError(
            f"model.features.weights: {path} does not fit the autoencoder: {', '.join(faults[:6])}{more}; "
            "set model.features.kind, hidden_dims and latent_dim to those of the file."
        )
    model.load_state_dict(state)


def save_weights(model: Autoencoder, path: str | Path) -> None:
    """Write an autoencoder's weights in the form that `load_published_weights` reads."""
    torch.save({f"autoencoder.{name}": tensor.cpu() for name, tensor in model.state_dict().items()}, path)


def _published_state(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"model.features.weights: there is no file {path}.")
    unreadable = f"model.features.weights: {path} is not a zipped torch state dict of tensors alone."
    if not zipfile.is_zipfile(path):
        raise ValueError(unreadable)
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise ValueError(unreadable) from error
    state: dict[str, Tensor] = {}
    if isinstance(loaded, Mapping):
        for key, value in loaded.items():
            name = str(key).removeprefix("feature_extractor.")
            if name.startswith("autoencoder.") and isinstance(value, Tensor):
                state[name.removeprefix("autoencoder.")] = value
    if not state:
        raise ValueError(
            f"model.features.weights: {path} holds no keys that begin with autoencoder. or "
            "feature_extractor.autoencoder., so it is not a weight file of an autoencoder."
        )
    return state


def _our_conv_name(name: str) -> str:
    for theirs, ours in PUBLISHED_CONV_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
