r"""What people see of runs: tables and portraits, for terminals and files alike.

Names and texts come from files that anyone may have written: they are shown as plain text, without
control characters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core import (
    CONFIG,
    Config,
    format_duration,
    format_size,
    format_value,
    make_table,
    printable,
)
from ..runs import Entry, best, changed_settings

__all__ = ["comparison", "listing", "portrait", "savings"]

STYLES = {
    "running": "cyan",
    "finished": "green",
    "adopted": "green",
    "paused": "yellow",
    "interrupted": "yellow",
    "stopped": "yellow",
    "diverged": "red",
    "failed": "bold red",
    "damaged": "bold red",
}
HUGE = 1e200  # plotext overflows beyond
CURVES = {"loss_train": "gray", "loss_valid": "cyan"}


def _loss(x: float | None) -> str:
    return "–" if x is None else f"{x:.4f}" if 1e-3 <= abs(x) < 1e4 else f"{x:.3g}"


def _status(status: str) -> Text:
    return Text(printable(status, 20), style=STYLES.get(status, ""))


def _epochs(entry: Entry) -> str:
    return f"{entry.epoch or 0}/{'?' if entry.epochs is None else entry.epochs}"


def listing(entries: Iterable[Entry]) -> Table:
    r"""Returns the table of runs."""

    columns = ("run", "status", "epoch", "loss_valid", "sweep", "size", "age")
    right = ("epoch", "loss_valid", "size", "age")
    table = make_table(*columns, right=right, fold=False)
    rows = [
        (
            Text(printable(entry.path.directory.name)),
            _status(entry.status),
            Text(_epochs(entry)),
            Text(_loss(entry.loss_valid)),
            Text(printable(entry.sweep or "–", 40)),
            Text(format_size(entry.size)),
            Text(format_duration(entry.age)),
        )
        for entry in entries
    ]

    # A column is one cell of many lines: rich takes 0.2 ms for a cell, seconds for 2,000 runs.
    table.add_row(*(Text("\n").join(column) for column in zip(*rows, strict=True)))

    return table


def portrait(
    entry: Entry, lines: Sequence[dict[str, Any]], origin: Mapping[str, Any], width: int
) -> RenderableType:
    r"""Returns all that is known of a run.

    Arguments:
        entry: The run.
        lines: Its metrics.
        origin: Where it came from, by label.
        width: The columns at hand.
    """

    top = best(lines)
    head = Text.assemble(
        (printable(entry.path.directory.name), "bold"), "  ", _status(entry.status)
    )
    head.append(f"  epoch {_epochs(entry)}  loss_valid {_loss(entry.loss_valid)}")
    head.append(f", best {_loss(top['loss_valid'])} at epoch {top['epoch']}" if top else "")
    head.append(f"  {format_size(entry.size)}  {format_duration(entry.age)} old")
    faults = [Text(f"  {printable(fault, 500)}", style="red") for fault in entry.faults]
    parts: list[RenderableType] = [head, *faults, Text(), _pairs(origin)]

    if attempts := entry.record.get("attempts"):
        parts += [Text(), _attempts(attempts)]

    if entry.config is not None:
        parts += [Text(), _config(entry.config)]

    parts += [Text(), chart(lines, CURVES, width=max(32, min(108, width)))]

    return Group(*parts)


def chart(
    lines: Sequence[dict[str, Any]], styles: Mapping[str, str], width: int = 64, height: int = 12
) -> Text:
    r"""Draws curves over the epochs, in as many columns and rows.

    The scale is logarithmic if the values are positive and span more than a factor of 10. Values
    that are not finite are left out.

    Arguments:
        lines: The metrics.
        styles: The keys to draw, with their colours.
        width: The columns.
        height: The rows.
    """

    import plotext

    curves = {
        key: [(x["epoch"], x[key]) for x in lines if math.isfinite(x.get(key, math.nan))]
        for key in styles
    }
    values = [value for curve in curves.values() for _, value in curve]

    if not values:
        return Text("no losses yet", style="dim")

    logarithmic = min(values) > 0 and max(values) / 10 > min(values)
    plotext.clear_figure()
    plotext.plot_size(width, height)
    plotext.yscale("log" if logarithmic else "linear")

    for key, curve in curves.items():
        if curve:
            x = [epoch for epoch, _ in curve]
            y = [max(-HUGE, min(HUGE, value)) for _, value in curve]
            plotext.plot(x, y, label=key, marker="braille", color=styles[key])

    for part in (plotext.canvas_color, plotext.axes_color, plotext.ticks_color):
        part("default")

    plotext.xticks(sorted({lines[0]["epoch"], lines[-1]["epoch"]}))
    drawn = Text.from_ansi(plotext.build().rstrip())
    drawn.append("\nlogarithmic scale" if logarithmic else "\nlinear scale", style="dim")
    lost = sum(key in x and not math.isfinite(x[key]) for x in lines for key in styles)

    if lost:
        drawn.append(f", {lost} values are not finite", style="red")

    return drawn


def _pairs(pairs: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    for key, value in pairs.items():
        table.add_row(key, Text(printable(value, 500)))

    return table


def _attempts(tries: Sequence[dict[str, Any]]) -> RenderableType:
    r"""Returns the table of attempts; versions are named where they change."""

    table = make_table("attempt", "began", "took", "host", "device", "threads", "versions")
    before: dict[str, Any] = {}

    for attempt in tries[-50:]:
        found = attempt.get("versions")
        versions = found if isinstance(found, dict) else {}
        news = [f"{key} {x}" for key, x in versions.items() if before.get(key) != x]
        before = versions
        cells = [attempt.get("number"), _minute(attempt.get("started")), _took(attempt)]
        cells += [attempt.get(key) for key in ("host", "device", "threads")]
        table.add_row(
            *(Text("–" if x is None else printable(x, 60)) for x in cells),
            Text(printable(", ".join(news) or "the same", 500)),
        )

    return table


def _time(text: Any) -> datetime | None:
    try:
        when = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None

    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def _minute(text: Any) -> str | None:
    when = _time(text)
    return None if when is None else f"{when:%Y-%m-%d %H:%M}"


def _took(attempt: Mapping[str, Any]) -> str | None:
    began, ended = _time(attempt.get("started")), _time(attempt.get("ended"))
    return (
        None
        if began is None or ended is None
        else format_duration((ended - began).total_seconds())
    )


def _config(config: Config) -> Table:
    r"""Returns the config; what differs from CONFIG stands out, beside CONFIG's value."""

    differs = changed_settings(config)
    table = Table(box=None, pad_edge=False, show_header=False)

    for key, value in config.items():
        changed = key in differs
        default = f"(CONFIG has {format_value(CONFIG[key])})" if changed else ""
        style = "bold yellow" if changed else ""
        mark = "*" if changed else " "
        table.add_row(
            Text(f"{mark} {key}", style=style),
            Text(format_value(value), style=style),
            Text(default, style="dim"),
        )

    return table


