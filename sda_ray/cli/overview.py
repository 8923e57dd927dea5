r"""What people see of a cluster. Names come from files and hosts: they are shown as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .render import clean, size

__all__ = ["overview"]

STYLES = {"alive": "green", "draining": "yellow", "dead": "red", "starting": "cyan"}


def overview(found: Mapping[str, Any]) -> RenderableType:
    r"""Returns what a cluster is at, for a terminal.

    Arguments:
        found: What :func:`sda_ray.cluster.status.gather` has found.
    """

    parts: list[RenderableType] = [_nodes(found["nodes"])]

    if runs := [(run, node["name"]) for node in found["nodes"] for run in node["runs"]]:
        parts += ["", _runs(runs + [(run, run["host"]) for run in found["elsewhere"]])]
    elif found["elsewhere"]:
        parts += ["", _runs([(run, run["host"]) for run in found["elsewhere"]])]

    notes = [
        f"waiting: {item['count']} × {_resources(item['resources'])}: {item['why']}"
        for item in found["waiting"]
    ]
    notes += [
        f"{item['state']}: {item['count']} × {item['type']}"
        + f" ({item['why']})" * bool(item["why"])
        for item in found["coming"]
    ]
    notes += [
        f"sweep '{sweep}' starts nothing on {node['name']}: {why}"
        for node in found["nodes"]
        for sweep, why in node["avoided"].items()
    ]
    parts += ["", *(Text(clean(note, 400)) for note in notes or ["Nothing waits."])]

    return Group(*parts)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")

    for name in columns:  # names of hosts may need two lines, so that all numbers can be read
        wraps = name in ("node", "address")
        table.add_column(name, justify="right" if name in right else "left", no_wrap=not wraps)

    return table


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Table:
    right = ("CPUs", "GPUs", "memory", "disk free", "trials")
    table = _table("node", "address", "state", *right, right=right)

    for node in nodes:
        memory, disk = node["memory"], node["disk"]
        table.add_row(
            Text(clean(node["name"], 40)),
            Text(clean(node["ip"], 40)),
            Text(node["state"], style=STYLES[node["state"]]).append(
                " (head)" if node["role"] == "head" else "", style="none"
            ),
            f"{node['cpus']['used']:g}/{node['cpus']['total']:g}",
            f"{node['gpus']['used']:g}/{node['gpus']['total']:g}",
            "–"
            if memory is None
            else f"{memory['used'] / memory['total']:.0%} of {size(memory['total'])}",
            "–" if disk is None else size(disk["free"]),
            str(node["trials"]),
        )

    return table


def _runs(runs: Sequence[tuple[Mapping[str, Any], Any]]) -> Table:
    table = _table("run", "sweep", "#", "epoch", "node", right=("#", "epoch"))

    for run, node in runs:
        trial = run["trial"]
        table.add_row(
            Text(clean(run["run"], 60)),
            Text(clean(run["sweep"] or "–", 40)),
            Text("–" if trial is None else clean(trial, 10)),
            f"{run['epoch']}/{run['epochs'] or '?'}",
            Text(clean(node or "–", 40)),
        )

    return table


def _resources(wanted: Mapping[str, float]) -> str:
    return " ".join(f"{key}={x:g}" for key, x in wanted.items())
