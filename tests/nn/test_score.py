r"""Tests for sda_ray.nn.score: the score networks."""

import numpy as np
import pytest
import torch
from networks import REFERENCE, RUN, small
from plain import plain_chain, plain_kernel, strip
from torch import Tensor

from sda_ray.core.errors import UserError
from sda_ray.nn.score import ScoreUNet, load_score


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden() -> dict[str, Tensor]:
    with np.load(REFERENCE / "golden.npz") as file:
        return {key: torch.as_tensor(x) for key, x in file.items()}


# Mathematics


@torch.no_grad()
def test_kernel_gives_the_outputs_of_sda(golden: dict[str, Tensor]) -> None:
    eps = load_score(RUN).kernel(golden["kernel_x"], golden["kernel_t"])

    assert torch.allclose(eps[..., ::5, ::5], golden["kernel_eps"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_chain_gives_the_outputs_of_sda(golden: dict[str, Tensor]) -> None:
    eps = load_score(RUN)(golden["chain_x"], golden["chain_t"])

    assert torch.allclose(eps[..., ::5, ::5], golden["chain_eps"], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 5, "activation": "GELU"},
        {"window": 7, "kernel_size": 5},
        {"hidden_channels": (4, 6, 8), "hidden_blocks": (1, 2, 1), "activation": "ELU"},
        {"embedding": 3, "size": 32, "kernel_size": 5, "activation": "SELU"},
    ],
    ids=str,
)
def test_network_equals_plain_formulation(changes: dict) -> None:
    score = small(**changes).double()
    kernel = score.kernel
    assert isinstance(kernel, ScoreUNet)

    window, size = 2 * score.order + 1, kernel.forcing.shape[-1]
    activation = changes.get("activation", "SiLU")
    y = (torch.arange(size, dtype=torch.double) + 0.5) * 2 * torch.pi / size

    # What the buffers lost to rounding in float32 is no part of the comparison.
    kernel.forcing.copy_(torch.sin(4 * y).expand(size, size))
    kernel.embedding.freqs.copy_(torch.pi * torch.arange(1, 17, dtype=torch.double))

    state = score.state_dict()
    x = torch.randn(2, window + 2, 2, size, size, dtype=torch.double)
    t = torch.rand(2, dtype=torch.double)

    z = plain_chain(state, x, t, activation, window)
    assert torch.allclose(score(x, t), z, rtol=0, atol=1e-12)

    x = x[:, :window].flatten(1, 2)
    z = plain_kernel(strip(state, "kernel."), x, t, activation)
    assert torch.allclose(kernel(x, t), z, rtol=0, atol=1e-12)


@torch.no_grad()
def test_chain_equals_kernel_on_a_single_window() -> None:
    score = small(window=5)
    x, t = torch.randn(2, 5, 2, 16, 16), torch.rand(2)

    assert score(x, t).flatten(1, 2).equal(score.kernel(x.flatten(1, 2), t))


@torch.no_grad()
def test_members_of_a_batch_are_independent() -> None:
    score = small().double()
    x, t = torch.randn(3, 6, 2, 16, 16).double(), torch.rand(3).double()
    y = score(x, t)

    for i in range(3):
        assert torch.allclose(score(x[i : i + 1], t[i]), y[i : i + 1], rtol=0, atol=1e-12)
        assert torch.allclose(score(x[i : i + 1], t[i : i + 1]), y[i : i + 1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_estimate_depends_on_neighbours_within_the_order_alone() -> None:
    score = small(window=3)
    x, t = torch.randn(1, 7, 2, 16, 16), torch.tensor(0.5)
    z = x.clone()
    z[:, 3] += 1
    changed = (score(x, t) - score(z, t)).abs().amax((0, 2, 3, 4)) > 0

    # The first and the last estimate come with the window of their neighbour.
    assert changed.tolist() == [False, False, True, True, True, False, False]


@torch.no_grad()
def test_network_is_equivariant_to_shifts_along_x_and_knows_where_it_is_along_y() -> None:
    kernel = small().double().kernel
    x, t = torch.randn(1, 6, 16, 16).double(), torch.tensor(0.5).double()
    y = kernel(x, t)

    assert torch.allclose(kernel(x.roll(2, -2), t), y.roll(2, -2), rtol=0, atol=1e-12)
    assert not torch.allclose(kernel(x.roll(2, -1), t), y.roll(2, -1), atol=1e-6)


def test_same_inputs_give_the_same_bits() -> None:
    score = small()
    x, t = torch.randn(4, 3, 2, 16, 16), torch.rand(4)

    def grads() -> Tensor:
        score.zero_grad()
        score(x, t).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in score.parameters() if p.grad is not None])

    assert grads().equal(grads())


def test_gradients_reach_every_parameter() -> None:
    score = small()
    score(torch.randn(2, 4, 2, 16, 16), torch.rand(2)).square().sum().backward()

    for name, p in score.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_trajectory_shorter_than_the_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(2, 4, 2, 16, 16\).* L at least 5"):
        small(window=5)(torch.zeros(2, 4, 2, 16, 16), torch.tensor(0.5))


def test_fields_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 6, 8, 8\), but .* fields of \(16, 16\)"):
        small()(torch.zeros(2, 3, 2, 8, 8), torch.tensor(0.5))


def test_a_context_is_refused() -> None:
    x = torch.zeros(2, 3, 2, 16, 16)

    with pytest.raises(ValueError, match="c is given"):
        small()(x, torch.tensor(0.5), torch.zeros(1, 16, 16))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(UserError, match="activation is 'Softmax', but must be one of"):
        small(activation="Softmax")
