"""The cluster net and the subcluster nets: small MLPs whose number of clusters K can change.

Legend: B points of a batch, D dimensions of a code, K clusters, H hidden units, M blocks, T rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SUBCLUSTERS = 2


@dataclass(frozen=True)
class ClusterBlocks:
    """The points of a batch, grouped into M blocks of T rows such that all points of a block share a cluster.

    Each cluster's own weights then meet its points in one batched matrix product. T is about B / K, so there
    are at most 2 K blocks and 2 B + 4 K padded rows, however unequal the clusters are. Where the clusters are
    nearly equal, block k is cluster k and no weights are copied. Costs one sort of B numbers and one transfer
    of two integers to the host.

    Shapes: slot_B (B,) is a point's row among the M T padded ones; cluster_M (M,) the cluster of each block,
    or None where block k is cluster k.

    >>> blocks = ClusterBlocks.of(torch.tensor([1, 0, 1]), num_clusters=2)
    >>> x_MTD = blocks.scatter(torch.tensor([[1.0], [2.0], [3.0]]))
    >>> x_MTD[..., 0].tolist()
    [[2.0, 0.0], [1.0, 3.0]]
    >>> blocks.collect(x_MTD)[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """

    slot_B: Tensor
    cluster_M: Tensor | None
    num_blocks: int
    num_rows: int

    @classmethod
    def of(cls, z_B: Tensor, num_clusters: int) -> ClusterBlocks:
        """Group the points by their clusters z (B,), integers in 0..K-1."""
        B, K, device = z_B.shape[0], num_clusters, z_B.device
        if B == 0:
            return cls(z_B, z_B, 0, 1)
        count_K = torch.bincount(z_B, minlength=K)
        assert count_K.shape[0] == K, "a point's cluster is out of range"
        even_rows = -(-B // K)
        blocks_K = (count_K + even_rows - 1).div(even_rows, rounding_mode="floor")
        largest, num_blocks = torch.stack((count_K.max(), blocks_K.sum())).tolist()

        order_B = z_B.argsort(stable=True)
        sorted_z_B = z_B[order_B]
        rank_B = torch.arange(B, device=device) - (count_K.cumsum(0) - count_K)[sorted_z_B]
        slot_B = torch.empty_like(z_B)
        if K * largest <= 2 * B + 4 * K:  # little padding: cheaper than copies of the weights
            slot_B[order_B] = sorted_z_B * largest + rank_B
            return cls(slot_B, None, K, largest)
        last_block_K = blocks_K.cumsum(0)
        slot_B[order_B] = (last_block_K - blocks_K)[sorted_z_B] * even_rows + rank_B
        cluster_M = torch.searchsorted(last_block_K, torch.arange(num_blocks, device=device), right=True)
        return cls(slot_B, cluster_M, num_blocks, even_rows)

    def parameters(self, rows_K: Tensor) -> Tensor:
        """Each block's own entry (M, ...) of a tensor with one entry per cluster (K, ...)."""
        return rows_K if self.cluster_M is None else rows_K.index_select(0, self.cluster_M)

    def scatter(self, x_BD: Tensor) -> Tensor:
        """Points (B, D) as padded blocks (M, T, D); the padding is zero."""
        D = x_BD.shape[1]
        padded = x_BD.new_zeros(self.num_blocks * self.num_rows, D).index_copy(0, self.slot_B, x_BD)
        return padded.view(self.num_blocks, self.num_rows, D)

    def collect(self, y_MTE: Tensor) -> Tensor:
        """The rows of the points (B, E), in their own order, out of blocks (M, T, E)."""
        return y_MTE.flatten(0, 1).index_select(0, self.slot_B)


class GrowingModule(nn.Module):
    """A module some of whose parameters have one row per cluster: rows that can be copied, redrawn, loaded.

    A subclass names these parameters in `row_bounds`, each with the bound b of its initial values, uniform in
    (-b, b) as in `torch.nn.Linear`. A parameter stays the same object when its number of rows changes, so
    optimizers and their schedulers keep it. `deepdpm.growth` moves the optimizer's moments.
    """

    def __init__(self, row_bounds: Mapping[str, float]) -> None:
        super().__init__()
        self.row_bounds = dict(row_bounds)

    def row_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose first axis is the clusters, by name."""
        return {name: getattr(self, name) for name in self.row_bounds}

    @property
    def num_clusters(self) -> int:
        """K, the number of rows."""
        return next(iter(self.row_parameters().values())).shape[0]

    @torch.no_grad()
    def take_rows(self, parents_K: Tensor) -> None:
        """Make row k a copy of the old row parents[k]; parents (K_new,) holds integers in 0..K_old-1."""
        for parameter in self.row_parameters().values():
            _replace_values(parameter, parameter.detach().index_select(0, parents_K.to(parameter.device)))

    @torch.no_grad()
    def reset_rows(self, rows_K: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        """Draw the rows in the mask (K,) anew, or all of them; the draws are the same on every device.

        >>> net = ClusterNet(2, [4], 3)
        >>> before = net.output_weight.detach().clone()
        >>> net.reset_rows(torch.tensor([False, True, False]))
        >>> (net.output_weight == before).all(1).tolist()
        [True, False, True]
        """
        rows_K = torch.ones(self.num_clusters, dtype=torch.bool) if rows_K is None else rows_K.cpu()
        device = torch.device("cpu") if generator is None else generator.device
        for name, parameter in self.row_parameters().items():
            index = rows_K.nonzero()[:, 0].to(parameter.device)
            shape = (index.shape[0], *parameter.shape[1:])
            unit = torch.rand(shape, generator=generator, device=device, dtype=parameter.dtype)
            parameter[index] = ((2 * unit - 1) * self.row_bounds[name]).to(parameter.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in self.row_parameters().items():
            stored = state_dict.get(prefix + name)
            if (
                stored is not None
                and stored.shape[1:] == parameter.shape[1:]
                and stored.shape != parameter.shape
            ):
                _replace_values(parameter, parameter.detach().new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _replace_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape while it stays the same object.

    Autograd keeps the old shape as long as any old graph is alive, and would then refuse the new gradient; a
    change of dtype in between makes it forget.
    """
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=torch.float16, device=parameter.device)
    parameter.data = values


