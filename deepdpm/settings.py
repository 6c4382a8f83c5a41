"""The settings of the model and of its training: plain values that check themselves.

Messages name a setting as the configuration does: `model.`, `trainer.optimizer.`, `trainer.schedule.`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from deepdpm.autoencoder import FeaturesSettings
from deepdpm.checks import check_choices, check_least, check_positive

LossName = Literal["kl", "isotropic", "diagonal"]

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class ModelSettings:
    """Say what is clustered, with which nets, losses and starts.

    Attributes:
        features: the autoencoder before the clustering, if any.
        transform: of the codes, see `deepdpm.transforms`.
        init_k: clusters at the start.
        hidden: widths of the cluster net's hidden layers.
        subcluster_hidden: hidden units of each subcluster net.
        temperature: what the cluster net's logits are divided by.
        subcluster_temperature: the same for the subcluster nets.
        cluster_loss: "kl" to the mixture's responsibilities, or the "isotropic" or "diagonal" distance.
        cluster_loss_weight: its factor.
        subcluster_loss: the same for the subclusters.
        subcluster_loss_weight: its factor.
        init_clusters: "kmeans", "kmeans_1d" (on the first principal component), or "soft_assign" (what the
            cluster net says before training).
        init_subclusters: "kmeans_1d", "kmeans" (from there, in all dimensions), or "soft_assign".
        kmeans_backend: "sklearn" or "kmeans_pytorch".
        init_cluster_net_weights: fit the cluster net's output layer to the starting clusters.
        ignore_subclusters: leave the subclusters out; then the published moves offer no splits.

    Raises:
        ValueError: a value out of range, naming the setting.
    """

    features: FeaturesSettings = field(default_factory=FeaturesSettings)
    transform: Literal["principal", "none", "normalize", "min_max", "standard", "standard_normalize"] = (
        "principal"
    )
    init_k: int = 1
    hidden: tuple[int, ...] = (50,)
    subcluster_hidden: int = 50
    temperature: float = 1.0
    subcluster_temperature: float = 1.0
    cluster_loss: LossName = "kl"
    cluster_loss_weight: float = 1.0
    subcluster_loss: LossName = "isotropic"
    subcluster_loss_weight: float = 1.0
    init_clusters: Literal["kmeans", "kmeans_1d", "soft_assign"] = "kmeans"
    init_subclusters: Literal["kmeans_1d", "kmeans", "soft_assign"] = "kmeans_1d"
    kmeans_backend: Literal["sklearn", "kmeans_pytorch"] = "sklearn"
    init_cluster_net_weights: bool = False
    ignore_subclusters: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "model")
        object.__setattr__(self, "hidden", tuple(int(width) for width in self.hidden))
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"model.hidden must list one or more positive widths, not {list(self.hidden)}.")
        check_least(self, "model", {"init_k": 1, "subcluster_hidden": 1})
        check_least(self, "model", {"cluster_loss_weight": 0, "subcluster_loss_weight": 0})
        check_positive(self, "model", ("temperature", "subcluster_temperature"))


@dataclass(frozen=True)
class OptimizerSettings:
    """Say how the nets learn: Adam for each kind, and what becomes of the learning rates.

    Attributes:
        cluster_lr: learning rate of the cluster net.
        subcluster_lr: learning rate of the subcluster nets.
        lr_scheduler: "none"; "step" divides both by ten every `lr_step` epochs; "plateau" halves the cluster
            net's when its loss has not fallen for `lr_patience` epochs.
        lr_step: see above.
        lr_patience: see above.

    Raises:
        ValueError: a value out of range, naming the setting.
    """

    cluster_lr: float = 1e-2
    subcluster_lr: float = 0.02
    lr_scheduler: Literal["none", "step", "plateau"] = "none"
    lr_step: int = 20
    lr_patience: int = 10

    def __post_init__(self) -> None:
        check_choices(self, "trainer.optimizer")
        check_positive(self, "trainer.optimizer", ("cluster_lr", "subcluster_lr"))
        check_least(self, "trainer.optimizer", {"lr_step": 1, "lr_patience": 0})


@dataclass(frozen=True)
class ScheduleSettings:
    """Say what happens at the end of which epoch; epochs count from 0.

    Attributes:
        start_mstep: first epoch that ends with an M-step.
        mstep_every: epochs from one M-step to the next; 0 has only the first.
        statistics: the M-step's responsibilities: "mixture" takes the mixture's own (exact EM), "net" the
            cluster net's (the paper).
        means: "soft_assign" weights points by those responsibilities, "kmeans" counts each for its best.
        start_subclusters: first epoch that trains the subclusters.
        start_moves: first epoch that ends with moves.
        moves_every: epochs from one step of moves to the next.
        start_merges: "published": first epoch that ends with merges; None for `start_moves`.
        split_every: "published": epochs between split steps; None for split and merge steps in turn.
        merge_every: the same for merges.
        freeze_after_init: epochs at the start without M-steps.
        freeze_after_move: epochs after an accepted move without M-steps.
        max_searches: "search": steps of moves at the most, should they not come to rest.
        polish_steps: "search": once moves rest, the nets train for about so many more steps, at least five
            epochs, while the learning rates fall to 0; then training stops.
        polish_loss: "search": polishing ends sooner once EM has converged and the cluster net's "kl" loss is
            below this, in nats for a point.

    Raises:
        ValueError: a value out of range, naming the setting.
    """

    start_mstep: int = 0
    mstep_every: int = 1
    statistics: Literal["mixture", "net"] = "mixture"
    means: Literal["soft_assign", "kmeans"] = "soft_assign"
    start_subclusters: int = 0
    start_moves: int = 0
    moves_every: int = 3
    start_merges: int | None = None
    split_every: int | None = None
    merge_every: int | None = None
    freeze_after_init: int = 0
    freeze_after_move: int = 0
    max_searches: int = 10
    polish_steps: int = 1000
    polish_loss: float = 0.003

    def __post_init__(self) -> None:
        check_choices(self, "trainer.schedule")
        zero = ["start_mstep", "mstep_every", "start_subclusters", "start_moves", "start_merges"]
        zero += ["freeze_after_init", "freeze_after_move", "polish_steps", "polish_loss"]
        one = ("moves_every", "split_every", "merge_every", "max_searches")
        check_least(self, "trainer.schedule", dict.fromkeys(zero, 0) | dict.fromkeys(one, 1))
        if (self.split_every is None) != (self.merge_every is None):
            raise ValueError(
                "trainer.schedule.split_every and merge_every go together: give both, or neither to have "
                "split and merge steps in turn."
            )

    def m_step_due(self, epoch: int, last_move: int | None) -> bool:
        """Whether an epoch ends with an M-step; `last_move` is the last epoch that changed K, or None.

        >>> schedule = ScheduleSettings(start_mstep=2, mstep_every=5)
        >>> [epoch for epoch in range(8) if schedule.m_step_due(epoch, None)]
        [2, 7]
        """
        first = max(self.start_mstep, self.freeze_after_init)
        if epoch < first or (last_move is not None and epoch <= last_move + self.freeze_after_move):
            return False
        return epoch == first if self.mstep_every == 0 else (epoch - first) % self.mstep_every == 0

    def search_due(self, epoch: int) -> bool:
        """Whether an epoch ends with a search, while moves do not rest."""
        return epoch >= self.start_moves and (epoch - self.start_moves) % self.moves_every == 0

    def published_moves(self, epoch: int) -> tuple[bool, bool]:
        """Whether an epoch ends with a split step, with a merge step.

        >>> schedule = ScheduleSettings(start_moves=55, moves_every=30)
        >>> [schedule.published_moves(epoch) for epoch in (55, 60, 85, 115)]
        [(True, False), (False, False), (False, True), (True, False)]
        """
        start_merges = self.start_moves if self.start_merges is None else self.start_merges
        if self.split_every is not None and self.merge_every is not None:
            split = epoch >= self.start_moves and (epoch - self.start_moves) % self.split_every == 0
            return split, epoch >= start_merges and (epoch - start_merges) % self.merge_every == 0
        turn, rest = divmod(epoch - self.start_moves, self.moves_every)
        if turn < 0 or rest != 0:
            return False, False
        return turn % 2 == 0, turn % 2 == 1 and epoch >= start_merges


def from_plain(kind: type[Settings], values: Settings | Mapping[str, Any] | None) -> Settings:
    """Settings from a plain dict of them, settings within settings too.

    Raises:
        ValueError: an unknown setting, or a value out of range.

    >>> from_plain(ModelSettings, {"init_k": 3, "hidden": [10]}).hidden
    (10,)
    """
    if isinstance(values, kind):
        return values
    assert values is None or isinstance(values, Mapping)
    hints, plain = typing.get_type_hints(kind), dict(values or {})
    for name, value in plain.items():
        if name not in hints:
            raise ValueError(f"Unknown setting {name!r} of {kind.__name__}: choose of {', '.join(hints)}.")
        if dataclasses.is_dataclass(hints[name]):
            plain[name] = from_plain(hints[name], value)
    return kind(**plain)


def to_plain(settings: Any) -> dict[str, Any]:
    """Settings as a plain dict of numbers, strings and lists, as checkpoints hold them.

    >>> to_plain(ModelSettings())["hidden"]
    [50]
    """
    plain = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
