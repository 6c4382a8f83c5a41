"""Texts as rows: Reuters10k from RCV1 and from its customary file, and folders of text files."""

import logging
import pickle
from pathlib import Path

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
import sklearn.datasets._rcv1 as rcv1_module
from sklearn.datasets._base import RemoteFileMetadata

from deepdpm.data.text import Reuters, TextFolder, tfidf_rows

CATEGORIES = ("C11", "CCAT", "E21", "ECAT", "GCAT", "GSPO", "MCAT")


def write_rcv1(root: Path, num_stories: int = 60, num_terms: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Write what scikit-learn's fetcher keeps after its first download, small; give its two tables, dense."""
    random = np.random.default_rng(0)
    rows = random.random((num_stories, num_terms)) * (random.random((num_stories, num_terms)) < 0.3)
    rows[:, 0] = 1.0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    topics = (random.random((num_stories, len(CATEGORIES))) < 0.3).astype(np.uint8)
    folder = root / "RCV1"
    folder.mkdir(parents=True)
    joblib.dump(sp.csr_matrix(rows), folder / "samples_py3.pkl")
    joblib.dump(np.arange(num_stories, dtype=np.uint32), folder / "sample_id_py3.pkl")
    joblib.dump(sp.csr_matrix(topics), folder / "sample_topics_py3.pkl")
    joblib.dump(np.array(CATEGORIES, dtype=object), folder / "topics_names_py3.pkl")
    return rows, topics


def test_reuters_is_built_from_rcv1(tmp_path: Path) -> None:
    rows, topics = write_rcv1(tmp_path)
    order = [CATEGORIES.index(name) for name in ("CCAT", "GCAT", "MCAT", "ECAT")]
    single = [row for row in range(len(rows)) if topics[row, order].sum() == 1]
    frequent = sorted(sorted(range(40), key=lambda term: (-(rows[single][:, term] > 0).sum(), term))[:12])
    wanted = {}
    for row in single:
        values = rows[row, frequent]
        wanted[tuple((values / np.linalg.norm(values) * np.sqrt(12)).round(4))] = topics[row, order].argmax()

    dataset = Reuters(root=str(tmp_path), num_documents=15, num_terms=12).load()
    assert dataset.train.x.shape == (15, 12)
    assert dataset.train.labels is not None
    found = [
        next(label for values, label in wanted.items() if np.allclose(values, row, atol=1e-3))
        for row in dataset.train.x.numpy()
    ]
    assert found == dataset.train.labels.tolist()
    assert dataset.class_names == ("CCAT", "GCAT", "MCAT", "ECAT")


def test_reuters_draws_by_seed(tmp_path: Path) -> None:
    write_rcv1(tmp_path)
    rows = [
        Reuters(root=str(tmp_path), num_documents=10, num_terms=9, seed=seed).load().train.x
        for seed in (0, 0, 1)
    ]
    assert (rows[0] == rows[1]).all()
    assert not (rows[0] == rows[2]).all()


def test_reuters_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RemoteFileMetadata("vectors.gz", "http://127.0.0.1:9/vectors", "0" * 64)
    monkeypatch.setattr(rcv1_module, "XY_METADATA", (gone,))
    monkeypatch.setattr(rcv1_module._fetch_remote.__globals__["time"], "sleep", lambda _: None)
    with pytest.raises(ValueError, match=r"RCV1 is not below .* set dataset\.path to a reuters10k\.npy"):
        Reuters(root=str(tmp_path)).load()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def customary() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    data = random.random((8, 5)).astype(np.float32)
    data *= np.sqrt(5) / np.linalg.norm(data, axis=1, keepdims=True)
    return {"data": data, "label": random.integers(0, 4, 8)}


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_the_customary_file_is_a_raw_pickle(
    tmp_path: Path, customary: dict[str, np.ndarray], protocol: int
) -> None:
    (tmp_path / "reuters10k.npy").write_bytes(pickle.dumps(customary, protocol=protocol))
    dataset = Reuters(path=str(tmp_path / "reuters10k.npy")).load()
    np.testing.assert_allclose(dataset.train.x.numpy(), customary["data"], atol=1e-6)
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == customary["label"].tolist()


def test_names_of_numpy_1_are_admitted(tmp_path: Path, customary: dict[str, np.ndarray]) -> None:
    content = pickle.dumps(customary, protocol=0).replace(b"cnumpy._core.", b"cnumpy.core.")
    assert b"numpy.core.multiarray" in content
    (tmp_path / "reuters10k.npy").write_bytes(content)
    assert len(Reuters(path=str(tmp_path / "reuters10k.npy")).load().train) == 8


def test_the_same_dict_within_a_numpy_file(tmp_path: Path, customary: dict[str, np.ndarray]) -> None:
    np.save(tmp_path / "reuters10k.npy", customary, allow_pickle=True)
    dataset = Reuters(path=str(tmp_path / "reuters10k.npy")).load()
    np.testing.assert_allclose(dataset.train.x.numpy(), customary["data"], atol=1e-6)


class Malice:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("malice"),))


