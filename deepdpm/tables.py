"""The command `deepdpm-table`: run what is missing of a table of experiments, then write its report.

A job is one row, one method, one setting of the row's own sweep and one seed. Each job is a process of its
own, so that a crash or a kill costs one job; the folder's lock (`jobs.py`) lets two commands share a table.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_class
from joblib import cpu_count  # that of the container and of taskset, not of the machine
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deepdpm.config import compose, config_hash, experiments_folder, to_plain
from deepdpm.jobs import finished_result, in_progress, read_result, write_result
from deepdpm.report import write_report

_WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """One run of a table: the command line of `deepdpm-train`, and the folder it writes."""

    overrides: tuple[str, ...]
    folder: Path
    dataset: str
    method: str
    seed: int
    config_hash: str

    @property
    def title(self) -> str:
        """What the progress shows."""
        return f"{self.folder.parent.parent.name} / {self.folder.parent.name}, seed {self.seed}"

    @property
    def table(self) -> str:
        """The table that the job belongs to."""
        return self.folder.parents[2].name

    def finished(self) -> bool:
        """Whether the folder holds the finished run of exactly these settings."""
        return finished_result(self.folder, self.config_hash) is not None

    def status(self) -> str | None:
        """The status of what lies in the folder, None where nothing does."""
        result = read_result(self.folder)
        return None if result is None else str(result.get("status"))

    def failed(self) -> bool:
        """Whether a run of exactly these settings failed in the folder."""
        result = read_result(self.folder) or {}
        return result.get("status") == "failed" and result.get("config_hash") == self.config_hash

    def data_missing(self) -> bool:
        """Whether the last try of the job ended for want of its data."""
        return bool((read_result(self.folder) or {}).get("data_missing", False))

    def too_slow(self) -> bool:
        """Whether the last try of the job was ended at the limit of seconds."""
        return (read_result(self.folder) or {}).get("too_slow") is not None


@dataclass
class Running:
    """The processes of this command, so that an interrupt ends them all."""

    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False

    def start(
        self, command: Sequence[str], log_file: Path, threads: int, group: str, limit: float | None
    ) -> int | None:
        """Run a command and return its exit status, None past its limit; a stopped table starts no more."""
        threaded = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment = {"WANDB_RUN_GROUP": group, **os.environ, **threaded}
        with log_file.open("wb") as log:
            with self.lock:
                if self.stopped:
                    return -signal.SIGINT
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                self.processes.add(process)
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return None
            finally:
                self.processes.discard(process)

    def stop(self) -> None:
        """End every process."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()


def plan(
    table: str, seeds: Sequence[int], out: Path, extra: Sequence[str] = (), rows: Sequence[str] | None = None
) -> list[Job]:
    """Return all jobs of a table, every row's first seed before the second.

    A row's file may name values to try in `hydra.sweeper.params` (the peers, values of init_k); the jobs are
    their product. An override in `extra` takes the place of the values of its key, and may itself be a sweep.

    Raises:
        ValueError: there is no such table or row, or a setting is refused.
    """
    folder = experiments_folder() / table
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not files:
        tables = sorted(path.name for path in experiments_folder().iterdir() if any(path.glob("*.yaml")))
        raise ValueError(f"There is no table {table!r}: choose one of {', '.join(tables)}.")
    if unknown := set(rows or ()) - set(files):
        raise ValueError(f"{table} has no row {sorted(unknown)[0]!r}: choose of {', '.join(files)}.")
    parser = OverridesParser.create()
    jobs: list[Job] = []
    for row in rows or [name for name, path in files.items() if not _chooses_sweeper(path)]:
        if _chooses_sweeper(files[row]):
            raise ValueError(f"{table}/{row} has a sweeper of its own: run deepdpm-train -m +{table}={row}.")
        swept = _sweep_of(files[row])
        parsed = parser.parse_overrides([*swept, *extra])
        keys = {override.get_key_element(): list(_values(override)) for override in parsed}
        for choice in product(*keys.values()):
            jobs += _seeds_of(
                f"+{table}={row}", [c for c in choice if c != "peer=none"], seeds, out / table / row
            )
    return sorted(jobs, key=lambda job: seeds.index(job.seed))


def _sweep_of(path: Path) -> list[str]:
    """Return the values to try that a row's file names, as overrides."""
    params = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") or {}
    return [f"{key}={value}" for key, value in params.items()]


def _chooses_sweeper(path: Path) -> bool:
    """Return whether a row chooses its values one after the other, by a sweeper such as Optuna's."""
    defaults = OmegaConf.select(OmegaConf.load(path), "defaults") or []
    return any("override /hydra/sweeper" in entry for entry in defaults)


