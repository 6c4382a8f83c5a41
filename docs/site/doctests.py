"""Examples in docstrings, which start with `>>>`, as code: Markdown alone would take them for quotations."""

from typing import Any

from griffe import Extension, Module, Object


def fenced(text: str) -> str:
    """The text with a fence around each run of examples and of what they print, up to the next empty line."""
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        if fence and not line.strip():
            lines.append(fence)
            fence = ""
        if not fence and line.lstrip().startswith(">>> "):
            fence = line[: len(line) - len(line.lstrip())] + "```"
            lines.append(fence + "pycon")
        lines.append(line)
    return "\n".join([*lines, fence] if fence else lines)


class Doctests(Extension):
    """Fence the examples of every docstring, and show the estimator's defaults by their values."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        estimator = pkg["estimator"]
        for parameter in estimator["DeepDPM.__init__"].parameters:
            owner, _, name = str(parameter.default).rpartition(".")
            if owner.endswith("Settings"):
                parameter.default = estimator[owner].members[name].value
