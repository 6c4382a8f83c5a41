"""Joint features: phases leave alone what is frozen, options do what they say, and runs go on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from deepdpm import restart
from deepdpm.autoencoder import DenseAutoencoder, contrast_loss, reconstruction_loss, save_weights
from deepdpm.data import CodesDataModule, Dataset, make_samples
from deepdpm.joint import JointModule
from deepdpm.losses import label_loss
from deepdpm.mixture import Mixture
from deepdpm.neighbours import confirmed
from deepdpm.pretraining import encode_rows
from deepdpm.priors import NIW
from deepdpm.state import ClusterState
from deepdpm.stats import SufficientStats
from deepdpm.transforms import Transform

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of Lightning, about torch
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]

FEATURES = {"kind": "dense", "hidden_dims": [8], "latent_dim": 2, "pretrain_epochs": 2, "noise": 0.1}
MODEL = {"features": FEATURES, "transform": "none", "init_k": 3}
SHORT = {"number_of_alternations": 2, "train_cluster_net": 3, "ae_epochs": 2, "ae_batch_size": 32}
LABELS = {"regularization": "label_loss", "cluster_assignments": "pseudo_label", "confirmed_by": 3}
# Moves in every clustering, by chance and by evidence: the states of all generators matter.
SCHEDULE = {"start_moves": 1, "moves_every": 1, "statistics": "net"}
TOTAL = 2 + 3 + 2 + 3


def points(num_points: int = 201) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres_KD = 3 * torch.randn(4, 6, generator=generator)
    return centres_KD[torch.arange(num_points) % 4] + torch.randn(num_points, 6, generator=generator)


def make(alternation: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> JointModule:
    return JointModule(
        MODEL | (model or {}),
        moves={"kind": "published"},
        schedule=SCHEDULE,
        num_dims=6,
        alternation=SHORT | (alternation or {}),
    )


class Recorder(pl.callbacks.Checkpoint):
    """Keep the weights after each epoch and a checkpoint of each; it runs after the module's own hook."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.phases: list[str] = []
        self.weights: list[dict[str, Tensor]] = []
        self.means: list[Tensor | None] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, JointModule)
        self.phases.append(pl_module.phase.kind)
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})
        self.means.append(None if pl_module.state is None else pl_module.state.mixture.means_KD.clone())
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def fit(
    module: JointModule, recorder: Recorder, ckpt_path: Path | None = None, **arguments: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=module.total_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
        **arguments,
    )
    data = CodesDataModule(Dataset("points", make_samples(points())), batch_size=50, seed=0)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def changed(before: dict[str, Tensor], after: dict[str, Tensor], part: str) -> bool:
    pairs = [(before[name], after[name]) for name in after if name.startswith(part)]
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def test_what_is_frozen_stays_and_what_learns_moves() -> None:
    recorder = Recorder()
    fit(make(), recorder)
    assert recorder.phases == ["pretrain"] * 2 + ["cluster"] * 3 + ["features"] * 2 + ["cluster"] * 3
    for epoch in range(1, TOTAL):
        before, after = recorder.weights[epoch - 1], recorder.weights[epoch]
        clusters = recorder.phases[epoch] == "cluster"
        assert changed(before, after, "autoencoder.") != clusters
        assert changed(before, after, "cluster_net.") == clusters
        if recorder.phases[epoch] == "features":
            assert torch.equal(recorder.means[epoch], recorder.means[epoch - 1])


