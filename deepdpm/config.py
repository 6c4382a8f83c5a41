"""The configuration: schema, search path, checks, and messages that a user can act on.

The schema is made from the settings dataclasses that the package itself uses (`register`), so that a
setting is defined once. `conf/` and `experiments/` lie beside the package in a checkout, in it in a wheel.
"""

import dataclasses
import hashlib
import inspect
import json
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from deepdpm.naming import job_folder, stem
from deepdpm.schema import schema_of

_PACKAGE = Path(__file__).resolve().parent

# Arguments of pl.Trainer that the run itself sets.
_OWN_TRAINER_ARGUMENTS = {
    "logger": "choose it with tracking=wandb",
    "callbacks": "they belong to the run",
    "default_root_dir": "say hydra.run.dir",
    "enable_checkpointing": "checkpoints are always written",
}
# What cannot change a result: labels, where things go, what is shown.
_NOT_HASHED = ("name", "ckpt_path", "tracking")
_NOT_HASHED_OF_TRAINER = ("checkpoint_every_n_epochs", "evaluate_every_n_epochs")
_NOT_HASHED_OF_LIGHTNING = (
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
    "barebones",
)
# All that another method's result depends on: it sees the points as they are, and trains no nets.
_HASHED_OF_PEER = ("dataset", "peer", "seed")


def config_folder() -> Path:
    """Return the folder `conf/` of the checkout or of the installed wheel."""
    return _folder("conf")


def experiments_folder() -> Path:
    """Return the folder `experiments/` of the checkout or of the installed wheel."""
    return _folder("experiments")


def _folder(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


class ExperimentsSearchPath(SearchPathPlugin):
    """Make `experiments/` a root of configs, so that `+embedded=mnist` works from any folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder to Hydra's search path."""
        if experiments_folder().is_dir():
            search_path.append("deepdpm", experiments_folder().as_uri())


Plugins.instance().register(ExperimentsSearchPath)


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
OmegaConf.register_new_resolver("stem", stem, replace=True)


@dataclasses.dataclass
class RootConfig:
    """The keys of the whole configuration; the groups have schemas of their own."""

    dataset: Any = MISSING
    prior: Any = MISSING
    model: Any = MISSING
    trainer: Any = MISSING
    alternation: Any = MISSING
    tracking: Any = MISSING
    peer: Any = None
    seed: int = 0
    ckpt_path: str | None = None
    name: str | None = None


ConfigStore.instance().store(name="schema", node=RootConfig)


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """How the one trainer runs; its optimizer and schedule are the module's settings.

    Attributes:
        batch_size: points in a batch; None for the power of two nearest N / 16, within 128 and 4096.
        evaluate_every_n_epochs: epochs between two evaluations of NMI, ARI and ACC while it trains.
        checkpoint_every_n_epochs: epochs between two writings of `last.ckpt`.
        lightning: arguments of `pl.Trainer`.
    """

    batch_size: int | None = None
    evaluate_every_n_epochs: int = 1
    checkpoint_every_n_epochs: int = 10
    lightning: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "evaluate_every_n_epochs", "checkpoint_every_n_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name} is {value}: give a whole number from 1 on.")
        check_lightning(self.lightning)


def register(group: str, settings: type, **parts: type) -> None:
    """Make a settings class the schema of a config group: its files say `defaults: [schema, _self_]`."""
    ConfigStore.instance().store(group=group, name="schema", node=schema_of(settings, **parts))


