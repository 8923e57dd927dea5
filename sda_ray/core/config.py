r"""CONFIG: the settings of one training, their defaults, and their checks.

The first 12 keys and their defaults are those of SDA, so that configurations can be exchanged.

References:
    | Score-based Data Assimilation (Rozet et al., 2023)
    | https://arxiv.org/abs/2306.10574
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean, short_repr
from .files import read_json, write_json

Config = dict[str, Any]

MAX_WEIGHTS = 10**9  # 4 GB; the defaults have 23 million

ACTIVATIONS: tuple[str, ...] = ("ELU", "GELU", "ReLU", "SELU", "SiLU")
SCHEDULERS: tuple[str, ...] = ("linear", "cosine", "exponential", "constant", "wsd")
ALPHAS: tuple[str, ...] = ("cos", "lin", "exp")
PARAMETRIZATIONS: tuple[str, ...] = ("eps", "v")

MAX_LEVELS = 16


@dataclass(frozen=True)
class Key:
    r"""The description of a key of CONFIG."""

    default: Any
    about: str
    kind: type  # int, float, str or tuple
    low: float = 1
    high: float = math.inf
    above: bool = False  # whether `low` itself is excluded
    below: bool = False  # whether `high` itself is excluded
    odd: bool = False
    options: tuple[str, ...] = ()
    ours: bool = False  # whether SDA does not know the key, so that a file may lack it
    item: type = int  # of a tuple, int or float
    count: int | None = None  # of the items of a tuple, if it is fixed
    network: bool = False  # whether the key shapes the network, or its weights' meaning

    @property
    def accepts(self) -> str:
        r"""The accepted values, in words."""

        if self.options:
            *others, last = self.options
            return f"{', '.join(others)} or {last}" if others else last

        if self.kind is tuple:
            items = "integers" if self.item is int else "numbers"
            what = f"a list of {items}" if self.count is None else f"{self.count} {items}"
        elif self.kind is int:
            what = "an odd integer" if self.odd else "an integer"
        else:
            what = "a number"

        if self.above:
            return f"{what} above {self.low} and at most {self.high}"

        if self.below:
            return f"{what} from {self.low} to below {self.high}"

        return f"{what} from {self.low} to {self.high}"


# Upper bounds are far above sensible values. They keep a hostile file from exhausting memory.
KEYS: dict[str, Key] = {
    "window": Key(
        5, "consecutive snapshots that the network sees", int, 3, 1023, odd=True, network=True
    ),
    "embedding": Key(64, "features of the time embedding", int, 1, 4096, network=True),
    "hidden_channels": Key((96, 192, 384), "channels at each level", tuple, 2, 4096, network=True),
    "hidden_blocks": Key((3, 3, 3), "residual blocks at each level", tuple, 1, 256, network=True),
    "kernel_size": Key(3, "size of the convolutions' kernels", int, 1, 63, odd=True, network=True),
    "activation": Key("SiLU", "activation function", str, options=ACTIVATIONS, network=True),
    "epochs": Key(4096, "passes over the training trajectories", int, 1, 10**8),
    "batch_size": Key(32, "windows per training step", int, 1, 2**20),
    "optimizer": Key("AdamW", "optimizer", str, options=("AdamW",)),
    "learning_rate": Key(2e-4, "learning rate at the start", float, 0, 100, above=True),
    "weight_decay": Key(1e-3, "weight decay, on all parameters", float, 0, 100),
    "scheduler": Key("linear", "decay of the learning rate", str, options=SCHEDULERS),
    "seed": Key(0, "seed of weights, batches and noise", int, 0, 2**63 - 1, ours=True),
    "valid_seed": Key(
        0, "seed of the windows, times and noise to validate on", int, 0, 2**63 - 1, ours=True
    ),
    "alpha": Key(
        "cos", "decay of the signal in the noise", str, options=ALPHAS, ours=True, network=True
    ),
    "parametrization": Key(
        "eps",
        "estimate of the network: the noise, or v",
        str,
        options=PARAMETRIZATIONS,
        ours=True,
        network=True,
    ),
    "dropout": Key(0.0, "rate of dropout", float, 0, 1, below=True, ours=True),
    "betas": Key(
        (0.9, 0.999), "AdamW's betas", tuple, 0, 1, below=True, ours=True, item=float, count=2
    ),
    "warmup": Key(0, "epochs of linear warm-up", int, 0, 10**8, ours=True),
    "grad_clip": Key(0.0, "highest norm of the gradient, 0 for any", float, 0, 1e9, ours=True),
    "ema": Key(0.0, "decay of averaged weights, 0 for none", float, 0, 1, below=True, ours=True),
    "precision": Key(
        "fp32", "arithmetic of training", str, options=("fp32", "bf16", "tf32"), ours=True
    ),
    "compile": Key(
        "off", "torch.compile of the network", str, options=("off", "on", "graphs"), ours=True
    ),
}

NETWORK: tuple[str, ...] = tuple(name for name, key in KEYS.items() if key.network)

CONFIG: Config = {name: key.default for name, key in KEYS.items()}


# Configurations


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


# Values of one key


def check_value(name: str, value: Any) -> Any:
    r"""Returns a value of CONFIG in its normal form: int, float, str or tuple of numbers.

    Integral floats pass as integers, since JSON and many tools know only one kind of number.

    Raises:
        UserError: If the key is unknown, or the value not accepted.
    """

    key, value = _key(name), to_python(value)
    fault = UserError(f"{name} is {short_repr(value)}, but must be {key.accepts}.")

    if key.kind is str:
        if not isinstance(value, str) or value not in key.options:
            only = len(key.options) == 1
            raise UserError(f"{fault}{'' if only else did_you_mean(value, key.options)}")

        return str(value)

    if key.kind is tuple:
        if not isinstance(value, list | tuple) or key.count not in (None, len(value)):
            raise fault

        if not 1 <= len(value) <= MAX_LEVELS:
            raise UserError(f"{name} has {len(value)} levels, but must have 1 to {MAX_LEVELS}.")

        return tuple(_number(to_python(v), key.item, key, fault) for v in value)

    return _number(value, key.kind, key, fault)


def parse_value(name: str, text: str) -> Any:
    r"""Returns the value of a text, typed by the key, but not checked.

    The items of `hidden_channels`, `hidden_blocks` and `betas` are separated by commas, with or
    without brackets.

    Example:
        >>> parse_value("hidden_channels", "96,192,384")
        (96, 192, 384)
        >>> parse_value("learning_rate", "1e-3")
        0.001

    Raises:
        UserError: If the key is unknown, or the text is not of its type.
    """

    key, text = _key(name), text.strip()

    try:
        if key.kind is str:
            return text.strip("'\"")

        if key.kind is tuple:
            items = text.strip("()[]").rstrip(",").split(",")
            return tuple(_parse(item, key.item) for item in items)

        return _parse(text, key.kind)
    except ValueError as e:
        raise UserError(f"{name} is {short_repr(text)}, but must be {key.accepts}.") from e


def format_value(value: Any) -> str:
    r"""Returns a text that :func:`parse_value` turns back into the value."""

    if isinstance(value, list | tuple):
        return ",".join(map(str, value))

    return value if isinstance(value, str) else repr(value)


def to_python(value: Any) -> Any:
    r"""Returns a scalar or an array of NumPy or PyTorch as Python's numbers and lists."""

    return value.tolist() if hasattr(value, "tolist") else value


def _key(name: str) -> Key:
    if name not in KEYS:
        raise UserError(f"CONFIG has no key {short_repr(name)}.{did_you_mean(name, KEYS)}")

    return KEYS[name]


def _parse(text: str, kind: type) -> int | float:
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        if not (number := float(text)).is_integer():
            raise

        return int(number)  # as 1e3


def _number(value: Any, kind: type, key: Key, fault: UserError) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real too
        raise fault

    number: Any = value

    if not key.low <= number <= key.high:  # as NaN
        raise fault

    if (key.above and number == key.low) or (key.below and number == key.high):
        raise fault

    if kind is float:
        return float(number)

    if number % 1 or (key.odd and number % 2 == 0):
        raise fault

    return int(number)
