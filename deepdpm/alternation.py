"""Joint features: which phase an epoch belongs to. Features and clusters take turns.

Source: DeepDPM, section 4.4, and the options of the authors' second script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from deepdpm.checks import check_choices, check_least, check_positive

PhaseKind = Literal["pretrain", "cluster", "features"]
Span = tuple[PhaseKind, int, int]

NONE_ENDED: Mapping[int, int] = {}


@dataclass(frozen=True)
class Phase:
    """What an epoch is for.

    Attributes:
        kind: "pretrain" (the autoencoder alone), "cluster" (features frozen) or "features" (clusters frozen).
        alternation: how many clusterings were finished before, those of this alternation left out.
        epoch: within the phase, from 0.
        length: epochs of the phase.
    """

    kind: PhaseKind
    alternation: int
    epoch: int
    length: int

    @property
    def is_last_epoch(self) -> bool:
        """Whether the phase ends with this epoch."""
        return self.epoch + 1 == self.length


@dataclass(frozen=True)
class AlternationSettings:
    """Say how features and clusters take turns: pretrain, then (cluster, train features) again and again.

    Attributes:
        number_of_alternations: clusterings.
        train_cluster_net: epochs of a clustering; one whose moves have come to rest ends sooner.
        ae_epochs: epochs of the autoencoder between two clusterings.
        retrain_last_ae_epochs: the same after the last clustering (the authors: 1). Codes change, the
            clusters do not, so anything above 0 costs a little accuracy; but for "label_loss", whose net
            learns with the codes.
        ae_batch_size: rows in a step of the autoencoder; `trainer.batch_size` bounds it.
        ae_lr: learning rate of its Adam.
        ae_weight_decay: L2 penalty of its Adam.
        lambda_: weight of the reconstruction in `lambda sum ||x - xhat||^2 + beta / 2 sum ||code - mu_z||^2`,
            summed over a batch: so it depends on the scale of the inputs. With an objective, noise or
            augmentation of its own in `model.features`, what the pretraining minimised takes its place.
        beta: weight of the distance of (transformed) codes to their centres, or of the loss in its place.
        regularization: "dist_loss" pulls codes to their centres; "cluster_loss" takes the cluster net's loss;
            "label_loss" teaches autoencoder and cluster net the labels of "pseudo_label", on inputs disturbed
            as `model.features` says, by the points that their neighbours confirm. The mixture follows the
            codes only as `update_clusters_params` says.
        confirmed_by: "label_loss": a point's label is taught if so many of its nearest codes, all of them,
            have it too at the start of the phase; 0 teaches all. Compares each point with every other.
        cluster_assignments: a point's centre is the nearest ("min_dist"), the net's choice of the moment
            ("forward_pass"), or its choice at the start of the phase ("pseudo_label"): codes that are free to
            move can then not all run to one centre.
        update_clusters_params: "none" keeps the clusters; "only_centers" moves each centre by the mean of all
            codes it has met, where it counts for 100; "all_params" fits weights, centres and covariances to
            the codes of each epoch by maximum likelihood, "all_params_w_prior" by the prior's MAP formulas.
        init_cluster_net_using_centers: a later clustering takes over K and the centres.
        reinit_net_at_alternation: a later clustering builds its nets anew and fits the transform anew. With
            neither of the two true, nets and K go on, and the mixture is fitted to what the net says.

    Raises:
        ValueError: a value out of range, naming the setting.

    >>> settings = AlternationSettings(number_of_alternations=2, train_cluster_net=4, ae_epochs=2)
    >>> [settings.phase_of(epoch, pretrain_epochs=3).kind for epoch in (0, 3, 7, 9)]
    ['pretrain', 'cluster', 'features', 'cluster']
    >>> settings.total_epochs(pretrain_epochs=3)
    13
    """

    number_of_alternations: int = 3
    train_cluster_net: int = 300
    ae_epochs: int = 100
    retrain_last_ae_epochs: int = 0
    ae_batch_size: int = 1024
    ae_lr: float = 0.002
    ae_weight_decay: float = 0.0005
    lambda_: float = 0.005
    beta: float = 1.0
    regularization: Literal["dist_loss", "cluster_loss", "label_loss"] = "dist_loss"
    confirmed_by: int = 20
    cluster_assignments: Literal["min_dist", "forward_pass", "pseudo_label"] = "min_dist"
    update_clusters_params: Literal["none", "only_centers", "all_params", "all_params_w_prior"] = "none"
    init_cluster_net_using_centers: bool = True
    reinit_net_at_alternation: bool = True

    def __post_init__(self) -> None:
        check_choices(self, "alternation")
        least = {"number_of_alternations": 1, "train_cluster_net": 1, "ae_epochs": 0}
        least |= {"retrain_last_ae_epochs": 0, "ae_batch_size": 2, "ae_weight_decay": 0, "confirmed_by": 0}
        check_least(self, "alternation", least | {"lambda_": 0, "beta": 0})
        check_positive(self, "alternation", ("ae_lr",))
        if self.regularization == "label_loss" and self.cluster_assignments != "pseudo_label":
            raise ValueError(
                "alternation.regularization=label_loss teaches the labels that points had at the start of a "
                "phase: set alternation.cluster_assignments=pseudo_label."
            )

    def spans(self, pretrain_epochs: int, ended: Mapping[int, int] = NONE_ENDED) -> Iterator[Span]:
        """Each phase's kind, alternation and length in epochs; `ended` are clusterings that ended sooner.

        >>> list(AlternationSettings(1, train_cluster_net=9).spans(2, ended={0: 5}))
        [('pretrain', 0, 2), ('cluster', 0, 5)]
        """
        last = self.number_of_alternations - 1
        spans: list[Span] = [("pretrain", 0, pretrain_epochs)]
        for alternation in range(self.number_of_alternations):
            spans.append(("cluster", alternation, ended.get(alternation, self.train_cluster_net)))
            epochs = self.ae_epochs if alternation < last else self.retrain_last_ae_epochs
            spans.append(("features", alternation, epochs))
        yield from (span for span in spans if span[2] > 0)

    def phase_of(self, epoch: int, pretrain_epochs: int, ended: Mapping[int, int] = NONE_ENDED) -> Phase:
        """The phase of an epoch; of an epoch after the end, the last one.

        >>> AlternationSettings(1, train_cluster_net=9).phase_of(8, 2)
        Phase(kind='cluster', alternation=0, epoch=6, length=9)
        """
        assert epoch >= 0
        for kind, alternation, length in self.spans(pretrain_epochs, ended):
            if epoch < length:
                return Phase(kind, alternation, epoch, length)
            epoch -= length
        return Phase(kind, alternation, length - 1, length)

    def total_epochs(self, pretrain_epochs: int, ended: Mapping[int, int] = NONE_ENDED) -> int:
        """The epochs of all phases together."""
        return sum(length for _, _, length in self.spans(pretrain_epochs, ended))
