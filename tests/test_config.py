"""Configuration: every choice composes, the schema is the settings' own, and mistakes are named."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from deepdpm import config, naming
from deepdpm.moves import MoveSettings
from deepdpm.priors import PriorSettings
from deepdpm.schema import schema_of
from deepdpm.settings import ModelSettings, OptimizerSettings, ScheduleSettings
from deepdpm.tracking import WandbSettings

CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in config.config_folder().glob("*/*.yaml")
    if path.parent.name not in ("hydra", "launcher")
)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes(group: str, choice: str) -> None:
    assert group in config.compose([f"{group}={choice}"])


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("model", ModelSettings),
        ("model.moves", MoveSettings),
        ("prior", PriorSettings),
        ("trainer.optimizer", OptimizerSettings),
        ("trainer.schedule", ScheduleSettings),
    ],
)
def test_the_defaults_of_the_command_line_are_those_of_the_settings(key: str, settings: type) -> None:
    assert config.settings_of(config.compose())[key.split(".")[-1]] == settings()


def test_the_choices_of_tracking_and_trainer_are_settings_too() -> None:
    cfg = config.compose(["tracking=wandb"])
    assert config.make_settings(config.to_plain(cfg.tracking)) == WandbSettings()
    assert {field.name for field in dataclasses.fields(config.TrainerSettings)} < set(cfg.trainer)


def test_the_published_trainer_is_the_authors_schedule() -> None:
    schedule = config.settings_of(config.compose(["trainer=published"]))["schedule"]
    assert (schedule.start_mstep, schedule.start_subclusters, schedule.start_moves) == (25, 45, 55)
    assert (schedule.moves_every, schedule.freeze_after_init, schedule.freeze_after_move) == (30, 5, 5)


def test_the_schema_keeps_types_and_defaults() -> None:
    @dataclass(frozen=True)
    class Inner:
        rate: float = 0.5

    @dataclass(frozen=True)
    class Outer:
        count: int
        kind: Literal["a", "b"] = "a"
        maybe: float | None = None
        widths: tuple[int, ...] = (50,)
        free: dict[str, Any] = field(default_factory=dict)
        inner: Inner = field(default_factory=Inner)

    node = OmegaConf.structured(schema_of(Outer, extra=Inner))
    assert OmegaConf.is_missing(node, "count")
    assert (node.kind, node.maybe, node.widths, node.inner.rate, node.extra.rate) == (
        "a",
        None,
        [50],
        0.5,
        0.5,
    )
    for key, value in (("count", "x"), ("maybe", "x"), ("widths", ["x"]), ("inner", {"rate": "x"})):
        with pytest.raises(Exception, match="could not be converted"):
            OmegaConf.update(node, key, value)
    assert OmegaConf.structured(schema_of(Outer)).widths is not node.widths


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.foo=3"], ["model.foo", "init_k"]),
        (["+model.foo=3"], ["model.foo", "init_k"]),
        (["model.moves.foo=3"], ["model.moves.foo", "sample_size"]),
        (["+trainer.lightning.devises=3"], ["trainer.lightning.devises", "devices"]),
        (["trainer.lightning.max_epochs=abc"], ["trainer.lightning.max_epochs", "abc"]),
        (["trainer.lightning.deterministic=3"], ["trainer.lightning.deterministic", "3"]),
        (["+trainer.lightning.callbacks=3"], ["trainer.lightning.callbacks"]),
        (["foo=3"], ["foo", "seed"]),
        (["+foo=3"], ["foo"]),
        (["dataset.foo=3"], ["dataset.foo", "name"]),
        (["+dataset.foo=3"], ["dataset.foo", "name"]),
        (["dataset=foo"], ["dataset=foo", "digits", "usps_n2d"]),
        (["foo/bar=baz"], ["foo/bar"]),
        (["+embedded=foo"], ["embedded=foo"]),
        (["prior=foo"], ["prior=foo", "niw", "nig"]),
        (["model.init_k=abc"], ["model.init_k", "abc"]),
        (["model.init_k=null"], ["model.init_k"]),
        (["seed=abc"], ["seed", "abc"]),
        (["seed=-1"], ["seed", "-1"]),
        (["dataset=synthetic", "dataset.num_points=abc"], ["dataset.num_points", "abc"]),
        (["model.init_k=0"], ["model.init_k", "0"]),
        (["model.cluster_loss=foo"], ["model.cluster_loss", "kl", "foo"]),
        (["prior.alpha=-1"], ["prior.alpha"]),
        (["model.moves.kind=foo"], ["model.moves.kind", "search", "published"]),
        (["trainer.batch_size=0"], ["trainer.batch_size"]),
        (["trainer.evaluate_every_n_epochs=0"], ["trainer.evaluate_every_n_epochs"]),
        (["trainer.checkpoint_every_n_epochs=0"], ["trainer.checkpoint_every_n_epochs"]),
        (["tracking=wandb", "tracking.mode=foo"], ["tracking.mode", "offline"]),
        (["tracking=wandb", "tracking.picture_every_n_epochs=0"], ["tracking.picture_every_n_epochs"]),
        (["tracking.mode=offline"], ["tracking.mode"]),
        (["model.features.kind=dense"], ["model.features.kind", "alternation=joint"]),
        (["dataset._target_=no.such.Thing"], ["dataset._target_"]),
        (["seed=["], ["seed=["]),
        (["seed"], ["seed"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        config.check(config.compose(overrides), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.moves.neighbours=3"], "model.moves.neighbours"),
        (
            ["trainer.schedule.split_every=5", "trainer.schedule.merge_every=5"],
            "trainer.schedule.split_every",
        ),
        (["model.moves.kind=published", "trainer.schedule.max_searches=3"], "trainer.schedule.max_searches"),
        (["model.ignore_subclusters=true", "model.subcluster_hidden=9"], "model.subcluster_hidden"),
        (["model.kmeans_backend=kmeans_pytorch"], "model.kmeans_backend"),
        (["prior.sigma_scale=0.1"], "prior.sigma_scale"),
        (["prior.pi_prior=none", "prior.dirichlet_count=1"], "prior.dirichlet_count"),
        (["prior.cov_const=1"], "prior.cov_const"),
        (["trainer.optimizer.lr_step=3"], "trainer.optimizer.lr_step"),
        (["trainer.optimizer.lr_patience=3"], "trainer.optimizer.lr_patience"),
        (["prior.sigma_scale_step=3"], "prior.sigma_scale_step"),
        (["model.features.latent_dim=3"], "model.features"),
        (
            ["alternation=joint", "model.features.kind=dense", "model.features.filters=[8]"],
            "model.features.filters",
        ),
        (
            ["alternation=joint", "model.features.kind=conv", "model.features.hidden_dims=[8]"],
            "model.features.hidden_dims",
        ),
        (["peer=kmeans", "model.init_k=3"], "model.init_k"),
        (["peer=kmeans", "prior=nig"], "prior"),
    ],
)
def test_a_setting_without_effect_is_warned_of(overrides: list[str], key: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config.check(config.compose(overrides), overrides)
    assert any(str(warning.message).startswith(f"{key} has no effect: ") for warning in caught)
    assert len(caught) <= 2


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.init_k=3", "model.kmeans_backend=kmeans_pytorch"],
        ["prior.scale=isotropic", "prior.sigma_scale=0.1"],
        ["trainer.optimizer.lr_scheduler=step", "trainer.optimizer.lr_step=3"],
        ["peer=kmeans", "seed=3", "dataset=synthetic"],
    ],
)
def test_settings_that_have_an_effect_pass_in_silence(overrides: list[str]) -> None:
    config.check(config.compose(overrides), overrides)


def test_the_hash_tells_settings_from_labels_and_outputs() -> None:
    def hashed(*overrides: str) -> str:
        return config.config_hash(config.compose(overrides))

    base = hashed()
    assert base == hashed("name=x", "ckpt_path=y", "tracking=wandb", "trainer.checkpoint_every_n_epochs=1")
    assert base == hashed("trainer.lightning.enable_progress_bar=false")
    changed = ("seed=1", "dataset=synthetic", "prior.alpha=1", "model.init_k=2", "trainer.batch_size=8")
    assert len({base, *map(hashed, changed), hashed("trainer.lightning.max_epochs=3")}) == len(changed) + 2


PEERS = [path.stem for path in config.config_folder().glob("peer/*.yaml") if path.stem != "none"]
OF_THE_NETS = {
    "prior": [
        "prior=nig",
        "prior.nu=30",
        "prior.alpha=2",
        "prior.scale=isotropic",
        "prior.use_prior=false",
        "prior.tail_dof=inf",
    ],
    "model": ["model.init_k=5", "model.hidden=[7]", "model.transform=none", "model.moves.kind=published"],
    "trainer": [
        "trainer=published",
        "trainer.batch_size=64",
        "trainer.optimizer.cluster_lr=1",
        "trainer.schedule.polish_steps=1",
        "trainer.lightning.max_epochs=3",
        "trainer.lightning.precision=64-true",
    ],
    "outputs": ["tracking=wandb", "ckpt_path=x", "name=x", "+published=codes", "alternation=joint"],
}
OF_EACH_PEER = {
    "kmeans": ["peer.num_clusters=3", "peer.num_starts=2"],
    "gmm": ["peer.num_clusters=3", "peer.max_iterations=2"],
    "dp_mixture": ["peer.max_components=3", "peer.concentration=2.5", "peer.max_iterations=2"],
    "dbscan": ["peer.eps=1.5", "peer.min_samples=3"],
    "hdbscan": ["peer.min_cluster_size=3", "peer.min_samples=3"],
}
OF_DATA = ["seed=1", "dataset=gaussians", "dataset.num_points=700", "dataset.num_points=701"]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_peers_hash_knows_its_data_its_seed_and_its_own_settings_alone(data: st.DataObject) -> None:
    def hashed(overrides: list[str]) -> str:
        return config.config_hash(config.compose(["dataset=synthetic", f"peer={peer}", *overrides]))

    peer = data.draw(st.sampled_from(PEERS))
    no_effect = [
        choice for choices in OF_THE_NETS.values() if (choice := data.draw(st.sampled_from(["", *choices])))
    ]
    one, other = data.draw(
        st.lists(st.sampled_from(["", *OF_DATA, *OF_EACH_PEER[peer]]), min_size=2, max_size=2, unique=True)
    )
    first = hashed([one] if one else [])
    assert hashed([*no_effect, *([one] if one else [])]) == first
    assert hashed([*no_effect, *([other] if other else [])]) != first


def test_folders_of_jobs_are_distinct_safe_and_short() -> None:
    long = [f"model.hidden=[{','.join(map(str, range(n)))}]" for n in (60, 61)]
    names = [
        naming.job_folder(None, "digits", [override]) for override in [*long, "dataset.path=/a/b", "x=a b"]
    ]
    assert len(set(names)) == len(names)
    assert all("/" not in name and " " not in name and len(name) < 120 for name in names)


def test_conf_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.compose(["dataset=synthetic"]).dataset.name == "synthetic"