def _values(override: Override) -> Iterator[str]:
    """Return the overrides that one sweep override stands for."""
    if not override.is_sweep_override():
        yield str(override.input_line)
        return
    for value in override.sweep_string_iterator():
        yield f"{override.get_key_element()}={value}"


def _data_of(config: DictConfig, seed: int) -> object:
    """Return the settings of the data set, as they are with this seed."""
    return to_plain(OmegaConf.merge(config, {"seed": seed}).dataset)


def _seeds_of(experiment: str, choice: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Job]:
    """Return the jobs of one row and one choice of settings.

    A method without chance runs for one seed, unless the seed draws the data too.
    """
    overrides = [experiment, *choice]
    try:
        config = compose([*overrides, f"seed={seeds[0]}"])
    except ValueError as error:
        raise ValueError(f"{' '.join(overrides)}: {error}") from None
    target = OmegaConf.select(config, "peer._target_")
    method = str(config.name or OmegaConf.select(config, "peer.name") or "deepdpm")
    settings = [text for text in choice if not text.startswith(("peer=", "+peer=", "name="))]
    dataset = config.dataset.name + ("_imbalanced" if config.dataset.get("imbalanced") else "")
    place = folder / "_".join([method, *map(_file_name, settings)])
    if target and getattr(get_class(target), "deterministic", False):
        first = _data_of(config, seeds[0])
        seeds = [seeds[0], *(seed for seed in seeds[1:] if _data_of(config, seed) != first)]
    jobs = []
    for seed in seeds:
        config.seed = seed
        job = (*overrides, f"seed={seed}"), place / f"seed_{seed}", dataset, method, seed
        jobs.append(Job(*job, config_hash(config)))
    return jobs


def _file_name(override: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in override.lstrip("+~"))


def command_of(job: Job) -> list[str]:
    """Return the command of a job; it waits for its folder, and does nothing where the run is finished."""
    quoted = str(job.folder.resolve()).replace("\\", "\\\\").replace("'", "\\'")
    return [sys.executable, "-m", "deepdpm.train", *job.overrides, f"hydra.run.dir='{quoted}'"]