def register_all() -> None:
    """Register the schema of every group whose settings the package defines."""
    from deepdpm.alternation import AlternationSettings
    from deepdpm.moves import MoveSettings
    from deepdpm.priors import PriorSettings
    from deepdpm.settings import ModelSettings, OptimizerSettings, ScheduleSettings
    from deepdpm.tracking import WandbSettings

    register("prior", PriorSettings)
    register("alternation", AlternationSettings)
    register("tracking", WandbSettings)
    register("model", ModelSettings, moves=MoveSettings)
    register("trainer", TrainerSettings, optimizer=OptimizerSettings, schedule=ScheduleSettings)


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the configuration of one run, as `deepdpm-train` does from its arguments.

    Raises:
        ValueError: an override is refused; one sentence that names the key and the choices.

    Example:
        >>> compose(["seed=3", "dataset=synthetic"]).dataset.num_points
        10000
    """
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3", job_name="train"):
            return hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(clear_message(error)) from error


def config_hash(cfg: Mapping[str, Any] | DictConfig) -> str:
    """Return a short hash of all settings that can change the result: of the seed, but not of outputs.

    A peer's result depends on the data, the seed and the peer's own settings alone.

    Example:
        >>> base = config_hash(compose(["seed=1"]))
        >>> base == config_hash(compose(["seed=1", "name=x"])), base == config_hash(compose(["seed=2"]))
        (True, False)
    """
    plain = to_plain(cfg)
    if (plain.get("peer") or {}).get("_target_"):
        plain = {key: plain[key] for key in _HASHED_OF_PEER}
    for key in _NOT_HASHED:
        plain.pop(key, None)
    trainer = plain.get("trainer") or {}
    for key in _NOT_HASHED_OF_TRAINER:
        trainer.pop(key, None)
    for key in _NOT_HASHED_OF_LIGHTNING:
        (trainer.get("lightning") or {}).pop(key, None)
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_plain(cfg: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Return a config as plain dicts, lists and numbers, all references resolved."""
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings objects that `DeepDPMModule` takes, by the names of its arguments.

    Raises:
        ValueError: a value is out of range, naming the setting.
    """
    model, trainer = to_plain(cfg.model), to_plain(cfg.trainer)
    nodes = {"moves": model.pop("moves"), "model": model, "prior": to_plain(cfg.prior)}
    nodes |= {"optimizer": trainer["optimizer"], "schedule": trainer["schedule"]}
    return {name: make_settings(node) for name, node in nodes.items()}


def make_settings(plain: Mapping[str, Any]) -> Any:
    """Make the settings that a config's `_target_` names, and the settings within them.

    Raises:
        ValueError: a value is out of range, naming the setting.

    Example:
        >>> make_settings({"_target_": "deepdpm.settings.ModelSettings", "hidden": [10, 5]}).hidden
        (10, 5)
    """
    values = {name: _plain_to_settings(value) for name, value in plain.items() if name != "_target_"}
    return hydra.utils.get_class(plain["_target_"])(**values)


def _plain_to_settings(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return make_settings(value)
    return tuple(value) if isinstance(value, list) else value


# When a setting that differs from its default changes nothing: the condition, the settings, and why.
_WITHOUT_EFFECT: tuple[tuple[Callable[[DictConfig], bool], tuple[str, ...], str], ...] = (
    (
        lambda cfg: cfg.model.moves.kind == "search",
        (
            *(f"model.moves.{name}" for name in ("min_points", "neighbours", "split_prob", "merge_prob")),
            *(f"trainer.schedule.{name}" for name in ("start_merges", "split_every", "merge_every")),
        ),
        "it is for model.moves.kind=published",
    ),
    (
        lambda cfg: cfg.model.moves.kind == "published",
        (
            *(f"model.moves.{name}" for name in ("seeds", "valleys", "caution", "tolerance")),
            *(f"model.moves.{name}" for name in ("halvings", "min_half", "clear_valley")),
            *(f"trainer.schedule.{name}" for name in ("max_searches", "polish_steps", "polish_loss")),
        ),
        "it is for model.moves.kind=search",
    ),
    (
        lambda cfg: cfg.model.ignore_subclusters,
        (
            *(f"model.subcluster_{name}" for name in ("hidden", "temperature", "loss", "loss_weight")),
            "model.init_subclusters",
            "trainer.schedule.start_subclusters",
            "trainer.optimizer.subcluster_lr",
        ),
        "model.ignore_subclusters is true",
    ),
    (lambda cfg: cfg.model.init_k == 1, ("model.init_clusters", "model.kmeans_backend"), "model.init_k is 1"),
    (
        lambda cfg: cfg.prior.scale not in ("isotropic", "data_std"),
        ("prior.sigma_scale",),
        "it is for prior.scale=isotropic and prior.scale=data_std",
    ),
    (
        lambda cfg: cfg.prior.pi_prior == "none",
        ("prior.dirichlet_count",),
        "prior.pi_prior is none",
    ),
    (lambda cfg: cfg.prior.use_prior, ("prior.cov_const",), "prior.use_prior is true"),
    (
        lambda cfg: cfg.trainer.optimizer.lr_scheduler != "step",
        ("trainer.optimizer.lr_step",),
        "it is for trainer.optimizer.lr_scheduler=step",
    ),
    (
        lambda cfg: cfg.trainer.optimizer.lr_scheduler != "plateau",
        ("trainer.optimizer.lr_patience",),
        "it is for trainer.optimizer.lr_scheduler=plateau",
    ),
    (
        lambda cfg: cfg.model.features.kind in ("conv", "strided"),
        ("model.features.hidden_dims",),
        "it is for model.features.kind=dense",
    ),
    (
        lambda cfg: cfg.model.features.kind in ("dense", "conv"),
        ("model.features.filters",),
        "it is for model.features.kind=strided",
    ),
    (
        lambda cfg: not OmegaConf.select(cfg, "alternation._target_"),
        ("prior.sigma_scale_step", "model.features"),
        "it is for alternation=joint",
    ),
)


def check(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Refuse what cannot run, and warn of what has no effect.

    Raises:
        ValueError: an unknown key, a wrong type or option, or a combination that cannot be; names the key.
    """
    check_types(cfg)
    trainer = to_plain(cfg.trainer)
    TrainerSettings(**{field.name: trainer[field.name] for field in dataclasses.fields(TrainerSettings)})
    settings_of(cfg)
    for group in ("tracking", "alternation"):
        if OmegaConf.select(cfg, f"{group}._target_"):
            make_settings(to_plain(cfg[group]))
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed is {cfg.seed}: give a whole number from 0 to 4294967295.")
    if OmegaConf.select(cfg, "peer._target_"):
        for override in overrides:
            key = override.lstrip("+~").split("=")[0]
            if key.split(".")[0].split("/")[0] in ("model", "prior", "trainer", "alternation", "ckpt_path"):
                warn_without_effect(key, f"peer={cfg.peer.name} does not train the nets")
        return
    is_joint = bool(OmegaConf.select(cfg, "alternation._target_"))
    if cfg.model.features.kind != "none" and not is_joint:
        raise ValueError(
            f"model.features.kind={cfg.model.features.kind} learns features: say alternation=joint too."
        )
    if is_joint and cfg.model.features.kind == "none":
        raise ValueError(
            "alternation=joint learns features, but model.features.kind is none: say "
            "model.features.kind=dense, conv or strided, or alternation=none."
        )
    for condition, keys, why in _WITHOUT_EFFECT:
        if condition(cfg):
            for key in keys:
                if OmegaConf.select(cfg, key) != default_of(cfg, key):
                    warn_without_effect(key, why)


