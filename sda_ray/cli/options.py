r"""The words that each command of `sda-ray` takes, and where its files are.

The functions that do the work are imported when a command runs, so that `--help` stays quick.
"""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any

import click

from .. import __version__
from ..core import KEYS, UserError, did_you_mean, format_value
from .arguments import Args

__all__ = ["sda_ray"]

Function = Callable[..., Any]

STATUSES = (
    *("running", "paused", "interrupted", "stopped", "finished", "diverged", "failed"),
    *("adopted", "damaged", "unknown"),
)


class Filled(click.ParamType):
    r"""A text that is not empty: in a shell, an empty one is a variable that was not set."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> Any:
        if value == "":
            name = param.opts[0] if param is not None else "a value"
            raise UserError(f"{name} is empty, but must say something, or be left out.")

        return value


FILLED = Filled()


class Command(click.Command):
    r"""A command whose help is printed as it was written, examples included."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        text = inspect.cleandoc(self.help or "")
        formatter.write(f"\n{indent(text, '  ')}\n")


class Commands(click.Group):
    r"""A group of commands, which suggests a name for one that does not exist."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            hint = did_you_mean(args[0], self.commands)
            raise UserError(f"there is no command '{args[0]}'.{hint} `sda-ray --help` lists all.")

        return super().resolve_command(ctx, args)


class Actions(Commands):
    r"""Commands of which the first is meant where none is named, wherever options stand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = [word for word in args if word in self.commands][:1]

        if named:
            args.remove(named[0])

        if named or not {"-h", "--help"} & {*args}:
            args = [*(named or [next(iter(self.commands))]), *args]

        return super().parse_args(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Hyperparameter sweeps for score-based data assimilation. Every command can be killed "
    "and run again: it resumes where it was.",
)
@click.version_option(__version__, message="sda-ray %(version)s")
def sda_ray() -> None:
    pass


def command(
    name: str, short: str, *, group: click.Group = sda_ray, runs: bool = True
) -> Callable[[Function], click.Command]:
    r"""Makes a command of a function that takes its :data:`Args`. The docstring is its help.

    Root, data and runs are absolute in there; `data_given` tells whether `--data` was.
    """

    def decorate(function: Function) -> click.Command:
        @functools.wraps(function)
        def call(invocation: Args, **given: Any) -> None:
            args = Args(command=name, **vars(invocation), **given)
            _locate(args)
            invocation.begin(args)
            function(args)

        run: Function = click.pass_obj(call)
        run = click.option("--root", type=FILLED, help="Default: $SDA_RAY_ROOT, else here.")(run)
        run = click.option("--data", type=FILLED, help="The data directory. Default: ROOT/data.")(
            run
        )

        if runs:
            text = "The directory of all runs, or s3://BUCKET/PREFIX. Default: ROOT/runs."
            run = click.option("--runs", type=FILLED, help=text)(run)

        return group.command(name, cls=Command, short_help=short)(run)

    return decorate


def _locate(args: Args) -> None:
    r"""Makes root, runs and data absolute."""

    def absolute(path: str | None, default: Path) -> Path:
        return Path(os.path.abspath(Path(path).expanduser())) if path else default

    args.root = _find_root(args.root)
    args.data_given = args.data is not None
    args.data = absolute(args.data, args.root / "data")
    args.bucket = None
    runs = getattr(args, "runs", None)

    if runs and runs.startswith("s3://"):
        args.bucket = runs.rstrip("/")
        runs = str(args.root / "runs" / "s3" / args.bucket.removeprefix("s3://"))

    args.runs = absolute(runs, args.root / "runs")


def _find_root(given: str | None) -> Path:
    r"""Returns the root: an option, $SDA_RAY_ROOT, the current directory, or $SCRATCH."""

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


def _all(*decorators: Function) -> Callable[[Function], Function]:
    r"""Returns one decorator for several, which appear in this order in the help."""

    return lambda function: functools.reduce(lambda f, d: d(f), reversed(decorators), function)


