"""The runner of tables: what is finished is skipped, what fails is told, and two runners share the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepdpm import tables
from deepdpm.jobs import write_result
from deepdpm.tables import Job, Table, _parser

# What deepdpm-train does as far as the runner can see: hold the folder, skip what is finished, write the
# result. It imports no torch, so that it starts at once.
_FAKE_TRAIN = """
import json, os, sys, time
from pathlib import Path
from filelock import FileLock
folder, config_hash, seconds, fate = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
path = folder / "result.json"
def write(**result):
    path.write_text(json.dumps({"config_hash": config_hash, **result}))
with FileLock(folder / ".lock"):
    found = json.loads(path.read_text()) if path.exists() else {}
    if (found.get("status"), found.get("config_hash")) != ("finished", config_hash):
        with (folder / "starts").open("a") as file:
            file.write("x")
        time.sleep(seconds)
        if fate == "crash":
            os.kill(os.getpid(), 9)
        if fate == "refuse":
            sys.exit("ValueError: prior.nu is 3: it must be more than 9.")
        if fate == "missing":
            write(status="failed", error="The codes are not there.", data_missing=True)
            sys.exit("The codes are not there.")
        write(status="finished", nmi=0.5, seed=0, group=os.environ.get("WANDB_RUN_GROUP"))
"""


@pytest.fixture
def make_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes jobs whose command is the one above, with the fate of each."""

    def make(*fates: str, seconds: float = 0.0) -> list[Job]:
        folder = tmp_path / "table" / "row" / "m"
        jobs = [
            Job((f"seed={seed}",), folder / f"seed_{seed}", f"set_{fate}", "m", seed, f"hash{seed}")
            for seed, fate in enumerate(fates)
        ]
        by_folder = dict(zip([job.folder for job in jobs], fates, strict=True))

        def command_of(job: Job) -> list[str]:
            arguments = [str(job.folder), job.config_hash, str(seconds), by_folder[job.folder]]
            return [sys.executable, "-c", _FAKE_TRAIN, *arguments]

        monkeypatch.setattr(tables, "command_of", command_of)
        return jobs

    return make


def run(jobs: list[Job], workers: int = 1, retry_failed: bool = False) -> dict[str, int]:
    table = Table(jobs, retry_failed)
    table.run(workers, lambda job, outcome: None)
    return dict(table.outcomes)


def starts(job: Job) -> int:
    file = job.folder / "starts"
    return len(file.read_text()) if file.exists() else 0


def test_what_is_finished_is_not_run_again(make_jobs) -> None:
    jobs = make_jobs("good", "good", "good")
    assert run(jobs[:1]) == {"finished": 1}
    assert run(jobs, workers=2) == {"finished": 2}
    assert run(jobs) == {}
    assert [starts(job) for job in jobs] == [1, 1, 1]


def test_other_settings_in_the_same_folder_run_again(make_jobs) -> None:
    (job,) = make_jobs("good")
    write_result(job.folder, {"status": "finished", "config_hash": "of other settings"})
    assert run([job]) == {"finished": 1}


def test_a_failure_stops_nothing_and_is_tried_again_on_request_only(make_jobs) -> None:
    jobs = make_jobs("refuse", "crash", "good")
    assert run(jobs) == {"failed": 2, "finished": 1}
    assert run(jobs) == {}
    assert run(jobs, retry_failed=True) == {"failed": 2}
    assert [starts(job) for job in jobs] == [2, 2, 1]


def test_a_failure_says_why(make_jobs) -> None:
    refused, crashed = make_jobs("refuse", "crash")
    run([refused, crashed])
    result = json.loads((refused.folder / "result.json").read_text())
    assert result["error"] == "ValueError: prior.nu is 3: it must be more than 9."
    assert result["overrides"] == ["seed=0"]
    assert "signal 9" in json.loads((crashed.folder / "result.json").read_text())["error"]


def test_a_job_past_the_limit_is_ended_and_told(make_jobs) -> None:
    (job,) = make_jobs("good", seconds=60.0)
    table = Table([job], limit=0.5)
    table.run(1, lambda job, outcome: None)
    assert dict(table.outcomes) == {"too slow": 1}
    assert job.too_slow()
    assert job.failed()
    assert run([job]) == {}


def test_missing_data_are_looked_for_once_and_again_the_next_time(make_jobs) -> None:
    jobs = make_jobs("missing", "missing", "good")
    for tries in (1, 2):
        assert run(jobs)["data missing"] == 2
        assert [starts(job) for job in jobs] == [tries, 0, 1]
    assert all(job.data_missing() for job in jobs[:2])


def test_runs_of_a_table_are_grouped_by_its_name(make_jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = make_jobs("good")
    for given, group in ((None, "table"), ("mine", "mine")):
        monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
        if given:
            monkeypatch.setenv("WANDB_RUN_GROUP", given)
        (job.folder / "result.json").unlink(missing_ok=True)
        run([job])
        assert json.loads((job.folder / "result.json").read_text())["group"] == group


def test_jobs_wait_visibly(make_jobs) -> None:
    jobs = make_jobs("good", "good")
    Table(jobs)
    assert [job.status() for job in jobs] == ["pending", "pending"]


def test_two_runners_share_a_table(make_jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_WAIT_SECONDS", 0.05)
    jobs = make_jobs(*["good"] * 6, seconds=0.2)
    assert sum(run([*jobs, *reversed(jobs)], workers=3).values()) == 12
    assert [starts(job) for job in jobs] == [1] * 6


def test_a_job_whose_runner_was_killed_is_waited_for_and_not_doubled(make_jobs, monkeypatch) -> None:
    monkeypatch.setattr(tables, "_WAIT_SECONDS", 0.05)
    (job,) = make_jobs("good", seconds=1.0)
    orphan = subprocess.Popen(tables.command_of(job))
    while not starts(job):
        time.sleep(0.02)
    assert run([job]) == {"finished elsewhere": 1}
    orphan.wait()
    assert starts(job) == 1


def test_a_killed_job_runs_again(make_jobs) -> None:
    (job,) = make_jobs("good", seconds=1.0)
    process = subprocess.Popen(tables.command_of(job))
    while not starts(job):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run([job]) == {"finished": 1}
    assert starts(job) == 2


def test_settings_of_jobs_stand_before_or_behind_options() -> None:
    for arguments in (["x", "a=1", "--seeds", "2", "b=2"], ["--seeds", "2", "x", "a=1", "b=2"]):
        options = _parser().parse_intermixed_args(arguments)
        assert (options.table, options.overrides, options.seeds) == ("x", ["a=1", "b=2"], (0, 1))
