r"""Tests for sda_ray.core.domain: domains as records, as text and as JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import values as fixed
from test_space import SPACE, conditional

from sda_ray.core.config import CONFIG
from sda_ray.core.domain import encode
from sda_ray.core.errors import UserError
from sda_ray.core.keys import KEYS
from sda_ray.core.space import (
    check_space,
    choice,
    decode,
    describe,
    integer,
    space_from_json,
    space_to_json,
    uniform,
)


def domains(name: str) -> st.SearchStrategy[Any]:
    choices = st.lists(fixed(name), min_size=1, max_size=4).map(lambda o: choice(*o))

    if KEYS[name].kind is float:
        return choices | st.builds(uniform, fixed(name), fixed(name))
    elif KEYS[name].kind is int:
        return choices | st.builds(integer, fixed(name), fixed(name), st.booleans(), fixed("seed"))

    return choices


@pytest.mark.parametrize("params", [{"a": 1}, {"hidden_channels,hidden_blocks": "8,16"}])
def test_foreign_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        decode(params)


@pytest.mark.parametrize("name", [*KEYS, "hidden_channels,hidden_blocks", "seed,activation"])
@given(data=st.data())
def test_decode_inverts_encode(name: str, data: st.DataObject) -> None:
    keys = name.split(",")
    values = tuple(data.draw(fixed(key)) for key in keys)
    option = encode(name, values if len(keys) > 1 else values[0])

    assert isinstance(option, str | int | float)
    assert decode({name: option}) == dict(zip(keys, values, strict=True))


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


def test_description_is_short() -> None:
    assert describe(SPACE)["learning_rate"] == "0.0001 to 0.001 (log)"
    assert describe(SPACE)["kernel_size"] == "3 to 7 in steps of 2"
    assert describe(SPACE)["activation"] == "'GELU', 'SiLU'"
    assert describe(conditional) == {"conditional": "Wide or deep."}
