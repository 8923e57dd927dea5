r"""Tests of the padding of periodic fields."""

import pytest
import torch
import torch.nn.functional as F

from sda_ray.nn.padding import circular_pad, modulated_pad, silu_pad


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
    x, shift = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 1, 1)

    for pad in (circular_pad, silu_pad, lambda x, p: modulated_pad(x, shift, p)):
        with pytest.raises(ValueError, match=r"padding is 3, but must be at most"):
            pad(x, 3)


@pytest.mark.parametrize("shifts", [1, 2])
def test_fused_pads_are_those_of_sum_and_activation(shifts: int) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    shift = torch.randn(shifts, 3, 1, 1, dtype=torch.double, requires_grad=True)
    padded, same = modulated_pad(x, shift, 2)

    assert padded.equal(circular_pad(x + shift, 2)) and same.equal(x)
    assert torch.allclose(silu_pad(x, 1), circular_pad(F.silu(x), 1), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x, s: modulated_pad(x, s, 2), (x, shift))
    assert torch.autograd.gradcheck(lambda x: silu_pad(x, 1), (x,))
