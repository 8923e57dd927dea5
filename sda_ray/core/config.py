r"""CONFIG: the settings of one training, their defaults, and their checks.

The first 12 keys and their defaults are those of SDA, so that configurations can be exchanged.

References:
    | Score-based Data Assimilation (Rozet et al., 2023)
    | https://arxiv.org/abs/2306.10574
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json, write_json
from .keys import KEYS, check_value, did_you_mean, parse_value, short_repr

Config = dict[str, Any]

MAX_WEIGHTS = 10**9  # 4 GB; the defaults have 23 million

CONFIG: Config = {name: key.default for name, key in KEYS.items()}


def check_config(
    config: Any, size: int | None = None, length: int | None = None, whole: bool = True
) -> Config:
    r"""Checks a configuration, and returns it in normal form and in the order of CONFIG.

    Arguments:
        config: The configuration, with all keys of CONFIG.
        size: The number of grid cells along each axis of the data, if known.
        length: The number of snapshots in a trajectory of the data, if known.
        whole: Whether its values must fit together. Those of a sweep only do with those of SPACE.

    Raises:
        UserError: If anything is wrong. The message has one line for each error.
    """

    if not isinstance(config, Mapping):
        raise UserError(
            f"The configuration is {short_repr(config)}, but must be a dict of CONFIG's keys."
        )

    errors, checked = [], {}

    for name in config:
        if name not in KEYS:
            errors.append(f"CONFIG has no key {short_repr(name)}.{did_you_mean(name, KEYS)}")

    for name, key in KEYS.items():
        if name not in config:
            errors.append(f"{name} is missing. It is {key.accepts}; CONFIG has {key.default!r}.")
            continue

        try:
            checked[name] = check_value(name, config[name])
        except UserError as e:
            errors.append(str(e))

    if errors := errors + list(_conflicts(checked, size, length) if whole else ()):
        raise UserError("\n".join(errors))

    return checked


def parse_overrides(overrides: Iterable[str]) -> Config:
    r"""Returns the values of texts `key=value`, typed by the key, but not checked.

    Raises:
        UserError: If a text is not of this form, or a key is given twice or unknown.
    """

    parsed: Config = {}

    for override in overrides:
        name, equals, text = map(str.strip, override.partition("="))

        if not equals:
            raise UserError(f"{override!r} is not of the form key=value, as epochs=256.")

        if name in parsed:
            raise UserError(f"{name} is given twice.")

        parsed[name] = parse_value(name, text)

    return parsed


def load_config(file: Path | str, size: int | None = None, length: int | None = None) -> Config:
    r"""Returns the configuration in a JSON file, by SDA or this package, see :func:`check_config`.

    Keys that SDA does not know have their defaults if they are missing.

    Raises:
        UserError: If the file is unreadable or the configuration wrong. The message names it.
    """

    config = read_json(file)

    try:
        if isinstance(config, dict):
            config = {name: key.default for name, key in KEYS.items() if key.ours} | config

        return check_config(config, size, length)
    except UserError as e:
        raise UserError("\n".join(f"{file}: {line}" for line in str(e).split("\n"))) from e


def save_config(config: Config, file: Path | str) -> None:
    r"""Writes a configuration as a flat JSON object, atomically."""

    write_json(file, config)


def _conflicts(config: Config, size: int | None, length: int | None) -> Iterable[str]:
    r"""Yields the conflicts between values that are valid by themselves."""

    keys = ("hidden_channels", "hidden_blocks", "window", "kernel_size")
    channels, blocks, window, kernel = map(config.get, keys)

    if channels and blocks and len(channels) != len(blocks):
        yield (
            f"hidden_channels {channels} has {len(channels)} levels and hidden_blocks {blocks} "
            f"has {len(blocks)}, but both must have the same number of levels."
        )

    if channels and size is not None:
        coarsest, remainder = divmod(size, 2 ** (len(channels) - 1))

        if remainder:
            yield (
                f"hidden_channels {channels} has {len(channels)} levels and halves the size of "
                f"the data (={size}) {len(channels) - 1} times, but {size} must be divisible by "
                f"{2 ** (len(channels) - 1)}. Take fewer levels."
            )
        elif kernel and coarsest < kernel // 2:
            yield (
                f"kernel_size is {kernel}, but must be at most {2 * coarsest + 1}: the last of "
                f"{len(channels)} levels has size {coarsest} (data of {size}). Take a smaller "
                "kernel or fewer levels."
            )

    warmup, epochs = config.get("warmup", 0), config.get("epochs", math.inf)

    if warmup > epochs:
        yield f"warmup is {warmup}, but must be at most epochs, here {epochs}."

    if window and length is not None and window > length:
        yield f"window is {window}, but must be at most {length}, the snapshots of a trajectory."

    if len(config) == len(KEYS) and (weights := count_weights(config)) > MAX_WEIGHTS:
        yield (
            f"The network would have about {weights:.1e} weights, but must have at most "
            f"{MAX_WEIGHTS:.0e}. Take fewer hidden_channels, hidden_blocks or a smaller kernel."
        )


def count_weights(config: Config) -> int:
    r"""Returns the approximate number of weights, those of convolutions and projections."""

    taps, levels = config["kernel_size"] ** 2, config["hidden_channels"]
    widths = (4 * config["window"] + 1, *levels)  # head and tail are two of width 2 * window

    blocks = (
        2 * n * c * (2 * taps * c + config["embedding"])
        for n, c in zip(config["hidden_blocks"], levels, strict=False)
    )
    between = (2 * taps * a * b for a, b in zip(widths, levels, strict=False))

    return sum(blocks) + sum(between) + 256 * config["embedding"]