def test_an_autoencoder_may_learn_in_16_bits() -> None:
    weights = []
    for precision in ("32-true", "bf16-mixed"):
        recorder = Recorder()
        fit(make({"number_of_alternations": 1}), recorder, precision=precision)
        weights.append(recorder.weights[1])
    assert changed(*weights, "autoencoder.")
    for name, exact in weights[0].items():
        torch.testing.assert_close(weights[1][name], exact, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("alternation", "epochs"),
    [({}, (0, 1, 3, 4, 5, 6, 8)), (LABELS | {"retrain_last_ae_epochs": 2}, (5, 10))],
)
def test_any_epoch_goes_on_to_the_bit(
    alternation: dict[str, Any], epochs: tuple[int, ...], tmp_path: Path
) -> None:
    whole = make(alternation)
    fit(whole, Recorder(tmp_path))
    # Within and at the end of each phase.
    for epoch in epochs:
        rest = make(alternation)
        fit(rest, Recorder(), tmp_path / f"{epoch}.ckpt")
        assert not changed(dict(whole.named_parameters()), dict(rest.named_parameters()), "")
        assert torch.equal(whole.clusters.mixture.covariances_KDD, rest.clusters.mixture.covariances_KDD)
        assert torch.equal(whole.labels_N, rest.labels_N)


def test_a_checkpoint_predicts_raw_points(tmp_path: Path) -> None:
    module = make()
    trainer = fit(module, Recorder())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = JointModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    code_NL = encode_rows(loaded.autoencoder, points()).clone()
    wanted_NK = loaded.cluster_net(loaded.transform(code_NL)).softmax(1)
    torch.testing.assert_close(loaded.predict_proba(points()), wanted_NK)
    assert torch.equal(loaded.assign(points())[0], module.eval().assign(points())[0])
    with pytest.raises(ValueError, match="5 dimensions"):
        loaded.assign(torch.zeros(1, 5))


def test_a_clustering_that_rests_ends_its_phase_and_the_last_one_the_run() -> None:
    module = JointModule(
        MODEL | {"init_k": 1},
        schedule={"polish_steps": 1, "moves_every": 1, "max_searches": 1},
        num_dims=6,
        alternation=SHORT | {"train_cluster_net": 50},
    )
    recorder = Recorder()
    fit(module, recorder)
    # One epoch that searches, and at least five of polishing.
    assert module.ended == {0: 6, 1: 6}
    assert recorder.phases == ["pretrain"] * 2 + ["cluster"] * 6 + ["features"] * 2 + ["cluster"] * 6


@pytest.mark.parametrize(
    ("alternation", "moves"),
    [
        ({"regularization": "cluster_loss"}, False),
        ({"cluster_assignments": "forward_pass"}, False),
        ({"cluster_assignments": "pseudo_label"}, False),
        (LABELS, False),
        (LABELS | {"update_clusters_params": "all_params_w_prior", "retrain_last_ae_epochs": 1}, True),
        ({"update_clusters_params": "only_centers"}, True),
        ({"update_clusters_params": "all_params"}, True),
        ({"update_clusters_params": "all_params_w_prior"}, True),
        ({"retrain_last_ae_epochs": 1}, False),
    ],
)
def test_options_of_the_features_phase(alternation: dict[str, Any], moves: bool) -> None:
    recorder = Recorder()
    fit(make(alternation), recorder)
    start = recorder.phases.index("features")
    assert torch.equal(recorder.means[start - 1], recorder.means[start]) != moves
    assert changed(recorder.weights[start - 1], recorder.weights[start], "autoencoder.")
    assert len(recorder.phases) == TOTAL + alternation.get("retrain_last_ae_epochs", 0)
    assert all(torch.isfinite(value).all() for value in recorder.weights[-1].values())


def test_labels_teach_autoencoder_and_net_by_the_points_that_neighbours_confirm() -> None:
    recorder = Recorder()
    module = make(LABELS | {"retrain_last_ae_epochs": 2, "ae_lr": 0.02})
    module.schedule = type(module.schedule)(start_moves=99)
    fit(module, recorder)
    assert recorder.phases[-2:] == ["features"] * 2
    for part in ("autoencoder.", "cluster_net."):
        assert changed(recorder.weights[-3], recorder.weights[-1], part)
    # At the end of a phase labels are those of what was learned.
    assert torch.equal(module.labels_N, module.eval().assign(points())[0])
    module._teaches_N = teaches_N = torch.arange(len(points())) % 3 > 0
    code_BE = module.transform(module.raw_codes(points())).detach().requires_grad_()
    module._regularization(code_BE, torch.arange(len(code_BE))).backward()
    assert code_BE.grad is not None
    assert (code_BE.grad[~teaches_N] == 0).all()
    assert (code_BE.grad[teaches_N].abs().sum(1) > 0).all()


