"""Frozen features: checkpoints of several forms, the cache of shards, and what is skipped."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from deepdpm import features
from deepdpm.data import DataMissingError
from deepdpm.features import FrozenFeatures, load_network, pixel_features, prepare_image

SIZE = 32


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=16).eval()


def moco_state(resnet: nn.Module, version: int) -> dict[str, Tensor]:
    """The state dict of a MoCo checkpoint: two encoders and a queue; in version 2 the head has two layers."""
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith("fc.")}
    generator = torch.Generator().manual_seed(1)
    heads = {"fc": (8, 512)} if version == 1 else {"fc.0": (512, 512), "fc.2": (8, 512)}
    for name, shape in heads.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / 20
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    both = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
    both |= {f"module.encoder_k.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    return both | {"module.queue": torch.zeros(8, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}


def write_moco(path: Path, resnet: nn.Module, version: int = 2) -> str:
    torch.save(
        {"epoch": 200, "arch": "resnet18", "state_dict": moco_state(resnet, version), "optimizer": {}}, path
    )
    return str(path)


def write_images(root: Path, each: int = 4) -> None:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            size = (40 + number, 50, 3) if number else (40, 50)
            pixels = random.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def backbone(resnet: nn.Module, images_BCHW: Tensor) -> Tensor:
    """All layers of a ResNet but the classifier, one by one."""
    x = images_BCHW
    with torch.no_grad():
        for name, layer in resnet.named_children():
            if name != "fc":
                x = layer(x)
    return x.flatten(1)


@pytest.mark.parametrize("version", [1, 2])
def test_moco_checkpoints_give_the_query_encoder(tmp_path: Path, resnet: nn.Module, version: int) -> None:
    path = write_moco(tmp_path / "moco.pth.tar", resnet, version)
    images_BCHW = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    codes_BD = load_network("resnet18", path, "backbone", SIZE).encode(images_BCHW)
    torch.testing.assert_close(codes_BD, backbone(resnet, images_BCHW))

    state = moco_state(resnet, version)
    projected = codes_BD
    for name in ("fc",) if version == 1 else ("fc.0", "fc.2"):
        if name == "fc.2":
            projected = projected.relu()
        projected = (
            projected @ state[f"module.encoder_q.{name}.weight"].T + state[f"module.encoder_q.{name}.bias"]
        )
    got = load_network("resnet18", path, "projection", SIZE).encode(images_BCHW)
    torch.testing.assert_close(got, projected / projected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_state_dicts_load(tmp_path: Path, resnet: nn.Module, prefix: str) -> None:
    torch.save(
        {prefix + name: tensor for name, tensor in resnet.state_dict().items()}, tmp_path / "plain.pth"
    )
    images_BCHW = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    codes_BD = load_network("resnet18", str(tmp_path / "plain.pth"), image_size=SIZE).encode(images_BCHW)
    torch.testing.assert_close(codes_BD, backbone(resnet, images_BCHW))


def test_networks_that_do_not_fit(tmp_path: Path, resnet: nn.Module) -> None:
    path = write_moco(tmp_path / "moco.pth.tar", resnet)
    with pytest.raises(
        ValueError, match=r"dataset\.weights: .* does not fit .*layer1\.0\.conv3\.weight is missing"
    ):
        load_network("resnet50", path)
    state = resnet.state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "grey.pth")
    with pytest.raises(
        ValueError, match=r"conv1\.weight is \(64, 1, 7, 7\) in the file and \(64, 3, 7, 7\) here"
    ):
        load_network("resnet18", str(tmp_path / "grey.pth"))
    torch.save({name: state[name] for name in state if not name.startswith("fc.")}, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"no projection head fc"):
        load_network("resnet18", str(tmp_path / "headless.pth"), "projection")
    torch.save([1, 2], tmp_path / "list.pth")
    for arguments, said in (
        (("resnet18", str(tmp_path / "list.pth")), r"dataset\.weights: .* holds no state dict"),
        (("resnet18", str(tmp_path / "gone.pth")), r"dataset\.weights: There is no file"),
        (("resnet18", ""), r"dataset\.weights is not set"),
        (("resnet9",), r"dataset\.network: torchvision has no image classifier 'resnet9'"),
        (("resnet18", path, "middle"), r"dataset\.layer must be one of"),
        (("resnet18", "torchvision", "projection"), r"dataset\.layer=projection needs a MoCo checkpoint"),
    ):
        with pytest.raises(ValueError, match=said):
            load_network(*arguments)


def test_weights_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(weights.value, "url", "http://127.0.0.1:9/resnet18-00000000.pth")
    with pytest.raises(
        DataMissingError, match=r"dataset\.weights: the weights of resnet18 cannot be downloaded"
    ):
        load_network("resnet18")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_images_are_prepared_as_in_training() -> None:
    image = torch.full((1, 64, 96), 51, dtype=torch.uint8)
    prepared = prepare_image(image, SIZE)
    assert prepared.shape == (3, SIZE, SIZE)
    wanted = (0.2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(prepared, wanted[:, None, None].expand(3, SIZE, SIZE))


@pytest.fixture
def source(tmp_path: Path, resnet: nn.Module) -> FrozenFeatures:
    write_images(tmp_path / "images")
    weights = write_moco(tmp_path / "moco.pth.tar", resnet)
    return FrozenFeatures(
        "pets",
        str(tmp_path / "images"),
        network="resnet18",
        weights=weights,
        image_size=SIZE,
        batch_size=3,
        cache=str(tmp_path / "cache"),
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read as images, in order."""
    read: list[Path] = []
    real = features.read_image
    monkeypatch.setattr(
        features, "read_image", lambda path, channels: read.append(path) or real(path, channels)
    )
    return read


