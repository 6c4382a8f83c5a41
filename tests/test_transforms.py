"""Transforms: what they promise of their outputs, and that raw units do not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepdpm.transforms import Transform

N, D = 500, 5


@pytest.fixture
def x_ND() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    skewed = -torch.rand(N, D, generator=generator).double().log()
    return (skewed * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5])).float()


def rotation() -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double())[0]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_principal_codes_do_not_know_scale_shift_or_rotation(x_ND: Tensor, scale: float) -> None:
    moved_ND = (scale * (x_ND.double() @ rotation() + 3.0)).float()
    first, second = Transform("principal").fit(x_ND)(x_ND), Transform("principal").fit(moved_ND)(moved_ND)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_principal_codes_are_uncorrelated_and_of_unit_mean_variance(x_ND: Tensor) -> None:
    y_NE = Transform("principal").fit(x_ND)(x_ND).double()
    covariance = torch.cov(y_NE.T, correction=0)
    assert y_NE.mean(0).abs().max() < 1e-5
    assert covariance.diagonal().mean().item() == pytest.approx(1, abs=1e-4)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-4
    assert (y_NE.pow(3).sum(0) > 0).all()


def test_principal_leaves_out_axes_without_variance_or_evidence(x_ND: Tensor) -> None:
    doubled = torch.cat((x_ND, x_ND[:, :2], torch.ones(N, 3)), 1)
    assert Transform("principal").fit(doubled).num_dims == D
    assert Transform("principal").fit(torch.randn(20, 30)).num_dims == 4
    assert Transform("principal").fit(torch.randn(3, 30)).num_dims == 2
    assert Transform("principal").fit(torch.randn(7_000, 90)).num_dims == 77
    constant = Transform("principal").fit(torch.ones(4, 3))
    assert torch.equal(constant(torch.ones(4, 3)), torch.zeros(4, 1))


def test_simple_transforms(x_ND: Tensor) -> None:
    assert torch.equal(Transform("none").fit(x_ND)(x_ND), x_ND)
    torch.testing.assert_close(Transform("normalize").fit(x_ND)(x_ND).norm(dim=1), torch.ones(N))
    unit = Transform("min_max").fit(x_ND)(x_ND)
    torch.testing.assert_close(unit.amin(0), torch.zeros(D))
    torch.testing.assert_close(unit.amax(0), torch.ones(D))
    standard = Transform("standard").fit(x_ND)(x_ND)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(D))
    both = Transform("standard_normalize").fit(x_ND)(x_ND)
    torch.testing.assert_close(both, standard / standard.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("kind", ["min_max", "standard", "standard_normalize", "normalize", "principal"])
def test_constant_columns_and_zero_codes_give_finite_codes(kind: str) -> None:
    x_ND = torch.zeros(6, 3)
    x_ND[:3, 0] = 2.0
    assert torch.isfinite(Transform(kind).fit(x_ND)(x_ND)).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["none", "min_max", "standard", "principal"])
def test_inverse_and_volume(x_ND: Tensor, kind: str) -> None:
    transform = Transform(kind).fit(x_ND)  # type: ignore[arg-type]
    y_NE = transform(x_ND)
    torch.testing.assert_close(transform.inverse_means(y_NE).float(), x_ND, rtol=1e-4, atol=1e-4)
    covariance = torch.cov(y_NE.double().T)[None]
    raw = torch.cov(x_ND.double().T)
    torch.testing.assert_close(transform.inverse_covariances(covariance)[0], raw, rtol=1e-4, atol=1e-4)
    change = (torch.logdet(covariance[0]) - torch.logdet(raw)) / 2
    assert transform.log_volume == pytest.approx(change.item(), abs=1e-3)


def test_the_norm_has_no_inverse(x_ND: Tensor) -> None:
    with pytest.raises(ValueError, match=r"model.transform=normalize has no inverse"):
        Transform("normalize").fit(x_ND).inverse_means(x_ND)


@pytest.mark.parametrize("kind", ["principal", "standard"])
def test_chunks_and_state_dicts_give_the_same(x_ND: Tensor, kind: str) -> None:
    whole = Transform(kind).fit(x_ND)  # type: ignore[arg-type]
    chunked = Transform(kind).fit(lambda: x_ND.split(77))  # type: ignore[arg-type]
    torch.testing.assert_close(chunked(x_ND), whole(x_ND), rtol=1e-4, atol=1e-5)
    loaded = Transform(kind, num_dims=1)  # type: ignore[arg-type]
    loaded.load_state_dict(whole.state_dict())
    assert torch.equal(loaded(x_ND), whole(x_ND))
