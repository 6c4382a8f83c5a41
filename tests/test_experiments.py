"""Every named experiment composes, says how it is run, and is refused or found by its data alone."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from deepdpm import config
from deepdpm.data import DataMissingError
from deepdpm.tables import plan

FILES = sorted(config.experiments_folder().glob("*/*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_an_experiment_composes_and_its_settings_are_accepted(path: Path) -> None:
    overrides = [f"+{path.parent.name}={path.stem}"]
    config.check(config.compose(overrides), overrides)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_an_experiment_opens_with_its_command_expected_result_and_cost(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# deepdpm-train ")
    assert f"+{path.parent.name}={path.stem}" in lines[1].split()
    comment = " ".join(line for line in lines if line.startswith("#"))
    assert "Expected: " in comment
    assert "Cost: " in comment


def test_no_folder_bears_the_name_of_a_config_key() -> None:
    keys = {str(key) for key in config.compose()}
    assert not keys & {path.parent.name for path in FILES}


def test_the_tables_of_the_paper_are_there() -> None:
    rows = dict.fromkeys(NAMES, 0)
    wanted = [
        f"embedded/{name}{kind}" for name in ("mnist", "usps", "fashion") for kind in ("", "_imbalanced")
    ]
    assert set(wanted) <= set(rows)


@pytest.mark.parametrize(
    ("table", "row"), [("runtime", "dimensions"), ("sweeps", "alpha"), ("ablation", "defaults")]
)
def test_a_row_with_values_of_its_own_has_a_plan_of_distinct_jobs(
    table: str, row: str, tmp_path: Path
) -> None:
    jobs = plan(table, (0,), tmp_path, (), [row])
    assert len(jobs) > 1
    assert len({job.folder for job in jobs}) == len(jobs)
    assert len({job.config_hash for job in jobs}) == len(jobs)


def test_a_plan_is_the_product_of_rows_values_and_seeds(tmp_path: Path) -> None:
    jobs = plan("embedded", (0, 1), tmp_path, ["peer=none", "prior.nu=20,40"], ["usps"])
    assert [(job.overrides, job.seed) for job in jobs] == [
        (("+embedded=usps", "prior.nu=20", "seed=0"), 0),
        (("+embedded=usps", "prior.nu=40", "seed=0"), 0),
        (("+embedded=usps", "prior.nu=20", "seed=1"), 1),
        (("+embedded=usps", "prior.nu=40", "seed=1"), 1),
    ]
    assert {job.dataset for job in jobs} == {"usps_n2d"}
    assert jobs[0].config_hash == config.config_hash(config.compose(jobs[0].overrides))


def test_a_method_without_chance_is_planned_for_one_seed(tmp_path: Path) -> None:
    jobs = plan("embedded", (3, 4), tmp_path, ["peer=kmeans,dbscan"], ["usps_imbalanced"])
    assert [(job.method, job.seed) for job in jobs] == [("kmeans", 3), ("dbscan", 3), ("kmeans", 4)]
    assert {job.dataset for job in jobs} == {"usps_n2d_imbalanced"}


def test_where_the_seed_draws_the_data_all_methods_are_planned_for_all_seeds(tmp_path: Path) -> None:
    jobs = plan("varied", (0, 1), tmp_path, ["peer=none,hdbscan"], ["skewed"])
    assert [(job.method, job.seed) for job in jobs] == [
        ("deepdpm", 0), ("hdbscan", 0), ("deepdpm", 1), ("hdbscan", 1),
    ]  # fmt: skip
    assert len({job.config_hash for job in jobs}) == 4
    first, second = (instantiate(config.compose(job.overrides).dataset).load() for job in jobs[::2])
    assert first.train.x.shape != second.train.x.shape


def test_the_published_settings_go_with_any_row(tmp_path: Path) -> None:
    (job,) = plan("embedded", (0,), tmp_path, ["+published=codes", "peer=none"], ["mnist"])
    cfg = config.compose(job.overrides)
    assert (job.method, cfg.dataset.name, cfg.model.moves.kind) == ("published", "mnist_n2d", "published")


@pytest.mark.parametrize(
    ("table", "rows", "message"),
    [
        ("embeded", None, "There is no table 'embeded': choose one of ablation, benchmarks, embedded"),
        ("embedded", ["mnits"], "embedded has no row 'mnits': choose of fashion"),
        ("sweeps", ["optuna_prior"], "run deepdpm-train -m \\+sweeps=optuna_prior"),
    ],
)
def test_a_wrong_name_is_one_sentence(
    table: str, rows: list[str] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(table, (0,), tmp_path, (), rows)


def test_a_refused_setting_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prior\.nuu"):
        plan("embedded", (0,), tmp_path, ["prior.nuu=3"], ["usps"])


@pytest.mark.parametrize("row", ["moco", "moco_published"])
def test_codes_that_are_not_there_are_data_missing(
    row: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hydra.utils import instantiate

    monkeypatch.setenv("DEEPDPM_DATA", str(tmp_path))
    with pytest.raises(DataMissingError, match=r"DATA|dataset\.path"):
        instantiate(config.compose([f"+stl10={row}"]).dataset).load()


def test_a_sweep_of_weights_and_biases_names_real_settings() -> None:
    sweep = OmegaConf.load(Path(__file__).parents[1] / "docs" / "wandb_sweep.yaml")
    cfg = config.compose()
    for key in sweep.parameters:
        assert OmegaConf.select(cfg, key, throw_on_missing=True) is not None or key in ("prior.nu",)
