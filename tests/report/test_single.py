"""The page of one run: its numbers against the run's own, its sentences, and that it needs no other file."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits, make_blobs

from deepdpm import DeepDPM
from deepdpm.data import Dataset, Samples
from deepdpm.report.cli import main
from deepdpm.report.clustering import Clustering, events, read_run
from deepdpm.report.diagnosis import diagnose
from deepdpm.report.single import page, to_plane

CENTRES = [[0, 0], [9, 0], [0, 9]]


class Checked(HTMLParser):
    """Counts what a page is made of, and fails on tags that do not match."""

    VOID = frozenset({"meta", "img", "br", "input", "link", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def clustering(points: np.ndarray, truth: np.ndarray | None = None, **parameters: Any) -> Clustering:
    model = DeepDPM(**{"max_epochs": 8, **parameters}).fit(points)
    x_ND = torch.from_numpy(np.asarray(points, dtype=np.float32))
    labels = None if truth is None else torch.from_numpy(truth).long()
    confidence = model.predict_proba(points).max(1)
    dataset = Dataset("test", Samples(x_ND, labels))
    history = model.history_
    return Clustering("test", dataset, model.labels_, confidence, model.module_, history, max_epochs=8)


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    return make_blobs(450, centers=CENTRES, random_state=0)


@pytest.fixture(scope="module")
def found(blobs: tuple[np.ndarray, np.ndarray]) -> Clustering:
    return clustering(*blobs)


def test_the_page_is_whole_and_needs_no_other_file(found: Clustering) -> None:
    text = page(found)
    checked = Checked(text)
    assert checked.counts["svg"] == 5, "three maps, K over time, the tree"
    assert "script" not in checked.counts
    outside = re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"|url\((?!#)[^)]*\)|@import", text)
    assert outside == []
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_numbers_are_those_of_the_clustering(
    found: Clustering, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    table = found.contingency_CK
    assert table is not None
    for label in range(3):
        for k in range(3):
            assert table[label, k] == ((blobs[1] == label) & (found.labels_N == k)).sum()
    np.testing.assert_array_equal(found.sizes_K, np.bincount(found.labels_N))
    text = page(found)
    for size in found.sizes_K:
        assert f"<td>{size}</td>" in text


@pytest.mark.parametrize(
    ("tail_dof", "said"),
    [
        (3.0, ("as set", "Student's t, 3 degrees")),
        (np.inf, ("as set", "Gaussian")),
        (None, ("chosen by the data", "(Gaussian|Student's t)")),
    ],
)
def test_the_tails_are_named(
    tail_dof: float | None, said: tuple[str, str], blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    text = html.unescape(page(clustering(blobs[0], settings={"prior.tail_dof": tail_dof})))
    chosen, tails = said
    assert re.search(rf"Tails\s*</t[hd]>\s*<td[^>]*>\s*{chosen}\s*</td>\s*<td[^>]*>\s*{tails}", text)


def test_moves_are_read_back_as_they_were_written(found: Clustering) -> None:
    first = events(found.history)[0]
    assert (first.epoch, first.kind, first.parents, first.children) == (0, "split", (0,), (0, 1, 2))


def test_a_good_clustering_gives_no_alarm(found: Clustering) -> None:
    sentences = diagnose(found)
    assert sentences[0].startswith("3 clusters of 450 points. The only move came at the end of epoch 0")
    assert all("Training ended" in sentence for sentence in sentences[1:])


def test_one_cluster_is_explained() -> None:
    points = np.random.default_rng(0).normal(size=(400, 2))
    assert any("K stayed at 1 because no split paid off" in one for one in diagnose(clustering(points)))
    few = diagnose(clustering(points[:40]))
    assert any("40 points of 2 dimensions hardly show" in one for one in few)
    published = diagnose(clustering(points, moves="published"))
    assert any("model.moves.kind=search" in one for one in published)


def test_scales_apart_and_split_classes_are_named(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    apart = diagnose(clustering(blobs[0] * [1000, 1]))
    assert any("The spread of x0 is" in one and "model.transform=standard" in one for one in apart)
    merged = diagnose(clustering(blobs[0], np.minimum(blobs[1], 1)))
    assert any(one.startswith("Class 1 is spread over the clusters") for one in merged)
    finer = np.where(np.arange(450) % 3 == 0, 3, blobs[1])
    assert any(
        one.startswith("Class 3 has no cluster of its own") for one in diagnose(clustering(blobs[0], finer))
    )


def test_a_net_that_has_not_learned_is_reported(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    found = clustering(*blobs)
    shuffled = Clustering(
        "test",
        found.dataset,
        (found.labels_N + 1) % 3,
        found.confidence_N * 0 + 0.4,
        found.module,
        found.history,
    )
    sentences = diagnose(shuffled)
    assert any("The net puts 100% of the points elsewhere" in one for one in sentences)
    assert any("100% of the points have no clear cluster" in one for one in sentences)


def test_the_plane_holds_the_widest_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(500, 5, generator=generator) * torch.tensor([1.0, 9.0, 0.1, 4.0, 0.1])
    xy, how = to_plane(x_ND, x_ND, "pca")
    np.testing.assert_allclose(np.abs(np.corrcoef(xy[:, 0], x_ND[:, 1])[0, 1]), 1, atol=1e-2)
    assert "99%" in how
    with pytest.raises(ValueError, match="choose pca or umap"):
        to_plane(x_ND, x_ND, "tsne")


def test_a_run_of_the_command_line_gets_its_page(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train("dataset=synthetic", "dataset.num_points=600", "trainer=debug", "hydra.run.dir=run").status == 0
    )
    main(["run"])
    assert "run/report.html" in capsys.readouterr().out.replace("\n", "")
    text = (tmp_path / "run" / "report.html").read_text()
    Checked(text)
    found = read_run(tmp_path / "run")
    assert found.numbers["nmi"] is not None
    assert f"<dd>{found.numbers['nmi']:.3f}</dd>" in text
    (tmp_path / "run" / "model.ckpt").unlink()
    with pytest.raises(SystemExit):
        main(["run"])
    assert "has no model.ckpt" in capsys.readouterr().err


def test_the_estimator_explains_tables_and_pictures(tmp_path: Path) -> None:
    digits = load_digits()
    points, labels = digits.data[:300], digits.target[:300]
    model = DeepDPM(max_epochs=2).fit(points)
    text = model.explain(X=points, y=labels, image_shape=(1, 8, 8))
    assert text.count("data:image/png;base64") >= 2 * model.n_clusters_
    table = pd.DataFrame(points[:, 2:6], columns=["one", "two", "three", "four"])
    model = DeepDPM(max_epochs=2).fit(table)
    assert model.explain(tmp_path / "a.html") == tmp_path / "a.html"
    assert '<th scope="col">three</th>' in (tmp_path / "a.html").read_text()
