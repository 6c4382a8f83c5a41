"""The Python of the guide runs, in its order, and says what the guide says."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def test_the_snippets_of_the_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(snippets) >= 5
    for snippet in snippets:
        exec(snippet, scope)
        promised = re.findall(r"print\(.*\)  # (.*)", snippet)
        assert capsys.readouterr().out.split("\n")[:-1] == promised
    assert (tmp_path / "clusters.html").is_file()