def default_of(cfg: DictConfig, key: str) -> Any:
    """Return the default of a setting of a group with a schema.

    Example:
        >>> default_of(compose(["model.init_k=3"]), "model.init_k")
        1
    """
    group, _, name = key.partition(".")
    return OmegaConf.select(OmegaConf.structured(OmegaConf.get_type(cfg, group)), name)


def check_types(cfg: DictConfig) -> None:
    """Refuse an unknown key or a wrong type.

    Hydra itself checks what has a schema, but for keys added with `+`. What has none (`dataset`, `peer`) is
    checked against the dataclass that its `_target_` names.

    Raises:
        ValueError: names the key, and the choices.
    """
    known = [field.name for field in dataclasses.fields(RootConfig)]
    for key in cfg:
        node = cfg._get_node(key)
        if key not in known:
            raise ValueError(f"Unknown setting {key!s}: choose of {_choices(known)}.")
        if not isinstance(node, DictConfig) or node._is_none():
            continue
        if OmegaConf.get_type(node) is not dict:
            _check_added(node)
        elif node.get("_target_"):
            target = _class_at(str(key), str(node["_target_"]))
            if dataclasses.is_dataclass(target) and isinstance(target, type):
                schema = OmegaConf.structured(schema_of(target))
                for name, value in node.items():
                    _check_key(f"{key!s}.{name!s}", schema, str(name), value)


