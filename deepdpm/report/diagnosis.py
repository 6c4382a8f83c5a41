"""What a clustering's numbers say, in sentences: what happened, what is doubtful, and what to try.

Legend: N points, D dimensions, E dimensions of a code, K clusters.
"""

import numpy as np

from deepdpm.report.clustering import Clustering, events

_UNSURE, _MANY_UNSURE = 0.6, 0.05
_DISAGREEING = 0.05
_SCALES_APART = 100.0
_SHARED = 0.25


def diagnose(found: Clustering) -> list[str]:
    """Sentences about a clustering, the most important first."""
    checks = (_outcome, _one_cluster, _ending, _scales, _net, _unsure, _overlaps, _small, _classes, _axes)
    return [sentence for check in checks for sentence in check(found)]


def _outcome(found: Clustering) -> list[str]:
    count, points = found.num_clusters, len(found.labels_N)
    moves = events(found.history)
    words = f"{count} cluster{'s' if count != 1 else ''} of {points:,} points"
    if not moves:
        return [f"{words}. K never changed."]
    many = f"The last of {len(moves)} moves" if len(moves) > 1 else "The only move"
    return [f"{words}. {many} came at the end of epoch {moves[-1].epoch}."]


def _one_cluster(found: Clustering) -> list[str]:
    if found.num_clusters != 1:
        return []
    points, dims = found.x_ND.shape
    model, moves = found.module.model, found.module.moves
    if moves.kind == "published":
        advice = "try model.moves.kind=search, or start with more clusters, say model.init_k=10"
        return [f"K stayed at 1 because no split's Hastings ratio was high enough: {advice}."]
    if points < 100:
        return [f"K stayed at 1: {points} points of {dims} dimensions hardly show more than one cluster."]
    advice = "codes of a network or of UMAP (deepdpm-embed) often show more"
    if model.transform != "standard":
        advice = "try model.transform=standard if the columns have different units; " + advice
    return [
        "K stayed at 1 because no split paid off: between the points there is no valley of the density "
        f"that both halves of the data agree on. {advice[0].upper()}{advice[1:]}."
    ]


def _ending(found: Clustering) -> list[str]:
    epochs, most, progress = len(found.history), found.max_epochs, found.module.progress
    if most is None or epochs < most or found.module.moves.kind != "search" or progress.finished:
        return []
    if not progress.at_rest:
        return [f"Training ended after {epochs} epochs while K still changed: raise max_epochs."]
    return [
        f"Training ended after {epochs} epochs, before the nets were polished to the end: raise max_epochs."
    ]


def _scales(found: Clustering) -> list[str]:
    spread_D = found.x_ND.double().std(0).numpy()
    used = spread_D[spread_D > 0]
    kind = found.module.model.transform
    if found.dataset.image_shape or kind in ("standard", "standard_normalize", "min_max") or len(used) < 2:
        return []
    ratio = float(used.max() / used.min())
    if ratio < _SCALES_APART or found.x_ND.shape[1] > 100:
        return []
    wide, narrow = int(spread_D.argmax()), int(np.where(spread_D > 0, spread_D, np.inf).argmin())
    names = found.feature_name(wide), found.feature_name(narrow)
    return [
        f"The spread of {names[0]} is {ratio:,.0f} times that of {names[1]}, and so it decides the clusters: "
        "try model.transform=standard if their units are not the same."
    ]


def _net(found: Clustering) -> list[str]:
    mixture_N = found.log_joint_NK.argmax(1).numpy()
    share = float((mixture_N != found.labels_N).mean())
    if share <= _DISAGREEING:
        return []
    return [
        f"The net puts {share:.0%} of the points elsewhere than the mixture does: train it longer "
        "(trainer.schedule.polish_steps) or make it wider (model.hidden)."
    ]


def _unsure(found: Clustering) -> list[str]:
    share = float((found.confidence_N < _UNSURE).mean())
    if share <= _MANY_UNSURE:
        return []
    return [f"{share:.0%} of the points have no clear cluster (confidence below {_UNSURE})."]


def _overlaps(found: Clustering) -> list[str]:
    if found.num_components < 2:
        return []
    r_NK = found.log_joint_NK.double().softmax(1).numpy()
    shared_KK = r_NK.T @ r_NK
    mass_K = shared_KK.sum(1).clip(1e-300)
    np.fill_diagonal(shared_KK, 0)
    pairs = [
        (shared_KK[j, k] / min(mass_K[j], mass_K[k]), j, k)
        for j in range(len(mass_K))
        for k in range(j + 1, len(mass_K))
    ]
    return [
        f"Clusters {found.ids_K[j]} and {found.ids_K[k]} overlap: {share:.0%} of the smaller one lies in "
        "both; they may be one."
        for share, j, k in sorted(pairs, reverse=True)[:3]
        if share > _SHARED
    ]


def _small(found: Clustering) -> list[str]:
    dims = found.codes_NE.shape[1]
    small = [k for k, size in enumerate(found.sizes_K) if 0 < size <= dims + 1]
    if not small:
        return []
    names = ", ".join(str(found.ids_K[k]) for k in small)
    subject = f"Clusters {names} have" if len(small) > 1 else f"Cluster {names} has"
    return [f"{subject} no more points than a covariance of {dims} dimensions needs: outliers, perhaps."]


def _classes(found: Clustering) -> list[str]:
    table_CK = found.contingency_CK
    if table_CK is None:
        return []
    sentences = []
    main_K = table_CK.argmax(0)
    for label in range(len(table_CK)):
        clusters = [k for k in range(found.num_components) if found.sizes_K[k] > 0 and main_K[k] == label]
        if len(clusters) > 1:
            ids = ", ".join(str(found.ids_K[k]) for k in clusters)
            sentences.append(f"Class {found.class_name(label)} is spread over the clusters {ids}.")
        elif not clusters and table_CK[label].sum() > 0:
            home = int(table_CK[label].argmax())
            sentences.append(
                f"Class {found.class_name(label)} has no cluster of its own: most of it lies in "
                f"{found.ids_K[home]}, with {found.class_name(int(main_K[home]))}."
            )
    return sentences[:6]


def _axes(found: Clustering) -> list[str]:
    transform, dims = found.module.transform, found.x_ND.shape[1]
    if (
        transform.kind != "principal"
        or found.module.model.features.kind != "none"
        or transform.num_dims >= dims
    ):
        return []
    total = float(found.x_ND.double().var(0, correction=0).sum())
    kept = float((found.codes_NE.double() / transform.scale_D[0]).var(0, correction=0).sum())
    share = kept / total if total > 0 else 1.0
    axes = f"{transform.num_dims} principal axes of {dims}"
    return [f"The clusters were found on {axes}, which hold {share:.0%} of the variance."]
