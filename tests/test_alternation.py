"""The schedule of phases: a pure function of the epoch, whole and without gaps."""

import itertools

import pytest

from deepdpm.alternation import AlternationSettings


def test_phases_follow_one_another_without_gaps() -> None:
    settings = AlternationSettings(3, train_cluster_net=5, ae_epochs=2, retrain_last_ae_epochs=1)
    phases = [settings.phase_of(epoch, 4) for epoch in range(settings.total_epochs(4))]
    names = [(phase.kind, phase.alternation) for phase in phases]
    turns = [(kind, turn) for turn in range(3) for kind in ("cluster", "features")]
    assert list(dict.fromkeys(names)) == [("pretrain", 0), *turns]
    assert [names.count(turn) for turn in turns] == [5, 2, 5, 2, 5, 1]
    for before, after in itertools.pairwise(phases):
        assert after.epoch == (0 if before.is_last_epoch else before.epoch + 1)


def test_a_clustering_that_ends_sooner_brings_the_rest_forward() -> None:
    settings = AlternationSettings(2, train_cluster_net=10, ae_epochs=3)
    ended = {0: 4}
    assert settings.total_epochs(0, ended) == 17
    for epoch in range(4):
        assert settings.phase_of(epoch, 0, ended).kind == settings.phase_of(epoch, 0).kind == "cluster"
    for epoch in range(4, 17):
        sooner, later = settings.phase_of(epoch, 0, ended), settings.phase_of(epoch + 6, 0)
        assert (sooner.kind, sooner.alternation, sooner.epoch) == (later.kind, later.alternation, later.epoch)


def test_after_the_end_the_last_phase_holds_and_empty_phases_are_left_out() -> None:
    settings = AlternationSettings(1, train_cluster_net=2, ae_epochs=7)
    assert list(settings.spans(0)) == [("cluster", 0, 2)]
    assert settings.phase_of(99, 0) == settings.phase_of(1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number_of_alternations", 0),
        ("train_cluster_net", 0),
        ("ae_epochs", -1),
        ("retrain_last_ae_epochs", -1),
        ("ae_batch_size", 1),
        ("ae_lr", 0.0),
        ("ae_weight_decay", -1.0),
        ("lambda_", float("nan")),
        ("beta", -0.5),
        ("regularization", "none"),
        ("cluster_assignments", "hard"),
        ("update_clusters_params", "False"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^alternation\.{name} must .*\.$"):
        AlternationSettings(**{name: value})  # type: ignore[arg-type]
