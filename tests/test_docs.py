"""The site of `make docs`: every page is in it, and examples in docstrings reach it as code."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def hook(name: str, needs: str) -> ModuleType:
    pytest.importorskip(needs, reason="needs the extra 'docs'")
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_names_every_page_once() -> None:
    text = (ROOT / ".mkdocs.yml").read_text()
    nav = [page for entry in yaml.safe_load(text)["nav"] for page in entry.values()]
    pages = {path.name for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")}
    assert len(nav) == len(pages)
    assert set(nav) == pages
    index, readme = (DOCS / "index.md").read_text(), (ROOT / "README.md").read_text()
    for page in pages - {"index.md"}:
        assert f"]({page})" in index
        assert f"](docs/{page})" in readme


def test_every_module_has_a_page_of_the_reference() -> None:
    modules = hook("hooks", "mkdocs").modules()
    assert {"deepdpm", "deepdpm.estimator", "deepdpm.data", "deepdpm.data.file"} <= set(modules)
    assert all(modules.values()), "a module without a docstring"


def test_formulas_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="needs the extra 'docs'")
    html = '<p><span class="arithmatex">\\(a &lt; b\\)</span> and <code>\\(c\\)</code></p>'
    drawn = hook("hooks", "mkdocs").on_page_content(html)
    assert "<math" in drawn
    assert "arithmatex" not in drawn
    assert "<code>\\(c\\)</code>" in drawn


def test_examples_are_fenced_up_to_an_empty_line() -> None:
    fenced = hook("doctests", "griffe").fenced
    text = "One.\n\n>>> f(1)\n[[2]]\n\nTwo.\n\nExample:\n    >>> for x in y:\n    ...     g(x)\n    3"
    assert fenced(text) == (
        "One.\n\n```pycon\n>>> f(1)\n[[2]]\n```\n\nTwo.\n\n"
        "Example:\n    ```pycon\n    >>> for x in y:\n    ...     g(x)\n    3\n    ```"
    )
    assert fenced("nothing to fence") == "nothing to fence"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="needs the extra 'dev'")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'dev'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'dev'")
    path = DOCS / "notebook.ipynb"
    assert path.stat().st_size < 500_000
    notebook = nbformat.read(path, as_version=4)
    kept = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in kept[:-1]), "execute it anew: make notebook"
    strict = (
        "import warnings; warnings.simplefilter('error'); "
        "warnings.filterwarnings('ignore', message='.*treespec, LeafSpec.*')"
    )
    notebook.cells.insert(0, nbformat.v4.new_code_cell(strict))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
    # It raises at the first cell that fails.
    client.execute()
    streams = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in streams} <= {"stream", "display_data"}
    assert all(output.name == "stdout" for output in streams if output.output_type == "stream")
