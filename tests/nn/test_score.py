r"""Tests for sda_ray.nn.score: the score networks."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import REFERENCE, RUN, SMALL, small
from plain import plain_chain, plain_kernel, strip
from torch import Tensor

from sda_ray.core.config import ALPHAS, CONFIG
from sda_ray.core.errors import UserError
from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.precision import lowered
from sda_ray.nn.score import MCScoreNet, ScoreUNet, load_score, make_score, network_settings


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


def both(**changes: Any) -> tuple[MCScoreNet, MCScoreNet]:
    r"""Returns networks of the parametrizations eps and v that have the same weights."""

    eps, v = small(**changes), small(**changes, parametrization="v")
    v.load_state_dict(eps.state_dict(), strict=False)

    return eps, v


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", [(), (2,)])
@torch.no_grad()
def test_estimate_with_v_is_its_definition(shape: tuple[int, ...], alpha: str) -> None:
    F, score = (x.double() for x in both(alpha=alpha))
    x, t = torch.randn(2, 5, 2, 16, 16).double(), torch.rand(shape).double()
    sde = VPSDE(score, (5, 2, 16, 16), alpha)
    mu, sigma = (a.reshape(-1, 1, 1, 1, 1) for a in (sde.mu(t), sde.sigma(t)))

    # Of a trajectory as of a window: each state with its own x
    assert torch.allclose(score(x, t), sigma * x + mu * F(x, t), rtol=0, atol=1e-12)

    x = x[:, :3].flatten(1, 2)
    mu, sigma = mu[:, 0], sigma[:, 0]
    expected = sigma * x + mu * F.kernel(x, t)
    assert torch.allclose(score.kernel(x, t), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_estimate_with_v_is_in_single_precision_around_the_network() -> None:
    F, score = both()
    sde, t = VPSDE(score, (3, 2, 16, 16)), torch.rand(2)
    x = torch.randn(2, 3, 2, 16, 16)

    with lowered("bf16", torch.device("cpu")):
        assert score(x, t).equal(sde.perturb(F(x, t), t, x))

    y, score = torch.ones(2, 3, 2, 16, 16).half(), score.half()
    F, t = F.half(), torch.full((2,), 0.999)
    expected = sde.perturb(F(y, t).float(), t, y.float()).half()
    assert score(y, t).equal(expected)


@pytest.mark.parametrize("parametrization", ["eps", "v"])
def test_samples_of_untrained_networks_have_the_scale_of_data_with_v_alone(
    parametrization: str,
) -> None:
    score = small(parametrization=parametrization)
    sde = VPSDE(score.kernel, (6, 16, 16))
    std = sde.sample((8,), steps=16, generator=torch.Generator().manual_seed(0)).std()

    assert (0.5 < std < 2) == (parametrization == "v")


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_network_computes_in_any_dtype_whatever_that_of_the_times(dtype: torch.dtype) -> None:
    score = small()
    x, t = torch.randn(2, 4, 2, 16, 16), torch.rand(2)
    y = score(x, t)
    score.to(dtype)

    for times in (t, t.to(dtype)):
        z = score(x.to(dtype), times)
        assert z.dtype == dtype
        assert torch.allclose(z.float(), y, atol=0.1)


def test_a_context_is_refused() -> None:
    x = torch.zeros(2, 3, 2, 16, 16)

    with pytest.raises(ValueError, match="c is given"):
        small()(x, torch.tensor(0.5), torch.zeros(1, 16, 16))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(UserError, match="activation is 'Softmax', but must be ELU"):
        small(activation="Softmax")


# Files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / RUN.name))


def test_default_config_has_the_weights_of_sda() -> None:
    state = make_score(**network_settings(CONFIG)).state_dict()

    assert len(state) == 126
    assert round(sum(x.numel() * x.element_size() for x in state.values()) / 1e5) == 915


def test_names_and_shapes_are_those_of_sda() -> None:
    theirs = torch.load(RUN / "state.pth", weights_only=True)
    ours = make_score(
        **network_settings(json.loads((RUN / "config.json").read_text()))
    ).state_dict()

    assert list(ours) == list(theirs)
    assert [x.shape for x in ours.values()] == [x.shape for x in theirs.values()]


def test_loaded_network_is_the_saved_one(tmp_path: Path) -> None:
    score = small()
    config = {key: SMALL[key] for key in CONFIG}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(score.state_dict(), tmp_path / "state.pth")
    loaded = load_score(tmp_path)
    x, t = torch.randn(2, 4, 2, 16, 16), torch.rand(2)

    assert loaded(x, t).equal(score(x, t))

    for (name, a), b in zip(score.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.equal(b) and a.stride() == b.stride(), name


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefix_of_a_wrapped_network_is_taken_off(run: Path, prefix: str) -> None:
    before = load_score(run).state_dict()
    state = torch.load(run / "state.pth", weights_only=True)
    torch.save({prefix + key: x for key, x in state.items()}, run / "state.pth")

    assert all(x.equal(before[key]) for key, x in load_score(run).state_dict().items())


def test_default_dtype_is_not_that_of_a_file(run: Path) -> None:
    torch.set_default_dtype(torch.float64)

    try:
        assert {x.dtype for x in load_score(run).state_dict().values()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_loaded_network_outlives_its_file(run: Path) -> None:
    score = load_score(run)
    before = [p.clone() for p in score.parameters()]
    (run / "state.pth").write_bytes(b"")

    assert all(a.equal(b) for a, b in zip(before, score.parameters(), strict=True))


def test_unfinished_run_says_how_to_resume(run: Path) -> None:
    (run / "state.pth").unlink()

    with pytest.raises(UserError, match=r"not finished.*sda-ray train --resume"):
        load_score(run)


def test_run_without_config_is_refused(run: Path) -> None:
    (run / "config.json").unlink()

    with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
        load_score(run)


def test_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-run is not a directory"):
        load_score(tmp_path / "no-run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": 16}, r"'kernel\.embedding\.2\.weight' is float32 of shape \(8, 256\), but"),
        ({"window": 5}, r"'kernel\.network\.heads\.0\.weight' is .*\(8, 7, 3, 3\), but .*; "),
        ({"hidden_blocks": [1, 1]}, "is unknown"),
        ({"hidden_blocks": [1, 3]}, "is missing.*, and 9 more"),
        ({"hidden_channels": [8] * 8, "hidden_blocks": [1] * 8}, "fields of 64x64, but"),
    ],
)
def test_state_of_another_config_is_refused(run: Path, changes: dict, message: str) -> None:
    config = json.loads((run / "config.json").read_text()) | changes
    (run / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match=message) as e:
        load_score(run)

    assert str(run) in str(e.value)


def edit(run: Path, **changes: object) -> None:
    state = torch.load(run / "state.pth", weights_only=True)
    state.update({key.replace("__", "."): x for key, x in changes.items()})
    torch.save({k: x for k, x in state.items() if x is not None}, run / "state.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kernel__network__heads__0__bias": None},
            r"'kernel\.network\.heads\.0\.bias' is missing",
        ),
        ({"extra": torch.zeros(2)}, "'extra' is unknown"),
        ({"kernel__embedding__freqs": torch.zeros(16).double()}, "is float64 of shape"),
        ({"kernel__embedding__freqs": torch.zeros(16).to_sparse()}, "sparse"),
        ({"kernel__forcing": None}, r"has no 'kernel\.forcing'"),
        ({"kernel__forcing": torch.zeros(1, 64, 32)}, r"of shape \(1, 64, 32\), but"),
        ({"kernel__forcing": torch.zeros(1, 1, 1).expand(1, 10**6, 10**6)}, "with N at most 4096"),
        ({"kernel__forcing": torch.zeros(1, 1, 1).expand(1, 4096, 4096)}, "is shorter than"),
        ({"extra": 1.0}, "something else than a state dict"),
        (
            {"kernel__network__heads__0__bias": torch.full((8,), torch.nan)},
            r"not finite, in 'kernel\.network\.heads\.0\.bias'",
        ),
    ],
)
def test_state_with_wrong_entries_is_refused(run: Path, changes: dict, message: str) -> None:
    edit(run, **changes)

    with pytest.raises(UserError, match=message) as e:
        load_score(run)

    assert str(run / "state.pth") in str(e.value)


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04", "cut"])
def test_damaged_state_is_refused(run: Path, content: bytes | str) -> None:
    file = run / "state.pth"
    file.write_bytes(content if isinstance(content, bytes) else file.read_bytes()[:50_000])

    with pytest.raises(UserError, match=r"state\.pth is damaged, or not a file of weights"):
        load_score(run)


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_nothing_in_a_state_is_executed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    torch.save({"kernel.forcing": torch.zeros(1, 64, 64), "x": Payload()}, run / "state.pth")

    with pytest.raises(UserError, match=r"state\.pth is damaged, or not"):
        load_score(run)

    assert not (run / "executed").exists()


@pytest.mark.parametrize("name", ["config.json", "state.pth"])
def test_links_out_of_the_run_are_refused(run: Path, name: str) -> None:
    (run / name).rename(run.parent / name)
    (run / name).symlink_to(run.parent / name)

    with pytest.raises(UserError, match="out of its directory"):
        load_score(run)


def test_links_within_the_run_and_to_the_run_are_followed(run: Path) -> None:
    (run / "state.pth").rename(run / "weights.pth")
    (run / "state.pth").symlink_to("weights.pth")
    link = run.parent / "link"
    link.symlink_to(run)

    assert load_score(link).order == 1


def test_run_is_found_by_its_name_or_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = run.parent / "root"
    shutil.copytree(run, root / "runs" / run.name)
    monkeypatch.setenv("SDA_RAY_ROOT", str(root))
    name, _, id = run.name.rpartition("_")

    for known in (run.name, name, id, id[:3]):
        assert load_score(known).order == 1

    with pytest.raises(UserError, match=r"there is no run 'other' in .*root/runs, which holds 1"):
        load_score("other")


def test_files_that_are_not_regular_are_refused(run: Path) -> None:
    (run / "state.pth").unlink()
    os.mkfifo(run / "state.pth")

    with pytest.raises(UserError, match=r"state\.pth cannot be read: it is not a regular file"):
        load_score(run)


def test_setting_that_is_none_of_the_network_is_an_error() -> None:
    settings = network_settings(CONFIG)

    with pytest.raises(TypeError, match="kernel_sise"):
        make_score(**settings, kernel_sise=5)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="epochs"):
        make_score(**CONFIG)
