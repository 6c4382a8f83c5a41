"""What the page of one run is made from: points, assignments, history and model.

Legend: N points, D dimensions, E dimensions of a code, K clusters, C classes.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepdpm.data import Dataset
from deepdpm.module import DeepDPMModule
from deepdpm.results import read_json
from deepdpm.state import to_device

_CHUNK = 16_384


@dataclass(frozen=True)
class Clustering:
    """One clustering of one data set.

    Attributes:
        title: of the page.
        dataset: its training points are those that the page shows.
        labels_N: the clusters of the points, in 0..K-1.
        confidence_N: the net's probability of them.
        module: the trained module.
        history: a row for each epoch: epoch, num_clusters, moves (as text), cluster_loss.
        numbers: NMI and the like, by name; None where there is none.
        settings: what the run was asked for, as text.
        max_epochs: the limit of the run, None where it is not known.
    """

    title: str
    dataset: Dataset
    labels_N: np.ndarray
    confidence_N: np.ndarray
    module: DeepDPMModule
    history: Sequence[Mapping[str, Any]]
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    settings: str = ""
    max_epochs: int | None = None

    @property
    def x_ND(self) -> Tensor:
        """The points, a row for each."""
        return self.dataset.train.x.flatten(1).cpu()

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.ids_K)

    @cached_property
    def ids_K(self) -> np.ndarray:
        """Stable identities (K,)."""
        return self.module.cluster_ids_K.cpu().numpy()

    @cached_property
    def sizes_K(self) -> np.ndarray:
        """Points of each cluster (K,)."""
        return np.bincount(self.labels_N[self.labels_N >= 0], minlength=self.num_components)

    @property
    def num_clusters(self) -> int:
        """Clusters with at least one point."""
        return int((self.sizes_K > 0).sum())

    @cached_property
    def truth_N(self) -> np.ndarray | None:
        """True labels (N,) with -1 for none, or None."""
        labels = self.dataset.train.labels
        return None if labels is None else labels.cpu().numpy()

    @cached_property
    def codes_NE(self) -> Tensor:
        """The codes of the points (N, E)."""
        with torch.no_grad():
            device = self.module.device
            parts = [self.module.codes(x_BD.to(device)).cpu() for x_BD in self.x_ND.split(_CHUNK)]
        return torch.cat(parts)

    @cached_property
    def log_joint_NK(self) -> Tensor:
        """What the mixture says of each point and cluster (N, K)."""
        mixture = to_device(self.module.clusters.mixture, torch.device("cpu"))
        return mixture.log_joint_NK(self.codes_NE)

    @cached_property
    def contingency_CK(self) -> np.ndarray | None:
        """Points of each class in each cluster (C, K), None without labels."""
        if self.truth_N is None:
            return None
        known_N = (self.truth_N >= 0) & (self.labels_N >= 0)
        table_CK = np.zeros((int(self.truth_N.max()) + 1, self.num_components), dtype=np.int64)
        np.add.at(table_CK, (self.truth_N[known_N], self.labels_N[known_N]), 1)
        return table_CK

    def class_name(self, number: int) -> str:
        """The name of a class, or its number."""
        names = self.dataset.class_names
        return str(number) if names is None else names[number]

    def feature_name(self, column: int) -> str:
        """The name of a column, or its number."""
        names = self.dataset.feature_names
        return f"x{column}" if names is None else names[column]


def read_run(folder: Path) -> Clustering:
    """Read the folder of a finished run, and its data set again.

    Raises:
        ValueError: the run has not finished, has no model (another method's), or its data cannot be read.
    """
    import hydra
    from omegaconf import OmegaConf

    from deepdpm.predict import load_model

    result = read_json(folder / "result.json")
    if result is None or result.get("status") != "finished":
        reason = (result or {}).get("error") or "no result.json"
        raise ValueError(f"{folder} holds no finished run ({reason}): finish it first.")
    if not (folder / "model.ckpt").is_file():
        raise ValueError(f"{folder} has no model.ckpt: pages of one run are for runs of DeepDPM itself.")
    cfg = OmegaConf.load(folder / "config.yaml")
    dataset = hydra.utils.instantiate(cfg.dataset, _convert_="all").load()
    with np.load(folder / "assignments.npz") as arrays:
        labels_N, confidence_N = arrays["labels"], arrays["confidence"]
    if len(labels_N) != len(dataset.train):
        raise ValueError(
            f"{folder} assigned {len(labels_N)} points, but its data set now has {len(dataset.train)}: "
            "bring the data back as they were."
        )
    metrics = ("nmi", "ari", "acc", "silhouette", "log_likelihood", "seconds")
    return Clustering(
        title=f"{result['dataset']}, seed {result['seed']}",
        dataset=dataset,
        labels_N=labels_N,
        confidence_N=confidence_N,
        module=load_model(folder / "model.ckpt"),
        history=read_history(folder / "trace.csv"),
        numbers={name: result.get(name) for name in metrics},
        settings=OmegaConf.to_yaml(cfg),
        max_epochs=OmegaConf.select(cfg, "trainer.lightning.max_epochs"),
    )


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of `trace.csv`, empty where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {
                "epoch": int(row["epoch"]),
                "num_clusters": int(row["num_clusters"]),
                "moves": row["moves"],
                "cluster_loss": float(row["cluster_loss"]) if row["cluster_loss"] else None,
            }
            for row in csv.DictReader(file)
        ]


@dataclass(frozen=True)
class Event:
    """A move as the history tells it: the epoch, the kind, and the ids before and after."""

    epoch: int
    kind: str
    parents: tuple[int, ...]
    children: tuple[int, ...]


def events(history: Sequence[Mapping[str, Any]]) -> list[Event]:
    """All moves of a history.

    Example:
        >>> events([{"epoch": 4, "moves": "split 0 -> 0, 3; merge 2 + 1 -> 2; remove 5"}])[1]
        Event(epoch=4, kind='merge', parents=(2, 1), children=(2,))
    """
    found = []
    for row in history:
        for text in filter(None, str(row["moves"] or "").split("; ")):
            kind, _, rest = text.partition(" ")
            parents, _, children = rest.partition(" -> ")
            before = tuple(int(part) for part in parents.split(" + "))
            after = tuple(int(part) for part in children.split(", ")) if children else ()
            found.append(Event(int(row["epoch"]), kind, before, after))
    return found