SETTINGS = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")

RESOURCES = _all(
    click.option("--address", help="A Ray cluster. Default: this machine alone."),
    click.option("--cpus-per-trial", type=float, metavar="N", help="Default: 1."),
    click.option("--gpus-per-trial", type=float, metavar="N", help="Default: 1 if any."),
    click.option("--parallel", type=int, metavar="N", help="At most N trials at a time."),
)

WANDB = _all(
    click.option(
        "--wandb",
        type=click.Choice(["online", "offline", "disabled"]),
        help="Default: $WANDB_MODE, else offline.",
    ),
    click.option("--project", help="Of W&B. Default: $WANDB_PROJECT, else sda-kolmogorov."),
    click.option("--entity", help="Of W&B."),
    click.option("--tags", metavar="A,B", help="Of W&B."),
)

DEFINITION = _all(
    click.argument("sweep", metavar="SWEEP"),
    SETTINGS,
    click.option("--name", type=FILLED, help="Another name than the script's."),
    click.option("--trials", type=int, metavar="N", help="The number of trials wanted."),
    click.option("--fix", multiple=True, metavar="KEY=VALUE", help="Take a key out of SPACE."),
)

LAUNCH = _all(
    DEFINITION,
    click.option(
        "--enqueue",
        multiple=True,
        metavar="WHAT",
        help="Try KEY=VALUE,… or the settings of a run next; repeatable.",
    ),
    click.option(
        "--warm-start",
        multiple=True,
        metavar="SWEEP",
        help="Learn from the finished runs of another sweep; repeatable.",
    ),
    click.option(
        "--fork", is_flag=True, help="A new sweep, warm-started from the one it changes."
    ),
    click.option("--retry-failed", is_flag=True, help="Try failed runs again, where they were."),
    click.option("--hours", type=float, metavar="H", help="Stop in time, to be resumed."),
    click.option(
        "--stall",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="Kill and resume a trial that makes no step for so long. Default: 10, and at least 20 "
        "times its median step.",
    ),
    click.option(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="Of active and paused runs and the best N.",
    ),
    click.option("--disk", metavar="SIZE", help="Limit of all checkpoints together, as 50GB."),
    click.option("--detach", is_flag=True, help="Run in the background; return once it runs."),
    click.option(
        "--code",
        type=click.Choice(["recorded", "current"]),
        default="recorded",
        help="Resume with the code that the sweep was started with, or with the current code. "
        "Default: recorded.",
    ),
    click.option("--job", metavar="NAME", hidden=True),  # of the script that `slurm` writes
    RESOURCES,
    WANDB,
)

JSON = click.option("--json", is_flag=True, help="For programs.")


