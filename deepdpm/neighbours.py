"""Partners of points, for features that leave out what look-alikes differ in: where short walks end.

Legend: N points, D dimensions, K neighbours of a point, B points in a batch, S steps.
"""

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

# Distances in all pixels are noisier, and take longer: of the nearest to the digits of MNIST .978 share their
# class here, .976 there.
MOST_AXES = 50
STEPS = 8


class Partners:
    """Draw partners for points: walks of 8 steps, each to one of the K nearest of where it stands.

    Along the way a walk comes from the rim of a class to its middle, and from an island of look-alikes to the
    class about it, which the nearest neighbours alone do not: their codes would stay an island.

    Raises:
        ValueError: not more points than neighbours.

    >>> partners = Partners(torch.tensor([[0.0], [1.0], [7.0], [8.0]]), 1)
    >>> partners.rows(torch.tensor([1, 2])).flatten().tolist()
    [1.0, 7.0]
    """

    def __init__(self, x_ND: Tensor, num_neighbours: int) -> None:
        check_more_points(len(x_ND), num_neighbours, "model.features.neighbours")
        self.x_ND = x_ND.flatten(1)
        self.neighbours_NK = nearest_neighbours(self.x_ND, num_neighbours)

    def rows(self, index_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The rows (B, D) of partners of points (B,), drawn on the CPU, the same on every device."""
        shape = (STEPS, len(index_B))
        choice_SB = torch.randint(self.neighbours_NK.shape[1], shape, generator=generator)
        place_B = index_B.to(self.neighbours_NK.device)
        for choice_B in choice_SB.to(place_B.device):
            place_B = self.neighbours_NK[place_B, choice_B]
        return self.x_ND[place_B]


def check_more_points(num_points: int, num_neighbours: int, setting: str) -> None:
    """Refuse so many neighbours of each point, if there are no more points.

    Raises:
        ValueError: naming the setting.
    """
    if num_points <= num_neighbours:
        raise ValueError(f"{setting} is {num_neighbours}, but there are only {num_points} points: lower it.")


def confirmed(x_ND: Tensor, labels_N: Tensor, num_neighbours: int) -> Tensor:
    """Which of the points (N, D) have the label (N,) that all their K nearest have, (N,); all, if K is 0.

    >>> x_ND = torch.tensor([[0.0], [1.0], [3.0], [8.0], [9.0]])
    >>> confirmed(x_ND, torch.tensor([0, 0, 1, 1, 1]), 1).tolist()
    [True, True, False, True, True]
    """
    if num_neighbours == 0:
        return torch.ones_like(labels_N, dtype=torch.bool)
    neighbours_NK = nearest_neighbours(x_ND, num_neighbours)
    return (labels_N[neighbours_NK] == labels_N[:, None]).all(1)


def nearest_neighbours(x_ND: Tensor, num_neighbours: int) -> Tensor:
    """The rows (N, K) of the K nearest other points of each point (N, D), by their first 50 principal axes.

    Every point is compared with every other, so the cost grows with N squared: 70,000 points take half a
    minute of one core. The result is where the points are. There must be more points than neighbours.

    >>> nearest_neighbours(torch.tensor([[0.0], [1.0], [3.0]]), 1)[:, 0].tolist()
    [1, 0, 1]
    """
    points_ND = x_ND.cpu().numpy()
    num_points, num_dims = points_ND.shape
    assert num_points > num_neighbours
    if num_dims > MOST_AXES:
        axes = PCA(min(MOST_AXES, num_points - 1), svd_solver="randomized", random_state=0)
        # Of points that are all equal the shares of variance, which nobody asks for, are 0 / 0.
        with np.errstate(invalid="ignore"):
            points_ND = axes.fit_transform(points_ND)
    # Asked without points of its own, the index leaves each point out of its neighbours.
    index = NearestNeighbors(n_neighbors=num_neighbours, algorithm="brute").fit(points_ND)
    return torch.from_numpy(index.kneighbors(return_distance=False)).to(x_ND.device)
