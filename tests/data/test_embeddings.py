"""Published codes, folders of codes, and downloads (from a server on this machine)."""

import functools
import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deepdpm.data import files
from deepdpm.data.embeddings import (
    IMBALANCE,
    EmbeddingFolder,
    PublishedCodes,
    imbalanced_rows,
    read_pair,
)

REPOSITORY = Path(__file__).parents[2]
REAL = next(
    (
        root
        for root in (Path(os.environ.get("DEEPDPM_DATA") or "none"), REPOSITORY / "../shared/data")
        if (root / "embeddings/MNIST/train_data.pt").is_file()
    ),
    None,
)
needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(REAL is None, reason="no published codes in DEEPDPM_DATA or ../shared/data"),
]


def real(function: object) -> object:
    return functools.reduce(lambda wrapped, mark: mark(wrapped), needs_data, function)


@real
@pytest.mark.parametrize(
    ("collection", "imbalanced", "size"),
    [
        ("mnist", False, 70_000), ("fashion_mnist", False, 70_000), ("usps", False, 9_298),
        ("mnist", True, 47_298), ("fashion_mnist", True, 46_971),
    ],
)  # fmt: skip
def test_published_codes_load(
    monkeypatch: pytest.MonkeyPatch, collection: str, imbalanced: bool, size: int
) -> None:
    monkeypatch.setenv("DEEPDPM_DATA", str(REAL))
    data = PublishedCodes("set", collection, imbalanced).load()
    assert data.train.x.shape == (size, 10)
    assert data.train.labels is not None
    assert data.train.labels.unique().tolist() == list(range(10))
    assert data.class_names is not None
    assert len(data.class_names) == 10
    assert data.name == ("set_imbalanced" if imbalanced else "set")


@real
def test_recorded_checksums_are_those_of_the_files() -> None:
    assert REAL is not None
    for relative, sha256 in files.EMBEDDINGS_SHA256.items():
        path = REAL / "embeddings" / relative
        if path.is_file():
            assert files.sha256_of(path) == sha256, relative


@real
@pytest.mark.parametrize("collection", ["mnist", "fashion_mnist"])
def test_the_rule_gives_the_shipped_imbalanced_files(
    monkeypatch: pytest.MonkeyPatch, collection: str
) -> None:
    monkeypatch.setenv("DEEPDPM_DATA", str(REAL))
    balanced = PublishedCodes("set", collection).load().train
    shipped = PublishedCodes("set", collection, imbalanced=True).load().train
    assert balanced.labels is not None
    kept_N = imbalanced_rows(balanced.labels, IMBALANCE[collection])
    assert torch.equal(balanced.labels[kept_N], shipped.labels)
    assert torch.equal(balanced.x[kept_N], shipped.x)


@real
def test_imbalanced_usps_is_made_from_usps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPDPM_DATA", str(REAL))
    before = PublishedCodes("set", "usps").load().train.labels
    after = PublishedCodes("set", "usps", imbalanced=True).load().train.labels
    assert before is not None
    assert after is not None
    share_C = after.bincount() / before.bincount()
    for label in range(10):
        assert share_C[label].item() == pytest.approx(IMBALANCE["usps"].get(label, 1.0), abs=0.002)


@real
def test_old_files_of_torch_save_load() -> None:
    assert REAL is not None
    folder = REAL / "embeddings/IMAGENET_50_IMB"
    if not folder.is_dir():
        pytest.skip("IMAGENET_50_IMB is not among the published codes here")
    samples = read_pair(folder / "test_data.pt", folder / "test_labels.pt")
    assert samples.x.shape == (2501, 128)
    assert samples.labels is not None
    assert len(samples.labels.unique()) == 48


def test_the_first_points_of_a_class_are_dropped() -> None:
    labels_N = torch.tensor([0, 1] * 10)
    kept_N = imbalanced_rows(labels_N, {1: 0.3})
    assert kept_N[labels_N == 0].all()
    assert kept_N[labels_N == 1].tolist() == [False] * 7 + [True] * 3


