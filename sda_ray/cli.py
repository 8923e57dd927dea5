r"""The command line: `sda-ray simulate | train | sweep`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import __version__
from .config import CONFIG, Config, check_config, format_value, load_config, parse_overrides
from .errors import UserError
from .keys import KEYS

__all__ = ["main"]

PROMISE = "Every command may be killed and run again: it goes on where it was."

SIMULATE = """
Simulates Kolmogorov flow and writes train.h5, valid.h5 and test.h5 (8:1:1) to the data directory.
Only what is missing is computed. `full` is the data set of SDA: 1024 trajectories on a 256x256
grid, averaged to 64x64. `demo` is 64 trajectories on a 64x64 grid, about half a minute on two
cores: for trying things out, not for results.
"""

TRAIN = """
Trains one score network, from a configuration to state.pth, in its own directory
runs/{name}_{id}/. Settings are those of SDA unless key=value says otherwise:
"""

SWEEP = """
Runs a sweep: many trials in parallel, each a training in its own run directory. SWEEP is a script,
such as sweeps/demo.py, or the name of a sweep that was started before. The same command starts a
sweep, carries it on after a crash, and, with a larger --trials, extends it.
"""


def main(sweep: Any = None, argv: Sequence[str] | None = None) -> None:
    r"""Runs the command line.

    Arguments:
        sweep: A sweep to run, for scripts: the command is then `sda-ray sweep SCRIPT`.
        argv: The arguments, by default those of the process.
    """

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv)

    if sweep is not None:
        script = Path(sys.modules["__main__"].__file__ or "").resolve()
        sweep = replace(sweep, script=script)
        argv = ["sweep", str(script), *argv]

    args = _parser().parse_args(argv)

    try:
        _locate(args)
        {"simulate": _simulate, "train": _train, "sweep": _sweep}[args.command](args, sweep)
    except UserError as error:
        print(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sda-ray",
        description="Hyperparameter sweeps for score-based data assimilation. " + PROMISE,
    )
    parser.add_argument("--version", action="version", version=f"sda-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help,
            description=description.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        where = added.add_argument_group("places")
        where.add_argument("--root", help="default: $SDA_RAY_ROOT, else here")
        where.add_argument("--data", help="the data directory (default: ROOT/data)")

        if name != "simulate":
            where.add_argument("--runs", help="the directory of all runs (default: ROOT/runs)")

        return added

    simulate = command("simulate", "make a data set", SIMULATE)
    simulate.add_argument("--preset", choices=("full", "demo"), default="full")
    simulate.add_argument("--trajectories", type=int, metavar="N", help="instead of the preset's")
    simulate.add_argument("--size", type=int, metavar="CELLS", help="instead of the preset's")
    simulate.add_argument("--seed", type=int, default=0)
    simulate.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    simulate.add_argument("--address", help="a Ray cluster to use")

    keys = "\n".join(
        f"  {name:16} {key.about} ({format_value(key.default)}; {key.accepts})"
        for name, key in KEYS.items()
    )
    train = command("train", "train one network", f"{TRAIN}\n{keys}")
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings, as epochs=64")
    start = train.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="RUN", help="go on with a run (path, name or id)")
    start.add_argument("--init", metavar="RUN", help="start from the weights of a run")
    train.add_argument("--config", metavar="RUN", help="settings of a run, or a config.json")
    train.add_argument("--replicas", type=int, metavar="N", help="N runs with seeds seed … + N-1")
    train.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    train.add_argument(
        "--takeover", action="store_true", help="with --resume: even if a process is at it"
    )
    _add_resources(train)
    _add_wandb(train)

    sweep = command("sweep", "search for good settings", SWEEP)
    sweep.add_argument("sweep", metavar="SWEEP", help="a script, or the name of a sweep")
    sweep.add_argument("settings", nargs="*", metavar="key=value", help="settings of all trials")
    sweep.add_argument("--name", help="another name than the script's")
    sweep.add_argument("--trials", type=int, metavar="N", help="the number of trials wanted")
    sweep.add_argument(
        "--fix", action="append", default=[], metavar="key=value", help="take a key out of SPACE"
    )
    _add_resources(sweep)
    _add_wandb(sweep)

    return parser


def _add_resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources of trials and replicas")
    group.add_argument("--address", help="a Ray cluster (default: this machine alone)")
    group.add_argument("--cpus-per-trial", type=float, metavar="N", help="default: 1")
    group.add_argument("--gpus-per-trial", type=float, metavar="N", help="default: 1 if any")
    group.add_argument("--parallel", type=int, metavar="N", help="at most N at a time")


def _add_wandb(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("W&B (options, then variables WANDB_*, then offline)")
    group.add_argument("--wandb", choices=("online", "offline", "disabled"))
    group.add_argument("--project", help="default: sda-kolmogorov")
    group.add_argument("--entity")
    group.add_argument("--tags", metavar="A,B")


def _locate(args: argparse.Namespace) -> None:
    r"""Makes root, runs and data absolute. Nothing else looks at these variables."""

    here = Path.cwd()

    if args.root or os.environ.get("SDA_RAY_ROOT"):
        root = Path(args.root or os.environ["SDA_RAY_ROOT"])
    elif (here / "runs").is_dir() or (here / "data").is_dir():
        root = here
    elif os.environ.get("SCRATCH"):
        root = Path(os.environ["SCRATCH"]) / "sda" / "kolmogorov"
    else:
        root = here

    args.root = root.expanduser().absolute()
    args.data = Path(args.data).expanduser().absolute() if args.data else args.root / "data"
    runs = getattr(args, "runs", None)
    args.runs = Path(runs).expanduser().absolute() if runs else args.root / "runs"

    places = f"data {args.data}" + ("" if args.command == "simulate" else f", runs {args.runs}")
    print(f"sda-ray {__version__}: root {args.root}, {places}", flush=True)


def _simulate(args: argparse.Namespace, _: Any) -> None:
    from .simulate import PRESETS, simulate

    preset = PRESETS[args.preset]
    simulate(
        args.data,
        preset["trajectories"] if args.trajectories is None else args.trajectories,
        preset["size"] if args.size is None else args.size,
        args.seed,
        workers=args.workers,
        address=args.address,
    )


def _wandb(args: argparse.Namespace) -> Any:
    from .runs import Wandb

    return Wandb.from_options(args.wandb, args.project, args.entity, args.tags)


def _config(args: argparse.Namespace) -> Config:
    r"""Returns the settings of a training: key=value, before --config or --init, before CONFIG."""

    from .checkpoint import RunPath

    base = dict(CONFIG)

    if args.config and Path(args.config).is_file():
        base = load_config(Path(args.config))
    elif args.config or args.init:
        base = load_config(RunPath.find(args.runs, args.config or args.init).config)

    return check_config(base | parse_overrides(args.settings))


def _train(args: argparse.Namespace, _: Any) -> None:
    from .session import resume_run, start_replicas, start_run

    if args.takeover and not args.resume:
        raise UserError("--takeover goes with --resume RUN.")

    if args.resume:
        if args.settings or args.config or args.replicas:
            raise UserError(
                "--resume goes on with a run as it is. For other settings start a run from its "
                f"weights: sda-ray train --init {args.resume} key=value"
            )

        resume_run(args.runs, args.data, args.resume, args.device, _wandb(args), args.takeover)
    elif args.replicas:
        if args.init or args.device:
            raise UserError("--replicas goes with neither --init nor --device.")

        start_replicas(_config(args), args.replicas, **_launch_options(args))
    else:
        start_run(args.runs, args.data, _config(args), args.init, args.device, _wandb(args))


def _launch_options(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("cpus_per_trial", "gpus_per_trial", "parallel"):
        value = getattr(args, name)

        if value is not None and not (value > 0 or (value == 0 and name == "gpus_per_trial")):
            raise UserError(f"--{name.replace('_', '-')} is {value:g}, but must be above 0.")

    return {
        "root": args.root,
        "runs": args.runs,
        "data": args.data,
        "wandb": _wandb(args),
        "address": args.address,
        "cpus": 1 if args.cpus_per_trial is None else args.cpus_per_trial,
        "gpus": args.gpus_per_trial,
        "parallel": args.parallel,
    }


def _sweep(args: argparse.Namespace, sweep: Any) -> None:
    from .runs import Wandb
    from .sweep import launch, load_record, load_script

    options = _launch_options(args)
    recorded = sweep is None and not args.sweep.endswith(".py")

    if recorded:
        sweep, before = load_record(args.runs, args.sweep)

        if args.settings or args.fix or args.name:
            raise UserError(
                f"sweep '{args.sweep}' is carried on as it was started: key=value, --fix and "
                "--name go with a script, for a new sweep."
            )

        options |= {"data": args.root / before["data"]} if not _given("--data") else {}
        options |= {"cpus": before["cpus"]} if args.cpus_per_trial is None else {}
        options |= {"gpus": before["gpus"]} if args.gpus_per_trial is None else {}

        if not (args.wandb or args.project or args.entity or args.tags):
            kept = before["wandb"]
            options["wandb"] = Wandb(**kept | {"tags": tuple(kept["tags"])})

        options["job_type"] = before["wandb"]["job_type"]
    elif sweep is None:
        sweep = load_script(Path(args.sweep))

    sweep = _adjust(sweep, args)
    launch(sweep, **options)


def _given(option: str) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in sys.argv)


def _adjust(sweep: Any, args: argparse.Namespace) -> Any:
    r"""Applies key=value, --fix, --name and --trials to a sweep."""

    settings, fixed = parse_overrides(args.settings), parse_overrides(args.fix)
    space = sweep.space

    if not callable(space):
        for key in settings:
            if any(key in group.split(",") for group in space):
                raise UserError(
                    f"{key} is in SPACE of sweep '{sweep.name}': every trial has its own. To take "
                    f"it out of SPACE, give --fix {key}={format_value(settings[key])}"
                )

        for key in fixed:
            if key not in space:
                groups = [group for group in space if key in group.split(",")]
                joined = f" alone: it is joined in '{groups[0]}'" if groups else ""
                raise UserError(f"--fix {key}: SPACE has no key {key}{joined}.")

        space = {key: domain for key, domain in space.items() if key not in fixed}
    elif fixed:
        raise UserError("--fix goes with a SPACE that is a dict; this one is a function.")

    return replace(
        sweep,
        name=args.name or sweep.name,
        config={**sweep.config, **settings, **fixed},
        space=space,
        trials=sweep.trials if args.trials is None else args.trials,
    )
