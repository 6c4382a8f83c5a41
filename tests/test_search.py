"""The search: Gaussian clusters are found exactly, curved and heavy-tailed ones are left whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deepdpm.partition as partition_module
import deepdpm.search as search_module
from deepdpm.metrics import evaluate
from deepdpm.mixture import Mixture
from deepdpm.moves import MoveSettings
from deepdpm.partition import (
    Partition,
    coarsened,
    evidence,
    expectation_maximisation,
    finest,
    merged,
    pieces,
    satellites,
    without_satellites,
)
from deepdpm.priors import NormalPrior, PriorSettings, fit_empirical_bayes
from deepdpm.search import _agreement, _believed, _coarser, _suffices, _typical, _worth, revise, search
from deepdpm.stats import SufficientStats, squared_spacing


def found(x_MD: Tensor, seed: int = 0, settings: MoveSettings | None = None) -> tuple[Tensor, NormalPrior]:
    one_M = torch.zeros(len(x_MD), dtype=torch.long)
    prior = PriorSettings().make(SufficientStats.from_labels(x_MD, one_M, 1))
    generator = torch.Generator().manual_seed(seed)
    _, labels_M, prior = search(lambda _: x_MD, len(x_MD), prior, settings or MoveSettings(), generator)
    return labels_M, prior


def revised(x_MD: Tensor, labels_M: Tensor, prior: NormalPrior) -> tuple[Tensor, NormalPrior]:
    return revise(x_MD, labels_M, prior, MoveSettings(), torch.Generator())


def blobs(
    num_clusters: int, num_dims: int, each: int, seed: int = 0, gap: float = 8.0
) -> tuple[Tensor, Tensor]:
    """Gaussians on a grid whose neighbours are so many standard deviations apart."""
    generator = torch.Generator().manual_seed(seed)
    labels_M = torch.arange(num_clusters).repeat_interleave(each)
    side = int(num_clusters**0.5 + 0.999)
    centres_KD = torch.zeros(num_clusters, num_dims)
    centres_KD[:, 0] = torch.arange(num_clusters) % side
    centres_KD[:, 1] = torch.arange(num_clusters) // side
    noise_MD = torch.randn(len(labels_M), num_dims, generator=generator)
    return gap * centres_KD[labels_M] + noise_MD, labels_M


@pytest.mark.parametrize(
    ("num_clusters", "num_dims", "each"), [(2, 2, 100), (9, 2, 100), (12, 8, 80), (30, 3, 40)]
)
def test_gaussians_are_found_exactly(num_clusters: int, num_dims: int, each: int) -> None:
    x_MD, truth_M = blobs(num_clusters, num_dims, each)
    labels_M, _ = found(x_MD)
    assert labels_M.max().item() + 1 == num_clusters
    assert evaluate(truth_M, labels_M)["acc"] > 0.99


@pytest.mark.parametrize("dof", [2, 4])
def test_heavy_tailed_clusters_are_found_exactly(dof: int) -> None:
    x_MD, truth_M = blobs(6, 4, 150)
    u_M1 = (
        torch.randn(len(x_MD), dof, generator=torch.Generator().manual_seed(1)).square().mean(1, keepdim=True)
    )
    centres_KD = torch.stack([x_MD[truth_M == k].mean(0) for k in range(6)])
    x_MD = centres_KD[truth_M] + (x_MD - centres_KD[truth_M]) / u_M1.sqrt()
    labels_M, prior = found(x_MD)
    assert labels_M.max().item() + 1 == 6
    assert abs(prior.tail_dof - dof) <= 1
    nearest_M = torch.cdist(x_MD, centres_KD).argmin(1)
    assert evaluate(truth_M, labels_M)["acc"] > evaluate(truth_M, nearest_M)["acc"] - 0.01


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
    centres_MD = 3.6 * torch.stack([truth_M % 3, truth_M // 3], 1)
    x_MD = centres_MD + torch.randn(3600, 2, generator=generator)
    assert found(x_MD)[0].max().item() + 1 == 9


def test_giving_up_what_cannot_be_believed_any_more_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lines of clusters in a haze: the deeper valleys join all of them, one by one.
    blobs_MD, _ = blobs(30, 2, 60)
    haze_MD = 45 * torch.rand(600, 2, generator=torch.Generator().manual_seed(2))
    x_MD = torch.cat([blobs_MD, haze_MD])
    merges, counted = [], partition_module.merged
    monkeypatch.setattr(
        "deepdpm.partition.merged", lambda *args, **kwargs: (merges.append(1), counted(*args, **kwargs))[1]
    )
    early_M, early = found(x_MD)[0], len(merges)
    monkeypatch.setattr("deepdpm.search._least_entropies", lambda step, _: [-math.inf] * len(step))
    assert torch.equal(found(x_MD)[0], early_M)
    assert early < len(merges) - early


def test_clusters_that_blur_into_each_other_are_merged_in_steps_that_leave_half() -> None:
    x_MD = (0.8 * torch.randn(2000, 3, generator=torch.Generator().manual_seed(4))).exp()
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(2000, 1)))
    settings, coins, never = MoveSettings(), torch.Generator().manual_seed(0), -float("inf")
    parts = (x_MD, x_MD[:1000], x_MD[1000:])
    step = [finest(pieces(x_BD, prior, settings, coins)) for x_BD in parts]
    at_once = coarsened(step[0], 0.9, never, fewest=0)
    sizes, ended = [step[0].num_clusters], False
    while not ended:
        before, (step, ended) = step, _coarser(step, 0.9, [never] * 3)
        sizes.append(step[0].num_clusters)
        # The round that reaches the limit may merge a quarter more.
        assert sizes[-1] >= int(3 / 8 * sizes[-2])
        for half, earlier in zip(step[1:], before[1:], strict=True):
            assert half.num_clusters >= min(earlier.num_clusters, int(3 / 8 * sizes[-1]))
    assert len(sizes) > 3
    assert torch.equal(step[0].labels_M, at_once.labels_M)


def test_a_round_makes_one_merge_for_every_16_clusters_if_so_many_are_possible() -> None:
    x_MD, truth_M = blobs(36, 2, 20)
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(len(x_MD), 1)))
    partition = expectation_maximisation(x_MD, truth_M, prior, 1)
    apart_P2, touching_P2 = torch.arange(12).view(6, 2), torch.tensor([[0, 1], [0, 2], [0, 3]])
    for pairs_P2, share, expected in ((apart_P2, 0.01, 34), (apart_P2, 0.5, 33), (touching_P2, 0.5, 35)):
        score_P = torch.arange(len(pairs_P2)).double()
        assert merged(partition, pairs_P2, score_P, share).num_clusters == expected


def test_sample_and_centres_are_doubled_until_centres_are_enough() -> None:
    x_ND, truth_N = blobs(30, 2, 400)
    order_N = torch.randperm(12_000, generator=torch.Generator().manual_seed(1))
    prior = PriorSettings().make(SufficientStats.from_weights(x_ND, torch.ones(12_000, 1)))
    asked = []

    def draw(most: int) -> Tensor:
        asked.append(most)
        return x_ND[order_N[:most]]

    settings, coins = MoveSettings(seeds=16, sample_size=1500), torch.Generator().manual_seed(0)
    sample_MD, labels_M, _ = search(draw, 12_000, prior, settings, coins)
    assert asked[:2] == [1500, 3000]
    assert asked[-1] == len(sample_MD) < 12_000
    assert evaluate(truth_N[order_N[: asked[-1]]], labels_M)["acc"] > 0.99


def test_a_doubled_sample_is_halved_in_half_as_many_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, _ = blobs(30, 2, 400)
    order_N = torch.randperm(12_000, generator=torch.Generator().manual_seed(1))
    prior = PriorSettings().make(SufficientStats.from_weights(x_ND, torch.ones(12_000, 1)))
    sizes = []

    def recorded(x_MD: Tensor, *others: Any) -> Partition:
        sizes.append(len(x_MD))
        return pieces(x_MD, *others)

    monkeypatch.setattr(search_module, "pieces", recorded)
    settings, coins = MoveSettings(seeds=16, sample_size=1500, halvings=5), torch.Generator().manual_seed(0)
    sample_MD, _, _ = search(lambda most: x_ND[order_N[:most]], 12_000, prior, settings, coins)
    doublings = round(math.log2(len(sample_MD) / 1500))
    assert doublings == 2
    halvings = 2  # 5, 3, 2
    assert sizes == [1500, 3000, 6000] + 2 * halvings * [3000]


def test_neighbours_are_those_that_all_responsibilities_give() -> None:
    x_MD, truth_M = blobs(25, 3, 40)
    coins = torch.Generator().manual_seed(5)
    x_MD = x_MD + 2.5 * torch.randn(x_MD.shape, generator=coins)
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(len(x_MD), 1)))
    partition = expectation_maximisation(x_MD, truth_M, prior, 3)
    r_MK = partition.log_joint_MK.double().softmax(1)
    shared_KK = r_MK.T @ r_MK
    shared_KK = shared_KK / shared_KK.diagonal().sqrt()[:, None] / shared_KK.diagonal().sqrt()
    offered = {tuple(pair) for pair in partition.neighbours_P2.tolist()}
    for k, row in enumerate(shared_KK.fill_diagonal_(-1).tolist()):
        for partner in sorted(range(len(row)), key=row.__getitem__)[-4:]:
            assert (min(k, partner), max(k, partner)) in offered


def test_where_all_points_are_in_the_sample_centres_are_not_doubled() -> None:
    x_MD, _ = blobs(30, 2, 60)
    assert found(x_MD, settings=MoveSettings(seeds=8))[0].max().item() + 1 <= 8


def test_the_same_coins_give_the_same_clusters() -> None:
    x_MD, _ = blobs(5, 2, 60)
    assert torch.equal(found(x_MD, seed=7)[0], found(x_MD, seed=7)[0])


def test_later_searches_leave_a_good_partition_and_cut_a_bad_one() -> None:
    x_MD, truth_M = blobs(4, 2, 200)
    labels_M, prior = found(x_MD)
    again_M, prior = revised(x_MD, labels_M, prior)
    assert evaluate(labels_M, again_M)["ari"] == 1
    joined_M, _ = revised(x_MD, labels_M // 2, prior)
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


def with_clump(each: int, radius: float, distance: float) -> tuple[Tensor, Tensor]:
    """Two far Gaussians of 600 points, and a third cluster beside the first."""
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(1200 + each, 3, generator=generator)
    labels_M = torch.cat([torch.zeros(600), torch.ones(600), torch.full((each,), 2.0)]).long()
    x_MD[600:1200, 0] += 40
    x_MD[1200:] *= radius
    x_MD[1200:, 1] += distance
    return x_MD, labels_M


@pytest.mark.parametrize(
    ("each", "radius", "distance", "joined"),
    [(60, 0.15, 5.0, True), (60, 1.0, 8.0, False), (300, 0.15, 5.0, False), (60, 0.15, 15.0, False)],
    ids=["a satellite", "as wide as others", "large", "far"],
)
def test_satellites_are_small_compact_and_near(
    each: int, radius: float, distance: float, joined: bool
) -> None:
    x_MD, labels_M = with_clump(each, radius, distance)
    prior = PriorSettings().make(SufficientStats.from_labels(x_MD, 0 * labels_M, 1))
    partition = expectation_maximisation(x_MD, labels_M, prior, 1)
    assert partition.num_clusters == 3
    pairs_P2 = torch.tensor([[0, 1], [0, 2], [1, 2]])
    assert satellites(partition, pairs_P2).tolist() == [False, joined, False]
    assert without_satellites(partition).num_clusters == (2 if joined else 3)


def test_a_search_joins_a_satellite_and_later_searches_leave_it() -> None:
    x_MD, _ = with_clump(60, 0.15, 5.0)
    labels_M, prior = found(x_MD)
    assert labels_M.max() == 1
    again_M, _ = revised(x_MD, labels_M, prior)
    assert evaluate(labels_M, again_M)["ari"] == 1


def test_caution_decides_whether_pieces_that_wander_are_believed() -> None:
    # Evidence cuts one skewed cluster into pieces, whose borders lie anywhere.
    skewed_MD = (0.6 * torch.randn(1500, 3, generator=torch.Generator().manual_seed(3))).exp()
    bold, careful = (
        found(skewed_MD, settings=MoveSettings(caution=caution))[0].max() for caution in (0.0, 1.5)
    )
    assert bold > 2
    assert careful == 0


def test_what_nothing_confirms_is_weighed_by_what_it_says() -> None:
    x_MD = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(2000, 1)))

    def cut(dim: int, quantile: float) -> Partition:
        # Two Gaussians as far apart as the cube is wide: each takes one side of the cut.
        place, away = x_MD[:, dim].quantile(quantile), torch.eye(2)[dim]
        means_KD = torch.stack([(place + 1) * away, (place - 1) * away]).double()
        mixture = Mixture(torch.ones(2) / 2, means_KD, torch.eye(2).double().expand(2, 2, 2))
        log_joint_MK = mixture.log_joint_NK(x_MD)
        return Partition(x_MD, log_joint_MK.argmax(1), mixture, prior, log_joint_MK)

    even = [cut(0, 0.5), cut(1, 0.5), cut(1, 0.5)]
    crumbs = [cut(0, 0.03), cut(1, 0.03), cut(1, 0.03)]
    one, two = expectation_maximisation(x_MD, torch.zeros(2000).long(), prior, 1), cut(0, 0.5)
    assert _agreement(even, 1.5) < _agreement(crumbs, 1.5) < 0
    assert _worth(crumbs, 1.5) == pytest.approx(_worth(even, 1.5), rel=0.1)
    assert _worth([two, two, two], 1.5) == _agreement([two, two, two], 1.5) > 0
    assert _worth([one, one, one], 1.5) == 0
    assert _worth([one, two, one], 1.5) == -torch.inf


def test_a_finer_step_has_to_be_confirmed_for_what_it_adds() -> None:
    # Of the .2 nats that the finer one adds, .05 and then .15 are confirmed.
    assert _suffices(0.05, 0.2, 0.1)
    assert not _suffices(0.15, 0.2, 0.2)
    # Forty clusters against four, most of them confirmed: the coarser one hides what is known.
    assert not _suffices(0.6, 2.9, 0.1)
    # EM may raise the entropy of the labels.
    assert _suffices(0.0, -0.01, 0.1)
    assert not _suffices(0.001, -0.01, 0.1)


@pytest.mark.parametrize(("distance", "expected"), [(2.4, 1), (3.8, 2)])
def test_clusters_divided_by_a_deep_valley_do_not_end_as_one(distance: float, expected: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels_M = torch.arange(2000) % 2
    x_MD = torch.randn(2000, 2, generator=generator) + distance * labels_M[:, None] * torch.eye(2)[0]
    # So much caution that nothing is confirmed.
    found_M, _ = found(x_MD, settings=MoveSettings(caution=50.0))
    assert found_M.max() + 1 == expected


@pytest.mark.parametrize("known", [1, 2, 3])
def test_the_evidence_speaks_where_halves_know_a_third_of_the_clusters(
    known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels_M = torch.arange(6).repeat_interleave(400)
    place_K = torch.tensor([0.0, 3.4, 6.8, 10.2, 13.6, 40.0])
    x_MD = torch.randn(2400, 2, generator=torch.Generator().manual_seed(0))
    x_MD[:, 0] += place_K[labels_M]
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(2400, 1)))
    whole = expectation_maximisation(x_MD, labels_M, prior, 2)
    half = expectation_maximisation(
        x_MD[::2], (labels_M[::2] * known).div(6, rounding_mode="floor"), prior, 1
    )
    asked: list[int] = []
    monkeypatch.setattr(search_module, "_worth", lambda step, _: asked.append(len(step)) or _worth(step, 1.5))
    believed = _believed([whole, half, half], MoveSettings())
    assert set(asked) == ({1} if known <= 2 else {3})
    assert known == 3 or believed.num_clusters >= 5


def test_the_evidence_of_a_point_is_the_worth_of_a_sample_alone() -> None:
    x_MD, labels_M = blobs(2, 2, 200)
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(400, 1)))
    two = expectation_maximisation(x_MD, labels_M, prior, 2)
    one = expectation_maximisation(x_MD, torch.zeros(400).long(), prior, 2)
    assert _worth([two], 1.5) == evidence(two) / 400 > _worth([one], 1.5)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_few_points_that_their_halves_cannot_pay_for_stay(seed: int) -> None:
    generator = np.random.default_rng(seed)
    centres_KD = 1.25 * generator.standard_normal((20, 10))
    points = (centres_KD[:, None] + generator.standard_normal((20, 30, 10))).reshape(600, 10)
    x_MD = torch.from_numpy(points).float()
    total = SufficientStats.from_labels(x_MD, torch.zeros(600).long(), 1)
    prior = PriorSettings().make(total, squared_spacing=squared_spacing(x_MD))
    coins = torch.Generator().manual_seed(0)
    _, found_M, _ = search(lambda _: x_MD, 600, prior, MoveSettings(), coins)
    assert evaluate(np.arange(20).repeat(30), found_M)["nmi"] > 0.5


@pytest.mark.parametrize("tails", [4.0, math.inf])
def test_one_cluster_of_few_points_stays_one(tails: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(400, 20, generator=generator)
    if tails < math.inf:
        x_MD /= torch.randn(400, int(tails), generator=generator).square().mean(1, keepdim=True).sqrt()
    assert found(x_MD)[0].max() == 0


@pytest.mark.parametrize(("best", "expected"), [(1.0, 2), (-1.0, 5)])
def test_only_of_steps_that_are_confirmed_a_coarser_one_may_be_a_little_worse(
    best: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_K = torch.tensor([0.0, 3.8, 7.6, 11.4, 40.0])
    x_MD = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    labels_M = torch.arange(5).repeat_interleave(400)
    x_MD[:, 0] += place_K[labels_M]
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(2000, 1)))
    whole, half = (expectation_maximisation(x_MD[::n], labels_M[::n], prior, 2) for n in (1, 2))
    monkeypatch.setattr("deepdpm.search._worth", lambda step, _: best - 0.05 * (step[0].num_clusters < 5))
    monkeypatch.setattr("deepdpm.search._least_entropies", lambda step, _: [-math.inf] * len(step))
    assert _believed([whole, half, half], MoveSettings()).num_clusters == expected


def test_forty_clusters_of_ten_points_are_found() -> None:
    coins = torch.Generator().manual_seed(0)
    labels_M = torch.arange(40).repeat_interleave(10)
    x_MD = torch.randn(40, 12, generator=coins)[labels_M] + 0.6 * torch.randn(400, 12, generator=coins)
    found_M, _ = found(x_MD)
    assert abs(found_M.max().item() + 1 - 40) <= 2
    assert evaluate(labels_M, found_M)["nmi"] > 0.93


@pytest.mark.parametrize(("noise", "pays"), [(0.0, True), (PriorSettings.noise, False)])
def test_differences_far_below_the_spacing_of_points_are_noise(noise: float, pays: bool) -> None:
    x_MD, _ = blobs(1, 2, 400)
    flag_M = torch.arange(400) % 2
    flagged_MD = torch.cat([x_MD, 0.003 * flag_M[:, None]], 1)
    stats = SufficientStats.from_labels(flagged_MD, flag_M, 2)
    settings = PriorSettings(noise=noise)
    prior = settings.make(stats.total(), squared_spacing=squared_spacing(flagged_MD))
    apart, together = fit_empirical_bayes(prior, stats, 5), fit_empirical_bayes(prior, stats.total(), 5)
    gain = apart.log_marginal(stats).sum() - together.log_marginal(stats.total()).sum()
    assert bool(gain > 100) == pays


@pytest.mark.parametrize("apart", [0.0, 0.5, 2.0])
def test_evidence_is_below_the_sum_over_all_labels(apart: float) -> None:
    coins = torch.Generator().manual_seed(3)
    x_MD = torch.randn(8, 2, generator=coins).double()
    x_MD[4:, 0] += apart
    one = SufficientStats.from_weights(x_MD, torch.ones(8, 1).double())
    prior = PriorSettings().make(one)
    partition = expectation_maximisation(x_MD, torch.tensor([0] * 4 + [1] * 4), prior, 5)
    assert partition.num_clusters == 2
    weights_MK = partition.log_joint_MK.softmax(1)
    prior = fit_empirical_bayes(partition.prior, SufficientStats.from_weights(x_MD, weights_MK), 2)
    every = []
    for labels in itertools.product((0, 1), repeat=8):
        if 0 < sum(labels) < 8:
            stats = SufficientStats.from_labels(x_MD, torch.tensor(labels), 2)
            weight_K = math.log(prior.alpha) + torch.lgamma(stats.count_K) + prior.log_marginal(stats)
            every.append(weight_K.sum())
    exact = torch.stack(every).logsumexp(0).item()
    assert evidence(partition) < exact
    assert evidence(partition) > max(every).item() - 8 * math.log(2)


def test_evidence_of_clusters_far_apart_is_that_of_their_labels() -> None:
    x_MD, z_M = blobs(3, 2, 50)
    x_MD = x_MD + 40 * z_M[:, None]
    one = SufficientStats.from_weights(x_MD, torch.ones(150, 1))
    partition = expectation_maximisation(x_MD, z_M, PriorSettings(tail_dof=math.inf).make(one), 2)
    stats = SufficientStats.from_labels(x_MD, z_M, 3)
    prior = fit_empirical_bayes(partition.prior, stats, 2)
    weight_K = math.log(prior.alpha) + torch.lgamma(stats.count_K) + prior.log_marginal(stats)
    assert evidence(partition) == pytest.approx(weight_K.sum().item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_two_gaussians_that_overlap_do_not_stay_in_many_pieces(seed: int) -> None:
    coins = torch.Generator().manual_seed(seed)
    x_MD = torch.randn(4000, 2, generator=coins)
    x_MD[:2000] = 1.5 * x_MD[:2000] + torch.tensor([3.5, 2.5])
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(4000, 1)))
    whole = pieces(x_MD, prior, MoveSettings(), coins)
    best = finest(whole)
    assert best.num_clusters == 2
    assert evidence(best) >= evidence(whole)
    assert evidence(finest(best)) == evidence(best)


def cut_in_two(x_MD: Tensor, shift: float) -> Partition:
    """Two Gaussians that meet where the first coordinate is `shift`."""
    labels_M = (x_MD[:, 0] > shift).long()
    prior = PriorSettings().make(SufficientStats.from_weights(x_MD, torch.ones(len(x_MD), 1)))
    means_KD = torch.tensor([[shift - 1, 0.0], [shift + 1, 0.0]]).double()
    mixture = Mixture(torch.ones(2) / 2, means_KD, torch.eye(2).double().expand(2, 2, 2))
    return Partition(x_MD, labels_M, mixture, prior, mixture.log_joint_NK(x_MD))


def test_where_halves_agree_with_each_other_and_not_with_the_sample_one_of_theirs_is_taken() -> None:
    x_MD = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    alone, common, near = (cut_in_two(x_MD, shift) for shift in (0.1, 0.5, 0.51))
    taken = _typical([alone, common, common, near, common], MoveSettings())
    assert torch.equal(taken.x_MD, x_MD)
    # EM goes on from the labels of the one that agrees most with the others.
    expected = expectation_maximisation(x_MD, common.labels_M, common.prior, 8)
    assert torch.equal(taken.labels_M, expected.labels_M)
    # A sample's partition that halves confirm stays, though others agree more; so does one of which nobody
    # knows better, and one without halves.
    assert _typical([near, common, common, common, common], MoveSettings()) is near
    scattered = [cut_in_two(x_MD, shift) for shift in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert _typical(scattered, MoveSettings()) is scattered[0]
    assert _typical([alone], MoveSettings()) is alone


@pytest.mark.parametrize(("seed", "gap"), [(2, 3.0), (3, 3.0), (2, 3.1)])
def test_gaussians_that_blur_into_each_other_do_not_end_as_one(seed: int, gap: float) -> None:
    # No valley is deep, and the halves do not quite confirm the clusters (-.08 nats of 2).
    x_MD, labels_M = blobs(9, 2, 300, seed, gap)
    found_M, _ = found(x_MD)
    assert 8 <= found_M.max() + 1 <= 9
    assert evaluate(labels_M, found_M)["nmi"] > 0.6
