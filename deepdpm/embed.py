"""`deepdpm-embed`: write the codes of a data set as a folder that `dataset=embeddings` reads."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor

from deepdpm.autoencoder import FeaturesSettings, Kind, Objective, save_weights
from deepdpm.config import config_folder
from deepdpm.cores import use_granted_cores
from deepdpm.data import CodesDataModule, Dataset, Samples, Source
from deepdpm.data.folders import ImageFolder
from deepdpm.data.images import Pixels, RawImages
from deepdpm.features import FrozenFeatures, load_network, pixel_features
from deepdpm.pretraining import Pretraining, encode_rows

Precision = Literal["32-true", "bf16-mixed"]
METHODS = ("autoencoder", "n2d", "pretrained")
PRETRAINING = "pretraining"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input ends it with one sentence and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        embed(options)
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="deepdpm-embed",
        description="Write the codes of a data set as a folder that dataset=embeddings reads.",
        epilog="Example: deepdpm-embed mnist codes/mnist --method n2d --epochs 50",
    )
    parser.add_argument("dataset", help="a configuration in conf/dataset, such as mnist or image_folder")
    parser.add_argument(
        "out", type=Path, help="the folder to write; an interrupted pretraining in it goes on"
    )
    parser.add_argument("overrides", nargs="*", help="settings of the data set, such as dataset.path=images")
    parser.add_argument("--method", choices=METHODS, default="autoencoder")
    parser.add_argument("--seed", type=int, default=0)
    autoencoder = parser.add_argument_group("autoencoder and n2d")
    defaults = FeaturesSettings()
    autoencoder.add_argument("--kind", choices=get_args(Kind)[1:], default="dense")
    autoencoder.add_argument("--latent-dim", type=int, default=defaults.latent_dim)
    autoencoder.add_argument(
        "--hidden-dims",
        type=int,
        nargs="+",
        default=list(defaults.hidden_dims),
        help="widths of --kind dense",
    )
    autoencoder.add_argument(
        "--filters", type=int, nargs="+", default=list(defaults.filters), help="channels of --kind strided"
    )
    autoencoder.add_argument("--objective", choices=get_args(Objective), default=defaults.objective)
    autoencoder.add_argument("--noise", type=float, default=defaults.noise)
    autoencoder.add_argument(
        "--augment", type=float, default=defaults.augment, help="strength of random shifts, turns, ..."
    )
    autoencoder.add_argument(
        "--neighbours",
        type=int,
        default=defaults.neighbours,
        help="nearest neighbours that a walk to a point's partner goes by; 0 for no partners",
    )
    autoencoder.add_argument("--epochs", type=int, default=defaults.pretrain_epochs)
    autoencoder.add_argument("--batch-size", type=int, default=defaults.pretrain_batch_size)
    autoencoder.add_argument("--lr", type=float, default=defaults.pretrain_lr)
    autoencoder.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    autoencoder.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="32-true",
        help="bf16-mixed multiplies matrices in 16 bits: faster where the processor can",
    )
    autoencoder.add_argument(
        "--weights", help="a weight file: of the autoencoder, or of the pretrained network"
    )
    n2d = parser.add_argument_group("n2d")
    n2d.add_argument("--umap-dims", type=int, default=10)
    n2d.add_argument("--umap-neighbours", type=int, default=20)
    pretrained = parser.add_argument_group("pretrained")
    pretrained.add_argument("--network", default="resnet50", help="an architecture of torchvision")
    pretrained.add_argument("--layer", choices=("backbone", "projection"), default="backbone")
    pretrained.add_argument("--image-size", type=int, default=224)
    return parser


def embed(options: argparse.Namespace) -> None:
    """Load the data, compute codes, and write them with the settings they come from.

    Raises:
        ValueError: a setting out of range, data that cannot be read, or a folder that holds codes already.
    """
    out: Path = options.out
    if (out / "train_data.pt").exists():
        raise ValueError(f"{out} holds codes already; choose another folder or delete it.")
    source = load_source(options.dataset, options.overrides)
    if options.method == "pretrained":
        dataset = _pretrained_codes(source, options)
    else:
        dataset = source.load()
        if options.method == "n2d":
            _check_umap(options, len(dataset.train))
        dataset = _autoencoder_codes(dataset, options)
        if options.method == "n2d":
            dataset = umap_codes(dataset, options.umap_dims, options.umap_neighbours, options.seed)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_codes(dataset, out, settings)
    shutil.rmtree(out / PRETRAINING, ignore_errors=True)


def load_source(name: str, overrides: Sequence[str] = ()) -> Source:
    """Make the source that `conf/dataset/<name>.yaml` describes, with overrides like `dataset.path=images`.

    Raises:
        ValueError: no such file, or an override of a setting that it does not have.

    >>> load_source("digits").name
    'digits'
    """
    path = config_folder() / "dataset" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"There is no data set {name}; take one of {known}.")
    settings = OmegaConf.create({"dataset": OmegaConf.load(path)})
    OmegaConf.set_struct(settings, True)
    try:
        settings.merge_with_dotlist(list(overrides))
    except (OmegaConfBaseException, ValueError) as error:
        known = ", ".join(f"dataset.{key}" for key in settings.dataset if key != "_target_")
        raise ValueError(f"{' '.join(overrides)} does not set any of {known}.") from error
    try:
        return instantiate(settings.dataset, _convert_="all")
    except InstantiationException as error:
        raise ValueError(str(error.__cause__ or error)) from error


def write_codes(dataset: Dataset, out: Path, settings: dict[str, Any]) -> None:
    """Write `train_data.pt`, `train_labels.pt` and, where points are held out, the same of `test`.

    The codes of the train part are written last and each file at once, so that a folder with `train_data.pt`
    is whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = {**settings, "name": dataset.name, "class_names": dataset.class_names}
    partial = out / "embed.json.part"
    partial.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    os.replace(partial, out / "embed.json")
    for part, samples in (("test", dataset.test), ("train", dataset.train)):
        if samples is None:
            continue
        if samples.labels is not None:
            _save(samples.labels, out / f"{part}_labels.pt")
        _save(samples.x, out / f"{part}_data.pt")
    print(f"Wrote {len(dataset.train)} codes of {dataset.train.x.shape[1]} dimensions to {out}.")


