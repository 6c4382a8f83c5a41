"""The command `deepdpm-train`: compose, check, instantiate, fit, evaluate, write.

Legend: N points, D dimensions, K clusters.
"""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from deepdpm import config, results
from deepdpm.multirun import for_sweep
from deepdpm.progress import EpochProgress, closing_table

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from deepdpm.data import CodesDataModule, Samples
    from deepdpm.module import DeepDPMModule

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A run was stopped by Ctrl-C or SIGTERM, and can go on from its checkpoint.

    Args:
        signum: the signal.
        result: what `result.json` holds.
    """

    def __init__(self, signum: int, result: Mapping[str, Any]) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.result = signum, result


@dataclass
class Outcome:
    """What a method found on the training set, and on the test set where there is one.

    Attributes:
        labels_N: cluster of each training point, in 0..K-1; -1 for noise, where a method knows noise.
        confidence_N: probability of that cluster.
        cluster_ids_K: identities that stay the same across moves.
        seconds: of fit and final prediction.
        epochs: passes over the data.
        log_likelihood: mean log density of a training point.
        test_labels: as `labels_N`, for the test set.
        device: where it was computed.
    """

    labels_N: np.ndarray
    confidence_N: np.ndarray
    cluster_ids_K: np.ndarray
    seconds: float
    epochs: int | None = None
    log_likelihood: float | None = None
    test_labels: np.ndarray | None = None
    device: str = "cpu"


def run(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one configuration in a folder; return what `result.json` holds.

    A folder that already holds the finished run of these settings is left as it is; one with a stopped run of
    them goes on.

    Raises:
        ValueError: a mistake of the user, as one sentence; `result.json` then has the status "failed".
        Stopped: Ctrl-C or SIGTERM ended the training.
    """
    from deepdpm.jobs import claimed, finished_result

    with claimed(folder):
        found = finished_result(folder, config.config_hash(cfg))
        if found is not None:
            log.warning("%s holds the finished run of these settings: nothing to do.", folder)
            return found
        job = _Job(cfg, folder, overrides)
        try:
            return job.run()
        except BaseException as error:
            job.leave_failure(error)
            raise


