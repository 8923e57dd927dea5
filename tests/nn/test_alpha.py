r"""Tests that a network is only ever used with the diffusion that it was trained for: its decay of
the signal, and its parametrization."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from networks import RUN
from torch import nn

from sda_ray.core.config import ALPHAS, CONFIG, PARAMETRIZATIONS
from sda_ray.core.errors import UserError
from sda_ray.nn.score import MCScoreNet, load_score, load_sde, make_score, network_settings
from sda_ray.training.loop import TrainState

SMALL = CONFIG | {
    "window": 3,
    "embedding": 8,
    "hidden_channels": (4, 6),
    "hidden_blocks": (1, 1),
}


def saved(directory: Path, **changes: object) -> MCScoreNet:
    r"""Makes a finished run, as far as its network is concerned."""

    config = SMALL | changes
    score = make_score(**network_settings(config), size=16)
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(score.state_dict(), directory / "state.pth")

    return score


@pytest.mark.parametrize(
    "key, value", [("alpha", "lin"), ("alpha", "exp"), ("parametrization", "v")]
)
def test_strict_load_of_sda_refuses_what_it_does_not_know(key: str, value: str) -> None:
    state = make_score(**network_settings(SMALL | {key: value}), size=16).state_dict()
    theirs = make_score(**network_settings(SMALL), size=16)

    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{key}_{value}"'):
        theirs.load_state_dict(state)

    assert state.pop(f"{key}_{value}") is not None
    theirs.load_state_dict(state)  # all else has the same names and shapes


def test_names_of_the_weights_are_those_of_sda_whatever_else_is_set() -> None:
    more = {"dropout": 0.1, "ema": 0.999, "warmup": 3, "grad_clip": 1.0, "precision": "bf16"}
    theirs = make_score(**network_settings(SMALL), size=16).state_dict()

    assert list(make_score(**network_settings(SMALL | more), size=16).state_dict()) == list(theirs)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_load_sde_has_the_alpha_and_parametrization_of_the_run(
    alpha: str, parametrization: str, tmp_path: Path
) -> None:
    score = saved(tmp_path, alpha=alpha, parametrization=parametrization, dropout=0.5).eval()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sde = load_sde(tmp_path)

    assert sde.curve == alpha and sde.shape == (3, 2, 16, 16) and not sde.training
    x, t = torch.randn(2, 3, 2, 16, 16), torch.rand(2)
    assert sde.eps(x, t).equal(score(x, t))
    assert load_sde(tmp_path, length=5).sample((2,), steps=2).shape == (2, 5, 2, 16, 16)


def test_load_sde_reads_the_runs_of_sda() -> None:
    sde = load_sde(RUN)

    assert sde.curve == "cos" and sde.shape == (3, 2, 64, 64)


def test_load_sde_refuses_trajectories_shorter_than_the_window() -> None:
    with pytest.raises(UserError, match="length is 2, but must be at least 3"):
        load_sde(RUN, length=2)


def test_load_score_alone_warns_of_other_alphas(tmp_path: Path) -> None:
    saved(tmp_path, alpha="exp")

    with pytest.warns(UserWarning, match=r"is for alpha=exp.*load_sde") as caught:
        load_score(tmp_path)

    assert caught[0].filename == __file__


@pytest.mark.parametrize(("trained", "claimed"), [("exp", "cos"), ("cos", "lin"), ("lin", "exp")])
def test_config_and_state_of_different_alphas_are_refused(
    trained: str, claimed: str, tmp_path: Path
) -> None:
    saved(tmp_path, alpha=trained)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"alpha": claimed}))

    with pytest.raises(UserError, match=rf"for alpha={trained}, but .* has alpha={claimed}\."):
        load_sde(tmp_path)


@pytest.mark.parametrize(
    "key, value, default", [("alpha", "exp", "cos"), ("parametrization", "v", "eps")]
)
def test_config_that_lost_a_key_of_the_network_is_refused(
    key: str, value: str, default: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(RUN, tmp_path / RUN.name))
    state = torch.load(run / "state.pth", weights_only=True)
    torch.save(state | {f"{key}_{value}": torch.ones(())}, run / "state.pth")

    with pytest.raises(UserError, match=rf"for {key}={value}, but .* has {key}={default}\."):
        load_score(run)


def test_training_and_what_follows_use_the_alpha_of_the_config() -> None:
    state = TrainState(SMALL | {"alpha": "lin", "ema": 0.9}, 16)

    assert state.sde.curve == state.result_sde.curve == "lin"


def test_loaded_network_does_not_drop_out(tmp_path: Path) -> None:
    saved(tmp_path, dropout=0.5)
    score = load_score(tmp_path)
    x, t = torch.randn(1, 3, 2, 16, 16), torch.rand(1)

    assert not any(isinstance(m, nn.Module) and m.training for m in score.modules())
    assert score(x, t).equal(score(x, t))
