"""Synthetic points have the moments they were drawn from."""

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from deepdpm.data.digits import Digits
from deepdpm.data.synthetic import Gaussians, SyntheticGrid, Varied, place, shaped_noise


def test_drawn_points_have_the_given_means_and_covariances() -> None:
    generator = torch.Generator().manual_seed(0)
    means_KD = torch.tensor([[0.0, 5.0], [-3.0, 1.0]])
    factors_KDD = torch.tensor([[[1.0, 0.0], [2.0, 0.5]], [[0.3, -0.4], [0.0, 1.0]]])
    labels_N = torch.arange(2).repeat(50_000)
    e_ND = torch.randn(100_000, 2, generator=generator)
    x_ND = place(e_ND, labels_N, means_KD, factors_KDD)
    for k in range(2):
        points = x_ND[labels_N == k]
        torch.testing.assert_close(points.mean(0), means_KD[k], atol=0.05, rtol=0)
        torch.testing.assert_close(points.T.cov(), factors_KDD[k] @ factors_KDD[k].T, atol=0.1, rtol=0)


def test_the_grid_is_the_published_one() -> None:
    data = SyntheticGrid(num_points=60_000, seed=4).load().train
    assert data.labels is not None
    counts = data.labels.bincount()
    assert len(counts) == 15
    assert ((counts / 60_000 - 1 / 15).abs() < 0.006).all()
    means = torch.stack([data.x[data.labels == k].mean(0) for k in range(15)])
    grid = torch.tensor([[x, y] for x in (-5.0, 0.0, 5.0) for y in (-5.0, -3.0, 0.0, 3.0, 5.0)])
    torch.testing.assert_close(means, grid, atol=0.06, rtol=0)
    # A = 0.5 I + (0.5 U - 0.3): diagonal in (0.2, 0.7), the rest in (-0.3, 0.2); so a variance is below 0.58.
    variances = torch.stack([data.x[data.labels == k].var(0) for k in range(15)])
    assert variances.max() < 0.62
    assert variances.min() > 0.03


@pytest.mark.parametrize("source", [SyntheticGrid(num_points=500), Gaussians(num_points=500)])
def test_the_same_seed_gives_the_same_points_and_no_trace(source: SyntheticGrid | Gaussians) -> None:
    state = torch.random.get_rng_state()
    first, second = source.load(), source.load()
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(state, torch.random.get_rng_state())
    other = type(source)(num_points=500, seed=1).load()
    assert not torch.equal(first.train.x, other.train.x)


@pytest.mark.parametrize("covariance", ["spherical", "diagonal", "full"])
def test_gaussians_keep_their_settings(covariance: str) -> None:
    source = Gaussians(
        num_points=40_000,
        num_dims=3,
        num_clusters=4,
        separation=6.0,
        spread=0.1,
        covariance=covariance,
        seed=2,
    )
    data = source.load().train
    assert data.labels is not None
    means = torch.stack([data.x[data.labels == k].mean(0) for k in range(4)])
    assert torch.pdist(means).min().item() == pytest.approx(0.6, rel=0.05)
    correlated, stretched = 0.0, 1.0
    for k in range(4):
        covariance_DD = data.x[data.labels == k].T.cov()
        assert covariance_DD.trace().item() / 3 == pytest.approx(0.01, rel=0.05)
        variance_D = covariance_DD.diag()
        correlation_DD = covariance_DD / torch.outer(variance_D, variance_D).sqrt()
        correlated = max(correlated, (correlation_DD - torch.eye(3)).abs().max().item())
        stretched = max(stretched, (variance_D.max() / variance_D.min()).item())
    assert (correlated > 0.1) == (covariance == "full")
    assert (stretched > 1.3) == (covariance != "spherical")


@pytest.mark.parametrize(
    ("shape", "skewness", "kurtosis"), [("gaussian", 0.0, 3.0), ("skewed", 2.89, 20.8), ("curved", 0.0, 3.0)]
)
def test_noise_has_the_moments_of_its_shape(shape: str, skewness: float, kurtosis: float) -> None:
    # Of a log-normal variate, w = exp(.7^2): (w + 2) sqrt(w - 1) and w^4 + 2 w^3 + 3 w^2 - 3.
    e_ND = shaped_noise(shape, 1_000_000, 2, torch.Generator().manual_seed(0))
    first_N = e_ND[:, 0].double()
    assert first_N.mean().item() == pytest.approx(0, abs=0.01)
    assert first_N.std().item() == pytest.approx(1, rel=0.01)
    assert first_N.pow(3).mean().item() == pytest.approx(skewness, rel=0.1, abs=0.02)
    assert first_N.pow(4).mean().item() == pytest.approx(kurtosis, rel=0.25)
    bent = (e_ND[:, 1] * (e_ND[:, 0].square() - 1)).mean().item()
    assert bent == pytest.approx(1.6 if shape == "curved" else 0, abs=0.1)


def test_heavy_tails_are_those_of_student() -> None:
    e_N = shaped_noise("heavy_tailed", 400_000, 1, torch.Generator().manual_seed(0))[:, 0]
    for quantile in (0.75, 0.95, 0.999):
        expected = stats.t.ppf(quantile, df=4)
        assert e_N.kthvalue(int(quantile * len(e_N))).values.item() == pytest.approx(expected, rel=0.05)


def test_each_seed_draws_another_kind_of_data() -> None:
    drawn = [Varied(seed=seed).drawn() for seed in range(30)]
    for name in ("num_dims", "num_clusters", "num_points", "spread", "weight_concentration"):
        assert len({getattr(settings, name) for settings in drawn}) >= 3, name
    assert Varied(seed=3).drawn() == drawn[3]
    data = Varied(seed=3, shape="curved", name="bent").load()
    assert data.name == "bent"
    assert tuple(data.train.x.shape) == (drawn[3].num_points, drawn[3].num_dims)


def test_weights_are_equal_or_drawn() -> None:
    equal = Gaussians(num_points=20_000, num_clusters=5).load().train.labels
    drawn = Gaussians(num_points=20_000, num_clusters=5, weight_concentration=0.5).load().train.labels
    assert equal is not None
    assert drawn is not None
    assert (equal.bincount() / 20_000 - 0.2).abs().max() < 0.02
    assert drawn.bincount().max() / 20_000 > 0.3


def test_one_cluster_and_more_dimensions_than_points_are_no_error() -> None:
    assert Gaussians(num_points=5, num_dims=40, num_clusters=1).load().train.x.shape == (5, 40)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_points", 1), ("num_dims", 0), ("num_clusters", 0), ("separation", -1.0), ("spread", 0.0),
        ("weight_concentration", 0.0), ("covariance", "round"), ("shape", "square"), ("seed", -1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"dataset\.{setting} is {value}"):
        Gaussians(**{setting: value}).load()


def test_a_line_cannot_be_bent() -> None:
    with pytest.raises(ValueError, match=r"dataset\.shape is curved.*dataset\.num_dims=2"):
        Gaussians(num_dims=1, shape="curved").load()


def test_digits_are_those_of_scikit_learn() -> None:
    data, (x_ND, labels_N) = Digits().load(), load_digits(return_X_y=True)
    assert data.train.labels is not None
    assert (data.train.x.numpy() == x_ND).all()
    assert (data.train.labels.numpy() == labels_N).all()
    assert data.class_names == tuple("0123456789")
