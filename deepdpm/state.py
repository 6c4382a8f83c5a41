"""What a clustering is besides its nets: prior, mixture, subclusters and identities, and how they are saved.

Legend: D dimensions, K clusters; subclusters 2k and 2k + 1 belong to cluster k.
"""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from deepdpm.mixture import Mixture
from deepdpm.priors import NIG, NIW, NormalPrior
from deepdpm.stats import SufficientStats

# EM has converged when an epoch changes the mean log density of a point by less than this, in nats.
_SETTLED = 1e-5

Tensors = TypeVar("Tensors")


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """A dataclass of tensors (and of such dataclasses) with all of them on a device."""
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(tensors):  # type: ignore[arg-type]
        value = getattr(tensors, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            moved[field.name] = to_device(value, device)
        elif isinstance(value, Tensor):
            moved[field.name] = value.to(device)
    return replace(tensors, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class ClusterState:
    """Prior, mixture of K clusters, mixture of their 2K subclusters, and stable ids (K,).

    The weights of a cluster's two subclusters sum to one.
    """

    prior: NormalPrior
    mixture: Mixture
    subclusters: Mixture
    ids_K: Tensor
    next_id: int

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.mixture.num_components

    @classmethod
    def start(cls, prior: NormalPrior, stats: SufficientStats, sub_stats: SufficientStats) -> ClusterState:
        """Clusters 0..K-1 from the statistics of K clusters and 2K subclusters."""
        ids_K = torch.arange(stats.num_clusters)
        mixture = Mixture.m_step(prior, stats)
        return cls(prior, mixture, fit_subclusters(prior, sub_stats), ids_K, stats.num_clusters)

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only, as `torch.load(weights_only=True)` allows."""
        return {
            "prior": {
                **{field.name: getattr(self.prior, field.name) for field in dataclasses.fields(self.prior)},
                "fitted": list(self.prior.fitted),
                "kind": type(self.prior).__name__,
            },
            "mixture": _mixture_to_dict(self.mixture),
            "subclusters": _mixture_to_dict(self.subclusters),
            "ids_K": self.ids_K,
            "next_id": self.next_id,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ClusterState:
        """The state that `to_dict` gave."""
        prior = dict(saved["prior"])
        family = {"NIW": NIW, "NIG": NIG}[prior.pop("kind")]
        return cls(
            family(**{**prior, "fitted": tuple(prior["fitted"])}),
            Mixture(**saved["mixture"]),
            Mixture(**saved["subclusters"]),
            saved["ids_K"].cpu(),
            saved["next_id"],
        )


@dataclass
class Progress:
    """How far a run's schedule has come.

    Attributes:
        last_move: last epoch that changed K.
        num_searches: steps of moves so far, under "search".
        at_rest: a search has changed nothing, so that the nets are polished.
        polish_step: steps of polishing so far.
        polish_epoch: epochs of polishing so far.
        finished: polishing has ended.
        log_density: of a point, mean over the last epoch.
        settled: EM has converged since moves came to rest.
    """

    last_move: int | None = None
    num_searches: int = 0
    at_rest: bool = False
    polish_step: int = 0
    polish_epoch: int = 0
    finished: bool = False
    log_density: float = -math.inf
    settled: bool = False

    def see(self, log_density: float) -> None:
        """Take note of an epoch's mean log density.

        >>> progress = Progress(at_rest=True, log_density=1.0)
        >>> progress.see(1.0)
        >>> progress.settled
        True
        """
        self.settled = self.at_rest and abs(log_density - self.log_density) < _SETTLED
        self.log_density = log_density


def _mixture_to_dict(mixture: Mixture) -> dict[str, Tensor]:
    return {field.name: getattr(mixture, field.name) for field in dataclasses.fields(mixture)}


def fit_subclusters(prior: NormalPrior, sub_stats: SufficientStats) -> Mixture:
    """The M-step of 2K subclusters: as for clusters, with weights that sum to one within each cluster."""
    means, covariances = prior.map_estimate(sub_stats)
    count_K2 = sub_stats.count_K.view(-1, 2)
    share_K2 = count_K2 / count_K2.sum(1, keepdim=True).clamp_min(1e-300) + prior.dirichlet_count
    total_K1 = share_K2.sum(1, keepdim=True)
    share_K2 = torch.where(total_K1 > 0, share_K2 / total_K1.clamp_min(1e-300), 0.5)
    return Mixture(share_K2.flatten(), means, covariances)


def save_random_states() -> dict[str, Any]:
    """The states of the generators that Python, NumPy and torch share, as plain values and tensors."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))  # noqa: NPY002
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(name),
            torch.as_tensor(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def load_random_states(states: dict[str, Any]) -> None:
    """Set the shared generators as `save_random_states` found them."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def generator_at(*place: int) -> torch.Generator:
    """A generator that is a pure function of its place: of a seed, and of an epoch, a batch or the like."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
