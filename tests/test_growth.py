"""Growth is one index: what survives is unchanged to the bit, in the nets and in the optimizer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from deepdpm.growth import grow, grow_optimizer, renew_rows, rows_from_subclusters
from deepdpm.nets import ClusterNet, GrowingModule, SubclusterNets

B, D, H, K = 30, 3, 5, 4
PLANS = {
    "split": ([0, 1, 1, 2, 3], [False, True, True, False, False]),
    "merge": ([0, 2, 3], [False, True, False]),
    "two splits and a merge": ([2, 2, 1, 3, 3], [True, True, False, True, True]),
    "permutation": ([2, 0, 3, 1], [False] * 4),
    "all into one": ([3], [True]),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_net(kind: str) -> GrowingModule:
    return ClusterNet(D, [H], K) if kind == "cluster" else SubclusterNets(D, H, K)


def train_step(net: GrowingModule, optimizer: torch.optim.Optimizer) -> None:
    x_BD = torch.randn(B, D)
    optimizer.zero_grad()
    if isinstance(net, SubclusterNets):
        logits = net(x_BD, torch.randint(net.num_clusters, (B,)))
    else:
        logits = net(x_BD)
    logits.square().mean().backward()
    optimizer.step()


def plan(name: str) -> tuple[Tensor, Tensor]:
    parents, fresh = PLANS[name]
    return torch.tensor(parents), torch.tensor(fresh)


@pytest.mark.parametrize("kind", ["cluster", "subclusters"])
@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("amsgrad", [False, True])
def test_rows_and_moments_follow_their_parents(kind: str, name: str, amsgrad: bool) -> None:
    net, (parents_K, fresh_K) = make_net(kind), plan(name)
    optimizer = torch.optim.Adam(net.parameters(), amsgrad=amsgrad)
    for _ in range(3):
        train_step(net, optimizer)
    rows = net.row_parameters()
    old_rows = {key: value.detach().clone() for key, value in rows.items()}
    old_state = {
        key: {k: v.clone() for k, v in optimizer.state[value].items()} for key, value in rows.items()
    }
    identities = [id(p) for p in net.parameters()]

    grow(net, parents_K, fresh_K, optimizer)

    assert net.num_clusters == parents_K.shape[0]
    assert [id(p) for p in net.parameters()] == identities
    for key, parameter in rows.items():
        state = optimizer.state[parameter]
        assert torch.equal(parameter, old_rows[key][parents_K])
        assert state["step"].item() == 3
        assert set(state) == set(old_state[key])
        for moment in set(state) - {"step"}:
            assert torch.equal(state[moment][~fresh_K], old_state[key][moment][parents_K[~fresh_K]])
            assert state[moment][fresh_K].eq(0).all()
    train_step(net, optimizer)


@pytest.mark.parametrize("name", list(PLANS))
def test_outputs_of_every_cluster_are_those_of_its_parent(name: str) -> None:
    net, nets, (parents_K, fresh_K) = ClusterNet(D, [H], K), SubclusterNets(D, H, K), plan(name)
    x_BD, new_K = torch.randn(B, D), parents_K.shape[0]
    old_rows = [net.output_weight.detach().clone(), net.output_bias.detach().clone()]
    hidden_BH = net.hidden(x_BD)
    old_logits = net(x_BD)
    old_sublogits = [nets(x_BD, torch.full((B,), k)) for k in range(K)]
    grow(net, parents_K, fresh_K)
    grow(nets, parents_K, fresh_K)
    # Bit for bit the same rows on the same features; the product's kernel may depend on K in the last digit.
    assert torch.equal(
        net(x_BD), torch.nn.functional.linear(hidden_BH, *(row[parents_K] for row in old_rows))
    )
    torch.testing.assert_close(net(x_BD), old_logits[:, parents_K])
    for k in range(new_K):
        torch.testing.assert_close(nets(x_BD, torch.full((B,), k)), old_sublogits[parents_K[k]])


@pytest.mark.parametrize("kind", ["cluster", "subclusters"])
def test_training_goes_on_while_an_old_graph_is_alive(kind: str) -> None:
    net = make_net(kind)
    optimizer = torch.optim.Adam(net.parameters())
    train_step(net, optimizer)
    alive = [parameter.sum() for parameter in net.parameters()]
    grow(net, *plan("split"), optimizer)
    train_step(net, optimizer)
    assert all(loss.requires_grad for loss in alive)


def test_training_after_a_permutation_is_the_permuted_training() -> None:
    parents_K, fresh_K = plan("permutation")
    ends = []
    for permute_first in (True, False):
        torch.manual_seed(1)
        net = ClusterNet(D, [H], K).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        x_BD = torch.randn(B, D, dtype=torch.float64)
        for step in range(6):
            if step == 3 and permute_first:
                grow(net, parents_K, fresh_K, optimizer)
            optimizer.zero_grad()
            net(x_BD).logsumexp(1).mean().backward()
            optimizer.step()
            scheduler.step()
        ends.append(net(x_BD) if permute_first else net(x_BD)[:, parents_K])
        assert scheduler.get_last_lr() == [pytest.approx(1e-5)]
    torch.testing.assert_close(ends[0], ends[1])


def test_growth_before_the_first_step_of_the_optimizer() -> None:
    net = ClusterNet(D, [H], K)
    optimizer = torch.optim.Adam(net.parameters())
    grow(net, *plan("split"), optimizer)
    train_step(net, optimizer)


def test_momentum_of_sgd_follows_too() -> None:
    net = ClusterNet(D, [H], K)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train_step(net, optimizer)
    old = optimizer.state[net.output_weight]["momentum_buffer"].clone()
    parents_K, fresh_K = plan("split")
    grow(net, parents_K, fresh_K, optimizer)
    new = optimizer.state[net.output_weight]["momentum_buffer"]
    assert torch.equal(new[~fresh_K], old[parents_K[~fresh_K]])
    assert new[fresh_K].eq(0).all()


def test_optimizer_and_net_restore_after_growth() -> None:
    net = SubclusterNets(D, H, K)
    optimizer = torch.optim.Adam(net.parameters())
    train_step(net, optimizer)
    grow(net, *plan("split"), optimizer)
    twin = SubclusterNets(D, H, K)
    twin.load_state_dict(net.state_dict())
    twin_optimizer = torch.optim.Adam(twin.parameters())
    twin_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    for one, its_optimizer in ((net, optimizer), (twin, twin_optimizer)):
        torch.manual_seed(2)
        train_step(one, its_optimizer)
    for got, want in zip(twin.parameters(), net.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["cluster", "subclusters"])
@pytest.mark.parametrize("rule", ["same", "same_w_noise", "random"])
def test_rules_renew_only_the_rows_asked_for(kind: str, rule: str) -> None:
    net = make_net(kind)
    parents_K, fresh_K = plan("split")
    grow(net, parents_K, fresh_K)
    old = {name: value.detach().clone() for name, value in net.row_parameters().items()}
    renew_rows(net, rule, fresh_K, torch.Generator().manual_seed(0))
    for name, value in net.row_parameters().items():
        assert torch.equal(value[~fresh_K], old[name][~fresh_K])
        assert torch.equal(value[fresh_K], old[name][fresh_K]) == (rule == "same")


def test_noise_has_the_size_asked_for() -> None:
    nets = SubclusterNets(16, 100, 50)
    old = {name: value.detach().clone() for name, value in nets.row_parameters().items()}
    renew_rows(nets, "same_w_noise", torch.ones(50, dtype=torch.bool), noise=0.3)
    for name, bound in (("hidden_weight", 0.25), ("output_weight", 0.1)):
        noise = nets.row_parameters()[name] - old[name]
        assert noise.std().item() == pytest.approx(0.3 * bound / 3**0.5, rel=0.05)


def test_children_take_the_weights_of_their_subclusters() -> None:
    net, nets = ClusterNet(D, [7, H], K), SubclusterNets(D, H, K)
    parents_K, fresh_K = plan("two splits and a merge")
    grow(net, parents_K, fresh_K)
    kept = net.output_weight[2].detach().clone()
    rows_from_subclusters(net, nets, parents_K, fresh_K)
    for child, (parent, side) in {0: (2, 0), 1: (2, 1), 3: (3, 0), 4: (3, 1)}.items():
        assert torch.equal(net.output_weight[child], nets.output_weight[parent, :, side])
        assert torch.equal(net.output_bias[child], nets.output_bias[parent, side])
    assert torch.equal(net.output_weight[2], kept)


def test_subcluster_weights_of_another_size_are_refused() -> None:
    net, nets = ClusterNet(D, [H + 1], K), SubclusterNets(D, H, K)
    parents_K, fresh_K = plan("split")
    with pytest.raises(ValueError, match=r"hidden sizes.*6 units.*5"):
        rows_from_subclusters(net, nets, parents_K, fresh_K)


def test_optimizer_rows_can_all_start_anew() -> None:
    net = ClusterNet(D, [H], K)
    optimizer = torch.optim.Adam(net.parameters())
    train_step(net, optimizer)
    grow_optimizer(optimizer, net.output_weight, torch.arange(K), torch.ones(K, dtype=torch.bool))
    assert optimizer.state[net.output_weight]["exp_avg"].eq(0).all()
