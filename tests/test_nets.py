"""The nets agree with a plain loop over points and take their size from what they load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepdpm.nets import ClusterBlocks, ClusterNet, SubclusterNets


def plain_subcluster_logits(nets: SubclusterNets, x_BD: Tensor, z_B: Tensor) -> Tensor:
    rows = []
    for x, z in zip(x_BD, z_B.tolist(), strict=True):
        hidden = torch.relu(x @ nets.hidden_weight[z] + nets.hidden_bias[z])
        rows.append((hidden @ nets.output_weight[z] + nets.output_bias[z]) / nets.temperature)
    return torch.stack(rows)


def groupings(num_clusters: int) -> dict[str, Tensor]:
    K = num_clusters
    return {
        "equal": torch.arange(40) % K,
        "random": torch.randint(K, (40,)),
        "one": torch.full((40,), K - 1),
        "unequal": torch.tensor([0] * 33 + [K // 2] * 5 + [K - 1] * 2)[torch.randperm(40)],
        "single point": torch.tensor([K - 1]),
    }


@pytest.mark.parametrize("num_clusters", [1, 2, 7, 60])
@pytest.mark.parametrize("grouping", list(groupings(2)))
def test_subcluster_nets_equal_the_plain_loop(num_clusters: int, grouping: str) -> None:
    torch.manual_seed(0)
    z_B = groupings(num_clusters)[grouping]
    nets = SubclusterNets(3, 5, num_clusters, temperature=0.7).double()
    x_BD = torch.randn(z_B.shape[0], 3, dtype=torch.float64, requires_grad=True)
    inputs = [x_BD, *nets.parameters()]
    expected, actual = plain_subcluster_logits(nets, x_BD, z_B), nets(x_BD, z_B)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grouping", ["equal", "unequal"])
def test_subcluster_nets_pass_gradcheck(grouping: str) -> None:
    torch.manual_seed(0)
    z_B = groupings(4)[grouping]
    nets = SubclusterNets(2, 3, 4).double()
    x_BD = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: nets(x, z_B), (x_BD, *nets.parameters()))


def test_a_point_touches_only_the_net_of_its_cluster() -> None:
    nets = SubclusterNets(3, 5, 4)
    nets(torch.randn(6, 3), torch.tensor([1, 1, 3, 1, 3, 3])).sum().backward()
    for parameter in nets.parameters():
        assert parameter.grad is not None
        assert parameter.grad[[0, 2]].eq(0).all()


def test_the_order_of_points_does_not_matter() -> None:
    nets = SubclusterNets(3, 5, 6).double()
    x_BD, z_B, shuffle = torch.randn(50, 3, dtype=torch.float64), torch.randint(6, (50,)), torch.randperm(50)
    torch.testing.assert_close(nets(x_BD[shuffle], z_B[shuffle]), nets(x_BD, z_B)[shuffle])


def test_no_points_give_no_logits() -> None:
    empty = torch.empty(0, dtype=torch.long)
    assert SubclusterNets(3, 5, 4)(torch.empty(0, 3), empty).shape == (0, 2)


@pytest.mark.parametrize("num_clusters", [1, 9, 300])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_padding_stays_bounded(num_clusters: int, skew: float) -> None:
    B, K = 500, num_clusters
    z_B = torch.multinomial((1.0 + torch.arange(K)) ** -skew, B, replacement=True)
    blocks = ClusterBlocks.of(z_B, K)
    assert blocks.num_blocks <= 2 * K
    assert blocks.num_blocks * blocks.num_rows <= 2 * (B + 2 * K)
    x_BD = torch.randn(B, 2)
    assert torch.equal(blocks.collect(blocks.scatter(x_BD)), x_BD)
    if blocks.cluster_M is not None:
        assert torch.equal(blocks.cluster_M[blocks.slot_B // blocks.num_rows], z_B)


def test_cluster_net_equals_plain_layers_and_divides_by_the_temperature() -> None:
    net = ClusterNet(3, [5, 4], 2, temperature=0.5)
    x_BD = torch.randn(7, 3)
    first, _, second, _ = net.hidden
    hidden = torch.relu(second(torch.relu(first(x_BD))))
    logits = 2 * (hidden @ net.output_weight.T + net.output_bias)
    torch.testing.assert_close(net(x_BD), logits)
    torch.testing.assert_close(net.log_prob(x_BD).exp(), logits.softmax(1))


def test_cluster_net_passes_gradcheck() -> None:
    net = ClusterNet(3, [5], 4).double()
    x_BD = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: net.log_prob(x), (x_BD, *net.parameters()))


@pytest.mark.parametrize("num_clusters", [1, 2, 9])
def test_loading_takes_the_number_of_clusters_of_the_checkpoint(num_clusters: int) -> None:
    x_BD, z_B = torch.randn(8, 3), torch.randint(num_clusters, (8,))
    net, nets = ClusterNet(3, [5], num_clusters), SubclusterNets(3, 5, num_clusters)
    other_net, other_nets = ClusterNet(3, [5], 2), SubclusterNets(3, 5, 2)
    identities = [id(p) for p in [*other_net.parameters(), *other_nets.parameters()]]
    other_net.load_state_dict(net.state_dict())
    other_nets.load_state_dict(nets.state_dict())
    assert other_net.num_clusters == other_nets.num_clusters == num_clusters
    assert identities == [id(p) for p in [*other_net.parameters(), *other_nets.parameters()]]
    assert torch.equal(other_net(x_BD), net(x_BD))
    assert torch.equal(other_nets(x_BD, z_B), nets(x_BD, z_B))


def test_loading_within_a_larger_module_resizes() -> None:
    whole = torch.nn.ModuleDict({"net": ClusterNet(3, [5], 4)})
    other = torch.nn.ModuleDict({"net": ClusterNet(3, [5], 1)})
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other["net"].output_weight, whole["net"].output_weight)


def test_loading_another_number_of_dimensions_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        SubclusterNets(3, 5, 2).load_state_dict(SubclusterNets(4, 5, 2).state_dict())


def test_rows_are_drawn_within_their_bounds_and_from_the_generator() -> None:
    net, twin = SubclusterNets(16, 25, 50), SubclusterNets(16, 25, 50)
    for nets in (net, twin):
        nets.reset_rows(generator=torch.Generator().manual_seed(3))
    for name, parameter in net.row_parameters().items():
        bound = 0.25 if name.startswith("hidden") else 0.2
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.9 * bound
        assert torch.equal(parameter, twin.row_parameters()[name])
