"""`deepdpm-embed`: folders of codes that `dataset=embeddings` reads."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from deepdpm.autoencoder import DenseAutoencoder, load_published_weights
from deepdpm.data import Samples
from deepdpm.data.digits import Digits
from deepdpm.data.embeddings import EmbeddingFolder
from deepdpm.embed import load_source, main
from deepdpm.pretraining import Pretraining, encode_rows

SMALL = ["--hidden-dims", "16", "--latent-dim", "4", "--epochs", "3", "--batch-size", "512"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPDPM_DATA", raising=False)


def test_the_autoencoder_writes_its_codes_and_weights() -> None:
    main(["digits", "codes", *SMALL])
    digits = load_source("digits").load()
    written = EmbeddingFolder("digits", "codes").load()
    assert written.train.x.shape == (1797, 4)
    assert digits.train.labels is not None
    assert written.train.labels is not None
    assert torch.equal(written.train.labels, digits.train.labels)
    model = DenseAutoencoder(64, (16,), 4)
    load_published_weights(model, "codes/autoencoder.pt")
    torch.testing.assert_close(encode_rows(model, digits.train.x), written.train.x)
    settings = json.loads(Path("codes/embed.json").read_text())
    assert (settings["dataset"], settings["method"], settings["epochs"]) == ("digits", "autoencoder", 3)
    assert sorted(path.name for path in Path("codes").iterdir()) == [
        "autoencoder.pt",
        "embed.json",
        "train_data.pt",
        "train_labels.pt",
    ]


def test_given_weights_are_not_trained() -> None:
    main(["digits", "first", *SMALL])
    main(["digits", "second", *SMALL, "--weights", "first/autoencoder.pt"])
    codes = [EmbeddingFolder("digits", name).load().train.x for name in ("first", "second")]
    assert torch.equal(*codes)


def test_an_interrupted_pretraining_goes_on_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [*SMALL, "--noise", "0.1", "--augment", "1"]
    main(["digits", "whole", *arguments])

    def stop(module: Pretraining) -> None:
        if module.current_epoch == 2:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["digits", "parts", *arguments])
    assert not Path("parts/train_data.pt").exists()
    for other in (["--lr", "0.1"], ["--precision", "bf16-mixed"]):
        with pytest.raises(SystemExit, match="begun with other settings"):
            main(["digits", "parts", *arguments, *other])

    epochs = []
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "on_train_epoch_start", lambda module: epochs.append(module.current_epoch))
        main(["digits", "parts", *arguments])
    assert epochs == [2]
    codes = [EmbeddingFolder("digits", name).load().train.x for name in ("whole", "parts")]
    assert torch.equal(*codes)


def test_contrast_goes_on_to_the_bit_and_never_sees_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "--kind",
        "strided",
        "--filters",
        "8",
        "24",
        "--objective",
        "contrast",
        "--augment",
        "1",
        "--neighbours",
        "3",
        *SMALL[2:],
    ]
    main(["digits", "whole", *arguments])

    def stop(module: Pretraining) -> None:
        if module.current_epoch == 1:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["digits", "parts", *arguments])
    digits = load_source("digits").load()
    unlabelled = replace(digits, train=Samples(digits.train.x, None))
    with monkeypatch.context() as patch:
        patch.setattr(Digits, "load", lambda self: unlabelled)
        main(["digits", "parts", *arguments])
    codes = [EmbeddingFolder("digits", name).load().train.x for name in ("whole", "parts")]
    assert codes[0].shape == (1797, 4)
    assert torch.equal(*codes)


def write_images(root: Path) -> None:
    random = np.random.default_rng(0)
    for part, each in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(each):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def test_the_convolution_takes_image_folders_and_their_held_out_part() -> None:
    write_images(Path("images"))
    overrides = ["dataset.path=images", "dataset.channels=1"]
    main(["image_folder", "codes", *overrides, "--kind", "conv", "--latent-dim", "3", "--epochs", "1"])
    written = EmbeddingFolder("images", "codes").load()
    assert written.test is not None
    assert (written.train.x.shape, written.test.x.shape) == ((6, 3), (2, 3))


def test_a_pretrained_network_takes_folders() -> None:
    write_images(Path("images"))
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), "resnet.pth")
    network = [
        "--method",
        "pretrained",
        "--network",
        "resnet18",
        "--weights",
        "resnet.pth",
        "--image-size",
        "32",
    ]
    main(["image_folder", "codes", "dataset.path=images", *network])
    written = EmbeddingFolder("images", "codes").load()
    assert written.test is not None
    assert (written.train.x.shape, written.test.x.shape) == ((6, 512), (2, 512))
    with pytest.raises(SystemExit, match="--method pretrained needs images, and digits has none"):
        main(["digits", "other", *network])


class HalfTheDims:
    """Stands for UMAP: gives the first columns, so that tests know what to expect."""

    def __init__(self, n_components: int, n_neighbors: int, **settings: object) -> None:
        self.n_components, self.n_neighbors, self.settings = n_components, n_neighbors, settings

    def fit_transform(self, x: np.ndarray) -> np.ndarray:
        assert self.settings["min_dist"] == 0
        assert self.settings["random_state"] == 5
        return x[:, : self.n_components]

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x[:, : self.n_components]


def test_n2d_maps_the_codes_further(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("umap")
    stand_in.UMAP = HalfTheDims
    monkeypatch.setitem(sys.modules, "umap", stand_in)
    main(["digits", "codes", *SMALL, "--seed", "5"])
    main(["digits", "mapped", *SMALL, "--seed", "5", "--method", "n2d", "--umap-dims", "2"])
    codes, mapped = (EmbeddingFolder("digits", name).load().train.x for name in ("codes", "mapped"))
    assert torch.equal(mapped, codes[:, :2])
    for arguments, said in (
        (["--umap-dims", "0"], "--umap-dims"),
        (["--umap-neighbours", "1797"], "--umap-neigh"),
    ):
        with pytest.raises(SystemExit, match=said):
            main(["digits", "refused", *SMALL, "--method", "n2d", *arguments])
    assert not Path("refused").exists()


def test_n2d_without_umap_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(
        SystemExit, match=r'--method n2d needs umap-learn; install it by pip install "deepdpm\[embed'
    ):
        main(["digits", "codes", *SMALL, "--method", "n2d"])
    assert not Path("codes").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cifar", "codes"], "There is no data set cifar; take one of .*mnist"),
        (["digits", "codes", "dataset.size=3"], r"dataset\.size=3 does not set any of dataset\.name"),
        (["digits", "codes", "size"], "size does not set any of"),
        (["image_folder", "codes", "dataset.path=gone"], r"dataset\.path: there is no folder gone"),
        (["image_folder", "codes", "dataset.channels=2"], r"dataset\.channels must be 1 \(grey\) or 3"),
        (["digits", "codes", "--latent-dim", "0"], "latent_dim must be at least 1"),
        (["digits", "codes", "--augment", "-1"], "augment must be at least 0"),
        (["digits", "codes", "--objective", "contrast"], "objective=contrast compares disturbed copies"),
        (["synthetic", "codes", "--augment", "1"], "augment needs a data set of images"),
        (["digits", "codes", "--kind", "conv", "--weights", "gone.pt"], "model.features"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said) as caught:
        main(arguments)
    assert str(caught.value).startswith("deepdpm-embed: ")
    assert not Path("codes").exists()


def test_codes_are_not_overwritten() -> None:
    main(["digits", "codes", *SMALL])
    before = Path("codes/train_data.pt").read_bytes()
    with pytest.raises(SystemExit, match="codes holds codes already"):
        main(["digits", "codes", *SMALL])
    assert Path("codes/train_data.pt").read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        "fashion_mnist",
        "image_features",
        "image_folder",
        "imagenet50",
        "mnist",
        "reuters10k",
        "stl10",
        "text_folder",
        "usps",
    ],
)
def test_every_configuration_names_all_settings_and_makes_its_source(name: str) -> None:
    source = load_source(name)
    assert source.name == name
    source_again = type(source)(**{key: getattr(source, key) for key in vars(source)})
    assert source == source_again


def test_imagenet50_lists_fifty_classes() -> None:
    classes = vars(load_source("imagenet50"))["classes"]
    assert len(set(classes)) == 50
    assert all(name[0] == "n" and name[1:].isdigit() and len(name) == 9 for name in classes)
