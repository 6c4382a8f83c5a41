"""The one primitive of growth: an index of parents moves rows of nets and the optimizer's moments of them.

`parents[k]` is the old row that new row k is copied from; a split repeats a parent, a merge leaves one out, a
permutation reorders. Then the rows of split and merged clusters take new values by a rule.

Legend: N points, D dimensions, K clusters after the move, H hidden units, B points of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from deepdpm.nets import SUBCLUSTERS, ClusterNet, GrowingModule, SubclusterNets

RowRule = Literal["same", "same_w_noise", "random"]

_LOG_FLOOR = math.log(1e-4)


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


@torch.no_grad()
def fit_output_layer(
    net: ClusterNet,
    chunks: Iterable[tuple[Tensor, Tensor, Tensor]],
    ridge: float = 1e-4,
    floor: float = _LOG_FLOOR,
) -> None:
    """Solve the output rows of all clusters at once, so that the log responsibilities meet given targets.

    Ridge regression, weighted by point, of `t = temperature * centre_k(max(log p, floor))` on the last hidden
    features h. Centring over the clusters is free, because the softmax ignores a constant:
    `W = (cov(h, h) + ridge * mean_variance * I)^-1 cov(h, t)`, `b = mean(t) - mean(h) W`. The floor keeps
    hopeless clusters from ruling the fit. The sums, H x H and H x K, are float64; nothing of N x K is kept.
    Moments of the old rows mean nothing afterwards: pass `grow_optimizer` fresh all true.

    Shapes: chunks of codes (B, D), target log probabilities (B, K) and weights (B,); K is the net's.

    >>> net = ClusterNet(num_dims=1, hidden=[8], num_clusters=2)
    >>> x_ND = torch.linspace(-1, 1, 100)[:, None]
    >>> log_prob_NK = torch.cat((2 * x_ND, -2 * x_ND), 1).log_softmax(1)
    >>> fit_output_layer(net, [(x_ND, log_prob_NK, torch.ones(100))])
    >>> bool((net(x_ND).argmax(1) == log_prob_NK.argmax(1)).float().mean() > 0.8)
    True
    """
    assert ridge > 0
    weight_KH = net.output_weight
    K, H = weight_KH.shape
    # One joint second moment of (1, h, t) holds every sum needed.
    moment = torch.zeros(1 + H, 1 + H + K, dtype=torch.float64, device=weight_KH.device)
    for x_BD, log_prob_BK, weight_B in chunks:
        target_BK = log_prob_BK.double().clamp_min(floor)
        target_BK = net.temperature * (target_BK - target_BK.mean(1, keepdim=True))
        hidden_BH = net.hidden(x_BD).double()
        features = torch.cat((torch.ones_like(hidden_BH[:, :1]), hidden_BH), 1)
        moment += (features * weight_B.double()[:, None]).T @ torch.cat((features, target_BK), 1)
    assert moment[0, 0] > 0, "the weights sum to zero"
    moment /= moment[0, 0].clone()
    mean_H, mean_K = moment[0, 1 : 1 + H], moment[0, 1 + H :]
    covariance_HH = moment[1:, 1 : 1 + H] - mean_H[:, None] * mean_H
    covariance_HK = moment[1:, 1 + H :] - mean_H[:, None] * mean_K
    variance = covariance_HH.diagonal().mean()
    penalty = ridge * torch.where(variance > 0, variance, torch.ones_like(variance))
    covariance_HH.diagonal().add_(penalty)
    fitted_HK = torch.linalg.solve(covariance_HH, covariance_HK)
    weight_KH.copy_(fitted_HK.T)
    net.output_bias.copy_(mean_K - mean_H @ fitted_HK)
