r"""The curves of runs: `metrics.jsonl`, read without trusting it, and drawn in characters."""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.text import Text

from ..core.errors import UserError
from ..core.files import MAX_JSON, read_lines
from .path import RunPath

__all__ = ["best", "chart", "check_regular", "last_metrics", "pace", "read_metrics"]

TAIL = 2**16  # bytes at the end of metrics.jsonl that surely hold its last line

NUMBERS = ("loss_train", "loss_valid", "seconds")

# The bits of the dots of a braille character, by column and row.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def check_regular(file: Path) -> Path:
    r"""Refuses links, which may lead anywhere, and pipes, which would never end."""

    if not stat.S_ISREG(file.lstat().st_mode):
        raise UserError(f"{file} is not a regular file.")

    return file


def last_metrics(path: RunPath) -> dict[str, Any]:
    r"""Returns the last line of `metrics.jsonl`, or an empty dict if there is none.

    Only the end of the file is read. A last line that was cut off by a crash is ignored.

    Raises:
        UserError: If the end of the file is damaged.
    """

    with open(check_regular(path.metrics), "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - TAIL))
        lines = f.read(TAIL).split(b"\n")[:-1]  # what follows the last line end is torn

    if size > TAIL:
        lines = lines[1:]

    for line in reversed(lines[-2:]):  # a power cut may leave a line its end but not its middle
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(line), dict):
                return _check(found, path)

    if size <= TAIL and len(lines) < 2:
        return {}

    raise UserError(f"{path.metrics} is damaged: its last line is not a JSON object.")


def read_metrics(path: RunPath) -> list[dict[str, Any]]:
    r"""Returns the lines of `metrics.jsonl` in the order of their epochs; of no file, none.

    Raises:
        UserError: If the file is damaged, or too large to be one.
    """

    if not os.path.lexists(path.metrics):
        return []

    if (size := check_regular(path.metrics).stat().st_size) > MAX_JSON:
        raise UserError(f"{path.metrics} has {size} bytes, but at most {MAX_JSON} are read.")

    lines = [_check(line, path) for line in read_lines(path.metrics)]

    return sorted(lines, key=lambda line: line["epoch"])


def _check(line: dict[str, Any], path: RunPath) -> dict[str, Any]:
    r"""Returns a line in which the numbers that are looked at are numbers."""

    epoch, checked = line.get("epoch"), dict(line)

    if type(epoch) is not int or not 0 <= epoch <= 10**8:
        raise UserError(f"{path.metrics} is damaged: a line has no epoch.")

    for key in NUMBERS:
        if line.get(key) is None:
            checked.pop(key, None)
            continue

        try:
            checked[key] = float(line[key])
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{path.metrics} is damaged: {key} of epoch {epoch} is no number.")

    return checked


def best(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    r"""Returns the line with the lowest validation loss, or None if none is finite."""

    finite = [line for line in lines if math.isfinite(line.get("loss_valid", math.nan))]

    return min(finite, key=lambda line: line["loss_valid"], default=None)


def pace(lines: Sequence[dict[str, Any]]) -> float | None:
    r"""Returns the median of the seconds per epoch."""

    seconds = sorted(line["seconds"] for line in lines if "seconds" in line)

    return seconds[len(seconds) // 2] if seconds else None


def chart(
    lines: Sequence[dict[str, Any]],
    styles: Mapping[str, str],
    width: int = 64,
    height: int = 12,
) -> Text:
    r"""Draws curves over the epochs in braille dots, 2 by 4 to a character.

    The scale is logarithmic if the values are positive and span more than a factor of 10. Values
    that are not finite are left out.

    Arguments:
        lines: The lines of `metrics.jsonl`.
        styles: The keys to draw, with their styles; later ones lie above.
        width: The columns of the plot itself.
        height: The rows of the plot itself.
    """

    curves = {
        key: [(x["epoch"], x[key]) for x in lines if math.isfinite(x.get(key, math.nan))]
        for key in styles
    }
    curves = {key: curve for key, curve in curves.items() if curve}
    values = [value for curve in curves.values() for _, value in curve]

    if not values:
        return Text("no losses yet", style="dim")

    low, high = min(values), max(values)
    logarithmic = low > 0 and high / 10 > low
    first, last = lines[0]["epoch"], lines[-1]["epoch"]

    def up(value: float) -> float:  # from 0 at the bottom to 1 at the top
        if logarithmic:
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))

        return (value / 2 - low / 2) / (high / 2 - low / 2 or 1.0)  # halves cannot overflow

    cells: dict[tuple[int, int], tuple[int, str]] = {}

    for key, curve in curves.items():
        dots = [
            (
                round((epoch - first) / max(1, last - first) * (2 * width - 1)),
                round((1 - up(value)) * (4 * height - 1)),
            )
            for epoch, value in curve
        ]

        for x, y in _trace(dots):
            bits, _ = cells.get((x // 2, y // 4), (0, ""))
            cells[x // 2, y // 4] = (bits | DOTS[x % 2][y % 4], styles[key])

    middle = math.sqrt(low) * math.sqrt(high) if logarithmic else low / 2 + high / 2
    labels = {0: high, height // 2: middle, height - 1: low} if low < high else {height - 1: low}
    drawn = Text()

    for row in range(height):
        drawn.append(f"{labels[row]:>9.4g} ┤" if row in labels else f"{'│':>11}", style="dim")

        for column in range(width):
            bits, style = cells.get((column, row), (0, ""))
            drawn.append(chr(0x2800 + bits) if bits else " ", style=style)

        drawn.append("\n")

    drawn.append(f"{'└':>11}{'─' * width}\n", style="dim")
    drawn.append(f"{'epoch':>9}  {first:<{width - len(str(last))}}{last}\n", style="dim")
    drawn.append(" " * 11)

    for key in curves:
        drawn.append(f"━ {key}  ", style=styles[key])

    drawn.append("logarithmic scale" if logarithmic else "linear scale", style="dim")
    lost = sum(key in x and not math.isfinite(x[key]) for x in lines for key in styles)

    if lost:
        drawn.append(f", {lost} values are not finite", style="red")

    return drawn


def _trace(dots: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    r"""Yields the dots of a line through some dots."""

    yield dots[0]

    for (x, y), (u, v) in pairwise(dots):
        steps = max(abs(u - x), abs(v - y))

        for k in range(1, steps + 1):
            yield x + round(k * (u - x) / steps), y + round(k * (v - y) / steps)
