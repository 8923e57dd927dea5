r"""Tests of the U-Net and its parts."""

import pytest
import torch
from plain import normalize, plain_unet
from torch import nn

from sda_ray.nn.conv import _tap_sums
from sda_ray.nn.unet import LayerNorm, ModResidualBlock, Residue, UNet
from sda_ray.nn.winograd import _matrices

CONFIGS = [
    {"hidden_channels": (4, 6), "hidden_blocks": (1, 2), "kernel_size": 3},
    {"hidden_channels": (4, 6, 8), "hidden_blocks": (2, 1, 1), "kernel_size": 3},
    {"hidden_channels": (4, 6, 8), "hidden_blocks": (1, 1, 1), "kernel_size": 5},
    {"hidden_channels": (6,), "hidden_blocks": (2,), "kernel_size": 7},
    {"hidden_channels": (4, 6), "hidden_blocks": (1, 1), "kernel_size": 1},
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("channels", [2, 3, 16, 96])
def test_layer_norm_standardizes_with_the_unbiased_variance(channels: int) -> None:
    x = torch.randn(3, channels, 4, 5, dtype=torch.double) * 2 + 1
    y = LayerNorm()(x)

    assert torch.allclose(y, normalize(x), rtol=0, atol=1e-13)
    assert torch.allclose(y.mean(1), torch.zeros(()).double(), atol=1e-6)
    assert torch.allclose(y.var(1), x.var(1) / (x.var(1) + 1e-5))


def test_residual_block_is_modulated() -> None:
    block = ModResidualBlock(project=nn.Linear(3, 5), residue=nn.Tanh())
    x, e = torch.randn(2, 5), torch.randn(2, 3)

    assert torch.allclose(block(x, e), x + torch.tanh(x + block.project(e)))


def test_residue_drops_out_after_the_activation_in_training_only() -> None:
    residue = Residue(64, 1, nn.ReLU, dropout=0.25)
    x = torch.randn(4, 64, 8, 8)
    seen = []
    residue[3].register_forward_hook(lambda _, args, y: seen.append(args[0]))

    residue.eval()(x)
    torch.manual_seed(1)
    residue.train()(x)
    torch.manual_seed(1)
    residue(x)
    residue(x)
    whole, dropped, same, other = seen
    kept = dropped != 0

    assert abs(kept.sum() / (whole != 0).sum() - 0.75) < 0.02
    assert torch.allclose(dropped[kept], whole[kept] / 0.75)
    assert dropped.equal(same) and not dropped.equal(other)


def test_residue_without_dropout_draws_nothing() -> None:
    state = torch.get_rng_state()
    residue = Residue(4, 3, nn.SiLU)
    torch.set_rng_state(state)
    residue.train()(torch.zeros(1, 4, 8, 8))

    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("config", "activation"),
    [(config, "SiLU") for config in CONFIGS]
    + [(CONFIGS[0], activation) for activation in ("ELU", "GELU", "ReLU", "SELU")],
)
def test_unet_equals_plain_formulation(config: dict, activation: str) -> None:
    unet = UNet(3, 2, 5, activation=getattr(nn, activation), **config).double()
    x = torch.randn(2, 3, 16, 8, dtype=torch.double, requires_grad=True)
    e = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    weights = dict(unet.named_parameters())

    y, z = unet(x, e), plain_unet(dict(weights), x, e, activation)
    w = torch.randn_like(z)

    assert torch.allclose(y, z, rtol=0, atol=1e-12)

    expected = torch.autograd.grad((w * z).sum(), (x, e, *weights.values()))
    grads = torch.autograd.grad((w * y).sum(), (x, e, *weights.values()))

    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_every_parameter(config: dict) -> None:
    unet = UNet(3, 2, 5, **config)
    unet(torch.randn(2, 3, 16, 16), torch.randn(2, 5)).square().sum().backward()

    for name, p in unet.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("shift", [4, 8])
@pytest.mark.parametrize("axis", [-1, -2])
def test_unet_is_equivariant_to_circular_shifts(axis: int, shift: int) -> None:
    unet = UNet(3, 2, 5, (4, 6, 8), (1, 1, 1), kernel_size=5).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    e = torch.randn(2, 5, dtype=torch.double)

    assert torch.allclose(
        unet(x.roll(shift, axis), e), unet(x, e).roll(shift, axis), rtol=0, atol=1e-12
    )


def test_weights_have_channels_last_in_memory_and_their_usual_shapes() -> None:
    unet = UNet(3, 2, 5, (4, 6), (1, 1), kernel_size=3)

    for name, p in unet.named_parameters():
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=torch.channels_last), name
            assert p.shape[-2:] == (3, 3), name


def test_levels_of_channels_and_blocks_must_agree() -> None:
    with pytest.raises(ValueError, match="argument"):
        UNet(3, 2, 5, (4, 6), (1, 1, 1))


def test_network_that_was_used_in_inference_mode_trains() -> None:
    unet = UNet(2, 2, mod_features=3, hidden_channels=(48, 48), hidden_blocks=(1, 1))
    x, e = torch.randn(8, 2, 16, 16), torch.randn(1, 3)
    _matrices.cache_clear()
    _tap_sums.cache_clear()

    with torch.inference_mode():
        expected = unet(x, e)

    y = unet(x, e)
    y.square().mean().backward()

    assert torch.equal(y, expected)
    assert all(p.grad is not None for p in unet.parameters())
