r"""The options of the command line, and where its files are."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..core.config import format_value
from ..core.keys import KEYS
from ..runs.sync import add_sync_parser
from .cluster import add_doctor_parser
from .jobs import add_job_parsers, split_words
from .runs import add_runs_parser, with_action
from .views import add_view_parsers

__all__ = ["find_root", "parse"]

# Options whose empty text would pass for none: of a shell, it is a variable that was not set
FILLED = ("resume", "init", "extend", "config", "device", "name", "root", "data", "runs")

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
sweep, carries it on after a crash, and, with a larger --trials, extends it. While the sweep runs,
--trials, --enqueue, --warm-start and --retry-failed from elsewhere are taken up by it.

  sda-ray sweep sweeps/demo.py                      start, or carry on
  sda-ray sweep demo --trials 64                    extend, running or finished
  sda-ray sweep demo --enqueue learning_rate=1e-3   try this next; what is not given is drawn
  sda-ray sweep demo --enqueue RUN                  the settings of a run
  sda-ray sweep sweeps/demo.py seed=1 --fork        another sweep, with what still holds of this
  sda-ray sweep demo --detach                       in the background; sda-ray attach demo shows it

With --runs s3://BUCKET/PREFIX, the runs are in ROOT/runs/s3/BUCKET/PREFIX, and a copy of them that
follows within 5 s is in the bucket: should this machine and its disk be lost, the same command on
another one carries the sweep on from the copy. One driver at a time: another one is refused for as
long as this one lives. It takes `pip install 'sda-ray[cluster]'`, and finds keys as AWS' tools do.
"""

PLAN = """
Says what a sweep would cost, and what is wrong with it, before anything starts: parameters, memory
and seconds of its networks, trials at a time, hours, disk. A probe of at most 10 s on each kind of
node measures speed and memory. Exits with 2 if anything is wrong, and lists all of it.
"""

STOP = """
Stops a sweep that runs, here or on another machine that sees the directory of runs: every trial
saves a checkpoint first. Or ends one of its trials, by its number, for good.
"""

