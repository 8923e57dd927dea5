r"""The report of a plan: tables for people, JSON for programs."""

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from ..core import NETWORK, format_value
from .cost import Shape
from .plan import Forecast, Plan, at_a_time, format_duration, memory_of
from .probe import Node, epoch_seconds

__all__ = ["plan_to_json", "print_plan"]

FIXED = 64  # characters of a table without the keys of CONFIG
LONGEST = 13  # characters of such a key, or of its values, and of the space beside it
ROWS = 7  # shapes in a table, at most
UNKNOWN = "unknown"


def print_plan(made: Plan, console: Console | None = None) -> None:
    r"""Prints a plan: shapes, totals, warnings and faults.

    Arguments:
        made: The plan.
        console: The console to print on, by default standard output.
    """

    console = console or Console(highlight=False, soft_wrap=False)

    if made.shapes:
        for kind in dict.fromkeys(node.kind for node in made.nodes) or [UNKNOWN]:
            nodes = [node for node in made.nodes if node.kind == kind]
            console.print(_table(made, nodes[0] if nodes else None, len(nodes), console.width))

        console.print()

        for name, text in _totals(made):
            console.print(f"{name:12} {text}", markup=False)

    for text in made.warnings:
        console.print(f"warning: {text}", style="yellow", markup=False)

    for text in made.faults:
        console.print(f"fault: {text}", style="red", markup=False)

    if made.faults:
        n = len(made.faults)
        console.print(f"{n} fault{'s' * (n > 1)} to correct; nothing was started.", markup=False)
    else:
        console.print(f"No faults in '{made.name}'.", markup=False)


def _table(made: Plan, node: Node | None, count: int, width: int) -> Table:
    title = "" if node is None else f"{count}x {node.kind}" if count > 1 else node.kind
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    keys = [key for key in made.shapes[0].config if len(_values(made, key)) > 1]
    keys = [key for key in keys if any(key == k for k in SHOWN)]

    keys = keys[: max(1, (width - FIXED) // LONGEST)]

    for key in keys or ["shape"]:
        table.add_column(key.replace("_", "_\n", 1), no_wrap=True)

    columns = (
        "draws",
        "parameters",
        "GFLOP\nper step",
        "saved\nper step",
        "memory",
        "s per\nepoch",
        "at a\ntime",
    )

    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)

    for shape in _some(made.shapes):
        values = [format_value(shape.config[key]) for key in keys] or ["all"]
        table.add_row(*values, *_cells(made, shape, node))

    return table


SHOWN = tuple(key for key in (*NETWORK, "batch_size", "precision") if key != "alpha")


def _values(made: Plan, key: str) -> set[Any]:
    return {shape.config[key] for shape in made.shapes}


def _some(shapes: list[Shape]) -> list[Shape]:
    r"""Returns shapes from large to small, evenly spread if there are many."""

    if len(shapes) <= ROWS:
        return shapes[::-1]

    last = len(shapes) - 1

    return [shapes[round(last * i / (ROWS - 1))] for i in range(ROWS - 1, -1, -1)]


def _cells(made: Plan, shape: Shape, node: Node | None) -> list[str]:
    cost = shape.cost
    about = "~" if shape.assumed else ""
    cells = [
        f"{shape.draws}",
        f"{about}{cost.parameters:,}",
        f"{about}{cost.flops / 1e9:,.1f}",
        about + _bytes(cost.activations),
    ]

    if node is None:
        return [*cells, UNKNOWN, UNKNOWN, UNKNOWN]

    memory = memory_of(node, cost)
    n = at_a_time(node, memory, made.wanted.get("GPU", 0))

    if node.speed is None or made.info is None:
        return [*cells, f"> {_bytes(memory)}", UNKNOWN, f"{n}"]

    seconds, _ = epoch_seconds(shape.config, cost, node.speed, made.info)

    return [*cells, _bytes(memory), f"{seconds:.3g}", f"{n}"]


def _totals(made: Plan) -> list[tuple[str, str]]:
    totals = []
    trials = f"{made.trials} trials, {made.slots} at a time"

    if made.sweep is not None and made.sweep.pruner != "none" and made.pruned is not None:
        totals.append(("pruned", _time(made, made.pruned)))

    if made.whole is not None:
        totals.append(("not pruned", _time(made, made.whole)))

    wanted = " ".join(f"{key}={x:g}" for key, x in made.wanted.items())
    notes = [("note", node.note) for node in made.nodes if node.note]
    disk = f"{made.disk / 1e9:.2f} GB for all runs, {made.free / 1e9:.1f} GB free"

    return [("trials", f"{trials}, each with {wanted}"), *totals, ("disk", disk), *notes]


def _time(made: Plan, forecast: Forecast) -> str:
    epochs = f"{forecast.epochs:,.0f} epochs"
    hours = made.hours(forecast)

    if hours is None:
        return f"{epochs}, time {UNKNOWN}"

    end = datetime.now() + timedelta(seconds=forecast.finish)

    return (
        f"{epochs}, {hours:.3g} {made.unit}-hours, done in {format_duration(forecast.finish)}, "
        f"{end:%a %d %b %H:%M}"
    )


def _bytes(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def plan_to_json(made: Plan) -> dict[str, Any]:
    r"""Returns a plan as JSON: numbers in bytes, seconds and hours, null where unknown."""

    def total(forecast: Forecast | None) -> dict[str, Any] | None:
        if forecast is None:
            return None

        return {
            "epochs": forecast.epochs,
            "hours": made.hours(forecast),
            "finish": forecast.finish if made.known else None,
        }

    return {
        "sweep": made.name,
        "trials": made.trials,
        "resources": made.wanted,
        "unit": f"{made.unit}-hours",
        "at_a_time": made.slots,
        "shapes": [
            {
                "config": shape.config,
                "draws": shape.draws,
                "assumed": shape.assumed,
                **asdict(shape.cost),
                "nodes": [_on(made, shape, node) for node in made.nodes],
            }
            for shape in made.shapes
        ],
        "nodes": [
            {"name": x.name, "kind": x.kind, "fit": x.fit, "memory": x.memory, "note": x.note}
            for x in made.nodes
        ],
        "pruned": total(made.pruned),
        "not_pruned": total(made.whole),
        "disk": made.disk,
        "disk_free": made.free,
        "warnings": made.warnings,
        "faults": made.faults,
    }


def _on(made: Plan, shape: Shape, node: Node) -> dict[str, Any]:
    memory, seconds = memory_of(node, shape.cost), None

    if node.speed is not None and made.info is not None:
        seconds, _ = epoch_seconds(shape.config, shape.cost, node.speed, made.info)

    return {
        "name": node.name,
        "memory": None if node.speed is None else memory,
        "seconds_per_epoch": seconds,
        "at_a_time": at_a_time(node, memory, made.wanted.get("GPU", 0)),
    }