def comparison(
    entries: Sequence[Entry], found: Mapping[str, Any], most: int = 40
) -> RenderableType:
    r"""Returns the table of a comparison, see :func:`sda_ray.runs.inventory.compare`."""

    names = [printable(entry.path.directory.name) for entry in entries]
    table = make_table("", right=())

    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")

    for key, row in found["metrics"].items():
        shown = [_loss(x) if isinstance(x, float) else "–" if x is None else str(x) for x in row]
        lowest = _lowest(row) if "loss" in key and not found["notes"] else None
        cells = [
            Text(printable(text, most), style="bold green" if x == lowest else "")
            for text, x in zip(shown, row, strict=True)
        ]
        table.add_row(Text(key, style="dim"), *cells)

    table.add_section()

    for key, row in found["config"].items():
        table.add_row(Text(key), *(Text(text, style="yellow") for text in _apart(row)))

    parts: list[RenderableType] = [table, Text()]
    equal = f"{len(found['equal'])} other settings are the same"
    parts.append(Text(f"{equal}: {', '.join(found['equal'])}.", style="dim"))
    parts += [Text(f"Beware: {note}", style="red") for note in found["notes"]]

    return Group(*parts)


def _apart(row: Sequence[Any]) -> list[str]:
    r"""Returns values in few digits, or in all if they would look alike."""

    full = ["?" if x is None else format_value(x) for x in row]
    brief = [
        f"{x:.4g}" if isinstance(x, float) else text for x, text in zip(row, full, strict=True)
    ]

    return brief if len({*brief}) == len({*full}) else full


def _lowest(row: Sequence[float | None]) -> float | None:
    finite = [x for x in row if x is not None and math.isfinite(x)]
    return min(finite) if len(finite) > 1 else None


def savings(files: Mapping[str, Mapping[Path, int]]) -> Table:
    r"""Returns the table of what pruning would free, by the name of the run."""

    table = make_table("run", "resumable state", "size", right=("size",))

    for name, sizes in files.items():
        what = " ".join(file.name for file in sizes)
        table.add_row(Text(printable(name)), what, format_size(sum(sizes.values())))

    return table