class _Job:
    """One run: what it knows when it ends, however it ends."""

    def __init__(self, cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> None:
        self.cfg, self.folder = cfg, folder
        self.tracking: Any = None
        self.is_main = True
        self.begun = False
        self.memory = results.Memory()
        self.record: dict[str, Any] = {
            "status": "failed",
            "error": None,
            "dataset": str(OmegaConf.select(cfg, "dataset.name")),
            "name": cfg.name or OmegaConf.select(cfg, "peer.name"),
            "seed": cfg.seed,
            **dict.fromkeys(
                ("num_clusters", "num_components", "nmi", "ari", "acc", "silhouette", "log_likelihood")
            ),
            **dict.fromkeys(("test", "seconds", "epochs", "polish_epochs", "phases", "device")),
            **dict.fromkeys(("fit_memory_mb", "peak_memory_mb", "peak_device_memory_mb")),
            "num_points": None,
            "num_dims": None,
            "config_hash": config.config_hash(cfg),
            "overrides": [o for o in overrides if not o.startswith("hydra.")],
            "git_revision": results.git_revision(),
            "versions": results.versions(),
            "started": results.now(),
            "finished": None,
        }

    def run(self) -> dict[str, Any]:
        """Check, load, fit, evaluate and write."""
        import pytorch_lightning as pl

        from deepdpm.cores import use_granted_cores
        from deepdpm.jobs import resume_from

        config.check(self.cfg, self.record["overrides"])
        self.memory.begin()
        use_granted_cores()
        pl.seed_everything(self.cfg.seed, workers=True, verbose=False)
        started = time.perf_counter()
        data = _make_data(self.cfg)
        train = data.dataset.train
        self.record |= {"dataset": data.name, "num_points": len(train), "num_dims": data.num_dims}
        self.record["phases"] = {"load": round(time.perf_counter() - started, 4)}
        self.memory.loaded()
        peer = OmegaConf.select(self.cfg, "peer._target_")
        resumed = None if peer else resume_from(self.cfg.ckpt_path, self.folder, self.record["config_hash"])
        self.begun = True
        results.write_text(self.folder / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))
        outcome = self._peer(data) if peer else self._fit(data, resumed)
        self.record["fit_memory_mb"] = self.memory.since_loaded_mb()
        if self.is_main:
            self._write(outcome, data)
        return self.record

    def _fit(self, data: "CodesDataModule", resumed: Path | None) -> Outcome:
        from deepdpm.callbacks import LastCheckpoint, StopOnSignal, Trace, save_checkpoint
        from deepdpm.joint import JointModule
        from deepdpm.phases import PhaseEnds
        from deepdpm.timing import phase_seconds, polish_epochs, time_phases
        from deepdpm.tracking import Pictures

        cfg, trainer_cfg = self.cfg, self.cfg.trainer
        module = make_module(cfg, data)
        trace = Trace(
            self.folder / "trace.csv",
            data.dataset.train.labels,
            trainer_cfg.evaluate_every_n_epochs,
            module.trace_columns,
        )
        console = Console(stderr=True, highlight=False)
        stop = StopOnSignal(console.print)
        callbacks = [trace, stop]
        shows = trainer_cfg.lightning.get("enable_progress_bar", True)
        if shows:
            callbacks.append(EpochProgress(trace, console))
        self._start_tracking()
        if isinstance(module, JointModule):
            told = console if shows else None
            callbacks.append(PhaseEnds(trace, told, data.dataset, self.tracking))
        if self.tracking is not None:
            callbacks.append(Pictures(self.tracking, trace, data.dataset.train.x))
        last = self.folder / "last.ckpt"
        callbacks.append(
            LastCheckpoint(last, trainer_cfg.checkpoint_every_n_epochs, self.record["config_hash"], stop)
        )
        logger = None if self.tracking is None else self.tracking.logger
        trainer = make_trainer(cfg, callbacks, logger, self.folder, module.total_epochs)
        time_phases(trainer)
        self.is_main = trainer.is_global_zero
        try:
            with _tamed_interrupt():
                trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        finally:
            self._note_progress(trace, trainer)
        if stop.signum is not None:
            raise Stopped(stop.signum, self.record)
        if module.state is None:
            save_checkpoint(trainer, last)
            raise ValueError(
                f"the run ended with epoch {len(trace.rows) - 1}, within the pretraining, before there were "
                f"clusters: raise trainer.lightning.max_epochs; with ckpt_path={self.folder} it goes on."
            )
        save_checkpoint(trainer, self.folder / "model.ckpt")
        trained = trace.seconds
        outcome = assign(module, data, trainer.strategy.root_device, trained)
        outcome.epochs = len(trace.rows)
        self.record["phases"] |= phase_seconds(trainer, outcome.seconds, outcome.seconds - trained)
        self.record["polish_epochs"] = polish_epochs(module)
        if self.is_main:
            last.unlink(missing_ok=True)
        return outcome

    def _start_tracking(self) -> None:
        from deepdpm.tracking import WandbTracking

        if OmegaConf.select(self.cfg, "tracking._target_") is None:
            return
        settings = config.make_settings(config.to_plain(self.cfg.tracking))
        parts = [self.record[key] for key in ("name", "dataset", "seed")]
        name = "-".join(str(part) for part in parts if part is not None)
        group = self.folder.parent.name if _is_multirun() else None
        self.tracking = WandbTracking(settings, self.folder, name, group)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self.tracking.start(config.to_plain(self.cfg))

    def _note_progress(self, trace: Any, trainer: "pl.Trainer") -> None:
        """Keep what the last epoch knew, for a run that ends here."""
        self.record |= {
            "epochs": len(trace.rows),
            "seconds": round(trace.seconds, 3),
            "device": results.device_name(trainer.strategy.root_device),
        }
        if trace.rows:
            last = trace.rows[-1]
            self.record |= {key: last[key] for key in ("num_clusters", "nmi", "ari", "acc")}
            self.record["num_components"] = last["num_clusters"]

    def _peer(self, data: "CodesDataModule") -> Outcome:
        """Cluster by another method, for the tables."""
        self._start_tracking()
        samples = data.dataset.train
        labels = None if samples.labels is None else samples.labels[samples.labels >= 0]
        num_classes = None if labels is None else len(labels.unique())
        started = time.perf_counter()
        fit = hydra.utils.instantiate(self.cfg.peer).fit(
            samples.x.flatten(1).numpy(), num_classes, self.cfg.seed
        )
        seconds = time.perf_counter() - started
        return Outcome(
            labels_N=np.asarray(fit.labels_N, dtype=np.int64),
            confidence_N=np.asarray(fit.confidence_N, dtype=np.float32),
            cluster_ids_K=np.arange(fit.num_components),
            seconds=seconds,
            epochs=fit.epochs,
            log_likelihood=fit.log_likelihood,
        )

    def _write(self, outcome: Outcome, data: "CodesDataModule") -> None:
        results.write_arrays(
            self.folder / "assignments.npz",
            labels=outcome.labels_N,
            confidence=outcome.confidence_N,
            cluster_ids=outcome.cluster_ids_K,
        )
        self.record |= summarize(outcome, data, self.cfg.seed)
        self.record |= {"status": "finished", "error": None, **self._ending()}
        if self.tracking is not None:
            self.tracking.summarize(self.record, self.folder / "model.ckpt")
            self.tracking.finish()
        results.write_json(self.folder / "result.json", self.record)

    def leave_failure(self, error: BaseException) -> None:
        """Write `result.json` for a run that ends early; a failure at the start spares an earlier result."""
        from deepdpm.data import DataMissingError

        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        self.record["data_missing"] = isinstance(error, DataMissingError)
        reason = str(error) if isinstance(error, ValueError | Stopped) else f"{type(error).__name__}: {error}"
        self.record |= {"status": "stopped" if stopped else "failed", "error": reason, **self._ending()}
        if self.tracking is not None:
            self.tracking.finish(failed=True)
        path = self.folder / "result.json"
        earlier = (results.read_json(path) or {}).get("status")
        if not self.is_main or (not self.begun and earlier in ("finished", "stopped")):
            return
        try:
            results.write_json(path, self.record)
        except ValueError:
            log.error("%s could not be written.", path)

    def _ending(self) -> dict[str, Any]:
        return {
            "peak_memory_mb": self.memory.peak_mb(),
            "peak_device_memory_mb": results.peak_device_memory_mb(),
            "finished": results.now(),
        }


