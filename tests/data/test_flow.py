r"""Tests for the sda_ray.data.flow module."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sda_ray.data import flow as module
from sda_ray.data.flow import (
    KolmogorovFlow,
    coarsen,
    divergence,
    isotropic_spectrum,
    vorticity,
)

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "flow.npz")


def reference(key: str) -> Tensor:
    return torch.from_numpy(REFERENCE[key])


def error(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def staggered_divergence(x: Tensor) -> Tensor:
    u, v = x.unbind(dim=-3)

    return u - u.roll(1, dims=-2) + v - v.roll(1, dims=-1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # More would wait for each other if the machine is busy.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_transition_is_the_reference_at_64() -> None:
    x, y = reference("states_64")

    assert error(KolmogorovFlow(64).transition(x), y) <= 1e-6


def test_transition_is_the_reference_at_256() -> None:
    y = KolmogorovFlow(256).transition(reference("state_256"))

    assert error(y[:, ::8], reference("next_256")) <= 1e-6


def test_coarsening_and_vorticity_are_the_reference() -> None:
    assert error(coarsen(reference("state_256"), 4), reference("coarsened_256")) <= 1e-6
    assert error(vorticity(reference("states_64"))[0], reference("vorticity_64")) <= 1e-6


def test_coarsening_and_vorticity_accept_any_batch() -> None:
    x = torch.randn(3, 5, 2, 8, 12)

    assert coarsen(x, 4).shape == (3, 5, 2, 2, 3)
    assert vorticity(x).shape == (3, 5, 8, 12)
    assert torch.allclose(coarsen(x, 4)[1, 2, 0, 1, 2], x[1, 2, 0, 4:8, 8:12].mean())


def test_divergence_is_that_of_waves() -> None:
    i, j = torch.meshgrid(*2 * [2 * torch.pi * torch.arange(32.0) / 32], indexing="ij")
    slope = np.sin(2 * torch.pi / 32)  # of a wave, by central differences

    x = torch.stack([i.sin() * j.cos(), 2 * i.cos() * j.sin()])
    assert torch.allclose(divergence(x), 3 * slope * i.cos() * j.cos(), atol=1e-6)

    x = torch.stack([i.sin() * j.cos(), -i.cos() * j.sin()])
    assert divergence(x).abs().max() < 1e-6
    assert divergence(torch.randn(3, 5, 2, 8, 12)).shape == (3, 5, 8, 12)


def test_divergence_of_states_is_small_beside_their_vorticity() -> None:
    x = reference("states_64")
    swapped = x.flip(-3)

    for r in 1, 2:
        y = coarsen(x, r)
        assert divergence(y).std() < 0.15 * vorticity(y).std()

    assert divergence(swapped).std() > 0.5 * vorticity(x).std()


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (8, 12), (9, 5), (1, 1)])
def test_spectrum_sums_to_the_mean_square(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(2, *shape, dtype=torch.float64)

    spectrum, cross = isotropic_spectrum(x), isotropic_spectrum(x, y)
    assert spectrum.shape[:-1] == x.shape[:-2]
    assert (spectrum >= 0).all()
    assert torch.allclose(spectrum.sum(-1), x.square().mean((-1, -2)))
    assert torch.allclose(cross.sum(-1), (x * y).mean((-1, -2)))
    assert torch.allclose(isotropic_spectrum(x.half()), spectrum.float(), rtol=0.05, atol=1e-3)


def test_wave_is_found_at_its_wavenumber() -> None:
    i, j = torch.meshgrid(*2 * [2 * torch.pi * torch.arange(32.0) / 32], indexing="ij")
    x = 1 + 2 * (3 * i + 4 * j).cos()

    expected = torch.zeros(24)
    expected[0], expected[5] = 1, 2
    assert torch.allclose(isotropic_spectrum(x), expected, atol=1e-6)


@pytest.mark.parametrize("size", [16, 64])
def test_prior_is_free_of_divergence_and_scaled(size: int) -> None:
    x = KolmogorovFlow(size).prior([0, 1, 2**64 - 1])

    assert x.shape == (3, 2, size, size)
    assert x.dtype == torch.float32
    assert torch.allclose(x.square().sum(dim=1).sqrt().amax(dim=(1, 2)), torch.full((3,), 3.0))
    assert staggered_divergence(x).abs().max() < 1e-5
    assert x.mean(dim=(-1, -2)).abs().max() < 1e-5
    assert not torch.allclose(x[0], x[1])


@pytest.mark.parametrize("size", [20, 64])
def test_bits_depend_on_the_seed_alone(size: int) -> None:
    seeds = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8]
    flow = KolmogorovFlow(size)

    alone = torch.cat([flow.transition(flow.prior([seed])) for seed in seeds])

    for n in (1, 2):
        torch.set_num_threads(n)
        again = KolmogorovFlow(size)
        assert torch.equal(again.transition(again.prior(seeds)), alone)


def test_bits_at_256_do_not_depend_on_threads_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = KolmogorovFlow(256).prior([0, 1])
    y = KolmogorovFlow(256).transition(x)

    monkeypatch.setitem(module.CELLS, "cpu", 2 * 256**2)
    torch.set_num_threads(2)

    assert torch.equal(KolmogorovFlow(256).transition(x), y)


def test_transition_conserves_volume_and_momentum() -> None:
    flow = KolmogorovFlow(64)
    x = flow.prior([0, 1]) + torch.tensor([0.5, -0.25])[:, None, None]
    y = flow.transition(x)

    assert staggered_divergence(y).abs().max() < 1e-5
    # The force has no mean: momentum decays by drag alone, step by step.
    decay = (1 - 0.1 * flow.dt / flow.steps) ** flow.steps
    assert torch.allclose(y.mean(dim=(-1, -2)), decay * x.mean(dim=(-1, -2)), atol=1e-6)


def test_transition_commutes_with_shifts() -> None:
    flow = KolmogorovFlow(64)
    x = flow.prior([0])
    shifted = x.roll((5, 16), dims=(-2, -1))  # 16 cells are a period of the force

    assert torch.allclose(
        flow.transition(shifted), flow.transition(x).roll((5, 16), (-2, -1)), atol=1e-5
    )


def test_transition_keeps_shape_and_input() -> None:
    flow = KolmogorovFlow(16)
    x = flow.prior(range(6)).unflatten(0, (2, 3))
    before = x.clone()
    y = flow.transition(x)

    assert y.shape == x.shape
    assert torch.equal(x, before)
    assert torch.equal(flow.transition(x.expand(2, 2, 3, -1, -1, -1))[1], y)


def test_values_that_are_not_finite_are_not_hidden() -> None:
    flow = KolmogorovFlow(16)
    x = flow.prior([0, 1])
    x[0, 1, 7, 7] = torch.nan
    y = flow.transition(x)

    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_resting_fluid_stays_finite() -> None:
    # Every difference is zero, and so are the denominators of the limiter.
    x = KolmogorovFlow(64).transition(torch.zeros(1, 2, 64, 64))

    assert x.isfinite().all()
    assert x[:, 1].abs().max() < 1e-6


def test_trajectory_repeats_transitions() -> None:
    flow = KolmogorovFlow(16)
    x = flow.prior([0, 1])
    states = flow.trajectory(x, length=3)

    assert states.shape == (2, 3, 2, 16, 16)
    assert torch.equal(states[:, 0], flow.transition(x))
    assert torch.equal(states[:, 2], flow.transition(states[:, 1]))
    assert torch.equal(flow.trajectory(x, length=3, last=2), states[:, 1:])


def test_statistics_are_the_reference() -> None:
    flow = KolmogorovFlow(256)
    x = flow.prior([0, 1])
    energies, states = [], []

    for i in range(128):
        x = flow.transition(x)
        y = coarsen(x, 4)
        energies.append(y.square().sum(dim=1).mean(dim=(1, 2)) / 2)

        if i >= 64:
            states.append(y)

    y = torch.stack(states, dim=1).double()
    u, v = y.unbind(dim=2)
    grid = (torch.arange(64) + 0.5) * (2 * torch.pi / 64)
    k = torch.fft.fftfreq(64, 1 / 64)
    modes = torch.fft.fft2(y, norm="forward").abs().square().sum(dim=2) / 2
    shells = torch.hypot(k[:, None], k).round().long().flatten()
    spectrum = torch.zeros(2, 46).double()
    spectrum.index_add_(1, shells, modes.mean(dim=1).flatten(1))

    found = {
        "ke": y.square().sum(dim=2).mean(dim=(1, 2, 3)) / 2,
        "ke_of_t": torch.stack(energies, dim=1),
        "E": spectrum,
        "injection": (u * torch.sin(4 * grid)).mean(dim=(1, 2, 3)),
        "u_absmax": u.abs().amax(dim=(1, 2, 3)),
        "u_std": u.std(dim=(2, 3)).mean(dim=1),
        "v_std": v.std(dim=(2, 3)).mean(dim=1),
        "upstream_vort_std": vorticity(y).std(dim=(2, 3)).mean(dim=1),
    }

    for key, values in found.items():
        mean, std = reference(f"{key}_mean"), reference(f"{key}_std")
        margin = 4 * std * (1 / 2 + 1 / int(REFERENCE["count"])) ** 0.5
        # The mean flow, in the shell k = 0, is nothing but rounding.
        margin = margin + 1e-13
        assert ((values.mean(dim=0) - mean).abs() <= margin).all(), key
