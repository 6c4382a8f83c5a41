"""Moves: batched ratios against a loop, plans against what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepdpm.moves import (
    Move,
    MoveSettings,
    accept,
    choose_merges,
    merge_log_ratios,
    nearest_pairs,
    plan_from_labels,
    plan_merges,
    plan_splits,
    split_log_ratios,
)
from deepdpm.priors import NIG, NIW, NormalPrior
from deepdpm.stats import SufficientStats

D, K, ALPHA = 3, 6, 10.0


def make_prior(kind: type[NormalPrior]) -> NormalPrior:
    psi = torch.eye(D).double() if kind is NIW else torch.ones(D).double()
    return kind(torch.zeros(D).double(), kappa=0.01, nu=D + 2.0, psi=psi)


def make_sub_stats() -> SufficientStats:
    generator = torch.Generator().manual_seed(0)
    # Cluster 4 has a half of 3 points, cluster 5 has none at all.
    sizes = torch.tensor([30, 40, 25, 6, 50, 7, 20, 20, 60, 3, 0, 0])
    labels_N = torch.repeat_interleave(torch.arange(2 * K), sizes)
    centres = 4 * torch.randn(2 * K, D, generator=generator)
    return SufficientStats.from_labels(
        torch.randn(len(labels_N), D, generator=generator) + centres[labels_N], labels_N, 2 * K
    )


def log_gamma(count: float) -> float:
    return math.lgamma(count) if count > 0 else 0.0


def loop_ratio(prior: NormalPrior, first: SufficientStats, second: SufficientStats) -> float:
    """Log Hastings ratio of splitting one set into two, term by term."""
    both = first + second
    value = math.log(ALPHA)
    for sign, stats in ((1, first), (1, second), (-1, both)):
        value += sign * (log_gamma(stats.count_K.item()) + prior.log_marginal(stats).item())
    return value


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_split_ratios_are_the_loop(kind: type[NormalPrior]) -> None:
    prior, sub_stats = make_prior(kind), make_sub_stats()
    ratios = split_log_ratios(prior, sub_stats, ALPHA).tolist()
    for k in range(K):
        first, second = sub_stats[2 * k : 2 * k + 1], sub_stats[2 * k + 1 : 2 * k + 2]
        allowed = min(first.count_K.item(), second.count_K.item()) > 5
        expected = loop_ratio(prior, first, second) if allowed else -math.inf
        assert ratios[k] == pytest.approx(expected, abs=1e-8)
    assert ratios[4] == ratios[5] == -math.inf


@pytest.mark.parametrize("kind", [NIW, NIG])
def test_merge_ratios_are_the_loop_and_undo_splits(kind: type[NormalPrior]) -> None:
    prior, stats = make_prior(kind), make_sub_stats()
    pairs_P2 = torch.combinations(torch.arange(2 * K))
    ratios = merge_log_ratios(prior, stats, pairs_P2, ALPHA).tolist()
    for (i, j), ratio in zip(pairs_P2.tolist(), ratios, strict=True):
        if (i, j) == (10, 11):
            assert ratio == math.inf
        else:
            expected = -loop_ratio(prior, stats[i : i + 1], stats[j : j + 1])
            assert ratio == pytest.approx(expected, abs=1e-8)
    splits = split_log_ratios(prior, stats, ALPHA, min_points=0)
    merges = merge_log_ratios(prior, stats, torch.arange(2 * K).view(K, 2), ALPHA)
    torch.testing.assert_close(splits[:5], -merges[:5])


def test_merging_with_an_empty_cluster_counts_its_gamma_as_zero() -> None:
    ratio = merge_log_ratios(make_prior(NIW), make_sub_stats(), torch.tensor([[0, 10]]), ALPHA)
    assert ratio.item() == pytest.approx(-math.log(ALPHA))


def test_ratios_do_not_depend_on_the_order_of_clusters() -> None:
    prior, sub_stats = make_prior(NIW), make_sub_stats()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    moved = sub_stats[(2 * order[:, None] + torch.arange(2)).flatten()]
    ratios = split_log_ratios(prior, sub_stats, ALPHA)
    torch.testing.assert_close(split_log_ratios(prior, moved, ALPHA), ratios[order])


def test_pairs_are_each_centre_with_its_nearest() -> None:
    means_KD = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    expected = set()
    for k in range(9):
        others = sorted(
            (j for j in range(9) if j != k), key=lambda j: (means_KD[k] - means_KD[j]).norm().item()
        )
        expected |= {(min(k, j), max(k, j)) for j in others[:2]}
    assert {tuple(pair) for pair in nearest_pairs(means_KD).tolist()} == expected
    assert len(nearest_pairs(means_KD[:1])) == 0
    assert nearest_pairs(means_KD[:2]).tolist() == [[0, 1]]


def test_coins_follow_the_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.full((20_000,), math.log(0.3), dtype=torch.float64)
    assert accept(ratios, generator).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert accept(torch.tensor([1e-9, math.inf]), generator).all()
    assert not accept(torch.tensor([-math.inf]), generator).any()
    assert not accept(torch.tensor([-math.inf]), generator, probability=1.0).any()
    share = accept(torch.full((20_000,), -1e6), generator, probability=0.7).double().mean().item()
    assert share == pytest.approx(0.7, abs=0.02)


def test_a_cluster_takes_part_in_one_merge() -> None:
    pairs_P2 = torch.tensor([[0, 1], [1, 2], [2, 3], [4, 5]])
    ratios_P = torch.tensor([1.0, 5.0, 2.0, 9.0])
    accepted_P = torch.tensor([True, True, True, False])
    assert choose_merges(pairs_P2, ratios_P, accepted_P) == [(1, 2)]


def test_splits_then_their_merges_restore_ids_and_statistics() -> None:
    sub_stats, ids_K = make_sub_stats(), torch.tensor([4, 0, 7, 2, 9, 5])
    plan = plan_splits(torch.tensor([True, False, True, False, False, False]), ids_K, next_id=10)
    assert plan.ids_K.tolist() == [4, 0, 7, 2, 9, 5, 10, 11]
    assert plan.parents_K.tolist() == [0, 1, 2, 3, 4, 5, 0, 2]
    assert [str(move) for move in plan.moves] == ["split 4 -> 4, 10", "split 7 -> 7, 11"]
    whole = sub_stats.group(torch.arange(2 * K) // 2, K)
    source = torch.tensor([K, 1, K + 4, 3, 4, 5, K + 1, K + 5])
    split = SufficientStats.cat([whole, sub_stats])[source]
    likelier = torch.tensor([1.0] * 6 + [0.0] * 2)
    merged, place = plan_merges([(0, 6), (2, 7)], likelier, plan.ids_K, plan.next_id)
    assert merged.ids_K.tolist() == ids_K.tolist()
    assert merged.fresh_K.tolist() == [True, False, True, False, False, False]
    back = split.group(place, K)
    torch.testing.assert_close(back.outer_KDD, whole.outer_KDD)
    torch.testing.assert_close(back.count_K, whole.count_K)


def contingency_plan(
    old: list[int], new: list[int], ids: list[int]
) -> tuple[list[int], list[int], list[str]]:
    plan = plan_from_labels(
        torch.tensor(old), torch.tensor(new), len(ids), max(new) + 1, torch.tensor(ids), max(ids) + 1
    )
    assert plan.next_id > plan.ids_K.max()
    return plan.parents_K.tolist(), plan.ids_K.tolist(), [str(move) for move in plan.moves]


def test_relabelling_is_no_move() -> None:
    assert contingency_plan([0, 0, 1, 2, 2], [2, 2, 0, 1, 1], [5, 6, 7]) == ([1, 2, 0], [6, 7, 5], [])


def test_a_plan_of_labels_reads_splits_merges_and_removals() -> None:
    # Old 0 goes into new 0, 1 and 2 (1 is the largest); old 1 and 2 into new 3; old 3 owns no point.
    old = [0] * 9 + [1] * 4 + [2] * 2
    new = [0] * 2 + [1] * 4 + [2] * 3 + [3] * 6
    parents, ids, moves = contingency_plan(old, new, [3, 1, 8, 4])
    assert parents == [0, 0, 0, 1]
    assert ids == [9, 3, 10, 1]
    assert moves == ["split 3 -> 3, 9, 10", "remove 4", "merge 1 + 8 -> 1"]


@pytest.mark.parametrize("seed", range(5))
def test_every_plan_of_labels_is_sound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old_M = torch.randint(7, (60,), generator=generator)
    new_M = torch.randint(5, (60,), generator=generator).unique(return_inverse=True)[1]
    ids_K = torch.randperm(20, generator=generator)[:7]
    num_new = int(new_M.max()) + 1
    plan = plan_from_labels(old_M, new_M, 7, num_new, ids_K, 20)
    assert len(set(plan.ids_K.tolist())) == plan.num_clusters == num_new
    kept: Tensor = torch.isin(plan.ids_K, ids_K)
    assert torch.equal(plan.ids_K[kept], ids_K[plan.parents_K[kept]])
    assert (plan.ids_K[~kept] >= 20).all()
    told = {old for move in plan.moves for old in move.parents}
    survivors = set(plan.ids_K.tolist())
    assert set(ids_K.tolist()) - survivors <= told


def test_moves_read_well() -> None:
    assert str(Move("split", (3,), (3, 7))) == "split 3 -> 3, 7"
    assert str(Move("merge", (2, 5), (2,))) == "merge 2 + 5 -> 2"


@pytest.mark.parametrize("key", ["split_prob", "merge_prob"])
def test_probabilities_are_checked(key: str) -> None:
    with pytest.raises(ValueError, match=rf"model.moves.{key} must lie between 0 and 1"):
        MoveSettings(**{key: 1.5})  # type: ignore[arg-type]


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"model.moves.kind must be one of search, published"):
        MoveSettings(kind="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.moves.sample_size must be at least 2"):
        MoveSettings(sample_size=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seeds", 0),
        ("halvings", -1),
        ("min_half", 1),
        ("valleys", (0.9, 1.5)),
        ("caution", -0.1),
        ("caution", float("nan")),
        ("tolerance", -0.1),
        ("clear_valley", -1.0),
    ],
)
def test_settings_of_the_search_are_checked_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"model.moves.{name} must "):
        MoveSettings(**{name: value})
