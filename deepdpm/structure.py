"""Changes of structure: what a Plan means for the nets, their optimizers, the mixture and the subclusters.

Legend: M points of a sample, D dimensions, K clusters; subclusters 2k and 2k + 1 belong to cluster k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepdpm.amortize import fit_net_to_mixture
from deepdpm.growth import grow, renew_rows, rows_from_subclusters
from deepdpm.kmeans import cluster_labels, subcluster_labels
from deepdpm.mixture import Mixture
from deepdpm.moves import (
    Move,
    MoveSettings,
    Plan,
    accept,
    choose_merges,
    merge_log_ratios,
    nearest_pairs,
    plan_from_labels,
    plan_merges,
    plan_splits,
    split_log_ratios,
)
from deepdpm.nets import ClusterNet, SubclusterNets
from deepdpm.priors import NormalPrior, fit_empirical_bayes
from deepdpm.settings import ModelSettings
from deepdpm.state import ClusterState, fit_subclusters
from deepdpm.stats import SufficientStats

_CHUNK = 16_384

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Learners:
    """The nets and their optimizers; the optimizers are absent before training."""

    cluster_net: ClusterNet
    subcluster_nets: SubclusterNets
    cluster_optimizer: Optimizer | None = None
    subcluster_optimizer: Optimizer | None = None


def net_labels(net: ClusterNet, x_MD: Tensor) -> Tensor:
    """The cluster net's hard assignments (M,) of codes (M, D)."""
    with torch.no_grad():
        return torch.cat([net(chunk).argmax(1) for chunk in x_MD.split(_CHUNK)])


def subcluster_net_labels(nets: SubclusterNets, x_MD: Tensor, labels_M: Tensor) -> Tensor:
    """The subcluster nets' hard assignments (M,) in {0, 1} of codes (M, D) with clusters (M,)."""
    with torch.no_grad():
        chunks = zip(x_MD.split(_CHUNK), labels_M.split(_CHUNK), strict=True)
        return torch.cat([nets(x_BD, z_B).argmax(1) for x_BD, z_B in chunks])


def mixture_labels(mixture: Mixture, x_MD: Tensor) -> Tensor:
    """The mixture's hard assignments (M,) of codes (M, D)."""
    return torch.cat([mixture.log_joint_NK(chunk).argmax(1) for chunk in x_MD.split(_CHUNK)])


def start_subclusters(
    x_MD: Tensor, labels_M: Tensor, num_clusters: int, nets: SubclusterNets, how: str
) -> SufficientStats:
    """Statistics of 2K starting subclusters of labelled codes; `how` is `model.init_subclusters`."""
    if how == "soft_assign":
        side_M = subcluster_net_labels(nets, x_MD, labels_M)
    else:
        stats = SufficientStats.from_labels(x_MD, labels_M, num_clusters)
        side_M = subcluster_labels(x_MD, labels_M, stats, in_full=how == "kmeans")
    return SufficientStats.from_labels(x_MD, 2 * labels_M + side_M, 2 * num_clusters)


def start_clusters(
    prior: NormalPrior,
    learners: Learners,
    x_ME: Tensor,
    num_points: int,
    model: ModelSettings,
    generator: torch.Generator,
    fits_prior: bool,
) -> ClusterState:
    """The state at the start (paper, section 4): clusters and subclusters of a sample, and their prior.

    `fits_prior` fits it to the clusters; a search, which does so itself, should find the same from any start.
    """
    scale, num_clusters = num_points / len(x_ME), model.init_k
    if model.init_clusters == "soft_assign":
        r_MK = learners.cluster_net.log_prob(x_ME).exp()
        labels_M, stats = r_MK.argmax(1), SufficientStats.from_weights(x_ME, r_MK)
    else:
        labels_M = cluster_labels(x_ME, num_clusters, model.init_clusters, generator, model.kmeans_backend)
        stats = SufficientStats.from_labels(x_ME, labels_M, num_clusters)
    stats = stats.scaled(scale)
    if fits_prior and num_clusters > 1:
        prior = fit_empirical_bayes(prior, stats, iters=3)
    sub_stats = start_subclusters(
        x_ME, labels_M, num_clusters, learners.subcluster_nets, model.init_subclusters
    )
    state = ClusterState.start(prior, stats, sub_stats.scaled(scale))
    if model.init_cluster_net_weights:
        fit_net_to_mixture(learners.cluster_net, state.mixture, x_ME)
    return state