@command("simulate", "Make a data set.", runs=False)
@click.option("--preset", type=click.Choice(["full", "demo"]), default="full", show_default=True)
@click.option("--trajectories", type=int, metavar="N", help="Instead of the preset's.")
@click.option("--size", type=int, metavar="CELLS", help="Instead of the preset's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=int, metavar="N", help="Processes. Default: all CPUs.")
@click.option("--address", help="A Ray cluster. Default: this machine alone.")
def simulate(args: Args) -> None:
    r"""Simulates Kolmogorov flow and writes train.h5, valid.h5 and test.h5 (8:1:1).

    Only what is missing is computed. `full` is the data set of SDA: 1024 trajectories on a 256x256
    grid, averaged to 64x64. `demo` is 64 trajectories on a 64x64 grid, half a minute on two cores:
    for trying things out, not for results.

      sda-ray simulate --preset demo
      sda-ray simulate --preset full --data /scratch/kolmogorov
    """

    from .train import simulate_command

    simulate_command(args)


TRAIN = """Trains one score network, from a configuration to state.pth, in runs/{name}_{id}/.

  sda-ray train window=3 hidden_channels=16,32 hidden_blocks=1,1 epochs=32
  sda-ray train --resume RUN       RUN is a path, a name, an id or the beginning of one

Settings are those of SDA unless KEY=VALUE says otherwise:

""" + "\n".join(
    f"  {name:16} {key.about} ({format_value(key.default)}; {key.accepts})"
    for name, key in KEYS.items()
)


def train(args: Args) -> None:
    from .train import train_command

    train_command(args)


train.__doc__ = TRAIN
command("train", "Train one network.")(
    _all(
        SETTINGS,
        click.option("--resume", type=FILLED, metavar="RUN", help="Resume a run."),
        click.option(
            "--init", type=FILLED, metavar="RUN", help="Start from the weights of a run."
        ),
        click.option(
            "--extend",
            type=FILLED,
            metavar="RUN",
            help="A longer run that begins as RUN did, with epochs=N.",
        ),
        click.option(
            "--config", type=FILLED, metavar="RUN", help="Settings of a run, or a config.json."
        ),
        click.option(
            "--replicas", type=int, metavar="N", help="N runs with the seeds seed … seed + N-1."
        ),
        click.option(
            "--device", type=FILLED, help="cpu, cuda, … Default: cuda if there is a GPU."
        ),
        click.option(
            "--threads",
            type=int,
            metavar="N",
            help="CPU threads; bits depend on it. Default: all.",
        ),
        click.option(
            "--takeover", is_flag=True, help="With --resume: even if a process trains the run."
        ),
        RESOURCES,
        WANDB,
    )(train)
)


@command("plan", "Say what a sweep would cost, and what is wrong with it.")
@DEFINITION
@JSON
@RESOURCES
@WANDB
def plan(args: Args) -> None:
    r"""Says what a sweep would cost, and what is wrong with it, before anything starts.

    Parameters, memory and seconds of its networks, trials at a time, hours, disk. A probe of at
    most 10 s on each kind of node measures speed and memory. Exits with 2 if anything is wrong,
    and lists all of it.

      sda-ray plan sweeps/demo.py
      sda-ray plan width.py --parallel 4 --gpus-per-trial 0.5
    """

    from .sweep import plan_command

    plan_command(args)


@command("sweep", "Search for good settings.")
@LAUNCH
def sweep(args: Args) -> None:
    r"""Runs a sweep: many trials in parallel, each a training in its own run directory.

    SWEEP is a script, such as sweeps/demo.py, or the name of a sweep that was started before. The
    same command starts a sweep, resumes it after a crash, and, with a larger --trials, extends it.
    A running sweep takes up --trials, --enqueue, --warm-start and --retry-failed from elsewhere.

      sda-ray sweep sweeps/demo.py                      start, or resume
      sda-ray sweep demo --trials 64                    extend, running or finished
      sda-ray sweep demo --enqueue learning_rate=1e-3   try this next; other keys are drawn
      sda-ray sweep demo --enqueue RUN                  the settings of a run
      sda-ray sweep sweeps/demo.py seed=1 --fork        another sweep, with what it shares with this
      sda-ray sweep demo --detach                       in the background; see sda-ray attach demo

    With --runs s3://BUCKET/PREFIX, the runs are in ROOT/runs/s3/BUCKET/PREFIX, and a copy of them in
    the bucket follows within 5 s: if this machine and its disk are lost, the same command on another
    one resumes from the copy. One driver at a time. Requires `pip install 'sda-ray[cluster]'`.
    """

    from .sweep import sweep_command

    sweep_command(args)


@command("slurm", "Write the script of a Slurm job for a sweep.")
@LAUNCH
@click.option("--output", metavar="FILE", help="Default: slurm.sh, with the sweep's record.")
@click.option("--submit", is_flag=True, help="Run sbatch on it.")
def slurm(args: Args) -> None:
    r"""Writes the script of a Slurm job that runs a sweep, and shows it.

    Options are those of `sda-ray sweep`, and after -- those of sbatch. The job starts Ray on its
    nodes for itself alone. Two minutes before its time is up every trial saves a checkpoint, and the
    job is requeued; the same happens when a node fails. The job is done when the sweep is.

      sda-ray slurm width.py -- --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00
      sda-ray slurm width --submit -- --cpus-per-task=8        resume, on CPUs, and submit at once
    """

    from .cluster import slurm_command

    slurm_command(args)


@command("join", "Add this machine to a running sweep.")
@click.argument("sweep", metavar="SWEEP")
@click.option("--cpus", type=int, metavar="N", help="Default: all that may be used.")
@click.option("--gpus", type=int, metavar="N", help="Default: all that may be used.")
@click.option(
    "--wait",
    type=float,
    default=0.0,
    metavar="MINUTES",
    help="For the sweep to start, or restart.",
)
def join(args: Args) -> None:
    r"""Adds this machine, or its allocation, to a sweep that runs on other machines.

    They must see the same directory of runs. Ctrl-C, SIGTERM or the end of a Slurm job remove it
    again: the trials here save a checkpoint first, and resume elsewhere.

      sda-ray join width                          from a terminal on another machine
      srun --cpus-per-task=8 sda-ray join width   8 more CPUs from Slurm, as long as they last
    """

    from .cluster import join_command

    join_command(args)


@command("stop", "Stop a running sweep, or one trial.")
@click.argument("sweep", metavar="SWEEP")
@click.option("--trial", type=int, metavar="N", help="End this trial only.")
def stop(args: Args) -> None:
    r"""Stops a running sweep, here or on another machine that sees the directory of runs.

    Every trial saves a checkpoint first, and the sweep can be resumed. A trial that is ended by its
    number is not resumed.

      sda-ray stop width
      sda-ray stop width --trial 7
    """

    from .sweep import stop_command

    stop_command(args)


@command("attach", "Show the live table of a running sweep.")
@click.argument("sweep", metavar="SWEEP")
def attach(args: Args) -> None:
    r"""Shows the live table of a sweep that runs elsewhere.

    In the background, in a job, or on another machine that sees the directory of runs. Ctrl-C leaves
    the sweep running. When the sweep ends, its leaderboard is shown.

      sda-ray attach width
    """

    from .table import attach

    attach(args.runs, args.sweep)


@command("cluster", "Show the nodes of a cluster and their trials.")
@click.argument("action", type=click.Choice(["status"]))
@click.option("--address", default="auto", show_default=True)
@JSON
def cluster(args: Args) -> None:
    r"""Shows the nodes of a Ray cluster, and which run is on which.

    Run it on the head node, or with --address on any machine in the cluster.

      sda-ray cluster status                                  on the head node
      ray exec cluster.yaml 'sda-ray cluster status'          from where the cluster was started
    """

    from .cluster import status_command

    status_command(args)


@command("adopt", "Bring finished runs into a sweep.")
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY...")
@click.option("--sweep", required=True, metavar="SWEEP", help="A script, or the name of a sweep.")
@click.option("--name", type=FILLED, help="Another name than the script's.")
@RESOURCES
@WANDB
def adopt(args: Args) -> None:
    r"""Brings finished runs into a sweep as prior trials: the sampler learns from them.

    They do not count as trials of the sweep. Runs of SDA's own code work too. Settings and metrics
    are copied; nothing is written to or deleted from DIRECTORY. Runs that the sweep does not cover
    are left out, with the reason.

      sda-ray adopt --sweep width.py OLD/runs/*
    """

    from .sweep import adopt_command

    args.settings, args.fix, args.trials = (), (), None
    adopt_command(args)


@sda_ray.group("runs", cls=Actions, short_help="List, show, compare and prune runs.")
def runs() -> None:
    r"""Lists, shows, compares and prunes run directories.

    RUN is a path, a name, an id or an unambiguous beginning of one. Without an action, the runs are
    listed: `sda-ray runs window=5 --sort loss_valid`.
    """


@command("list", "List runs (the default).", group=runs)
@SETTINGS
@click.option("--sweep", metavar="NAME", help="Only of this sweep.")
@click.option("--status", type=click.Choice(STATUSES), help="Only of this status.")
@click.option(
    "--sort",
    metavar="KEY",
    default="age",
    help="age, name, status, epoch, loss_valid, sweep, size or a setting. Default: age.",
)
@click.option("--limit", type=int, metavar="N", help="At most N.")
@JSON
def list_runs(args: Args) -> None:
    r"""Lists runs, the newest first. KEY=VALUE keeps the runs whose config has this value.

    A run that says it is running while no process trains it is `interrupted`; `damaged` is one
    whose files cannot be read, and `sda-ray runs show RUN` says why. With --runs s3://BUCKET/PREFIX,
    settings, metrics and records are fetched first; weights stay in the bucket.

      sda-ray runs --sweep width --sort loss_valid --limit 10
    """

    from .runs import list_command

    list_command(args)


@command("show", "Show one run: config, curve, where it came from.", group=runs)
@click.argument("run", metavar="RUN")
@JSON
def show_run(args: Args) -> None:
    r"""Shows one run: its config, its curve, and where it came from."""

    from .runs import show_command

    show_command(args)


@command("compare", "Compare runs: settings that differ, and metrics.", group=runs)
@click.argument("run", metavar="RUN")
@click.argument("others", nargs=-1, required=True, metavar="RUN...")
@JSON
def compare_runs(args: Args) -> None:
    r"""Compares runs: the settings that differ, beside their metrics."""

    from .runs import compare_command

    compare_command(args)


@command("prune", "Delete the checkpoints of finished runs.", group=runs)
@click.argument("run", nargs=-1, metavar="[RUN]...")
@click.option("--yes", is_flag=True, help="Do it without asking.")
@JSON
def prune_runs(args: Args) -> None:
    r"""Deletes checkpoint.pth and checkpoint.prev.pth of finished runs, all or those given.

    What would be freed is shown first; then you are asked, on a terminal, or --yes is needed.
    Weights, config, metrics and records stay, but a pruned run cannot be extended to more epochs. A
    run that a process holds is never touched.
    """

    from .runs import prune_command

    prune_command(args)


@command("sync", "Upload runs to W&B.")
@click.argument("run", nargs=-1, metavar="[RUN]...")
@click.option("--all", is_flag=True, help="All finished runs.")
def sync(args: Args) -> None:
    r"""Uploads runs that were trained offline, or without reaching the server, to W&B.

    RUN is a path, a name, an id or an unambiguous beginning of one. Each run keeps its name, id, group
    and steps. Rows that are on the server are not sent again; a run in use is left out. The server
    and the account are those of `wandb login`, or of WANDB_BASE_URL and WANDB_API_KEY.

      sda-ray sync --all
    """

    from ..runs import sync_runs

    if args.all == bool(args.run):
        raise UserError("give the runs to upload, or --all for the finished ones, and not both.")

    sync_runs(args.runs, args.run)


@command("doctor", "Check whether this machine, or a cluster, is fit for sweeps.")
@click.argument("file", required=False, metavar="[CLUSTER.YAML]")
@click.option("--address", help="A Ray cluster, as `auto`. Default: this machine alone.")
@click.option("--wandb", type=click.Choice(["online"]), help="Check whether W&B can be reached.")
@JSON
def doctor(args: Args) -> None:
    r"""Checks whether this machine, or a cluster, is fit for sweeps.

    Equal versions on all nodes, clocks, disk, files that nodes see or get through the head node, GPUs,
    W&B, open ports, Ray's token, limits. Exits with 1 if it finds a fault; every fault comes with what
    to do.

      sda-ray doctor                    this machine
      sda-ray doctor --address auto     all nodes of the Ray that this machine is a node of
      sda-ray doctor cluster.yaml       the file, and then the cluster that it has started
    """

    from .cluster import doctor_command

    doctor_command(args)
