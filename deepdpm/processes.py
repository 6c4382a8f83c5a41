"""What several processes that train together tell each other; one process alone tells nobody anything."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def share_from_first(tensor: Tensor) -> Tensor:
    """The tensor of process 0 in all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of each parameter's gradient (of any shape) over all processes, in place.

    What DistributedDataParallel would do, for parameters that change their shape.
    """
    if dist.is_available() and dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is not None:
                sum_over_processes(parameter.grad).div_(dist.get_world_size())


def share_learned(module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """The parameters, buffers and moments of process 0 in all processes, in place.

    Moments may lie on another device than the module's parameters, which all lie on one.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        share_from_first(tensor.data)
    device = next(module.parameters()).device
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = share_from_first(value.to(device)).to(value.device)