def _check_added(node: DictConfig) -> None:
    kind = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(kind):
        return
    known = [field.name for field in dataclasses.fields(kind)]
    for key in node:
        inner = node._get_node(key)
        if key not in known:
            raise ValueError(f"Unknown setting {node._get_full_key(key)}: choose of {_choices(known)}.")
        if isinstance(inner, DictConfig) and not inner._is_none():
            _check_added(inner)


def _check_key(full_key: str, schema: DictConfig, name: str, value: Any) -> None:
    if name not in list(schema):  # `in` alone overlooks settings without a default
        raise ValueError(f"Unknown setting {full_key}: choose of {_choices(schema)}.")
    try:
        OmegaConf.update(schema, name, value)
    except ValidationError as error:
        raise ValueError(f"{full_key}={value!r} has a wrong type: {_first_line(error)}.") from None


def _class_at(key: str, path: str) -> Any:
    try:
        return hydra.utils.get_object(path)
    except Exception:
        raise ValueError(f"{key}._target_={path} is no class that can be imported: check its name.") from None


def check_lightning(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that `pl.Trainer` does not know, or that the run sets itself.

    Raises:
        ValueError: names the key, and the choices.

    Example:
        >>> check_lightning({"devices": 1})
        >>> check_lightning({"devises": 1})
        Traceback (most recent call last):
        ValueError: Unknown setting trainer.lightning.devises: choose of accelerator, ...
    """
    import pytorch_lightning as pl

    known = [name for name in inspect.signature(pl.Trainer).parameters if name not in _OWN_TRAINER_ARGUMENTS]
    hints = typing.get_type_hints(pl.Trainer.__init__)
    for name, value in arguments.items():
        if name in _OWN_TRAINER_ARGUMENTS:
            raise ValueError(f"trainer.lightning.{name} cannot be set: {_OWN_TRAINER_ARGUMENTS[name]}.")
        if name not in known:
            raise ValueError(f"Unknown setting trainer.lightning.{name}: choose of {', '.join(known)}.")
        if not _fits(value, hints[name]):
            wanted = str(hints[name]).replace("typing.", "")
            raise ValueError(
                f"trainer.lightning.{name}={value!r} has a wrong type: Lightning wants {wanted}."
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value from a configuration fits a type hint; classes of Lightning's own fit nothing."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    kind = origin or hint
    if not isinstance(kind, type) or isinstance(value, bool):
        return kind is bool
    return isinstance(value, int) if kind is float and isinstance(value, int) else isinstance(value, kind)


def warn_without_effect(key: str, why: str) -> None:
    """Warn of a setting that changes nothing in the chosen combination."""
    warnings.warn(f"{key} has no effect: {why}.", stacklevel=2)


def _choices(node: Any) -> str:
    return ", ".join(str(key) for key in node if key not in ("_target_", "hydra"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def clear_message(error: BaseException) -> str:
    """Return one sentence for an error of Hydra or OmegaConf: the key, what is wrong, and the choices."""
    cause = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(cause)
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}: {_first_line(cause)}."
    text = str(error).partition("\nConfig search path")[0]
    if isinstance(error, OverrideParseException):
        return (
            f"The override {error.override!r} cannot be read: write KEY=VALUE, in quotes against the shell."
        )
    missing = re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s+(.*)", text, re.DOTALL)
    if missing:
        group, options = missing[2], [option for option in missing[3].split() if option != "schema"]
        return f"There is no {group}={missing[1].removeprefix(f'{group}/')}: choose of {', '.join(options)}."
    nothing = re.search(r"Could not override '([^']+)'\.\s*\n?(No match in the defaults list)?", text)
    if nothing and nothing[2]:
        return f"Unknown group {nothing[1]}: see `deepdpm-train --help` for the groups and experiments."
    if "Could not find" in text or "Could not load" in text:
        return f"{_first_line(error)}: see `deepdpm-train --help` for the groups and experiments."
    return f"{_first_line(error)}."


def _unknown_key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node
    if not isinstance(parent, DictConfig | ListConfig) or parent._is_none():
        return f"Unknown setting {error.full_key}."
    return f"Unknown setting {error.full_key}: choose of {_choices(parent)}."


register_all()