def test_files_of_anything_else_are_refused_unread(
    tmp_path: Path, customary: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 4):
        Path(f"malice{protocol}.npy").write_bytes(
            pickle.dumps({**customary, "more": Malice()}, protocol=protocol)
        )
    np.save("within.npy", np.array([Malice()], dtype=object), allow_pickle=True)
    np.save("plain.npy", customary["data"])
    Path("text.npy").write_text("words")
    Path("short.npy").write_bytes(pickle.dumps(customary)[:-40])
    Path("keys.npy").write_bytes(pickle.dumps({"rows": customary["data"]}))
    Path("nan.npy").write_bytes(pickle.dumps({**customary, "data": customary["data"] * np.nan}))
    files = sorted(Path().glob("*.npy"))
    assert len(files) == 9
    for path in [*files, Path("gone.npy")]:
        with pytest.raises(ValueError, match=rf"dataset\.path: .*{path.name}"):
            Reuters(path=str(path)).load()
    assert not Path("malice").exists()


def write_texts(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")


def test_text_files_become_tfidf_rows(tmp_path: Path) -> None:
    """Three small files by hand: `(1 + log tf) (1 + log((1 + n) / (1 + df)))`, scaled to sqrt(T)."""
    texts = {"a/1.txt": "ship ship sea", "a/2.txt": "sea wind", "b/1.txt": "goal sea goal goal"}
    write_texts(tmp_path, texts)
    dataset = TextFolder("notes", str(tmp_path)).load()
    terms = ("goal", "sea", "ship", "wind")
    assert dataset.feature_names == terms
    assert dataset.class_names == ("a", "b")
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [0, 0, 1]
    wanted = np.zeros((3, 4))
    for row, text in enumerate(texts.values()):
        for column, term in enumerate(terms):
            if count := text.split().count(term):
                documents = sum(term in other.split() for other in texts.values())
                wanted[row, column] = (1 + np.log(count)) * (1 + np.log(4 / (1 + documents)))
    wanted *= 2 / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(dataset.train.x.numpy(), wanted, atol=1e-6)


def test_a_flat_folder_has_no_labels_and_terms_are_limited(tmp_path: Path) -> None:
    write_texts(tmp_path, {"1.txt": "one two two", "2.txt": "two three", "3.md": "four"})
    dataset = TextFolder("notes", str(tmp_path), num_terms=1).load()
    assert dataset.train.labels is None
    assert dataset.feature_names == ("two",)
    assert TextFolder("notes", str(tmp_path), pattern="*").load().train.x.shape == (3, 4)


def test_unusable_text_files_are_named_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_texts(tmp_path, {"a/1.txt": "one two", "a/2.txt": "", "b/1.txt": "two two"})
    (tmp_path / "b" / "2.txt").write_bytes(b"\xff\xfe\x00wind")
    with caplog.at_level(logging.WARNING):
        dataset = TextFolder("notes", str(tmp_path)).load()
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [0, 1]
    assert str(tmp_path / "a" / "2.txt") in caplog.text
    assert str(tmp_path / "b" / "2.txt") in caplog.text
    assert "Skipped 2 of 4 text files" in caplog.text


def test_bad_folders_and_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.path: there is no folder"):
        TextFolder("notes", str(tmp_path / "gone")).load()
    with pytest.raises(ValueError, match=r"dataset\.path: no file \*\.txt"):
        TextFolder("notes", str(tmp_path)).load()
    with pytest.raises(ValueError, match=r"dataset\.path is not set"):
        TextFolder().load()
    with pytest.raises(ValueError, match=r"dataset\.num_terms"):
        TextFolder("notes", str(tmp_path), num_terms=0)
    with pytest.raises(ValueError, match=r"dataset\.num_documents"):
        Reuters(num_documents=0)


def test_rows_have_the_length_of_the_square_root() -> None:
    data = np.random.default_rng(0).random((4, 9))
    np.testing.assert_allclose(np.linalg.norm(tfidf_rows(sp.csr_matrix(data)).numpy(), axis=1), 3, rtol=1e-6)
    np.testing.assert_allclose(
        tfidf_rows(tfidf_rows(data).numpy()).numpy(), tfidf_rows(data).numpy(), rtol=1e-6
    )