def _save(tensor: Tensor, path: Path) -> None:
    partial = path.with_suffix(".part")
    torch.save(tensor, partial)
    os.replace(partial, path)


def _mapped(dataset: Dataset, train_ND: Tensor, test_ND: Tensor | None) -> Dataset:
    test = None
    if dataset.test is not None and test_ND is not None:
        test = Samples(test_ND, dataset.test.labels)
    return Dataset(
        dataset.name, Samples(train_ND, dataset.train.labels), test, class_names=dataset.class_names
    )


def _autoencoder_codes(dataset: Dataset, options: argparse.Namespace) -> Dataset:
    """Give the codes of an autoencoder, pretrained here unless its weights are given; keep the weights."""
    features = FeaturesSettings(
        kind=options.kind,
        latent_dim=options.latent_dim,
        hidden_dims=options.hidden_dims,
        filters=options.filters,
        objective=options.objective,
        noise=options.noise,
        augment=options.augment,
        neighbours=options.neighbours,
        pretrain_epochs=options.epochs,
        pretrain_batch_size=options.batch_size,
        pretrain_lr=options.lr,
        weight_decay=options.weight_decay,
        weights=options.weights,
    )
    model = pretrain(dataset, features, options.out, options.seed, options.precision).autoencoder
    partial = options.out / "autoencoder.part"
    partial.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, partial)
    os.replace(partial, options.out / "autoencoder.pt")
    test = None if dataset.test is None else encode_rows(model, dataset.test.x)
    return _mapped(dataset, encode_rows(model, dataset.train.x), test)


