"""How far two clusters are apart: the depth of the density's valley between them, seen from several sides.

Evidence alone cannot say whether two Gaussians are one curved or heavy-tailed cluster: it prefers two in both
cases. The density can: between two clusters it falls and rises again. This is where we go beyond the paper.

Legend: N points, M points of each cluster at the most, T of all, D dimensions, K clusters, P pairs, C pairs
of a chunk, E points of a pair, G places on a line; a final 2 is the two clusters of a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdpm.linalg import cholesky, inverse_cholesky
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
    >>> mixture = Mixture(torch.ones(2) / 2, stats.mean_KD, stats.scatter_KDD / 500)
    >>> bool(valley_ratios(x_ND, labels_N, stats, mixture, torch.tensor([[0, 1]])).item() < 0.1)
    True
    """
    clusters = _Clusters.of(x_ND, labels_N, stats, mixture)
    size_P = clusters.taken_K[pairs_P2].amax(1)
    # Pairs of like size share a chunk: padded to the largest of all, small ones would cost as much as it.
    order_P = size_P.argsort(descending=True)
    sizes = size_P[order_P].tolist()
    ratio_P = stats.count_K.new_zeros(len(pairs_P2))
    start = 0
    while start < len(sizes):
        most = max(1, sizes[start])
        chunk_C = order_P[start : start + max(1, _CHUNK_ELEMENTS // (2 * most * stats.num_dims))]
        ratio_P[chunk_C] = _greatest_view(clusters, pairs_P2[chunk_C], most)
        start += len(chunk_C)
    return ratio_P


@dataclass(frozen=True)
class _Clusters:
    """What the views need of the clusters, and at most M points of each, relative to its mean.

    Of the T points, cluster k has `taken_K[k]` from `first_K[k]` on; `pooled_norm_T` are their squared
    lengths in the pooled metric. `weighted_KDD` are `n_k Sigma_k`, `own_KDD` the covariances, faded to the
    pooled one.
    """

    points_TD: Tensor
    pooled_norm_T: Tensor
    first_K: Tensor
    taken_K: Tensor
    count_K: Tensor
    mean_KD: Tensor
    weighted_KDD: Tensor
    pooled_DD: Tensor
    pooled_inverse_DD: Tensor
    own_KDD: Tensor

    @classmethod
    def of(cls, x_ND: Tensor, labels_N: Tensor, stats: SufficientStats, mixture: Mixture) -> _Clusters:
        mean_KD, count_K = stats.mean_KD, stats.count_K.clamp_min(1)
        index_T, first_K, taken_K = _thinned(labels_N, stats.num_clusters)
        points_TD = (x_ND[index_T].double() - mean_KD[labels_N[index_T]]).float()
        weighted_KDD = count_K[:, None, None] * mixture.covariances_KDD.double()
        pooled_DD = weighted_KDD.sum(0) / count_K.sum()
        inverse_DD = inverse_cholesky(pooled_DD)
        return cls(
            points_TD,
            (points_TD @ inverse_DD.T.float()).square().sum(1),
            first_K,
            taken_K,
            count_K,
            mean_KD,
            weighted_KDD,
            pooled_DD,
            inverse_DD,
            _faded(weighted_KDD, count_K, pooled_DD),
        )

    def points_of(self, pairs_P2: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Rows (P, 2, M) of the points of each pair's clusters, and which are real (P, 2, M)."""
        place_M = torch.arange(most, device=pairs_P2.device)
        index_P2M = self.first_K[pairs_P2][:, :, None] + place_M
        return index_P2M.clamp_max(len(self.points_TD) - 1), place_M < self.taken_K[pairs_P2][:, :, None]


def _faded(weighted_KDD: Tensor, count_K: Tensor, pooled_DD: Tensor) -> Tensor:
    """Covariances (K, D, D) of n points, `(n Sigma + D^2 pooled) / (n + D^2)`, from `n Sigma`."""
    num_free = float(pooled_DD.shape[0]) ** 2
    return (weighted_KDD + num_free * pooled_DD) / (count_K + num_free)[:, None, None]


def _thinned(labels_N: Tensor, num_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (T,) of at most M points of each cluster, evenly taken; the first and the number of each (K,)."""
    order_N = labels_N.argsort(stable=True)
    count_K = torch.bincount(labels_N, minlength=num_clusters)
    taken_K = count_K.clamp_max(MOST_POINTS)
    first_K = taken_K.cumsum(0) - taken_K
    cluster_T = torch.arange(num_clusters, device=labels_N.device).repeat_interleave(taken_K)
    place_T = torch.arange(len(cluster_T), device=labels_N.device) - first_K[cluster_T]
    offset_T = place_T * count_K[cluster_T] // taken_K[cluster_T]
    return order_N[(count_K.cumsum(0) - count_K)[cluster_T] + offset_T], first_K, taken_K


def _greatest_view(clusters: _Clusters, pairs_P2: Tensor, most: int) -> Tensor:
    left_P, right_P = pairs_P2.unbind(1)
    count_P2 = clusters.count_K[pairs_P2]
    offset_PD = clusters.mean_KD[right_P] - clusters.mean_KD[left_P]
    index_P2M, valid_P2M = clusters.points_of(pairs_P2, most)
    points_PED = clusters.points_TD[index_P2M.flatten(1)]
    pair_PDD = clusters.weighted_KDD[left_P] + clusters.weighted_KDD[right_P]
    inverse_PDD = inverse_cholesky(_faded(pair_PDD, count_P2.sum(1), clusters.pooled_DD))
    white_PED = points_PED @ inverse_PDD.mT.float()
    own_delta_PD = (inverse_PDD @ offset_PD[:, :, None]).float()[:, :, 0]
    pooled_delta_PD = (offset_PD @ clusters.pooled_inverse_DD.T).float()
    direction_PD = pooled_delta_PD @ clusters.pooled_inverse_DD.float()
    views = [
        _line_view(white_PED, own_delta_PD, own_delta_PD, white_PED.square().sum(2), valid_P2M, count_P2),
        _line_view(
            points_PED,
            direction_PD,
            pooled_delta_PD,
            clusters.pooled_norm_T[index_P2M].flatten(1),
            valid_P2M,
            count_P2,
        ),
        _ridge_view(offset_PD, clusters.own_KDD[pairs_P2], count_P2),
    ]
    ratio_P = torch.stack(views).nan_to_num(nan=1.0).amax(0)
    # Of one or two points nothing can be said.
    return torch.where(count_P2.amin(1) < 3, torch.ones_like(ratio_P), ratio_P)


def _line_view(
    points_PED: Tensor,
    direction_PD: Tensor,
    delta_PD: Tensor,
    norm_PE: Tensor,
    valid_P2M: Tensor,
    count_P2: Tensor,
) -> Tensor:
    """The valley of the points' density along `metric^-1 (mu_right - mu_left)`; the means lie at 0 and 1.

    Points are relative to the mean of their own cluster; their product with `direction` is the one with the
    difference of the means, `delta` that difference and `norm` their squared lengths, all in the metric.

    Shapes: points (P, E, D) with E = 2 M, direction and delta (P, D), norm (P, E), valid (P, 2, M), count
    (P, 2), to (P,) in 0..1.
    """
    count_P2 = count_P2.float()
    square_P1 = delta_PD.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    along_P2M = (points_PED @ direction_PD[:, :, None]).view_as(valid_P2M)
    norm_P2M = norm_PE.view_as(valid_P2M)
    # Without point i, by w from its mean, that mean moves by -w / (n - 1), and the direction with it: the
    # point's place, seen from half-way between the means, is (w -+ delta / 2) . (delta +- w / (n - 1)).
    sign_21 = torch.tensor([[1.0], [-1.0]], device=norm_P2M.device)
    moved_P2M = sign_21 * norm_P2M - along_P2M / 2
    shifted_P2M = along_P2M + moved_P2M / (count_P2 - 1).clamp_min(1)[:, :, None]
    shifted_P2M[:, 1] += square_P1
    return _kernel_valley(shifted_P2M / square_P1[:, :, None], valid_P2M, count_P2)


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
