"""The module as it trains: it finds clusters, goes on to the bit, and survives bad data and two processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import deepdpm.module
from deepdpm.data import CodesDataModule, Dataset, make_samples
from deepdpm.estimator import DeepDPM
from deepdpm.metrics import adjusted_rand_index, contingency, evaluate
from deepdpm.module import DeepDPMModule
from deepdpm.moves import MoveSettings
from deepdpm.priors import NormalPrior, fit_empirical_bayes
from deepdpm.stats import SufficientStats

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of Lightning, about torch
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]

SHORT = {"polish_steps": 20}
PUBLISHED = {
    "start_mstep": 1,
    "statistics": "net",
    "start_subclusters": 2,
    "start_moves": 4,
    "moves_every": 2,
    "freeze_after_move": 1,
}


def blobs(num_points: int = 600, num_clusters: int = 4, num_dims: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(num_points) % num_clusters
    angle_K = torch.arange(num_clusters) * 2 * torch.pi / num_clusters
    centres_KD = torch.zeros(num_clusters, num_dims)
    centres_KD[:, 0], centres_KD[:, 1] = 8 * angle_K.cos(), 6 * angle_K.sin()
    return torch.randn(num_points, num_dims, generator=generator) + centres_KD[labels_N], labels_N


def fit(
    module: DeepDPMModule, x_ND: Tensor, epochs: int = 100, batch_size: int = 100, **arguments: Any
) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keeps = any(isinstance(one, pl.callbacks.Checkpoint) for one in arguments.get("callbacks", []))
    quiet |= {"enable_checkpointing": keeps, "accelerator": "cpu", "devices": 1}
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = pl.Trainer(max_epochs=epochs, **{**quiet, **arguments})
    data = CodesDataModule(Dataset("blobs", make_samples(x_ND)), batch_size=batch_size, seed=0)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def agreement(labels_N: Tensor, truth_N: Tensor) -> float:
    return float(adjusted_rand_index(contingency(labels_N.numpy(), truth_N.numpy())))


class Recorder(pl.callbacks.Checkpoint):
    """Keep what each epoch did; as a Checkpoint it runs after the module's own hook."""

    def __init__(self) -> None:
        self.moves: list[str] = []
        self.sizes: list[int] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DeepDPMModule)
        self.moves += [str(move) for move in pl_module.moves_of_epoch]
        self.sizes.append(pl_module.num_clusters)


def stand_in(monkeypatch: pytest.MonkeyPatch, labels_of: Callable[[Tensor], Tensor]) -> None:
    """Searches that give each sample the labels of a rule."""

    def relabel(x_MD: Tensor, prior: NormalPrior) -> tuple[Tensor, NormalPrior]:
        new_M = labels_of(x_MD).unique(return_inverse=True)[1]
        stats = SufficientStats.from_labels(x_MD, new_M, int(new_M.max()) + 1)
        return new_M, fit_empirical_bayes(prior, stats)

    def search(
        draw: Callable[[int], Tensor], num_points: int, prior: NormalPrior, settings: MoveSettings, _: Any
    ) -> tuple[Tensor, Tensor, NormalPrior]:
        x_MD = draw(settings.sample_size)
        return x_MD, *relabel(x_MD, prior)

    def revise(x_MD: Tensor, labels_M: Tensor, prior: NormalPrior, *_: Any) -> tuple[Tensor, NormalPrior]:
        return relabel(x_MD, prior)

    monkeypatch.setattr(deepdpm.module, "search", search)
    monkeypatch.setattr(deepdpm.module, "revise", revise)


def quadrants(x_MD: Tensor) -> Tensor:
    return 2 * (x_MD[:, 0] > 0).long() + (x_MD[:, 1] > 0).long()


@pytest.fixture
def quadrant_search(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, quadrants)


def diamond() -> tuple[Tensor, Tensor]:
    x_ND, labels_N = blobs()
    turn = torch.tensor(torch.pi / 4)
    rotation = torch.tensor([[turn.cos(), -turn.sin()], [turn.sin(), turn.cos()]])
    return x_ND * torch.tensor([1.0, 4 / 3]) @ rotation, labels_N


