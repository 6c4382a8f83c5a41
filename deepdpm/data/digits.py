"""Scikit-learn's handwritten digits: real data that needs no network."""

from dataclasses import dataclass

from deepdpm.data.samples import Dataset, make_samples


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8 x 8 pixels with values 0 to 16, ten classes.

    Example:
        >>> data = Digits().load()
        >>> tuple(data.train.x.shape), data.image_shape
        ((1797, 64), (1, 8, 8))
    """

    name: str = "digits"

    def load(self) -> Dataset:
        """Read the set from the installed scikit-learn."""
        from sklearn.datasets import load_digits

        x_ND, labels_N = load_digits(return_X_y=True)
        return Dataset(
            self.name,
            make_samples(x_ND, labels_N, self.name),
            class_names=tuple(map(str, range(10))),
            image_shape=(1, 8, 8),
        )
