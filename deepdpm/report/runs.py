"""Find the runs below some folders; each one's ``result.json`` is all that a table needs."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = ("num_clusters", "nmi", "ari", "acc", "silhouette", "log_likelihood", "seconds", "peak_memory_mb")
"""What a table may show of a run; the keys of ``result.json``."""

# Overrides that don't change what is compared: they say where and how a run was made, not which method it is.
_NOT_A_VARIANT = ("seed", "name", "dataset", "peer", "tracking", "trainer", "ckpt_path", "hydra")
_NOT_A_SETTING = (
    "dataset.imbalanced",  # the data set's name says it
    "trainer.checkpoint_every_n_epochs",
    "trainer.evaluate_every_n_epochs",
    "trainer.lightning.enable_progress_bar",
    "trainer.lightning.log_every_n_steps",
)
_SHORT_NAMES = {
    "prior.nu": "prior_nu",
    "alternation.lambda_": "lambda",
    "model.init_k": "init_k",
    "prior.alpha": "alpha",
    "prior.sigma_scale": "prior_scale",
    "dataset.num_points": "N",
    "dataset.num_dims": "D",
    "dataset.num_clusters": "classes",
}
_OF_NETS = ("model.", "prior.", "trainer.", "alternation.", "alternation=")
_OF_DATA = ("N", "D", "classes")


@dataclass(frozen=True)
class Run:
    """One run's folder, read: what it was, how it ended, what it reached."""

    folder: Path
    dataset: str
    method: str
    variant: tuple[tuple[str, str], ...] = ()
    experiment: str | None = None
    seed: int = 0
    status: str = "finished"
    error: str | None = None
    data_missing: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_points: int | None = None
    peer: bool = False

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; only such runs enter a mean."""
        return self.status == "finished"

    @property
    def data(self) -> tuple[tuple[str, str], ...]:
        """The settings of the variant that change the data: only runs on the same data can be compared."""
        return tuple(item for item in self.variant if item[0] in _OF_DATA or item[0].startswith("dataset."))

    @property
    def settings(self) -> dict[str, float]:
        """The numeric settings of the variant, by their short names."""
        numbers = {key: _as_number(value) for key, value in self.variant}
        return {key: value for key, value in numbers.items() if value is not None}


def short_name(key: str) -> str:
    """Return the name a setting bears in tables and figures.

    Example:
        >>> short_name("prior.nu"), short_name("alternation.lambda_"), short_name("model.hidden")
        ('prior_nu', 'lambda', 'model.hidden')
    """
    return _SHORT_NAMES.get(key, key)


def variant_of(overrides: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return the overrides that make a method another method, sorted, under their short names.

    The seed, the data set, the name, where outputs go and which experiment was chosen are left out, and what
    concerns the nets for a peer, which has none.

    Example:
        >>> variant_of(["+embedded=mnist", "seed=3", "prior.nu=20", "hydra.run.dir=somewhere"])
        (('prior_nu', '20'),)
        >>> variant_of(["dataset=synthetic", "dataset.num_points=1000", "trainer.lightning.max_epochs=3"])
        (('N', '1000'), ('trainer.lightning.max_epochs', '3'))
        >>> variant_of(["peer=kmeans", "peer.num_clusters=3", "prior.nu=20"])
        (('peer.num_clusters', '3'),)
    """
    settings: dict[str, str] = {}
    overrides = list(overrides)
    without_nets = is_peer(overrides)
    for override in overrides:
        if without_nets and override.lstrip("+~").startswith(_OF_NETS):
            continue
        key, _, value = override.partition("=")
        bare = key.lstrip("+~")
        if "." not in bare and "/" not in bare and (key.startswith("+") or bare in _NOT_A_VARIANT):
            continue
        if bare in _NOT_A_SETTING or bare.split(".")[0] in ("hydra", "tracking") or bare.startswith("hydra/"):
            continue
        settings[short_name(bare)] = value
    return tuple(sorted(settings.items()))


def is_peer(overrides: Iterable[str]) -> bool:
    """Return whether the overrides choose another method than ours.

    Example:
        >>> is_peer(["+embedded=mnist", "peer=kmeans"]), is_peer(["peer=none"]), is_peer([])
        (True, False, False)
    """
    chosen = [value for key, _, value in (o.lstrip("+").partition("=") for o in overrides) if key == "peer"]
    return bool(chosen) and chosen[-1] not in ("none", "null", "")


def experiment_of(overrides: Iterable[str]) -> str | None:
    """Return the folder of the first named experiment among the overrides, None where there is none.

    Example:
        >>> experiment_of(["+embedded=mnist", "+published=codes", "seed=0"])
        'embedded'
    """
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("+") and value and not set(key) & set("./@"):
            return key[1:]
    return None


def find_runs(folders: Iterable[Path | str]) -> list[Run]:
    """Read every run below the folders, sorted by folder; a damaged ``result.json`` gives a failed run.

    A folder that holds ``.hydra`` but no ``result.json`` was started and has no result yet: it is listed
    with the status "unfinished".

    Raises:
        ValueError: a folder does not exist.
    """
    found: dict[Path, Run] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder}: give folders of runs, such as multirun_outputs.")
        for path in folder.rglob("result.json"):
            found.setdefault(path.parent.resolve(), read_run(path))
        for path in folder.rglob(".hydra"):
            if (
                path.is_dir()
                and not (path.parent / "result.json").exists()
                and any(path.glob("overrides.yaml"))
            ):
                found.setdefault(
                    path.parent.resolve(), Run(path.parent, "unknown", "unknown", status="unfinished")
                )
    return [found[key] for key in sorted(found)]


def read_run(path: Path) -> Run:
    """Read one ``result.json``."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        message = f"result.json cannot be read: {error}"
        return Run(path.parent, "unknown", "unknown", status="failed", error=message)
    metrics = {key: value for key in METRICS if (value := _as_number(raw.get(key))) is not None}
    num_points = _as_number(raw.get("num_points"))
    return Run(
        folder=path.parent,
        dataset=str(raw.get("dataset") or "unknown"),
        method=str(raw.get("name") or "deepdpm"),
        variant=variant_of(raw.get("overrides") or ()),
        experiment=experiment_of(raw.get("overrides") or ()),
        seed=int(_as_number(raw.get("seed")) or 0),
        status=str(raw.get("status", "failed")),
        error=None if raw.get("error") is None else " ".join(str(raw["error"]).split()),
        data_missing=bool(raw.get("data_missing", False)),
        metrics=metrics,
        num_points=None if num_points is None else int(num_points),
        peer=is_peer(raw.get("overrides") or ()),
    )


def read_trace(run: Run) -> tuple[list[int], list[int]]:
    """Return the epochs and the number of clusters of ``trace.csv``; two empty lists where there is none."""
    path = run.folder / "trace.csv"
    epochs: list[int] = []
    clusters: list[int] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                epoch, count = _as_number(line.get("epoch")), _as_number(line.get("num_clusters"))
                if epoch is not None and count is not None:
                    epochs.append(int(epoch))
                    clusters.append(int(count))
    return epochs, clusters


def _as_number(value: Any) -> float | None:
    """Return a finite number, or None for everything else."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
