"""Partners of points: neighbours are the nearest, and walks keep to them."""

from __future__ import annotations

import pytest
import torch

from deepdpm.autoencoder import DenseAutoencoder, FeaturesSettings, contrast_loss, features_loss
from deepdpm.neighbours import STEPS, Partners, nearest_neighbours


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_neighbours_are_the_nearest_other_points(generator: torch.Generator) -> None:
    x_ND = torch.randn(200, 7, generator=generator)
    distance_NN = torch.cdist(x_ND, x_ND).fill_diagonal_(torch.inf)
    expected = distance_NN.topk(4, largest=False).indices
    assert torch.equal(nearest_neighbours(x_ND, 4), expected)


def test_a_point_is_not_its_own_neighbour_even_beside_copies_of_it() -> None:
    x_ND = torch.tensor([[0.0, 1.0]] * 3 + [[5.0, 5.0]] * 3)
    neighbours_NK = nearest_neighbours(x_ND, 2)
    assert [set(row) for row in neighbours_NK.tolist()] == [{0, 1, 2} - {i} for i in range(3)] + [
        {3, 4, 5} - {i} for i in range(3, 6)
    ]


@pytest.mark.parametrize("num_dims", [2, 60])
def test_points_that_are_all_equal_have_neighbours_too(num_dims: int) -> None:
    neighbours_NK = nearest_neighbours(torch.ones(9, num_dims), 3)
    assert all(i not in row for i, row in enumerate(neighbours_NK.tolist()))


def test_walks_follow_the_neighbours_and_take_each_as_often() -> None:
    partners = Partners(torch.arange(40.0)[:, None], 2)
    ahead_N2 = torch.stack([torch.arange(40) + 1, torch.arange(40) + 2], 1) % 40
    partners.neighbours_NK = ahead_N2
    start_B = torch.zeros(20_000, dtype=torch.long)
    end_B = partners.rows(start_B, torch.Generator().manual_seed(0))[:, 0]
    assert end_B.min() == STEPS
    assert end_B.max() == 2 * STEPS
    assert abs(end_B.mean().item() - 1.5 * STEPS) < 0.05
    assert abs(end_B.var().item() - STEPS / 4) < 0.1


def test_walks_are_of_the_generator_alone(generator: torch.Generator) -> None:
    partners = Partners(torch.randn(50, 2, 3, generator=generator), 3)
    start_B = torch.arange(50)
    rows = [partners.rows(start_B, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert rows[0].shape == (50, 6)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_contrast_takes_its_second_copies_from_the_partners(generator: torch.Generator) -> None:
    x_BD, partner_BD = torch.randn(2, 16, 5, generator=generator)
    model = DenseAutoencoder(5, (6,), 3).eval()
    settings = FeaturesSettings(kind="dense", objective="contrast", neighbours=2)
    loss, reconstruction, code_BL = features_loss(model, x_BD, settings, partner_BD=partner_BD)
    torch.testing.assert_close(code_BL, model.encode(x_BD))
    expected = contrast_loss(model.encode(x_BD), model.encode(partner_BD))
    torch.testing.assert_close(loss - reconstruction, expected)


def test_a_reconstruction_is_of_the_partners(generator: torch.Generator) -> None:
    x_BD, partner_BD = torch.randn(2, 16, 5, generator=generator)
    model = DenseAutoencoder(5, (6,), 3).eval()
    settings = FeaturesSettings(kind="dense", neighbours=2)
    loss, reconstruction, code_BL = features_loss(model, x_BD, settings, partner_BD=partner_BD)
    torch.testing.assert_close(code_BL, model.encode(x_BD))
    expected = (partner_BD - model.decode(model.encode(x_BD))).square().sum()
    torch.testing.assert_close(loss, expected)
    assert loss == reconstruction


def test_neighbours_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"neighbours is 3, but there are only 3 points"):
        Partners(torch.zeros(3, 2), 3)
    with pytest.raises(ValueError, match=r"features\.neighbours"):
        FeaturesSettings(kind="dense", objective="contrast", augment=1, neighbours=-1)