def run_job(job: Job, running: Running, threads: int, limit: float | None = None) -> str:
    """Run one job and return how it ended; what ends without a result gets a result that says why."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if (read_result(job.folder) or {}).get("config_hash") != job.config_hash:
        # Else a job that fails at its start would spare the result of other settings, and say nothing.
        write_result(job.folder, _record(job, "pending"))
    log_file = job.folder / f"log_{os.getpid()}_{threading.get_ident()}.txt"
    code = running.start(command_of(job), log_file, threads, job.table, limit)
    log_file = log_file.replace(job.folder / "log.txt")
    if running.stopped:
        return "stopped"
    if code is None:
        error = f"It had not ended after {limit:g} seconds (--limit)."
        write_result(job.folder, {**_record(job, "failed", error), "too_slow": limit})
        return "too slow"
    if not job.failed() and (code != 0 or job.status() != "finished"):
        write_result(job.folder, _record(job, "failed", _last_line(log_file, code)))
    return "data missing" if job.data_missing() else str(job.status())


def _record(job: Job, status: str, error: str | None = None) -> dict[str, Any]:
    """Return the result of a job that left none."""
    return {
        "status": status,
        "error": error,
        "dataset": job.dataset,
        "name": job.method,
        "seed": job.seed,
        "overrides": list(job.overrides),
        "config_hash": job.config_hash,
    }


def _last_line(log_file: Path, code: int) -> str:
    lines = [line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "")
    if code < 0:
        return f"The process was ended by signal {-code}."
    return said or f"The process ended with exit status {code}."


class Table:
    """The jobs of one command: which are left, which run, how each ended."""

    def __init__(self, jobs: Sequence[Job], retry_failed: bool = False, limit: float | None = None) -> None:
        self.jobs, self.limit = list(jobs), limit
        self.outcomes: Counter[str] = Counter()
        self._running = Running()
        self._missing: set[str] = set()
        self._lock = threading.Lock()
        for job in self.jobs:
            if job.status() is None and not in_progress(job.folder):
                write_result(job.folder, _record(job, "pending"))
        self._left = deque(job for job in self.jobs if self._to_run(job, retry_failed))
        self.skipped = len(self.jobs) - len(self._left)

    @staticmethod
    def _to_run(job: Job, retry_failed: bool) -> bool:
        """Whether a job is left: what finished is not, nor what failed, but for want of data."""
        if job.finished():
            return False
        return retry_failed or job.data_missing() or not job.failed()

    def run(self, workers: int, report: Callable[[Job, str], None]) -> None:
        """Run what is left, `workers` jobs at a time; `report` hears how each job ended."""
        threads = max(1, cpu_count() // workers)
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._work, threads, report) for _ in range(workers)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._running.stop()
                raise

    def _work(self, threads: int, report: Callable[[Job, str], None]) -> None:
        """Take jobs until none is left; a job that another command runs goes to the end of the queue."""
        waited: set[Path] = set()
        while not self._running.stopped:
            with self._lock:
                if not self._left:
                    return
                job = self._left.popleft()
            if in_progress(job.folder):
                waited.add(job.folder)
                self._left.append(job)
                time.sleep(_WAIT_SECONDS)
                continue
            if job.finished():
                outcome = "finished elsewhere"
            elif job.folder in waited and job.failed():
                outcome = "failed elsewhere"
            else:
                outcome = self._run(job, threads)
            self.outcomes[outcome] += 1
            report(job, outcome)

    def _run(self, job: Job, threads: int) -> str:
        """Run a job, unless the data that an earlier job did not find are its data too."""
        if job.dataset in self._missing:
            error = f"An earlier job of the table did not find the data of {job.dataset}."
            write_result(job.folder, {**_record(job, "failed", error), "data_missing": True})
            return "data missing"
        outcome = run_job(job, self._running, threads, self.limit)
        if outcome == "data missing":
            self._missing.add(job.dataset)
        return outcome


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a table and write its report; the exit status is 1 where a job failed."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console()
    out: Path = options.out
    try:
        jobs = plan(options.table, options.seeds, out, options.overrides, options.rows)
        table = Table(jobs, options.retry_failed, options.limit)
    except (ValueError, OSError) as error:
        print(f"deepdpm-table: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console.print(f"{options.table}: {len(jobs)} jobs, {table.skipped} of them done before.")
    try:
        _run_with_progress(table, options.jobs, console)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        raise SystemExit(130) from None
    page = write_report([out / options.table], out / options.table / "report", f"DeepDPM: {options.table}")
    failed = sum(job.failed() and not job.data_missing() and not job.too_slow() for job in jobs)
    ends = ", ".join(f"{count} {outcome}" for outcome, count in sorted(table.outcomes.items()))
    console.print(f"{ends or 'Nothing was left to run'}. Report: {page}", soft_wrap=True)
    if failed:
        console.print(f"{failed} jobs failed: see the report; --retry-failed runs them again.")
        raise SystemExit(1)


def _run_with_progress(table: Table, workers: int, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("jobs", total=len(table.jobs), completed=table.skipped)

        def report(job: Job, outcome: str) -> None:
            progress.console.print(f"{job.title}: {outcome}{_numbers(job)}", soft_wrap=True, highlight=False)
            progress.advance(task)

        table.run(workers, report)


def _numbers(job: Job) -> str:
    """Return what a finished job reached, or why it failed, as the end of a line."""
    result = read_result(job.folder) or {}
    if result.get("status") == "failed":
        return f" ({result.get('error')})"
    shown = [
        ("num_clusters", "K {:.0f}"),
        ("nmi", "NMI {:.3f}"),
        ("acc", "ACC {:.3f}"),
        ("seconds", "{:.1f} s"),
    ]
    parts = [text.format(result[key]) for key, text in shown if isinstance(result.get(key), int | float)]
    return f" ({', '.join(parts)})" if parts else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepdpm-table",
        description="Run what is missing of a table of experiments, one process a job, then write its "
        "report. What is finished is skipped, so the same command goes on after a stop.",
    )
    parser.add_argument("table", help="a folder of experiments/, such as embedded")
    parser.add_argument(
        "overrides", nargs="*", help="settings for every job, such as peer=none or prior.nu=12,20"
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=(0,), help="how many seeds, or a list such as 0,3,5 (1)"
    )
    parser.add_argument(
        "--rows", type=lambda text: text.split(","), help="only these rows, such as mnist,usps"
    )
    parser.add_argument("--jobs", type=_positive, default=1, help="jobs at a time; they share the cores (1)")
    parser.add_argument("--limit", type=_positive, help="seconds after which a job is ended as too slow")
    parser.add_argument("--retry-failed", action="store_true", help="run failed jobs again")
    parser.add_argument("--out", type=Path, default=Path("multirun_outputs"), help="where (multirun_outputs)")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    """Return the seeds: "3" is 0, 1, 2 and "3,5" is 3 and 5.

    Example:
        >>> _seeds("3"), _seeds("3,5"), _seeds("7,")
        ((0, 1, 2), (3, 5), (7,))
    """
    if "," not in text:
        return tuple(range(_positive(text)))
    return tuple(dict.fromkeys(int(part) for part in text.split(",") if part))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    main()
