"""Starting the cluster net from a mixture: output rows in closed form, or the mixture's linear discriminants.

Legend: M points of a sample, B of a chunk, D dimensions, K clusters, P pairs of them, H hidden units,
R directions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from deepdpm.growth import grow_optimizer
from deepdpm.linalg import inverse_cholesky
from deepdpm.losses import kl_loss
from deepdpm.mixture import Mixture
from deepdpm.nets import ClusterNet

_CHUNK = 16_384
_LOG_FLOOR = math.log(1e-4)
# Beyond the sample's range, of its width: so far other points may lie before a linear unit bends.
_MARGIN = 0.25
# The discriminants' large weights learn slowly: with half of the divergence, on digits, they ended with more.
_CLEARLY_LESS = 0.25


@torch.no_grad()
def fit_net_to_mixture(
    net: ClusterNet, mixture: Mixture, x_MD: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Start the cluster net near the mixture's responsibilities of a sample (M, D), its moments at zero.

    Output rows are fitted to the hidden units that are there (`fit_output_layer`). Where clusters are many
    and narrow these are too coarse, so the linear discriminants (`take_discriminants`) take their place if
    they leave less than a fourth of the divergence `mean_i KL(rE_i || r_i)`.

    >>> mixture = Mixture(torch.ones(2) / 2, torch.tensor([[0.0], [9.0]]), torch.ones(2, 1, 1))
    >>> net = ClusterNet(num_dims=1, hidden=[50], num_clusters=2)
    >>> fit_net_to_mixture(net, mixture, torch.tensor([[0.0], [1.0], [8.0], [9.0]]))
    >>> net(torch.tensor([[0.5], [8.5]])).argmax(1).tolist()
    [0, 1]
    """
    fit_output_layer(net, _targets(mixture, x_MD))
    discriminants = copy.deepcopy(net)
    if take_discriminants(discriminants, mixture, x_MD):
        left = _divergence(discriminants, mixture, x_MD)
        if left < _CLEARLY_LESS * _divergence(net, mixture, x_MD):
            net.load_state_dict(discriminants.state_dict())
    if optimizer is not None:
        for parameter in net.parameters():
            every = torch.arange(len(parameter))
            grow_optimizer(optimizer, parameter, every, torch.ones(len(parameter), dtype=torch.bool))


