"""From settings to schema: the types and defaults that Hydra checks, from the package's own dataclasses."""

import copy
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Sequence
from functools import partial
from typing import Any

from omegaconf import MISSING

_PRIMITIVES = (int, float, bool, str)


def schema_of(settings: type, **parts: type) -> type:
    """Return a dataclass with the fields of a settings class and the `_target_` that Hydra instantiates.

    Settings are frozen and check themselves when they are made; a schema only holds the types and defaults,
    until all overrides are in. Settings within settings become schemas within schemas; `parts` are further
    settings that the command line shows within these.

    Raises:
        TypeError: `settings` is no dataclass.
    """
    hints = typing.get_type_hints(settings)
    fields: list[tuple[str, Any, Any]] = [
        ("_target_", str, dataclasses.field(default=f"{settings.__module__}.{settings.__qualname__}"))
    ]
    for field in dataclasses.fields(settings):
        kind, default = _schema_type(hints[field.name]), _default_of(field)
        if dataclasses.is_dataclass(hints[field.name]):
            fields.append((field.name, kind, dataclasses.field(default_factory=kind)))
        elif isinstance(default, list | dict):
            fields.append((field.name, kind, dataclasses.field(default_factory=partial(copy.copy, default))))
        else:
            fields.append((field.name, kind, dataclasses.field(default=default)))
    for name, part in parts.items():
        inner = schema_of(part)
        fields.append((name, inner, dataclasses.field(default_factory=inner)))
    schema = dataclasses.make_dataclass(f"{settings.__name__}Schema", fields)
    # A launcher's processes look the class up by name: pickled whole, it would lose `dataclasses.MISSING`.
    schema.__module__ = __name__
    globals()[schema.__name__] = schema
    return schema


def __getattr__(name: str) -> Any:
    """Find a schema in a process that has not registered any yet, such as a launcher's."""
    if name.endswith("Schema"):
        importlib.import_module("deepdpm.config")
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        default = field.default
    else:
        return MISSING
    return list(default) if isinstance(default, tuple) else default


def _schema_type(hint: Any) -> Any:
    """Return the type that OmegaConf checks for a type hint: `Any` where it has none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return schema_of(hint)
    if origin is typing.Literal:
        return str if all(isinstance(choice, str) for choice in arguments) else Any
    if origin in (tuple, list) or (inspect.isclass(origin) and issubclass(origin, Sequence)):
        return list[_schema_type(arguments[0])]  # type: ignore[misc]
    if origin in (types.UnionType, typing.Union):
        inner = [_schema_type(argument) for argument in arguments if argument is not type(None)]
        if len(inner) == 1:
            return typing.Optional[inner[0]] if type(None) in arguments else inner[0]  # noqa: UP045
        return Any
    return hint if hint in _PRIMITIVES else Any