def merge_rows(old: Mixture, new: Mixture, fresh_K: Tensor) -> Mixture:
    """The new components where fresh (K,), the old ones elsewhere."""
    fresh = fresh_K.to(new.weights_K.device)
    return replace(
        new,
        weights_K=torch.where(fresh, new.weights_K, old.weights_K),
        means_KD=torch.where(fresh[:, None], new.means_KD, old.means_KD),
        covariances_KDD=torch.where(fresh[:, None, None], new.covariances_KDD, old.covariances_KDD),
    )


def _pairs_of(index_K: Tensor) -> Tensor:
    """Positions (2K,) of the subclusters of clusters at positions (K,)."""
    return (2 * index_K[:, None] + torch.arange(2, device=index_K.device)).flatten()


def renew_subclusters(
    state: ClusterState,
    x_MD: Tensor,
    labels_M: Tensor,
    scale: float,
    fresh_K: Tensor,
    nets: SubclusterNets,
    how: str,
) -> ClusterState:
    """The state with the subclusters of fresh clusters (K,) started anew from a labelled sample.

    `scale` is the number of points that one of the sample stands for.
    """
    sub_stats = start_subclusters(x_MD, labels_M, state.num_clusters, nets, how).scaled(scale)
    fresh = fit_subclusters(state.prior, sub_stats)
    rows = fresh_K.repeat_interleave(2)
    return replace(state, subclusters=merge_rows(state.subclusters, fresh, rows))


def _grow_all(learners: Learners, plan: Plan) -> None:
    grow(learners.cluster_net, plan.parents_K, plan.fresh_K, learners.cluster_optimizer)
    grow(learners.subcluster_nets, plan.parents_K, plan.fresh_K, learners.subcluster_optimizer)


def search_step(
    state: ClusterState,
    learners: Learners,
    x_MD: Tensor,
    new_labels_M: Tensor,
    prior: NormalPrior,
    num_points: int,
    init_subclusters: str,
    generator: torch.Generator,
    first: bool,
) -> tuple[ClusterState, tuple[Move, ...]]:
    """Lead state and nets to what a search found; but no moves of a later search leave everything as it was.

    That is new labels (M,) of a sample, 0..K-1, each with a point, and the prior.
    """
    device = x_MD.device
    old_labels_M = mixture_labels(state.mixture, x_MD)
    num_new = int(new_labels_M.max()) + 1
    plan = plan_from_labels(
        old_labels_M, new_labels_M, state.num_clusters, num_new, state.ids_K, state.next_id
    )
    if not (first or plan.moves):
        return state, ()
    scale = num_points / len(x_MD)
    stats = SufficientStats.from_labels(x_MD, new_labels_M, num_new).scaled(scale)
    subclusters = state.subclusters[_pairs_of(plan.parents_K).to(device)]
    state = ClusterState(prior, Mixture.m_step(prior, stats), subclusters, plan.ids_K, plan.next_id)
    _grow_all(learners, plan)
    renew_rows(learners.subcluster_nets, "random", plan.fresh_K, generator)
    state = renew_subclusters(
        state, x_MD, new_labels_M, scale, plan.fresh_K, learners.subcluster_nets, init_subclusters
    )
    fit_net_to_mixture(learners.cluster_net, state.mixture, x_MD, learners.cluster_optimizer)
    return state, plan.moves


