"""Synthetic points: the published 2-D grid, clusters of any number, dimension and shape, and drawn ones.

Legend: N points, D dimensions, K clusters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from deepdpm.data.samples import Dataset, make_samples

_GRID_X = (-5.0, 0.0, 5.0)
_GRID_Y = (-5.0, -3.0, 0.0, 3.0, 5.0)
_STRETCH = 2.0
_COVARIANCES = ("spherical", "diagonal", "full")
_SHAPES = ("gaussian", "skewed", "curved", "heavy_tailed")
_SKEW = 0.7
_BEND = 0.8


def place(noise_ND: Tensor, labels_N: Tensor, means_KD: Tensor, factors_KDD: Tensor) -> Tensor:
    """Put noise e_i into the clusters of the labels: `x_i = mean_k + A_k e_i`.

    Args:
        noise_ND: standard normal for Gaussians, (N, D); overwritten.
        labels_N: int64 (N,).
        means_KD: (K, D).
        factors_KDD: A with A A^T the covariance, (K, D, D).

    Returns:
        (N, D), rows in the order of the labels.

    Example:
        >>> means = torch.tensor([[0.0], [10.0]])
        >>> place(torch.ones(2, 1), torch.tensor([1, 0]), means, torch.ones(2, 1, 1))[:, 0].tolist()
        [11.0, 1.0]
    """
    order_N = labels_N.argsort()
    # Sorted by label each cluster is one slice, so nothing of size N x D x D is made.
    for k, rows in enumerate(order_N.split(labels_N.bincount(minlength=len(means_KD)).tolist())):
        noise_ND[rows] = noise_ND[rows] @ factors_KDD[k].T + means_KD[k]
    return noise_ND


def shaped_noise(shape: str, num_points: int, num_dims: int, generator: Generator) -> Tensor:
    """Noise of mean 0 (N, D), from standard normal e: a cluster before it is stretched and turned.

    - "gaussian": e.
    - "skewed": `(exp(.7 e) - m) / s`, each dimension log-normal, m and s its mean and standard deviation.
    - "curved": a parabola, `.8 (e_1^2 - 1)` added to the second dimension.
    - "heavy_tailed": Student's t of 4 degrees of freedom, `e / sqrt(c / 4)` with c chi-squared.

    All have unit variance but the second dimension of "curved" (2.28) and "heavy_tailed" (2).

    Example:
        >>> tuple(shaped_noise("skewed", 5, 3, Generator().manual_seed(0)).shape)
        (5, 3)
    """
    e_ND = torch.randn(num_points, num_dims, generator=generator)
    if shape == "skewed":
        mean, variance = math.exp(0.5 * _SKEW**2), math.exp(_SKEW**2)
        return ((_SKEW * e_ND).exp() - mean) / math.sqrt((variance - 1) * variance)
    if shape == "curved":
        e_ND[:, 1] += _BEND * (e_ND[:, 0].square() - 1)
    if shape == "heavy_tailed":
        # Of 4 degrees of freedom: the sum of two exponential variates, twice.
        uniform_N2 = 1 - torch.rand(num_points, 2, generator=generator)
        e_ND /= (-2 * uniform_N2.log().sum(1, keepdim=True) / 4).sqrt()
    return e_ND


@dataclass(frozen=True)
class SyntheticGrid:
    """The authors' 2-D set: 15 equally likely Gaussians on a 3 x 5 grid.

    Covariances are A A^T with A = 0.5 I + (0.5 U - 0.3), U uniform in (0, 1) entrywise.

    Attributes:
        num_points: N.
        seed: of the data, apart from the seed of the run.

    Example:
        >>> data = SyntheticGrid(num_points=100).load()
        >>> tuple(data.train.x.shape), data.train.labels.max().item() < 15
        ((100, 2), True)
    """

    name: str = "synthetic"
    num_points: int = 10_000
    seed: int = 0

    def load(self) -> Dataset:
        """Draw the points; raises ValueError for fewer than two."""
        _require(self.num_points >= 2, "num_points", self.num_points, "at least 2")
        generator = _generator(self.seed)
        means_KD = torch.cartesian_prod(torch.tensor(_GRID_X), torch.tensor(_GRID_Y))
        noise_KDD = 0.5 * torch.rand(len(means_KD), 2, 2, generator=generator) - 0.3
        labels_N = torch.randint(len(means_KD), (self.num_points,), generator=generator)
        e_ND = torch.randn(self.num_points, 2, generator=generator)
        x_ND = place(e_ND, labels_N, means_KD, 0.5 * torch.eye(2) + noise_KDD)
        return Dataset(self.name, make_samples(x_ND, labels_N, self.name))


@dataclass(frozen=True)
class Gaussians:
    """Gaussian clusters of any number, dimension and size, or others in their place.

    Attributes:
        num_points: N.
        num_dims: D.
        num_clusters: K; small N or very unequal sizes can leave some without a point.
        separation: the smallest distance between two centres, in units of `spread`.
        spread: the root mean square of a cluster's standard deviations, before its shape.
        weight_concentration: concentration of the Dirichlet distribution that the cluster sizes are drawn
            from, the smaller the more unequal; None for equal weights.
        covariance: `spherical`; `diagonal`: another deviation for each dimension, up to a factor of 4 apart;
            `full`: the same, turned by a random rotation for each cluster.
        shape: what the points of a cluster are, before its covariance: `gaussian`, `skewed`, `curved` or
            `heavy_tailed` (`shaped_noise`).
        seed: of the data, apart from the seed of the run.

    Example:
        >>> data = Gaussians(num_points=50, num_dims=3, num_clusters=2, covariance="full").load()
        >>> tuple(data.train.x.shape), data.train.labels.unique().tolist()
        ((50, 3), [0, 1])
    """

    name: str = "gaussians"
    num_points: int = 10_000
    num_dims: int = 10
    num_clusters: int = 10
    separation: float = 8.0
    spread: float = 1.0
    weight_concentration: float | None = None
    covariance: str = "full"
    shape: str = "gaussian"
    seed: int = 0

    def load(self) -> Dataset:
        """Draw the points; raises ValueError for a setting out of range."""
        self._check()
        generator = _generator(self.seed)
        means_KD = self._means(generator)
        factors_KDD = self._factors(generator)
        weights_K = self._weights(generator)
        labels_N = torch.multinomial(weights_K, self.num_points, replacement=True, generator=generator)
        e_ND = shaped_noise(self.shape, self.num_points, self.num_dims, generator)
        x_ND = place(e_ND, labels_N, means_KD, factors_KDD)
        return Dataset(self.name, make_samples(x_ND, labels_N, self.name))

    def _check(self) -> None:
        _require(self.num_points >= 2, "num_points", self.num_points, "at least 2")
        _require(self.num_dims >= 1, "num_dims", self.num_dims, "at least 1")
        _require(self.num_clusters >= 1, "num_clusters", self.num_clusters, "at least 1")
        _require(self.separation >= 0, "separation", self.separation, "0 or more")
        _require(self.spread > 0, "spread", self.spread, "more than 0")
        weight = self.weight_concentration
        _require(weight is None or weight > 0, "weight_concentration", weight, "more than 0, or null")
        kinds = f"one of {', '.join(_COVARIANCES)}"
        _require(self.covariance in _COVARIANCES, "covariance", self.covariance, kinds)
        _require(self.shape in _SHAPES, "shape", self.shape, f"one of {', '.join(_SHAPES)}")
        bends = self.shape != "curved" or self.num_dims > 1
        _require(bends, "shape", self.shape, "another shape, or dataset.num_dims=2 or more")

    def _means(self, generator: Generator) -> Tensor:
        means_KD = torch.randn(self.num_clusters, self.num_dims, generator=generator)
        if self.num_clusters == 1:
            return means_KD
        return means_KD * (self.separation * self.spread / torch.pdist(means_KD).min())

    def _factors(self, generator: Generator) -> Tensor:
        shape = (self.num_clusters, self.num_dims)
        if self.covariance == "spherical":
            return self.spread * torch.eye(self.num_dims).expand(*shape, -1)
        std_KD = _STRETCH ** (2 * torch.rand(shape, generator=generator) - 1)
        std_KD *= self.spread / std_KD.square().mean(1, keepdim=True).sqrt()
        if self.covariance == "diagonal":
            return torch.diag_embed(std_KD)
        rotations_KDD, _ = torch.linalg.qr(torch.randn(*shape, self.num_dims, generator=generator))
        return rotations_KDD * std_KD[:, None, :]

    def _weights(self, generator: Generator) -> Tensor:
        if self.weight_concentration is None:
            return torch.ones(self.num_clusters)
        # torch.distributions takes no generator, so the global one is seeded from ours and put back
        # afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            concentration_K = torch.full((self.num_clusters,), self.weight_concentration, dtype=torch.float64)
            return torch.distributions.Dirichlet(concentration_K).sample()


@dataclass(frozen=True)
class Varied:
    """A data set of which everything is drawn by its seed, to judge settings on many sets of known truth.

    2 to 64 dimensions, 8 to 50 clusters of 20 to 500 points on the average (12,000 in all at the most), units
    from 1e-4 to 1e4; equal or unequal sizes; centres 5 to 9 spreads apart at the least.

    Attributes:
        shape: of the clusters, as in `Gaussians`.
        seed: of the data, apart from the seed of the run.

    Example:
        >>> data = Varied(seed=1).load()
        >>> len(data.train.labels.unique()), Varied(seed=1).drawn().num_clusters
        (20, 20)
    """

    name: str = "varied"
    shape: str = "gaussian"
    seed: int = 0

    def drawn(self) -> Gaussians:
        """The settings that the seed gives; raises ValueError for a seed below 0."""
        generator = _generator(self.seed)

        def one_of(*values: int) -> int:
            return values[int(torch.randint(len(values), (), generator=generator))]

        def between(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        num_clusters = one_of(8, 10, 12, 15, 20, 26, 31, 40, 50)
        return Gaussians(
            name=self.name,
            num_dims=one_of(2, 3, 4, 6, 8, 10, 16, 24, 32, 64),
            num_clusters=num_clusters,
            num_points=min(12_000, num_clusters * one_of(20, 40, 80, 150, 300, 500)),
            separation=between(5, 9),
            spread=10 ** between(-4, 4),
            weight_concentration=one_of(0, 0, 2, 5) or None,
            shape=self.shape,
            seed=self.seed,
        )

    def load(self) -> Dataset:
        """Draw the points; raises ValueError for a setting out of range."""
        return self.drawn().load()


def _generator(seed: int) -> Generator:
    _require(seed >= 0, "seed", seed, "0 or more")
    return Generator().manual_seed(seed)


def _require(holds: bool, setting: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"dataset.{setting} is {value}: give {wanted}.")
