"""Texts as tf-idf rows: Reuters10k, from scikit-learn's fetcher or its customary file, and folders of texts.

Legend: N documents, T terms; a row is scaled to the length sqrt(T), so that its mean square is 1.
"""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.datasets import fetch_rcv1
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor

from deepdpm.checks import check_least
from deepdpm.data.files import DataMissingError, cache_root, data_root
from deepdpm.data.samples import Dataset, Samples

log = logging.getLogger(__name__)

ROOT_CATEGORIES = ("CCAT", "GCAT", "MCAT", "ECAT")
# What a pickle of numpy arrays names, in numpy 1 and 2 and under the old and the new pickle protocols.
ADMITTED = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype")}


@dataclass(frozen=True)
class Reuters:
    """Read Reuters10k: news stories of four root categories as tf-idf rows of the most frequent terms.

    With `path` the customary file `reuters10k.npy` is read. Without, the set is built from RCV1, which
    scikit-learn downloads into `root` once (about 650 MB): the stories of one root category alone, the
    `num_terms` terms found in most of them, and `num_documents` stories drawn by `seed`.

    Raises:
        ValueError: no such file, a file with anything but numpy arrays, or no network at the first download.
    """

    name: str = "reuters10k"
    path: str | None = None
    root: str | None = None
    num_documents: int = 10_000
    num_terms: int = 2_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "dataset", {"num_documents": 1, "num_terms": 1})

    def load(self) -> Dataset:
        """Read or build the rows."""
        if self.path is not None:
            x_NT, labels_N = _read_customary(Path(self.path))
            return Dataset(self.name, Samples(x_NT, labels_N), class_names=ROOT_CATEGORIES)
        data_NT, targets, categories = self._fetch()
        columns = [categories.index(name) for name in ROOT_CATEGORIES]
        memberships = np.asarray(targets[:, columns].todense())
        single = np.flatnonzero(memberships.sum(axis=1) == 1)
        data_NT = data_NT[single]
        # RCV1 comes as (1 + log tf) * idf of unit length; counts are gone, so frequent means in many stories.
        stories_T = np.bincount(data_NT.indices, minlength=data_NT.shape[1])
        terms = np.sort(np.argsort(-stories_T, kind="stable")[: self.num_terms])
        drawn = np.random.default_rng(self.seed).permutation(len(single))[: self.num_documents]
        labels_N = torch.from_numpy(memberships[single[drawn]].argmax(axis=1)).long()
        return Dataset(
            self.name, Samples(tfidf_rows(data_NT[drawn][:, terms]), labels_N), class_names=ROOT_CATEGORIES
        )

    def _fetch(self) -> tuple[Any, Any, list[str]]:
        root = _writable(data_root(self.root))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Retry downloading", UserWarning)
                rcv1 = fetch_rcv1(data_home=root)
        except OSError as error:
            raise DataMissingError(
                f"RCV1 is not below {root} and cannot be downloaded ({error}); connect once, or set "
                "dataset.path to a reuters10k.npy."
            ) from error
        return rcv1.data, rcv1.target, list(rcv1.target_names)


def _writable(root: Path) -> Path:
    if (root / "RCV1").is_dir():
        return root
    parent = next(path for path in (root, *root.absolute().parents) if path.exists())
    return root if os.access(parent, os.W_OK) else cache_root()


