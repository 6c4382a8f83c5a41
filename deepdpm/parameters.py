"""The estimator's flat parameters, and the settings of the module that they are part of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepdpm.moves import MoveSettings
from deepdpm.priors import PriorSettings
from deepdpm.settings import ModelSettings, OptimizerSettings, ScheduleSettings, from_plain

# The settings by the arguments of the module that take them.
KINDS = {
    "model": ModelSettings,
    "prior": PriorSettings,
    "moves": MoveSettings,
    "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings,
}
# Where the flat parameters belong: the settings that they are part of, and their name there.
PLACES = {
    "init_k": ("model", "init_k"),
    "transform_kind": ("model", "transform"),
    "hidden": ("model", "hidden"),
    "cluster_loss": ("model", "cluster_loss"),
    "prior": ("prior", "kind"),
    "alpha": ("prior", "alpha"),
    "nu": ("prior", "nu"),
    "kappa": ("prior", "kappa"),
    "scale": ("prior", "scale"),
    "sigma_scale": ("prior", "sigma_scale"),
    "moves": ("moves", "kind"),
    "sample_size": ("moves", "sample_size"),
    "cluster_lr": ("optimizer", "cluster_lr"),
    "subcluster_lr": ("optimizer", "subcluster_lr"),
    "start_moves": ("schedule", "start_moves"),
    "moves_every": ("schedule", "moves_every"),
    "polish_steps": ("schedule", "polish_steps"),
}
# The prefixes of the keys in `settings`, longest first, and the same groups.
PREFIXES = {
    "model.moves.": "moves",
    "model.": "model",
    "prior.": "prior",
    "trainer.optimizer.": "optimizer",
    "trainer.schedule.": "schedule",
}


def groups_of(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters as plain settings, by the arguments of the module that take them.

    Raises:
        ValueError: a value out of range, or a key in `settings` that is unknown or a parameter of its own.

    >>> from deepdpm import DeepDPM
    >>> parameters = DeepDPM(alpha=2.0, settings={"model.moves.seeds": 64}).get_params()
    >>> groups = groups_of(parameters)
    >>> groups["prior"]["alpha"], groups["moves"]["seeds"]
    (2.0, 64)
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in KINDS}
    for name, (group, key) in PLACES.items():
        groups[group][key] = parameters[name]
    for full_key, value in (parameters["settings"] or {}).items():
        prefix = next((prefix for prefix in PREFIXES if full_key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                f"settings has the unknown key {full_key!r}: give one as {list(PREFIXES)} begin."
            )
        group, key = PREFIXES[prefix], full_key.removeprefix(prefix)
        if key in groups[group]:
            raise ValueError(f"settings has {full_key}, which is a parameter of its own: say it there.")
        groups[group][key] = value
    for group, kind in KINDS.items():
        from_plain(kind, groups[group])
    return groups


def parameters_of(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: parameters of an estimator that has the hyperparameters of a module."""
    groups = {group: dict(hyper_parameters[group]) for group in KINDS}
    parameters = {name: groups[group].pop(key) for name, (group, key) in PLACES.items()}
    further = {
        prefix + key: value for prefix, group in PREFIXES.items() for key, value in groups[group].items()
    }
    return parameters | {"settings": further, "random_state": hyper_parameters["seed"]}