class ClusterNet(GrowingModule):
    """MLP from codes to logits over K clusters: `r = softmax(f(x) / temperature)`.

    Source: DeepDPM, section 4: one hidden layer of 50 units with ReLU; here any list of hidden layers.

    Shapes: codes (B, D) to logits (B, K), already divided by the temperature. A state dict of another K
    resizes the output layer.

    >>> net = ClusterNet(num_dims=2, hidden=[50], num_clusters=3)
    >>> net(torch.zeros(4, 2)).shape
    torch.Size([4, 3])
    >>> smaller = ClusterNet(num_dims=2, hidden=[50], num_clusters=1)
    >>> smaller.load_state_dict(net.state_dict())
    <All keys matched successfully>
    >>> smaller.num_clusters
    3
    """

    def __init__(
        self, num_dims: int, hidden: Sequence[int], num_clusters: int, temperature: float = 1.0
    ) -> None:
        assert hidden
        assert min(hidden) > 0
        assert num_clusters > 0
        assert temperature > 0
        bound = hidden[-1] ** -0.5
        super().__init__({"output_weight": bound, "output_bias": bound})
        self.temperature = temperature
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip([num_dims, *hidden[:-1]], hidden, strict=True):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.output_weight = nn.Parameter(torch.empty(num_clusters, hidden[-1]))
        self.output_bias = nn.Parameter(torch.empty(num_clusters))
        self.reset_rows()

    @property
    def num_hidden(self) -> int:
        """H, the units of the last hidden layer."""
        return self.output_weight.shape[1]

    def forward(self, x_BD: Tensor) -> Tensor:
        return (
            nn.functional.linear(self.hidden(x_BD), self.output_weight, self.output_bias) / self.temperature
        )

    def log_prob(self, x_BD: Tensor) -> Tensor:
        """Log responsibilities `log r` (B, K) of codes (B, D); each row's exponentials sum to one.

        >>> ClusterNet(2, [5], 1).log_prob(torch.ones(2, 2)).tolist()
        [[0.0], [0.0]]
        """
        return self(x_BD).log_softmax(1)


