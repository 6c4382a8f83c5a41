"""How many seconds of a run went into which phase, from what Lightning's SimpleProfiler has recorded."""

import math
from typing import Any

from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler

PHASES = ("start", "training", "moves", "polishing", "trace", "saving", "prediction", "other")
"""The phases that make up `seconds`; `load`, before them, does not count."""


def time_phases(trainer: Any) -> None:
    """Let a trainer record the seconds of its actions, unless it has a profiler of the user's choice."""
    if isinstance(trainer.profiler, PassThroughProfiler):
        trainer.profiler = SimpleProfiler()


def phase_seconds(trainer: Any, total: float, prediction: float) -> dict[str, float]:
    """Divide the seconds of a run among `PHASES`; nothing where the trainer has a profiler of another kind.

    Args:
        trainer: Lightning's, after the fit.
        total: seconds of fit and final prediction.
        prediction: seconds of the latter.

    Returns:
        start: transform, prior and starting clusters. training: the passes of the epochs before moves rest
        (E-step, steps of the nets, sums of the M-step). moves: M-steps and the search. polishing: the passes
        after it. trace: metrics of each epoch. saving: checkpoints. other: what is left.
    """
    if not isinstance(trainer.profiler, SimpleProfiler):
        return {}
    durations: dict[str, list[float]] = trainer.profiler.recorded_durations
    found = {
        "start": _total(durations, "[LightningModule]", ".setup"),
        **passes(durations.get("run_training_epoch", []), polish_epochs(trainer.lightning_module)),
        "moves": _total(durations, "[LightningModule]", ".on_train_epoch_end"),
        "trace": _total(durations, "[Callback]Trace", ".on_train_epoch_end"),
        "saving": math.fsum(durations.get("save_checkpoint", [])),
        "prediction": prediction,
    }
    found["other"] = max(0.0, total - math.fsum(found.values()))
    return {phase: round(found[phase], 4) for phase in PHASES}


def polish_epochs(module: Any) -> int:
    """Return how many of the last epochs of a `DeepDPMModule` found the moves at rest.

    With joint features, clustering comes several times and its end is not that of the run: the answer is 0.
    """
    return int(module.progress.polish_epoch) if module.total_epochs is None else 0


def passes(epochs: list[float], polished: int) -> dict[str, float]:
    """Divide the seconds of the epochs' passes: the last `polished` ones found the moves at rest.

    Example:
        >>> passes([3.0, 2.0, 1.0], polished=1)
        {'training': 5.0, 'polishing': 1.0}
    """
    first = max(0, len(epochs) - polished)
    return {"training": math.fsum(epochs[:first]), "polishing": math.fsum(epochs[first:])}


def _total(durations: dict[str, list[float]], kind: str, hook: str) -> float:
    """Return the seconds in one hook of the modules, or of the callbacks, whose names begin so."""
    return math.fsum(
        math.fsum(seconds)
        for action, seconds in durations.items()
        if action.startswith(kind) and action.endswith(hook)
    )
