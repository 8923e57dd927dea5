r"""Tests of the arithmetic of training: what is lowered, what is not, and what it costs."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sda_ray.core.config import Config
from sda_ray.data.dataset import TrajectoryDataset
from sda_ray.nn.conv import CircularConv2d
from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.precision import allow_tf32, allowing_tf32, full, lower, lowered
from sda_ray.nn.score import MCScoreNet, make_score, network_settings
from sda_ray.nn.unet import LayerNorm, UNet, UpTail
from sda_ray.training.loop import TrainState, train_epoch
from sda_ray.training.validation import Validation

CPU = torch.device("cpu")
Flags = Callable[[], tuple[bool, bool]]


@pytest.fixture
def score(small: Config) -> MCScoreNet:
    return make_score(**network_settings(small), size=16)


@pytest.fixture
def flags() -> Iterator[Flags]:
    r"""Returns what tells whether TF32 is allowed, and restores it afterwards."""

    def allowed() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    convolutions, products = allowed()
    yield allowed
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


@pytest.fixture(scope="module")
def trained(small: Config, data: Path) -> VPSDE:
    r"""A network that has learnt something: its loss is a fifth of that of no network at all."""

    config = small | {"epochs": 60, "learning_rate": 3e-3, "scheduler": "cosine"}
    state = TrainState(config, 16)
    trainset = TrajectoryDataset(data / "train.h5", window=3)
    losses = [train_epoch(state, trainset) for _ in range(config["epochs"])]
    assert sum(losses[-5:]) / 5 < 0.25

    return state.sde


def spy(score: nn.Module) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    r"""Records the dtypes of the input and the output of each module."""

    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}

    for name, module in score.named_modules():

        def record(_: Any, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name] = args[0].dtype, output.dtype

        module.register_forward_hook(record)

    return seen


def test_loss_in_bf16_is_that_of_fp32_at_all_levels_of_noise(trained: VPSDE, data: Path) -> None:
    time = torch.linspace(0, 1, 10001, dtype=torch.double)
    level = trained.sigma(time).log()
    edges = torch.linspace(float(level[0]), float(level[-1]), 21, dtype=torch.double)
    validset = TrajectoryDataset(data / "valid.h5", window=3)
    generator = torch.Generator().manual_seed(0)

    for low, high in itertools.pairwise(edges):
        where = low + (high - low) * torch.rand(16, generator=generator, dtype=torch.double)
        t = time[torch.searchsorted(level, where).clamp(max=10000)].float()
        starts = torch.randint(validset.starts, (16,), generator=generator)
        x = validset.windows(torch.arange(16) % len(validset), starts)
        noise = torch.randn(x.shape, generator=generator)

        with torch.no_grad():
            expected = trained.errors(x, t, noise).mean()

            with lowered("bf16", CPU):
                found = trained.errors(x, t, noise).mean()

        assert found != expected
        assert abs(found / expected - 1) < 0.02, (low, high)


def test_bf16_lowers_inner_convolutions_and_projections_only(score: MCScoreNet) -> None:
    seen = spy(score)

    with lowered("bf16", CPU):
        y = score(torch.randn(2, 3, 2, 16, 16), torch.rand(2))

    low, single = torch.bfloat16, torch.float32
    outer = ("kernel.network.heads.0", "kernel.network.tails.1")
    convs = {k for k, m in score.named_modules() if isinstance(m, CircularConv2d | nn.Linear)}
    inner = {k for k in convs if not k.startswith(("kernel.embedding", *outer))}
    inner -= {k for k, m in score.named_modules() if isinstance(m, UpTail) for k in (f"{k}.2",)}

    assert y.dtype == single
    assert all(seen[name][1] == low for name in inner)
    assert all(seen[name] == (single, single) for name in convs - inner if name in seen)

    for name, module in score.named_modules():
        if isinstance(module, LayerNorm):
            assert seen[name] == (single, single), name


def test_gradients_and_weights_of_bf16_are_fp32(score: MCScoreNet) -> None:
    with lowered("bf16", CPU):
        loss = score(torch.randn(2, 3, 2, 16, 16), torch.rand(2)).square().mean()

    loss.backward()

    for name, p in score.named_parameters():
        assert p.dtype == torch.float32 and p.grad is not None, name
        assert p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0, name


def test_first_and_last_convolution_and_embedding_keep_their_bits_in_bf16() -> None:
    unet = UNet(3, 2, 5, (4,), (1,), kernel_size=3)
    nn.init.zeros_(unet.descent[0][0].residue[3].weight)  # type: ignore[index]
    nn.init.zeros_(unet.ascent[0][0].residue[3].weight)  # type: ignore[index]

    for level in (unet.descent, unet.ascent):
        nn.init.zeros_(level[0][0].residue[3].bias)  # type: ignore[index]

    x, e = torch.randn(1, 3, 8, 8), torch.randn(1, 5)
    y = unet(x, e)

    with lowered("bf16", CPU):
        assert unet(x, e).equal(y)


def test_layer_norm_of_half_precision_is_that_of_single() -> None:
    x = torch.randn(2, 64, 4, 4).bfloat16() + 30

    assert LayerNorm()(x).equal(LayerNorm()(x.float()).bfloat16())
    assert LayerNorm()(x.double()).dtype == torch.double


def test_validation_and_samples_are_fp32_whatever_the_precision(small: Config, data: Path) -> None:
    states = [TrainState(small | {"precision": p}, 16) for p in ("fp32", "bf16", "tf32")]
    validation = Validation(TrajectoryDataset(data / "valid.h5", window=3))

    assert len({validation(state.result_sde) for state in states}) == 1

    samples = [
        state.result_sde.sample(steps=2, generator=torch.Generator().manual_seed(0))
        for state in states
    ]
    assert all(x.equal(samples[0]) for x in samples)


def test_tf32_means_nothing_on_a_cpu(small: Config, data: Path, flags: Flags) -> None:
    trainset = TrajectoryDataset(data / "train.h5", window=3)
    before = flags()
    single, tf32 = (TrainState(small | {"precision": p}, 16) for p in ("fp32", "tf32"))

    assert train_epoch(single, trainset) == train_epoch(tf32, trainset)
    assert flags() == before


def test_tf32_is_allowed_in_the_backward_pass_too(
    small: Config, data: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, bool]] = set()
    state = TrainState(small | {"precision": "tf32"}, 16)
    next(state.score.parameters()).register_hook(lambda _: seen.add(flags()))
    cuda = torch.device("cuda")  # the flags can be set without one, and mean nothing
    monkeypatch.setattr(
        "sda_ray.training.loop.allowing_tf32", lambda precision, _: allowing_tf32(precision, cuda)
    )
    allow_tf32(False)
    train_epoch(state, TrajectoryDataset(data / "train.h5", window=3))

    assert seen == {(True, True)} and flags() == (False, False)


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_tf32_is_allowed_on_cuda_only_inside(precision: str, flags: Flags) -> None:
    allow_tf32(False)
    assert flags() == (False, False)

    with allowing_tf32(precision, torch.device("cuda")):
        assert flags() == (precision == "tf32",) * 2

    assert flags() == (False, False)


def test_lowering_ends_where_it_is_left() -> None:
    x = torch.randn(3)
    assert lower(x) is x

    with lowered("bf16", CPU):
        assert lower(x).dtype == torch.bfloat16

        with full(x):
            assert lower(x) is x

    assert lower(x) is x
