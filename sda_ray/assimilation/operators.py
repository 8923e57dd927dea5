r"""Observation operators: from a trajectory to what instruments see of it.

Their text form is a sequence of names, applied from left to right, as in `every(4) coarsen(8)`:

=========================  ======================================================================
`identity`                 everything
`every(k)`                 the states 0, k, 2k, …; or those of a slice, as in `every(1:9:2)`
`last`                     the last state
`coarsen(k)`               the means over blocks of k × k points
`subsample(k)`             every k-th point in both directions
`box(i:j)`                 the rows and columns i to j - 1; or `box(i:j, k:l)`, rows and columns
`points(i,j; k,l)`         some points, each by its row and column
`ring(a:b)`                the points whose distance from the center, in half sides, is in [a, b]
`component(c)`             the channel c
`vorticity`                the vorticity of velocities, in units of the grid spacing, as a channel
`saturate`                 w / (1 + abs(w)), what an instrument shows that saturates
=========================  ======================================================================
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import UserError, did_you_mean, short_repr
from ..data import coarsen, vorticity


@dataclass(frozen=True)
class Part:
    r"""One name of an operator's text form, with what stands between its parentheses."""

    name: str
    argument: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        name = short_repr(str(self))
        words = re.split("[:,;]", self.argument) if self.argument else []
        numbers = [(float if "." in word else int)(word) if word else None for word in words]

        try:
            _check(x.dim() >= 4 and 0 not in x.shape[-4:], "trajectories (…, L, C, H, W)")
            y = KINDS[self.name].apply(x, *numbers)
        except _Misfit as misfit:
            raise UserError(f"{name} needs {misfit}, but x has shape {tuple(x.shape)}.")

        if 0 in y.shape[-4:]:
            raise UserError(f"{name} leaves nothing of x, which has shape {tuple(x.shape)}.")

        return y

    def __str__(self) -> str:
        return f"{self.name}({self.argument})" if self.argument else self.name


