r"""Tests that networks are differentiable as often and in every mode as plain PyTorch networks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from sda_ray.nn.conv import circular_pad, upsampled_conv2d
from sda_ray.nn.score import ScoreUNet
from sda_ray.nn.winograd import winograd_conv2d

# torch.func's forward mode uses torch.jit, which warns of itself. So does tracing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def pad(x: Tensor) -> Tensor:
    return circular_pad(x, 1)


def plain_pad(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="circular")


def plain_conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(plain_pad(x), w, b)


def plain_upsampled(x: Tensor, w: Tensor, b: Tensor, skip: Tensor) -> Tensor:
    return plain_conv(F.interpolate(x, scale_factor=2), w, b) + skip


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "pad": (pad, plain_pad, [(2, 2, 3, 4)]),
    "upsampled": (
        upsampled_conv2d,
        plain_upsampled,
        [(2, 2, 2, 3), (2, 2, 3, 3), (2,), (2, 2, 4, 6)],
    ),
    "winograd": (winograd_conv2d, plain_conv, [(1, 1, 8, 8), (2, 1, 3, 3), (2,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    f, _, shapes = CASES[name]
    x = [normal(*shape) for shape in shapes]

    assert gradcheck(
        f, x, fast_mode=True, check_forward_ad=True, check_batched_grad=name != "winograd"
    )
    assert gradgradcheck(f, x, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("name", CASES)
def test_transforms_are_those_of_the_plain_formulation(name: str) -> None:
    f, plain, shapes = CASES[name]
    x, v = ([normal(*shape).detach() for shape in shapes] for _ in range(2))
    many = [torch.stack([a, 2 * a]) for a in x]
    every = tuple(range(len(x)))

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: f(*x).pow(3).sum()

    for transform in (
        lambda f: grad(loss(f), every)(*x),
        lambda f: vjp(f, *x)[1](f(*v)),
        lambda f: jvp(f, tuple(x), tuple(v))[1],
        lambda f: jvp(grad(loss(f), every), tuple(x), tuple(v))[1],
        lambda f: vmap(f)(*many),
        lambda f: vmap(f, in_dims=(0, *(None for _ in x[1:])))(many[0], *x[1:]),
        lambda f: vmap(grad(loss(f), every))(*many),
        lambda f: jacrev(f)(*x),
        lambda f: jacfwd(f)(*x),
        lambda f: jacrev(grad(loss(f)))(*x),
    ):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context:
                torch.testing.assert_close(transform(f), transform(plain))


class Network:
    r"""A narrow network, or one that is wide enough for the Winograd convolution."""

    def __init__(self, wide: bool, parametrization: str = "eps") -> None:
        torch.manual_seed(0)
        channels, self.batch = ((48,), 8) if wide else ((4, 6), 2)
        blocks = tuple(1 for _ in channels)
        options: dict[str, Any] = {
            "hidden_channels": channels,
            "hidden_blocks": blocks,
            "activation": nn.SiLU,
        }
        net = ScoreUNet(6, 3, 16, parametrization=parametrization, **options)
        self.net = net.double().eval()
        self.x, self.v = torch.randn(2, self.batch, 6, 16, 16, dtype=torch.double)
        self.t = torch.rand(self.batch, dtype=torch.double)

    def loss(self, x: Tensor, t: Tensor, weights: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(self.net, weights, (x, t))

        return (y * self.v).square().sum()


@pytest.fixture(params=[(False,), (True,), (False, "v")], ids=["narrow", "wide", "v"])
def network(request: pytest.FixtureRequest) -> Network:
    return Network(*request.param)


def test_hessian_product_of_a_network_is_that_of_finite_differences(network: Network) -> None:
    x, t, h = network.x, network.t, 1e-5
    weights = {k: p.detach() for k, p in network.net.named_parameters()}
    w = (
        torch.randn_like(x),
        torch.randn_like(t),
        {k: torch.randn_like(p) for k, p in weights.items()},
    )
    at = x, t, weights
    gradient = grad(network.loss, (0, 1, 2))

    def moved(h: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        y, s, p = w
        return x + h * y, t + h * s, {k: q + h * p[k] for k, q in weights.items()}

    def flat(tree: tuple[Tensor, Tensor, dict[str, Tensor]]) -> Tensor:
        return torch.cat([tree[0].flatten(), tree[1], *(p.flatten() for p in tree[2].values())])

    expected = (flat(gradient(*moved(h))) - flat(gradient(*moved(-h)))) / (2 * h)
    scale = float(expected.abs().max())
    forward = flat(jvp(gradient, at, w)[1])

    leaves = [x.clone().requires_grad_(), t.clone().requires_grad_()]
    params = {k: p.clone().requires_grad_() for k, p in weights.items()}
    every = [*leaves, *params.values()]
    first = torch.autograd.grad(
        network.loss(leaves[0], leaves[1], params), every, create_graph=True
    )
    flat_w = [w[0], w[1], *w[2].values()]
    product = torch.stack([(g * v).sum() for g, v in zip(first, flat_w, strict=True)]).sum()
    backward = torch.cat([g.flatten() for g in torch.autograd.grad(product, every)])

    assert torch.allclose(forward, expected, rtol=1e-5, atol=1e-6 * scale)
    assert torch.allclose(backward, forward, rtol=1e-9, atol=1e-9 * scale)


def test_network_is_mapped_over_its_members(network: Network) -> None:
    x, t = torch.stack([network.x, network.v]), torch.stack([network.t, 1 - network.t])

    assert torch.allclose(
        vmap(network.net)(x, t), torch.stack([network.net(*a) for a in zip(x, t, strict=True)])
    )


def test_network_is_traced_as_it_is(network: Network) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(network.net, (network.x, network.t))
        x, t = network.v, 1 - network.t

        assert torch.allclose(traced(x, t), network.net(x, t))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_network_is_converted_to_another_dtype(dtype: torch.dtype) -> None:
    network = Network(wide=False)
    expected = network.net(network.x, network.t)
    y = network.net.to(dtype)(network.x.to(dtype), network.t.to(dtype))

    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 0.1 * expected.norm()
