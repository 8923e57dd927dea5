r"""The commands about machines: `sda-ray slurm | join | cluster | doctor`.

Names come from files and hosts: they are shown as plain text.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core import UserError, format_size, printable, write_atomic
from .arguments import Args, without
from .sweep import chosen_sweep, launch_options

__all__ = [
    "doctor_command",
    "join_command",
    "overview",
    "slurm_command",
    "status_command",
]

CPUS = "-c --cpus-per-task --cpus-per-gpu --exclusive"
STYLES = {"alive": "green", "draining": "yellow", "dead": "red"}


def slurm_command(args: Args) -> None:
    r"""Writes the script of a job, shows it, and submits it with --submit.

    Raises:
        UserError: If anything is wrong with the sweep, or with the options of sbatch.
    """

    from ..cluster import Slots, job_script, names
    from ..runs import sweep_directory
    from ..sweep import check_start

    _check_slurm(args)
    sweep, options = chosen_sweep(args, None, launch_options(args))
    slots = Slots(options.cpus, options.gpus or 0, options.parallel)
    start = check_start(sweep, args.runs, options.data, slots, options.wandb, "slurm")
    name = start.sweep.name
    directory = sweep_directory(args.runs, name)
    file = Path(os.path.abspath(args.output)) if args.output else directory / "slurm.sh"
    text = job_script(name, directory, file, _words(args), args.sbatch)
    directory.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.encode())
    file.chmod(0o755)
    print(f"\n{text}\nwritten to {file}")

    if not names(args.sbatch) & set(CPUS.split()):
        print("Note: no CPUs are requested, so the job gets one per node: -- --cpus-per-task=N")

    if args.submit:
        if subprocess.run(["sbatch", str(file)]).returncode:
            raise UserError("sbatch has rejected the job, see its message above.")
    else:
        print(f"Submit it with: sbatch {shlex.quote(str(file))}")


def _check_slurm(args: Args) -> None:
    if args.address is not None:
        raise UserError("--address does not go with Slurm: the job starts a Ray of its own.")

    if args.fork and args.name is None:
        raise UserError(
            "--fork needs --name NEW here, so that the job knows which sweep to resume."
        )

    if args.sbatch and not args.sbatch[0].startswith("-"):
        raise UserError(
            f"'{args.sbatch[0]}' is no option of sbatch. After -- come those alone: "
            "-- --nodes=2 --time=24:00:00"
        )

    for word in args.sbatch:
        if re.search(r"[\n\r]", word):
            raise UserError(f"{word!r} has a line break: a line of the script has one option.")

    for path in filter(None, (args.root, args.runs, args.data, args.output, args.sweep)):
        if re.search(r"[\n\r]", word := os.path.abspath(path)):  # the rest would be a command
            raise UserError(f"{word!r} has a line break: the script of a job cannot name it.")

    signal = [word for word in args.sbatch if word.startswith("--signal")]

    if signal and "B:USR1@" not in " ".join(args.sbatch):
        raise UserError(
            f"{signal[0]}: the job understands --signal=B:USR1@SECONDS, and that is 120 seconds "
            "before its end unless you say otherwise."
        )

    if args.submit and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit on a machine of the Slurm cluster.")


def _words(args: Args) -> list[str]:
    r"""Returns the arguments of `sda-ray sweep` in a job, wherever that starts."""

    words = without(args.words, "--submit", flag=True)
    words = without(words, "--output", "--root", "--runs", "--data")

    if args.sweep.endswith(".py"):
        words[words.index(args.sweep)] = os.path.abspath(args.sweep)

    words += [f"--root={args.root}", f"--runs={args.runs}"]

    return words + [f"--data={args.data}"] * args.data_given


def join_command(args: Args) -> None:
    r"""Adds this machine to a sweep that runs."""

    from ..cluster import join_sweep
    from ..runs import sweep_directory
    from ..sweep import read_sweep

    if not args.wait:
        read_sweep(args.runs, args.sweep)

    join_sweep(sweep_directory(args.runs, args.sweep), args.cpus, args.gpus, args.wait)


def status_command(args: Args) -> None:
    r"""Shows the nodes of a cluster and the runs on them."""

    from ..cluster import cluster_status, connected

    try:
        with connected(args.address):
            status = cluster_status(args.runs)
    except UserError as error:
        raise UserError(
            f"{error} Use --address for another cluster. A sweep on one machine alone has a Ray of "
            "its own: sda-ray attach SWEEP"
        ) from error

    if args.json:
        print(json.dumps(status, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(overview(status))


def overview(status: Mapping[str, Any]) -> RenderableType:
    r"""Returns the status of a cluster for a terminal.

    Arguments:
        status: See :func:`sda_ray.cluster.nodes.cluster_status`.
    """

    parts: list[RenderableType] = [_nodes(status["nodes"])]
    runs = [(run, node["name"]) for node in status["nodes"] for run in node["runs"]]
    runs += [(run, run["host"]) for run in status["elsewhere"]]

    if runs:
        parts += ["", _runs(runs)]

    used = [
        f"{status[key]['used']:g} of {status[key]['total']:g} {key.upper()[:-1]}s"
        for key in ("cpus", "gpus")
    ]
    notes = [
        f"{' and '.join(used)} are in use. `ray status` lists pending requests and launches.",
        *(
            f"sweep '{sweep}' starts nothing on {node['name']}: {why}"
            for node in status["nodes"]
            for sweep, why in node["avoided"].items()
        ),
    ]
    parts += ["", *(Text(printable(note, 400)) for note in notes)]

    return Group(*parts)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")

    for name in columns:  # names of hosts may need two lines, so that all numbers can be read
        wraps = name in ("node", "address")
        table.add_column(name, justify="right" if name in right else "left", no_wrap=not wraps)

    return table


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Table:
    right = ("CPUs", "GPUs", "memory", "disk free", "runs")
    table = _table("node", "address", "state", *right, right=right)

    for node in nodes:
        memory, disk = node["memory"], node["disk"]
        table.add_row(
            Text(printable(node["name"], 40)),
            Text(printable(node["ip"], 40)),
            Text(node["state"], style=STYLES[node["state"]]).append(
                " (head)" if node["role"] == "head" else "", style="none"
            ),
            f"{node['cpus']:g}",
            f"{node['gpus']:g}",
            "–"
            if memory is None
            else f"{memory['used'] / memory['total']:.0%} of {format_size(memory['total'])}",
            "–" if disk is None else format_size(disk["free"]),
            str(len(node["runs"])),
        )

    return table


def _runs(runs: Sequence[tuple[Mapping[str, Any], Any]]) -> Table:
    table = _table("run", "sweep", "#", "epoch", "node", right=("#", "epoch"))

    for run, node in runs:
        trial = run["trial"]
        table.add_row(
            Text(printable(run["run"], 60)),
            Text(printable(run["sweep"] or "–", 40)),
            Text("–" if trial is None else printable(trial, 10)),
            f"{run['epoch']}/{run['epochs'] or '?'}",
            Text(printable(node or "–", 40)),
        )

    return table


def doctor_command(args: Args) -> None:
    r"""Prints findings about machines, and exits with 1 if there is a fault."""

    if args.file:
        findings = list(_check_file(Path(args.file)))

        if not any(x.state == "fault" for x in findings):
            if not args.json:
                _show_findings(findings, args.json)

            sys.exit(_on_cluster(args))
    else:
        from ..plan import diagnose

        findings = diagnose(args.runs, args.address, _server(args.wandb))

    _show_findings(findings, args.json)
    sys.exit(any(x.state == "fault" for x in findings))


def _check_file(file: Path) -> Iterator[Any]:
    r"""Yields the findings about a cluster file."""

    from ..cluster import check_cluster
    from ..plan import Finding

    faults = check_cluster(file)

    for fault in faults:
        yield Finding(file.name, "file", "fault", fault, "Correct the file.")

    if not faults:
        yield Finding(file.name, "file", "ok", "valid")


def _on_cluster(args: Args) -> int:
    r"""Runs the command on the head of a cluster, and returns its exit code."""

    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")

    if ray is None:
        raise UserError("there is no command `ray` here. Install it: pip install 'ray[default]'")

    more = " --json" * args.json + (" --wandb online" if args.wandb else "")
    command = f"sda-ray doctor --address auto{more}"

    return subprocess.run([ray, "exec", args.file, command]).returncode


def _server(asked: str | None) -> str | None:
    r"""Returns the address of W&B's server if it was asked for, or there is a key for it."""

    from ..runs import Wandb
    from ..sweep import check_wandb, wandb_server

    if asked != "online":
        try:
            check_wandb(Wandb(mode="online"))
        except UserError:
            return None

    return wandb_server()


def _show_findings(findings: list[Any], as_json: bool) -> None:
    if as_json:
        faults = sum(x.state == "fault" for x in findings)
        print(json.dumps({"faults": faults, "findings": [asdict(x) for x in findings]}, indent=2))
        return

    console = Console(
        width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False
    )
    table = Table("node", "what", "", "found", "what to do", box=None, pad_edge=False)
    colours = {"ok": "green", "warning": "yellow", "fault": "red"}

    for x in findings:
        table.add_row(x.node, x.what, x.state, x.found, x.do, style=colours[x.state])

    console.print(table)
