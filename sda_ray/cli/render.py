r"""What people see of runs: tables and portraits, for terminals and files alike.

Names and texts come from files that anyone may have written: they are shown as plain text, without
control characters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
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
from ..runs import MEASURED, Entry, best, changed_settings, is_off
from ..search import TrialRecord

REMEDY = "set parametrization=v, or train for more epochs"  # of samples that are off

STYLES = {
    "running": "cyan",
    "finished": "green",
    "complete": "green",
    "adopted": "green",
    "paused": "yellow",
    "pruned": "yellow",
    "interrupted": "yellow",
    "stopped": "yellow",
    "diverged": "red",
    "failed": "bold red",
    "damaged": "bold red",
}
BARS, ASCII_BARS, CELLS = "▁▂▃▄▅▆▇█", "_.,-~=*#", 8  # of sparklines
HUGE = 1e200  # plotext overflows beyond
CURVES = {"loss_train": "gray", "loss_valid": "cyan"}


def format_loss(x: float | None) -> str:
    r"""Returns a loss in few digits, or a dash if there is none."""

    return "–" if x is None else f"{x:.4f}" if 1e-3 <= abs(x) < 1e4 else f"{x:.3g}"


def short_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else printable(format_value(value))


def short_settings(config: Mapping[str, Any]) -> str:
    r"""Returns settings in few digits, as `key=value key=value`."""

    return " ".join(f"{key}={short_value(x)}" for key, x in config.items())


def format_std(x: float | None) -> str:
    r"""Returns the relative standard deviation of samples, marked if it is off."""

    return "–" if x is None else f"{x:.3g}{'!' * is_off(x)}"


def _status(status: str) -> Text:
    return Text(printable(status, 20), style=STYLES.get(status, ""))


def _epochs(entry: Entry) -> str:
    return f"{entry.epoch or 0}/{'?' if entry.epochs is None else entry.epochs}"


def listing(entries: Iterable[Entry]) -> Table:
    r"""Returns the table of runs."""

    entries = list(entries)
    measured = [key for key in MEASURED if any(getattr(x, key) is not None for x in entries)]
    right = ("epoch", "loss_valid", *measured, "sample_std", "size", "age")
    table = make_table("run", "status", *right[:-2], "sweep", *right[-2:], right=right, fold=())
    rows = [
        (
            Text(printable(entry.path.directory.name)),
            _status(entry.status),
            Text(_epochs(entry)),
            Text(format_loss(entry.loss_valid)),
            *(Text(format_loss(getattr(entry, key))) for key in measured),
            Text(format_std(entry.sample_std)),
            Text(printable(entry.sweep or "–", 40)),
            Text(format_size(entry.size)),
            Text(format_duration(entry.age)),
        )
        for entry in entries
    ]

    # A column is one cell of many lines: rich takes 0.2 ms for a cell, seconds for 2,000 runs.
    table.add_row(*(Text("\n").join(column) for column in zip(*rows, strict=True)))

    return table


def sparkline(values: Iterable[float], plain: bool = False) -> str:
    r"""Returns a curve in at most 8 characters, on a logarithmic scale if all values are positive.

    Arguments:
        values: The values, of which those that are not finite are left out.
        plain: Whether the characters are those of ASCII.
    """

    finite = [x for x in values if math.isfinite(x)]
    count = min(CELLS, len(finite))
    picked = [finite[(len(finite) - 1) * i // max(1, count - 1)] for i in range(count)]

    if not picked:
        return ""

    heights = [math.log(x) for x in picked] if min(picked) > 0 else picked
    low, bars = min(heights), ASCII_BARS if plain else BARS
    scale = (len(bars) - 1) / ((max(heights) - low) or 1)

    return "".join(bars[round((x - low) * scale)] for x in heights)


def run_table(
    records: Sequence[TrialRecord],
    names: Mapping[str, str],
    width: int,
    objective: str,
    more: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> list[RenderableType]:
    r"""Returns a table of a sweep's runs that fits a width, and a line about columns that do not.

    The columns after the objective are `more`, of texts by run, and the settings that the sweep
    varies. For the width, names are left out, then headers are folded, then columns are left out,
    from the right; settings that tell the runs apart come last.
    """

    objective = printable(objective)
    columns = {
        "#": [str(r.index) for r in records],
        "run": [printable(f"{names.get(r.run_id, '…')}_{r.run_id}") for r in records],
        "status": [r.status for r in records],
        "epoch": [f"{r.last}/{r.epochs}" for r in records],
        objective: [format_loss(r.value) for r in records],
    }
    others = {
        name: [texts.get(r.run_id, "–") for r in records] for name, texts in more.items() if texts
    }
    settings = {
        printable(key): [short_value(r.config[key]) if key in r.config else "–" for r in records]
        for key in dict.fromkeys(key for record in records for key in record.config)
    }
    columns |= others | settings
    headers = {name: name for name in columns}
    telling = [printable(key) for key in _telling([r.config for r in records])]
    hidden = [*telling, *others, *(name for name in settings if name not in telling)]

    def fits() -> bool:
        lines = ([*headers[name].split("\n"), *texts] for name, texts in columns.items())
        return sum(max(map(len, x)) for x in lines) + 2 * len(columns) - 2 <= width

    if not fits():
        columns["run"] = [printable(r.run_id) for r in records]

    if not fits():
        headers = {name: "\n_".join(name.rsplit("_", 1)) for name in columns}

    kept = len(hidden)

    while kept and not fits():
        kept -= 1
        del columns[hidden[kept]]

    right = [headers[x] for x in columns if x not in ("run", "status", "curve")]
    table = make_table(*(headers[x] for x in columns), right=right, fold=())

    if records:  # a column is one cell, see listing
        styled = ([Text(x, style=STYLES.get(x, "")) for x in texts] for texts in columns.values())
        table.add_row(*(Text("\n").join(texts) for texts in styled))

    if not (hidden := hidden[kept:]):
        return [table]

    plural = "s" * (len(hidden) > 1)
    note = f"too narrow for {len(hidden)} column{plural}: {', '.join(hidden)}"

    return [table, Text(note, style="dim", no_wrap=True, overflow="ellipsis")]


def _telling(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    r"""Returns keys that tell configs apart as well as all do, those first that tell most."""

    keys, telling = dict.fromkeys(key for config in configs for key in config), list[str]()

    def apart(names: Sequence[str]) -> int:
        return len({str([config.get(name) for name in names]) for config in configs})

    for _ in keys:
        most = max(keys, key=lambda key: apart([*telling, key]))

        if apart([*telling, most]) <= apart(telling):
            break

        telling.append(most)

    return telling


def portrait(
    entry: Entry, lines: Sequence[dict[str, Any]], origin: Mapping[str, Any], width: int
) -> RenderableType:
    r"""Returns all that is known of a run: its metrics, and where it came from by label."""

    objective = entry.objective
    top = best(lines, entry.judged, objective)
    head = Text.assemble(
        (printable(entry.path.directory.name), "bold"), "  ", _status(entry.status)
    )
    head.append(f"  epoch {_epochs(entry)}  loss_valid {format_loss(entry.loss_valid)}")

    if objective != "loss_valid":
        head.append(f"  {objective} {format_loss(getattr(entry, objective, None))}")

    head.append(f", best {format_loss(top[objective])} at epoch {top['epoch']}" if top else "")
    head.append(f"  sample_std {format_std(entry.sample_std)}")
    head.append(f"  {format_size(entry.size)}  {format_duration(entry.age)} old")
    faults = [Text(f"  {printable(fault, 500)}", style="red") for fault in entry.faults]
    pairs = Table.grid(padding=(0, 1))
    pairs.add_column(style="dim", no_wrap=True)
    pairs.add_column(overflow="fold")

    for label, value in origin.items():
        pairs.add_row(label, Text(printable(value, 500)))

    parts: list[RenderableType] = [head, *faults, Text(), pairs]

    if attempts := entry.record.get("attempts"):
        parts += [Text(), _attempts(attempts)]

    if entry.config is not None:
        parts += [Text(), _config(entry.config)]

    parts += [Text(), chart(lines, CURVES, width=max(32, min(108, width)))]

    return Group(*parts)


def chart(
    lines: Sequence[dict[str, Any]], styles: Mapping[str, str], width: int = 64, height: int = 12
) -> Text:
    r"""Draws curves of some metrics over the epochs, each in its style.

    The scale is logarithmic if the values are positive and span more than a factor of 10. Values
    that are not finite are left out.
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


