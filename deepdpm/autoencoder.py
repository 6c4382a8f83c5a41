"""Feature extractors: a dense and two convolutional autoencoders, their losses and their weight files.

Legend: B points in a batch, D dimensions of an input row, L dimensions of a code, C image channels,
H and W image height and width, F filters, P pooled cells.
"""

from __future__ import annotations

import itertools
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepdpm.augment import augmented
from deepdpm.checks import check_choices, check_least, check_positive

Kind = Literal["none", "dense", "conv", "strided"]
Objective = Literal["reconstruction", "contrast"]
FILTERS = 32
KERNEL = 5
STRIDED_DECODER_WIDTH = 256
TEMPERATURE = 0.2


@dataclass(frozen=True)
class FeaturesSettings:
    """Say which autoencoder stands before the clustering, and how it is pretrained.

    `kind` is "none" (the data are codes already), "dense", "conv" or "strided". `hidden_dims` are the widths
    of the dense one between input and code, `filters` the channels of the strided one's convolutions, one
    number for each. `objective` is what the encoder learns by: "reconstruction", or "contrast"
    (`contrast_loss`). `noise` is the standard deviation of the Gaussian noise added to the inputs while it
    learns; `augment` is the strength of the random shifts, turns and the like of images (`deepdpm.augment`),
    which a reconstruction must undo and a contrast must overlook. With `neighbours` above 0 each point has a
    partner, to which a walk along so many nearest neighbours leads (`deepdpm.neighbours`): it is what is to
    be reconstructed, or what the second copy of a contrast is of. `weights` is a weight file; with it nothing
    is pretrained.

    Raises:
        ValueError: a value out of range, naming the setting.

    >>> FeaturesSettings(kind="dense", latent_dim=10).hidden_dims
    (500, 500, 2000)
    """

    kind: Kind = "none"
    latent_dim: int = 10
    hidden_dims: tuple[int, ...] = (500, 500, 2000)
    filters: tuple[int, ...] = (16, 32, 64)
    objective: Objective = "reconstruction"
    noise: float = 0.0
    augment: float = 0.0
    neighbours: int = 0
    pretrain_epochs: int = 50
    pretrain_batch_size: int = 1024
    pretrain_lr: float = 0.002
    weight_decay: float = 0.0005
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_dims", "filters"):
            object.__setattr__(self, name, tuple(int(width) for width in getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"model.features.{name} must list one or more widths, not none.")
        check_choices(self, "model.features")
        # Batch normalisation needs two rows.
        least = {"latent_dim": 1, "hidden_dims": 1, "filters": 1, "pretrain_batch_size": 2}
        zero = ("noise", "augment", "neighbours", "pretrain_epochs", "weight_decay")
        check_least(self, "model.features", least | dict.fromkeys(zero, 0))
        check_positive(self, "model.features", ("pretrain_lr",))
        if self.objective == "contrast" and self.augment == self.noise == self.neighbours == 0:
            raise ValueError(
                "model.features.objective=contrast compares disturbed copies of a point: set "
                "model.features.augment (for images), noise or neighbours above 0."
            )


class _Mirrored(nn.Module):
    """An encoder and a decoder that share nothing but the code."""

    encoder: nn.Sequential
    decoder: nn.Sequential

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


class DenseAutoencoder(_Mirrored):
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


class StridedAutoencoder(_Mirrored):
    """Map small images, given as flat rows, to codes by convolutions, and back by a dense layer.

    Forth: for each of the `filters` a convolution 3 x 3 with stride 2, BatchNorm, ReLU; linear.
    Back: linear to 256, BatchNorm, ReLU, linear.

    >>> code_BL, reconstruction_BD = StridedAutoencoder((1, 9, 7), latent_dim=4)(torch.zeros(3, 63))
    >>> tuple(code_BL.shape), tuple(reconstruction_BD.shape)
    ((3, 4), (3, 63))
    """

    def __init__(
        self, image_shape: Sequence[int], latent_dim: int = 10, filters: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.num_dims, self.latent_dim = channels * height * width, latent_dim
        layers: list[nn.Module] = []
        for filters_out in filters:
            convolution = nn.Conv2d(channels, filters_out, kernel_size=3, stride=2, padding=1)
            layers += [convolution, nn.BatchNorm2d(filters_out), nn.ReLU()]
            channels, height, width = filters_out, math.ceil(height / 2), math.ceil(width / 2)
        code = nn.Linear(channels * height * width, latent_dim)
        self.encoder = nn.Sequential(nn.Unflatten(1, tuple(image_shape)), *layers, nn.Flatten(), code)
        self.encoder.to(memory_format=torch.channels_last)  # else half as slow again on a CPU
        hidden = STRIDED_DECODER_WIDTH
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, self.num_dims),
        )


