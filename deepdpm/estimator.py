"""The scikit-learn estimator: fit and predict in three lines, by the module and the loop of `deepdpm-train`.

Legend: N points, D dimensions of a point, E dimensions of a code, K clusters.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, check_random_state
from torch import Tensor

from deepdpm.callbacks import Trace
from deepdpm.cores import use_granted_cores
from deepdpm.data import CodesDataModule, Dataset, Samples
from deepdpm.data.samples import make_labels
from deepdpm.inverse import covariances_of_points, means_of_points
from deepdpm.metrics import evaluate
from deepdpm.module import DeepDPMModule
from deepdpm.moves import MoveSettings
from deepdpm.parameters import groups_of, parameters_of
from deepdpm.points import as_given, draw_rows, points_of
from deepdpm.priors import PriorSettings
from deepdpm.progress import EpochProgress
from deepdpm.saving import (
    Saved,
    arrays_from_plain,
    arrays_to_plain,
    read_checkpoint,
    restore,
    saved_state,
    write_checkpoint,
)
from deepdpm.settings import ModelSettings, OptimizerSettings, ScheduleSettings
from deepdpm.state import Progress


class DeepDPM(ClusterMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Cluster points without a number of clusters: a Dirichlet-process mixture amortized by a small net.

    The parameters carry the names and the defaults of the configuration, and the same seed gives the same
    labels as `deepdpm-train`. Points are anything that scikit-learn takes, or a torch tensor, which stays on
    its device and gives tensors back.

    Args:
        init_k: clusters at the start.
        prior: "niw" (full covariances) or "nig" (diagonal ones).
        alpha: concentration of the Dirichlet process.
        nu: the prior's degrees of freedom; None lets the data choose.
        kappa: points that the prior mean counts for; None lets the data choose.
        scale: where the prior's covariance comes from; see `deepdpm.priors.PriorSettings`.
        sigma_scale: its factor, for the scales "isotropic" and "data_std".
        transform_kind: `model.transform` (the plain name is a method's); see `deepdpm.transforms.Transform`.
        hidden: widths of the cluster net's hidden layers.
        cluster_loss: "kl", "isotropic" or "diagonal".
        moves: "search" or "published"; see `deepdpm.moves.MoveSettings`.
        sample_size: points that the search sees, and that `partial_fit` remembers.
        cluster_lr: learning rate of the cluster net.
        subcluster_lr: learning rate of the subcluster nets.
        start_moves: first epoch that ends with moves.
        moves_every: epochs from one step of moves to the next.
        polish_steps: training steps once moves rest.
        max_epochs: passes over the data at the most.
        batch_size: points in a batch; None for the power of two nearest N / 16, within 128 and 4096.
        accelerator: "auto", "cpu" or "cuda"; the points of a tensor decide for themselves.
        settings: any further setting by its configuration key, as `{"model.moves.seeds": 64}`.
        random_state: the seed; None draws one.
        verbose: show K and loss of each epoch.

    Attributes:
        n_clusters_: clusters that some training point belongs to.
        labels_: cluster of each training point (N,), from 0 on; after `partial_fit` of each of its points.
        weights_: of the mixture (K,); K counts a cluster without points too, should there be one.
        means_: centres in the space of the points (K, D).
        covariances_: (K, D, D), made anew each time. Both are exact for the transforms "none", "standard" and
            "min_max", and for "principal" where it keeps all axes. Where it leaves some out, the centres lie
            at the data's mean on those, and the covariances have rank E. With "normalize" and
            "standard_normalize" they describe the points of length 1 (rescaled and shifted back).
        tail_dof_: degrees of freedom of the clusters' tails, infinite for Gaussians: with nu of them a
            cluster's points have `nu / (nu - 2)` times the covariance, and none at 2 or below.
        cluster_ids_: identities (K,) that stay the same while clusters split and merge.
        history_: a row for each epoch: its number, K, the moves at its end, and the losses.
        n_iter_: epochs.
        module_: the trained `DeepDPMModule`.
        n_features_in_: D.
        feature_names_in_: names of the columns, where the points had some.

    >>> from sklearn.datasets import load_iris
    >>> points = load_iris().data
    >>> DeepDPM(max_epochs=3).fit_predict(points).shape
    (150,)
    """

    def __init__(
        self,
        *,
        init_k: int = ModelSettings.init_k,
        prior: str = PriorSettings.kind,
        alpha: float = PriorSettings.alpha,
        nu: float | None = PriorSettings.nu,
        kappa: float | None = PriorSettings.kappa,
        scale: str = PriorSettings.scale,
        sigma_scale: float = PriorSettings.sigma_scale,
        transform_kind: str = ModelSettings.transform,
        hidden: Sequence[int] = ModelSettings.hidden,
        cluster_loss: str = ModelSettings.cluster_loss,
        moves: str = MoveSettings.kind,
        sample_size: int = MoveSettings.sample_size,
        cluster_lr: float = OptimizerSettings.cluster_lr,
        subcluster_lr: float = OptimizerSettings.subcluster_lr,
        start_moves: int = ScheduleSettings.start_moves,
        moves_every: int = ScheduleSettings.moves_every,
        polish_steps: int = ScheduleSettings.polish_steps,
        max_epochs: int = 500,
        batch_size: int | None = None,
        accelerator: str = "auto",
        settings: Mapping[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        self.init_k = init_k
        self.prior = prior
        self.alpha = alpha
        self.nu = nu
        self.kappa = kappa
        self.scale = scale
        self.sigma_scale = sigma_scale
        self.transform_kind = transform_kind
        self.hidden = hidden
        self.cluster_loss = cluster_loss
        self.moves = moves
        self.sample_size = sample_size
        self.cluster_lr = cluster_lr
        self.subcluster_lr = subcluster_lr
        self.start_moves = start_moves
        self.moves_every = moves_every
        self.polish_steps = polish_steps
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.accelerator = accelerator
        self.settings = settings
        self.random_state = random_state
        self.verbose = verbose

    # Fit ---------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> Self:
        """Find clusters of points (N, D); y is not looked at.

        Raises:
            ValueError: a parameter out of range, or points that are too few, not finite or not numbers.
        """
        groups = self._groups()
        x_ND = points_of(self, X, reset=True, least=2)
        self._seed = self._draw_seed()
        module = DeepDPMModule(**groups, seed=self._seed, num_dims=x_ND.shape[1])
        self.history_: list[dict[str, Any]] = []
        self.n_samples_seen_ = 0
        self._remembered_ND = x_ND[:0]
        return self._train(module, x_ND, x_ND)._take_labels(X, x_ND)

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Go on with more points: the nets and clusters stay, and K changes as the new points ask for.

        It trains on the new points and on those seen before; of more than `sample_size` of these a uniform
        sample stands for all. The transform and the mean of the prior stay those of the first call. A model
        that was loaded from a run has seen no points: it keeps only clusters that the new ones support.

        Raises:
            ValueError: as `fit`, or points of another D.
        """
        if not hasattr(self, "module_"):
            return self.fit(X)
        self._groups()
        x_ND = points_of(self, X, reset=False)
        self.module_.progress = Progress()
        both_ND = torch.cat([self._remembered_ND.to(x_ND.device), x_ND])
        return self._train(self.module_, both_ND, x_ND)._take_labels(X, x_ND)

    def _groups(self) -> dict[str, dict[str, Any]]:
        groups = groups_of(self.get_params(deep=False))
        if self.max_epochs < 1:
            raise ValueError(f"max_epochs is {self.max_epochs}: give a whole number from 1 on.")
        return groups

    def _draw_seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _train(self, module: DeepDPMModule, x_ND: Tensor, new_ND: Tensor) -> Self:
        data = CodesDataModule(Dataset("points", Samples(x_ND, None)), self.batch_size, self._seed)
        trace = Trace(None)
        callbacks: list[Any] = [trace, EpochProgress(trace)] if self.verbose else [trace]
        on_device = x_ND.device.type != "cpu"
        use_granted_cores()
        with quiet_lightning():
            trainer = pl.Trainer(
                max_epochs=self.max_epochs,
                accelerator=x_ND.device.type if on_device else self.accelerator,
                devices=[x_ND.device.index or 0] if on_device else 1,
                callbacks=callbacks,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
            )
            trainer.fit(module.train(), datamodule=data)
        device = trainer.strategy.root_device
        # The trainer would keep the points alive.
        module._trainer = None
        self.module_ = module.eval().to(x_ND.device if on_device else device)
        first = len(self.history_)
        self.history_ += [row | {"epoch": first + row["epoch"]} for row in map(_history_row, trace.rows)]
        self.n_iter_ = len(self.history_)
        self._remember(new_ND)
        self._describe()
        return self

    def _remember(self, x_ND: Tensor) -> None:
        """Keep a uniform sample of all points seen, for `partial_fit`."""
        seen, most = self.n_samples_seen_ + len(x_ND), self.sample_size
        self.n_samples_seen_, earlier = seen, self.n_samples_seen_
        generator = torch.Generator().manual_seed(self._seed + seen)
        kept_ND: Tensor = self._remembered_ND.to(x_ND.device) if earlier else x_ND[:0]
        if len(kept_ND) + len(x_ND) > most:
            new = round(most * len(x_ND) / seen)
            kept_ND, x_ND = draw_rows(kept_ND, most - new, generator), draw_rows(x_ND, new, generator)
        self._remembered_ND = torch.cat([kept_ND, x_ND]) if earlier else x_ND

    def _describe(self) -> None:
        mixture, transform = self.module_.clusters.mixture, self.module_.transform
        self.weights_ = mixture.weights_K.cpu().numpy()
        self.tail_dof_ = mixture.tail_dof
        self.means_ = means_of_points(transform, mixture.means_KD.to(transform.shift_D.device)).cpu().numpy()
        self.cluster_ids_ = self.module_.cluster_ids_K.cpu().numpy()

    def _take_labels(self, X: Any, x_ND: Tensor) -> Self:
        labels_N = self.module_.assign(x_ND)[0]
        self.labels_ = as_given(X, labels_N)
        self.n_clusters_ = len(labels_N.unique())
        return self

    @property
    def covariances_(self) -> np.ndarray:
        """Covariances (K, D, D) in the space of the points."""
        if not hasattr(self, "module_"):
            raise AttributeError("covariances_ is there once the estimator is fitted")
        transform = self.module_.transform
        covariances_KEE = self.module_.clusters.mixture.covariances_KDD.to(transform.shift_D.device)
        return covariances_of_points(transform, covariances_KEE).cpu().numpy()

    # Predict -----------------------------------------------------------------------------------------------

    def _fitted(self, X: Any) -> tuple[DeepDPMModule, Tensor]:
        """The module where the points are, and the points."""
        check_is_fitted(self, "module_")
        x_ND = points_of(self, X, reset=False)
        return self.module_.to(x_ND.device) if isinstance(X, Tensor) else self.module_, x_ND

    def predict(self, X: Any) -> Any:
        """The cluster (N,) of each point (N, D), from 0 on."""
        module, x_ND = self._fitted(X)
        return as_given(X, module.assign(x_ND)[0])

    def predict_proba(self, X: Any) -> Any:
        """The net's probabilities (N, K) of the clusters for points (N, D)."""
        module, x_ND = self._fitted(X)
        return as_given(X, module.predict_proba(x_ND))

    def score_samples(self, X: Any) -> Any:
        """Log density (N,) of points (N, D) under the mixture, in nats.

        With "normalize" and "standard_normalize" it is that of the codes, with "principal" that on its axes.
        """
        module, x_ND = self._fitted(X)
        return as_given(X, module.score_samples(x_ND))

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log density of points (N, D): what a search over parameters maximises."""
        return float(self.score_samples(X).mean())

    def transform(self, X: Any) -> Any:
        """Codes (N, E) of points (N, D): what the clusters are found on."""
        module, x_ND = self._fitted(X)
        with torch.no_grad():
            return as_given(
                X, torch.cat([module.codes(part.to(module.device)) for part in x_ND.split(65_536)])
            )

    @property
    def _n_features_out(self) -> int:
        return self.module_.transform.num_dims

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw points (N, D) from the mixture, in the space of the points, and their clusters (N,).

        Raises:
            ValueError: fewer than one point.
        """
        check_is_fitted(self, "module_")
        if n_samples < 1:
            raise ValueError(f"n_samples is {n_samples}: give a whole number from 1 on.")
        mixture, transform = self.module_.clusters.mixture, self.module_.transform
        seed = self._draw_seed()
        generator = torch.Generator().manual_seed(seed)
        z_N = torch.multinomial(
            mixture.weights_K.cpu().double(), n_samples, replacement=True, generator=generator
        )
        whitener_KEE = mixture.whitening.inverse_KDD.cpu()
        noise_NE = torch.randn(n_samples, mixture.means_KD.shape[1], generator=generator, dtype=torch.float64)
        dof = mixture.tail_dof
        if math.isfinite(dof):
            u_N = np.random.default_rng(seed).chisquare(dof, n_samples) / dof
            noise_NE /= torch.from_numpy(u_N).sqrt()[:, None]
        y_NE = torch.empty_like(noise_NE)
        for k in z_N.unique().tolist():
            of_k = z_N == k
            offset = torch.linalg.solve_triangular(whitener_KEE[k], noise_NE[of_k].T, upper=False).T
            y_NE[of_k] = mixture.means_KD[k].cpu().double() + offset
        y_NE = y_NE.to(transform.shift_D.device)
        return means_of_points(transform, y_NE).cpu().numpy(), z_N.numpy()

    def explain(
        self,
        path: str | Path | None = None,
        X: Any = None,
        y: Any = None,
        *,
        title: str = "Clusters",
        plane: str = "pca",
        image_shape: tuple[int, int, int] | None = None,
    ) -> str | Path:
        """Write one HTML page about the clusters, or return its text where no path is given.

        It shows points (N, D), or those that `fit` remembers; with true labels y (N,), whole numbers with -1
        for none, also the classes. `plane` is "pca" or "umap"; `image_shape` (C, H, W) shows rows as images.

        Raises:
            ValueError: points of another D, labels of another length, or a file that cannot be written.
        """
        from deepdpm.report.clustering import Clustering
        from deepdpm.report.single import page, write_page

        check_is_fitted(self, "module_")
        points = self._remembered_ND if X is None else X
        module, x_ND = self._fitted(points)
        if len(x_ND) == 0:
            raise ValueError("A model that was loaded from a run remembers no points: give some as X.")
        labels_N, confidence_N = module.assign(x_ND)
        truth_N = None if y is None else make_labels(y, len(x_ND), "y")
        names = getattr(self, "feature_names_in_", None)
        dataset = Dataset(
            title,
            Samples(x_ND.cpu(), truth_N),
            feature_names=None if names is None else tuple(map(str, names)),
            image_shape=image_shape,
        )
        found = Clustering(
            title=title,
            dataset=dataset,
            labels_N=labels_N.cpu().numpy(),
            confidence_N=confidence_N.cpu().numpy(),
            module=module,
            history=self.history_,
            numbers={
                "log_likelihood": self.score(x_ND),
                **({} if y is None else evaluate(truth_N, labels_N)),
            },
            settings="\n".join(f"{name}: {value}" for name, value in self.get_params().items()),
            max_epochs=self.max_epochs,
        )
        return page(found, plane) if path is None else write_page(found, Path(path), plane)

    # Keep --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one file, which `deepdpm-predict` reads too; `load` brings it back.

        Raises:
            ValueError: the file cannot be written.
        """
        check_is_fitted(self, "module_")
        state = self.__getstate__()
        module = state.pop("module_")
        if not isinstance(state["random_state"], int | None):
            state["random_state"] = self._seed
        write_checkpoint(Path(path), module | {"estimator": arrays_to_plain(state)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, or the `model.ckpt` of a run; nothing in the file is executed.

        A run's estimator has `labels_` where `assignments.npz` lies beside the checkpoint.

        Raises:
            ValueError: the file is missing, damaged, or no model.
        """
        path = Path(path)
        saved = read_checkpoint(path)
        found = cls()
        if "estimator" in saved:
            found.__setstate__(arrays_from_plain(saved.pop("estimator")) | {"module_": saved})
        else:
            found._take_run(saved, path.with_name("assignments.npz"))
        return found

    def _take_run(self, saved: Saved, assignments: Path) -> None:
        self.set_params(**parameters_of(saved["hyper_parameters"]))
        self.module_ = restore(saved)
        self._seed, self.n_features_in_ = self.module_.seed, int(self.module_.num_dims or 0)
        rows = saved.get("callbacks", {}).get("Trace", {}).get("rows", [])
        self.history_ = [_history_row(row) for row in rows]
        self.n_iter_, self.n_samples_seen_ = len(rows), 0
        self._remembered_ND = torch.empty(0, self.n_features_in_)
        self._describe()
        self.n_clusters_ = len(self.weights_)
        if assignments.is_file():
            with np.load(assignments) as arrays:
                self.labels_ = arrays["labels"]
            self.n_clusters_ = len(np.unique(self.labels_))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "module_" in state:
            state["module_"] = saved_state(state["module_"])
            state["_remembered_ND"] = state["_remembered_ND"].cpu()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "module_" in state:
            state["module_"] = restore(state["module_"])
        super().__setstate__(state)


def _history_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("epoch", "num_clusters", "moves", "cluster_loss", "subcluster_loss")}


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning without its notes; and Ctrl-C as everywhere else in Python, where Lightning would exit."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Of a name that torch is about to rename; a user can do nothing about it.
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        logger.setLevel(level)