@dataclass(frozen=True)
class Operator:
    r"""An observation operator, as :func:`parse` makes it from a text.

    It maps a tensor of shape :math:`(*, L, C, H, W)` to one of shape :math:`(*, L', C', H', W')` of
    the same type, on the same device, with selected points as a single row. It is differentiable
    and works under `torch.func`. Operators are equal if their texts, `str(A)`, are.

    Example:
        >>> A = parse("every(4)") | parse("coarsen(8)")
        >>> A(torch.zeros(16, 29, 2, 64, 64)).shape
        torch.Size([16, 8, 2, 8, 8])
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        selected = [i for i, name in enumerate(names) if KINDS[name].selects]

        if selected and "vorticity" in names[selected[0] :]:
            raise UserError(
                f"'{self}' takes the vorticity of a part of the field, where neighbours are "
                "missing. Put vorticity first."
            )

    @property
    def linear(self) -> bool:
        r"""Whether the operator is linear."""

        return all(part.name != "saturate" for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)

        return x

    def __or__(self, other: "Operator") -> "Operator":
        r"""Returns the operator that applies the other one to what this one returns."""

        return Operator(self.parts + other.parts)

    def __str__(self) -> str:
        return " ".join(map(str, self.parts))


def parse(text: str | Operator) -> Operator:
    r"""Returns the operator of a text, such as `every(4) coarsen(8)`. An operator is one already.

    Raises:
        UserError: If the text is no operator's.
    """

    parts, rest = [], str(text).strip()

    while match := re.match(r"([^\s()]+)(?:\s*\(([^()]*)\))?(?:\s+|$|(?<=[)]))", rest):
        part = Part(match[1], re.sub(r"\s", "", match[2] or ""))
        rest = rest[match.end() :]

        if part.name not in KINDS:
            hint = did_you_mean(part.name, KINDS) or f" There are {', '.join(KINDS)}."
            raise UserError(f"There is no operator {short_repr(part.name)}.{hint}")

        kind = KINDS[part.name]

        if not re.fullmatch(kind.pattern, part.argument):
            raise UserError(f"{short_repr(match[0].strip())} is no operator. Write {kind.form}.")

        parts.append(part)

    if rest or not parts:
        raise UserError(
            f"{short_repr(text)} is no operator. One looks like 'every(4) coarsen(8)', or "
            "'identity' if everything is observed."
        )

    return Operator(tuple(parts))


def points(indices: Iterable[tuple[int, int]]) -> Operator:
    r"""Returns the operator that selects points, each given by its row and column."""

    return parse(f"points({';'.join(f'{i},{j}' for i, j in indices)})")


class _Misfit(Exception):
    r"""Signals that an operator does not fit a shape. The message says what it needs."""


def _check(fits: bool, needs: str) -> None:
    if not fits:
        raise _Misfit(needs)


def _every(x: Tensor, *numbers: int | None) -> Tensor:
    states = slice(*numbers) if len(numbers) > 1 else slice(None, None, *numbers)
    _check((states.stop or 0) <= x.shape[-4], f"at least {states.stop} states")

    return x[..., states, :, :, :]


def _coarsen(x: Tensor, k: int) -> Tensor:
    _check(x.shape[-2] % k == 0 and x.shape[-1] % k == 0, f"sides that {k} divides")

    return coarsen(x, k)


def _box(x: Tensor, i: int, j: int, *columns: int) -> Tensor:
    left, right = columns or (i, j)
    _check(j <= x.shape[-2] and right <= x.shape[-1], f"at least {j} rows and {right} columns")

    return x[..., i:j, left:right]


def _points(x: Tensor, *numbers: int) -> Tensor:
    rows, columns = numbers[::2], numbers[1::2]
    height, width = max(rows) + 1, max(columns) + 1
    fits = height <= x.shape[-2] and width <= x.shape[-1]
    _check(fits, f"at least {height} rows and {width} columns")

    return x[..., rows, columns].unsqueeze(-2)


def _ring(x: Tensor, a: float, b: float) -> Tensor:
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in x.shape[-2:])
    distance = torch.hypot(rows[:, None], columns)
    rows, columns = ((a <= distance) & (distance <= b)).nonzero().to(x.device).unbind(-1)

    return x[..., rows, columns].unsqueeze(-2)


def _component(x: Tensor, c: int) -> Tensor:
    _check(c < x.shape[-3], f"at least {c + 1} channels")

    return x[..., c : c + 1, :, :]


def _vorticity(x: Tensor) -> Tensor:
    _check(x.shape[-3] == 2, "the two channels of velocities")

    return vorticity(x).unsqueeze(-3)


class Kind(NamedTuple):
    r"""The operators of a name."""

    form: str
    pattern: str  # of what stands between the parentheses, without spaces
    apply: Callable[..., Tensor]  # to a tensor and the numbers between the parentheses
    selects: bool = False  # points, so that neighbours are lost


N = "(?:0|[1-9][0-9]{0,8})"
K = "[1-9][0-9]{0,8}"
R = "[0-9](?:[.][0-9]{1,8})?"

KINDS = {
    "identity": Kind("identity", "", lambda x: x),
    "every": Kind("every(k) or every(i:j:k)", f"{K}|{N}?:(?:{K})?(?::{K})?", _every),
    "last": Kind("last", "", lambda x: x[..., -1:, :, :, :]),
    "coarsen": Kind("coarsen(k)", K, _coarsen),
    "subsample": Kind("subsample(k)", K, lambda x, k: x[..., ::k, ::k], selects=True),
    "box": Kind("box(i:j) or box(i:j, k:l)", f"{N}:{N}(?:,{N}:{N})?", _box, selects=True),
    "points": Kind("points(i,j; k,l; …)", f"{N},{N}(?:;{N},{N})*", _points, selects=True),
    "ring": Kind("ring(a:b)", f"{R}:{R}", _ring, selects=True),
    "component": Kind("component(c)", N, _component),
    "vorticity": Kind("vorticity", "", _vorticity),
    "saturate": Kind("saturate", "", lambda x: x / (1 + x.abs())),
}


@dataclass(frozen=True)
class Observation:
    r"""How trajectories are observed: :math:`y \sim N(A(x), \sigma^2 I)`.

    Arguments:
        states: The length :math:`L` of the trajectories.
        operator: The text form of :math:`A`.
        std: The standard deviation :math:`\sigma` of the noise.
        steps: The number of sampling steps that the posterior takes.
    """

    states: int
    operator: str
    std: float
    steps: int = 256


# The observations in SDA's notebooks, for states of 64 × 64 points. A change of any raises the
# version, since results of different versions do not compare.
PANEL_VERSION = 1
PANEL = {
    "assim": Observation(29, "every(4) coarsen(8)", 0.1),
    "extrapolate": Observation(8, "every(3) coarsen(4) box(4:12)", 0.01),
    "saturate": Observation(8, "every(3) coarsen(4) vorticity saturate box(2:14)", 0.05, 512),
    **{f"subsample-{k}": Observation(8, f"subsample({k})", 0.1) for k in (2, 4, 8, 16)},
    "circle": Observation(8, "last vorticity ring(0.6325:0.775)", 0.2),
}
