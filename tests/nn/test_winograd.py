r"""Tests for sda_ray.nn.winograd: the same convolution, with fewer multiplications."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sda_ray.nn.conv import CircularConv2d
from sda_ray.nn.winograd import pays, winograd_conv2d

Sizes = tuple[int, int, int, int, int]


def tensors(sizes: Sizes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    B, C, K, H, W = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, C, H, W), (K, C, 3, 3), (K,))

    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 8, 8), (3, 5, 7, 8, 12), (2, 4, 3, 20, 8), (70, 16, 16, 64, 64)]
)
def test_output_and_gradients_are_those_of_the_plain_convolution(
    sizes: Sizes, channels_last: bool
) -> None:
    x, weight, bias = tensors(sizes)
    inputs = x.to(memory_format=torch.channels_last) if channels_last else x
    expected, found = plain(x, weight, bias), winograd_conv2d(inputs, weight, bias)
    grad = torch.randn(expected.shape, dtype=x.dtype)

    assert error(found, expected) < 1e-13

    for a, b in zip(
        torch.autograd.grad(found, (x, weight, bias), grad),
        torch.autograd.grad(expected, (x, weight, bias), grad),
        strict=True,
    ):
        assert a.shape == b.shape
        assert error(a, b) < 1e-13


@pytest.mark.parametrize("channels", [48, 128, 256])
def test_rounding_in_single_precision_is_that_of_a_sum_term_by_term(channels: int) -> None:
    sizes = (4, channels, channels, 16, 16)
    exact = plain(*tensors(sizes))
    single = [x.float() for x in tensors(sizes)]

    # Torch's own sum is up to 7 times closer, which depends on the registers of the CPU.
    eps, terms = torch.finfo(torch.float32).eps, 9 * channels
    assert error(winograd_conv2d(*single), exact) < eps * terms**0.5


def test_gradient_of_the_field_alone_may_be_asked_for() -> None:
    x, weight, bias = tensors((2, 3, 4, 8, 8))
    weight, bias = weight.detach(), bias.detach()
    (found,) = torch.autograd.grad(winograd_conv2d(x, weight, bias).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x, weight, bias).square().sum(), x)

    assert error(found, expected) < 1e-13


def test_gradient_of_the_weights_alone_may_be_asked_for() -> None:
    x, weight, bias = tensors((2, 3, 4, 8, 8))
    x = x.detach()
    (found,) = torch.autograd.grad(winograd_conv2d(x, weight, bias).square().sum(), weight)
    (expected,) = torch.autograd.grad(plain(x, weight, bias).square().sum(), weight)

    assert error(found, expected) < 1e-13


@pytest.mark.parametrize(
    "channels, size, used", [(128, 32, True), (32, 32, False), (128, 6, False)]
)
def test_layer_uses_it_where_it_pays(channels: int, size: int, used: bool) -> None:
    layer = CircularConv2d(channels, channels, 3).double()
    x = torch.randn(2, channels, size, size, dtype=torch.float64)

    assert pays(x, layer.weight, 1) == used
    assert layer.bias is not None
    assert error(layer(x), plain(x, layer.weight, layer.bias)) < 1e-13


def test_same_input_gives_the_same_bits() -> None:
    x, weight, bias = tensors((8, 128, 128, 16, 16), torch.float32)

    assert torch.equal(winograd_conv2d(x, weight, bias), winograd_conv2d(x, weight, bias))