def _is_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


class _tamed_interrupt:
    """Make of Lightning's exit at a second Ctrl-C a KeyboardInterrupt again."""

    def __enter__(self) -> None:
        self.handler = signal.getsignal(signal.SIGINT)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, self.handler)
            raise KeyboardInterrupt from error


def _make_data(cfg: DictConfig) -> "CodesDataModule":
    from deepdpm.data import CodesDataModule

    source = hydra.utils.instantiate(cfg.dataset, _convert_="all")
    data = CodesDataModule(source, cfg.trainer.batch_size, cfg.seed)
    data.setup()
    return data


def make_module(cfg: DictConfig, data: "CodesDataModule") -> "DeepDPMModule":
    """Make the module of a checked configuration for a data set; `alternation=joint` has an autoencoder."""
    from deepdpm.joint import JointModule
    from deepdpm.module import DeepDPMModule

    common = {**config.settings_of(cfg), "seed": cfg.seed, "num_dims": data.num_dims}
    if not OmegaConf.select(cfg, "alternation._target_"):
        return DeepDPMModule(**common)
    alternation = config.make_settings(config.to_plain(cfg.alternation))
    return JointModule(**common, alternation=alternation, image_shape=data.dataset.image_shape)


def make_trainer(
    cfg: DictConfig, callbacks: list[Any], logger: Any, folder: Path, total_epochs: int | None = None
) -> "pl.Trainer":
    """Make Lightning's trainer; a run without a limit of epochs gets that of its module, if it has one.

    Raises:
        ValueError: Lightning refuses an argument, or the machine lacks the device.
    """
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    arguments = {**config.to_plain(cfg.trainer.lightning), "enable_progress_bar": False}
    if arguments.get("max_epochs") == -1 and total_epochs is not None:
        arguments["max_epochs"] = total_epochs
    try:
        return pl.Trainer(**arguments, callbacks=callbacks, logger=logger or False, default_root_dir=folder)
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"trainer.lightning is refused by Lightning: {reason}") from error


