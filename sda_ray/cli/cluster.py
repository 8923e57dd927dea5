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
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core import UserError, make_console, make_table, printable, write_atomic
from .options import JSON, LAUNCH, SWEEP, Args, command, option
from .sweep import chosen_sweep, launch_options

CPUS = "-c --cpus-per-task --cpus-per-gpu --exclusive"
STYLES = {"alive": "green", "dead": "red"}


@command("slurm")
@LAUNCH
@option("--output", "Default: slurm.sh, with the sweep's record.", metavar="FILE")
@option("--submit", "Run sbatch on it.", bool)
def slurm_command(args: Args) -> None:
    r"""Writes the script of a Slurm job that runs a sweep, and shows it.

    Options are those of `sda-ray sweep`, and after -- those of sbatch. The job starts Ray on its
    nodes for itself alone. Two minutes before its time is up every trial saves a checkpoint, and the
    job is requeued; the same happens when a node fails. The job is done when the sweep is.

      sda-ray slurm width.py -- --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00
      sda-ray slurm width --submit -- --cpus-per-task=8        resume, on CPUs, and submit at once
    """

    from ..cluster import job_script, names
    from ..runs import sweep_directory
    from ..sweep import check_start

    _check_slurm(args)
    sweep, options = chosen_sweep(args, launch_options(args))
    check_start(sweep, replace(options, gpus=options.gpus or 0, address="slurm"))
    name = sweep.name
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
    from ..cluster import names

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

    places = filter(None, (args.root, args.runs, args.data, args.output, args.sweep))

    for word in chain(args.sbatch, map(os.path.abspath, places)):
        if re.search(r"[\n\r]", word):  # the rest of the line would be a command
            raise UserError(f"{word!r} has a line break: a line of the script names one thing.")

    if "\\" in str(args.runs) and not names(args.sbatch) & {"-o", "--output"}:
        raise UserError(
            f"{args.runs} has a backslash, which turns off the %j in the names of Slurm's log "
            "files. Name the log yourself: -- --output=FILE"
        )

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

    words: list[str] = []
    given = iter(args.words)

    for word in given:
        name, equals, _ = word.partition("=")

        if name in ("--output", "--root", "--runs", "--data"):
            if not equals:
                next(given)  # its value
        elif word != "--submit":
            words.append(word)

    if args.sweep.endswith(".py"):
        words[words.index(args.sweep)] = os.path.abspath(args.sweep)

    words += [f"--root={args.root}", f"--runs={args.runs}"]

    return words + [f"--data={args.data}"] * args.data_given


@command("join")
@SWEEP
@option("--cpus", "Default: all that may be used.", int)
@option("--gpus", "Default: all that may be used.", int)
@option("--wait", "For the sweep to start, or restart.", float, "MINUTES", default=0.0)
def join_command(args: Args) -> None:
    r"""Adds this machine, or its allocation, to a sweep that runs on other machines.

    They must see the same directory of runs. Ctrl-C, SIGTERM or the end of a Slurm job remove it
    again: the trials here save a checkpoint first, and resume elsewhere.

      sda-ray join width                          from a terminal on another machine
      srun --cpus-per-task=8 sda-ray join width   8 more CPUs from Slurm, as long as they last
    """

    from ..cluster import join_sweep
    from ..runs import sweep_directory
    from ..sweep import read_sweep

    if not args.wait:
        read_sweep(args.runs, args.sweep)

    join_sweep(sweep_directory(args.runs, args.sweep), args.cpus, args.gpus, args.wait)


@command("cluster")
@click.argument("action", type=click.Choice(["status"]))
@option("--address", "Default: auto.", default="auto")
@JSON
def status_command(args: Args) -> None:
    r"""Shows the nodes of a Ray cluster, and which run is on which.

    Run it on the head node, or with --address on any machine in the cluster.

      sda-ray cluster status                                  on the head node
      ray exec cluster.yaml 'sda-ray cluster status'          from where the cluster was started
    """

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
        make_console().print(overview(status))


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
    note = f"{' and '.join(used)} are in use. `ray status` lists pending requests and launches."

    return Group(*parts, "", Text(note))


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Table:
    numbers = ("CPUs", "GPUs", "runs")
    table = make_table(
        "node", "address", "state", *numbers, right=numbers, fold=("node", "address")
    )

    for node in nodes:
        state = Text(node["state"], style=STYLES[node["state"]])
        state.append(" (head)" if node["role"] == "head" else "", style="none")
        table.add_row(
            Text(printable(node["name"], 40)),
            Text(printable(node["ip"], 40)),
            state,
            f"{node['cpus']:g}",
            f"{node['gpus']:g}",
            str(len(node["runs"])),
        )

    return table


def _runs(runs: Sequence[tuple[Mapping[str, Any], Any]]) -> Table:
    columns = ("run", "sweep", "#", "epoch", "node")
    table = make_table(*columns, right=("#", "epoch"), fold=("node",))

    for run, node in runs:
        trial = "–" if run["trial"] is None else run["trial"]
        epoch = f"{run['epoch']}/{run['epochs'] or '?'}"
        cells = (run["run"], run["sweep"] or "–", trial, epoch, node or "–")
        table.add_row(*(Text(printable(x, 60)) for x in cells))

    return table


@command("doctor")
@click.argument("file", required=False, metavar="[CLUSTER.YAML]")
@option("--address", "A Ray cluster, as `auto`. Default: this machine alone.")
@option("--wandb", "Check whether W&B can be reached.", ("online",))
@JSON
def doctor_command(args: Args) -> None:
    r"""Checks whether this machine, or a cluster, is fit for sweeps.

    Equal versions on all nodes, clocks, disk, files that nodes see or get through the head node, GPUs,
    W&B, open ports, Ray's token, limits, a few states of the data. Exits with 1 if it finds a fault;
    every fault comes with what to do.

      sda-ray doctor                    this machine
      sda-ray doctor --address auto     all nodes of the Ray that this machine is a node of
      sda-ray doctor cluster.yaml       the file, and then the cluster that it has started
    """

    if args.file and args.file.endswith(".py"):
        do = f"sda-ray plan {shlex.quote(args.file)}"
        raise UserError(
            f"doctor checks machines. `{do}` checks a sweep, and whether it fits here."
        )

    if args.file:
        findings = list(_check_file(Path(args.file)))

        if not any(x.state == "fault" for x in findings):
            if not args.json:
                _show_findings(findings)

            sys.exit(_on_cluster(args))
    else:
        from ..plan import diagnose

        findings = diagnose(args.runs, args.data, args.address, _server(args.wandb))

    faults = sum(x.state == "fault" for x in findings)

    if args.json:
        print(json.dumps({"faults": faults, "findings": [asdict(x) for x in findings]}, indent=2))
    else:
        _show_findings(findings)

    sys.exit(faults > 0)


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

    from ..runs import Wandb, wandb_faults, wandb_server

    if asked != "online" and any(wandb_faults(Wandb(mode="online"))):
        return None

    return wandb_server()


def _show_findings(findings: list[Any]) -> None:
    table = make_table("node", "what", "", "found", "what to do")
    colours = {"ok": "green", "warning": "yellow", "fault": "red"}

    for x in findings:
        table.add_row(x.node, x.what, x.state, x.found, x.do, style=colours[x.state])

    make_console().print(table)
