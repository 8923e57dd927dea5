r"""The report of a plan: tables for people, JSON for programs."""

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from ..core import NETWORK, format_duration, format_size, format_value, make_table, plain
from .cost import Shape, spread
from .plan import LONG, Forecast, Plan, at_a_time, memory_of
from .probe import Node, epoch_seconds

FIXED = 64  # characters of a table without the keys of CONFIG
LONGEST = 13  # characters of such a key, or of its values, and of the space beside it
ROWS = 7  # shapes in a table, at most
UNKNOWN = "unknown"
SHOWN = tuple(key for key in (*NETWORK, "batch_size", "precision") if key != "alpha")
COLUMNS = (
    "draws",
    "parameters",
    "GFLOP\nper step",
    "memory",
    "s per\nepoch",
    "at a\ntime",
)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    r"""Prints a plan: shapes, totals, warnings and faults."""

    console = console or Console(highlight=False, soft_wrap=False)

    if plan.shapes:
        for kind in dict.fromkeys(node.kind for node in plan.nodes) or [UNKNOWN]:
            nodes = [node for node in plan.nodes if node.kind == kind]
            console.print(_table(plan, nodes[0] if nodes else None, len(nodes), console.width))

        console.print()

        for name, text in _totals(plan):
            console.print(f"{name:12} {text}", markup=False)

    for text in plan.warnings:
        console.print(plain(f"warning: {text}"), style="yellow", markup=False)

    for text in plan.faults:
        console.print(plain(f"fault: {text}"), style="red", markup=False)

    if plan.faults:
        n = len(plan.faults)
        console.print(f"{n} fault{'s' * (n > 1)} to correct; nothing was started.", markup=False)
    else:
        console.print(f"No faults in '{plan.name}'.", markup=False)


def _table(plan: Plan, node: Node | None, count: int, width: int) -> Table:
    values = {key: {shape.config[key] for shape in plan.shapes} for key in SHOWN}
    keys = [key for key in plan.shapes[0].config if len(values.get(key, ())) > 1]
    keys = keys[: max(1, (width - FIXED) // LONGEST)]
    titles = [key.replace("_", "_\n", 1) for key in keys or ["shape"]]
    table = make_table(*titles, *COLUMNS, right=COLUMNS, fold=())
    table.title_justify = "left"
    table.title = None if node is None else f"{count}x {node.kind}" if count > 1 else node.kind

    for i in reversed(spread(len(plan.shapes), ROWS)):
        shape = plan.shapes[i]
        settings = [format_value(shape.config[key]) for key in keys] or ["all"]
        table.add_row(*settings, *_cells(plan, shape, node))

    return table


def _cells(plan: Plan, shape: Shape, node: Node | None) -> list[str]:
    cost = shape.cost
    about = "~" if shape.assumed else ""
    cells = [
        f"{shape.draws}",
        f"{about}{cost.parameters:,}",
        f"{about}{cost.flops / 1e9:,.1f}",
    ]

    if node is None:
        return [*cells, UNKNOWN, UNKNOWN, UNKNOWN]

    on = _on(plan, shape, node)
    memory, seconds, slots = on["memory"], on["seconds_per_epoch"], f"{on['at_a_time']}"

    if memory is None or seconds is None:
        return [*cells, f"> {format_size(cost.peak)}", UNKNOWN, slots]

    return [*cells, format_size(memory), f"{seconds:.3g}", slots]


def _totals(plan: Plan) -> list[tuple[str, str]]:
    each = " ".join(f"{key}={x:g}" for key, x in plan.wanted.items())
    totals = [("trials", f"{plan.trials} trials, {plan.slots} at a time, each with {each}")]

    if plan.sweep is not None and plan.sweep.pruner != "none" and plan.pruned is not None:
        totals.append(("pruned", _time(plan, plan.pruned)))

    if plan.whole is not None:
        totals.append(("not pruned", _time(plan, plan.whole)))

    disk = f"{format_size(plan.disk)} for all runs, {format_size(plan.free)} free"
    notes = [("note", node.note) for node in plan.nodes if node.note]

    return [*totals, ("disk", disk), *notes]


def _time(plan: Plan, forecast: Forecast) -> str:
    epochs = f"{forecast.epochs:,.0f} epochs"
    hours = plan.hours(forecast)

    if hours is None:
        return f"{epochs}, time {UNKNOWN}"

    span = f"{epochs}, {hours:,.3g} {plan.unit}-hours, done in {format_duration(forecast.finish)}"

    if forecast.finish > LONG:  # a date has no year then, or there is none
        return span

    return f"{span}, {datetime.now() + timedelta(seconds=forecast.finish):%a %d %b %H:%M}"


def plan_to_json(plan: Plan) -> dict[str, Any]:
    r"""Returns a plan as JSON: numbers in bytes, seconds and hours, null where unknown."""

    def total(forecast: Forecast | None) -> dict[str, Any] | None:
        if forecast is None:
            return None

        finish = forecast.finish if plan.known else None
        return {"epochs": forecast.epochs, "hours": plan.hours(forecast), "finish": finish}

    return {
        "sweep": plan.name,
        "trials": plan.trials,
        "resources": plan.wanted,
        "unit": f"{plan.unit}-hours",
        "at_a_time": plan.slots,
        "shapes": [
            {"config": shape.config, "draws": shape.draws, "assumed": shape.assumed}
            | asdict(shape.cost)
            | {"nodes": [_on(plan, shape, node) for node in plan.nodes]}
            for shape in plan.shapes
        ],
        "nodes": [
            {"name": x.name, "kind": x.kind, "fit": x.fit, "memory": x.memory, "note": x.note}
            for x in plan.nodes
        ],
        "pruned": total(plan.pruned),
        "not_pruned": total(plan.whole),
        "disk": plan.disk,
        "disk_free": plan.free,
        "warnings": plan.warnings,
        "faults": plan.faults,
    }


def _on(plan: Plan, shape: Shape, node: Node) -> dict[str, Any]:
    memory, seconds = memory_of(node, shape.cost), None

    if node.speed is not None and plan.info is not None:
        seconds, _ = epoch_seconds(shape.config, shape.cost, node.speed, plan.info)

    return {
        "name": node.name,
        "memory": None if node.speed is None else memory,
        "seconds_per_epoch": seconds,
        "at_a_time": at_a_time(node, memory, plan.gpus),
    }
