"""The losses of the cluster net and of the subcluster nets, as pure functions of tensors.

No tensor of shape (B, K, D) is made. Squared distances are expanded into a matrix product in float64 about
the mean of the centres, so codes far from the origin, or of any scale, lose nothing.

Legend: B points of a batch, D dimensions, K clusters; a final 2 is the two subclusters of a cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from deepdpm.nets import SUBCLUSTERS, ClusterBlocks

# Of a point's label: so much is shared out among all clusters.
_SMOOTHING = 0.1


def kl_loss(log_r_BK: Tensor, target_BK: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean divergence of the net's responsibilities from their target, both smoothed.

    `mean_i KL(t_i || r_i)` with `t = (target + eps) / sum_k (target + eps)` and the same for r = exp(log_r).
    Source: DeepDPM, section 4; the direction and the smoothing are those of the authors' code ("KL_GMM_2"),
    and the paper writes the divergence the other way round. With two columns it is the KL loss of the
    subclusters, whose target is the softmax of `subcluster_log_joint`.

    Shapes: log_r (B, K) log probabilities, target (B, K) probabilities, to a scalar.

    >>> target_BK = torch.tensor([[0.25, 0.75]])
    >>> kl_loss(target_BK.log(), target_BK).item()
    0.0
    >>> round(kl_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]), eps=1e-9).item(), 4)
    0.6931
    """
    r_BK, target_BK = log_r_BK.exp() + eps, target_BK + eps
    r_BK = r_BK / r_BK.sum(1, keepdim=True)
    target_BK = target_BK / target_BK.sum(1, keepdim=True)
    return functional.kl_div(r_BK.log(), target_BK, reduction="batchmean")


def label_loss(log_r_BK: Tensor, z_B: Tensor) -> Tensor:
    """Cross entropy of smoothed labels and the net's responsibilities, summed over the points.

    `-sum_i sum_k t_ik log r_ik` with `t_ik = .9 [k = z_i] + .1 / K` (Szegedy et al. 2016, section 7).

    Shapes: log_r (B, K) log probabilities, labels z (B,), to a scalar; 0 for no points.

    >>> round(label_loss(torch.tensor([[0.95, 0.05]]).log(), torch.tensor([0])).item(), 4)
    0.1985
    """
    return functional.cross_entropy(log_r_BK, z_B, reduction="sum", label_smoothing=_SMOOTHING)


def isotropic_loss(r_BK: Tensor, x_BD: Tensor, means_KD: Tensor) -> Tensor:
    """Mean over points and clusters of the squared distance to the centre, weighted by the responsibility.

    `(1 / (B K)) sum_i sum_k r_ik ||x_i - mu_k||^2`. Source: the authors' option "isotropic".

    Shapes: r (B, K), x (B, D), means (K, D), to a scalar of r's dtype.

    >>> isotropic_loss(torch.ones(1, 1), torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).item()
    25.0
    """
    return diagonal_loss(r_BK, x_BD, means_KD, torch.ones_like(means_KD))


def diagonal_loss(r_BK: Tensor, x_BD: Tensor, means_KD: Tensor, variances_KD: Tensor) -> Tensor:
    """The isotropic loss with each dimension's distance measured in the cluster's standard deviations.

    `(1 / (B K)) sum_i sum_k r_ik sum_d (x_id - mu_kd)^2 / variance_kd`.
    Source: the authors' option "diag_NIG".

    Shapes: r (B, K), x (B, D), means and variances (K, D), to a scalar of r's dtype.

    >>> x_BD, variances_KD = torch.tensor([[3.0, 4.0]]), torch.tensor([[9.0, 16.0]])
    >>> diagonal_loss(torch.ones(1, 1), x_BD, torch.zeros(1, 2), variances_KD).item()
    2.0
    """
    distance_BK = _squared_distances(x_BD, means_KD, variances_KD)
    return (r_BK.double() * distance_BK).mean().to(r_BK.dtype)


def _squared_distances(x_BD: Tensor, means_KD: Tensor, variances_KD: Tensor) -> Tensor:
    centre_D = means_KD.double().mean(0)
    x_BD, means_KD = x_BD.double() - centre_D, means_KD.double() - centre_D
    precision_KD = variances_KD.double().reciprocal()
    weighted_KD = means_KD * precision_KD
    constant_K = (means_KD * weighted_KD).sum(1)
    distance_BK = x_BD.square() @ precision_KD.T - 2 * x_BD @ weighted_KD.T + constant_K
    return distance_BK.clamp_min(0)


