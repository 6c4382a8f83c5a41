"""Batches in memory: whole, shuffled reproducibly, dealt to ranks, and right inside Lightning."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from deepdpm.data import CodesDataModule, CodesLoader, Dataset, automatic_batch_size, make_samples
from deepdpm.data.digits import Digits


def indices(loader: CodesLoader) -> list[list[int]]:
    return [index_B.tolist() for _, index_B in loader]


@pytest.mark.parametrize("n", [1, 2, 100, 1_797, 9_298, 70_000, 10**6])
def test_automatic_batch_size_is_the_nearest_power_of_two(n: int) -> None:
    size = automatic_batch_size(n)
    assert 128 <= size <= 4096
    if 128 < size < 4096:
        assert 2**-0.5 <= size * 16 / n <= 2**0.5


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (9, 3), (2, 128), (1, 1)])
def test_an_epoch_visits_each_point_once(n: int, batch_size: int) -> None:
    x_ND = torch.arange(2.0 * n).view(n, 2)
    loader = CodesLoader(x_ND, batch_size)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-n // batch_size)
    assert all(len(index_B) == batch_size for _, index_B in batches[:-1])
    assert sorted(torch.cat([index_B for _, index_B in batches]).tolist()) == list(range(n))
    for x_BD, index_B in batches:
        assert torch.equal(x_BD, x_ND[index_B])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    x_ND = torch.zeros(50, 1)
    orders = {}
    for seed in (0, 1, 2**40):
        for epoch in (0, 1, 2):
            torch.manual_seed(epoch)  # the global generator has no part in it
            first, second = (CodesLoader(x_ND, 8, seed, epoch=lambda epoch=epoch: epoch) for _ in range(2))
            assert indices(first) == indices(second) == indices(first)
            orders[seed, epoch] = tuple(first.order(epoch).tolist())
    assert len(set(orders.values())) == len(orders)


@pytest.mark.parametrize(("n", "world_size", "batch_size"), [(10, 3, 2), (9, 2, 4), (7, 7, 3), (101, 4, 25)])
def test_ranks_share_the_points_in_the_same_number_of_batches(
    n: int, world_size: int, batch_size: int
) -> None:
    x_ND = torch.zeros(n, 1)
    parts = [
        indices(CodesLoader(x_ND, batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in parts}) == 1
    assert all(0 < len(batch) <= batch_size for batches in parts for batch in batches)
    assert sorted(row for batches in parts for batch in batches for row in batch) == list(range(n))


def test_more_processes_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer devices"):
        CodesLoader(torch.zeros(2, 1), 1, world_size=3)


@pytest.mark.parametrize("batch_size", [0, -4])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"trainer\.batch_size"):
        CodesDataModule(Digits(), batch_size)


def test_the_source_is_loaded_once() -> None:
    class Counting:
        name = "counting"
        loads = 0

        def load(self) -> Dataset:
            self.loads += 1
            return Dataset("counted", make_samples([[0.0, 1.0], [2.0, 3.0]]))

    source = Counting()
    data = CodesDataModule(source)
    assert data.name == "counting"
    data.setup()
    data.setup("fit")
    assert source.loads == 1
    assert (data.name, data.num_dims, data.batch_size) == ("counted", 2, 128)


class Recorder(pl.LightningModule):
    """Writes down which rows it saw in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x_BD, index_B = batch
        self.seen.setdefault(self.current_epoch, []).extend(index_B.tolist())
        return (self.weight * x_BD).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def trainer(epochs: int, **arguments: object) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning on newer torch
def test_a_resumed_run_sees_the_same_batches(tmp_path: Path) -> None:
    data = Dataset("ramp", make_samples(torch.arange(40.0).view(20, 2)))
    whole = Recorder()
    trainer(4, enable_checkpointing=False).fit(whole, CodesDataModule(data, 6, seed=3))
    assert all(sorted(rows) == list(range(20)) for rows in whole.seen.values())
    assert len({tuple(rows) for rows in whole.seen.values()}) == 4

    stopped = trainer(2, enable_checkpointing=False)
    stopped.fit(Recorder(), CodesDataModule(data, 6, seed=3))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, again = Recorder(), CodesDataModule(data, 6, seed=3)
    trainer(4, enable_checkpointing=False).fit(resumed, again, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert resumed.seen == {epoch: whole.seen[epoch] for epoch in (2, 3)}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_batches_lie_on_the_accelerator() -> None:
    class OnDevice(Recorder):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            assert batch[0].is_cuda
            assert batch[1].is_cuda
            return super().training_step(batch, batch_idx)

    data = CodesDataModule(Digits())
    pl.Trainer(max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False).fit(
        OnDevice(), data
    )
    assert data.train_dataloader().x_ND.is_cuda
