"""The optimizers of both kinds of nets, and what becomes of their learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from deepdpm.settings import OptimizerSettings


def make_optimizers(
    settings: OptimizerSettings, cluster: Iterable[nn.Parameter], subcluster: Iterable[nn.Parameter]
) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """An Adam for the cluster net and one for the subcluster nets, and a scheduler for each if one is set.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> optimizers, schedulers = make_optimizers(OptimizerSettings(cluster_lr=0.1), [weight], [weight])
    >>> optimizers[0].param_groups[0]["lr"], schedulers
    (0.1, [])
    """
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam(list(parameters), lr=lr, fused=True)
        for parameters, lr in ((cluster, settings.cluster_lr), (subcluster, settings.subcluster_lr))
    ]
    schedulers: list[Any] = []
    if settings.lr_scheduler == "step":
        schedulers = [torch.optim.lr_scheduler.StepLR(one, settings.lr_step) for one in optimizers]
    if settings.lr_scheduler == "plateau":
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        schedulers = [plateau(optimizers[0], factor=0.5, patience=settings.lr_patience)]
    return optimizers, schedulers


def let_fall(optimizers: Iterable[torch.optim.Optimizer], remaining: int) -> None:
    """Bring all learning rates nearer to zero, which a straight line reaches after so many steps.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    >>> for remaining in (4, 3):
    ...     let_fall([optimizer], remaining)
    >>> optimizer.param_groups[0]["lr"]
    0.5
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= max(remaining - 1, 0) / max(remaining, 1)


def step_schedulers(schedulers: Sequence[Any], cluster_loss: float) -> None:
    """Let the schedulers see the end of an epoch."""
    for scheduler in schedulers:
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(cluster_loss)
        else:
            scheduler.step()