@dataclass(frozen=True)
class TextFolder:
    """Read a folder of UTF-8 text files as tf-idf rows of the most frequent terms.

    Files in sub-folders take the name of their sub-folder as label; a folder without sub-folders has no
    labels. Files that are not UTF-8, or hold none of the terms, are named in the log, skipped and counted.

    Raises:
        ValueError: no such folder, or no file in it that can be used.
    """

    name: str = "text_folder"
    path: str = ""
    pattern: str = "*.txt"
    num_terms: int = 2_000

    def __post_init__(self) -> None:
        check_least(self, "dataset", {"num_terms": 1})

    def load(self) -> Dataset:
        """Read the files and count their terms."""
        if not self.path:
            raise ValueError("dataset.path is not set: give the folder that holds the text files.")
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataMissingError(f"dataset.path: there is no folder {root}.")
        paths = sorted(root.rglob(self.pattern))
        texts = {path: text for path in paths if (text := _read_text(path)) is not None}
        vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=self.num_terms, dtype=np.float64)
        try:
            counts_NT = vectorizer.fit_transform(texts.values())
        except ValueError as error:
            raise ValueError(
                f"dataset.path: no file {self.pattern} below {root} holds words; set dataset.pattern to "
                "that of the files."
            ) from error
        filled = np.diff(counts_NT.indptr) > 0
        for path in (path for path, full in zip(texts, filled, strict=True) if not full):
            log.warning("Skipped %s, which holds none of the %d terms.", path, counts_NT.shape[1])
        kept = [path for path, full in zip(texts, filled, strict=True) if full]
        if len(kept) < len(paths):
            log.warning("Skipped %d of %d text files below %s.", len(paths) - len(kept), len(paths), root)
        labels_N, class_names = _folder_labels(root, kept)
        return Dataset(
            self.name,
            Samples(tfidf_rows(counts_NT[filled]), labels_N),
            feature_names=tuple(vectorizer.get_feature_names_out()),
            class_names=class_names,
        )


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        log.warning("Skipped %s, which cannot be read as UTF-8 text (%s).", path, error)
        return None


def _folder_labels(root: Path, paths: list[Path]) -> tuple[Tensor | None, tuple[str, ...] | None]:
    folders = [path.relative_to(root).parts[0] if path.parent != root else "" for path in paths]
    if "" in Counter(folders):
        return None, None
    names = tuple(sorted(set(folders)))
    return torch.tensor([names.index(folder) for folder in folders]), names


def tfidf_rows(data_NT: Any) -> Tensor:
    """Scale each row of a sparse or dense matrix (N, T) to the length sqrt(T); empty rows stay empty.

    >>> tfidf_rows(np.array([[3.0, 0, 0, 4.0], [0, 0, 0, 0]]))
    tensor([[1.2000, 0.0000, 0.0000, 1.6000],
            [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    unit_NT = normalize(data_NT)
    dense_NT = np.asarray(unit_NT.todense() if sp.issparse(unit_NT) else unit_NT)
    return torch.from_numpy((dense_NT * math.sqrt(dense_NT.shape[1])).astype(np.float32))


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle numpy arrays in plain containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Admit what makes an array; raise UnpicklingError for anything else."""
        if (module, name) == ("_codecs", "encode"):  # how old protocols write bytes
            return lambda text, _: text.encode("latin1")
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_pickled_arrays(file: BinaryIO) -> Any:
    """Read a pickle of numpy arrays, bare or within a numpy file, without running anything else it names.

    Raises:
        UnpicklingError: the file asks for anything but numpy arrays, or is no pickle.
    """
    content = io.BytesIO(file.read())
    if content.getvalue().startswith(b"\x93NUMPY"):
        major, _ = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        _, _, dtype = read(content)
        if not dtype.hasobject:
            raise pickle.UnpicklingError("it holds one plain array")
    return ArrayUnpickler(content, encoding="latin1").load()


def _read_customary(path: Path) -> tuple[Tensor, Tensor]:
    """Read a dict of `data` (N, T) and `label` (N,); scaling the rows again leaves them as they are."""
    if not path.is_file():
        raise DataMissingError(f"dataset.path: there is no file {path}.")
    try:
        with path.open("rb") as file:
            loaded = read_pickled_arrays(file)
        if isinstance(loaded, np.ndarray) and loaded.size == 1:
            loaded = loaded.item()
        data_NT = np.asarray(loaded["data"], dtype=np.float64)
        label_N = np.asarray(loaded["label"], dtype=np.int64).reshape(-1)
        data_NT = data_NT.reshape(len(label_N), -1)
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"dataset.path: {path} is not a pickled dict of the numpy arrays data and label ({error})."
        ) from error
    if not np.isfinite(data_NT).all():
        raise ValueError(f"dataset.path: {path} holds values that are not finite.")
    return tfidf_rows(data_NT), torch.from_numpy(label_N)
