"""The animation has a frame for each epoch, and shows the clusters as they are."""

from pathlib import Path

import numpy as np
from PIL import Image

from deepdpm.data.synthetic import SyntheticGrid
from deepdpm.report.animation import animate, ellipse


def test_a_frame_for_each_epoch(tmp_path: Path) -> None:
    frames = animate(tmp_path / "a.gif", SyntheticGrid(num_points=400).load(), epochs=6)
    assert [frame.epoch for frame in frames] == list(range(6))
    assert frames[4].moves.startswith("split 0 -> 0, 1")
    assert len(frames[-1].ids_K) == len(frames[-1].means_K2) >= 2
    with Image.open(tmp_path / "a.gif") as picture:
        durations = []
        for number in range(picture.n_frames):
            picture.seek(number)
            durations.append(picture.info["duration"])
    held = sum(bool(frame.moves) for frame in frames[:-1]) + 1
    assert sum(durations) == 170 * (len(frames) + 3 * held)


def test_the_ellipse_is_where_two_standard_deviations_are() -> None:
    factor = np.array([[2.0, 0.3], [0.3, 0.5]])
    covariance = factor @ factor.T
    path = ellipse(np.array([1.0, -2.0]), covariance, "red")
    # Every second vertex is a control point of a curve, and lies outside.
    points = path.get_verts()[::2] - np.array([1.0, -2.0])
    distance = np.einsum("ni,ij,nj->n", points, np.linalg.inv(covariance), points) ** 0.5
    np.testing.assert_allclose(distance, 2, rtol=1e-2)
