"""Joint features: the module that learns an autoencoder and the clusters of its codes in turns.

Which phase an epoch belongs to is `deepdpm.alternation`'s; a clustering is `DeepDPMModule`'s, on codes that
are computed once at its start. Legend: N points, B of a batch, D raw dimensions, L dimensions of a code, E of
a transformed one, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor

from deepdpm import objective, restart
from deepdpm.alternation import AlternationSettings, Phase
from deepdpm.autoencoder import build_autoencoder, features_loss, load_published_weights
from deepdpm.kmeans import MOST_POINTS
from deepdpm.losses import label_loss
from deepdpm.module import DeepDPMModule, Plain
from deepdpm.moves import MoveSettings
from deepdpm.neighbours import Partners, check_more_points, confirmed
from deepdpm.pretraining import encode_rows
from deepdpm.priors import PriorSettings
from deepdpm.processes import average_gradients, share_from_first, sum_over_processes
from deepdpm.settings import ModelSettings, OptimizerSettings, ScheduleSettings, from_plain, to_plain
from deepdpm.state import Progress, generator_at, load_random_states, save_random_states
from deepdpm.stats import SufficientStats, squared_spacing
from deepdpm.structure import net_labels

TRACE_COLUMNS = ("phase", "alternation", "reconstruction_loss", "regularization_loss")


class JointModule(DeepDPMModule):
    """DeepDPM with an autoencoder before it: features and clusters are learned in turns (paper, section 4.4).

    Arguments are those of `DeepDPMModule`, `alternation` and, for the convolutional autoencoder, the shape of
    the images. `model.features.kind` must be "dense", "conv" or "strided", and `num_dims` is needed.

    Attributes:
        autoencoder: raw points to codes and back.
        epoch: the last epoch begun.
        ended: epochs of the clusterings whose moves came to rest before their time.

    >>> model = {"features": {"kind": "dense", "hidden_dims": [4], "latent_dim": 2}}
    >>> JointModule(model, num_dims=8).raw_codes(torch.zeros(3, 8)).shape
    torch.Size([3, 2])
    """

    trace_columns = TRACE_COLUMNS

    def __init__(
        self,
        model: ModelSettings | Plain | None = None,
        prior: PriorSettings | Plain | None = None,
        moves: MoveSettings | Plain | None = None,
        optimizer: OptimizerSettings | Plain | None = None,
        schedule: ScheduleSettings | Plain | None = None,
        seed: int = 0,
        num_dims: int | None = None,
        alternation: AlternationSettings | Plain | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, prior, moves, optimizer, schedule, seed, num_dims)
        assert num_dims is not None, "an autoencoder is built for known inputs"
        self.alternation = from_plain(AlternationSettings, alternation)
        shape = None if image_shape is None else [int(length) for length in image_shape]
        self.save_hyperparameters({"alternation": to_plain(self.alternation), "image_shape": shape})
        self.image_shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.autoencoder = build_autoencoder(self.model.features, num_dims, shape, with_weights=False)
        self.epoch, self.ended = 0, dict[int, int]()
        self._code_NL: Tensor | None = None
        self._partners: Partners | None = None
        self._counts_K = torch.empty(0)
        self._teaches_N = torch.empty(0, dtype=torch.bool)

    # Phases ------------------------------------------------------------------------------------------------

    @property
    def pretrain_epochs(self) -> int:
        """Epochs of pretraining: none where weights are given."""
        features = self.model.features
        return features.pretrain_epochs if features.weights is None else 0

    @property
    def phase(self) -> Phase:
        """The phase of the last epoch begun."""
        return self.alternation.phase_of(self.epoch, self.pretrain_epochs, self.ended)

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, as far as is known: a clustering may still end sooner."""
        return self.alternation.total_epochs(self.pretrain_epochs, self.ended)

    @property
    def clustering_epoch(self) -> int:
        """The epoch within the clustering."""
        return self.phase.epoch

    def _finish(self) -> None:
        if self.phase.kind == "cluster":
            self.ended[self.phase.alternation] = self.phase.epoch + 1

    # Training points ---------------------------------------------------------------------------------------

    def raw_codes(self, x: Tensor) -> Tensor:
        """Codes (N, L) of raw points (N, D), before the transform."""
        return self.autoencoder.encode(x.flatten(1))

    def _train_points(self) -> Tensor:
        return super()._train_points() if self._code_NL is None else self._code_NL

    def _encode_all(self) -> None:
        inputs_ND = super()._train_points().flatten(1)
        # A clone, since tensors made in inference mode cannot be trained on.
        self._code_NL = encode_rows(self.autoencoder, inputs_ND).to(self.device).clone()

    def setup(self, stage: str) -> None:
        """Load the weights of the autoencoder; clusters start with the first clustering.

        Raises:
            ValueError: weights that do not fit, or more starting clusters or neighbours than points.
        """
        num_points, init_k = len(self._train_points()), self.model.init_k
        if num_points < init_k:
            raise ValueError(f"model.init_k is {init_k}, but there are only {num_points} points: lower it.")
        if self._teaches:
            check_more_points(num_points, self.alternation.confirmed_by, "alternation.confirmed_by")
        if self.model.features.weights is not None and self.trainer.ckpt_path is None:
            load_published_weights(self.autoencoder, self.model.features.weights)
        self._keep_from_ddp()

    def on_fit_start(self) -> None:
        """Bring clusters that a checkpoint brought to the device."""
        if self.state is not None:
            super().on_fit_start()

    def configure_optimizers(self) -> Any:
        """What learns in this phase: the nets, or the autoencoder by Adam."""
        if self.phase.kind == "cluster":
            return super().configure_optimizers()
        rate, decay = self.alternation.ae_lr, self.alternation.ae_weight_decay
        if self.phase.kind == "pretrain":
            rate, decay = self.model.features.pretrain_lr, self.model.features.weight_decay
        parameters = [*self.autoencoder.parameters(), self.anchor]
        if self.phase.kind == "features" and self._teaches:
            parameters += self.cluster_net.parameters()
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=True)

    def on_train_start(self) -> None:
        """Forget the labels of earlier data; a run that had finished is not gone on with."""
        super().on_train_start()
        if self.trainer.current_epoch >= self.total_epochs:
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Enter the phase if it begins here, and begin the epoch's sums."""
        self.epoch = self.trainer.current_epoch
        if self.phase.kind == "cluster" and (self.phase.epoch == 0 or self._code_NL is None):
            self._encode_all()
        if self.phase.epoch == 0:
            self._enter()
        self.moves_of_epoch = []
        if self.phase.kind == "cluster":
            super().on_train_epoch_start()
            return
        self._code_NL = None
        if self.model.features.neighbours > 0 and self._partners is None:
            self._partners = Partners(super()._train_points(), self.model.features.neighbours)
        # Points, their reconstruction loss and their distance or cluster loss.
        self._totals_3 = torch.zeros(3, dtype=torch.float64, device=self.device)
        if self.alternation.cluster_assignments != "pseudo_label":
            self._forget_labels()
        if self.phase.kind == "features":
            self._stats = SufficientStats.zeros(self.num_clusters, self.transform.num_dims, self.device)

    @torch.no_grad()
    def _enter(self) -> None:
        """Begin a phase: clusters start, or start again, and what learns gets a new optimizer."""
        if self.phase.kind == "cluster":
            self.progress = Progress()
            if self.phase.alternation == 0:
                self.start_clusters(self.device)
            else:
                self._restart_clusters()
        if self.phase.kind == "features":
            self._counts_K = restart.first_counts(self.num_clusters).to(self.device)
            if self.alternation.cluster_assignments == "pseudo_label":
                code_NE = self._assign_all()
                if self._teaches:
                    self._teaches_N = confirmed(code_NE, self.labels_N, self.alternation.confirmed_by)
        self.trainer.strategy.setup_optimizers(self.trainer)
        if self.state is not None:
            self._share()

    @property
    def _teaches(self) -> bool:
        """Whether features phases teach labels."""
        return self.alternation.regularization == "label_loss"

    def _assign_all(self) -> Tensor:
        """Give each point the net's choice, by its transformed code (N, E), which is returned."""
        self._encode_all()
        code_NE = self.transform(self._train_points())
        self._code_NL = None
        self.labels_N = net_labels(self.cluster_net, code_NE)
        return code_NE

    def _restart_clusters(self) -> None:
        settings, device = self.alternation, self.device
        keeps_centres = settings.init_cluster_net_using_centers
        builds_nets = settings.reinit_net_at_alternation
        earlier = self.phase.alternation
        if builds_nets and not keeps_centres:
            self.start_clusters(device, earlier)
            return
        old = self.clusters
        centres_KE = old.mixture.means_KD
        if builds_nets:
            raw_KL = restart.raw_centres(self.transform, centres_KE)
            self._fit_transform(device)
            centres_KE = restart.transformed_centres(self.transform, raw_KL)
            self._build_nets(self.transform.num_dims, old.num_clusters)
            self.cluster_net.to(device), self.subcluster_nets.to(device)
        sample_ME = self._sample(MOST_POINTS, device, self.generator)
        scale = len(self._train_points()) / len(sample_ME)
        empirical = self.prior_settings.scale == "empirical"
        basis = self._total(device) if empirical or not keeps_centres else restart.as_one_set(centres_KE)
        prior = self.prior_settings.make(basis, earlier, squared_spacing(sample_ME))
        if keeps_centres:
            fresh = restart.from_centres(prior, centres_KE, sample_ME, scale)
        else:
            fresh = restart.from_net(prior, self.cluster_net, sample_ME, scale)
        self.state = restart.state_of(*fresh, old, sample_ME, scale, self.subcluster_nets, self.model)

    # An epoch ----------------------------------------------------------------------------------------------

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """A step of the phase; the autoencoder takes a batch in parts of its own size."""
        x, index_B = batch
        if self.phase.kind == "cluster":
            assert self._code_NL is not None
            super().training_step((self._code_NL[index_B.to(self._code_NL.device)], index_B), batch_idx)
            return
        parts = self._num_parts(len(x))
        if parts > 0:
            rows = zip(x.flatten(1).tensor_split(parts), index_B.tensor_split(parts), strict=True)
            for part, (x_BD, rows_B) in enumerate(rows):
                self._autoencoder_step(x_BD, rows_B, batch_idx, part)

    def _num_parts(self, num_rows: int) -> int:
        """Steps of the autoencoder over a batch, as many in all processes.

        None where one of them has a single row, which has no variance for the batch normalisation.
        """
        pretrains = self.phase.kind == "pretrain"
        size = self.model.features.pretrain_batch_size if pretrains else self.alternation.ae_batch_size
        most = least = num_rows
        if self.trainer.world_size > 1:
            bounds_2 = torch.tensor([num_rows, -num_rows], device=self.device)
            torch.distributed.all_reduce(bounds_2, torch.distributed.ReduceOp.MAX)
            most, least = int(bounds_2[0]), -int(bounds_2[1])
        return min(math.ceil(most / size), least // 2)

    def _autoencoder_step(self, x_BD: Tensor, index_B: Tensor, batch_idx: int, part: int) -> None:
        generator = generator_at(self.seed, self.epoch, batch_idx, part)
        partner_BD = None if self._partners is None else self._partners.rows(index_B, generator).to(x_BD)
        loss, reconstruction, code_BL = features_loss(
            self.autoencoder, x_BD, self.model.features, self.image_shape, generator, partner_BD
        )
        regularization = torch.zeros_like(reconstruction)
        if self.phase.kind == "features":
            with torch.autocast(self.device.type, enabled=False):
                regularization = self._regularization(self.transform(code_BL), index_B)
            loss = self.alternation.lambda_ * loss + 0.5 * self.alternation.beta * regularization
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        # DistributedDataParallel wants its one parameter once for each batch.
        self.manual_backward(loss + 0 * self.anchor if part == 0 else loss)
        average_gradients(self.parameters())
        optimizer.step()
        count = torch.full_like(reconstruction, len(x_BD))
        sums_3 = torch.stack([count, reconstruction, regularization]).detach()
        self._totals_3 += sums_3.to(self._totals_3)

    def _regularization(self, code_BE: Tensor, index_B: Tensor) -> Tensor:
        """Distances of transformed codes (B, E) to their centres, or their cluster or label loss, summed."""
        settings, mixture = self.alternation, self.clusters.mixture
        code = code_BE.detach()
        centre_KE = mixture.means_KD.to(code)
        if settings.cluster_assignments == "min_dist":
            z_B = torch.cdist(code, centre_KE).argmin(1)
        elif settings.cluster_assignments == "forward_pass":
            z_B = self.cluster_net(code).argmax(1)
        else:
            z_B = self.labels_N[index_B]
        self.labels_N[index_B] = z_B
        if settings.regularization == "dist_loss":
            total = (code_BE - centre_KE[z_B]).square().sum()
        elif self._teaches:
            teaches_B = self._teaches_N[index_B]
            total = label_loss(self.cluster_net.log_prob(code_BE[teaches_B]), z_B[teaches_B])
        else:
            target_BK = mixture.responsibilities_NK(code)
            log_r_BK = self.cluster_net.log_prob(code_BE)
            name = self.model.cluster_loss
            total = len(code) * objective.cluster_loss(name, log_r_BK, target_BK, code_BE, mixture)
        if settings.update_clusters_params != "none":
            stats = SufficientStats.from_labels(code, z_B, self.num_clusters)
            if settings.update_clusters_params == "only_centers":
                for tensor in (stats.count_K, stats.sum_KD):
                    sum_over_processes(tensor)
                self.state, self._counts_K = restart.moved_centres(self.clusters, self._counts_K, stats)
            else:
                self._stats = self._stats + stats
        return total

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """The end of an epoch of the phase, and of the run after the last phase."""
        if self.phase.kind == "cluster":
            super().on_train_epoch_end()
            numbers: dict[str, Any] = {}
        else:
            numbers = self._end_features_epoch()
        self.log_dict({"alternation": float(self.phase.alternation)}, sync_dist=True)
        self.extra_numbers = {"phase": self.phase.kind, "alternation": self.phase.alternation}
        self.extra_numbers |= dict.fromkeys(TRACE_COLUMNS[2:]) | numbers
        if self.epoch + 1 >= self.total_epochs:
            self.trainer.should_stop = True

    def _end_features_epoch(self) -> dict[str, Any]:
        count, reconstruction, regularization = sum_over_processes(self._totals_3).tolist()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.labels_N, torch.distributed.ReduceOp.MAX)
            for buffer in self.autoencoder.buffers():
                share_from_first(buffer)
        numbers: dict[str, Any] = {"reconstruction_loss": reconstruction / max(count, 1.0)}
        if self.phase.kind == "features":
            numbers["regularization_loss"] = regularization / max(count, 1.0)
            self._update_clusters()
            if self._teaches and self.phase.is_last_epoch:
                self._assign_all()
        self.log_dict(numbers | {"num_clusters": float(self.num_clusters)}, sync_dist=True)
        return numbers | {"cluster_loss": None, "subcluster_loss": None}

    def _update_clusters(self) -> None:
        if self.alternation.update_clusters_params not in ("all_params", "all_params_w_prior"):
            return
        for tensor in (self._stats.count_K, self._stats.sum_KD, self._stats.outer_KDD):
            sum_over_processes(tensor)
        with_prior = self.alternation.update_clusters_params == "all_params_w_prior"
        floor = None if with_prior else self.prior_settings.cov_const
        self.state = restart.refitted(self.clusters, self._stats, floor)

    def on_fit_end(self) -> None:
        """Let the codes and the neighbours go."""
        self._code_NL = self._partners = None

    # Checkpoints -------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """What `DeepDPMModule` keeps, and how far the alternation has come."""
        saved = super().get_extra_state()
        if self.state is None:
            saved = {"num_dims": self.num_dims, "labels_N": self.labels_N, "random": save_random_states()}
            saved |= {"generator": self.generator.get_state(), "coins": self.coins.get_state()}
        saved |= {"counts_K": self._counts_K, "teaches_N": self._teaches_N}
        return {**saved, "epoch": self.epoch, "ended": dict(self.ended)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over all that `get_extra_state` gave.

        Raises:
            ValueError: the state of a module of points of another D.
        """
        if "clusters" in state:
            super().set_extra_state(state)
        else:
            self._take_num_dims(state["num_dims"])
            self.labels_N = state["labels_N"]
            self.generator.set_state(state["generator"].cpu())
            self.coins.set_state(state["coins"].cpu())
            if self._trainer is not None:
                load_random_states(state["random"])
        self.epoch, self.ended = state["epoch"], dict(state["ended"])
        self._counts_K = state["counts_K"].to(self.device)
        self._teaches_N = state["teaches_N"].to(self.device)


def module_class(hyper_parameters: Plain) -> type[DeepDPMModule]:
    """The class of the module that was saved with these hyperparameters."""
    return JointModule if "alternation" in hyper_parameters else DeepDPMModule
