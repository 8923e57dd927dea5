r"""Tests for sda_ray.training.samples: what samples are like, and pictures of them."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sda_ray.core.config import Config
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.data.flow import vorticity
from sda_ray.runs.metrics import History, last_metrics
from sda_ray.training.loop import TrainState, epochs
from sda_ray.training.samples import LEAST, MOST, SAMPLE_COST, Samples, compare_samples, plot
from sda_ray.training.validation import Validation

YELLOW, GREEN, GRAY, WHITE = (255, 213, 0), (0, 166, 81), (127, 127, 127), (247, 247, 247)


@pytest.fixture
def validation(data: Path) -> Validation:
    return Validation(TrajectoryDataset(data / "valid.h5", window=3))


def test_data_are_like_themselves(validation: Validation) -> None:
    x = validation.first.x
    same = {"sample_std": 1.0, "sample_spectrum": 0.0, "sample_divergence": 1.0}
    twice = {"sample_std": 2.0, "sample_spectrum": math.log10(4), "sample_divergence": 2.0}

    assert compare_samples(x, x) == pytest.approx(same)
    assert compare_samples(2 * x, x) == pytest.approx(twice)


def test_spectrum_is_compared_in_octaves_and_divergence_on_the_grid() -> None:
    y = torch.arange(16) * 2 * math.pi / 16
    waves = torch.stack([torch.sin(k * y) for k in (1, 2, 5)])
    x = torch.zeros(1, 2, 16, 16)
    x[0, 0] = waves.sum(0)  # along axis -1: a shear, without divergence
    z = x.clone()
    z[0, 0] += waves[1]  # twice as large in one of three octaves

    found = compare_samples(z, x)
    assert found["sample_spectrum"] == pytest.approx(math.log10(4) / 3)

    x[0, 0] = waves.sum(0)[:, None]  # a compression
    assert compare_samples(3 * x, x)["sample_divergence"] == pytest.approx(3)


def test_samples_that_are_no_numbers_are_recorded_as_such(
    validation: Validation, tmp_path: Path
) -> None:
    found = compare_samples(torch.full((1, 6, 16, 16), math.nan), validation.first.x)
    History(tmp_path / "metrics.jsonl").add({"epoch": 1, "loss_valid": 0.5, **found})
    line = last_metrics(tmp_path / "metrics.jsonl")

    assert all(math.isnan(line[key]) for key in found) and len(line) == 5


def test_drawing_samples_changes_no_bit_of_the_training(
    small: Config, data: Path, validation: Validation
) -> None:
    trainset = TrajectoryDataset(data / "train.h5", window=3)
    config = small | {"dropout": 0.1, "ema": 0.9, "parametrization": "v"}
    found = []

    for samples in (Samples(validation, 10**4, [1, 2]), None):
        state = TrainState(config, 16)
        lines = list(epochs(state, trainset, validation, rungs=[1, 2], samples=samples))
        drawn = [{k: x.pop(k) for k in list(x) if k.startswith("sample_")} for x in lines]
        losses = [{k: x for k, x in line.items() if k != "seconds"} for line in lines]
        found.append((losses, state.tensors(), torch.get_rng_state()))
        assert all(len(x) == (3 if samples else 0) for x in drawn)

    (losses, tensors, generator), (others, more, other) = found
    assert losses == others and generator.equal(other)
    assert all(x.equal(more[key]) for key, x in tensors.items())


def test_samples_after_a_resume_are_the_same(small: Config, validation: Validation) -> None:
    states = [TrainState(small, 16) for _ in range(2)]

    for state in states:
        state.epoch = 3

    first, again = (Samples(validation, 10**4, [3])(state) for state in states)
    assert first and first == again


@pytest.mark.parametrize("trajectories", [1, 20, 300, 10**5])
def test_samples_take_three_percent_of_the_evaluations(
    small: Config, validation: Validation, trajectories: int
) -> None:
    state = TrainState(small | {"epochs": 18}, 16)
    samples = Samples(validation, trajectories, [2, 6])
    used, each = 0, 3 * trajectories + len(validation.first.x)

    for epoch in range(1, 19):
        state.epoch = epoch
        count, steps = samples.size(state)
        used += count * steps
        assert used <= max(SAMPLE_COST * epoch * each, LEAST[0] * LEAST[1])
        assert count <= MOST[0] and steps <= MOST[1]
        assert bool(count) == (epoch == 18 or (epoch in (2, 6) and trajectories >= 300))


def test_picture_has_a_row_of_data(small: Config, validation: Validation) -> None:
    state = TrainState(small | {"parametrization": "v"}, 16)
    state.epoch = small["epochs"]
    picture = Image.open(io.BytesIO(Samples(validation, 8).picture(state)))
    row = plot(validation.first.x[:1].unflatten(1, (-1, 2)))

    assert picture.size[0] == row.size[0] and picture.size[1] > 3 * 132
    assert np.asarray(picture)[-row.size[1] :].tobytes() == np.asarray(row).tobytes()


def test_scale_is_fixed_and_what_is_outside_stands_out() -> None:
    values = [2.0, -2.0, math.nan, 0.0, math.inf]
    picture = np.asarray(plot(torch.tensor(values).reshape(1, -1, 1, 1)))
    centers = [tuple(picture[68, 4 + 132 * i + 64]) for i in range(len(values))]
    assert centers == [YELLOW, GREEN, GRAY, WHITE, YELLOW]

    alone, beside = plot(torch.full((1, 1, 2, 2), 0.5)), plot(torch.full((1, 1, 2, 2), 1.0))
    assert alone.tobytes() != beside.tobytes()

    own = [plot(x * torch.ones(1, 1, 2, 2), limit=None).tobytes() for x in (0.5, 1.0)]
    assert own[0] == own[1]


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