def test_by_default_it_leaves_k_of_1_and_finds_the_clusters() -> None:
    x_ND, labels_N = blobs()
    module, recorder = DeepDPMModule(schedule=SHORT), Recorder()
    trainer = fit(module, x_ND, callbacks=[recorder])
    found_N, confidence_N = module.assign(x_ND)
    assert module.num_clusters == 4
    assert agreement(found_N, labels_N) > 0.98
    assert agreement(module.labels_N, labels_N) > 0.98
    assert recorder.moves == ["split 0 -> 0, 1, 2, 3"]
    assert sorted(module.cluster_ids_K.tolist()) == [0, 1, 2, 3]
    assert trainer.current_epoch < 20  # it stops by itself
    proba_NK = module.predict_proba(x_ND)
    torch.testing.assert_close(proba_NK.max(1).values, confidence_N)
    torch.testing.assert_close(proba_NK.sum(1), torch.ones(len(x_ND)))
    logged = trainer.callback_metrics
    assert logged["num_clusters"] == 4
    assert {"cluster_loss", "subcluster_loss", "log_likelihood"} <= set(logged)
    assert module.score_samples(x_ND).mean().item() == pytest.approx(
        logged["log_likelihood"].item(), abs=1e-3
    )


def test_density_is_that_of_raw_points() -> None:
    x_ND, _ = blobs(num_clusters=1)
    module = DeepDPMModule(schedule=SHORT)
    fit(module, 1000 * x_ND)
    raw = torch.distributions.MultivariateNormal(1000 * x_ND.mean(0), 1e6 * torch.cov(x_ND.T))
    expected = raw.log_prob(1000 * x_ND).mean().item()
    assert module.score_samples(1000 * x_ND).mean().item() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scale_and_shift_of_the_codes_do_not_matter(quadrant_search: None, scale: float) -> None:
    x_ND, _ = diamond()
    labels = []
    for codes in (x_ND, scale * (x_ND + 3)):
        module = DeepDPMModule(schedule=SHORT)
        fit(module, codes)
        labels.append(module.assign(codes)[0])
    assert agreement(labels[0], labels[1]) > 0.99


def test_published_moves_split_and_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, labels_N = blobs(num_clusters=3)
    module, recorder = DeepDPMModule(moves={"kind": "published"}, schedule=PUBLISHED), Recorder()
    trainer = fit(module, x_ND, epochs=24, callbacks=[recorder])
    assert trainer.current_epoch == 24  # all epochs: it does not stop by itself
    assert any(move.startswith("split") for move in recorder.moves)
    assert recorder.sizes[3] == 1
    assert agreement(module.assign(x_ND)[0], labels_N) > 0.5
    assert len(set(module.cluster_ids_K.tolist())) == module.num_clusters


@pytest.mark.parametrize("both", [False, True])
def test_published_merges_bring_an_over_seeded_start_down(both: bool) -> None:
    x_ND, _ = blobs(num_clusters=2)
    schedule = {**PUBLISHED, **({"split_every": 50, "merge_every": 1} if both else {"moves_every": 1})}
    recorder = Recorder()
    moves = {"kind": "published", "split_prob": 0.0}
    model = {"init_k": 6, "init_cluster_net_weights": True}
    module = DeepDPMModule(model, moves=moves, schedule=schedule)
    fit(module, x_ND, epochs=14, callbacks=[recorder])
    assert recorder.moves
    assert all(move.startswith("merge") for move in recorder.moves)
    assert module.num_clusters < 6


def test_parameters_are_frozen_after_a_move() -> None:
    x_ND, _ = blobs(num_clusters=3)
    means: list[Tensor] = []

    class Watch(Recorder):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            means.append(module.clusters.mixture.means_KD)

    recorder = Watch()
    module = DeepDPMModule(
        moves={"kind": "published", "split_prob": 1.0},
        schedule={**PUBLISHED, "freeze_after_move": 2, "moves_every": 9},
    )
    fit(module, x_ND, epochs=8, callbacks=[recorder])
    assert recorder.sizes[4] == 2
    assert torch.equal(means[4], means[5])
    assert torch.equal(means[5], means[6])
    assert not torch.equal(means[6], means[7])


