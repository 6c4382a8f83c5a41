"""The one primitive of growth: an index of parents moves rows of nets and the optimizer's moments of them.

`parents[k]` is the old row that new row k is copied from; a split repeats a parent, a merge leaves one out, a
permutation reorders. Then the rows of split and merged clusters take new values by a rule.

Legend: D dimensions, K clusters after the move, H hidden units.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from deepdpm.nets import SUBCLUSTERS, ClusterNet, GrowingModule, SubclusterNets

RowRule = Literal["same", "same_w_noise", "random"]


def grow(
    net: GrowingModule, parents_K: Tensor, fresh_K: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Move the rows of a net, and the optimizer's moments of them, by an index of parents.

    Row k becomes an exact copy of the old row parents[k]; its moments follow, or are zero where fresh[k].
    Parameters stay the same objects, so parameter groups and learning-rate schedulers need no change.

    Shapes: parents (K,) integers in 0..K_old-1, fresh (K,) bool.

    >>> net = ClusterNet(num_dims=2, hidden=[4], num_clusters=2)
    >>> old = net.output_bias.tolist()
    >>> grow(net, parents_K=torch.tensor([1, 0, 0]), fresh_K=torch.tensor([False, True, True]))
    >>> net.output_bias.tolist() == [old[1], old[0], old[0]]
    True
    """
    assert parents_K.shape == fresh_K.shape
    assert fresh_K.dtype == torch.bool
    if optimizer is not None:
        for parameter in net.row_parameters().values():
            grow_optimizer(optimizer, parameter, parents_K, fresh_K)
    net.take_rows(parents_K)


@torch.no_grad()
def grow_optimizer(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, parents_K: Tensor, fresh_K: Tensor
) -> None:
    """Move the optimizer's per-row state of one parameter, before or after its own rows have moved.

    Adam's `exp_avg` and `exp_avg_sq` (and any other state shaped like the parameter) go by `state[parents]`;
    those of fresh rows are zero. Adam counts its steps per tensor, not per row, so fresh rows get no bias
    correction: their first steps are some three learning rates long.

    Shapes: parents (K,) integers, fresh (K,) bool.

    >>> weight = nn.Parameter(torch.ones(2, 1))
    >>> optimizer = torch.optim.Adam([weight])
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> grow_optimizer(optimizer, weight, torch.tensor([0, 1, 1]), torch.tensor([False, False, True]))
    >>> [round(v, 2) for v in optimizer.state[weight]["exp_avg"][:, 0].tolist()]
    [0.1, 0.1, 0.0]
    """
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        # The step counter has no axes, so it is left alone.
        if isinstance(value, Tensor) and value.ndim == parameter.ndim:
            assert value.shape[1:] == parameter.shape[1:]
            moved = value.index_select(0, parents_K.to(value.device))
            moved[fresh_K.to(value.device)] = 0
            state[name] = moved


@torch.no_grad()
def renew_rows(
    net: GrowingModule,
    rule: RowRule,
    rows_K: Tensor,
    generator: torch.Generator | None = None,
    noise: float = 0.1,
) -> None:
    """Give the rows of split or merged clusters, copies of their parent's after `grow`, their new values.

    "same" keeps the copies (so a merge takes the likelier parent's row if the index names it), "same_w_noise"
    adds normal noise to them, "random" draws them as at the start. Source: the authors' options
    `init_new_weights`, `split_init_weights_sub`, `merge_init_weights_sub`.

    Shapes: rows (K,) bool. The noise is in units of the standard deviation of a parameter's initial values.

    >>> nets = SubclusterNets(num_dims=2, hidden=4, num_clusters=2)
    >>> grow(nets, torch.tensor([0, 1, 1]), torch.tensor([False, True, True]))
    >>> renew_rows(nets, "same_w_noise", torch.tensor([False, False, True]))
    >>> bool((nets.output_bias[1] == nets.output_bias[2]).any())
    False
    """
    assert rule in get_args(RowRule), rule
    if rule == "random":
        net.reset_rows(rows_K, generator)
    if rule == "same_w_noise":
        device = torch.device("cpu") if generator is None else generator.device
        for name, parameter in net.row_parameters().items():
            index = rows_K.to(parameter.device).nonzero()[:, 0]
            shape = (index.shape[0], *parameter.shape[1:])
            unit = torch.randn(shape, generator=generator, device=device, dtype=parameter.dtype)
            parameter[index] += noise * net.row_bounds[name] / 3**0.5 * unit.to(parameter.device)


@torch.no_grad()
def rows_from_subclusters(net: ClusterNet, nets: SubclusterNets, parents_K: Tensor, split_K: Tensor) -> None:
    """Give the two children of each split cluster the output weights of its two subclusters.

    The first child in order takes subcluster 0, the second subcluster 1. Call it when the cluster net has
    grown and the subcluster nets have not. Source: the authors' option `init_new_weights = subclusters`.

    Shapes: parents (K,) integers in 0..K_old-1, split (K,) bool, true for the children.

    Raises ValueError where the hidden sizes differ, for then the weights do not fit.

    >>> net, nets = ClusterNet(2, [4], 1), SubclusterNets(2, 4, 1)
    >>> parents_K, split_K = torch.tensor([0, 0]), torch.tensor([True, True])
    >>> grow(net, parents_K, fresh_K=split_K)
    >>> rows_from_subclusters(net, nets, parents_K, split_K)
    >>> torch.equal(net.output_weight, nets.output_weight[0].T)
    True
    """
    if net.num_hidden != nets.num_hidden:
        raise ValueError(
            "model.init_new_weights=subclusters needs equal hidden sizes, but the cluster net's last layer "
            f"has {net.num_hidden} units and the subcluster nets have {nets.num_hidden}: "
            "make them equal or choose 'same'"
        )
    rows = split_K.to(net.output_weight.device).nonzero()[:, 0]
    parents = parents_K.to(rows.device)[rows]
    earlier_siblings = (parents[:, None] == parents[None, :]).tril(-1).sum(1)
    assert (earlier_siblings < SUBCLUSTERS).all(), "a split has two children"
    net.output_weight[rows] = nets.output_weight[parents, :, earlier_siblings]
    net.output_bias[rows] = nets.output_bias[parents, earlier_siblings]