def assign(module: "DeepDPMModule", data: "CodesDataModule", device: Any, seconds: float) -> Outcome:
    """Assign all points on the device that trained the module (Lightning has moved it back to the CPU)."""
    started = time.perf_counter()
    module = module.to(device).eval()
    x_ND = data.dataset.train.x
    labels_N, confidence_N = module.assign(x_ND)
    seconds += time.perf_counter() - started
    test = data.dataset.test
    return Outcome(
        labels_N=labels_N.cpu().numpy(),
        confidence_N=confidence_N.cpu().numpy(),
        cluster_ids_K=module.cluster_ids_K.cpu().numpy(),
        seconds=seconds,
        log_likelihood=float(module.score_samples(x_ND).mean()),
        test_labels=None if test is None else module.assign(test.x)[0].cpu().numpy(),
        device=results.device_name(device),
    )


def summarize(outcome: Outcome, data: "CodesDataModule", seed: int) -> dict[str, Any]:
    """Return the numbers of `result.json`: metrics of the training set, and of the test set if any."""
    dataset = data.dataset
    summary = {
        **_scores(dataset.train, outcome.labels_N, seed),
        "num_components": len(outcome.cluster_ids_K),
        "log_likelihood": outcome.log_likelihood,
        "seconds": round(outcome.seconds, 3),
        "epochs": outcome.epochs,
        "device": outcome.device,
        "test": None,
    }
    if dataset.test is not None and outcome.test_labels is not None:
        summary["test"] = _scores(dataset.test, outcome.test_labels, seed)
    return summary


def _scores(samples: "Samples", labels_N: np.ndarray, seed: int) -> dict[str, Any]:
    from deepdpm.metrics import evaluate, silhouette

    return {
        "num_clusters": len(np.unique(labels_N[labels_N >= 0])),
        **evaluate(samples.labels, labels_N),
        "silhouette": silhouette(samples.x, labels_N, seed=seed),
    }


def _job(cfg: DictConfig) -> float | None:
    """Run what Hydra composed; return the log-likelihood, which a sweeper may maximize."""
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    # Lightning's, of a name that torch is about to rename; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        result = run(cfg, folder, list(HydraConfig.get().overrides.task))
    except Stopped as stopped:
        _say(
            f"{stopped} after {stopped.result['epochs']} epochs; "
            f"the same command with hydra.run.dir={folder} goes on."
        )
        raise SystemExit(128 + stopped.signum) from None
    except ValueError as error:
        if _is_multirun():
            log.error("%s: %s", folder.name, error)
            raise
        _say(str(error))
        raise SystemExit(1) from None
    if result["status"] == "finished" and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        table = closing_table(result, folder)
        Console(width=max(Console().width, (table.min_width or 0) + 4), highlight=False).print(table)
    return result["log_likelihood"]


def _reason(error: Exception) -> str:
    return (
        f"{error.filename}: {error.strerror}."
        if isinstance(error, OSError) and error.filename
        else str(error)
    )


def _say(sentence: str) -> None:
    print(f"deepdpm-train: {sentence}", file=sys.stderr)


_main = hydra.main(version_base="1.3", config_path=str(config.config_folder()), config_name="config")(_job)


def main() -> None:
    """Run the command; a mistake of the user ends it with one sentence and status 1."""
    show_all = "HYDRA_FULL_ERROR" in os.environ
    # Else Hydra prints errors its own way, which takes more than a sentence.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.argv[1:] = for_sweep(sys.argv[1:])
    try:
        _main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader (`| head`) has gone; nothing is left to be flushed at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if show_all:
            raise
        known = isinstance(error, HydraException | OmegaConfBaseException)
        _say(config.clear_message(error) if known else _reason(error))
        raise SystemExit(1) from None


if __name__ == "__main__":
    # By its own name the module can be found again by the processes of a launcher.
    from deepdpm.train import main as _by_name

    _by_name()