def test_neighbours_do_not_confirm_wrong_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    true_N = torch.arange(1000) % 4
    code_NE = 10 * torch.eye(4)[true_N] + torch.randn(1000, 4, generator=generator)
    wrong_N = torch.rand(1000, generator=generator) < 0.02
    labels_N = torch.where(wrong_N, (true_N + 1) % 4, true_N)
    teaches_N = confirmed(code_NE, labels_N, 10)
    assert not teaches_N[wrong_N].any()
    assert teaches_N.float().mean() > 0.7
    assert confirmed(code_NE, labels_N, 0).all()


def test_the_label_loss_is_the_cross_entropy_of_smoothed_labels() -> None:
    log_r_BK = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    z_B = torch.arange(7) % 5
    target_BK = 0.9 * torch.eye(5)[z_B] + 0.1 / 5
    torch.testing.assert_close(label_loss(log_r_BK, z_B), -(target_BK * log_r_BK).sum())
    assert label_loss(log_r_BK[:0], z_B[:0]) == 0


def test_labels_that_change_on_the_way_are_not_taught() -> None:
    with pytest.raises(ValueError, match="cluster_assignments=pseudo_label"):
        make({"regularization": "label_loss"})
    with pytest.raises(ValueError, match="confirmed_by is 500, but there are only 201 points"):
        fit(make(LABELS | {"confirmed_by": 500}), Recorder())


@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize("nets", [True, False])
def test_what_a_later_clustering_takes_over(centres: bool, nets: bool) -> None:
    recorder = Recorder()
    options = {"init_cluster_net_using_centers": centres, "reinit_net_at_alternation": nets}
    module = make(options | {"train_cluster_net": 1})
    # No M-step and no move within the clusterings: what is seen is the start.
    module.schedule = type(module.schedule)(start_mstep=9, start_moves=9, start_subclusters=9)
    module.optimizer = type(module.optimizer)(cluster_lr=1e-12, subcluster_lr=1e-12)
    fit(module, recorder)
    first, features, later = 2, 4, 5
    same_nets = not any(
        (recorder.weights[features][name] - recorder.weights[later][name]).abs().max() > 1e-6
        for name in recorder.weights[later]
        if name.startswith("cluster_net.")
    )
    assert same_nets != nets
    assert module.num_clusters == 3
    assert recorder.phases[first] == recorder.phases[later] == "cluster"


def test_the_loss_of_the_features_pulls_codes_to_the_nearest_centres() -> None:
    module = make()
    mixture = Mixture(torch.ones(2) / 2, torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.eye(2).expand(2, 2, 2))
    prior = NIW(torch.zeros(2).double(), 1.0, 4.0, torch.eye(2).double())
    module.state = ClusterState(prior, mixture, mixture, torch.arange(2), 2)
    module.labels_N = torch.full((5,), -1)
    code_BE = torch.tensor([[1.0, 0.0], [7.0, 1.0]], requires_grad=True)
    loss = module._regularization(code_BE, torch.tensor([4, 1]))
    loss.backward()
    assert loss.item() == 1 + 5
    assert code_BE.grad is not None
    assert code_BE.grad.tolist() == [[2.0, 0.0], [-4.0, 2.0]]
    assert module.labels_N.tolist() == [-1, 1, -1, -1, 0]


