"""Data: every kind of input becomes a `Dataset` of points in memory, and batches are slices of it.

There is one file for each kind. To add a kind, write a frozen dataclass of plain settings with a `name` and a
`load() -> Dataset`, build its samples with `make_samples`, and give it a YAML file in `conf/dataset/`.
"""

from deepdpm.data.batches import CodesDataModule, CodesLoader, automatic_batch_size
from deepdpm.data.files import DataMissingError
from deepdpm.data.samples import Dataset, Samples, Source, make_labels, make_samples

__all__ = [
    "CodesDataModule",
    "CodesLoader",
    "DataMissingError",
    "Dataset",
    "Samples",
    "Source",
    "automatic_batch_size",
    "make_labels",
    "make_samples",
]