def subcluster_isotropic_loss(rsub_B2: Tensor, x_BD: Tensor, z_B: Tensor, means_K2D: Tensor) -> Tensor:
    """Mean over points of the squared distance to its cluster's two subcentres, weighted by rsub.

    `(1 / B) sum_i sum_j rsub_ij ||x_i - musub_{z_i, j}||^2`. Source: DeepDPM, section 4.

    Shapes: rsub (B, 2), x (B, D), z (B,) clusters, means (K, 2, D), to a scalar of rsub's dtype.

    >>> rsub_B2, x_BD, z_B = torch.tensor([[0.5, 0.5]]), torch.tensor([[4.0]]), torch.tensor([0])
    >>> subcluster_isotropic_loss(rsub_B2, x_BD, z_B, torch.tensor([[[0.0], [2.0]]])).item()
    10.0
    """
    difference_B2D = x_BD.unsqueeze(1) - means_K2D.to(x_BD.dtype).index_select(0, z_B)
    return (rsub_B2 * difference_B2D.square().sum(2)).sum(1).mean()


def subcluster_diagonal_loss(
    rsub_B2: Tensor, x_BD: Tensor, z_B: Tensor, means_K2D: Tensor, variances_K2D: Tensor
) -> Tensor:
    """The subclusters' isotropic loss with distances in the subcluster's standard deviations.

    `(1 / B) sum_i sum_j rsub_ij sum_d (x_id - musub_{z_i, j, d})^2 / variance_{z_i, j, d}`.
    Source: the authors' option "diag_NIG".

    Shapes: rsub (B, 2), x (B, D), z (B,) clusters, means and variances (K, 2, D), to a scalar.

    >>> means_K2D, variances_K2D = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [4.0]]])
    >>> rsub_B2, x_BD, z_B = torch.tensor([[0.5, 0.5]]), torch.tensor([[4.0]]), torch.tensor([0])
    >>> subcluster_diagonal_loss(rsub_B2, x_BD, z_B, means_K2D, variances_K2D).item()
    10.0
    """
    difference_B2D = x_BD.unsqueeze(1) - means_K2D.to(x_BD.dtype).index_select(0, z_B)
    distance_B2D = difference_B2D.square() / variances_K2D.to(x_BD.dtype).index_select(0, z_B)
    return (rsub_B2 * distance_B2D.sum(2)).sum(1).mean()


def subcluster_log_joint(
    x_BD: Tensor, z_B: Tensor, means_K2D: Tensor, whiteners_K2DD: Tensor, log_scales_K2: Tensor
) -> Tensor:
    """Log of weight times density of each point under the two Gaussians of its own cluster.

    `log_scale_kj - ||L_kj^-1 (x - mu_kj)||^2 / 2`, where the whitener L^-1 is the inverse of the covariance's
    lower Cholesky factor and `log_scale = log weight + log|L^-1| - (D / 2) log(2 pi)`. Its softmax over j is
    the target of the subclusters' KL loss. One batched matrix product over blocks of points of one cluster.

    Shapes: x (B, D), z (B,), means (K, 2, D), whiteners (K, 2, D, D), log_scales (K, 2), to (B, 2).

    >>> x_BD, z_B = torch.tensor([[2.0]]), torch.tensor([0])
    >>> means_K2D, whiteners_K2DD = torch.tensor([[[0.0], [2.0]]]), torch.ones(1, 2, 1, 1)
    >>> subcluster_log_joint(x_BD, z_B, means_K2D, whiteners_K2DD, torch.zeros(1, 2)).tolist()
    [[-2.0, 0.0]]
    """
    K, _, D = means_K2D.shape
    blocks = ClusterBlocks.of(z_B, K)
    # Each cluster's own centre is taken off first: a code far from the origin keeps its digits.
    centres_KD = means_K2D.double().mean(1)
    local_means_K2D = means_K2D.double() - centres_KD.unsqueeze(1)
    local_x_BD = (x_BD.double() - centres_KD.index_select(0, z_B)).to(x_BD.dtype)
    whiteners_K2DD = whiteners_K2DD.to(x_BD.dtype)
    offset_K2D = (whiteners_K2DD @ local_means_K2D.to(x_BD.dtype).unsqueeze(3)).squeeze(3)
    weight_MED = blocks.parameters(whiteners_K2DD.reshape(K, SUBCLUSTERS * D, D))
    offset_K1E = offset_K2D.reshape(K, 1, SUBCLUSTERS * D)
    white_MTE = torch.baddbmm(-blocks.parameters(offset_K1E), blocks.scatter(local_x_BD), weight_MED.mT)
    distance_BE = blocks.collect(white_MTE).square().unflatten(1, (SUBCLUSTERS, D))
    return log_scales_K2.to(x_BD.dtype).index_select(0, z_B) - 0.5 * distance_BE.sum(2)
