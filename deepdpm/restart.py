"""What a clustering takes over from an earlier one on other features, and how features move clusters.

Source: DeepDPM, section 4.4, and the options of the authors' second script. Legend: M codes of a sample,
L dimensions of a code, E of a transformed one, K clusters.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deepdpm.mixture import Mixture
from deepdpm.nets import ClusterNet, SubclusterNets
from deepdpm.priors import NormalPrior, fit_empirical_bayes
from deepdpm.settings import ModelSettings
from deepdpm.state import ClusterState, fit_subclusters
from deepdpm.stats import SufficientStats
from deepdpm.structure import mixture_labels, net_labels, start_subclusters
from deepdpm.transforms import Transform

# How many codes a centre counts for before it has met any (the authors' value).
_FIRST_COUNT = 100.0
_WITHOUT_INVERSE = ("normalize", "standard_normalize")


def raw_centres(transform: Transform, means_KE: Tensor) -> Tensor:
    """Centres in raw codes (K, L); those on the sphere stay as they are."""
    return means_KE if transform.kind in _WITHOUT_INVERSE else transform.inverse_means(means_KE)


def transformed_centres(transform: Transform, raw_KL: Tensor) -> Tensor:
    """Centres (K, E) of a transform fitted since `raw_centres`."""
    return raw_KL.double() if transform.kind in _WITHOUT_INVERSE else transform(raw_KL).double()


def as_one_set(centres_KE: Tensor) -> SufficientStats:
    """The statistics of the centres as one set, each a point."""
    return SufficientStats.from_weights(centres_KE, torch.ones_like(centres_KE[:, :1]))


def from_centres(
    prior: NormalPrior, centres_KE: Tensor, x_ME: Tensor, scale: float
) -> tuple[NormalPrior, Mixture, Tensor]:
    """Prior, mixture and labels (M,) of clusters whose centres are taken over.

    Covariances start at Psi and weights are equal, as the authors have it. Where Psi is fitted to the data,
    it is fitted to the codes nearest each centre, and the mixture to them. `scale` is how many points one of
    the sample stands for.
    """
    labels_M = torch.cat([torch.cdist(x_BE.double(), centres_KE).argmin(1) for x_BE in x_ME.split(16_384)])
    num_clusters = len(centres_KE)
    if "psi" in prior.fitted:
        stats = SufficientStats.from_labels(x_ME, labels_M, num_clusters).scaled(scale)
        prior = fit_empirical_bayes(prior, stats, iters=3)
        fitted = Mixture.m_step(prior, stats)
        empty_K1 = (stats.count_K < 1)[:, None]
        return prior, replace(fitted, means_KD=torch.where(empty_K1, centres_KE, fitted.means_KD)), labels_M
    psi_EE = torch.diag_embed(prior.psi / prior.nu) if prior.psi.ndim == 1 else prior.psi
    weights_K = torch.full_like(centres_KE[:, 0], 1 / num_clusters)
    psi_KEE = psi_EE.expand(num_clusters, -1, -1).clone()
    mixture = Mixture(weights_K, centres_KE, psi_KEE, prior.tail_dof, prior.noise)
    return prior, mixture, mixture_labels(mixture, x_ME)


def from_net(
    prior: NormalPrior, net: ClusterNet, x_ME: Tensor, scale: float
) -> tuple[NormalPrior, Mixture, Tensor]:
    """Prior, mixture and labels (M,) of what a net that goes on says of new codes."""
    stats = SufficientStats.from_weights(x_ME, net.log_prob(x_ME).exp()).scaled(scale)
    prior = fit_empirical_bayes(prior, stats, iters=3)
    return prior, Mixture.m_step(prior, stats), net_labels(net, x_ME)


def state_of(
    prior: NormalPrior,
    mixture: Mixture,
    labels_M: Tensor,
    old: ClusterState,
    x_ME: Tensor,
    scale: float,
    nets: SubclusterNets,
    model: ModelSettings,
) -> ClusterState:
    """The state of K clusters that keep their identities, with subclusters started anew."""
    sub_stats = start_subclusters(x_ME, labels_M, mixture.num_components, nets, model.init_subclusters)
    subclusters = fit_subclusters(prior, sub_stats.scaled(scale))
    return ClusterState(prior, mixture, subclusters, old.ids_K, old.next_id)


def first_counts(num_clusters: int) -> Tensor:
    """What each centre counts for at the start of a phase (K,)."""
    return torch.full((num_clusters,), _FIRST_COUNT, dtype=torch.float64)


def moved_centres(
    state: ClusterState, counts_K: Tensor, stats: SufficientStats
) -> tuple[ClusterState, Tensor]:
    """Each centre after a batch, one by one with the inverse count as step size; and the new counts.

    All at once that is `mu <- (count mu + sum x) / (count + n)`.

    >>> from deepdpm.priors import NIW
    >>> mixture = Mixture(torch.ones(1), torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double())
    >>> prior = NIW(torch.zeros(1).double(), 1.0, 3.0, torch.eye(1).double())
    >>> state = ClusterState(prior, mixture, mixture, torch.arange(1), 1)
    >>> stats = SufficientStats.from_labels(torch.full((3, 1), 4.0), torch.zeros(3).long(), 1)
    >>> state, counts_K = moved_centres(state, torch.ones(1).double(), stats)
    >>> state.mixture.means_KD.item(), counts_K.item()
    (3.0, 4.0)
    """
    total_K = counts_K + stats.count_K
    means_KE = (counts_K[:, None] * state.mixture.means_KD + stats.sum_KD) / total_K[:, None]
    return replace(state, mixture=replace(state.mixture, means_KD=means_KE)), total_K


def refitted(state: ClusterState, stats: SufficientStats, floor: float | None) -> ClusterState:
    """Clusters fitted to an epoch's codes: by the prior's MAP formulas, or with a floor by likelihood alone.

    A cluster that no code chose stays as it was.
    """
    prior = state.prior if floor is None else replace(state.prior, maximum_likelihood_floor=floor)
    fitted, old = Mixture.m_step(prior, stats), state.mixture
    empty_K = stats.count_K < 1
    mixture = replace(
        fitted,
        means_KD=torch.where(empty_K[:, None], old.means_KD, fitted.means_KD),
        covariances_KDD=torch.where(empty_K[:, None, None], old.covariances_KDD, fitted.covariances_KDD),
    )
    return replace(state, mixture=mixture)