def test_features_phases_learn_by_the_objective_that_is_set(tmp_path: Path) -> None:
    x_ND = points()
    noise_ND = 0.1 * torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    save_weights(DenseAutoencoder(6, (8,), 2), tmp_path / "weights.pt")
    contrast, reconstruction = {}, {}
    for objective in ("contrast", "reconstruction"):
        features = FEATURES | {"objective": objective, "weights": str(tmp_path / "weights.pt")}
        module = make({"lambda_": 1, "beta": 0, "ae_epochs": 20, "ae_lr": 0.02}, {"features": features})
        fit(module, Recorder())
        autoencoder = module.autoencoder.eval()
        codes = autoencoder.encode(x_ND), autoencoder.encode(x_ND + noise_ND)
        contrast[objective] = contrast_loss(*codes).item()
        reconstruction[objective] = reconstruction_loss(x_ND, autoencoder(x_ND)[1]).item()
    assert contrast["contrast"] < 0.98 * contrast["reconstruction"]
    assert reconstruction["reconstruction"] < 0.95 * reconstruction["contrast"]


def test_published_weights_replace_the_pretraining(tmp_path: Path) -> None:
    save_weights(DenseAutoencoder(6, (8,), 2), tmp_path / "weights.pt")
    features = FEATURES | {"weights": str(tmp_path / "weights.pt")}
    module, recorder = make(model={"features": features}), Recorder()
    fit(module, recorder)
    assert recorder.phases[0] == "cluster"
    name = "autoencoder.encoder.linear0.weight"
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(recorder.weights[0][name], saved[name])


def test_centres_follow_a_transform_that_is_fitted_anew() -> None:
    x_NL = points()
    for kind in ("none", "standard", "min_max", "principal", "normalize"):
        old = Transform(kind).fit(x_NL)  # type: ignore[arg-type]
        new = Transform(kind).fit(3 * x_NL + 1)  # type: ignore[arg-type]
        moved_KE = restart.transformed_centres(new, restart.raw_centres(old, old(x_NL[:4]).double()))
        if kind != "normalize":
            torch.testing.assert_close(moved_KE.float(), new(x_NL[:4]), rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(moved_KE.float(), old(x_NL[:4]))


def test_with_a_fixed_scale_the_prior_comes_from_the_centres() -> None:
    centres_KE = torch.tensor([[0.0, 0.0], [4.0, 2.0]]).double()
    total = restart.as_one_set(centres_KE)
    assert total.mean_KD.tolist() == [[2.0, 1.0]]
    prior = NIW(total.mean_KD[0], 1e-4, 4.0, 0.5 * torch.eye(2).double())
    x_ME = torch.tensor([[0.1, 0.0], [3.0, 2.0], [-1.0, 0.0]])
    _, mixture, labels_M = restart.from_centres(prior, centres_KE, x_ME, 1.0)
    assert labels_M.tolist() == [0, 1, 0]
    assert mixture.weights_K.tolist() == [0.5, 0.5]
    assert torch.equal(mixture.means_KD, centres_KE)
    assert torch.equal(mixture.covariances_KDD, prior.psi.expand(2, 2, 2))


def test_centres_move_as_if_codes_came_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BE, z_B = torch.randn(9, 2, generator=generator).double(), torch.arange(9) % 2
    means_KE, counts_K = torch.randn(3, 2, generator=generator).double(), restart.first_counts(3)
    mixture = Mixture(torch.ones(3), means_KE, torch.eye(2).expand(3, 2, 2))
    prior = NIW(torch.zeros(2).double(), 1.0, 4.0, torch.eye(2).double())
    state = ClusterState(prior, mixture, mixture, torch.arange(3), 3)
    moved, counts_after_K = restart.moved_centres(state, counts_K, SufficientStats.from_labels(x_BE, z_B, 3))
    slow_KE = means_KE.clone()
    for x_E, z in zip(x_BE, z_B.tolist(), strict=True):
        counts_K[z] += 1
        slow_KE[z] += (x_E - slow_KE[z]) / counts_K[z]
    torch.testing.assert_close(moved.mixture.means_KD, slow_KE)
    assert torch.equal(counts_after_K, counts_K)
