"""Checks that all settings share: each refuses a value in one sentence that names the setting."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


def check_choices(settings: Any, group: str) -> None:
    """Refuse a value that a `Literal` field of a settings dataclass does not list.

    Raises:
        ValueError: naming `group.field` and the choices.

    >>> from deepdpm.priors import PriorSettings
    >>> check_choices(PriorSettings(), "prior")
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        choices, value = typing.get_args(hint), getattr(settings, name)
        if typing.get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{group}.{name} must be one of {', '.join(choices)}, not {value!r}.")


def check_least(settings: Any, group: str, least: Mapping[str, float]) -> None:
    """Refuse a number below its least value, infinity or NaN; None passes, as in all checks.

    Raises:
        ValueError: naming `group.field`.

    >>> from deepdpm.priors import PriorSettings
    >>> check_least(PriorSettings(), "prior", {"dirichlet_count": 0})
    """
    for name, bound in least.items():
        if not all(bound <= one < math.inf for one in _numbers(settings, name)):
            raise _refusal(settings, group, name, f"be at least {bound}")


def check_positive(settings: Any, group: str, names: Iterable[str]) -> None:
    """Refuse a number that is not above 0 and finite.

    Raises:
        ValueError: naming `group.field`.
    """
    for name in names:
        if not all(0 < one < math.inf for one in _numbers(settings, name)):
            raise _refusal(settings, group, name, "be a positive number")


def check_fraction(settings: Any, group: str, names: Iterable[str]) -> None:
    """Refuse a number outside 0..1.

    Raises:
        ValueError: naming `group.field`.
    """
    for name in names:
        if not all(0 <= one <= 1 for one in _numbers(settings, name)):
            raise _refusal(settings, group, name, "lie between 0 and 1")


def _numbers(settings: Any, name: str) -> list[float]:
    """The number or the tuple of them that a setting holds, without None."""
    value = getattr(settings, name)
    return [one for one in (value if isinstance(value, tuple) else (value,)) if one is not None]


def _refusal(settings: Any, group: str, name: str, wanted: str) -> ValueError:
    return ValueError(f"{group}.{name} must {wanted}, not {getattr(settings, name)}.")
