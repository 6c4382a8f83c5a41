"""The estimator: scikit-learn's own checks, the same labels as the command line, and a life on disk."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pytest
import torch
from scipy.stats import f, kstest
from sklearn.base import clone
from sklearn.datasets import load_iris, make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepdpm import DeepDPM
from deepdpm.data.synthetic import SyntheticGrid
from deepdpm.parameters import KINDS
from deepdpm.settings import from_plain
from deepdpm.stats import squared_spacing

FAST = {"max_epochs": 12, "polish_steps": 20}


@parametrize_with_checks([DeepDPM(**FAST)])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    return make_blobs(600, n_features=2, centers=[[0, 0], [8, 0], [0, 8], [8, 8]], random_state=0)


@pytest.fixture(scope="module")
def fitted(blobs: tuple[np.ndarray, np.ndarray]) -> DeepDPM:
    return DeepDPM(max_epochs=30, polish_steps=100).fit(blobs[0])


def test_without_parameters_the_settings_are_the_defaults() -> None:
    groups = DeepDPM()._groups()
    for group, kind in KINDS.items():
        assert from_plain(kind, groups[group]) == kind()


def test_it_finds_and_describes_the_clusters(fitted: DeepDPM, blobs: tuple[np.ndarray, np.ndarray]) -> None:
    points, truth = blobs
    assert fitted.n_clusters_ == 4
    assert adjusted_rand_score(truth, fitted.labels_) > 0.98
    for k in range(4):
        of_k = points[fitted.labels_ == k]
        np.testing.assert_allclose(fitted.means_[k], of_k.mean(0), atol=0.1)
        np.testing.assert_allclose(fitted.covariances_[k], np.cov(of_k.T), atol=0.25)
    np.testing.assert_allclose(fitted.weights_.sum(), 1)
    assert fitted.history_[0]["num_clusters"] == 4
    assert fitted.history_[0]["moves"].startswith("split 0 -> 0, ")
    assert len(fitted.history_) == fitted.n_iter_


def test_predictions_agree_with_each_other(fitted: DeepDPM, blobs: tuple[np.ndarray, np.ndarray]) -> None:
    points = blobs[0]
    proba = fitted.predict_proba(points)
    np.testing.assert_array_equal(proba.argmax(1), fitted.predict(points))
    np.testing.assert_array_equal(fitted.labels_, fitted.predict(points))
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    assert fitted.score(points) == pytest.approx(fitted.score_samples(points).mean())


def test_the_density_integrates_to_one(fitted: DeepDPM) -> None:
    grid = np.stack(np.meshgrid(np.arange(-8, 16, 0.1), np.arange(-8, 16, 0.1)), 2).reshape(-1, 2)
    assert np.exp(fitted.score_samples(grid).astype(float)).sum() * 0.01 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "kind", ["none", "normalize", "min_max", "standard", "standard_normalize", "principal"]
)
def test_samples_have_the_moments_of_the_mixture(kind: str, blobs: tuple[np.ndarray, np.ndarray]) -> None:
    gaussian = {"prior.tail_dof": np.inf}
    model = DeepDPM(transform_kind=kind, max_epochs=2, settings=gaussian).fit(blobs[0] + 3)
    points, labels = model.sample(4000)
    mean = model.weights_ @ model.means_
    spread = np.einsum("k,kij->ij", model.weights_, model.covariances_) + np.cov(
        model.means_.T, aweights=model.weights_, ddof=0
    )
    np.testing.assert_allclose(points.mean(0), mean, atol=5 * np.sqrt(spread.diagonal().max() / 4000))
    np.testing.assert_allclose(np.cov(points.T), spread, atol=0.1 * spread.max())
    assert set(labels) <= set(range(len(model.weights_)))


def test_samples_have_the_tails_of_the_mixture() -> None:
    points_ND = np.random.default_rng(0).standard_t(3, size=(500, 1)) * np.ones((1, 2)) + [[0, 0.1]]
    points_ND[:, 1] += np.random.default_rng(1).normal(size=500)
    model = DeepDPM(settings={"prior.tail_dof": 3}, transform_kind="none", max_epochs=20).fit(points_ND)
    assert model.tail_dof_ == 3
    drawn_ND, z_N = model.sample(20_000)
    of_first_ND = drawn_ND[z_N == 0] - model.means_[0]
    squares_N = np.einsum("nd,de,ne->n", of_first_ND, np.linalg.inv(model.covariances_[0]), of_first_ND)
    # d^2 / D of Student's t is an F variate.
    assert kstest(squares_N / 2, f(2, 3).cdf).pvalue > 0.001


def test_the_same_seed_gives_the_labels_of_the_command_line(train: Any, tmp_path: Path) -> None:
    overrides = ["trainer.lightning.accelerator=cpu", "trainer.lightning.max_epochs=8", "seed=3"]
    data = ["dataset=synthetic", "dataset.num_points=600"]
    assert train(*data, *overrides, "hydra.run.dir=run").status == 0
    points = SyntheticGrid(num_points=600).load().train.x.numpy()
    model = DeepDPM(max_epochs=8, random_state=3, accelerator="cpu").fit(points)
    arrays = np.load(tmp_path / "run" / "assignments.npz")
    np.testing.assert_array_equal(model.labels_, arrays["labels"])
    np.testing.assert_array_equal(model.cluster_ids_, arrays["cluster_ids"])
    loaded = DeepDPM.load(tmp_path / "run" / "model.ckpt")
    np.testing.assert_array_equal(loaded.labels_, loaded.predict(points))
    assert [row["moves"] for row in loaded.history_] == [row["moves"] for row in model.history_]
    assert loaded.get_params()["random_state"] == 3
    assert loaded.set_params(max_epochs=1).fit(points[:200]).n_features_in_ == 2


def test_fitting_leaves_the_generators_of_others_alone(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    DeepDPM(max_epochs=2).fit(blobs[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_pickle_and_file_bring_the_same_model_back(
    fitted: DeepDPM, blobs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    fitted.save(tmp_path / "model.pt")
    for copy in (pickle.loads(pickle.dumps(fitted)), DeepDPM.load(tmp_path / "model.pt")):
        np.testing.assert_array_equal(copy.predict_proba(blobs[0]), fitted.predict_proba(blobs[0]))
        np.testing.assert_array_equal(copy.covariances_, fitted.covariances_)
        assert copy.history_ == fitted.history_
        assert copy.get_params() == fitted.get_params()
        assert copy.partial_fit(blobs[0][:50]).n_samples_seen_ == 650


def test_a_saved_model_is_read_in_a_new_process(fitted: DeepDPM, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model.pt")
    code = (
        "import sys; from deepdpm import DeepDPM; print(DeepDPM.load(sys.argv[1]).predict([[8.0, 8.0]])[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(said.stdout) == fitted.predict([[8.0, 8.0]])[0]


def test_what_is_no_model_is_refused(tmp_path: Path, fitted: DeepDPM) -> None:
    (tmp_path / "a.pt").write_bytes(b"no model")
    with pytest.raises(ValueError, match="damaged or no model"):
        DeepDPM.load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="There is no file"):
        DeepDPM.load(tmp_path / "b.pt")


def test_importing_the_package_imports_no_lightning() -> None:
    code = (
        "import sys, deepdpm.stats; assert not {'pytorch_lightning', 'sklearn', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_more_points_keep_clusters_and_add_new_ones(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    model = DeepDPM(max_epochs=10).fit(blobs[0])
    old = dict(zip(model.cluster_ids_.tolist(), model.means_, strict=True))
    fresh = np.random.default_rng(0).normal([30, -20], 1, (300, 2))
    model.partial_fit(fresh)
    assert (model.n_samples_seen_, len(model.weights_), len(model.labels_)) == (900, 5, 300)
    assert len(set(model.labels_)) == 1
    np.testing.assert_allclose(model.means_[model.labels_[0]], [30, -20], atol=0.5)
    # A split's larger part keeps the id: three of the four are where they were.
    now = dict(zip(model.cluster_ids_.tolist(), model.means_, strict=True))
    assert sum(bool(np.allclose(now[identity], old[identity], atol=0.2)) for identity in old) >= 3
    assert [row["epoch"] for row in model.history_] == list(range(model.n_iter_))


def test_of_many_points_a_uniform_sample_is_remembered() -> None:
    points = np.arange(4000.0)[:, None]
    model = DeepDPM(max_epochs=1, sample_size=100)
    for part in np.split(points, 4):
        model.partial_fit(part)
    kept = model._remembered_ND[:, 0].numpy()
    assert (model.n_samples_seen_, len(kept), len(set(kept))) == (4000, 100, 100)
    counts = np.histogram(kept, bins=4, range=(0, 4000))[0]
    assert counts.min() >= 10


@pytest.mark.parametrize("kind", [pd.DataFrame, polars.DataFrame])
def test_tables_keep_their_names(kind: Any, blobs: tuple[np.ndarray, np.ndarray]) -> None:
    table = kind({"width": blobs[0][:, 0], "height": blobs[0][:, 1]})
    model = DeepDPM(max_epochs=2).set_output(transform="pandas").fit(table)
    assert model.feature_names_in_.tolist() == ["width", "height"]
    codes = model.transform(table)
    assert list(codes.columns) == ["deepdpm0", "deepdpm1"]
    np.testing.assert_array_equal(model.predict(table), model.labels_)


def test_tensors_give_tensors(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    points = torch.from_numpy(blobs[0])
    model = DeepDPM(max_epochs=3).fit(points)
    np.testing.assert_array_equal(model.labels_.numpy(), DeepDPM(max_epochs=3).fit_predict(blobs[0]))
    for call in (model.predict, model.predict_proba, model.score_samples, model.transform):
        assert isinstance(call(points), torch.Tensor)
    with pytest.raises(ValueError, match="features"):
        model.predict(points[:, :1])
    with pytest.raises(ValueError, match="NaN"):
        model.predict(torch.full((2, 2), torch.nan))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_tensors_stay_on_their_device(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    points = torch.from_numpy(blobs[0]).cuda()
    model = DeepDPM(max_epochs=5).fit(points)
    assert model.labels_.is_cuda
    assert model.predict_proba(points).is_cuda
    assert adjusted_rand_score(blobs[1], model.labels_.cpu()) > 0.98
    np.testing.assert_array_equal(model.predict(blobs[0]), model.labels_.cpu())


def test_pipelines_and_searches(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    pipeline = make_pipeline(StandardScaler(), DeepDPM(max_epochs=3))
    assert len(set(pipeline.fit_predict(blobs[0]))) == 4
    search = GridSearchCV(DeepDPM(max_epochs=2), {"alpha": [1.0, 10.0], "prior": ["niw", "nig"]}, cv=2)
    assert search.fit(blobs[0]).best_score_ < 0
    assert clone(search.best_estimator_).get_params() == search.best_estimator_.get_params()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"init_k": 0}, "model.init_k must be at least 1"),
        ({"prior": "x"}, "prior.kind must be one of"),
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"settings": {"model.init_k": 2}}, "a parameter of its own"),
        ({"settings": {"hidden": 2}}, "unknown key"),
        ({"settings": {"model.moves.seedz": 2}}, "Unknown setting 'seedz'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DeepDPM(**parameters).fit(np.zeros((10, 2)))


def test_further_settings_take_effect(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    model = DeepDPM(max_epochs=1, settings={"model.moves.seeds": 2, "trainer.schedule.mstep_every": 2}).fit(
        blobs[0]
    )
    assert model.module_.moves.seeds == 2
    assert model.n_clusters_ <= 2


def test_other_seeds_are_drawn(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    model = DeepDPM(max_epochs=1, random_state=np.random.RandomState(0)).fit(blobs[0])
    assert model.module_.seed == np.random.RandomState(0).randint(2**31 - 1)


def test_points_that_no_float32_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond float32"):
        DeepDPM().fit([[1e300, 0.0], [0.0, 1.0]])


def test_verbose_tells_of_each_epoch(
    blobs: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    DeepDPM(max_epochs=2, verbose=True).fit(blobs[0])
    assert "epoch 0: split 0 -> 0" in capsys.readouterr().err
    DeepDPM(max_epochs=2).fit(blobs[0])
    said = capsys.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize(("share", "settings"), [(0.25, None), (0.0, {"prior.noise": 0.0})])
def test_points_count_as_measured_with_noise_of_half_their_spacing(
    share: float, settings: dict[str, float] | None
) -> None:
    points = load_iris().data
    model = DeepDPM(max_epochs=1, settings=settings).fit(points)
    code_NE = model.module_.transform(torch.as_tensor(points, dtype=torch.float32))
    torch.testing.assert_close(model.module_.clusters.prior.noise, share * squared_spacing(code_NE))
