"""The numbers of others: one YAML file in the package, each value with its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf


@dataclass(frozen=True)
class Reference:
    """One published value: a metric of a method on a data set, and where it was read."""

    dataset: str
    method: str
    metric: str
    mean: float
    source: str
    std: float | None = None
    unverified: bool = False


@dataclass(frozen=True)
class References:
    """All published values, and how data sets and methods are printed.

    Example:
        >>> references = load_references()
        >>> references.method_title("kmeans")
        'K-means, K given'
        >>> [v.mean for v in references.of("usps_n2d") if (v.method, v.metric) == ("DeepDPM, paper", "acc")]
        [0.89]
    """

    sources: Mapping[str, str]
    datasets: Mapping[str, Mapping[str, str | int]]
    methods: Mapping[str, str]
    values: tuple[Reference, ...]

    def of(self, dataset: str) -> list[Reference]:
        """Return the values of one data set, in the order of the file."""
        return [value for value in self.values if value.dataset == dataset]

    def dataset_title(self, dataset: str) -> str:
        """Return the printed name of a data set; a name the file does not know is printed as it is."""
        return str(self.datasets.get(dataset, {}).get("title", dataset))

    def true_k(self, dataset: str) -> int | None:
        """Return the number of classes of a data set, None where the file does not know it."""
        value = self.datasets.get(dataset, {}).get("true_k")
        return None if value is None else int(value)

    def method_title(self, method: str) -> str:
        """Return the printed name of a method."""
        return self.methods.get(method, method)

    def dataset_order(self, dataset: str) -> tuple[int, str]:
        """Return a sorting key: the file's order first, then the alphabet."""
        known = list(self.datasets)
        return (known.index(dataset) if dataset in known else len(known), dataset)

    def method_order(self, method: str) -> tuple[int, str]:
        """Return a sorting key: our methods, unknown names, then the peers, in the file's order."""
        known = list(self.methods)
        first_peer = known.index("kmeans") if "kmeans" in known else len(known)
        if method not in known:
            return (first_peer, method)
        position = known.index(method)
        return (position + (position >= first_peer), method)


def load_references() -> References:
    """Read ``references.yaml`` of the package.

    Raises:
        ValueError: a value names a source that the file does not define.
    """
    text = files("deepdpm.report").joinpath("references.yaml").read_text(encoding="utf-8")
    raw: Any = OmegaConf.to_container(OmegaConf.create(text))
    values = tuple(Reference(**value) for value in raw["values"])
    for value in values:
        if value.source not in raw["sources"]:
            raise ValueError(
                f"references.yaml: {value.dataset} / {value.method} names the unknown source {value.source!r}"
            )
    return References(raw["sources"], raw["datasets"], raw["methods"], values)