Autoencoder = DenseAutoencoder | ConvAutoencoder | StridedAutoencoder


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
    if settings.kind == "dense":
        model = DenseAutoencoder(num_dims, settings.hidden_dims, settings.latent_dim)
    elif settings.kind in ("conv", "strided"):
        if image_shape is None:
            raise ValueError(
                f"model.features.kind={settings.kind} needs a data set of images; take "
                "model.features.kind=dense."
            )
        if settings.kind == "conv":
            model = ConvAutoencoder(image_shape, settings.latent_dim)
        else:
            model = StridedAutoencoder(image_shape, settings.latent_dim, settings.filters)
    else:
        raise ValueError("model.features.kind=none has no autoencoder; set it to dense, conv or strided.")
    if settings.augment > 0 and image_shape is None:
        raise ValueError("model.features.augment needs a data set of images; set it to 0.")
    if with_weights and settings.weights is not None:
        load_published_weights(model, settings.weights)
    return model


def reconstruction_loss(x_BD: Tensor, reconstruction_BD: Tensor) -> Tensor:
    """Sum the squared error over the batch: `sum_i ||x_i - xhat_i||^2`, a scalar.

    >>> reconstruction_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
    6.0
    """
    return (x_BD - reconstruction_BD).square().sum()


def contrast_loss(code_BL: Tensor, other_BL: Tensor) -> Tensor:
    """Sum how badly each point is told from the others of its batch by codes of two disturbed copies.

    With `s_ij` the cosine of code i and other code j over a temperature of .2, it is the mean of
    `-sum_i log softmax_j(s_ij)_i` and of the same with the copies exchanged (InfoNCE, van den Oord et al.,
    2018, section 2.3, both ways). Codes come to leave out what the disturbance changes.

    >>> codes = 9.0 * torch.eye(3)
    >>> bool(contrast_loss(codes, codes) < contrast_loss(codes, codes.roll(1, 0)))
    True
    """
    unit_BL, other_unit_BL = (nn.functional.normalize(codes) for codes in (code_BL, other_BL))
    score_BB = unit_BL @ other_unit_BL.T / TEMPERATURE
    itself_B = torch.arange(len(score_BB), device=score_BB.device)
    losses = [
        nn.functional.cross_entropy(scores, itself_B, reduction="sum") for scores in (score_BB, score_BB.T)
    ]
    return 0.5 * (losses[0] + losses[1])


def features_loss(
    model: Autoencoder,
    x_BD: Tensor,
    settings: FeaturesSettings,
    image_shape: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    partner_BD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the loss to minimise and the reconstruction loss, both summed over a batch, and its codes (B, L).

    Rows (B, D) are disturbed as the settings say: images moved, then Gaussian noise added; the codes are
    those of disturbed rows. The clean rows are what is to be reconstructed, or those of the partners (B, D),
    where there are any (generalized autoencoder, Wang et al. 2014). With `objective` "contrast" the encoder
    learns by `contrast_loss` alone, of a copy of the rows and one of the partners, and the decoder follows.
    The generator lives on the CPU, so that the disturbance is the same on every device.

    >>> settings = FeaturesSettings(kind="dense", noise=0.1)
    >>> model = DenseAutoencoder(4, (3,), 2)
    >>> loss, reconstruction, code_BL = features_loss(model, torch.zeros(5, 4), settings)
    >>> bool(loss == reconstruction), tuple(code_BL.shape)
    (True, (5, 2))
    """

    def disturbed(input_BD: Tensor) -> Tensor:
        if settings.augment > 0:
            assert image_shape is not None, "build_autoencoder refuses this"
            input_BD = augmented(input_BD, image_shape, settings.augment, generator)
        if settings.noise > 0:
            noise_BD = settings.noise * torch.randn(x_BD.shape, generator=generator)
            input_BD = input_BD + noise_BD.to(x_BD)
        return input_BD

    # Layers may work in 16 bits (Lightning's precision=bf16-mixed); losses and clusters do not.
    other_BD = x_BD if partner_BD is None else partner_BD
    if settings.objective == "reconstruction":
        code_BL, reconstruction_BD = (output.to(x_BD) for output in model(disturbed(x_BD)))
        loss = reconstruction_loss(other_BD, reconstruction_BD)
        return loss, loss, code_BL
    code_BL, other_BL = (model.encode(disturbed(row_BD)).to(x_BD) for row_BD in (x_BD, other_BD))
    reconstruction = reconstruction_loss(x_BD, model.decode(code_BL.detach()))
    with torch.autocast(x_BD.device.type, enabled=False):
        return contrast_loss(code_BL, other_BL) + reconstruction, reconstruction, code_BL


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
            "set model.features.kind, hidden_dims or filters, and latent_dim to those of the file."
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
