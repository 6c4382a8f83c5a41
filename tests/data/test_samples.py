"""The checks that every kind of input passes, and what is no error."""

import numpy as np
import pytest
import torch

from deepdpm.data import Dataset, make_labels, make_samples


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, 3)), "empty set"),
        (np.zeros((3, 0)), "no columns"),
        (np.zeros((1, 3)), "only one point"),
        (np.float32(3.0), "single number"),
        ([["a", "b"], ["c", "d"]], "text where numbers belong"),
        (np.array([[None, 1], [2, 3]]), "where numbers belong"),
        (np.ones((2, 2), complex), "where numbers belong"),
        ([[1.0, 2.0], [3.0]], "different lengths"),
        (torch.ones(2, 2, dtype=torch.complex64), "real numbers"),
        (torch.ones(2, 2).to_sparse(), "real numbers"),
    ],
)
def test_unusable_points_are_refused(x: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_samples(x, what="dataset.path=points.npy")
    assert "dataset.path=points.npy" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_rows_with_nan_or_infinity_are_named(bad: float) -> None:
    x_ND = np.zeros((30, 2))
    x_ND[[3, 7, 9, 11, 20, 29], 1] = bad
    with pytest.raises(ValueError, match=r"6 rows \(3, 7, 9, 11, 20, \.\.\.; counted from 0\)"):
        make_samples(x_ND)


def test_large_finite_values_are_no_error() -> None:
    """The sum of a row may overflow though each value is finite."""
    assert len(make_samples(np.full((3, 2), 3e38))) == 3


@pytest.mark.parametrize("kind", [">f8", "<f4", "f2", "i8", "u1", "?"])
def test_any_real_number_type_becomes_float32(kind: str) -> None:
    samples = make_samples(np.eye(3).astype(kind))
    assert torch.equal(samples.x, torch.eye(3))


def test_unusual_points_are_no_error() -> None:
    for x in (torch.zeros(5, 3), torch.ones(3, 50), torch.ones(2, 1, requires_grad=True), torch.ones(4)):
        assert len(make_samples(x)) == len(x)
    assert make_samples(torch.ones(4)).x.shape == (4, 1)
    read_only = np.zeros((2, 2))
    read_only.flags.writeable = False
    assert make_samples(read_only).x.sum() == 0


def test_one_point_is_enough_where_it_is_only_assigned() -> None:
    assert len(make_samples([[1.0, 2.0]], minimum=1)) == 1


def test_labels_of_every_type_become_int64() -> None:
    for labels in (np.array([0, 2, 1], "u1"), torch.tensor([0.0, 2.0, 1.0]), [[0], [2], [1]]):
        found = make_labels(labels, 3)
        assert found is not None
        assert found.tolist() == [0, 2, 1]
        assert found.dtype == torch.int64


def test_missing_labels_are_minus_one_and_none_where_all_are_missing() -> None:
    assert make_labels([-1, 4, float("nan")], 3).tolist() == [-1, 4, -1]
    assert make_labels([-1, float("nan")], 2) is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "2 labels for 3 points"),
        (["a", "b", "c"], "text where numbers belong"),
        ([0.5, 1, 2], r"not whole numbers in 1 row \(0;"),
        ([0, float("inf"), 2], r"not whole numbers in 1 row \(1;"),
        ([0, -2, 2], r"below -1 in 1 row \(1;"),
        (np.eye(3), r"shape \(3, 3\)"),
    ],
)
def test_unusable_labels_are_refused(labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_samples(np.zeros((3, 2)), labels)


def test_test_points_must_have_the_same_columns() -> None:
    with pytest.raises(ValueError, match="same columns"):
        Dataset("two", make_samples(np.zeros((3, 2))), make_samples(np.zeros((3, 4))))