def _attempts(tries: Sequence[dict[str, Any]]) -> RenderableType:
    table = make_table("attempt", "began", "took", "host", "device", "threads", "versions")

    for attempt in tries[-50:]:
        found = attempt.get("versions")
        versions = found if isinstance(found, dict) else {}
        began = (attempt.get("started") or "–")[:16].replace("T", " ")
        cells = [attempt.get("number"), began, _took(attempt)]
        cells += [attempt.get(key) for key in ("host", "device", "threads")]
        texts = ["–" if x is None else printable(x, 60) for x in cells]
        texts += [printable(", ".join(f"{key} {x}" for key, x in versions.items()), 500)]
        table.add_row(*map(Text, texts))

    return table


def _took(attempt: Mapping[str, Any]) -> str | None:
    try:
        began, ended = (datetime.fromisoformat(attempt[key]) for key in ("started", "ended"))
        return format_duration((ended - began).total_seconds())
    except (KeyError, TypeError, ValueError):  # it has not ended, or the file says anything
        return None


def _config(config: Config) -> Table:
    r"""Returns the config; what differs from CONFIG stands out, beside CONFIG's value."""

    differs = changed_settings(config)
    table = Table.grid(padding=(0, 1))

    for key, value in config.items():
        cells = [f"  {key}", format_value(value)]

        if key in differs:
            default = Text(f"(CONFIG has {format_value(CONFIG[key])})", style="dim")
            table.add_row(f"* {key}", cells[1], default, style="bold yellow")
        else:
            table.add_row(*cells)

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
        shown = [
            format_loss(x) if isinstance(x, float) else "–" if x is None else str(x) for x in row
        ]
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
