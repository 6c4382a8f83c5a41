"""Random small affine maps of images, each image with its own, for features that do not depend on them.

Legend: B images in a batch, C channels, H and W height and width in pixels, D = C * H * W.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# What a strength of 1 allows either way.
SHIFT = 0.1  # of the height and of the width
TURN = 10.0  # degrees
STRETCH = 0.1  # of the size
SLANT = 0.1  # of the height


def augmented(
    x_BD: Tensor, image_shape: Sequence[int], strength: float, generator: torch.Generator | None = None
) -> Tensor:
    """Shift, turn, scale and slant flat images (B, C * H * W) a little, each by chance and on its own.

    All four are uniform; a strength of 1 allows a shift by a tenth of the side, a turn by 10 degrees, a
    change of size by a tenth and a slant by a tenth, and the strength multiplies them. Pixels from outside
    an image are those of its edge. The maps are drawn on the CPU, so that they are the same on every device.

    >>> images_BD = torch.arange(18.0).view(2, 9)
    >>> torch.equal(augmented(images_BD, (1, 3, 3), strength=0.0), images_BD)
    True
    """
    assert math.prod(image_shape) == x_BD.shape[1], "rows are images of this shape"
    if strength == 0:
        return x_BD
    theta_B23 = _random_maps(len(x_BD), strength, generator).to(x_BD)
    shape = (len(x_BD), *image_shape)
    grid_BHW2 = functional.affine_grid(theta_B23, list(shape), align_corners=False)
    moved_BCHW = functional.grid_sample(
        x_BD.view(shape), grid_BHW2, padding_mode="border", align_corners=False
    )
    return moved_BCHW.flatten(1)


def _random_maps(num_images: int, strength: float, generator: torch.Generator | None) -> Tensor:
    """Draw a matrix (2, 3) for each image, from places in the new image to places in the old; sides are 2."""
    draws_5B = strength * (2 * torch.rand(5, num_images, generator=generator) - 1)
    across_B, down_B = 2 * SHIFT * draws_5B[:2]
    angle_B = math.radians(TURN) * draws_5B[2]
    size_B = (1 + STRETCH) ** draws_5B[3]
    cos_B, sin_B, slant_B = size_B * angle_B.cos(), size_B * angle_B.sin(), SLANT * draws_5B[4]
    first_B3 = torch.stack([cos_B, slant_B * cos_B - sin_B, across_B], 1)
    second_B3 = torch.stack([sin_B, slant_B * sin_B + cos_B, down_B], 1)
    return torch.stack([first_B3, second_B3], 1)
