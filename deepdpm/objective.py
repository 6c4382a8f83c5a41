"""The losses as the settings name them, given a mixture of clusters or of subclusters.

Legend: B points of a batch, E dimensions of a code, K clusters; a final 2 is the subclusters of a cluster.
"""

from __future__ import annotations

from torch import Tensor

from deepdpm.losses import (
    diagonal_loss,
    isotropic_loss,
    kl_loss,
    subcluster_diagonal_loss,
    subcluster_isotropic_loss,
    subcluster_log_joint,
)
from deepdpm.mixture import Mixture
from deepdpm.settings import LossName


def cluster_loss(
    name: LossName, log_r_BK: Tensor, target_BK: Tensor, x_BE: Tensor, mixture: Mixture
) -> Tensor:
    """The loss of the cluster net; target (B, K) are the mixture's responsibilities, r (B, K) the net's."""
    if name == "kl":
        return kl_loss(log_r_BK, target_BK)
    if name == "isotropic":
        return isotropic_loss(log_r_BK.exp(), x_BE, mixture.means_KD)
    variances_KE = mixture.covariances_KDD.diagonal(dim1=1, dim2=2)
    return diagonal_loss(log_r_BK.exp(), x_BE, mixture.means_KD, variances_KE)


def subcluster_loss(
    name: LossName, log_rsub_B2: Tensor, x_BE: Tensor, z_B: Tensor, subclusters: Mixture
) -> Tensor:
    """The loss of the subcluster nets; z (B,) are the points' clusters, `subclusters` has 2K components."""
    pairs = (subclusters.num_components // 2, 2)
    means_K2E = subclusters.means_KD.unflatten(0, pairs)
    if name == "isotropic":
        return subcluster_isotropic_loss(log_rsub_B2.exp(), x_BE, z_B, means_K2E)
    if name == "diagonal":
        variances_K2E = subclusters.covariances_KDD.diagonal(dim1=1, dim2=2).unflatten(0, pairs)
        return subcluster_diagonal_loss(log_rsub_B2.exp(), x_BE, z_B, means_K2E, variances_K2E)
    whitening = subclusters.whitening
    whiteners_K2EE = whitening.inverse_KDD.unflatten(0, pairs)
    log_scales_K2 = whitening.log_scale_K.view(pairs)
    log_joint_B2 = subcluster_log_joint(x_BE, z_B, means_K2E, whiteners_K2EE, log_scales_K2)
    return kl_loss(log_rsub_B2, log_joint_B2.softmax(1))
