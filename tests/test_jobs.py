"""The lock of a run's folder: one holder at a time, gone with its process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deepdpm.jobs import claimed, finished_result, in_progress, read_result, write_result

# Only the lock: a process that imports no torch starts at once.
_HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_in_progress_until_the_holder_is_killed(tmp_path: Path) -> None:
    assert not in_progress(tmp_path)
    process = _holder(tmp_path)
    try:
        assert in_progress(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not in_progress(tmp_path)


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    threading.Timer(1.0, process.kill).start()
    begin = time.monotonic()
    with claimed(tmp_path):
        assert time.monotonic() - begin > 0.5
    process.communicate()


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path):
        raise RuntimeError
    assert not in_progress(tmp_path)


def test_helpers_of_distributed_training_do_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = _holder(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with claimed(tmp_path):
        pass
    process.kill()
    process.communicate()


def test_only_a_finished_run_of_the_same_settings_counts(tmp_path: Path) -> None:
    assert finished_result(tmp_path, "aa") is None
    write_result(tmp_path, {"status": "finished", "config_hash": "aa"})
    assert finished_result(tmp_path, "aa") == {"status": "finished", "config_hash": "aa"}
    assert finished_result(tmp_path, "bb") is None
    write_result(tmp_path, {"status": "failed", "config_hash": "aa"})
    assert finished_result(tmp_path, "aa") is None


def test_a_result_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_result(tmp_path, {"status": "pending"})
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "pending"}
    assert os.listdir(tmp_path) == ["result.json"]
    (tmp_path / "result.json").write_text("{")
    assert read_result(tmp_path) is None
