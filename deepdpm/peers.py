"""Other ways to cluster the same codes, through scikit-learn: the rows that stand beside DeepDPM in a table.

Legend: N points, D dimensions, K clusters.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from sklearn.cluster import DBSCAN, HDBSCAN, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.neighbors import NearestNeighbors

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PeerFit:
    """What a peer found.

    Attributes:
        labels_N: cluster of each point in 0..K-1; -1 for noise, where a method knows noise.
        confidence_N: posterior probability of that cluster, 1 where a method gives none.
        num_components: how many clusters the method holds, empty ones included.
        log_likelihood: mean log density of a point, None where a method has none.
        epochs: passes over the data, None where a method does not count them.
    """

    labels_N: Integers
    confidence_N: Floats
    num_components: int
    log_likelihood: float | None = None
    epochs: int | None = None

    @property
    def num_clusters(self) -> int:
        """How many clusters own a point; noise is no cluster."""
        return len(np.unique(self.labels_N[self.labels_N >= 0]))


class Peer(Protocol):
    """What the `_target_` of a `peer` config makes: plain settings that can cluster points."""

    deterministic: bool

    @property
    def name(self) -> str:
        """How results and reports call the method."""

    def fit(self, x_ND: Floats, num_classes: int | None, seed: int) -> PeerFit:
        """Cluster the points; `num_classes` is the number of classes, None without labels."""


@dataclass(frozen=True)
class KMeansPeer:
    """K-means with K given (scikit-learn's, k-means++ starts).

    Attributes:
        name: how results and reports call the method.
        num_clusters: K; None takes the number of classes.
        num_starts: the best of so many starts is kept.

    Example:
        >>> x_ND = np.array([[0.0], [0.1], [9.0], [9.1]])
        >>> KMeansPeer(num_clusters=2).fit(x_ND, None, seed=0).num_clusters
        2
    """

    name: str = "kmeans"
    num_clusters: int | None = None
    num_starts: int = 10
    deterministic = False

    def __post_init__(self) -> None:
        _require_positive("peer.num_clusters", self.num_clusters)
        _require_positive("peer.num_starts", self.num_starts)

    def fit(self, x_ND: Floats, num_classes: int | None, seed: int) -> PeerFit:
        """Cluster the points.

        Raises:
            ValueError: K is neither set nor known from labels, or is more than N.
        """
        count = _given_k(self.num_clusters, num_classes, len(x_ND))
        fitted = KMeans(count, n_init=self.num_starts, random_state=seed).fit(x_ND)
        return PeerFit(fitted.labels_, np.ones(len(x_ND)), count, epochs=int(fitted.n_iter_))


@dataclass(frozen=True)
class GaussianMixturePeer:
    """Gaussian mixture with full covariances and K given, by expectation maximization (scikit-learn's).

    Attributes:
        name: how results and reports call the method.
        num_clusters: K; None takes the number of classes.
        max_iterations: limit of expectation maximization.
    """

    name: str = "gmm"
    num_clusters: int | None = None
    max_iterations: int = 200
    deterministic = False

    def __post_init__(self) -> None:
        _require_positive("peer.num_clusters", self.num_clusters)
        _require_positive("peer.max_iterations", self.max_iterations)

    def fit(self, x_ND: Floats, num_classes: int | None, seed: int) -> PeerFit:
        """Cluster the points.

        Raises:
            ValueError: K is neither set nor known from labels, or is more than N.
        """
        count = _given_k(self.num_clusters, num_classes, len(x_ND))
        return _fit_mixture(GaussianMixture(count, max_iter=self.max_iterations, random_state=seed), x_ND)


@dataclass(frozen=True)
class DirichletProcessPeer:
    """Dirichlet-process Gaussian mixture by variational inference (scikit-learn's BayesianGaussianMixture).

    Attributes:
        name: how results and reports call the method.
        max_components: where the process is cut off.
        concentration: weight concentration; None takes scikit-learn's 1 / max_components.
        max_iterations: limit of the variational updates.
    """

    name: str = "dp_mixture"
    max_components: int = 30
    concentration: float | None = None
    max_iterations: int = 500
    deterministic = False

    def __post_init__(self) -> None:
        _require_positive("peer.max_components", self.max_components)
        _require_positive("peer.concentration", self.concentration)
        _require_positive("peer.max_iterations", self.max_iterations)

    def fit(self, x_ND: Floats, num_classes: int | None, seed: int) -> PeerFit:
        """Cluster the points; the number of classes is not used."""
        mixture = BayesianGaussianMixture(
            n_components=min(self.max_components, len(x_ND)),
            weight_concentration_prior_type="dirichlet_process",
            weight_concentration_prior=self.concentration,
            max_iter=self.max_iterations,
            random_state=seed,
        )
        return _fit_mixture(mixture, x_ND)


@dataclass(frozen=True)
class DBSCANPeer:
    """DBSCAN (scikit-learn's); points of no dense region are noise.

    Attributes:
        name: how results and reports call the method.
        eps: radius of a neighbourhood; None takes it from the data: the 90 % quantile of the distance of
            a point to its `min_samples`-th neighbour, so that nine points of ten are dense.
        min_samples: points that make a neighbourhood dense; None takes 2 D (Sander et al., 1998), at least 4.
    """

    name: str = "dbscan"
    eps: float | None = None
    min_samples: int | None = None
    deterministic = True

    def __post_init__(self) -> None:
        _require_positive("peer.eps", self.eps)
        _require_positive("peer.min_samples", self.min_samples)

    def fit(self, x_ND: Floats, num_classes: int | None, seed: int) -> PeerFit:
        """Cluster the points; `num_classes` and `seed` are not used."""
        samples = min(self.min_samples or max(4, 2 * x_ND.shape[1]), len(x_ND))
        eps = self.eps
        if eps is None:
            distances_NS, _ = NearestNeighbors(n_neighbors=samples).fit(x_ND).kneighbors(x_ND)
            eps = float(np.quantile(distances_NS[:, -1], 0.9)) or float(np.finfo(np.float32).tiny)
        labels_N = DBSCAN(eps=eps, min_samples=samples).fit(x_ND).labels_
        return PeerFit(labels_N, np.ones(len(x_ND)), int(labels_N.max()) + 1)


@dataclass(frozen=True)
class HDBSCANPeer:
    """HDBSCAN (scikit-learn's); points of no stable cluster are noise.

    Attributes:
        name: how results and reports call the method.
        min_cluster_size: the smallest cluster, in points; None takes one point of a hundred, at least 5.
        min_samples: points that make a neighbourhood dense.
    """

    name: str = "hdbscan"
    min_cluster_size: int | None = None
    min_samples: int = 10
    deterministic = True

    def __post_init__(self) -> None:
        _require_positive("peer.min_cluster_size", self.min_cluster_size)
        _require_positive("peer.min_samples", self.min_samples)

    def fit(self, x_ND: Floats, num_classes: int | None, seed: int) -> PeerFit:
        """Cluster the points; `num_classes` and `seed` are not used."""
        smallest = max(5, len(x_ND) // 100) if self.min_cluster_size is None else self.min_cluster_size
        samples = min(self.min_samples, len(x_ND))
        fitted = HDBSCAN(min_cluster_size=max(2, smallest), min_samples=samples, copy=True).fit(x_ND)
        return PeerFit(fitted.labels_, fitted.probabilities_, int(fitted.labels_.max()) + 1)


def _fit_mixture(mixture: GaussianMixture | BayesianGaussianMixture, x_ND: Floats) -> PeerFit:
    """Fit a mixture in float64: a float32 covariance of codes of small scale is not positive definite."""
    x_ND = x_ND.astype(np.float64)
    with warnings.catch_warnings():
        # The iteration limit is a setting; the number of iterations stands in the result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(x_ND)
    r_NK = mixture.predict_proba(x_ND)
    return PeerFit(
        r_NK.argmax(1),
        r_NK.max(1),
        mixture.n_components,
        log_likelihood=float(mixture.score(x_ND)),
        epochs=int(mixture.n_iter_),
    )


def _given_k(num_clusters: int | None, num_classes: int | None, num_points: int) -> int:
    count = num_clusters if num_clusters is not None else num_classes
    if count is None:
        raise ValueError("peer.num_clusters is not set and the data set has no labels to count: set it.")
    if count > num_points:
        raise ValueError(f"peer.num_clusters is {count}, more than the {num_points} points: lower it.")
    return count


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"{name} is {value}: it must be positive.")
