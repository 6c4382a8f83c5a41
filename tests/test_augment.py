"""Augmentation: small maps of images, of the generator alone, that leave an image's content as it is."""

import pytest
import torch

from deepdpm.augment import augmented
from deepdpm.autoencoder import DenseAutoencoder, FeaturesSettings, build_autoencoder, features_loss

SHAPE = (2, 12, 10)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(generator: torch.Generator, count: int = 6) -> torch.Tensor:
    return torch.rand(count, 240, generator=generator)


def test_no_strength_changes_nothing(generator: torch.Generator) -> None:
    x_BD = images(generator)
    assert torch.equal(augmented(x_BD, SHAPE, 0.0), x_BD)
    torch.testing.assert_close(augmented(x_BD, SHAPE, 1e-7), x_BD, atol=1e-4, rtol=0)


def test_the_generator_says_how_each_image_is_moved(generator: torch.Generator) -> None:
    x_BD = images(generator, 1).expand(5, -1)
    seeds = (0, 0, 1)
    moved = [augmented(x_BD, SHAPE, 1.0, torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    assert len(moved[0].unique(dim=0)) == 5
    assert moved[0].shape == x_BD.shape


def test_an_even_image_stays_and_no_new_brightness_appears(generator: torch.Generator) -> None:
    even_BD = torch.full((4, 240), -0.4)
    torch.testing.assert_close(augmented(even_BD, SHAPE, 1.0, generator), even_BD)
    x_BD = images(generator)
    moved_BD = augmented(x_BD, SHAPE, 1.0, generator)
    assert x_BD.min() <= moved_BD.min() < moved_BD.max() <= x_BD.max()


def test_a_dot_moves_no_further_than_the_strength_allows(generator: torch.Generator) -> None:
    size = 41
    dot_BHW = torch.zeros(200, size, size)
    dot_BHW[:, 19:22, 19:22] = 1.0
    moved_BHW = augmented(dot_BHW.flatten(1), (1, size, size), 0.5, generator).view_as(dot_BHW)
    place_H = torch.arange(size) - (size - 1) / 2
    for weights_BH in (moved_BHW.sum(1), moved_BHW.sum(2)):
        shift_B = (weights_BH @ place_H) / weights_BH.sum(1)
        # A dot in the middle is moved by the shift alone, which a change of size by a twentieth can lengthen.
        assert 0.5 * 0.05 * size < shift_B.abs().max() < 1.1 * 0.05 * size
        assert shift_B.mean().abs() < 0.3


def test_a_moved_image_is_to_be_put_back(generator: torch.Generator) -> None:
    x_BD = images(generator)
    model = DenseAutoencoder(240, (8,), 3).eval()

    def loss(augment: float) -> float:
        settings = FeaturesSettings(kind="dense", augment=augment)
        return features_loss(model, x_BD, settings, SHAPE, torch.Generator().manual_seed(0))[0].item()

    moved_BD = augmented(x_BD, SHAPE, 0.7, torch.Generator().manual_seed(0))
    assert loss(0.7) == (x_BD - model(moved_BD)[1]).square().sum().item()
    assert loss(0.0) == (x_BD - model(x_BD)[1]).square().sum().item()


def test_rows_that_are_no_images_are_refused() -> None:
    settings = FeaturesSettings(kind="dense", augment=1.0)
    with pytest.raises(ValueError, match=r"model\.features\.augment needs a data set of images"):
        build_autoencoder(settings, num_dims=8)
