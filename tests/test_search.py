"""The search: Gaussian clusters are found exactly, curved and heavy-tailed ones are left whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepdpm.metrics import evaluate
from deepdpm.moves import MoveSettings
from deepdpm.priors import NormalPrior, PriorSettings
from deepdpm.search import search
from deepdpm.stats import SufficientStats


def found(x_MD: Tensor, seed: int = 0, settings: MoveSettings | None = None) -> tuple[Tensor, NormalPrior]:
    one_M = torch.zeros(len(x_MD), dtype=torch.long)
    prior = PriorSettings().make(SufficientStats.from_labels(x_MD, one_M, 1))
    generator = torch.Generator().manual_seed(seed)
    return search(x_MD, one_M, prior, settings or MoveSettings(), generator)


def blobs(num_clusters: int, num_dims: int, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussians on a grid whose neighbours are 8 standard deviations apart."""
    generator = torch.Generator().manual_seed(seed)
    labels_M = torch.arange(num_clusters).repeat_interleave(each)
    side = int(num_clusters**0.5 + 0.999)
    centres_KD = torch.zeros(num_clusters, num_dims)
    centres_KD[:, 0] = torch.arange(num_clusters) % side
    centres_KD[:, 1] = torch.arange(num_clusters) // side
    noise_MD = torch.randn(len(labels_M), num_dims, generator=generator)
    return 8 * centres_KD[labels_M] + noise_MD, labels_M


@pytest.mark.parametrize(
    ("num_clusters", "num_dims", "each"), [(2, 2, 100), (9, 2, 100), (12, 8, 80), (30, 3, 40)]
)
def test_gaussians_are_found_exactly(num_clusters: int, num_dims: int, each: int) -> None:
    x_MD, truth_M = blobs(num_clusters, num_dims, each)
    labels_M, _ = found(x_MD)
    assert labels_M.max().item() + 1 == num_clusters
    assert evaluate(truth_M, labels_M)["acc"] > 0.99


@pytest.mark.parametrize("shape", ["gaussian", "student", "skewed", "box"])
def test_one_cluster_of_any_shape_is_left_whole(shape: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x_MD = torch.randn(1500, 3, generator=generator)
    if shape == "student":
        freedom = torch.randn(1500, 5, generator=generator).square().mean(1, keepdim=True)
        x_MD = x_MD / freedom.sqrt()
    if shape == "skewed":
        x_MD = (0.4 * x_MD).exp()
    if shape == "box":
        x_MD = torch.rand(1500, 3, generator=generator)
    assert found(x_MD)[0].max().item() == 0


def test_curved_clusters_are_not_cut() -> None:
    x_MD, truth_M = blobs(6, 4, 250)
    bent_MD = x_MD.clone()
    bent_MD[:, 2] += 0.8 * (x_MD[:, 3].square() - 1)
    labels_M, _ = found(bent_MD)
    assert evaluate(truth_M, labels_M)["nmi"] > 0.97


def test_overlapping_gaussians_come_back_from_the_halves_and_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    truth_M = torch.arange(3600) % 9
    centres_MD = 3.4 * torch.stack([truth_M % 3, truth_M // 3], 1)
    x_MD = centres_MD + torch.randn(3600, 2, generator=generator)
    assert found(x_MD)[0].max().item() + 1 == 9


def test_the_same_coins_give_the_same_clusters() -> None:
    x_MD, _ = blobs(5, 2, 60)
    assert torch.equal(found(x_MD, seed=7)[0], found(x_MD, seed=7)[0])


def test_later_searches_leave_a_good_partition_and_cut_a_bad_one() -> None:
    x_MD, truth_M = blobs(4, 2, 200)
    labels_M, prior = found(x_MD)
    again_M, prior = search(x_MD, labels_M, prior, MoveSettings(), torch.Generator(), first=False)
    assert evaluate(labels_M, again_M)["ari"] == 1
    joined_M, _ = search(x_MD, labels_M // 2, prior, MoveSettings(), torch.Generator(), first=False)
    assert evaluate(truth_M, joined_M)["ari"] > 0.99


@pytest.mark.parametrize("num_points", [2, 3, 9, 40])
def test_tiny_samples_run(num_points: int) -> None:
    labels_M, _ = found(torch.randn(num_points, 2, generator=torch.Generator().manual_seed(0)))
    assert labels_M.shape == (num_points,)
    assert labels_M.min() == 0


def test_duplicates_constants_and_lines_run() -> None:
    x_MD = torch.zeros(200, 3)
    x_MD[:, 0] = torch.arange(200) // 100 * 5.0
    labels_M, _ = found(x_MD)
    assert labels_M[:100].unique().numel() == 1
    line_MD = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 3)
    assert found(line_MD)[0].shape == (300,)
