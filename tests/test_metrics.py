"""Metrics against scikit-learn and against a matching by hand."""

import itertools
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from deepdpm.metrics import evaluate, silhouette


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "clusters"), [(1, 1), (1, 4), (4, 1), (3, 3), (4, 7), (7, 4), (2, 60)])
def test_metrics_agree_with_scikit_learn(classes: int, clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    true_N, pred_N = rng.integers(classes, size=60), rng.integers(clusters, size=60)
    found = evaluate(true_N, pred_N)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(true_N, pred_N), abs=1e-12)
    assert found["ari"] == pytest.approx(adjusted_rand_score(true_N, pred_N), abs=1e-12)


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1, 2], [3, 1, 1, 7]])
def test_equal_partitions_score_one(labels: list[int]) -> None:
    assert evaluate(labels, [9 - label for label in labels]) == pytest.approx({"nmi": 1, "ari": 1, "acc": 1})


@pytest.mark.parametrize(("classes", "clusters"), [(3, 3), (3, 5), (5, 3)])
def test_accuracy_is_the_best_of_all_matchings(classes: int, clusters: int) -> None:
    rng = np.random.default_rng(classes)
    true_N, pred_N = rng.integers(classes, size=50), rng.integers(clusters, size=50)
    size = max(classes, clusters)
    best = max(np.mean(np.array(names)[pred_N] == true_N) for names in itertools.permutations(range(size)))
    assert evaluate(true_N, pred_N)["acc"] == pytest.approx(best)


def test_a_surplus_cluster_is_an_error() -> None:
    assert evaluate([0] * 4 + [1] * 4, [0] * 4 + [1, 1, 1, 2])["acc"] == 7 / 8


def test_metrics_do_not_depend_on_names_or_order() -> None:
    rng = np.random.default_rng(0)
    true_N, pred_N, order = rng.integers(4, size=99), rng.integers(6, size=99), rng.permutation(99)
    renamed = rng.permutation(6)[pred_N] * 10**9
    assert evaluate(true_N, pred_N) == pytest.approx(evaluate(true_N[order], renamed[order]))


def test_points_without_label_are_left_out() -> None:
    assert evaluate(torch.tensor([0, 1, -1, -1]), torch.tensor([5, 6, 5, 7])) == evaluate([0, 1], [5, 6])
    none = {"nmi": None, "ari": None, "acc": None}
    assert evaluate([-1, -1], [0, 1]) == none
    assert evaluate(None, [0, 1]) == none


def test_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 true labels"):
        evaluate([0, 1, 2], [0, 1])


def test_seventy_thousand_points_take_little_time() -> None:
    rng = np.random.default_rng(0)
    true_N, pred_N = torch.tensor(rng.integers(10, size=70_000)), torch.tensor(rng.integers(200, size=70_000))
    start = time.perf_counter()
    evaluate(true_N, pred_N)
    assert time.perf_counter() - start < 1.0


def test_silhouette_of_all_points_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x_ND, labels_N = rng.normal(size=(80, 3)), rng.integers(3, size=80)
    assert silhouette(x_ND, labels_N) == pytest.approx(silhouette_score(x_ND, labels_N))
    assert silhouette(torch.tensor(x_ND), torch.tensor(labels_N)) == pytest.approx(silhouette(x_ND, labels_N))


def test_silhouette_of_a_sample_is_near_and_reproducible() -> None:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(4, size=5000)
    x_ND = rng.normal(size=(5000, 2)) + 8 * labels_N[:, None]
    whole = silhouette_score(x_ND, labels_N)
    assert silhouette(x_ND, labels_N, sample=500) == pytest.approx(whole, abs=0.03)
    assert silhouette(x_ND, labels_N, sample=500, seed=1) == silhouette(x_ND, labels_N, sample=500, seed=1)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_silhouette_needs_two_clusters_and_one_with_two_points(labels: list[int]) -> None:
    assert silhouette(torch.eye(3), labels) is None
