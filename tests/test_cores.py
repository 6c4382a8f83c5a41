"""Threads of torch and the cores that are granted."""

import joblib
import pytest
import torch

from deepdpm.cores import use_granted_cores


@pytest.mark.parametrize(("granted", "chosen", "used"), [(1, 2, 1), (2, 2, 2), (64, 2, 2), (2, 1, 1)])
def test_torch_takes_what_is_granted_and_no_more_than_the_user_said(
    granted: int, chosen: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(joblib, "cpu_count", lambda: granted)
    try:
        torch.set_num_threads(chosen)
        use_granted_cores()
        assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)
