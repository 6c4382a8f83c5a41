"""Peers find what is plainly there, and refuse what they cannot do."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from deepdpm.peers import DBSCANPeer, DirichletProcessPeer, GaussianMixturePeer, HDBSCANPeer, KMeansPeer, Peer

PEERS: list[Peer] = [
    KMeansPeer(),
    GaussianMixturePeer(),
    DirichletProcessPeer(max_components=10),
    DBSCANPeer(),
    HDBSCANPeer(),
]


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(4), 150)
    centres_KD = np.array([[0, 0, 0], [10, 0, 0], [0, 10, 0], [0, 0, 10]])
    x_ND = centres_KD[labels_N] + 0.5 * generator.standard_normal((600, 3))
    return x_ND.astype(np.float32), labels_N


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: type(peer).__name__)
def test_separated_clusters_are_found(peer: Peer, blobs) -> None:
    x_ND, labels_N = blobs
    fit = peer.fit(x_ND, num_classes=4, seed=0)
    assert fit.labels_N.shape == fit.confidence_N.shape == (600,)
    assert fit.num_clusters <= fit.num_components
    clear_N = fit.labels_N >= 0
    assert clear_N.mean() > 0.85
    assert adjusted_rand_score(labels_N[clear_N], fit.labels_N[clear_N]) > 0.95
    assert fit.confidence_N.min() >= 0
    assert fit.confidence_N.max() <= 1 + 1e-6


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: type(peer).__name__)
def test_the_same_seed_gives_the_same_labels(peer: Peer, blobs) -> None:
    x_ND, _ = blobs
    first, second = (peer.fit(x_ND, 4, seed=3).labels_N for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "peer", [peer for peer in PEERS if peer.deterministic], ids=lambda peer: type(peer).__name__
)
def test_deterministic_peers_ignore_the_seed(peer: Peer, blobs) -> None:
    x_ND, _ = blobs
    assert np.array_equal(peer.fit(x_ND, 4, seed=0).labels_N, peer.fit(x_ND, 4, seed=1).labels_N)


@pytest.mark.parametrize("peer", [DBSCANPeer(), HDBSCANPeer()], ids=lambda peer: type(peer).__name__)
def test_density_peers_run_at_any_scale(peer: Peer, blobs) -> None:
    x_ND, _ = blobs
    assert np.array_equal(peer.fit(x_ND * 1024, 4, 0).labels_N, peer.fit(x_ND, 4, 0).labels_N)


def test_coinciding_points_are_one_dense_region() -> None:
    fit = DBSCANPeer().fit(np.ones((50, 2)), None, seed=0)
    assert fit.num_clusters == 1


def test_the_mean_log_density_is_scikit_learns(blobs) -> None:
    x_ND, _ = blobs
    fit = GaussianMixturePeer().fit(x_ND, 4, seed=0)
    oracle = GaussianMixture(4, max_iter=200, random_state=0).fit(x_ND.astype(float)).score(x_ND)
    assert fit.log_likelihood == pytest.approx(oracle)


def test_k_must_be_known(blobs) -> None:
    x_ND, _ = blobs
    with pytest.raises(ValueError, match=r"peer\.num_clusters is not set"):
        KMeansPeer().fit(x_ND, None, seed=0)
    with pytest.raises(ValueError, match=r"peer\.num_clusters is 700"):
        GaussianMixturePeer(num_clusters=700).fit(x_ND, None, seed=0)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"peer\.eps is -1"):
        DBSCANPeer(eps=-1)
