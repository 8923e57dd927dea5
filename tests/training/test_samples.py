r"""Tests for sda_ray.training.samples: pictures."""

import numpy as np
import pytest
import torch

from sda_ray.data.flow import vorticity
from sda_ray.training.samples import plot


def test_velocities_and_their_vorticity_have_one_picture() -> None:
    x = torch.randn(2, 5, 2, 16, 16)
    image = plot(x)
    assert image.size == (4 + 5 * 132, 4 + 2 * 132)
    assert image.tobytes() == plot(vorticity(x)).tobytes()

    with pytest.raises(ValueError, match=r"x has shape \(5, 2, 16\), but must"):
        plot(x[0, :, :, 0])


def test_origin_is_at_the_lower_left() -> None:
    w = torch.zeros(1, 1, 16, 16)
    w[0, 0, 0, 0], w[0, 0, -1, 0] = 1.0, -1.0
    picture = np.asarray(plot(w)).astype(int)
    left, right = picture[-8, 8], picture[-8, -8]  # along axis -2, which is x
    assert left[0] > left[2] and right[2] > right[0]  # red, blue
