"""Each loss equals its formula written as a plain loop and keeps its digits far from the origin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepdpm.losses import (
    diagonal_loss,
    isotropic_loss,
    kl_loss,
    subcluster_diagonal_loss,
    subcluster_isotropic_loss,
    subcluster_log_joint,
)

B, K, D = 9, 4, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def codes(offset: float = 0.0) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64) + offset


def probabilities(columns: int) -> Tensor:
    return torch.randn(B, columns, dtype=torch.float64).softmax(1)


def plain_distance(x: Tensor, mean: Tensor, variance: Tensor) -> float:
    return sum(((a - m) ** 2 / v).item() for a, m, v in zip(x, mean, variance, strict=True))


@pytest.mark.parametrize("columns", [1, 2, K])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_kl_equals_the_plain_loop(columns: int, eps: float) -> None:
    r_BK, target_BK = probabilities(columns), probabilities(columns)
    total = 0.0
    for r, target in zip(r_BK.tolist(), target_BK.tolist(), strict=True):
        r_sum, target_sum = sum(v + eps for v in r), sum(v + eps for v in target)
        for a, t in zip(r, target, strict=True):
            smooth_r, smooth_t = (a + eps) / r_sum, (t + eps) / target_sum
            total += smooth_t * math.log(smooth_t / smooth_r)
    assert kl_loss(r_BK.log(), target_BK, eps).item() == pytest.approx(total / B, abs=1e-12)


def test_kl_is_finite_with_a_finite_gradient_at_the_corners_of_the_simplex() -> None:
    logits_BK = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = kl_loss(logits_BK.log_softmax(1), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    loss.backward()
    assert loss.isfinite()
    assert logits_BK.grad is not None
    assert logits_BK.grad.isfinite().all()


def test_kl_is_least_at_the_target() -> None:
    target_BK = probabilities(K)
    assert kl_loss(target_BK.log(), target_BK).item() == pytest.approx(0, abs=1e-12)
    assert kl_loss(probabilities(K).log(), target_BK) > 0


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_cluster_distances_equal_the_plain_loop(offset: float) -> None:
    r_BK, x_BD = probabilities(K), codes(offset)
    means_KD = torch.randn(K, D, dtype=torch.float64) + offset
    variances_KD = torch.rand(K, D, dtype=torch.float64) + 0.1
    for loss, scale_KD in (
        (isotropic_loss(r_BK, x_BD, means_KD), torch.ones_like(means_KD)),
        (diagonal_loss(r_BK, x_BD, means_KD, variances_KD), variances_KD),
    ):
        total = 0.0
        for i in range(B):
            for k in range(K):
                total += r_BK[i, k].item() * plain_distance(x_BD[i], means_KD[k], scale_KD[k])
        assert loss.item() == pytest.approx(total / (B * K), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_float32_codes_far_from_the_origin_keep_their_digits(scale: float) -> None:
    x_BD = (codes(offset=1000.0) * scale).float()
    means_KD = x_BD[:K]
    r_BK = probabilities(K).float()
    exact = isotropic_loss(r_BK.double(), x_BD.double(), means_KD.double())
    loss = isotropic_loss(r_BK, x_BD, means_KD)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_subcluster_distances_equal_the_plain_loop(offset: float) -> None:
    rsub_B2, x_BD, z_B = probabilities(2), codes(offset), torch.randint(K, (B,))
    means_K2D = torch.randn(K, 2, D, dtype=torch.float64) + offset
    variances_K2D = torch.rand(K, 2, D, dtype=torch.float64) + 0.1
    for loss, scale_K2D in (
        (subcluster_isotropic_loss(rsub_B2, x_BD, z_B, means_K2D), torch.ones_like(means_K2D)),
        (subcluster_diagonal_loss(rsub_B2, x_BD, z_B, means_K2D, variances_K2D), variances_K2D),
    ):
        total = 0.0
        for i, z in enumerate(z_B.tolist()):
            for j in range(2):
                total += rsub_B2[i, j].item() * plain_distance(x_BD[i], means_K2D[z, j], scale_K2D[z, j])
        assert loss.item() == pytest.approx(total / B, rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_subcluster_log_joint_is_the_normal_density(offset: float) -> None:
    x_BD, z_B = codes(offset), torch.randint(K, (B,))
    means_K2D = torch.randn(K, 2, D, dtype=torch.float64) + offset
    factors_K2DD = (
        torch.randn(K, 2, D, D, dtype=torch.float64).tril(-1) + torch.eye(D, dtype=torch.float64) * 0.7
    )
    weights_K2 = torch.rand(K, 2, dtype=torch.float64)
    whiteners_K2DD = torch.linalg.inv(factors_K2DD)
    log_det_K2 = whiteners_K2DD.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_scales_K2 = weights_K2.log() + log_det_K2 - D / 2 * math.log(2 * math.pi)
    actual_B2 = subcluster_log_joint(x_BD, z_B, means_K2D, whiteners_K2DD, log_scales_K2)
    for i, z in enumerate(z_B.tolist()):
        normals = torch.distributions.MultivariateNormal(means_K2D[z], scale_tril=factors_K2DD[z])
        expected_2 = weights_K2[z].log() + normals.log_prob(x_BD[i])
        torch.testing.assert_close(actual_B2[i], expected_2, rtol=1e-6, atol=1e-6)


def test_losses_pass_gradcheck() -> None:
    z_B = torch.randint(K, (B,))
    x_BD, logits_BK = codes().requires_grad_(), torch.randn(B, K, dtype=torch.float64, requires_grad=True)
    logits_B2 = torch.randn(B, 2, dtype=torch.float64, requires_grad=True)
    means_KD, variances_KD = (
        torch.randn(K, D, dtype=torch.float64),
        torch.rand(K, D, dtype=torch.float64) + 0.5,
    )
    means_K2D = torch.randn(K, 2, D, dtype=torch.float64)
    variances_K2D = torch.rand(K, 2, D, dtype=torch.float64) + 0.5
    target_BK = probabilities(K)

    def losses(x: Tensor, logits: Tensor, sublogits: Tensor) -> tuple[Tensor, ...]:
        r, rsub = logits.softmax(1), sublogits.softmax(1)
        return (
            kl_loss(logits.log_softmax(1), target_BK),
            isotropic_loss(r, x, means_KD),
            diagonal_loss(r, x, means_KD, variances_KD),
            subcluster_isotropic_loss(rsub, x, z_B, means_K2D),
            subcluster_diagonal_loss(rsub, x, z_B, means_K2D, variances_K2D),
        )

    assert torch.autograd.gradcheck(losses, (x_BD, logits_BK, logits_B2))


def test_losses_do_not_depend_on_the_order_of_the_clusters() -> None:
    r_BK, x_BD, target_BK, order_K = probabilities(K), codes(), probabilities(K), torch.randperm(K)
    means_KD = torch.randn(K, D, dtype=torch.float64)
    torch.testing.assert_close(
        kl_loss(r_BK[:, order_K].log(), target_BK[:, order_K]), kl_loss(r_BK.log(), target_BK)
    )
    torch.testing.assert_close(
        isotropic_loss(r_BK[:, order_K], x_BD, means_KD[order_K]), isotropic_loss(r_BK, x_BD, means_KD)
    )
