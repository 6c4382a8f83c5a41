"""Clustering that finds the number of clusters by itself.

>>> from deepdpm import DeepDPM
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepdpm.estimator import DeepDPM as DeepDPM

__all__ = ["DeepDPM"]


def __getattr__(name: str) -> Any:
    """Import the estimator when it is first asked for: the mathematics needs neither Lightning nor Hydra."""
    if name == "DeepDPM":
        from deepdpm.estimator import DeepDPM

        return DeepDPM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
