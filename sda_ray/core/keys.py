r"""The table of CONFIG's keys: their types, defaults and bounds, and values of one key."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .errors import UserError

ACTIVATIONS: tuple[str, ...] = ("ELU", "GELU", "ReLU", "SELU", "SiLU")
SCHEDULERS: tuple[str, ...] = ("linear", "cosine", "exponential", "constant", "wsd")
ALPHAS: tuple[str, ...] = ("cos", "lin", "exp")
PARAMETRIZATIONS: tuple[str, ...] = ("eps", "v")

MAX_LEVELS = 16

# Names that other tools have for our keys, and that are not like them
ALIASES = {
    "amp": "precision",
    "blocks": "hidden_blocks",
    "bs": "batch_size",
    "channels": "hidden_channels",
    "decay": "weight_decay",
    "depth": "hidden_blocks",
    "dtype": "precision",
    "lr": "learning_rate",
    "max_norm": "grad_clip",
    "nonlinearity": "activation",
    "opt": "optimizer",
    "random_state": "seed",
    "wd": "weight_decay",
    "width": "hidden_channels",
}


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


def did_you_mean(word: Any, words: Iterable[str]) -> str:
    r"""Returns ` Did you mean 'x'?` for the word that is closest, nothing if there is none, or the word
    itself is one of them.
    """

    lower, text = {w.lower(): w for w in words}, str(word).lower()[:64]
    alias = ALIASES.get(text.strip("-"))
    close = [alias] if alias in lower else difflib.get_close_matches(text, lower, n=1)

    return f" Did you mean '{lower[close[0]]}'?" if close and lower[close[0]] != word else ""


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


def short_repr(value: Any) -> str:
    r"""Returns a value for messages, shortened to a line."""

    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
