"""What the site has beyond the pages: the API reference, a page for each module, and formulas as MathML."""

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "deepdpm"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def modules() -> dict[str, str]:
    """Every public module, and the first line of its docstring."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    return found


def on_config(config: MkDocsConfig) -> None:
    """Put the reference behind the pages."""
    assert config.nav is not None
    pages: list[Any] = [{name.removeprefix("deepdpm."): f"api/{name}.md"} for name in modules()]
    config.nav.append({"API reference": ["api/index.md", *pages]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Make its pages: the list of modules, and for each module what its docstrings say."""
    rows = "".join(f"| [`{name}`]({name}.md) | {line} |\n" for name, line in modules().items())
    index = (
        "# API reference\n\nMade from the docstrings. Most users need "
        "[`deepdpm.DeepDPM`][deepdpm.estimator.DeepDPM] alone; commands and settings are in the modules."
        f"\n\n| module | about |\n|---|---|\n{rows}"
    )
    files.append(File.generated(config, "api/index.md", content=index))
    for name in modules():
        # A package only passes on what its modules define.
        package = (PACKAGE.parent / name.replace(".", "/")).is_dir()
        only = "    options:\n      members: false\n" if package else ""
        files.append(File.generated(config, f"api/{name}.md", content=f"::: {name}\n{only}"))


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def drawn(match: re.Match[str]) -> str:
        return convert(unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(drawn, html)
