r"""Tests of the convolutions of periodic fields."""

import pytest
import torch
import torch.nn.functional as F

from sda_ray.nn.conv import (
    CircularConv2d,
    circular_pad,
    upsampled_conv2d,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_convolution_is_torchs_circular_convolution(kernel_size: int, stride: int) -> None:
    conv = CircularConv2d(3, 4, kernel_size, stride).double()
    plain = torch.nn.Conv2d(
        3, 4, kernel_size, stride, padding=kernel_size // 2, padding_mode="circular"
    ).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 8, 6, dtype=torch.double)

    assert torch.allclose(conv(x), plain(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (5, 3)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_upsampled_convolution_is_upsampling_then_convolution(
    kernel_size: int, size: tuple[int, int]
) -> None:
    p = kernel_size // 2
    x = torch.randn(2, 3, *size, dtype=torch.double)
    w = torch.randn(4, 3, kernel_size, kernel_size, dtype=torch.double)
    b = torch.randn(4, dtype=torch.double)
    skip = torch.randn(2, 4, 2 * size[0], 2 * size[1], dtype=torch.double)

    y = F.interpolate(x, scale_factor=2, mode="nearest")
    y = F.conv2d(F.pad(y, (p,) * 4, mode="circular"), w, b) + skip

    assert torch.allclose(upsampled_conv2d(x, w, b, skip), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_gradients_are_those_of_finite_differences(kernel_size: int) -> None:
    x = torch.randn(2, 2, 3, 4, dtype=torch.double, requires_grad=True)
    w = torch.randn(3, 2, kernel_size, kernel_size, dtype=torch.double, requires_grad=True)
    b = torch.randn(3, dtype=torch.double, requires_grad=True)
    skip = torch.randn(2, 3, 6, 8, dtype=torch.double, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: circular_pad(x, 2), (x,))
    assert torch.autograd.gradcheck(upsampled_conv2d, (x, w, b, skip), fast_mode=True)


# Padding


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "padding"), [((6, 8), 1), ((5, 4), 2), ((2, 3), 2), ((4, 4), 0)])
def test_pad_is_torchs_circular_pad(
    size: tuple[int, int], padding: int, layout: torch.memory_format
) -> None:
    x = torch.randn(2, 3, *size).to(memory_format=layout).requires_grad_()
    y = F.pad(x, (padding,) * 4, mode="circular")
    z = circular_pad(x, padding)
    w = torch.randn_like(y)

    assert z.equal(y)
    assert z.is_contiguous(memory_format=torch.channels_last)

    (expected,) = torch.autograd.grad((w * y).sum(), x)
    (grad,) = torch.autograd.grad((w * z).sum(), x)

    assert torch.allclose(grad, expected, atol=1e-6)


def test_pad_does_not_change_the_gradient_it_is_given() -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    z = circular_pad(x, 1)
    grad = torch.randn_like(z)
    before = grad.clone()
    z.backward(grad)

    assert grad.equal(before)


def test_pad_wider_than_the_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"padding is 3, but must be at most"):
        circular_pad(torch.zeros(1, 1, 4, 2), 3)
