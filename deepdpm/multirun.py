"""The command line of a sweep over groups, put so that Hydra takes it."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

# Groups whose choices have keys of their own; all choices of the others share one schema.
_WITH_OWN_KEYS = ("dataset", "peer", "alternation", "tracking")


def for_sweep(arguments: Sequence[str]) -> list[str]:
    """Make plain settings of a swept data set or peer sweeps of one value, which Hydra leaves to the jobs.

    Hydra composes the configuration once before it knows the jobs, without what is swept, and would refuse
    a key that only the swept choices have. What is no sweep over groups stays as it is.

    Example:
        >>> for_sweep(["-m", "+embedded=glob(*)", "dataset.imbalanced=true", "prior.nu=20"])
        ['-m', '+embedded=glob(*)', 'dataset.imbalanced=choice(true)', 'prior.nu=20']
        >>> for_sweep(["+embedded=usps", "dataset.imbalanced=true"])
        ['+embedded=usps', 'dataset.imbalanced=true']
    """
    parsed = [_parse(argument) for argument in arguments]
    groups = {
        override.get_key_element().lstrip("+").split("@")[0]
        for override in parsed
        if override is not None and override.is_sweep_override() and "." not in override.get_key_element()
    }
    if not groups - {"seed", "name", "ckpt_path"} or not {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [_left_to_jobs(*pair) for pair in zip(arguments, parsed, strict=True)]


def _parse(argument: str) -> Override | None:
    if argument.startswith("-"):
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:  # Hydra itself will say what is wrong
        return None


def _left_to_jobs(argument: str, override: Override | None) -> str:
    if override is None or override.is_sweep_override() or override.is_delete():
        return argument
    key, _, value = argument.partition("=")
    group, dot, _ = key.lstrip("+").partition(".")
    if not dot or group not in _WITH_OWN_KEYS:
        return argument
    swept = f"{key}=choice({value})"
    return argument if _parse(swept) is None else swept
