r"""Tests for sda_ray.training.rng: random numbers without a state."""

import torch

from sda_ray.training.rng import rng


def test_streams_and_keys_draw_different_numbers() -> None:
    keys = [(0,), (1,), (0, 1), (1, 1), (0, 0, 1), (0, 2**63 - 1)]
    drawn = [torch.rand(4, generator=rng(s, *key)) for s in range(3) for key in keys]
    assert len({tuple(x.tolist()) for x in drawn}) == 3 * len(keys)
