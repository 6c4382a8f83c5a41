"""The LightningModule: when what happens. The mathematics lies in mixture, moves and structure.

Legend: N points, M of a sample, B of a batch, D raw dimensions, E dimensions of a code, K clusters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepdpm import objective, structure
from deepdpm.epoch import EpochSums
from deepdpm.kmeans import MOST_POINTS
from deepdpm.mixture import Mixture
from deepdpm.moves import Move, MoveSettings
from deepdpm.nets import ClusterNet, SubclusterNets
from deepdpm.optimizers import let_fall, make_optimizers, step_schedulers
from deepdpm.prediction import CHUNK, ClusteringModel
from deepdpm.priors import NormalPrior, PriorSettings
from deepdpm.processes import average_gradients, share_learned
from deepdpm.search import revise, search
from deepdpm.settings import ModelSettings, OptimizerSettings, ScheduleSettings, from_plain, to_plain
from deepdpm.state import (
    ClusterState,
    Progress,
    fit_subclusters,
    generator_at,
    load_random_states,
    save_random_states,
    to_device,
)
from deepdpm.stats import SufficientStats, squared_spacing
from deepdpm.transforms import Transform

__all__ = ["DeepDPMModule", "ModelSettings", "MoveSettings", "OptimizerSettings", "ScheduleSettings"]

Plain = Mapping[str, Any]
_LEAST_POLISH_EPOCHS = 5


class DeepDPMModule(ClusteringModel):
    """DeepDPM on codes: nets that amortize a mixture's assignments while moves change its number of clusters.

    The settings are objects or plain dicts of the same. `num_dims` is D; None learns it from the data.

    Attributes:
        cluster_ids_K: stable identities (K,).
        moves_of_epoch: what changed at the end of the last epoch.
        labels_N: each training point's cluster when the last epoch met it (numbered as before its moves).
        trace_columns: what the run's trace says of an epoch besides; `extra_numbers` holds it.

    >>> DeepDPMModule(ModelSettings(init_k=2), num_dims=3).num_clusters
    2
    """

    trace_columns: tuple[str, ...] = ()

    def __init__(
        self,
        model: ModelSettings | Plain | None = None,
        prior: PriorSettings | Plain | None = None,
        moves: MoveSettings | Plain | None = None,
        optimizer: OptimizerSettings | Plain | None = None,
        schedule: ScheduleSettings | Plain | None = None,
        seed: int = 0,
        num_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = from_plain(ModelSettings, model)
        self.prior_settings = from_plain(PriorSettings, prior)
        self.moves = from_plain(MoveSettings, moves)
        self.optimizer = from_plain(OptimizerSettings, optimizer)
        self.schedule = from_plain(ScheduleSettings, schedule)
        self.seed, self.num_dims = seed, num_dims
        self.save_hyperparameters(
            {
                "model": to_plain(self.model),
                "prior": to_plain(self.prior_settings),
                "moves": to_plain(self.moves),
                "optimizer": to_plain(self.optimizer),
                "schedule": to_plain(self.schedule),
                "seed": seed,
                "num_dims": num_dims,
            }
        )
        # Draws of starts, samples and fresh rows; and, apart from them, the coins of published moves.
        self.generator = torch.Generator().manual_seed(seed)
        self.coins = torch.Generator().manual_seed(seed + 1)
        self.extra_numbers: dict[str, Any] = {}
        self.transform = Transform(self.model.transform, num_dims or 1)
        self.state: ClusterState | None = None
        self.moves_of_epoch: list[Move] = []
        self.labels_N = torch.empty(0, dtype=torch.long)
        self.progress = Progress()
        # DistributedDataParallel wants a parameter that every step uses; all others grow, and stay out of it.
        self.anchor = nn.Parameter(torch.zeros(()))
        self._build_nets(num_dims or 1, self.model.init_k)

    def _build_nets(self, num_dims: int, num_clusters: int) -> None:
        model = self.model
        seed = int(torch.randint(2**31 - 1, (1,), generator=self.generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cluster_net = ClusterNet(num_dims, list(model.hidden), num_clusters, model.temperature)
            self.subcluster_nets = SubclusterNets(
                num_dims, model.subcluster_hidden, num_clusters, model.subcluster_temperature
            )

    @property
    def total_epochs(self) -> int | None:
        """None: the trainer's limit holds."""
        return None

    # Training points ------------------------------------------------------------------------------------

    def _train_points(self) -> Tensor:
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError("Give trainer.fit a data module: datamodule=CodesDataModule(...).")
        return cast(Tensor, data.dataset.train.x)

    def _chunks(self, x_ND: Tensor, device: torch.device) -> Iterator[Tensor]:
        for x_BD in x_ND.split(CHUNK):
            yield x_BD.to(device).flatten(1)

    def _sample(self, most: int, device: torch.device, generator: torch.Generator) -> Tensor:
        """Transformed codes (M, E) of at most so many random training points."""
        x_ND = self._train_points()
        if len(x_ND) <= most:
            index_M = torch.arange(len(x_ND))
        else:
            index_M = torch.randperm(len(x_ND), generator=generator)[:most].sort().values
        parts = [x_ND[index_B.to(x_ND.device)].to(device) for index_B in index_M.split(CHUNK)]
        with torch.no_grad():
            return torch.cat([self.transform(x_BD.flatten(1)) for x_BD in parts])

    # Start -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Fit the transform, the prior and the starting clusters to the training points."""
        if stage == "fit" and self.state is None:
            x_ND = self._train_points()
            self.num_dims = math.prod(x_ND.shape[1:])
            if len(x_ND) < self.model.init_k:
                raise ValueError(
                    f"model.init_k is {self.model.init_k}, but there are only {len(x_ND)} points: lower it."
                )
            self.start_clusters(self.trainer.strategy.root_device)
        self._keep_from_ddp()

    def _keep_from_ddp(self) -> None:
        """Leave DistributedDataParallel no parameter but the anchor: see `average_gradients`."""
        names = [name for name, _ in self.named_parameters()] + [name for name, _ in self.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [name for name in names if name != "anchor"]

    @torch.no_grad()
    def start_clusters(self, device: torch.device, earlier_clusterings: int = 0) -> None:
        """Start from the training points: transform, nets, prior, clusters."""
        self._fit_transform(device)
        self._build_nets(self.transform.num_dims, self.model.init_k)
        self.cluster_net.to(device), self.subcluster_nets.to(device)
        sample_ME = self._sample(MOST_POINTS, device, self.generator)
        self.state = structure.start_clusters(
            self.prior_settings.make(self._total(device), earlier_clusterings, squared_spacing(sample_ME)),
            structure.Learners(self.cluster_net, self.subcluster_nets),
            sample_ME,
            len(self._train_points()),
            self.model,
            self.generator,
            fits_prior=self.moves.kind == "published",
        )

    def _fit_transform(self, device: torch.device) -> None:
        x_ND = self._train_points()
        self.transform.to(device).fit(lambda: self._chunks(x_ND, device))

    def _total(self, device: torch.device) -> SufficientStats:
        """The statistics of all transformed codes, as one set."""
        total = SufficientStats.zeros(1, self.transform.num_dims, device)
        for x_BD in self._chunks(self._train_points(), device):
            code_BE = self.transform(x_BD)
            total = total + SufficientStats.from_weights(code_BE, torch.ones_like(code_BE[:, :1]))
        return total

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Two Adams, and a scheduler for each if one is set."""
        cluster = [*self.cluster_net.parameters(), self.anchor]
        return make_optimizers(self.optimizer, cluster, self.subcluster_nets.parameters())

    def on_fit_start(self) -> None:
        """Bring the clusters to the device; all processes begin with those of process 0."""
        self.state = to_device(self.clusters, self.device)
        self.state = replace(self.state, ids_K=self.state.ids_K.cpu())
        self._share()

    def on_train_start(self) -> None:
        """Forget the labels of earlier data; a run that had finished is not gone on with."""
        x_ND = self._train_points()
        if len(self.labels_N) != len(x_ND):
            self.labels_N = torch.full((len(x_ND),), -1, device=self.device)
        self.labels_N = self.labels_N.to(self.device)
        if self.progress.finished:
            self._finish()

    def _finish(self) -> None:
        """What follows when moves rest and the nets are polished: the end."""
        self.trainer.should_stop = True

    # An epoch ----------------------------------------------------------------------------------------------

    @property
    def clustering_epoch(self) -> int:
        """The epoch that the schedule counts."""
        return self.current_epoch

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's sums."""
        self._forget_labels()
        epoch = self.clustering_epoch
        m_step = self.schedule.m_step_due(epoch, self.progress.last_move) and not self.progress.settled
        subclusters = self._trains_subclusters(epoch)
        published = self.moves.kind == "published" and any(self.schedule.published_moves(epoch))
        wants = (m_step, m_step and subclusters, published and not self.model.ignore_subclusters)
        num_dims = self.clusters.mixture.means_KD.shape[1]
        self.sums = EpochSums.zeros(self.num_clusters, num_dims, self.device, wants)
        self.moves_of_epoch = []

    def _forget_labels(self) -> None:
        # Processes share the largest label of a point: so none may know one of an earlier epoch.
        if self.trainer.world_size > 1:
            self.labels_N.fill_(-1)

    def _trains_subclusters(self, epoch: int) -> bool:
        # Once moves rest nothing looks at subclusters any more.
        return not (
            self.model.ignore_subclusters or self.progress.at_rest or epoch < self.schedule.start_subclusters
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step of both nets, and the batch's part of the epoch's sums, in 32 bits at least."""
        with torch.autocast(self.device.type, enabled=False):
            self._clustering_step(*batch)

    def _clustering_step(self, x: Tensor, index_B: Tensor) -> None:
        with torch.no_grad():
            x_BD = self.transform(x.flatten(1))
            log_joint_BK = self.clusters.mixture.log_joint_NK(x_BD)
            log_density_B = log_joint_BK.logsumexp(1)
            target_BK = (log_joint_BK - log_density_B[:, None]).exp()
        if self.progress.at_rest:
            self._polish_lr()
        log_r_BK = self.cluster_net.log_prob(x_BD)
        model, state = self.model, self.clusters
        cluster_loss = objective.cluster_loss(model.cluster_loss, log_r_BK, target_BK, x_BD, state.mixture)
        loss = model.cluster_loss_weight * cluster_loss + 0 * self.anchor
        z_B = log_r_BK.detach().argmax(1)
        self.labels_N[index_B] = z_B
        subcluster_loss = None
        if self._trains_subclusters(self.clustering_epoch):
            log_rsub_B2 = self.subcluster_nets.log_prob(x_BD, z_B)
            subcluster_loss = objective.subcluster_loss(
                model.subcluster_loss, log_rsub_B2, x_BD, z_B, state.subclusters
            )
            loss = loss + model.subcluster_loss_weight * subcluster_loss
            self.sums.add_sub_stats(x_BD, z_B, log_rsub_B2.detach().exp())
        elif self.sums.hard_stats is not None:
            self.sums.add_sub_stats(x_BD, z_B, torch.ones_like(x_BD[:, :1]).expand(-1, 2))
        self._step(loss, subcluster_loss is not None)
        if self.sums.stats is not None:
            r_BK = target_BK if self.schedule.statistics == "mixture" else log_r_BK.detach().exp()
            if self.schedule.means == "kmeans":
                r_BK = nn.functional.one_hot(r_BK.argmax(1), self.num_clusters).to(r_BK)
            self.sums.add_stats(x_BD, r_BK, state.mixture.precisions(log_joint_BK))
        self.sums.add_batch(log_density_B, cluster_loss, subcluster_loss)

    def _step(self, loss: Tensor, with_subclusters: bool) -> None:
        optimizers = cast(list[Any], self.optimizers())
        used = optimizers if with_subclusters else optimizers[:1]
        for optimizer in used:
            optimizer.zero_grad()
        self.manual_backward(loss)
        average_gradients(self.parameters())
        for optimizer in used:
            optimizer.step()

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """The M-step, the moves that are due, and what follows for the learning rates."""
        self.sums.reduce()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.labels_N, torch.distributed.ReduceOp.MAX)
        log_density, cluster_loss, subcluster_loss = self.sums.means()
        trained_subclusters = self._trains_subclusters(self.clustering_epoch)
        self.progress.see(log_density)
        self._m_step()
        if self.moves.kind == "search":
            self._search_moves(cluster_loss)
        else:
            self._published_moves()
        if self.moves_of_epoch:
            self.progress.last_move = self.clustering_epoch
            self._share()
        self._step_schedulers(cluster_loss, trained_subclusters)
        logged = {"num_clusters": float(self.num_clusters), "cluster_loss": cluster_loss}
        logged["log_likelihood"] = log_density + self.transform.log_volume
        if trained_subclusters:
            logged["subcluster_loss"] = subcluster_loss
        self.log_dict(logged, sync_dist=True)

    def _m_step(self) -> None:
        state, sums = self.clusters, self.sums
        stats = sums.cluster_stats()
        if stats is not None:
            state = replace(state, mixture=Mixture.m_step(state.prior, stats))
        if sums.sub_stats is not None:
            state = replace(state, subclusters=fit_subclusters(state.prior, sums.sub_stats))
        self.state = state
        if sums.sub_stats is not None and self.moves.kind == "published":
            self._restart_empty_subclusters(sums.sub_stats.count_K.view(-1, 2))

    def _restart_empty_subclusters(self, count_K2: Tensor) -> None:
        fresh_K = ((count_K2 < 1).any(1) & (count_K2.sum(1) > 2 * self.moves.min_points)).cpu()
        if fresh_K.any():
            self._renew_subclusters(fresh_K)
            structure.renew_subcluster_nets(self._learners(), fresh_K, self.generator)

    def _learners(self) -> structure.Learners:
        optimizers = [getattr(one, "optimizer", one) for one in cast(list[Any], self.optimizers())]
        return structure.Learners(self.cluster_net, self.subcluster_nets, *optimizers)

    # Moves -------------------------------------------------------------------------------------------------

    def _search_moves(self, cluster_loss: float) -> None:
        if self.progress.at_rest:
            self.progress.polish_epoch += 1
            if self.progress.polish_epoch >= self._polish_epochs() or self._polished(cluster_loss):
                self.progress.finished = True
                self._finish()
        elif self.schedule.search_due(self.clustering_epoch):
            self.state, moves = structure.search_step(
                self.clusters,
                self._learners(),
                *self._search(),
                len(self._train_points()),
                self.model.init_subclusters,
                self.generator,
                first=self.progress.num_searches == 0,
            )
            self.moves_of_epoch = list(moves)
            self.progress.num_searches += 1
            self.progress.at_rest = not moves or self.progress.num_searches >= self.schedule.max_searches

    def _search(self) -> tuple[Tensor, Tensor, NormalPrior]:
        """A sample (M, E), its labels (M,) and the prior, as process 0 finds them.

        Chance is a pure function of the seed and of the searches so far, whatever the clusters that it starts
        from: so the first search finds the same from any of them.
        """
        found: tuple[Tensor, Tensor, NormalPrior] | None = None
        if self.trainer.is_global_zero:
            clusters, moves = self.clusters, self.moves
            generator = generator_at(self.seed, self.progress.num_searches)
            if self.progress.num_searches == 0:
                draw = partial(self._sample, device=self.device, generator=generator)
                found = search(draw, len(self._train_points()), clusters.prior, moves, generator)
            else:
                sample_ME = self._sample(moves.sample_size, self.device, generator)
                labels_M = structure.mixture_labels(clusters.mixture, sample_ME)
                found = sample_ME, *revise(sample_ME, labels_M, clusters.prior, moves, generator)
        if self.trainer.world_size > 1:
            found = self.trainer.strategy.broadcast(found)
        assert found is not None
        sample_ME, labels_M, prior = found
        return sample_ME.to(self.device), labels_M.to(self.device), to_device(prior, self.device)

    def _published_moves(self) -> None:
        split, merge = self.schedule.published_moves(self.clustering_epoch)
        if self.sums.hard_stats is None or not (split or merge):
            return
        hard, learners, moves = self.sums.hard_stats, self._learners(), self.moves
        num_old = self.num_clusters
        stats = hard.group(torch.arange(2 * num_old, device=self.device) // 2, num_old)
        if split:
            self.state, stats, plan = structure.split_step(self.clusters, learners, hard, moves, self.coins)
            self.moves_of_epoch += plan.moves
            if plan.moves:
                self._renew_subclusters(plan.fresh_K)
        if merge:
            self.state, _, plan = structure.merge_step(self.clusters, learners, stats, moves, self.coins)
            self.moves_of_epoch += plan.moves
            if plan.moves:
                self._renew_subclusters(plan.fresh_K)

    def _renew_subclusters(self, fresh_K: Tensor) -> None:
        """Start the subclusters of fresh clusters (K,) anew, from what the mixture takes of a sample."""
        sample_ME = self._sample(self.moves.sample_size, self.device, self.generator)
        self.state = structure.renew_subclusters(
            self.clusters,
            sample_ME,
            structure.mixture_labels(self.clusters.mixture, sample_ME),
            len(self._train_points()) / len(sample_ME),
            fresh_K,
            self.subcluster_nets,
            self.model.init_subclusters,
        )

    def _share(self) -> None:
        """Give all processes the nets, moments and clusters of process 0, so that they cannot drift apart."""
        if self.trainer.world_size == 1:
            return
        share_learned(self, self.trainer.optimizers)
        shared = self.trainer.strategy.broadcast(self.clusters.to_dict())
        self.state = replace(
            to_device(ClusterState.from_dict(shared), self.device), ids_K=shared["ids_K"].cpu()
        )

    # Learning rates ----------------------------------------------------------------------------------------

    def _polish_epochs(self) -> int:
        steps = int(self.trainer.num_training_batches)
        return max(_LEAST_POLISH_EPOCHS, math.ceil(self.schedule.polish_steps / max(steps, 1)))

    def _polished(self, cluster_loss: float) -> bool:
        enough = self.progress.polish_epoch >= _LEAST_POLISH_EPOCHS and self.progress.settled
        return enough and self.model.cluster_loss == "kl" and cluster_loss < self.schedule.polish_loss

    def _polish_lr(self) -> None:
        """Let the learning rates fall to zero in a straight line over the steps of polishing."""
        remaining = self._polish_epochs() * int(self.trainer.num_training_batches) - self.progress.polish_step
        let_fall(self.trainer.optimizers, remaining)
        self.progress.polish_step += 1

    def _step_schedulers(self, cluster_loss: float, trained_subclusters: bool) -> None:
        schedulers = cast(list[Any], self.trainer.lr_scheduler_configs)
        # Those of nets that have learned in this epoch; polishing has learning rates of its own.
        learned = 0 if self.progress.at_rest else 1 + trained_subclusters
        step_schedulers([config.scheduler for config in schedulers[:learned]], cluster_loss)

    # Checkpoints -------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """All that a run needs, besides weights and optimizers, to go on as if it had not been stopped."""
        if self.state is None:
            return {}
        return {
            "clusters": self.state.to_dict(),
            "num_dims": self.num_dims,
            "num_code_dims": self.transform.num_dims,
            "labels_N": self.labels_N,
            "generator": self.generator.get_state(),
            "coins": self.coins.get_state(),
            "random": save_random_states(),
            "progress": dataclasses.asdict(self.progress),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Build nets of the saved size, and take over all else; torch then loads the weights.

        Raises:
            ValueError: the state of a module of points of another D.
        """
        if not state:
            return
        self._take_num_dims(state["num_dims"])
        self.state = ClusterState.from_dict(state["clusters"])
        self._build_nets(state["num_code_dims"], self.state.num_clusters)
        self.cluster_net.to(self.device), self.subcluster_nets.to(self.device)
        self.labels_N = state["labels_N"]
        self.generator.set_state(state["generator"].cpu())
        self.coins.set_state(state["coins"].cpu())
        self.progress = Progress(**state["progress"])
        if self._trainer is not None:
            load_random_states(state["random"])

    def _take_num_dims(self, num_dims: int) -> None:
        if self.num_dims not in (None, num_dims):
            raise ValueError(
                f"ckpt_path was trained on points of {num_dims} dimensions, but the data have "
                f"{self.num_dims}: give the data set it was trained on."
            )
        self.num_dims = num_dims

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what is no checkpoint of a trained module.

        Raises:
            ValueError: it is not.
        """
        if not checkpoint.get("state_dict", {}).get("_extra_state"):
            raise ValueError(
                "ckpt_path is no checkpoint of DeepDPM: give the model.ckpt or last.ckpt of a run."
            )