ADOPT = """
Brings finished runs into a sweep as prior trials: the sampler knows them, and they do not count as
trials of the sweep. Runs of SDA's own code will do. Settings and metrics are copied; nothing is
written to or deleted from DIRECTORY. Runs that the sweep does not cover are left out, with the reason.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    r"""Parses arguments. Those of the form key=value may stand anywhere among the options.

    Paths come back absolute; `data_given` says whether `data` was an option.
    """

    parser = _parser()
    argv, after = split_words(argv)
    args, rest = parser.parse_known_args(with_action(argv))
    unknown = [x for x in rest if x.startswith("-") or "=" not in x or "settings" not in args]

    if unknown:
        keys = [x.strip("-").partition("=")[0].replace("-", "_") for x in unknown]
        hint = "".join(f". Settings are given as {key}=…" for key in keys if key in KEYS)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    for key in FILLED:
        if getattr(args, key, None) == "":
            parser.error(f"--{key} is empty, but must say something, or be left out.")

    if rest:
        args.settings += rest

    _locate(args)
    args.words, args.sbatch = list(argv[1:]), after

    return args


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
            allow_abbrev=False,
        )
        where = added.add_argument_group("places")
        where.add_argument("--root", help="default: $SDA_RAY_ROOT, else here")
        where.add_argument("--data", help="the data directory (default: ROOT/data)")

        if name != "simulate":
            where.add_argument(
                "--runs",
                help="the directory of all runs (default: ROOT/runs), or s3://BUCKET/PREFIX",
            )

        return added

    _add_simulate(command("simulate", "make a data set", SIMULATE))
    _add_train(command("train", "train one network", f"{TRAIN}\n{_keys()}"))
    _add_plan(command("plan", "what a sweep would cost, and what is wrong with it", PLAN))
    _add_sweep(command("sweep", "search for good settings", SWEEP))
    add_job_parsers(command, _add_sweep)
    _add_stop(command("stop", "stop a sweep that runs, or one trial", STOP))
    add_view_parsers(command)
    _add_adopt(command("adopt", "bring finished runs into a sweep", ADOPT))
    add_runs_parser(command)
    add_sync_parser(command)
    add_doctor_parser(command)

    return parser


def _keys() -> str:
    return "\n".join(
        f"  {name:16} {key.about} ({format_value(key.default)}; {key.accepts})"
        for name, key in KEYS.items()
    )


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=("full", "demo"), default="full")
    parser.add_argument("--trajectories", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--size", type=int, metavar="CELLS", help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all CPUs)")
    parser.add_argument("--address", help="a Ray cluster (default: this machine alone)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, as epochs=64")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="RUN", help="go on with a run (path, name or id)")
    start.add_argument("--init", metavar="RUN", help="start from the weights of a run")
    start.add_argument(
        "--extend", metavar="RUN", help="a longer run that begins as RUN did, with epochs=N"
    )
    parser.add_argument("--config", metavar="RUN", help="settings of a run, or a config.json")
    parser.add_argument("--replicas", type=int, metavar="N", help="N runs with seeds seed … + N-1")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU; bits depend on it (default: all)"
    )
    parser.add_argument(
        "--takeover", action="store_true", help="with --resume: even if a process is at it"
    )
    _add_resources(parser, "resources of replicas")
    _add_wandb(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_definition(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_resources(parser, "resources of trials")
    _add_wandb(parser)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    _add_definition(parser)
    priors = parser.add_argument_group("what to begin with")
    priors.add_argument(
        "--enqueue",
        action="append",
        default=[],
        metavar="WHAT",
        help="try key=value,… or the settings of a run before others; may be repeated",
    )
    priors.add_argument(
        "--warm-start",
        action="append",
        default=[],
        metavar="SWEEP",
        help="learn from the finished runs of another sweep; may be repeated",
    )
    priors.add_argument(
        "--fork",
        action="store_true",
        help="a new sweep, warm-started from the one it differs from",
    )
    priors.add_argument(
        "--retry-failed", action="store_true", help="failed runs are tried again, where they were"
    )
    parser.add_argument("--job", metavar="NAME", help=argparse.SUPPRESS)  # see cluster/slurm.py
    limits = parser.add_argument_group("limits")
    limits.add_argument("--hours", type=float, metavar="H", help="stop in time, to be carried on")
    limits.add_argument(
        "--stall",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="a trial without a step for so long is killed and resumed (default: 10, and at "
        "least 20 times its median step)",
    )
    limits.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="of runs under way, paused and the best N",
    )
    limits.add_argument("--disk", metavar="SIZE", help="of all checkpoints together, as 50GB")
    parser.add_argument(
        "--detach",
        action="store_true",
        help="return once it runs: in the background, or with --address as a job of the cluster",
    )
    code = parser.add_argument_group("code")
    code.add_argument(
        "--code",
        choices=("recorded", "current"),
        default="recorded",
        help="a sweep goes on with the code that it was started with, whatever was edited since "
        "then; `current` takes the edits up",
    )
    _add_resources(parser, "resources of trials")
    _add_wandb(parser)


def _add_definition(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="a script, or the name of a sweep")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all trials")
    parser.add_argument("--name", help="another name than the script's")
    parser.add_argument("--trials", type=int, metavar="N", help="the number of trials wanted")
    parser.add_argument(
        "--fix", action="append", default=[], metavar="key=value", help="take a key out of SPACE"
    )


def _add_stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="the name of a sweep")
    parser.add_argument("--trial", type=int, metavar="N", help="only this one, for good")


def _add_adopt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIRECTORY", help="of a finished run")
    parser.add_argument(
        "--sweep", required=True, metavar="SWEEP", help="a script, or the name of a sweep"
    )
    parser.add_argument("--name", help="another name than the script's")
    parser.set_defaults(settings=[], fix=[], trials=None)
    _add_resources(parser, "resources of trials, if the sweep has yet to start")
    _add_wandb(parser)


def _add_resources(parser: argparse.ArgumentParser, title: str) -> None:
    group = parser.add_argument_group(title)
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


def find_root(given: str | None) -> Path:
    r"""Returns the root as an absolute path: an option, $SDA_RAY_ROOT, the current directory, or $SCRATCH."""

    current = Path.cwd()

    if given or os.environ.get("SDA_RAY_ROOT"):
        root = Path(given or os.environ["SDA_RAY_ROOT"])
    elif (current / "runs").is_dir() or (current / "data").is_dir():
        root = current
    elif os.environ.get("SCRATCH"):
        root = Path(os.environ["SCRATCH"]) / "sda" / "kolmogorov"
    else:
        root = current

    return Path(os.path.abspath(root.expanduser()))


def _locate(args: argparse.Namespace) -> None:
    r"""Makes root, runs and data absolute."""

    def absolute(path: str | None, default: Path) -> Path:
        return Path(os.path.abspath(Path(path).expanduser())) if path else default

    args.root = find_root(args.root)
    args.data_given = args.data is not None
    args.data = absolute(args.data, args.root / "data")
    args.bucket = None
    runs = getattr(args, "runs", None)

    if runs and runs.startswith("s3://"):
        args.bucket = runs.rstrip("/")
        runs = str(args.root / "runs" / "s3" / args.bucket.removeprefix("s3://"))

    args.runs = absolute(runs, args.root / "runs")