def pretrain(
    dataset: Dataset, features: FeaturesSettings, out: Path, seed: int, precision: Precision = "32-true"
) -> Pretraining:
    """Pretrain an autoencoder, from the checkpoint of an interrupted pretraining in `out` if there is one.

    Raises:
        ValueError: a checkpoint of other settings.
    """
    pl.seed_everything(seed, verbose=False)
    data = CodesDataModule(dataset, batch_size=features.pretrain_batch_size, seed=seed)
    module = Pretraining(features, data.num_dims, dataset.image_shape, seed)
    module.save_hyperparameters({"precision": precision})
    if features.weights is not None or features.pretrain_epochs == 0:
        return module
    checkpoint = out / PRETRAINING / "last.ckpt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["hyper_parameters"]
        changed = sorted(key for key, value in module.hparams.items() if saved.get(key) != value)
        if changed:
            raise ValueError(
                f"{checkpoint} was begun with other settings ({', '.join(changed)}); use the same, or "
                "delete it."
            )
    callbacks: list[Callback] = [
        ModelCheckpoint(checkpoint.parent, "last", enable_version_counter=False),
        TQDMProgressBar(),
    ]
    use_granted_cores()
    trainer = pl.Trainer(
        max_epochs=features.pretrain_epochs,
        callbacks=callbacks,
        logger=False,
        enable_model_summary=False,
        devices=1,
        precision=precision,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory", UserWarning)  # it is the one to go on from
        trainer.fit(module, data, ckpt_path=checkpoint if checkpoint.exists() else None)
    return module


def _pretrained_codes(source: Source, options: argparse.Namespace) -> Dataset:
    """Give the codes of a pretrained network, for images in memory or in a folder."""
    cache, weights = options.out / "shards", options.weights or "torchvision"
    if isinstance(source, FrozenFeatures):
        return source.load()
    if isinstance(source, ImageFolder):
        frozen = FrozenFeatures(
            source.name,
            source.path,
            options.network,
            weights,
            options.layer,
            source.classes,
            options.image_size,
            cache=str(cache),
        )
        return frozen.load()
    if not isinstance(source, RawImages):
        raise ValueError(
            f"--method pretrained needs images, and {source.name} has none; take mnist, fashion_mnist, usps, "
            "stl10, image_folder or image_features."
        )
    network = load_network(options.network, weights, options.layer, options.image_size)

    def codes(part: Pixels) -> Samples:
        return Samples(pixel_features(part.images_NCHW, source.name, network, cache), part.labels_N)

    train, test = source.load_pixels()
    return Dataset(source.name, codes(train), None if test is None else codes(test))


def umap_codes(dataset: Dataset, num_dims: int, neighbours: int, seed: int) -> Dataset:
    """Map codes by UMAP, as "N2D" does (McConville et al., 2020); held-out codes follow the fitted map.

    Raises:
        ValueError: umap-learn is not installed.
    """
    mapper = _umap_class()(
        n_components=num_dims, n_neighbors=neighbours, min_dist=0.0, random_state=seed, n_jobs=1, verbose=True
    )
    train_ND = torch.from_numpy(mapper.fit_transform(dataset.train.x.numpy()))
    test = dataset.test
    return _mapped(
        dataset,
        train_ND.float(),
        None if test is None else torch.from_numpy(mapper.transform(test.x.numpy())).float(),
    )


def _check_umap(options: argparse.Namespace, num_points: int) -> None:
    """Find faults before the pretraining, which may take hours, and not after it."""
    _umap_class()
    if options.umap_dims < 1:
        raise ValueError(f"--umap-dims must be at least 1, not {options.umap_dims}.")
    if not 2 <= options.umap_neighbours < num_points:
        raise ValueError(
            f"--umap-neighbours must be at least 2 and below the number of points, {num_points}, "
            f"not {options.umap_neighbours}."
        )


def _umap_class() -> Any:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ValueError(
            '--method n2d needs umap-learn; install it by pip install "deepdpm[embed]".'
        ) from error
    return UMAP


if __name__ == "__main__":
    main()
