"""How far two clusters are apart: the depth of the density's valley between them, seen from several sides.

Evidence alone cannot say whether two Gaussians are one curved or heavy-tailed cluster: it prefers two in both
cases. The density can: between two clusters it falls and rises again. This is where we go beyond the paper.

Legend: N points, M points of each cluster at the most, D dimensions, K clusters, P pairs, G places on a
line; a final 2 is the two clusters of a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdpm.linalg import cholesky
from deepdpm.mixture import Mixture
from deepdpm.stats import SufficientStats

MOST_POINTS = 1000
_LINE = (-1.0, 2.0)
_NUM_BINS = 256
_NUM_RIDGE = 33
_CHUNK_ELEMENTS = 4_000_000


def valley_ratios(
    x_ND: Tensor, labels_N: Tensor, stats: SufficientStats, mixture: Mixture, pairs_P2: Tensor
) -> Tensor:
    """The density's valley between the clusters of each pair over its lower peak, in 0..1 (P,).

    The greatest of three views, so that clusters count as apart only if they are so from every side: the
    kernel density along the discriminant direction of the pair's own covariance, along that of the pooled
    one, and the ridge line of the two Gaussians (Ray and Lindsay 2005, eq. 4). A
    direction fitted to few points shows a valley where there is none. So each point is projected on the
    direction found without it, and every metric fades to the covariance pooled over all clusters where a pair
    has fewer than D^2 points.

    Shapes: x (N, D), labels (N,) in 0..K-1, statistics and mixture of the K clusters, pairs (P, 2).

    >>> x_ND = torch.cat([torch.randn(500, 2), torch.randn(500, 2) + 8])
    >>> labels_N = torch.arange(1000) // 500
    >>> stats = SufficientStats.from_labels(x_ND, labels_N, 2)
    >>> mixture = Mixture(torch.ones(2) / 2, stats.mean_KD(), stats.scatter_KDD() / 500)
    >>> bool(valley_ratios(x_ND, labels_N, stats, mixture, torch.tensor([[0, 1]])).item() < 0.1)
    True
    """
    clusters = _Clusters.of(x_ND, labels_N, stats, mixture)
    step = max(1, _CHUNK_ELEMENTS // (MOST_POINTS * stats.num_dims))
    parts = [
        _greatest_view(clusters, pairs_P2[start : start + step]) for start in range(0, len(pairs_P2), step)
    ]
    return torch.cat(parts) if parts else stats.count_K.new_zeros(0)


@dataclass(frozen=True)
class _Clusters:
    """What the views need of the clusters; `valid_KM` says which of the thinned points are real.

    `own_KDD` are the covariances, faded to the pooled one; `weighted_KDD` are `n_k Sigma_k`.
    """

    points_KMD: Tensor
    valid_KM: Tensor
    count_K: Tensor
    mean_KD: Tensor
    weighted_KDD: Tensor
    pooled_DD: Tensor
    own_KDD: Tensor

    @classmethod
    def of(cls, x_ND: Tensor, labels_N: Tensor, stats: SufficientStats, mixture: Mixture) -> _Clusters:
        points_KMD, valid_KM = _thinned(x_ND, labels_N, stats.num_clusters)
        count_K = stats.count_K.clamp_min(1)
        weighted_KDD = count_K[:, None, None] * mixture.covariances_KDD.double()
        pooled_DD = weighted_KDD.sum(0) / count_K.sum()
        own_KDD = _faded(weighted_KDD, count_K, pooled_DD)
        return cls(points_KMD, valid_KM, count_K, stats.mean_KD(), weighted_KDD, pooled_DD, own_KDD)


def _faded(weighted_KDD: Tensor, count_K: Tensor, pooled_DD: Tensor) -> Tensor:
    """Covariances (K, D, D) of n points, `(n Sigma + D^2 pooled) / (n + D^2)`, from `n Sigma`."""
    num_free = float(pooled_DD.shape[0]) ** 2
    return (weighted_KDD + num_free * pooled_DD) / (count_K + num_free)[:, None, None]


def _thinned(x_ND: Tensor, labels_N: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """At most M points of each cluster, evenly taken: points (K, M, D) and which are real (K, M)."""
    order_N = labels_N.argsort(stable=True)
    count_K = torch.bincount(labels_N, minlength=num_clusters)
    first_K = count_K.cumsum(0) - count_K
    taken_K = count_K.clamp_max(MOST_POINTS)
    place_M = torch.arange(int(taken_K.max()), device=x_ND.device)
    offset_KM = place_M * count_K[:, None] // taken_K.clamp_min(1)[:, None]
    offset_KM = offset_KM.minimum((count_K - 1).clamp_min(0)[:, None])
    index_KM = order_N[(first_K[:, None] + offset_KM).clamp_max(len(order_N) - 1)]
    return x_ND[index_KM].double(), place_M < taken_K[:, None]


def _greatest_view(clusters: _Clusters, pairs_P2: Tensor) -> Tensor:
    left_P, right_P = pairs_P2.unbind(1)
    count_P2 = clusters.count_K[pairs_P2]
    pair_PDD = clusters.weighted_KDD[left_P] + clusters.weighted_KDD[right_P]
    metrics = (_faded(pair_PDD, count_P2.sum(1), clusters.pooled_DD), clusters.pooled_DD[None])
    points_P2MD = (clusters.points_KMD[pairs_P2] - clusters.mean_KD[left_P][:, None, None]).float()
    valid_P2M = clusters.valid_KM[pairs_P2]
    offset_PD = clusters.mean_KD[right_P] - clusters.mean_KD[left_P]
    views = [_line_view(points_P2MD, valid_P2M, offset_PD, count_P2, metric_PDD) for metric_PDD in metrics]
    views.append(_ridge_view(offset_PD, clusters.own_KDD[pairs_P2], count_P2))
    ratio_P = torch.stack(views).nan_to_num(nan=1.0).amax(0)
    # Of one or two points nothing can be said.
    return torch.where(count_P2.amin(1) < 3, torch.ones_like(ratio_P), ratio_P)


def _line_view(
    points_P2MD: Tensor, valid_P2M: Tensor, offset_PD: Tensor, count_P2: Tensor, metric_PDD: Tensor
) -> Tensor:
    """The valley of the points' density along `metric^-1 (mu_right - mu_left)`; the means lie at 0 and 1.

    Shapes: metric (P, D, D), or (1, D, D) for one that all pairs share.
    """
    num_pairs, num_dims = offset_PD.shape
    eye_PDD = torch.eye(num_dims).to(metric_PDD).expand_as(metric_PDD)
    # One small inverse and a product: a triangular solve for every point takes many times as long.
    inverse_PDD = torch.linalg.solve_triangular(cholesky(metric_PDD), eye_PDD, upper=False)
    white_PED = points_P2MD.reshape(num_pairs, -1, num_dims) @ inverse_PDD.mT.float()
    delta_PD1, count_P2 = (inverse_PDD @ offset_PD[:, :, None]).float(), count_P2.float()
    square_P11 = delta_PD1.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    along_P2M = (white_PED @ delta_PD1).view_as(valid_P2M)
    norm_P2M = white_PED.square().sum(2).view_as(valid_P2M)
    # Without point i the mean of its cluster moves by -(x_i - mean) / (n - 1), and the direction with it:
    # (w - delta / 2) . (delta +- (w - mean) / (n - 1)), where the means are 0 and delta.
    moved_P2M = norm_P2M - along_P2M / 2
    moved_P2M[:, 1] = -(moved_P2M[:, 1] - along_P2M[:, 1] + square_P11[:, 0] / 2)
    shifted_P2M = along_P2M + moved_P2M / (count_P2 - 1).clamp_min(1)[:, :, None]
    place_P2M = shifted_P2M / square_P11
    return _kernel_valley(place_P2M, valid_P2M, count_P2)


def _kernel_valley(place_P2M: Tensor, valid_P2M: Tensor, count_P2: Tensor) -> Tensor:
    """Valley over lower peak of a Gaussian kernel density, with the peaks sought around 0 and around 1 (P,).

    Bandwidth: Silverman's rule for the narrower cluster. Points are binned linearly, and the bins convolved
    in Fourier space.
    """
    taken_P2 = valid_P2M.sum(2).clamp_min(1)
    mean_P2 = (place_P2M * valid_P2M).sum(2) / taken_P2
    spread_P2 = ((place_P2M - mean_P2[:, :, None]).square() * valid_P2M).sum(2) / (taken_P2 - 1).clamp_min(1)
    width = (_LINE[1] - _LINE[0]) / _NUM_BINS
    bandwidth_P = (0.9 * spread_P2.amin(1).sqrt() * count_P2.amin(1) ** -0.2).clamp(width / 4, 0.5)
    inside_P2M = valid_P2M & (place_P2M > _LINE[0]) & (place_P2M < _LINE[1] - width)
    weight_P2M = inside_P2M * (count_P2 / taken_P2)[:, :, None]
    position_PE = ((place_P2M - _LINE[0]) / width - 0.5).clamp(0, _NUM_BINS - 2).flatten(1)
    bin_PE, weight_PE = position_PE.long(), weight_P2M.flatten(1)
    # As many empty bins behind keep the circular convolution from reaching round.
    bins_PG = torch.zeros(len(bin_PE), 2 * _NUM_BINS, dtype=position_PE.dtype, device=position_PE.device)
    bins_PG.scatter_add_(1, bin_PE, weight_PE * (1 - (position_PE - bin_PE)))
    bins_PG.scatter_add_(1, bin_PE + 1, weight_PE * (position_PE - bin_PE))
    frequency = (
        2 * math.pi * torch.fft.rfftfreq(2 * _NUM_BINS, width, dtype=bins_PG.dtype, device=bins_PG.device)
    )
    smooth = torch.exp(-0.5 * (frequency * bandwidth_P[:, None]).square())
    density_PG = torch.fft.irfft(torch.fft.rfft(bins_PG) * smooth, n=2 * _NUM_BINS)[:, :_NUM_BINS].clamp_min(
        0
    )
    place_G = _LINE[0] + (torch.arange(_NUM_BINS, device=density_PG.device) + 0.5) * width
    left, right = (place_G >= -0.5) & (place_G <= 0.5), (place_G > 0.5) & (place_G <= 1.5)
    left_peak_P, left_at_P = density_PG.masked_fill(~left, -1).max(1)
    right_peak_P, right_at_P = density_PG.masked_fill(~right, -1).max(1)
    index_G = torch.arange(_NUM_BINS, device=density_PG.device)
    between_PG = (index_G >= left_at_P[:, None]) & (index_G <= right_at_P[:, None])
    valley_P = density_PG.masked_fill(~between_PG, math.inf).amin(1)
    return valley_P / left_peak_P.minimum(right_peak_P)


def _ridge_view(offset_PD: Tensor, covariance_P2DD: Tensor, count_P2: Tensor) -> Tensor:
    """The deepest valley of the two Gaussians' density along their ridge line, over its lower peak (P,).

    On `x(a) = [(1 - a) Sigma_1^-1 + a Sigma_2^-1]^-1 [(1 - a) Sigma_1^-1 mu_1 + a Sigma_2^-1 mu_2]` lie all
    modes of the sum. The distance of the means is first freed of what their sampling error adds to it.
    """
    num_dims = offset_PD.shape[1]
    pooled_PDD = (count_P2[:, :, None, None] * covariance_P2DD).sum(1) / count_P2.sum(1)[:, None, None]
    white_PD = torch.linalg.solve_triangular(cholesky(pooled_PDD), offset_PD[:, :, None], upper=False)[
        :, :, 0
    ]
    square_P = white_PD.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    kept_P = ((square_P - num_dims * (1 / count_P2).sum(1)).clamp_min(0) / square_P).sqrt()
    factor_PDD = cholesky(covariance_P2DD[:, 0])
    half_PDD = torch.linalg.solve_triangular(factor_PDD, covariance_P2DD[:, 1], upper=False)
    second_PDD = torch.linalg.solve_triangular(factor_PDD, half_PDD.mT, upper=False)
    variance_PD, axes_PDD = torch.linalg.eigh((second_PDD + second_PDD.mT) / 2)
    variance_PD = variance_PD.clamp_min(1e-12)
    offset_PD1 = torch.linalg.solve_triangular(
        factor_PDD, (kept_P[:, None] * offset_PD)[:, :, None], upper=False
    )
    mean_P1D = (axes_PDD.mT @ offset_PD1).mT
    a_G1 = torch.linspace(0, 1, _NUM_RIDGE, dtype=variance_PD.dtype, device=variance_PD.device)[:, None]
    variance_P1D = variance_PD[:, None]
    x_PGD = (a_G1 * mean_P1D / variance_P1D) / ((1 - a_G1) + a_G1 / variance_P1D)
    log_first_PG = count_P2[:, :1].log() - 0.5 * x_PGD.square().sum(2)
    log_second_PG = count_P2[:, 1:].log() - 0.5 * (
        ((x_PGD - mean_P1D).square() / variance_P1D).sum(2) + variance_P1D.log().sum(2)
    )
    log_density_PG = torch.logaddexp(log_first_PG, log_second_PG)
    before_PG = log_density_PG.cummax(1).values
    after_PG = log_density_PG.flip(1).cummax(1).values.flip(1)
    return torch.exp(-(before_PG.minimum(after_PG) - log_density_PG).amax(1))
