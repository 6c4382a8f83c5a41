"""Batches of points that lie in memory: slices of one tensor on its device, not rows collated one by one.

Legend: N points, D dimensions, B points in a batch.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from deepdpm.data.samples import Dataset, Source

_SMALLEST, _LARGEST, _BATCHES_PER_EPOCH = 128, 4096, 16


def automatic_batch_size(num_points: int) -> int:
    """The power of two nearest to N / 16 (on the log scale), within 128 and 4096.

    Example:
        >>> [automatic_batch_size(n) for n in (10, 9_298, 70_000, 1_000_000)]
        [128, 512, 4096, 4096]
    """
    nearest = 2 ** round(math.log2(max(num_points, 1) / _BATCHES_PER_EPOCH))
    return int(min(max(nearest, _SMALLEST), _LARGEST))


class CodesLoader:
    """One pass over the points in shuffled batches, each time it is iterated.

    The order is a pure function of seed, epoch and rank, so a resumed run sees the batches that the
    uninterrupted run would have seen. Ranks share one permutation: their parts are disjoint, together they
    are the whole set, and all of them have the same number of batches, as collective operations need.

    Args:
        x_ND: the points, on the device where batches are wanted.
        batch_size: B; the last batch of an epoch may be shorter, never empty.
        seed: of the shuffles.
        epoch: gives the number of the epoch when iteration starts.
        rank: which part of the permutation this process takes.
        world_size: in how many parts the permutation is dealt.

    Example:
        >>> loader = CodesLoader(torch.arange(5.0)[:, None], batch_size=2)
        >>> [len(x) for x, index in loader]
        [2, 2, 1]
        >>> all(torch.equal(x[:, 0], index.float()) for x, index in loader)
        True
    """

    def __init__(
        self,
        x_ND: Tensor,
        batch_size: int,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        assert batch_size > 0
        if len(x_ND) < world_size:
            raise ValueError(
                f"trainer.lightning.devices asks for {world_size} processes, but there are only {len(x_ND)} "
                "points: "
                "use fewer devices."
            )
        self.x_ND, self.batch_size, self.seed, self.epoch = x_ND, batch_size, seed, epoch
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.x_ND) / self.world_size) / self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The row numbers this rank visits in an epoch, in their order: int64, (about N / world_size,)."""
        state = np.random.SeedSequence([self.seed % 2**64, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        return torch.randperm(len(self.x_ND), generator=generator)[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index_N = self.order(self.epoch()).to(self.x_ND.device)
        # A rank dealt one point fewer would be left without a last batch: it spreads its points evenly
        # instead.
        enough = len(index_N) > (len(self) - 1) * self.batch_size
        parts = index_N.split(self.batch_size) if enough else index_N.tensor_split(len(self))
        for index_B in parts:
            yield self.x_ND[index_B], index_B


class CodesDataModule(pl.LightningDataModule):
    """Points in memory as Lightning's training data: batches `(x_BD, index_B)`.

    `x_BD` is float32, `index_B` int64 holds the row numbers in the training set. The points move to the
    accelerator once if they take less than half of its free memory; otherwise Lightning moves batch by batch.

    Args:
        source: settings that load a data set, or a data set.
        batch_size: B; None for `automatic_batch_size(N)`.
        seed: of the shuffles.

    Raises:
        ValueError: from the source, or a batch size below 1.

    Example:
        >>> from deepdpm.data import Dataset, make_samples
        >>> data = CodesDataModule(Dataset("two", make_samples([[0.0, 1.0], [2.0, 3.0]])))
        >>> data.setup()
        >>> data.name, data.num_dims, data.batch_size
        ('two', 2, 128)
    """

    def __init__(self, source: Source | Dataset, batch_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"trainer.batch_size is {batch_size}: give a positive number, or null for automatic."
            )
        self.source, self.seed = source, seed
        self.name = source.name
        self._batch_size = batch_size
        self._dataset = source if isinstance(source, Dataset) else None

    def setup(self, stage: str | None = None) -> None:
        """Load the data; only the first call does."""
        if self._dataset is None:
            assert not isinstance(self.source, Dataset)
            self._dataset = self.source.load()
            self.name = self._dataset.name

    @property
    def dataset(self) -> Dataset:
        """The data set, loaded when it is first asked for."""
        self.setup()
        assert self._dataset is not None
        return self._dataset

    @property
    def num_dims(self) -> int:
        """D, the length of a row."""
        return math.prod(self.dataset.train.x.shape[1:])

    @property
    def batch_size(self) -> int:
        """B, as set or chosen automatically."""
        return automatic_batch_size(len(self.dataset.train)) if self._batch_size is None else self._batch_size

    def train_dataloader(self) -> CodesLoader:
        """Shuffled batches of the training set for this process."""
        x_ND, trainer = self.dataset.train.x, self.trainer
        if trainer is None:
            return CodesLoader(x_ND, self.batch_size, self.seed)
        device = trainer.strategy.root_device
        return CodesLoader(
            x_ND.to(device) if _fits(x_ND, device) else x_ND,
            self.batch_size,
            self.seed,
            epoch=lambda: trainer.current_epoch,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )


def _fits(x_ND: Tensor, device: torch.device) -> bool:
    """Whether the points leave at least half of the device's free memory to the model."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * x_ND.nbytes < free