def _targets(mixture: Mixture, x_MD: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for x_BD in x_MD.split(_CHUNK):
        yield x_BD, mixture.log_joint_NK(x_BD).log_softmax(1), torch.ones_like(x_BD[:, 0])


def _divergence(net: ClusterNet, mixture: Mixture, x_MD: Tensor) -> float:
    parts = [
        len(x_BD) * kl_loss(net.log_prob(x_BD), log_r_BK.exp())
        for x_BD, log_r_BK, _ in _targets(mixture, x_MD)
    ]
    return float(sum(parts)) / len(x_MD)


@torch.no_grad()
def take_discriminants(net: ClusterNet, mixture: Mixture, x_MD: Tensor) -> bool:
    """Make the net the linear discriminants of a mixture; False, and the net as it was, if it has no room.

    With the pooled covariance `S = sum_k pi_k Sigma_k` the posterior is a softmax of
    `mu_k^T S^-1 x - mu_k^T S^-1 mu_k / 2 + log pi_k` (Hastie, Tibshirani and Friedman 2009, eq. 4.10). The
    first units carry x along the R leading discriminant directions and bend outside of the sample; R is the
    least of K - 1, D and half of the units. The others bend half-way between neighbours, across the line
    that divides them, and count for nothing yet. Units without a pair stay as they were.

    Shapes: sample (M, D). The net needs one hidden layer, of two units at the least, and two clusters.
    """
    (K, H) = net.output_weight.shape
    R = min(K - 1, x_MD.shape[1], H // 2)
    first = net.hidden[0]
    if len(net.hidden) != 2 or R < 1:
        return False
    assert isinstance(first, nn.Linear)
    weight_K, mean_KD = mixture.weights_K.double(), mixture.means_KD.double()
    weight_K = (weight_K / weight_K.sum()).clamp_min(torch.finfo(torch.float64).tiny)
    covariance_DD = (weight_K[:, None, None] * mixture.covariances_KDD.double()).sum(0)
    centre_D = weight_K @ mean_KD
    # Everything below is in coordinates in which the pooled covariance is I and the clusters' centre 0.
    white_DD = inverse_cholesky(covariance_DD)
    white_KD = (mean_KD - centre_D) @ white_DD.T
    axes_RD = torch.linalg.svd(weight_K.sqrt()[:, None] * white_KD, full_matrices=False).Vh[:R]
    along_MR = (x_MD.double() - centre_D) @ white_DD.T @ axes_RD.T
    low_R, high_R = along_MR.aminmax(dim=0)
    width_R = (high_R - low_R).clamp_min(torch.finfo(torch.float32).tiny)
    low_R = low_R - _MARGIN * width_R

    hidden_HD, bias_H = first.weight, first.bias
    hidden_HD[:R] = axes_RD @ white_DD / width_R[:, None]
    bias_H[:R] = -(low_R + axes_RD @ white_DD @ centre_D) / width_R
    pairs_P2 = _nearest(white_KD, H - R)
    offset_PD = white_KD[pairs_P2[:, 1]] - white_KD[pairs_P2[:, 0]]
    middle_PD = white_KD[pairs_P2].mean(1)
    bends = slice(R, R + len(pairs_P2))
    offset_PD = offset_PD / offset_PD.norm(dim=1, keepdim=True).clamp_min(1e-12) / width_R.max()
    hidden_HD[bends] = offset_PD @ white_DD
    bias_H[bends] = -(offset_PD * (middle_PD + centre_D @ white_DD.T)).sum(1)

    mean_KR = white_KD @ axes_RD.T
    logit_K = mean_KR @ low_R - mean_KR.square().sum(1) / 2 + weight_K.log()
    net.output_weight.zero_()
    net.output_weight[:, :R] = net.temperature * (mean_KR - mean_KR.mean(0)) * width_R
    net.output_bias.copy_(net.temperature * (logit_K - logit_K.mean()))
    return True


def _nearest(point_KD: Tensor, most: int) -> Tensor:
    """The nearest pairs (P, 2) of points (K, D), at most so many.

    >>> _nearest(torch.tensor([[0.0], [1.0], [10.0]]), 2).tolist()
    [[0, 1], [1, 2]]
    """
    first_P, second_P = torch.triu_indices(len(point_KD), len(point_KD), 1, device=point_KD.device)
    distance_P = torch.cdist(point_KD, point_KD)[first_P, second_P]
    order_P = distance_P.argsort(stable=True)[:most]
    return torch.stack((first_P, second_P), 1)[order_P]


@torch.no_grad()
def fit_output_layer(
    net: ClusterNet,
    chunks: Iterable[tuple[Tensor, Tensor, Tensor]],
    ridge: float = 1e-4,
    floor: float = _LOG_FLOOR,
) -> None:
    """Solve the output rows of all clusters at once, so that the log responsibilities meet given targets.

    Ridge regression, weighted by point, of `t = temperature * centre_k(max(log p, floor))` on the last hidden
    features h. Centring over the clusters is free, because the softmax ignores a constant:
    `W = (cov(h, h) + ridge * mean_variance * I)^-1 cov(h, t)`, `b = mean(t) - mean(h) W`. The floor keeps
    hopeless clusters from ruling the fit. The sums, H x H and H x K, are float64; nothing of N x K is kept.
    Moments of the old rows mean nothing afterwards: pass `grow_optimizer` fresh all true.

    Shapes: chunks of codes (B, D), target log probabilities (B, K) and weights (B,); K is the net's.

    >>> net = ClusterNet(num_dims=1, hidden=[8], num_clusters=2)
    >>> x_ND = torch.linspace(-1, 1, 100)[:, None]
    >>> log_prob_NK = torch.cat((2 * x_ND, -2 * x_ND), 1).log_softmax(1)
    >>> fit_output_layer(net, [(x_ND, log_prob_NK, torch.ones(100))])
    >>> bool((net(x_ND).argmax(1) == log_prob_NK.argmax(1)).float().mean() > 0.8)
    True
    """
    assert ridge > 0
    weight_KH = net.output_weight
    K, H = weight_KH.shape
    # One joint second moment of (1, h, t) holds every sum needed.
    moment = torch.zeros(1 + H, 1 + H + K, dtype=torch.float64, device=weight_KH.device)
    for x_BD, log_prob_BK, weight_B in chunks:
        target_BK = log_prob_BK.double().clamp_min(floor)
        target_BK = net.temperature * (target_BK - target_BK.mean(1, keepdim=True))
        hidden_BH = net.hidden(x_BD).double()
        features = torch.cat((torch.ones_like(hidden_BH[:, :1]), hidden_BH), 1)
        moment += (features * weight_B.double()[:, None]).T @ torch.cat((features, target_BK), 1)
    assert moment[0, 0] > 0, "the weights sum to zero"
    moment /= moment[0, 0].clone()
    mean_H, mean_K = moment[0, 1 : 1 + H], moment[0, 1 + H :]
    covariance_HH = moment[1:, 1 : 1 + H] - mean_H[:, None] * mean_H
    covariance_HK = moment[1:, 1 + H :] - mean_H[:, None] * mean_K
    variance = covariance_HH.diagonal().mean()
    penalty = ridge * torch.where(variance > 0, variance, torch.ones_like(variance))
    covariance_HH.diagonal().add_(penalty)
    fitted_HK = torch.linalg.solve(covariance_HH, covariance_HK)
    weight_KH.copy_(fitted_HK.T)
    net.output_bias.copy_(mean_K - mean_H @ fitted_HK)
