"""What the pages say to type: Python runs and prints what they say, commands run or at least compose."""

import contextlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override

from deepdpm import config, export, predict
from deepdpm.report import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are in a language, or in none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands(page: Path, name: str) -> list[list[str]]:
    """The words of each call of a command in the page's blocks without a language."""
    lines = "".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{name} ")]


def first_job(override: Override) -> str:
    """An override with the first of the values that it sweeps over."""
    if not override.is_sweep_override():
        return str(override.input_line)
    value = override.value()
    if isinstance(value, Glob):
        group = "peer" if override.key_or_group == "peer" else f"../experiments/{override.key_or_group}"
        first = min(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    else:
        first = next(iter(override.sweep_string_iterator()))
    return f"{'+' if override.is_add() else ''}{override.key_or_group}={first}"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", DOCS / "index.md", DOCS / "guide.md"], ids=lambda p: p.name
)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    snippets = blocks(page, "python")
    assert snippets
    for snippet in snippets:
        exec(snippet, scope)
        promised = re.findall(r"print\(.*\)  # (.*)", snippet)
        assert capsys.readouterr().out.split("\n")[:-1] == promised
    assert (tmp_path / "clusters.html").is_file() or "explain(" not in "".join(snippets)


TRAIN = [(page.name, words) for page in PAGES for words in commands(page, "deepdpm-train")]


@pytest.mark.parametrize(("page", "words"), TRAIN, ids=[" ".join([page, *words]) for page, words in TRAIN])
def test_a_run_that_a_page_names_has_settings_that_are_accepted(page: str, words: list[str]) -> None:
    given = [word for word in words if word not in ("-m", "--help", "OVERRIDE", "...")]
    given = [word for word in given if not word.startswith(("hydra/", "hydra."))]
    overrides = [first_job(override) for override in OverridesParser.create().parse_overrides(given)]
    config.check(config.compose(overrides), overrides)


def test_the_sweep_of_the_readme_runs(train: Callable[..., Any]) -> None:
    ((_, words),) = [(page, words) for page, words in TRAIN if page == "README.md" and words[:1] == ["-m"]]
    overrides = [first_job(override) for override in OverridesParser.create().parse_overrides(words[1:])]
    ended = train(*overrides, "trainer=debug", "hydra.run.dir=run")
    assert ended.status == 0, ended.err


def test_pages_name_enough_runs() -> None:
    assert len(TRAIN) >= 20


def test_the_commands_of_the_guide_run(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).normal([[0, 0], [9, 9]], 1, (60, 2, 2)).reshape(-1, 2)
    frame = pd.DataFrame(x.astype(np.float32), columns=["a", "b"])
    frame.to_parquet(tmp_path / "new.parquet")
    frame.assign(kind=["one", "two"] * 60).to_csv(tmp_path / "points.csv", index=False)
    frame.to_csv(tmp_path / "bare.csv", index=False)
    guide, run = DOCS / "guide.md", "outputs/digits/RUN"
    runs = commands(guide, "deepdpm-train")[:2]
    assert [words[-1] for words in runs] == ["dataset.path=points.csv", "dataset.labels=kind"]
    bare = ["dataset=file", "dataset.path=bare.csv"]
    for words, folder in ((bare, "bare"), (runs[1], run)):
        assert train(*words, "trainer=debug", f"hydra.run.dir={folder}").status == 0
    calls = [(cli.main, [run])]
    calls += [(export.main, words) for words in commands(guide, "deepdpm-export")]
    calls += [(predict.main, words) for words in commands(guide, "deepdpm-predict")]
    assert len(calls) == 4
    for main, words in calls:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        with contextlib.suppress(SystemExit):
            main()
    assert (tmp_path / run / "report.html").is_file()
    assert (tmp_path / "digits.onnx").is_file()
    assert (tmp_path / "digits.safetensors").is_file()
    assert len(pd.read_parquet(tmp_path / "labels.parquet")) == len(frame)