def test_an_unknown_collection_is_named() -> None:
    with pytest.raises(ValueError, match=r"dataset\.collection is stl: give one of mnist"):
        PublishedCodes("set", "stl").load()


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("test", [True, False])
def test_any_folder_loads(tmp_path: Path, labels: bool, test: bool) -> None:
    for part in ("train", "test") if test else ("train",):
        torch.save(torch.eye(3, dtype=torch.float64), tmp_path / f"{part}_data.pt")
        if labels:
            torch.save(np.array([0.0, 2.0, -1.0]), tmp_path / f"{part}_labels.pt")
    data = EmbeddingFolder("mine", str(tmp_path)).load()
    assert (data.name, data.test is not None) == ("mine", test)
    for samples in filter(None, (data.train, data.test)):
        assert torch.equal(samples.x, torch.eye(3))
        assert (samples.labels is not None) == labels
        assert not labels or samples.labels.tolist() == [0, 2, -1]


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    unusable = {"": "is not set", str(tmp_path / "none"): "not a folder", str(tmp_path): "no train_data"}
    for path, message in unusable.items():
        with pytest.raises(ValueError, match=rf"dataset\.path.*{message}"):
            EmbeddingFolder(path=path).load()
    torch.save({"x": torch.eye(3)}, tmp_path / "train_data.pt")
    with pytest.raises(ValueError, match="holds a dict"):
        EmbeddingFolder(path=str(tmp_path)).load()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served over HTTP in place of the authors' repository; the root and the cache are empty."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(files, "_EMBEDDINGS_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DEEPDPM_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def published(served: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set under the name of USPS, with its checksums."""
    (served / "USPS").mkdir()
    torch.save(torch.randn(20, 10, dtype=torch.float64), served / "USPS/train_data.pt")
    torch.save(torch.arange(20) % 10, served / "USPS/train_labels.pt")
    for name in ("USPS/train_data.pt", "USPS/train_labels.pt"):
        sha256 = hashlib.sha256((served / name).read_bytes()).hexdigest()
        monkeypatch.setitem(files.EMBEDDINGS_SHA256, name, sha256)
    return served


def test_missing_codes_are_downloaded_once(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = PublishedCodes("usps_n2d", "usps").load()
    assert len(data.train) == 20
    assert "100%" in capsys.readouterr().err  # the progress bar
    folder = tmp_path / "root/embeddings/USPS"
    assert sorted(path.name for path in folder.iterdir()) == ["train_data.pt", "train_labels.pt"]
    (published / "USPS/train_data.pt").unlink()
    assert torch.equal(PublishedCodes("usps_n2d", "usps").load().train.x, data.train.x)


def test_a_read_only_root_sends_downloads_to_the_cache(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the place of the folder stops even an administrator, whom permissions do not.
    (tmp_path / "root").write_text("")
    assert len(PublishedCodes("usps_n2d", "usps").load().train) == 20
    assert (tmp_path / "cache/deepdpm/embeddings/USPS/train_data.pt").is_file()
    (published / "USPS/train_data.pt").unlink()
    assert len(PublishedCodes("usps_n2d", "usps").load().train) == 20


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "no server"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = published / "USPS/train_data.pt"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "no server":
        monkeypatch.setattr(files, "_EMBEDDINGS_URL", "http://127.0.0.1:9")
    else:
        path.write_bytes(content[:-1] if damage == "cut" else b"X" + content[1:])
    with pytest.raises(files.DataMissingError, match="could not be downloaded") as caught:
        PublishedCodes("usps_n2d", "usps").load()
    message = str(caught.value)
    assert str(tmp_path / "root/embeddings/USPS/train_data.pt") in message
    assert "/USPS/train_data.pt could not" in message
    assert not (tmp_path / "root").exists()
    assert not (tmp_path / "cache").exists()


def test_the_authors_repository_is_asked_at_a_fixed_commit() -> None:
    assert files._EMBEDDINGS_URL == (
        "https://raw.githubusercontent.com/BGU-CS-VIL/DeepDPM/95c9376/"
        "pretrained_embeddings/umap_embedded_datasets"
    )


def test_the_root_is_the_setting_else_the_environment_else_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPDPM_DATA", "there")
    assert files.data_root("here") == Path("here")
    assert files.data_root() == Path("there")
    monkeypatch.setenv("DEEPDPM_DATA", "")
    assert files.data_root() == Path("data")
