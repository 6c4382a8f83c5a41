"""The autoencoders: order and names of their layers, their losses, and the authors' weight files."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from deepdpm.autoencoder import (
    ConvAutoencoder,
    DenseAutoencoder,
    FeaturesSettings,
    Objective,
    StridedAutoencoder,
    build_autoencoder,
    contrast_loss,
    features_loss,
    load_published_weights,
    reconstruction_loss,
    save_weights,
)

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def published_names() -> list[str]:
    """The keys of an authors' file with three hidden layers, written out from their description."""
    names = []
    for half, without_bn in (("encoder", (0,)), ("decoder", (3,))):
        for index in range(4):
            names += [f"autoencoder.{half}.linear{index}.{part}" for part in ("weight", "bias")]
            if index not in without_bn:
                names += [f"autoencoder.{half}.bn{index}.{part}" for part in BN]
    return names


def train_a_little(model: nn.Module, x_BD: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        reconstruction_loss(x_BD, model(x_BD)[1]).backward()
        optimizer.step()


def test_dense_layers_follow_the_described_order(generator: torch.Generator) -> None:
    x_BD = torch.randn(16, 7, generator=generator)
    model = DenseAutoencoder(7, hidden_dims=(6, 5), latent_dim=3)
    train_a_little(model, x_BD)
    model.eval()
    state = model.state_dict()

    def linear(half: str, index: int, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{half}.linear{index}.weight"].T + state[f"{half}.linear{index}.bias"]

    def norm(half: str, index: int, x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, var, _ = (state[f"{half}.bn{index}.{part}"] for part in BN)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    code = linear("encoder", 0, x_BD).clamp_min(0)
    for index in (1, 2):
        code = norm("encoder", index, linear("encoder", index, code).clamp_min(0))
    back = code
    for index in (0, 1):
        back = norm("decoder", index, linear("decoder", index, back).clamp_min(0))
    torch.testing.assert_close(model.encode(x_BD), code)
    torch.testing.assert_close(model(x_BD)[1], linear("decoder", 2, back))


def test_dense_state_has_the_published_names() -> None:
    model = DenseAutoencoder(12, hidden_dims=(5, 5, 8), latent_dim=3)
    assert sorted(f"autoencoder.{name}" for name in model.state_dict()) == sorted(published_names())


@pytest.mark.parametrize("hidden_dims", [(4,), (9, 3), (5, 5, 20, 2)])
@pytest.mark.parametrize("latent_dim", [1, 6])
def test_dense_shapes_for_any_widths(hidden_dims: tuple[int, ...], latent_dim: int) -> None:
    code_BL, reconstruction_BD = DenseAutoencoder(7, hidden_dims, latent_dim)(torch.zeros(4, 7))
    assert code_BL.shape == (4, latent_dim)
    assert reconstruction_BD.shape == (4, 7)


@pytest.mark.parametrize("filters", [(4,), (8, 5), (2, 3, 4, 5)])
def test_a_strided_encoder_halves_the_image_with_each_of_its_filters(filters: tuple[int, ...]) -> None:
    settings = FeaturesSettings(kind="strided", filters=filters, latent_dim=6)
    model = build_autoencoder(settings, num_dims=2 * 16 * 8, image_shape=(2, 16, 8))
    maps = [module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert maps == list(filters)
    width_in = next(m.in_features for m in model.encoder.modules() if isinstance(m, torch.nn.Linear))
    cells = math.ceil(16 / 2 ** len(filters)) * math.ceil(8 / 2 ** len(filters))
    assert width_in == filters[-1] * cells
    code_BL, reconstruction_BD = model(torch.randn(3, 2 * 16 * 8))
    assert code_BL.shape == (3, 6)
    assert reconstruction_BD.shape == (3, 2 * 16 * 8)


@pytest.mark.parametrize("image_shape", [(1, 16, 16), (3, 9, 12), (1, 28, 28)])
def test_conv_forward_is_the_described_chain(
    image_shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    num_dims = image_shape[0] * image_shape[1] * image_shape[2]
    x_BD = torch.randn(5, num_dims, generator=generator)
    model = ConvAutoencoder(image_shape, latent_dim=4)
    train_a_little(model, x_BD)
    model.eval()
    maps = model.encoder_bn(
        functional.conv2d(x_BD.reshape(-1, *image_shape), model.encoder_conv.weight, model.encoder_conv.bias)
    )
    pool = nn.MaxPool2d(2, return_indices=True)
    pooled, cells = pool(maps.relu())
    code_BL = model.encoder_linear(pooled.reshape(5, -1))
    back = model.decoder_linear(code_BL).reshape(pooled.shape)
    back = nn.MaxUnpool2d(2)(back, cells, output_size=maps.shape[2:])
    back = model.decoder_conv(model.decoder_bn(back.relu())).reshape(5, -1)
    got_BL, got_BD = model(x_BD)
    torch.testing.assert_close(got_BL, code_BL)
    torch.testing.assert_close(model.encode(x_BD), code_BL)
    torch.testing.assert_close(got_BD, back)


def test_conv_decodes_codes_that_come_from_no_image() -> None:
    """Without cells each value goes to the upper left pixel of its window: the same as naming those cells."""
    model = ConvAutoencoder((1, 8, 8), latent_dim=3).eval()
    code_BL = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    cells = torch.tensor([[0, 2], [8, 10]]).expand(2, 32, 2, 2)
    torch.testing.assert_close(model.decode(code_BL), model.decode(code_BL, cells))


def test_all_learn_to_reconstruct(generator: torch.Generator) -> None:
    x_BD = torch.randn(64, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    for model in (
        DenseAutoencoder(64, (32,), 4),
        ConvAutoencoder((1, 8, 8), 16),
        StridedAutoencoder((1, 8, 8), 16),
    ):
        before = reconstruction_loss(x_BD, model(x_BD)[1]).item()
        train_a_little(model, x_BD, steps=60)
        assert reconstruction_loss(x_BD, model(x_BD)[1]).item() < 0.5 * before


def test_the_loss_is_a_sum_over_the_batch(generator: torch.Generator) -> None:
    x_BD, back_BD = torch.randn(2, 6, 5, generator=generator).double()
    by_rows = sum((x - y).norm() ** 2 for x, y in zip(x_BD, back_BD, strict=True))
    torch.testing.assert_close(reconstruction_loss(x_BD, back_BD), by_rows)


def test_noise_is_of_the_generator_and_zero_noise_is_none() -> None:
    x_BD = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    model = DenseAutoencoder(6, (5,), 2).eval()

    def loss(noise: float, seed: int = 0) -> float:
        settings = FeaturesSettings(kind="dense", noise=noise)
        generator = torch.Generator().manual_seed(seed)
        return features_loss(model, x_BD, settings, generator=generator)[0].item()

    assert loss(0.0) == reconstruction_loss(x_BD, model(x_BD)[1]).item()
    assert loss(0.5, 0) == loss(0.5, 0) != loss(0.5, 1)


def test_contrast_is_the_cross_entropy_of_cosines_both_ways(generator: torch.Generator) -> None:
    code_BL, other_BL = torch.randn(2, 7, 3, generator=generator).double()
    score = functional.cosine_similarity(code_BL[:, None], other_BL[None], dim=2) / 0.2
    expected = -0.5 * (score.log_softmax(1).diag() + score.log_softmax(0).diag()).sum()
    torch.testing.assert_close(contrast_loss(code_BL, other_BL), expected)
    torch.testing.assert_close(contrast_loss(other_BL, 5 * code_BL), expected)


def test_by_contrast_the_decoder_follows_and_the_encoder_does_not_see_it(generator: torch.Generator) -> None:
    x_BD = torch.randn(8, 64, generator=generator)
    model = StridedAutoencoder((1, 8, 8), 3)
    settings = FeaturesSettings(kind="strided", objective="contrast", noise=0.1)
    loss, reconstruction, _ = features_loss(model, x_BD, settings, generator=generator)
    reconstruction.backward(retain_graph=True)
    assert all(weight.grad is None for weight in model.encoder.parameters())
    assert all(weight.grad is not None for weight in model.decoder.parameters())
    (loss - reconstruction).backward()
    assert all(weight.grad is not None for weight in model.encoder.parameters())


def test_by_contrast_points_come_apart_more_than_their_copies(generator: torch.Generator) -> None:
    x_BD = torch.randn(64, 100, generator=generator)
    model = StridedAutoencoder((1, 10, 10), 4)
    settings = FeaturesSettings(kind="strided", objective="contrast", augment=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        losses.append(features_loss(model, x_BD, settings, (1, 10, 10), generator)[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("objective", ["reconstruction", "contrast"])
def test_in_16_bits_losses_are_nearly_those_of_32(objective: Objective, generator: torch.Generator) -> None:
    x_BD = torch.randn(32, 64, generator=generator)
    model = StridedAutoencoder((1, 8, 8), 3)
    settings = FeaturesSettings(kind="strided", objective=objective, augment=0.5)

    def results(in_16_bits: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_16_bits):
            return features_loss(model, x_BD, settings, (1, 8, 8), torch.Generator().manual_seed(0))

    for exact, rounded in zip(results(False), results(True), strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("prefix", ["", "feature_extractor."])
def test_published_weights_load(tmp_path: Path, prefix: str, generator: torch.Generator) -> None:
    shapes = {name: tensor.shape for name, tensor in DenseAutoencoder(12, (5, 5, 8), 3).state_dict().items()}
    written = {}
    for name in published_names():
        shape = shapes[name.removeprefix("autoencoder.")]
        written[prefix + name] = torch.rand(shape, generator=generator) if shape else torch.tensor(7)
    torch.save({**written, "clustering.cluster_net.weight": torch.zeros(3)}, tmp_path / "mnist_e2e")
    settings = FeaturesSettings(
        kind="dense", hidden_dims=(5, 5, 8), latent_dim=3, weights=str(tmp_path / "mnist_e2e")
    )
    model = build_autoencoder(settings, num_dims=12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, written[f"{prefix}autoencoder.{name}"])


def test_published_convolution_loads(tmp_path: Path, generator: torch.Generator) -> None:
    """A module whose parts are numbered as in the authors' convolution, and must give the same codes."""
    theirs = nn.ModuleDict(
        {
            "encoder_conv": nn.Sequential(nn.Identity(), nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU()),
            "encoder_linear": nn.Sequential(nn.Flatten(), nn.Linear(1152, 10)),
            "decoder_linear": nn.Sequential(nn.Linear(10, 1152), nn.Identity()),
            "decoder_conv": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 1, 5)),
        }
    )
    torch.save(
        {f"autoencoder.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "usps.pt"
    )
    model = ConvAutoencoder((1, 16, 16), latent_dim=10)
    load_published_weights(model, tmp_path / "usps.pt")
    x_BD = torch.randn(4, 256, generator=generator)
    pooled = functional.max_pool2d(theirs["encoder_conv"](x_BD.reshape(4, 1, 16, 16)), 2)
    torch.testing.assert_close(model.encode(x_BD), theirs["encoder_linear"](pooled))


@pytest.mark.parametrize(
    "model", [DenseAutoencoder(9, (4,), 2), ConvAutoencoder((1, 8, 8), 3), StridedAutoencoder((1, 8, 8), 3)]
)
def test_weights_survive_writing_and_loading(tmp_path: Path, model: nn.Module) -> None:
    train_a_little(model, torch.ones(4, model.num_dims))
    save_weights(model, tmp_path / "autoencoder.pt")
    fresh = type(model)(9, (4,), 2) if isinstance(model, DenseAutoencoder) else type(model)((1, 8, 8), 3)
    load_published_weights(fresh, tmp_path / "autoencoder.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])


def test_a_file_that_does_not_fit_names_its_layers_and_changes_nothing(tmp_path: Path) -> None:
    save_weights(DenseAutoencoder(9, (4, 6), 2), tmp_path / "other.pt")
    model = DenseAutoencoder(9, (5,), 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"encoder\.linear0\.weight is \(4, 9\) in the file and \(5, 9\) here"
    ) as caught:
        load_published_weights(model, tmp_path / "other.pt")
    assert "model.features.weights" in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Malice:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("malice"),))


def test_bad_weight_files_give_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = DenseAutoencoder(4, (3,), 2)
    torch.save({"autoencoder.encoder.linear0.weight": Malice()}, "malice.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Malice()))
    Path("text.pt").write_text("weights")
    Path("empty.pt").touch()
    torch.save({"encoder.weight": torch.zeros(1)}, "keys.pt")
    for name in ("malice.pt", "pickle.pt", "text.pt", "empty.pt", "keys.pt", "absent.pt"):
        with pytest.raises(ValueError, match=f"model.features.weights.*{name}"):
            load_published_weights(model, name)
    assert not Path("malice").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "deep"),
        ("latent_dim", 0),
        ("hidden_dims", ()),
        ("hidden_dims", (500, 0)),
        ("filters", ()),
        ("filters", (16, 0)),
        ("noise", -0.1),
        ("augment", -0.1),
        ("objective", "contrast"),
        ("objective", "guess"),
        ("pretrain_epochs", -1),
        ("pretrain_batch_size", 1),
        ("pretrain_lr", 0.0),
        ("weight_decay", -1.0),
    ],
)
def test_settings_out_of_range_name_themselves(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"model\.features\.{key}"):
        FeaturesSettings(**{key: value})


def test_kinds_that_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="kind=none has no autoencoder"):
        build_autoencoder(FeaturesSettings(), num_dims=4)
    with pytest.raises(ValueError, match="data set of images"):
        build_autoencoder(FeaturesSettings(kind="conv"), num_dims=4)
    with pytest.raises(ValueError, match="kind=strided needs a data set of images"):
        build_autoencoder(FeaturesSettings(kind="strided"), num_dims=4)
    with pytest.raises(ValueError, match="at least 6 x 6 pixels"):
        build_autoencoder(FeaturesSettings(kind="conv"), num_dims=16, image_shape=(1, 4, 4))
    assert build_autoencoder(FeaturesSettings(kind="conv"), 64, (1, 8, 8)).latent_dim == 10
