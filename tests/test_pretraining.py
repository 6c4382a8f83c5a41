"""Pretraining: it learns, its noise belongs to the seed, and codes come from frozen statistics."""

import pytest
import pytorch_lightning as pl
import torch

from deepdpm.autoencoder import DenseAutoencoder, FeaturesSettings, reconstruction_loss
from deepdpm.data import CodesDataModule, Dataset, make_samples
from deepdpm.pretraining import Pretraining, encode_rows

SETTINGS = FeaturesSettings(kind="dense", hidden_dims=(16,), latent_dim=3, pretrain_epochs=5)


def make_data(num_points: int = 129, batch_size: int = 32) -> CodesDataModule:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(num_points, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    return CodesDataModule(Dataset("rows", make_samples(x_ND)), batch_size=batch_size)


def run(settings: FeaturesSettings, data: CodesDataModule, seed: int = 0) -> Pretraining:
    pl.seed_everything(1, verbose=False)
    module = Pretraining(settings, num_dims=8, seed=seed)
    trainer = pl.Trainer(
        max_epochs=settings.pretrain_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


def test_reconstruction_improves_though_the_last_batch_is_a_single_row() -> None:
    data = make_data(num_points=129, batch_size=32)
    x_ND = data.dataset.train.x
    losses = []
    for epochs in (1, 12):
        settings = FeaturesSettings(**{**vars(SETTINGS), "pretrain_epochs": epochs, "pretrain_lr": 0.01})
        model = run(settings, data).autoencoder.eval()
        with torch.inference_mode():
            losses.append(reconstruction_loss(x_ND, model(x_ND)[1]).item())
    assert losses[1] < 0.5 * losses[0]


def test_noise_is_of_the_seed_alone() -> None:
    noisy = FeaturesSettings(**{**vars(SETTINGS), "noise": 0.3, "pretrain_epochs": 1})
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))  # the state of torch's own generator makes no difference
        weights.append(run(noisy, make_data(), seed).autoencoder.state_dict()["encoder.linear0.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_settings_saved_are_plain() -> None:
    module = Pretraining(SETTINGS, num_dims=8, image_shape=(1, 2, 4), seed=3)
    assert dict(module.hparams) == {
        "features": {**vars(SETTINGS), "hidden_dims": [16], "filters": [16, 32, 64]},
        "num_dims": 8,
        "image_shape": [1, 2, 4],
        "seed": 3,
    }
    assert Pretraining(**module.hparams).features == SETTINGS


@pytest.mark.parametrize("training", [True, False])
def test_codes_do_not_depend_on_the_batch(training: bool) -> None:
    model = DenseAutoencoder(8, (16,), 3).train(training)
    x_ND = make_data().dataset.train.x
    codes = [encode_rows(model, x_ND, batch_size) for batch_size in (1, 50, 1000)]
    torch.testing.assert_close(codes[0], codes[1])
    torch.testing.assert_close(codes[0], codes[2])
    assert model.training is training
