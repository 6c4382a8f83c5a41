"""Synthetic points: the published 2-D grid, and Gaussians of any number, dimension and shape.

Legend: N points, D dimensions, K clusters.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from deepdpm.data.samples import Dataset, make_samples

_GRID_X = (-5.0, 0.0, 5.0)
_GRID_Y = (-5.0, -3.0, 0.0, 3.0, 5.0)
_STRETCH = 2.0
_COVARIANCES = ("spherical", "diagonal", "full")


def draw_gaussians(labels_N: Tensor, means_KD: Tensor, factors_KDD: Tensor, generator: Generator) -> Tensor:
    """Draw `x_i = mean_k + A_k e_i` with k the label of i and e_i standard normal.

    Args:
        labels_N: int64 (N,).
        means_KD: (K, D).
        factors_KDD: A with A A^T the covariance, (K, D, D).
        generator: of the noise.

    Returns:
        float32 (N, D), rows in the order of the labels.

    Example:
        >>> means = torch.tensor([[0.0], [10.0]])
        >>> x = draw_gaussians(torch.tensor([1, 0]), means, torch.zeros(2, 1, 1), Generator().manual_seed(0))
        >>> x[:, 0].tolist()
        [10.0, 0.0]
    """
    x_ND = torch.randn(len(labels_N), means_KD.shape[1], generator=generator)
    order_N = labels_N.argsort()
    # Sorted by label each cluster is one slice, so nothing of size N x D x D is made.
    for k, rows in enumerate(order_N.split(labels_N.bincount(minlength=len(means_KD)).tolist())):
        x_ND[rows] = x_ND[rows] @ factors_KDD[k].T + means_KD[k]
    return x_ND


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
        x_ND = draw_gaussians(labels_N, means_KD, 0.5 * torch.eye(2) + noise_KDD, generator)
        return Dataset(self.name, make_samples(x_ND, labels_N, self.name))


@dataclass(frozen=True)
class Gaussians:
    """Gaussian clusters of any number, dimension, size and shape.

    Attributes:
        num_points: N.
        num_dims: D.
        num_clusters: K; small N or very unequal sizes can leave some without a point.
        separation: the smallest distance between two centres, in units of `spread`.
        spread: the root mean square of a cluster's standard deviations.
        weight_concentration: concentration of the Dirichlet distribution that the cluster sizes are drawn
            from, the smaller the more unequal; None for equal weights.
        covariance: `spherical`; `diagonal`: another deviation for each dimension, up to a factor of 4 apart;
            `full`: the same, turned by a random rotation for each cluster.
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
    seed: int = 0

    def load(self) -> Dataset:
        """Draw the points; raises ValueError for a setting out of range."""
        self._check()
        generator = _generator(self.seed)
        means_KD = self._means(generator)
        factors_KDD = self._factors(generator)
        weights_K = self._weights(generator)
        labels_N = torch.multinomial(weights_K, self.num_points, replacement=True, generator=generator)
        x_ND = draw_gaussians(labels_N, means_KD, factors_KDD, generator)
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


def _generator(seed: int) -> Generator:
    _require(seed >= 0, "seed", seed, "0 or more")
    return Generator().manual_seed(seed)


def _require(holds: bool, setting: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"dataset.{setting} is {value}: give {wanted}.")