def split_step(
    state: ClusterState,
    learners: Learners,
    sub_stats: SufficientStats,
    settings: MoveSettings,
    generator: torch.Generator,
) -> tuple[ClusterState, SufficientStats, Plan]:
    """One published split step, on statistics of the hard assignments to 2K subclusters.

    The children take the subclusters' parameters. Also gives the statistics of the K new clusters.
    """
    prior, device, num_old = state.prior, sub_stats.count_K.device, state.num_clusters
    ratios_K = split_log_ratios(prior, sub_stats, prior.alpha, settings.min_points)
    plan = plan_splits(accept(ratios_K, generator, settings.split_prob), state.ids_K, state.next_id)
    whole = sub_stats.group(torch.arange(2 * num_old, device=device) // 2, num_old)
    if not plan.moves:
        return state, whole, plan
    # Where each new cluster comes from, among the K old clusters and behind them their 2K subclusters.
    second_K = torch.arange(plan.num_clusters) >= num_old
    source_K = torch.where(plan.fresh_K, num_old + 2 * plan.parents_K + second_K.long(), plan.parents_K)
    source_K = source_K.to(device)
    old, sub = state.mixture, state.subclusters
    weights = torch.cat((old.weights_K, old.weights_K.repeat_interleave(2) * sub.weights_K))
    means = torch.cat((old.means_KD, sub.means_KD))
    covariances = torch.cat((old.covariances_KDD, sub.covariances_KDD))
    mixture = replace(
        old,
        weights_K=weights[source_K],
        means_KD=means[source_K],
        covariances_KDD=covariances[source_K],
    )
    stats = SufficientStats.cat([whole, sub_stats])[source_K]

    net, nets = learners.cluster_net, learners.subcluster_nets
    grow(net, plan.parents_K, plan.fresh_K, learners.cluster_optimizer)
    if settings.init_new_weights == "subclusters":
        rows_from_subclusters(net, nets, plan.parents_K, plan.fresh_K)
    else:
        renew_rows(net, settings.init_new_weights, plan.fresh_K, generator)
    grow(nets, plan.parents_K, plan.fresh_K, learners.subcluster_optimizer)
    renew_rows(nets, settings.split_init_weights_sub, plan.fresh_K, generator)
    subclusters = sub[_pairs_of(plan.parents_K).to(device)]
    return ClusterState(prior, mixture, subclusters, plan.ids_K, plan.next_id), stats, plan


def merge_step(
    state: ClusterState,
    learners: Learners,
    stats: SufficientStats,
    settings: MoveSettings,
    generator: torch.Generator,
) -> tuple[ClusterState, Tensor, Plan]:
    """One published merge step, on statistics of the hard assignments to K clusters.

    A merged cluster's parameters come from the summed statistics, and its weight is the sum. Also gives the
    new place (K_old,) of each old cluster.
    """
    prior, device = state.prior, stats.count_K.device
    pairs_P2 = nearest_pairs(state.mixture.means_KD, settings.neighbours)
    ratios_P = merge_log_ratios(prior, stats, pairs_P2, prior.alpha)
    chosen = choose_merges(pairs_P2, ratios_P, accept(ratios_P, generator, settings.merge_prob))
    plan, place_K = plan_merges(chosen, prior.log_marginal(stats), state.ids_K, state.next_id)
    if not plan.moves:
        return state, place_K, plan
    place_K, parents_K = place_K.to(device), plan.parents_K.to(device)
    merged = Mixture.m_step(prior, stats.group(place_K, plan.num_clusters))
    weights_K = torch.zeros_like(merged.weights_K).index_add_(0, place_K, state.mixture.weights_K)
    mixture = replace(merge_rows(state.mixture[parents_K], merged, plan.fresh_K), weights_K=weights_K)
    _grow_all(learners, plan)
    if settings.merge_init_weights == "random":
        renew_rows(learners.cluster_net, "random", plan.fresh_K, generator)
    if settings.merge_init_weights_sub == "random":
        renew_rows(learners.subcluster_nets, "random", plan.fresh_K, generator)
    subclusters = state.subclusters[_pairs_of(parents_K)]
    return ClusterState(prior, mixture, subclusters, plan.ids_K, plan.next_id), place_K.cpu(), plan


def renew_subcluster_nets(learners: Learners, fresh_K: Tensor, generator: torch.Generator) -> None:
    """Draw the subcluster nets of fresh clusters (K,) anew; their moments are zeroed."""
    grow(learners.subcluster_nets, torch.arange(len(fresh_K)), fresh_K, learners.subcluster_optimizer)
    renew_rows(learners.subcluster_nets, "random", fresh_K, generator)
