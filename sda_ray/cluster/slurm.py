r"""Sweeps as jobs of Slurm: `sda-ray slurm` writes the script of a job, and submits it on request."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli.chosen import chosen_sweep
from ..cli.sweep import launch_options
from ..core.errors import UserError
from ..core.files import write_atomic
from ..runs.path import sweep_directory
from ..sweep.start import check_start
from .slots import Slots

__all__ = ["slurm_command"]

# What the script asks of Slurm, unless the user asks for something else; and how that is spelt
ASKED = {
    "--job-name={name}": "-J --job-name",
    "--output={directory}/slurm-%j.log": "-o --output",
    "--ntasks-per-node=1": "-n --ntasks --ntasks-per-node",
    "--open-mode=append": "--open-mode",
    "--requeue": "--requeue --no-requeue",
    "--signal=B:USR1@120": "--signal",
}
CPUS = "-c --cpus-per-task --cpus-per-gpu --exclusive"
OURS = ("--submit", "--output", "--root", "--runs", "--data")

SCRIPT = """\
#!/bin/bash
# Carries on with sweep '{name}', from wherever it is. Written by `sda-ray slurm`; submit it with
#
#   sbatch {file}
#
{options}

# The first process of the job starts Ray on all nodes, for this job alone. Before its time is up,
# trials save a checkpoint and the job goes back into the queue; when nothing is left to do, it ends.
{environment}exec {command}
"""


def slurm_command(args: argparse.Namespace) -> None:
    r"""Writes the script of a job, shows it, and submits it if that is wanted.

    Raises:
        UserError: If anything is wrong with the sweep, or with what is asked of Slurm.
    """

    _check(args)
    sweep, options = chosen_sweep(args, None, launch_options(args))
    slots = Slots(options.cpus, options.gpus or 0, options.parallel)
    start = check_start(sweep, args.runs, options.data, slots, options.wandb, "slurm")
    name = start.sweep.name
    directory = sweep_directory(args.runs, name)
    file = Path(os.path.abspath(args.output)) if args.output else directory / "slurm.sh"
    text = _script(args, name, directory, file)
    directory.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.encode())
    file.chmod(0o755)
    print(f"\n{text}\nwritten to {file}")

    if not _names(args.sbatch) & set(CPUS.split()):
        print("Note: no CPUs are asked for, so the job gets one per node: -- --cpus-per-task=N")

    if args.submit:
        if subprocess.run(["sbatch", str(file)]).returncode:
            raise UserError("sbatch has refused the job; it says why above.")
    else:
        print(f"Submit it with: sbatch {shlex.quote(str(file))}")


def _check(args: argparse.Namespace) -> None:
    if args.address is not None:
        raise UserError("--address goes without Slurm: the job starts a Ray of its own.")

    if args.fork and args.name is None:
        raise UserError("--fork needs --name NEW here, so that the job knows what it carries on.")

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


def _script(args: argparse.Namespace, name: str, directory: Path, file: Path) -> str:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument(OURS[0], action="store_true")

    for option in OURS[1:]:
        own.add_argument(option)

    words = own.parse_known_args(args.words)[1]

    if args.sweep.endswith(".py"):
        words[words.index(args.sweep)] = os.path.abspath(args.sweep)

    words += [f"--root={args.root}", f"--runs={args.runs}"]
    words += [f"--data={args.data}"] if args.data_given else []
    command = [sys.executable, "-m", "sda_ray.cluster.allocation", f"--job={name}", *words]
    package = Path(__file__).parents[2]
    environment = f"export PYTHONPATH={shlex.quote(str(package))}${{PYTHONPATH:+:$PYTHONPATH}}\n"

    return SCRIPT.format(
        name=name,
        file=shlex.quote(str(file)),
        options="\n".join(f"#SBATCH {line}" for line in _options(name, directory, args.sbatch)),
        environment="" if package.name == "site-packages" else environment,
        command=shlex.join(command),
    )


def _options(name: str, directory: Path, given: Sequence[str]) -> list[str]:
    r"""Returns the options of a script, one a line: ours, then those of the user."""

    lines = [
        _quote(option.format(name=f"sda-ray-{name}", directory=directory))
        for option, spellings in ASKED.items()
        if not _names(given) & set(spellings.split())
    ]

    for word in given:
        if word.startswith("-"):
            lines.append(_quote(word))
        else:
            lines[-1] += " " + _quote(word)

    return lines


def _names(given: Sequence[str]) -> set[str]:
    r"""Returns the names of options: `-c` of `-c4`, `--time` of `--time=1:00`."""

    return {
        word.partition("=")[0] if word.startswith("--") else word[:2]
        for word in given
        if word.startswith("-")
    }


def _quote(word: str) -> str:
    return (
        word if re.fullmatch(r"[\w@%+=:,./\[\]-]+", word) else '"' + word.replace('"', '\\"') + '"'
    )
