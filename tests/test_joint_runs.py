"""Joint features through the real command: from pretraining to the closing table, and on from there."""

import bz2
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepdpm import config
from deepdpm.results import read_json

# Digits of 8 x 8 pixels, a small autoencoder, and moves that come to rest at once.
JOINT = (
    "alternation=joint",
    "dataset=digits",
    "model.features.kind=dense",
    "model.features.hidden_dims=[32]",
    "model.features.latent_dim=4",
    "model.features.pretrain_epochs=2",
    "model.features.augment=0.5",
    "model.features.pretrain_batch_size=128",
    "model.moves.kind=published",
    "model.init_k=8",
    "alternation.number_of_alternations=2",
    "alternation.train_cluster_net=3",
    "alternation.ae_epochs=2",
    "trainer.schedule.start_moves=1",
    "trainer.schedule.moves_every=1",
    "trainer.lightning.accelerator=cpu",
)
PHASES = ["pretrain"] * 2 + ["cluster"] * 3 + ["features"] * 2 + ["cluster"] * 3


def trace_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trace.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_from_raw_images_to_the_closing_table(train: Callable[..., Any], tmp_path: Path) -> None:
    from deepdpm.predict import load_model

    ended = train(*JOINT, "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    assert all(word in ended.out for word in ("K", "NMI", "ARI", "ACC", "seconds", "outputs: run"))
    for phase in ("pretraining", "clustering 1 of 2", "features 1 of 2", "clustering 2 of 2"):
        assert f"{phase} ended with epoch " in ended.err
    folder = tmp_path / "run"
    result, rows = read_json(folder / "result.json"), trace_of(folder)
    assert result is not None
    assert (result["status"], result["epochs"], result["num_dims"]) == ("finished", len(PHASES), 64)
    assert [row["phase"] for row in rows] == PHASES
    assert [row["alternation"] for row in rows] == ["0"] * 7 + ["1"] * 3
    for row in rows:
        learns_features = row["phase"] != "cluster"
        assert (row["reconstruction_loss"] != "") == learns_features
        assert (row["cluster_loss"] != "") != learns_features
        assert (row["nmi"] != "") == (row["phase"] != "pretrain")
    losses = [float(row["reconstruction_loss"]) for row in rows if row["reconstruction_loss"]]
    assert losses[1] < losses[0]
    images = config.hydra.utils.instantiate(config.compose(JOINT).dataset).load().train.x
    labels_N = load_model(folder / "model.ckpt").assign(images)[0].numpy()
    np.testing.assert_array_equal(labels_N, np.load(folder / "assignments.npz")["labels"])


def test_a_run_cut_within_the_features_goes_on_to_the_bit(train: Callable[..., Any], tmp_path: Path) -> None:
    assert train(*JOINT, "hydra.run.dir=whole").status == 0
    assert train(*JOINT, "trainer.lightning.max_epochs=6", "hydra.run.dir=half").status == 0
    assert train(*JOINT, "ckpt_path=half", "hydra.run.dir=rest").status == 0
    assert (tmp_path / "whole" / "trace.csv").read_text() == (tmp_path / "rest" / "trace.csv").read_text()
    for name in ("labels", "confidence", "cluster_ids"):
        whole, rest = (np.load(tmp_path / run / "assignments.npz")[name] for run in ("whole", "rest"))
        np.testing.assert_array_equal(whole, rest)


def test_a_run_cut_within_the_pretraining_says_so_and_can_go_on(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    cut = train(*JOINT, "trainer.lightning.max_epochs=2", "hydra.run.dir=cut")
    assert cut.status == 1
    assert "within the pretraining" in cut.err
    assert "raise trainer.lightning.max_epochs" in cut.err
    assert cut.err.count("Traceback") == 0
    assert train(*JOINT, "ckpt_path=cut", "hydra.run.dir=rest").status == 0
    assert [row["phase"] for row in trace_of(tmp_path / "rest")] == PHASES


def test_the_end_of_each_phase_is_tracked_with_pictures(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    logged: list[dict[str, Any]] = []
    send = wandb.Run.log

    def keep(self: wandb.Run, data: dict[str, Any], *rest: Any, **more: Any) -> None:
        logged.append(dict(data))
        send(self, data, *rest, **more)

    monkeypatch.setattr(wandb.Run, "log", keep)
    ended = train(*JOINT, "tracking=wandb", "tracking.mode=offline", "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    phase_ends = [data for data in logged if "phase_end/phase" in data]
    assert [data["phase_end/phase"] for data in phase_ends] == ["pretrain", "cluster", "features", "cluster"]
    assert all(isinstance(data["phase_end/reconstructions"], wandb.Image) for data in phase_ends)
    assert all("phase_end/samples" in data and "phase_end/acc" in data for data in phase_ends[1:])
    epochs = [data for data in logged if "trace/phase" in data]
    assert [data["trace/phase"] for data in epochs] == PHASES


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["alternation=joint"], ["model.features.kind", "dense", "alternation=none"]),
        (["model.features.kind=conv"], ["model.features.kind=conv", "alternation=joint"]),
        ([*JOINT, "alternation.beta=-1"], ["alternation.beta"]),
        ([*JOINT, "alternation.foo=1"], ["alternation.foo", "lambda_"]),
        ([*JOINT, "alternation.ae_epochs=x"], ["alternation.ae_epochs"]),
        ([*JOINT, "model.features.latent_dim=0"], ["model.features.latent_dim"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        config.check(config.compose(overrides), overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.features.weights=gone.pt"], ["model.features.weights", "gone.pt"]),
        (
            [
                "dataset=synthetic",
                "dataset.num_points=300",
                "model.features.kind=conv",
                "model.features.hidden_dims=[500,500,2000]",
            ],
            ["model.features.kind"],
        ),
    ],
)
def test_what_does_not_fit_the_data_ends_with_one_sentence(
    overrides: list[str], parts: list[str], train: Callable[..., Any]
) -> None:
    ended = train(*JOINT, *overrides, "hydra.run.dir=run")
    assert ended.status == 1
    said = [line for line in ended.err.splitlines() if line.startswith("deepdpm-train: ")]
    assert len(said) == 1
    assert all(part in said[0] for part in parts), said


def write_mnist(folder: Path) -> None:
    raw = folder / "torchvision" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 150), ("t10k", 50)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        for stem, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (raw / f"{prefix}-{stem}-ubyte").write_bytes(header + array.tobytes())


def write_usps(folder: Path) -> None:
    (folder / "torchvision").mkdir(parents=True)
    pixels = np.random.default_rng(0).random((200, 256))
    lines = [
        f"{1 + n % 10} " + " ".join(f"{d + 1}:{value:.3f}" for d, value in enumerate(row)) + "\n"
        for n, row in enumerate(pixels)
    ]
    for name, part in (("usps.bz2", lines[:150]), ("usps.t.bz2", lines[150:])):
        (folder / "torchvision" / name).write_bytes(bz2.compress("".join(part).encode()))


def write_codes(folder: Path) -> None:
    for name in ("IMAGENET_50", "IMAGENET_50_IMB"):
        (folder / "embeddings" / name).mkdir(parents=True)
        x_ND = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
        torch.save(x_ND, folder / "embeddings" / name / "train_data.pt")
        torch.save(torch.arange(200) % 50, folder / "embeddings" / name / "train_labels.pt")


def write_reuters(folder: Path) -> None:
    rows = np.random.default_rng(0).random((200, 30))
    content = np.array({"data": rows, "label": np.arange(200) % 4}, dtype=object)
    np.save(folder / "reuters10k.npy", content, allow_pickle=True)


ROWS = [
    ("+joint=mnist", write_mnist),
    ("+joint=mnist_published", write_mnist),
    ("+joint=mnist_contrast", write_mnist),
    ("+joint=usps_contrast", write_usps),
    ("+joint=reuters10k", write_reuters),
    ("+joint=reuters10k_published", write_reuters),
    ("+imagenet=imagenet50", write_codes),
    ("+imagenet=imagenet50_published", write_codes),
    ("+imagenet=imagenet50_imbalanced", write_codes),
    ("+imagenet=imagenet50_imbalanced_published", write_codes),
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "write"), ROWS, ids=[row for row, _ in ROWS])
def test_each_row_runs_on_a_stand_in_of_its_data(
    row: str,
    write: Callable[[Path], None],
    train: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path)
    monkeypatch.setenv("DEEPDPM_DATA", str(tmp_path))
    settings = config.compose([row]).alternation
    last_epochs = min(1, settings.retrain_last_ae_epochs)
    short = [
        "model.features.pretrain_epochs=1",
        "alternation.train_cluster_net=2",
        "alternation.ae_epochs=1",
        f"alternation.retrain_last_ae_epochs={last_epochs}",
        "trainer.lightning.accelerator=cpu",
    ]
    if "contrast" not in row:
        short.append("model.features.hidden_dims=[16]")
    if "reuters" in row:
        short.append(f"dataset.path={tmp_path / 'reuters10k.npy'}")
    ended = train(row, *short, "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    phases = [trace["phase"] for trace in trace_of(tmp_path / "run")]
    turn = ["cluster", "cluster", "features"]
    turns = settings.number_of_alternations * turn
    assert phases == ["pretrain", *(turns if last_epochs else turns[:-1])]