CHOICES: list[dict[str, Any]] = [
    {"model": {"cluster_loss": "isotropic", "subcluster_loss": "kl"}},
    {"model": {"cluster_loss": "diagonal", "subcluster_loss": "diagonal"}},
    {"model": {"init_clusters": "soft_assign", "init_subclusters": "soft_assign"}},
    {"model": {"init_clusters": "kmeans_1d", "init_subclusters": "kmeans"}},
    {"model": {"kmeans_backend": "kmeans_pytorch", "transform": "normalize"}},
    {"model": {"transform": "min_max", "hidden": [8, 6], "temperature": 2.0}},
    {"model": {"ignore_subclusters": True}, "prior": {"use_prior": False}},
    {"prior": {"kind": "nig", "scale": "iso_005"}, "schedule": {"means": "kmeans"}},
    {"schedule": {"mstep_every": 0}, "optimizer": {"lr_scheduler": "step", "lr_step": 2}},
    {"schedule": {"mstep_every": 2}, "optimizer": {"lr_scheduler": "plateau", "lr_patience": 0}},
    {"moves": {"init_new_weights": "subclusters", "split_init_weights_sub": "same_w_noise"}},
    {
        "moves": {
            "init_new_weights": "random",
            "merge_init_weights": "random",
            "merge_init_weights_sub": "random",
        }
    },
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_trains(choice: dict[str, Any]) -> None:
    x_ND, _ = blobs(300)
    model = {"init_k": 2, "subcluster_hidden": 50, **choice.get("model", {})}
    schedule = {**PUBLISHED, "moves_every": 1, **choice.get("schedule", {})}
    moves = {"kind": "published", **choice.get("moves", {})}
    module = DeepDPMModule(model, choice.get("prior"), moves, choice.get("optimizer"), schedule)
    fit(module, x_ND, epochs=7)
    assert torch.isfinite(module.predict_proba(x_ND)).all()
    assert torch.isfinite(module.score_samples(x_ND)).all()


@pytest.mark.parametrize("scheduler", ["step", "plateau"])
def test_schedulers_change_the_learning_rate(scheduler: str) -> None:
    module = DeepDPMModule(
        moves={"kind": "published"}, optimizer={"lr_scheduler": scheduler, "lr_step": 2, "lr_patience": 0}
    )
    trainer = fit(module, blobs()[0], epochs=5)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.9 * module.optimizer.cluster_lr


def test_polishing_ends_at_a_learning_rate_of_zero(quadrant_search: None) -> None:
    module = DeepDPMModule(schedule={**SHORT, "moves_every": 1})
    trainer = fit(module, diamond()[0])
    assert module.progress.finished
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    assert module.progress.polish_step == 30  # five epochs of six steps


def test_heavy_tails_do_not_end_in_a_cluster_of_their_own() -> None:
    """Student's t, 2 degrees of freedom: without the last look K was 11, and one cluster had all tails."""
    generator = torch.Generator().manual_seed(0)
    truth_N = torch.arange(4).repeat_interleave(200)
    centre_KD = 6 * torch.randn(4, 12, generator=generator)
    scale_N1 = (torch.randn(800, 2, generator=generator).square().mean(1, keepdim=True)).sqrt()
    x_ND = centre_KD[truth_N] + torch.randn(800, 12, generator=generator) / scale_N1
    model = DeepDPM(random_state=0).fit(x_ND)
    labels_N = model.labels_
    distance_NN = torch.cdist(x_ND, x_ND).fill_diagonal_(torch.inf)
    for k in labels_N.unique():
        own_B = labels_N == k
        nearest = distance_NN[own_B].topk(min(10, max(1, int(own_B.sum()) // 2)), largest=False).indices
        assert (labels_N[nearest] == k).float().mean() > 0.4
    assert evaluate(truth_N, labels_N)["acc"] > 0.95


def test_searches_end_even_if_they_never_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def restless(x_MD: Tensor) -> Tensor:
        return torch.randint(
            int(torch.randint(2, 6, (1,), generator=generator)), (len(x_MD),), generator=generator
        )

    stand_in(monkeypatch, restless)
    module = DeepDPMModule(schedule={**SHORT, "moves_every": 1, "max_searches": 3})
    fit(module, diamond()[0])
    assert module.progress.num_searches == 3
    assert module.progress.finished


def test_a_search_that_uses_up_its_centres_takes_twice_as_many_and_more_points() -> None:
    generator = torch.Generator().manual_seed(0)
    centres_KD = 10 * torch.cartesian_prod(torch.arange(5.0), torch.arange(6.0))
    x_ND = centres_KD.repeat(100, 1) + torch.randn(3000, 2, generator=generator)
    module = DeepDPMModule(moves={"seeds": 16, "sample_size": 600}, schedule=SHORT)
    fit(module, x_ND, batch_size=500)
    assert module.num_clusters == 30


def test_clusters_are_the_same_where_autoencoders_learn_in_16_bits() -> None:
    modules = [DeepDPMModule(seed=0) for _ in range(2)]
    for module, precision in zip(modules, ("32-true", "bf16-mixed"), strict=True):
        fit(module, blobs()[0], epochs=3, precision=precision)
    exact, rounded = modules
    assert torch.equal(rounded.clusters.mixture.means_KD, exact.clusters.mixture.means_KD)
    for name, parameter in exact.named_parameters():
        assert torch.equal(rounded.get_parameter(name), parameter), name


def test_the_search_finds_the_same_from_any_start() -> None:
    x_ND, _ = blobs()
    mixtures = []
    for init_k in (1, 3, 4, 9):  # from 4 nothing splits or merges
        module = DeepDPMModule(model={"init_k": init_k}, moves={"sample_size": 200})
        fit(module, x_ND, epochs=1)
        mixtures.append(module.clusters.mixture)
    first, *others = mixtures
    assert first.num_components == 4
    for other in others:
        assert torch.equal(other.means_KD, first.means_KD)
        assert torch.equal(other.covariances_KDD, first.covariances_KDD)


def test_polishing_ends_sooner_when_the_net_follows_the_mixture() -> None:
    x_ND, labels_N = blobs()
    steps = {}
    for polish_loss in (0.0, 0.05):
        module = DeepDPMModule(schedule={"polish_steps": 300, "polish_loss": polish_loss})
        fit(module, x_ND)
        steps[polish_loss] = module.progress.polish_step
        assert module.progress.finished
        assert agreement(module.labels_N, labels_N) > 0.99
    assert steps[0.05] < steps[0.0] == 300


def snapshot(module: DeepDPMModule) -> dict[str, Tensor]:
    mixture = module.clusters.mixture
    return {
        **{name: value.detach().clone() for name, value in module.named_parameters()},
        **dict(module.named_buffers()),
        "weights": mixture.weights_K,
        "means": mixture.means_KD,
        "covariances": mixture.covariances_KDD,
        "subclusters": module.clusters.subclusters.means_KD,
        "ids": module.cluster_ids_K,
        "labels": module.labels_N,
    }


@pytest.mark.parametrize("kind", ["search", "published"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(kind: str, tmp_path: Path) -> None:
    x_ND, _ = diamond()
    moves = {"kind": kind, "sample_size": 300}
    schedule = PUBLISHED if kind == "published" else {**SHORT, "moves_every": 2, "max_searches": 3}
    arguments: dict[str, Any] = {"moves": moves, "schedule": schedule, "seed": 5}

    class Noise(pl.Callback):
        """Whatever else draws from the shared generators."""

        def on_train_batch_start(self, *_: Any) -> None:
            self.last = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002

    whole, noise = DeepDPMModule(**arguments), Noise()
    fit(whole, x_ND, epochs=11, callbacks=[noise])
    first = DeepDPMModule(**arguments)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    fit(first, x_ND, epochs=6, callbacks=[saver, Noise()])
    if kind == "search":
        assert first.num_clusters > 1  # the checkpoint holds other shapes than a fresh module

    stopped = (tmp_path / "last.ckpt").rename(tmp_path / "stopped.ckpt")
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        second, noise_after = DeepDPMModule(**arguments), Noise()
        again = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
        fit(second, x_ND, epochs=11, callbacks=[again, noise_after], ckpt_path=stopped)
        ends.append(noise_after.last)
        for name, value in snapshot(whole).items():
            assert torch.equal(value, snapshot(second)[name]), name
        assert second.progress == whole.progress
    assert ends[0] == ends[1]

    loaded = DeepDPMModule.load_from_checkpoint(stopped, weights_only=True)
    assert torch.equal(loaded.predict_proba(x_ND), first.predict_proba(x_ND))
    assert torch.equal(loaded.score_samples(x_ND), first.score_samples(x_ND))


def test_a_checkpoint_of_other_points_is_refused(tmp_path: Path, quadrant_search: None) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit(DeepDPMModule(), diamond()[0], epochs=2, callbacks=[saver])
    with pytest.raises(ValueError, match="was trained on points of 2 dimensions, but the data have 3"):
        fit(DeepDPMModule(), torch.randn(300, 3), callbacks=[saver], ckpt_path=tmp_path / "last.ckpt")
    loaded = DeepDPMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="The points have 3 dimensions"):
        loaded.assign(torch.randn(4, 3))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(quadrant_search: None) -> None:
    x_ND, _ = diamond()
    modules = [DeepDPMModule(seed=seed) for seed in (0, 0, 1)]
    for module in modules:
        fit(module, x_ND, epochs=3)
    assert torch.equal(modules[0].predict_proba(x_ND), modules[1].predict_proba(x_ND))
    assert not torch.equal(modules[0].predict_proba(x_ND), modules[2].predict_proba(x_ND))


HARD_DATA: dict[str, Callable[[], Tensor]] = {
    "all equal": lambda: torch.ones(50, 3),
    "duplicates": lambda: torch.randn(5, 2).repeat(40, 1),
    "constant and repeated columns": lambda: torch.cat((torch.ones(200, 2), blobs(200)[0], blobs(200)[0]), 1),
    "collinear": lambda: torch.randn(200, 1) * torch.tensor([1.0, 2.0, 3.0]),
    "more dimensions than points": lambda: torch.randn(20, 60),
    "an outlier": lambda: torch.cat((torch.randn(199, 2), torch.full((1, 2), 1e6))),
    "two points": lambda: torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
}


@pytest.mark.parametrize("kind", ["search", "published"])
@pytest.mark.parametrize("name", list(HARD_DATA))
def test_hard_data_run(name: str, kind: str) -> None:
    torch.manual_seed(0)
    x_ND = HARD_DATA[name]()
    schedule = {**PUBLISHED, "moves_every": 1} if kind == "published" else SHORT
    model = {"init_k": 1 if kind == "search" else 2}
    module = DeepDPMModule(model, moves={"kind": kind}, schedule=schedule)
    fit(module, x_ND, epochs=8)
    assert torch.isfinite(module.predict_proba(x_ND)).all()
    assert not torch.isnan(module.score_samples(x_ND)).any()


def test_more_clusters_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.init_k is 9, but there are only 5 points"):
        fit(DeepDPMModule({"init_k": 9}), torch.randn(5, 2))


def test_nothing_of_all_points_and_clusters_is_held(quadrant_search: None) -> None:
    module = DeepDPMModule(schedule=SHORT)
    fit(module, diamond()[0], epochs=6)
    held = [value for value in vars(module).values() if isinstance(value, Tensor)]
    held += [*module.parameters(), *module.buffers()]
    assert all(value.numel() <= 600 for value in held)


class Replica(Recorder):
    """Write what this process ended with."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DeepDPMModule)
        torch.save(snapshot(pl_module), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("kind", ["search", "published"])
def test_two_processes_stay_the_same(kind: str, tmp_path: Path) -> None:
    x_ND, labels_N = diamond()
    schedule = {**PUBLISHED, "start_moves": 2} if kind == "published" else SHORT
    moves, optimizer = {"kind": kind, "split_prob": 1.0}, {"cluster_lr": 0.02}
    module = DeepDPMModule({"hidden": [20]}, moves=moves, optimizer=optimizer, schedule=schedule)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", start_method="fork")
    fit(module, x_ND, epochs=6, callbacks=[Replica(tmp_path)], devices=2, strategy=strategy)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["weights"]) > 1
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert (first["labels"] >= 0).all()
    if kind == "search":
        assert agreement(first["labels"], labels_N) > 0.95
