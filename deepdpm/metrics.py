"""How well clusters match known classes (ACC, NMI, ARI), and how well they are apart (silhouette).

Legend: N points, D dimensions, C classes, K clusters.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import silhouette_score
from torch import Tensor

from deepdpm.data.samples import NO_LABEL


def evaluate(labels_true: Any, labels_pred: Any) -> dict[str, float | None]:
    """Score clusters against classes; points whose true label is -1 are left out.

    Args:
        labels_true: (N,) whole numbers, or None.
        labels_pred: (N,) whole numbers.

    Returns:
        `nmi`, `ari` and `acc`; each is None where no point has a label.

    Raises:
        ValueError: the two have different lengths.

    Example:
        >>> evaluate([0, 0, 1, 1], [5, 5, 3, 3])
        {'nmi': 1.0, 'ari': 1.0, 'acc': 1.0}
        >>> evaluate(None, [0, 1])
        {'nmi': None, 'ari': None, 'acc': None}
    """
    if labels_true is not None:
        true_N, pred_N = _labels(labels_true), _labels(labels_pred)
        if true_N.shape != pred_N.shape:
            raise ValueError(
                f"There are {len(true_N)} true labels for {len(pred_N)} predictions: give one for each."
            )
        known_N = true_N != NO_LABEL
        if known_N.any():
            table_CK = contingency(true_N[known_N], pred_N[known_N])
            return {
                "nmi": normalized_mutual_information(table_CK),
                "ari": adjusted_rand_index(table_CK),
                "acc": clustering_accuracy(table_CK),
            }
    return {"nmi": None, "ari": None, "acc": None}


def contingency(labels_true: Any, labels_pred: Any) -> np.ndarray:
    """Count the points of each class in each cluster: int64 (C, K), for those that own points.

    Example:
        >>> contingency([0, 0, 4], [7, 2, 7]).tolist()
        [[1, 1], [0, 1]]
    """
    # By hashing: np.unique sorts, which takes several times as long.
    true_N, classes = pd.factorize(_labels(labels_true), sort=True)
    pred_N, clusters = pd.factorize(_labels(labels_pred), sort=True)
    cells_N = true_N * len(clusters) + pred_N
    return np.bincount(cells_N, minlength=len(classes) * len(clusters)).reshape(len(classes), len(clusters))


def clustering_accuracy(table_CK: np.ndarray) -> float:
    """The share of points on the best one-to-one matching of clusters to classes.

    `ACC = max_m (1/N) sum_c table[c, m(c)]` over one-to-one maps m (Hungarian matching; Yang et al., CVPR
    2010). A surplus cluster is matched to no class, so all its points count as errors.

    Example:
        >>> clustering_accuracy(np.array([[2, 2, 0], [0, 0, 4]]))
        0.75
    """
    rows, columns = linear_sum_assignment(table_CK, maximize=True)
    return float(table_CK[rows, columns].sum() / table_CK.sum())


def normalized_mutual_information(table_CK: np.ndarray) -> float:
    """`NMI = I(class; cluster) / ((H(class) + H(cluster)) / 2)`, and 1 where both are one single group.

    Example:
        >>> normalized_mutual_information(np.array([[3, 0], [0, 5]]))
        1.0
    """
    if table_CK.shape == (1, 1):
        return 1.0
    both = _entropy(table_CK.sum(1)) + _entropy(table_CK.sum(0))
    mutual_information = both - _entropy(table_CK)
    return min(max(2 * mutual_information / both, 0.0), 1.0)


def adjusted_rand_index(table_CK: np.ndarray) -> float:
    """Agreement on pairs of points, adjusted for chance (Hubert and Arabie, 1985).

    `ARI = (S - E) / ((A + B) / 2 - E)` with S, A, B the pairs within the same cell, class and cluster and
    `E = A B / (all pairs)`; 1 where both are one single group, or both put every point alone.

    Example:
        >>> adjusted_rand_index(np.array([[3, 0], [0, 5]]))
        1.0
    """
    same, by_class, by_cluster = (_pairs(counts) for counts in (table_CK, table_CK.sum(1), table_CK.sum(0)))
    expected = by_class * by_cluster / max(_pairs(table_CK.sum()), 1.0)
    best = 0.5 * (by_class + by_cluster)
    return 1.0 if best == expected else float((same - expected) / (best - expected))


def silhouette(x: Tensor | np.ndarray, labels: Any, sample: int = 2000, seed: int = 0) -> float | None:
    """The mean silhouette width of a random sample (Rousseeuw, 1987): needs no true labels.

    Args:
        x: points (N, ...); further axes are flattened.
        labels: (N,) clusters.
        sample: how many points, drawn without replacement, are compared with each other.
        seed: of the sample.

    Returns:
        A number in -1..1; None where the sample has fewer than two clusters, or only clusters of one point.

    Example:
        >>> silhouette(torch.tensor([[0.0], [0.0], [9.0], [9.0]]), [0, 0, 1, 1])
        1.0
    """
    points_ND = x if isinstance(x, Tensor) else torch.as_tensor(x)
    labels_N = _labels(labels)
    chosen = torch.randperm(len(points_ND), generator=torch.Generator().manual_seed(seed))[:sample]
    found_N = labels_N[chosen.numpy()]
    num_clusters = len(np.unique(found_N))
    if not 2 <= num_clusters < len(found_N):
        return None
    # In float64 and centred, points far from the origin keep their distances.
    sample_ND = points_ND[chosen.to(points_ND.device)].flatten(1).double()
    return float(silhouette_score((sample_ND - sample_ND.mean(0)).cpu().numpy(), found_N))


def _labels(labels: Any) -> np.ndarray:
    return labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _pairs(counts: np.ndarray) -> float:
    counts = np.asarray(counts, dtype=np.float64)
    return float((counts * (counts - 1) / 2).sum())
