"""Raw image sets: small files of the customary formats, the real files where they lie, and downloads."""

import bz2
import gzip
import hashlib
import os
import shutil
import struct
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torchvision import datasets

from deepdpm.data.files import DataMissingError
from deepdpm.data.images import RawImages, read_idx

SHARED = Path(os.environ.get("DEEPDPM_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


def needs(*names: str) -> pytest.MarkDecorator:
    absent = [name for name in names if not (SHARED / "torchvision" / name).exists()]
    return pytest.mark.skipif(bool(absent), reason=f"not at hand: {', '.join(absent)}")


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, packed: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a tiny MNIST (7 train, 3 test images) below a folder of torchvision's layout."""
    random = np.random.default_rng(seed)
    arrays = {}
    for part, number in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = random.integers(0, 10, number, dtype=np.uint8)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in arrays.items():
        if packed:
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (raw / name).write_bytes(idx_bytes(array))
    return arrays


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPDPM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server on the loopback and the folder it serves."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}/", served
        http.shutdown()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["torchvision", "."])
def test_idx_files_are_read_as_they_lie(tmp_path: Path, packed: bool, below: str) -> None:
    arrays = write_mnist(tmp_path / "root" / below, packed)
    dataset = RawImages("mnist", "mnist", root=str(tmp_path / "root"), mean=(0.1307,), std=(0.3081,)).load()
    images = np.concatenate([arrays["train-images-idx3-ubyte"], arrays["t10k-images-idx3-ubyte"]])
    labels = np.concatenate([arrays["train-labels-idx1-ubyte"], arrays["t10k-labels-idx1-ubyte"]])
    np.testing.assert_allclose(
        dataset.train.x.numpy(), (images.reshape(10, 784) / 255 - 0.1307) / 0.3081, atol=1e-5
    )
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == labels.tolist()
    assert dataset.test is None
    assert dataset.image_shape == (1, 28, 28)
    assert not list(Path().iterdir())


def test_held_out_keeps_the_test_part(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    dataset = RawImages("mnist", "mnist", root=str(tmp_path), held_out=True).load()
    assert dataset.test is not None
    assert dataset.test.labels is not None
    assert len(dataset.train) == 7
    assert dataset.test.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_imbalanced_drops_the_first_of_each_listed_class(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.tile(np.arange(10, dtype=np.uint8), 30)
    images = np.zeros((300, 2, 2), np.uint8)
    images[:, 0, 0] = np.arange(300) % 256
    for part, rows in (("train", slice(0, 200)), ("t10k", slice(200, 300))):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images[rows]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels[rows]))
    train, _ = RawImages("m", "mnist", root=str(tmp_path), imbalanced=True).load_pixels()
    kept = {8: 0.1, 2: 0.05, 5: 0.2, 9: 0.3}
    counts = train.labels_N.bincount(minlength=10).tolist()
    assert counts == [30 - int(30 * (1 - kept.get(digit, 1.0))) for digit in range(10)]
    last_eight = [row % 256 for row in range(300) if row % 10 == 8][-counts[8] :]
    assert train.images_NCHW[train.labels_N == 8][:, 0, 0, 0].tolist() == last_eight


def write_usps(folder: Path, part: str, num_images: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(num_images)
    labels = random.integers(1, 11, num_images)
    values = random.uniform(-1, 1, (num_images, 256)).round(6)
    lines = [
        f"{label} " + " ".join(f"{i + 1}:{v:.6f}" for i, v in enumerate(row))
        for label, row in zip(labels, values, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    filename = datasets.USPS.split_list[part][1]
    (folder / filename).write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
    return values, labels


def test_usps_files_are_read_as_they_lie(tmp_path: Path) -> None:
    parts = [
        write_usps(tmp_path / "torchvision", part, number) for part, number in (("train", 12), ("test", 5))
    ]
    dataset = RawImages("usps", "usps", root=str(tmp_path)).load()
    values = np.concatenate([values for values, _ in parts])
    np.testing.assert_allclose(dataset.train.x.numpy(), (values + 1) / 2, atol=1 / 255)
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == (np.concatenate([labels for _, labels in parts]) - 1).tolist()
    assert dataset.image_shape == (1, 16, 16)


def write_stl10(folder: Path) -> np.ndarray:
    binary = folder / datasets.STL10.base_folder
    binary.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 96, 96), dtype=np.uint8)
    for part, rows in (("train", slice(0, 3)), ("test", slice(3, 5))):
        images[rows].transpose(0, 1, 3, 2).tofile(binary / f"{part}_X.bin")
        np.arange(1, 6, dtype=np.uint8)[rows].tofile(binary / f"{part}_y.bin")
    return images


def test_stl10_images_stand_upright(tmp_path: Path) -> None:
    images = write_stl10(tmp_path / "torchvision")
    source = RawImages("stl10", "stl10", root=str(tmp_path), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    train, _ = source.load_pixels()
    np.testing.assert_array_equal(train.images_NCHW.numpy(), images)
    assert train.labels_N.tolist() == [0, 1, 2, 3, 4]
    wanted = (images / 255 - np.reshape([0.4, 0.5, 0.6], (3, 1, 1))) / np.reshape([0.2, 0.3, 0.4], (3, 1, 1))
    np.testing.assert_allclose(source.load().train.x.numpy(), wanted.reshape(5, -1), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"dataset\.mean and dataset\.std must hold one value for each channel"
    ):
        RawImages("stl10", "stl10", root=str(tmp_path)).load()


@needs("MNIST")
def test_real_mnist_is_what_torchvision_reads(tmp_path: Path) -> None:
    train, _ = RawImages("mnist", "mnist", root=str(SHARED)).load_pixels()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (SHARED / "torchvision" / "MNIST" / "raw").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    parts = [datasets.MNIST(tmp_path, train=train_part, download=False) for train_part in (True, False)]
    assert torch.equal(train.images_NCHW[:, 0], torch.cat([part.data for part in parts]))
    assert torch.equal(train.labels_N, torch.cat([part.targets for part in parts]))


@needs("usps.bz2", "usps.t.bz2")
def test_real_usps_has_its_rows() -> None:
    dataset = RawImages("usps", "usps", root=str(SHARED)).load()
    assert dataset.train.x.shape == (9298, 256)
    assert dataset.train.labels is not None
    assert dataset.train.labels.bincount().min() > 700
    assert 0 <= dataset.train.x.min() < dataset.train.x.max() <= 1


def serve_mnist(base: str, served: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    arrays = write_mnist(served / "source")
    files = sorted((served / "source" / "MNIST" / "raw").iterdir())
    for path in files:
        shutil.move(path, served / path.name)
    sums = [(path.name, hashlib.md5((served / path.name).read_bytes()).hexdigest()) for path in files]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{base}gone/", base])
    return arrays


def test_mnist_is_downloaded_once(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, served = server
    arrays = serve_mnist(base, served, monkeypatch)
    source = RawImages("mnist", "mnist", root=str(tmp_path / "root"))
    first = source.load()
    assert first.train.labels is not None
    assert first.train.labels[:7].tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    for path in served.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert torch.equal(source.load().train.x, first.train.x)


def test_a_damaged_download_leaves_nothing(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, served = server
    serve_mnist(base, served, monkeypatch)
    monkeypatch.setattr(
        datasets.MNIST, "resources", [(name, "0" * 32) for name, _ in datasets.MNIST.resources]
    )
    with pytest.raises(ValueError, match=r"cannot be downloaded .* or set dataset\.root or DEEPDPM_DATA"):
        RawImages("mnist", "mnist", root=str(tmp_path / "root")).load()
    assert not [path for path in (tmp_path / "root").rglob("*") if path.is_file()]


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        datasets.USPS, "split_list", {"train": ["http://127.0.0.1:9/usps.bz2", "usps.bz2", "0" * 32]}
    )
    with pytest.raises(DataMissingError, match=r"usps\.bz2 is not below .* cannot be downloaded"):
        RawImages("usps", "usps", root=str(tmp_path)).load()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_stl10_archive_is_unpacked(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, served = server
    images = write_stl10(tmp_path / "source")
    archive = served / "stl10.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / datasets.STL10.base_folder, datasets.STL10.base_folder)
    monkeypatch.setattr(datasets.STL10, "url", f"{base}stl10.tar.gz")
    monkeypatch.setattr(datasets.STL10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    train, _ = RawImages("stl10", "stl10", root=str(tmp_path / "root")).load_pixels()
    np.testing.assert_array_equal(train.images_NCHW.numpy(), images)
    assert [path.name for path in (tmp_path / "root" / "torchvision").iterdir()] == ["stl10_binary"]


def test_a_root_that_cannot_be_written_is_left_alone(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, served = server
    serve_mnist(base, served, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: root not in (Path(path), *Path(path).parents))
    RawImages("mnist", "mnist", root=str(root)).load()
    assert not list(root.iterdir())
    assert len(list((tmp_path / "cache" / "deepdpm" / "torchvision" / "MNIST" / "raw").iterdir())) == 4


@pytest.mark.parametrize("damage", ["short", "format", "gzip"])
def test_damaged_idx_files_are_named(tmp_path: Path, damage: str) -> None:
    content = idx_bytes(np.zeros((3, 28, 28), np.uint8))
    path = tmp_path / "images-idx3-ubyte"
    if damage == "short":
        path.write_bytes(content[:-5])
    elif damage == "format":
        path.write_bytes(b"<html>" + content)
    else:
        path = tmp_path / "images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(content)[:-12])
    with pytest.raises(ValueError, match=path.name):
        read_idx(path, 3)


def test_settings_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"dataset\.kind must be one of mnist"):
        RawImages("x", "cifar")
    with pytest.raises(ValueError, match=r"dataset\.std must be above 0"):
        RawImages("x", "mnist", std=(0.0,))
    with pytest.raises(ValueError, match=r"dataset\.imbalanced: stl10 has no published rule"):
        RawImages("x", "stl10", imbalanced=True)
