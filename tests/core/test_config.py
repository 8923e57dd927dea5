r"""Tests for the sda_ray.core.config module."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sda_ray.core.config import (
    ACTIVATIONS,
    CONFIG,
    KEYS,
    Config,
    check_config,
    check_value,
    format_value,
    load_config,
    parse_overrides,
    parse_value,
    save_config,
)
from sda_ray.core.errors import UserError

UPSTREAM = {
    "window": 5,
    "embedding": 64,
    "hidden_channels": (96, 192, 384),
    "hidden_blocks": (3, 3, 3),
    "kernel_size": 3,
    "activation": "SiLU",
    "epochs": 4096,
    "batch_size": 32,
    "optimizer": "AdamW",
    "learning_rate": 2e-4,
    "weight_decay": 1e-3,
    "scheduler": "linear",
}

OURS = {
    "seed": 0,
    "valid_seed": 0,
    "alpha": "cos",
    "parametrization": "eps",
    "dropout": 0.0,
    "betas": (0.9, 0.999),
    "warmup": 0,
    "grad_clip": 0.0,
    "ema": 0.0,
    "precision": "fp32",
    "compile": "off",
}

BAD: list[tuple[dict[Any, Any], str]] = [
    (
        {"learning_rates": 1e-3},
        "CONFIG has no key 'learning_rates'. Did you mean 'learning_rate'?",
    ),
    ({3: 1}, "CONFIG has no key 3"),
    ({"window": 4}, "window is 4, but must be an odd integer from 3"),
    ({"window": 1}, "window is 1, but must be an odd integer from 3"),
    ({"window": 33}, "window is 33, but must be at most 32"),
    ({"kernel_size": 4}, "kernel_size is 4, but must be an odd integer"),
    ({"kernel_size": 10**9 + 1}, "kernel_size is 1000000001, but must be"),
    ({"hidden_blocks": (3, 3)}, "both must have the same number of levels"),
    ({"hidden_channels": (1, 192, 384)}, "from 2 to 4096"),
    ({"hidden_channels": ()}, "hidden_channels has 0 levels"),
    ({"hidden_channels": (2,) * 10**5}, "hidden_channels has 100000 levels"),
    ({"hidden_channels": 96}, "hidden_channels is 96, but must be a list of integers"),
    ({"hidden_channels": "96,192,384"}, "must be a list of integers"),
    ({"hidden_blocks": (3, 0, 3)}, "from 1 to 256"),
    ({"hidden_blocks": (3, True, 3)}, "must be a list of integers"),
    ({"hidden_channels": (4096,) * 3, "hidden_blocks": (256,) * 3}, "weights, but must have at"),
    ({"hidden_channels": (8,) * 8, "hidden_blocks": (1,) * 8}, "divisible by 128"),
    (
        {"hidden_channels": (8,) * 6, "hidden_blocks": (1,) * 6, "kernel_size": 7},
        "kernel_size is 7, but must be at most 5",
    ),
    ({"embedding": 0}, "embedding is 0, but must be an integer from 1"),
    ({"epochs": -1}, "epochs is -1"),
    ({"epochs": 3.5}, "epochs is 3.5, but must be an integer"),
    ({"epochs": "256"}, "epochs is '256', but must be an integer"),
    ({"epochs": None}, "epochs is None"),
    ({"batch_size": True}, "batch_size is True"),
    ({"learning_rate": 0}, "learning_rate is 0, but must be a number above 0"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"learning_rate": math.inf}, "learning_rate is inf"),
    ({"learning_rate": "2e-4"}, "learning_rate is '2e-4', but must be a number"),
    ({"weight_decay": -1e-3}, "weight_decay is -0.001, but must be a number from 0"),
    ({"activation": "silu"}, "must be ELU, GELU, ReLU, SELU or SiLU. Did you mean 'SiLU'?"),
    ({"activation": ["SiLU"]}, "activation is ['SiLU']"),
    ({"scheduler": "cosin"}, "Did you mean 'cosine'?"),
    ({"optimizer": "SGD"}, "optimizer is 'SGD', but must be AdamW"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 1e300}, "seed is 1e+300"),
    ({"alpha": "sin"}, "alpha is 'sin', but must be cos, lin or exp. Did you mean 'lin'?"),
    ({"parametrization": "x"}, "parametrization is 'x', but must be eps or v."),
    ({"dropout": 1}, "dropout is 1, but must be a number from 0 to below 1"),
    ({"ema": -0.1}, "ema is -0.1, but must be a number from 0 to below 1"),
    ({"betas": (0.9,)}, "betas is (0.9,), but must be 2 numbers from 0 to below 1"),
    ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0), but must be 2 numbers"),
    ({"betas": (0.9, "x")}, "betas is (0.9, 'x'), but must be 2 numbers"),
    ({"betas": 0.9}, "betas is 0.9, but must be 2 numbers"),
    ({"warmup": 1.5}, "warmup is 1.5, but must be an integer"),
    ({"warmup": 5000}, "warmup is 5000, but must be at most epochs, here 4096"),
    ({"grad_clip": math.inf}, "grad_clip is inf, but must be a number"),
    ({"precision": "fp16"}, "precision is 'fp16', but must be fp32, bf16 or tf32"),
]


def values(name: str) -> st.SearchStrategy[Any]:
    key = KEYS[name]

    if key.options:
        return st.sampled_from(key.options)
    elif key.kind is float:
        return st.floats(key.low, key.high, exclude_min=key.above, exclude_max=key.below)
    elif key.item is float:
        items = st.floats(key.low, key.high, exclude_max=key.below)
        return st.lists(items, min_size=key.count or 1, max_size=key.count).map(tuple)

    integers = st.integers(int(key.low), int(key.high)).filter(lambda i: not key.odd or i % 2)
    return integers if key.kind is int else st.lists(integers, min_size=1, max_size=5).map(tuple)


def test_defaults_are_those_of_sda() -> None:
    assert CONFIG == UPSTREAM | OURS
    assert list(CONFIG)[:12] == list(UPSTREAM)
    assert check_config(CONFIG, size=64, length=64) == CONFIG


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(b)[:60] for b, _ in BAD])
def test_errors_are_named(changes: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError) as e:
        check_config(CONFIG | changes, size=64, length=32)

    assert message in str(e.value)
    assert len(str(e.value).split("\n")) == 1
    assert len(str(e.value)) < 300


def test_all_errors_are_found_at_once() -> None:
    config = CONFIG | {"kernel_size": 4, "activation": "tanh", "hidden_blocks": (1,), "lr": 1}
    del config["seed"]

    with pytest.raises(UserError) as e:
        check_config(config)

    found = [line.split()[0] for line in str(e.value).split("\n")]
    assert found == ["CONFIG", "kernel_size", "activation", "seed", "hidden_channels"]


@pytest.mark.parametrize("name", CONFIG)
def test_missing_key_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is missing"):
        check_config({k: v for k, v in CONFIG.items() if k != name})


@pytest.mark.parametrize("config", [None, [], "CONFIG", 3])
def test_configuration_must_be_a_dict(config: Any) -> None:
    with pytest.raises(UserError, match="must be a dict"):
        check_config(config)


def test_checked_configuration_is_in_normal_form() -> None:
    loose = {"hidden_channels": [64, 128.0, 256], "epochs": 2.0, "learning_rate": 1}
    config = check_config(dict(reversed((CONFIG | loose).items())))

    assert config["hidden_channels"] == (64, 128, 256)
    assert all(type(c) is int for c in config["hidden_channels"])
    assert type(config["epochs"]) is int
    assert type(config["learning_rate"]) is float
    assert list(config) == list(CONFIG)


def test_check_leaves_its_argument_alone() -> None:
    config = CONFIG | {"hidden_channels": [64, 128, 256]}
    check_config(config)
    assert config["hidden_channels"] == [64, 128, 256]


@pytest.mark.parametrize("name", KEYS)
@settings(max_examples=settings().max_examples // 4)  # for each key
@given(data=st.data())
def test_parse_inverts_format(name: str, data: st.DataObject) -> None:
    value = check_value(name, data.draw(values(name)))
    assert parse_value(name, format_value(value)) == value


@pytest.mark.parametrize("text", ["96,192,384", "(96, 192, 384)", "[96,192,384]", "96, 192, 384,"])
def test_levels_may_have_brackets(text: str) -> None:
    assert parse_value("hidden_channels", text) == (96, 192, 384)


def test_overrides_are_typed_by_the_key() -> None:
    overrides = ["epochs=1e3", "learning_rate=1", "activation=GELU", "hidden_blocks=2"]
    overrides += ["betas=(0.5, 0.95)", "ema=0.999"]
    parsed = parse_overrides(overrides)

    assert parsed == {
        "epochs": 1000,
        "learning_rate": 1.0,
        "activation": "GELU",
        "hidden_blocks": (2,),
        "betas": (0.5, 0.95),
        "ema": 0.999,
    }
    assert type(parsed["epochs"]) is int
    assert type(parsed["learning_rate"]) is float


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs"], "'epochs' is not of the form key=value"),
        (["epoch=3"], "CONFIG has no key 'epoch'. Did you mean 'epochs'?"),
        (["epochs=many"], "epochs is 'many', but must be an integer"),
        (["epochs=1.5"], "epochs is '1.5', but must be an integer"),
        (["epochs=inf"], "epochs is 'inf', but must be an integer"),
        (["epochs="], "epochs is '', but must be an integer"),
        (["learning_rate=fast"], "learning_rate is 'fast', but must be a number"),
        (["hidden_channels=96,wide"], "hidden_channels is '96,wide', but must be a list"),
        (["seed=1", "seed=2"], "seed is given twice"),
    ],
)
def test_wrong_overrides_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        parse_overrides(overrides)

    assert message in str(e.value)


def test_saved_configuration_loads(tmp_path: Path) -> None:
    config = CONFIG | {"seed": 7, "hidden_channels": (8, 16), "hidden_blocks": (1, 2)}
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("ours", [{}, {"seed": 3}])
def test_configurations_of_sda_and_of_before_load(ours: Config, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(UPSTREAM | ours))
    assert load_config(file) == CONFIG | ours


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("", "is damaged"),
        ("[" * 10**5, "is damaged"),
        ("\xff", "must be a dict"),
        ("[]", "must be a dict"),
        (json.dumps(CONFIG | {"dropuot": 0.1}), "CONFIG has no key 'dropuot'"),
        (json.dumps(CONFIG | {"learning_rate": math.nan}), "learning_rate is nan"),
        (json.dumps({"window": 5}), "embedding is missing"),
    ],
)
def test_every_line_about_a_wrong_file_names_it(
    content: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content) if content == "\xff" else content)

    with pytest.raises(UserError) as e:
        load_config(file)

    assert message in str(e.value)
    assert all(line.startswith(str(file)) for line in str(e.value).split("\n"))


def test_activations_are_those_of_torch() -> None:
    nn = pytest.importorskip("torch.nn")
    assert all(callable(getattr(nn, name)) for name in ACTIVATIONS)