def test_codes_are_computed_once(source: FrozenFeatures, computed: list[Path], resnet: nn.Module) -> None:
    first = source.load()
    assert first.train.x.shape == (8, 512)
    assert first.train.labels is not None
    assert first.train.labels.tolist() == [0] * 4 + [1] * 4
    assert len(computed) == 8
    second = source.load()
    assert torch.equal(first.train.x, second.train.x)
    assert len(computed) == 8


def test_another_image_or_network_means_other_codes(
    source: FrozenFeatures, computed: list[Path], tmp_path: Path
) -> None:
    source.load()
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(tmp_path / "images" / "cat" / "0.png")
    source.load()
    assert len(computed) == 16
    torch.manual_seed(3)
    write_moco(tmp_path / "moco.pth.tar", torchvision.models.resnet18())
    source.load()
    assert len(computed) == 24


def test_shards_that_are_whole_are_kept(
    source: FrozenFeatures,
    computed: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Eight images in shards of three: after an interruption only what is missing or damaged is computed."""
    monkeypatch.setattr(features.FeatureCache, "__init__", small_shards(features.FeatureCache.__init__))
    whole = source.load().train.x
    folder = next(Path(source.cache).iterdir())
    shards = sorted(folder.glob("shard_*.pt"))
    assert len(shards) == 3
    shards[2].unlink()
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    computed.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(source.load().train.x, whole)
    assert len(computed) == 3 + 2
    assert shards[0].name in caplog.text
    assert not list(folder.glob("*.part"))


def small_shards(real: object) -> object:
    def make(cache: object, *arguments: object) -> None:
        real(cache, *arguments, shard_size=3)

    return make


def test_an_interrupted_computation_goes_on(
    source: FrozenFeatures, computed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features.FeatureCache, "__init__", small_shards(features.FeatureCache.__init__))
    counting = features.read_image

    def stop_at_the_fifth(path: Path, channels: int) -> Tensor | None:
        if len(computed) == 5:
            raise KeyboardInterrupt
        return counting(path, channels)

    with monkeypatch.context() as patch:
        patch.setattr(features, "read_image", stop_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            source.load()
    computed.clear()
    assert len(source.load().train) == 8
    assert len(computed) == 5


def test_broken_images_are_left_out(
    source: FrozenFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = source.load().train.x
    for name in ("1.png", "2.png"):
        (tmp_path / "images" / "cat" / name).write_text("no image")
    with caplog.at_level(logging.WARNING):
        dataset = source.load()
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(dataset.train.x, whole[[0, 3, 4, 5, 6, 7]])
    assert "Skipped 2 of 8 images" in caplog.text
    for path in (tmp_path / "images").rglob("*.png"):
        path.touch()
        path.write_text("no image")
    with pytest.raises(ValueError, match="none of the 8 images"):
        source.load()


def test_workers_give_the_same_codes(source: FrozenFeatures, tmp_path: Path) -> None:
    settings = {**vars(source), "workers": 1, "cache": str(tmp_path / "other")}
    assert torch.equal(FrozenFeatures(**settings).load().train.x, source.load().train.x)


def test_a_held_out_part_is_computed_too(source: FrozenFeatures, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    write_images(root / "train", each=2)
    write_images(root / "val", each=1)
    dataset = FrozenFeatures(**{**vars(source), "path": str(root)}).load()
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    assert dataset.class_names == ("cat", "dog")


def test_pixels_in_memory_have_the_codes_of_their_files(source: FrozenFeatures, tmp_path: Path) -> None:
    paths = [tmp_path / "images" / "cat" / "0.png", tmp_path / "images" / "dog" / "0.png"]
    images_NCHW = torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in paths])
    network = load_network("resnet18", source.weights, image_size=SIZE)
    codes_ND = pixel_features(images_NCHW, "pets", network, tmp_path / "pixels")
    torch.testing.assert_close(codes_ND, source.load().train.x[[0, 4]])


@pytest.mark.parametrize(("key", "value"), [("image_size", 0), ("batch_size", 0), ("workers", -1)])
def test_settings_out_of_range_name_themselves(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"dataset\.{key} must be at least"):
        FrozenFeatures("pets", "images", **{key: value})
