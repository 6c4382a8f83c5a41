"""Where published files lie on disk, and how they get there.

The root is the environment variable DEEPDPM_DATA, else `data/` in the working directory. What is not there is
looked for in the user's cache, and then downloaded from the authors' repository: into the root, or into the
cache where the root may not be written.
"""

import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import torch

_COMMIT = "95c9376"
_REPOSITORY_URL = f"https://raw.githubusercontent.com/BGU-CS-VIL/DeepDPM/{_COMMIT}"
_EMBEDDINGS_URL = f"{_REPOSITORY_URL}/pretrained_embeddings/umap_embedded_datasets"
_TIMEOUT_SECONDS = 30.0

# SHA-256 of the authors' files at that commit.
EMBEDDINGS_SHA256 = {
    "FASHION/train_data.pt": "15e9eb715d63f0d0ccd32342508043aba0056af870b8ddf4169274b53fe19c5c",
    "FASHION/train_labels.pt": "afe98befd6b79246a39be1486247c6d6c892fe4dfd68693b44ee74bcfc10ce53",
    "FASHION_IMBALANCED/train_data.pt": "cddf9634734f539ad810f6ddd2672418e3b6d381618abc0a119cf37023c1b4ef",
    "FASHION_IMBALANCED/train_labels.pt": "033bcc74894f7910b0faba9ae0ba3a1a72d798700fcd6fcf95ec4d8556345929",
    "MNIST/train_data.pt": "d481b8342f2d1329adcb6fb529338de2d3774927ff5d8a394c7cd1e6353fddbc",
    "MNIST/train_labels.pt": "a8aa8458364d5f9dcd9478776abf6f33f0583b1270713f87cc2218a0b026b834",
    "MNIST_IMBALANCED/train_data.pt": "d19324ea311d55289bd7ce43fa944234e9e17b6d5ceac6b912d15e05f35e8f9c",
    "MNIST_IMBALANCED/train_labels.pt": "77d2ef49fc311ef96c4d41c05b21a8f8f5aea55c4732cd88adf66ca1fdb25dee",
    "USPS/train_data.pt": "dba29b91477b541d4b1a4420455b7d236b31be67789adba917d3e68d6b81ebdf",
    "USPS/train_labels.pt": "e48e10f064d9c6794cb00133f7ae4d132650fd938bae1e134a0ba0014c4b3fc3",
}


class DataMissingError(ValueError):
    """The files of a data set are not on this machine; tables tell that from a failure."""


def data_root(root: str | None = None) -> Path:
    """The folder that holds `embeddings/` and `torchvision/`: as given, else DEEPDPM_DATA, else `data/`."""
    return Path(root or os.environ.get("DEEPDPM_DATA") or "data").expanduser()


def cache_root() -> Path:
    """The folder for downloads where the root may not be written."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepdpm"


def embedding_file(relative: str) -> Path:
    """The path of one published file such as `MNIST/train_data.pt`, downloaded if it is nowhere on disk.

    Raises:
        DataMissingError: it is not on disk and the download failed; says where to get it and where to put it.
    """
    places = [root / "embeddings" / relative for root in (data_root(), cache_root())]
    for path in places:
        if path.is_file():
            return path
    path = places[0] if _writable(places[0].parent) else places[1]
    download(f"{_EMBEDDINGS_URL}/{relative}", path, EMBEDDINGS_SHA256[relative])
    return path


def download(url: str, path: Path, sha256: str) -> None:
    """Download one file with a progress bar; it appears at `path` whole and checked, or not at all.

    Raises:
        DataMissingError: no connection, another checksum, or no room to write; says where to put the file by
            hand.
    """
    try:
        with _removed_if_empty(path.parent), _time_limit(_TIMEOUT_SECONDS):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        if isinstance(error, HTTPError):
            error.close()
        raise DataMissingError(
            f"{url} could not be downloaded ({error}): get the file from there by other means and put it at "
            f"{path.absolute()}, or set DEEPDPM_DATA to a folder that has "
            f"embeddings/{path.parent.name}/{path.name}."
        ) from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder that need not exist yet; leaves nothing behind."""
    try:
        with _removed_if_empty(folder), tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Make a folder, and afterwards take away again what was made and stayed empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """A server that falls silent raises instead of hanging; torch.hub has no setting for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
