r"""Tests for sda_ray.core.space: checks of a SPACE, and draws from it."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_config import values as fixed

from sda_ray.core.config import CONFIG, KEYS, check_config
from sda_ray.core.errors import UserError
from sda_ray.core.space import (
    Choice,
    Range,
    check_space,
    choice,
    covers,
    decode_params,
    domain_of,
    draw_values,
    encode_option,
    integer,
    loguniform,
    space_from_json,
    space_to_json,
    uniform,
)

SPACE = {
    "hidden_channels,hidden_blocks": choice(((64, 128), (3, 3)), ((64, 96, 128), (2, 2, 2))),
    "activation": choice("GELU", "SiLU"),
    "kernel_size": integer(3, 7, step=2),
    "batch_size": choice(32, 64),
    "embedding": integer(16, 256, log=True),
    "learning_rate": loguniform(1e-4, 1e-3),
    "weight_decay": uniform(0, 1e-2),
}

BAD: list[tuple[Any, str]] = [
    (None, "SPACE is None, but must be a dict"),
    ({}, "SPACE is {}, but must be a dict"),
    ([loguniform(1, 2)], "but must be a dict"),
    (
        {"learning_rates": loguniform(1e-4, 1e-3)},
        "SPACE has 'learning_rates', which CONFIG has not. Did you mean 'learning_rate'?",
    ),
    ({3: choice(1, 2)}, "SPACE has '3', which CONFIG has not"),
    ({"hidden_channels,blocks": choice(((8,), (1,)))}, "SPACE has 'blocks', which CONFIG has not"),
    ({"window": choice(3, 5)}, "different windows are not comparable"),
    ({"epochs": integer(8, 16)}, "SPACE has 'epochs', but pruned trials"),
    ({"valid_seed": choice(0, 1)}, "SPACE has 'valid_seed', but runs are compared on the same"),
    ({"kernel_size": [3, 5]}, "SPACE['kernel_size'] is [3, 5], but must be choice"),
    ({"kernel_size": 3}, "SPACE['kernel_size'] is 3, but must be choice"),
    ({"kernel_size": choice()}, "SPACE['kernel_size']: the choice is empty"),
    ({"kernel_size": choice(3, 4)}, "SPACE['kernel_size']: kernel_size is 4, but must be"),
    ({"kernel_size": choice(3, 5, 3.0)}, "the choice has 3 2 times"),
    ({"kernel_size": integer(3, 5)}, "step is 1, but must be even"),
    ({"kernel_size": integer(3, 7, step=3)}, "step is 3, but must be a divisor of 4"),
    ({"embedding": integer(8, 16, step=0)}, "step is 0, but must be a divisor"),
    ({"embedding": integer(8, 16, step=2, log=True)}, "step is 2, but must be 1 with log"),
    ({"embedding": integer(16, 8)}, "the lower bound 16 must be below the upper bound 8"),
    ({"embedding": integer(8, 8)}, "the lower bound 8 must be below"),
    ({"embedding": uniform(8, 16)}, "take integer(…)"),
    ({"embedding": choice([64, 128])}, "choice takes its options one by one"),
    ({"learning_rate": integer(1, 2)}, "take uniform or loguniform(…)"),
    ({"learning_rate": loguniform(1e-3, 1e-4)}, "the lower bound 0.001 must be below"),
    ({"learning_rate": loguniform(0, 1e-4)}, "learning_rate is 0, but must be a number above 0"),
    ({"learning_rate": Range("a", 1)}, "learning_rate is 'a', but must be a number"),
    ({"learning_rate": uniform(float("nan"), 1)}, "learning_rate is nan"),
    ({"weight_decay": loguniform(0, 1e-2)}, "the lower bound is 0.0, but must be above 0"),
    ({"activation": uniform(0, 1)}, "take choice(…)"),
    ({"activation": choice("SiLU", "Silo")}, "Did you mean 'SiLU'?"),
    ({"hidden_channels": integer(8, 16)}, "take choice(…)"),
    ({"hidden_channels,hidden_blocks": choice((8, 16), (1, 2))}, "hidden_channels is 8, but"),
    ({"hidden_channels,hidden_blocks": choice((8, 16, 32))}, "must be a tuple of 2 values"),
    (
        {"hidden_blocks": choice((1,)), "hidden_channels,hidden_blocks": choice(((8,), (1,)))},
        "SPACE has 'hidden_blocks' 2 times",
    ),
    (
        {"hidden_channels": choice((64, 128), (64, 96, 128))},
        "must have the same number of levels. (1 of 2 combinations, as hidden_channels=64,128)",
    ),
    (
        {"kernel_size": choice(3, 63), "hidden_channels": choice((8, 8, 8), (8, 8, 16))},
        "kernel_size is 63, but must be at most 33",
    ),
]


def sample(function: Callable[[Any], Any], trials: int = 32) -> list[Any]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [function(study.ask()) for _ in range(trials)]


@pytest.mark.parametrize(("space", "message"), BAD, ids=[str(b)[:60] for b, _ in BAD])
def test_errors_are_named(space: Any, message: str) -> None:
    with pytest.raises(UserError) as e:
        check_space(space, CONFIG, size=64, length=64, pruner="asha")

    assert message in str(e.value)


def test_all_errors_are_found_at_once() -> None:
    space = {"lr": choice(1), "kernel_size": choice(2, 4), "embedding": 3, "epochs": choice(8)}

    with pytest.raises(UserError) as e:
        check_space(space, CONFIG)

    assert len(str(e.value).split("\n")) == 5


def test_options_of_two_keys_are_tried_together() -> None:
    space = {
        "hidden_channels": choice((64, 128), (64, 96, 128)),
        "hidden_blocks": choice((3, 3), (3, 3, 3)),
    }

    with pytest.raises(UserError) as e:
        check_space(space, CONFIG)

    assert "1 of 4 combinations, as hidden_channels=64,128 hidden_blocks=3,3,3" in str(e.value)
    assert "joined by a key 'hidden_channels,hidden_blocks'" in str(e.value)


def test_many_combinations_are_tried_at_random() -> None:
    space: Any = {
        "seed": choice(*range(5000)),
        "hidden_channels": choice((64, 128), (64, 96, 128)),
    }

    with pytest.raises(UserError, match="of 4096 combinations"):
        check_space(space, CONFIG)


def test_sizes_are_those_of_the_data() -> None:
    space = {"hidden_channels,hidden_blocks": choice(((8,) * 4, (1,) * 4), ((8,) * 5, (1,) * 5))}

    check_space(space, CONFIG, size=64)
    check_space(space, CONFIG)

    with pytest.raises(UserError, match="divisible by 16"):
        check_space(space, CONFIG, size=24)


def test_epochs_vary_only_without_pruning() -> None:
    space = {"epochs": integer(8, 16)}
    assert check_space(space, CONFIG, pruner="none") == space

    with pytest.raises(UserError, match="epochs"):
        check_space(space, CONFIG, pruner="median")


def test_checked_space_is_in_normal_form() -> None:
    loose = {
        "hidden_channels, hidden_blocks": choice([[64, 128], [3.0, 3]]),
        "learning_rate": uniform(1, 2),
        "batch_size": choice(32.0, 64),
    }

    assert check_space(loose, CONFIG) == {
        "hidden_channels,hidden_blocks": Choice((((64, 128), (3, 3)),)),
        "learning_rate": Range(1.0, 2.0),
        "batch_size": Choice((32, 64)),
    }
    assert check_space(SPACE, CONFIG, size=64, length=64) == SPACE


def test_draws_are_typed_and_accepted() -> None:
    space = check_space(SPACE, CONFIG)

    for values in sample(lambda trial: draw_values(space, trial)):
        assert check_config(CONFIG | values) == CONFIG | values
        assert {type(values[key]) for key in ("kernel_size", "batch_size", "embedding")} == {int}
        assert type(values["hidden_channels"]) is tuple
        assert len(values) == len(SPACE) + 1


def test_draws_cover_the_space() -> None:
    drawn = sample(lambda trial: draw_values(SPACE, trial), trials=64)

    assert {d["hidden_channels"] for d in drawn} == {(64, 128), (64, 96, 128)}
    assert {d["kernel_size"] for d in drawn} == {3, 5, 7}
    assert all(1e-4 <= d["learning_rate"] <= 1e-3 for d in drawn)


def test_drawn_parameters_survive_in_a_journal(tmp_path: Any) -> None:
    def storage() -> JournalStorage:
        return JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))

    study = optuna.create_study(storage=storage(), study_name="space")
    drawn = [draw_values(SPACE, study.ask()) for _ in range(8)]
    study = optuna.load_study(storage=storage(), study_name="space")

    assert [decode_params(t.params) for t in study.trials] == drawn


def conditional(trial: Any) -> dict[str, Any]:
    r"""Wide or deep.

    Both have as many levels as blocks.
    """

    levels = trial.suggest_int("levels", 2, 3)
    values = {"hidden_channels": [8] * levels, "hidden_blocks": "1," * levels}

    if levels == 2:
        values["learning_rate"] = trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)

    return values


def test_function_makes_a_conditional_space() -> None:
    assert check_space(conditional, CONFIG) is conditional

    drawn = sample(lambda trial: draw_values(conditional, trial))

    assert {len(d) for d in drawn} == {2, 3}
    assert {d["hidden_channels"] for d in drawn} == {(8, 8), (8, 8, 8)}
    assert all(check_config(CONFIG | d) for d in drawn)


def test_function_may_suggest_tuples() -> None:
    def space(trial: Any) -> dict[str, Any]:
        widths = trial.suggest_categorical("widths", [(8, 16, 32), (16, 32, 64)])
        assert trial.number >= 0
        return {"hidden_channels": widths}

    drawn = sample(lambda trial: draw_values(space, trial))
    assert {d["hidden_channels"] for d in drawn} == {(8, 16, 32), (16, 32, 64)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "SPACE returned None, but must return a dict"),
        ({"levels": 3}, "SPACE has 'levels', which CONFIG has not"),
        ({"window": 5}, "different windows are not comparable"),
        ({"epochs": 5}, "pruned trials are compared at equal epochs"),
        ({"kernel_size": 4}, "kernel_size is 4, but must be an odd integer"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', but must be a number"),
    ],
)
def test_values_of_a_function_are_checked(values: Any, message: str) -> None:
    with pytest.raises(UserError) as e:
        sample(lambda trial: draw_values(lambda _: values, trial, pruner="asha"), trials=1)

    assert message in str(e.value)


def domains(name: str) -> st.SearchStrategy[Any]:
    choices = st.lists(fixed(name), min_size=1, max_size=4).map(lambda o: choice(*o))

    if KEYS[name].kind is float:
        return choices | st.builds(uniform, fixed(name), fixed(name))
    elif KEYS[name].kind is int:
        return choices | st.builds(integer, fixed(name), fixed(name), st.booleans(), fixed("seed"))

    return choices


@given(low=st.integers(-9, 9), width=st.integers(1, 9), step=st.integers(1, 4))
def test_range_contains_its_steps_and_nothing_else(low: int, width: int, step: int) -> None:
    values = range(low, low + width * step + 1, step)
    domain = integer(low, values[-1], step=step)

    for value in range(low - 3, values[-1] + 4):
        assert (value in domain) is (float(value) in domain) is (value in values)

    assert low + 0.5 not in domain


def test_range_of_numbers_contains_its_bounds() -> None:
    domain = loguniform(1e-4, 1e-3)

    assert all(x in domain for x in (1e-4, np.float64(5e-4), 1e-3))
    assert not any(x in domain for x in (0.0, 1.1e-3, math.nan, True, "1e-4", None))
    assert (8, 16) in choice("GELU", (8, 16))
    assert "SiLU" not in choice("GELU", (8, 16))


def test_domain_of_a_distribution_contains_its_draws() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    for trial in (study.ask() for _ in range(32)):
        draw_values(SPACE, trial)

        for name, distribution in trial.distributions.items():
            assert trial.params[name] in domain_of(distribution)
            assert str(domain_of(distribution))


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        (uniform(0, 2), uniform(1, 2), True),
        (uniform(1, 2), uniform(0, 2), False),
        (loguniform(1, 3), uniform(1, 2), False),
        (integer(3, 9, step=2), integer(5, 7, step=2), True),
        (integer(2, 10, step=2), integer(3, 7, step=2), False),
        (choice("a", "b"), choice("b"), True),
        (choice("a"), choice("a", "b"), False),
        (choice(1, 2), integer(1, 2), False),
    ],
)
def test_domain_covers_those_that_it_was_widened_from(
    wide: Any, narrow: Any, expected: bool
) -> None:
    assert covers(wide, narrow) is expected


@pytest.mark.parametrize("params", [{"a": 1}, {"hidden_channels,hidden_blocks": "8,16"}])
def test_foreign_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        decode_params(params)


@pytest.mark.parametrize("name", [*KEYS, "hidden_channels,hidden_blocks", "seed,activation"])
@settings(max_examples=settings().max_examples // 4)  # for each key
@given(data=st.data())
def test_decode_inverts_encode(name: str, data: st.DataObject) -> None:
    keys = name.split(",")
    values = tuple(data.draw(fixed(key)) for key in keys)
    option = encode_option(name, values if len(keys) > 1 else values[0])

    assert isinstance(option, str | int | float)
    assert decode_params({name: option}) == dict(zip(keys, values, strict=True))


@given(
    space=st.fixed_dictionaries(
        {}, optional={name: domains(name) for name in [*KEYS, "hidden_channels"]}
    )
)
def test_json_keeps_the_space(space: Any) -> None:
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space


def test_json_keeps_groups_and_types() -> None:
    space = space_from_json(json.loads(json.dumps(space_to_json(SPACE))))

    assert space == SPACE
    assert check_space(space, CONFIG) == check_space(SPACE, CONFIG)


def test_function_has_no_json() -> None:
    assert space_to_json(conditional) is None


@pytest.mark.parametrize("obj", [{"seed": 3}, {"seed": {"range": [1]}}, {"seed": {}}, []])
def test_other_json_is_refused(obj: Any) -> None:
    with pytest.raises(UserError, match="is not a recorded SPACE"):
        space_from_json(obj)


def test_text_of_a_domain_is_short() -> None:
    assert str(SPACE["learning_rate"]) == "0.0001 to 0.001 (log)"
    assert str(SPACE["kernel_size"]) == "3 to 7 in steps of 2"
    assert str(SPACE["activation"]) == "GELU, SiLU"
    assert str(choice((8, 16), (16, 32))) == "(8, 16), (16, 32)"


def test_a_choice_of_very_many_options_is_checked_at_once() -> None:
    start = time.process_time()
    check_space({"seed": choice(*range(10**5))}, None)

    assert time.process_time() - start < 10  # all pairs took 80 s
