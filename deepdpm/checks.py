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
    """Refuse a number below its least value, infinity or NaN; None passes.

    Raises:
        ValueError: naming `group.field`.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"{group}.{name} must be at least {bound}, not {value}.")


def check_positive(settings: Any, group: str, names: Iterable[str]) -> None:
    """Refuse a number that is not above 0 and finite; None passes.

    Raises:
        ValueError: naming `group.field`.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{group}.{name} must be a positive number, not {value}.")


def check_fraction(settings: Any, group: str, names: Iterable[str]) -> None:
    """Refuse a number, or a number of a list, outside 0..1; None passes.

    Raises:
        ValueError: naming `group.field`.
    """
    for name in names:
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(one is not None and not 0 <= one <= 1 for one in values):
            raise ValueError(f"{group}.{name} must lie between 0 and 1, not {value}.")