class SubclusterNets(GrowingModule):
    """One MLP per cluster, from codes to logits over its two subclusters, as one batched set of parameters.

    A point uses only the net of its own cluster z: `rsub = softmax(V_z relu(W_z x + b_z) + c_z)`,
    where the logits are first divided by the temperature. Source: DeepDPM, section 4.

    Cost: about B D H multiplications, and copies of at most twice the parameters, whatever the sizes of the
    clusters (see ClusterBlocks). Forward and backward on two cores at B = 4096, D = 128, H = 50, K = 500:
    10 ms for equal clusters, 15 ms for very unequal ones; a loop over the clusters takes 50 to 70 ms.

    Shapes: hidden_weight (K, D, H), hidden_bias (K, H), output_weight (K, H, 2), output_bias (K, 2); codes
    (B, D) and clusters (B,) to logits (B, 2). A state dict of another K resizes the parameters.

    >>> nets = SubclusterNets(num_dims=2, hidden=50, num_clusters=3)
    >>> nets(torch.zeros(4, 2), torch.tensor([0, 2, 2, 1])).shape
    torch.Size([4, 2])
    """

    def __init__(self, num_dims: int, hidden: int, num_clusters: int, temperature: float = 1.0) -> None:
        assert hidden > 0
        assert num_clusters > 0
        assert temperature > 0
        inner, outer = num_dims**-0.5, hidden**-0.5
        super().__init__(
            {"hidden_weight": inner, "hidden_bias": inner, "output_weight": outer, "output_bias": outer}
        )
        self.temperature = temperature
        self.hidden_weight = nn.Parameter(torch.empty(num_clusters, num_dims, hidden))
        self.hidden_bias = nn.Parameter(torch.empty(num_clusters, hidden))
        self.output_weight = nn.Parameter(torch.empty(num_clusters, hidden, SUBCLUSTERS))
        self.output_bias = nn.Parameter(torch.empty(num_clusters, SUBCLUSTERS))
        self.reset_rows()

    @property
    def num_hidden(self) -> int:
        """H, the hidden units of each net."""
        return self.hidden_weight.shape[2]

    def forward(self, x_BD: Tensor, z_B: Tensor) -> Tensor:
        blocks = ClusterBlocks.of(z_B, self.num_clusters)
        bias_M1H = blocks.parameters(self.hidden_bias).unsqueeze(1)
        bias_M12 = blocks.parameters(self.output_bias).unsqueeze(1)
        hidden_MTH = torch.baddbmm(
            bias_M1H, blocks.scatter(x_BD), blocks.parameters(self.hidden_weight)
        ).relu()
        logits_MT2 = torch.baddbmm(bias_M12, hidden_MTH, blocks.parameters(self.output_weight))
        return blocks.collect(logits_MT2) / self.temperature

    def log_prob(self, x_BD: Tensor, z_B: Tensor) -> Tensor:
        """Log responsibilities `log rsub` (B, 2) of each point's own two subclusters.

        >>> nets = SubclusterNets(2, 5, 1)
        >>> nets.log_prob(torch.ones(3, 2), torch.zeros(3, dtype=torch.long)).exp().sum(1).round().tolist()
        [1.0, 1.0, 1.0]
        """
        return self(x_BD, z_B).log_softmax(1)
