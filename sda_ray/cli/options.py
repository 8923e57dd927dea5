r"""What commands of `sda-ray` share: their list, their options, and where files are.

The module of a command is imported once the command is named, so that `--help` stays quick.
"""

import functools
import importlib
import inspect
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from .. import __version__
from ..core import UserError, default_root, did_you_mean, run_directories, say
from ..runs import sweep_names

Function = Callable[..., Any]

# The commands, with the module of each
COMMANDS = {
    "simulate": ("train", "Make a data set."),
    "train": ("train", "Train one network."),
    "plan": ("sweep", "Say what a sweep would cost, and what is wrong with it."),
    "sweep": ("sweep", "Search for good settings."),
    "confirm": ("sweep", "Train the best of a sweep again: is its winner luck?"),
    "sweeps": ("status", "List sweeps."),
    "status": ("status", "Show a sweep as it stands."),
    "best": ("status", "Name the best runs of a sweep."),
    "attach": ("table", "Show the live view of a running sweep."),
    "report": ("results", "Write what a sweep has found as one HTML file."),
    "dashboard": ("status", "Open Optuna's dashboard on a sweep."),
    "stop": ("sweep", "Stop a running sweep, or one trial."),
    "adopt": ("sweep", "Bring finished runs into a sweep."),
    "runs": ("runs", "List, show, compare and prune runs."),
    "evaluate": ("results", "Say how well finished runs sample and assimilate."),
    "export": ("results", "Write a finished run as a directory to share, with a model card."),
    "reproduce": ("results", "Train the first epochs of a run again, and compare the bits."),
    "sync": ("runs", "Upload runs to W&B."),
    "slurm": ("cluster", "Write the script of a Slurm job for a sweep."),
    "join": ("cluster", "Add this machine to a running sweep."),
    "cluster": ("cluster", "Show the nodes of a cluster and their trials."),
    "doctor": ("cluster", "Check whether this machine, or a cluster, is fit for sweeps."),
    "completion": ("options", "Print what makes a shell complete commands, sweeps and runs."),
}
COMPLETE = "_SDA_RAY_COMPLETE"  # the variable by which a shell asks what may come next
LISTING = ("list", "show", "compare")  # the commands that look at runs, of a bucket too


class Args(SimpleNamespace):
    r"""The values of a command's options and arguments, by name."""

    # Of commands that do not take them
    name: Any = None
    trials: Any = None
    finalists: Any = None
    seeds: Any = None
    runs: Any = None
    bucket: Any = None
    settings: Any = ()
    config: Any = None  # a run, or whether to print that of one
    fix: Any = ()
    fork: Any = False
    json: Any = False


class Command(click.Command):
    r"""A command whose help is printed as it was written, examples included."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        text = inspect.cleandoc(self.help or "")
        formatter.write(f"\n{indent(text, '  ')}\n")


class Group(click.Group):
    r"""A group of commands, which suggests a name for one that does not exist."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.get_command(ctx, args[0]) or ctx.resilient_parsing  # a shell completes it

        if not known and not args[0].startswith("-"):
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise UserError(f"there is no command '{args[0]}'.{hint} `sda-ray --help` lists all.")

        return super().resolve_command(ctx, args)


class Commands(Group):
    r"""The group of :data:`COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)

        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        items = [CompletionItem(name, help=about) for name, (_, about) in COMMANDS.items()]
        commands = [item for item in items if item.value.startswith(incomplete)]

        return commands + click.Command.shell_complete(self, ctx, incomplete)


class Actions(Group):
    r"""Commands of which the first is meant where none is named, wherever options stand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = [word for word in args if word in self.commands][:1]

        if named:
            args.remove(named[0])

        asked = not args if ctx.resilient_parsing else {"-h", "--help"} & {*args}

        if named or not asked:
            args = [*(named or [next(iter(self.commands))]), *args]

        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        first = next(iter(self.commands.values()))

        return super().shell_complete(ctx, incomplete) + first.shell_complete(ctx, incomplete)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Hyperparameter sweeps for score-based data assimilation. Every command can be killed "
    "and run again: it resumes where it was.",
)
@click.version_option(__version__, message="sda-ray %(version)s")
def sda_ray() -> None:
    pass


@sda_ray.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion_command(shell: str) -> None:
    r"""Prints the script with which a shell completes commands, options, sweeps and runs.

    echo 'eval "$(sda-ray completion bash)"' >> ~/.bashrc     and likewise zsh in ~/.zshrc
    sda-ray completion fish > ~/.config/fish/completions/sda-ray.fish
    """

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(sda_ray, {}, "sda-ray", COMPLETE).source())


class Amount(click.FloatRange):
    r"""A number above 0 and below infinity, or 0 if that is allowed."""

    def __init__(self, zero: bool = False) -> None:
        super().__init__(0, min_open=not zero)

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> Any:
        if not math.isfinite(number := super().convert(value, param, ctx)):
            self.fail(f"{value} is not finite.", param, ctx)

        return number


COUNT = click.IntRange(1)
THREADS = click.IntRange(1, 4096)  # torch takes any number, and fails later


def _completer(names: Callable[[Path], Iterable[str]], files: bool) -> Function:
    r"""Returns what completes names of a directory of runs, or files if none begins so."""

    def complete(ctx: click.Context, param: click.Parameter, begin: str) -> list[CompletionItem]:
        args = Args(**ctx.params)
        _locate(args)
        known = (x for x in names(args.runs) if x.startswith(begin) and shlex.quote(x) == x)

        return [CompletionItem(begin, type="file")] * files + [*map(CompletionItem, known)]

    return complete


def _run_names(runs: Path) -> Iterator[str]:
    return (directory.name for directory in run_directories(runs))


# By what an option or argument is to be
COMPLETERS = {
    "RUN": _completer(_run_names, files=True),
    "SCRIPT": _completer(sweep_names, files=True),
    "SWEEP": _completer(sweep_names, files=False),
    "NAME": _completer(sweep_names, files=False),
}


def argument(name: str, metavar: str, **more: Any) -> Any:
    r"""Returns an argument that names a sweep, or runs."""

    kind = metavar.strip("[].")

    return click.argument(name, metavar=metavar, shell_complete=COMPLETERS[kind], **more)


def option(name: str, about: str, kind: Any = str, metavar: str | None = None, **more: Any) -> Any:
    r"""Returns an option: a text, a number N, a flag if its kind is bool, or one of several."""

    if kind is bool:
        return click.option(name, is_flag=True, help=about)

    kind = click.Choice(kind) if isinstance(kind, tuple) else kind
    number = kind is int or isinstance(kind, click.IntRange | click.FloatRange)
    metavar = metavar or ("N" if number else None)

    more = {"shell_complete": COMPLETERS.get(metavar or "")} | more

    return click.option(name, type=kind, metavar=metavar, help=about, **more)


def _all(*decorators: Function) -> Callable[[Function], Function]:
    r"""Returns one decorator for several, which appear in this order in the help."""

    return lambda function: functools.reduce(lambda f, d: d(f), reversed(decorators), function)


PLACES = _all(
    option("--data", "The data directory. Default: ROOT/data."),
    option("--root", "Default: $SDA_RAY_ROOT, else here.", envvar="SDA_RAY_ROOT"),
)
RUNS = option("--runs", "The directory of all runs, or s3://BUCKET/PREFIX. Default: ROOT/runs.")


def command(
    name: str, about: str | None = None, group: click.Group = sda_ray, runs: bool = True
) -> Callable[[Function], click.Command]:
    r"""Makes a command of a function that takes its :class:`Args`.

    Root, data and runs are absolute in there; `data_given` tells whether `--data` was. The help is
    the docstring by default.
    """

    def decorate(function: Function) -> click.Command:
        @click.pass_context
        def call(context: click.Context, /, **given: Any) -> None:
            for param in context.command.params:
                if given[param.name or ""] == "":  # in a shell, a variable that was not set
                    what = param.opts[0] if param.param_type_name == "option" else param.metavar
                    raise UserError(f"{what} is empty, but must say something, or be left out.")

            args = Args(command=name, **context.obj, **given)
            _locate(args)
            _begin(args)
            function(args)

        run: Function = functools.update_wrapper(call, function)
        run = PLACES(RUNS(run) if runs else run)

        return group.command(name, cls=Command, help=about)(run)

    return decorate


def _locate(args: Args) -> None:
    r"""Makes root, runs and data absolute."""

    def absolute(path: Any) -> Path:
        return Path(os.path.abspath(Path(path).expanduser()))

    try:
        os.getcwd()
    except FileNotFoundError:
        if not os.path.isabs(args.root or ""):
            raise UserError(
                "the current directory has been removed. Change to another one, or give --root "
                "as an absolute path."
            ) from None

        os.chdir("/")  # Tune and MKL do not work without a current directory

    args.root = absolute(args.root or default_root())
    args.data_given = args.data is not None
    args.data = absolute(args.data or args.root / "data")

    if args.runs and args.runs.startswith("s3://"):
        args.bucket = args.runs.rstrip("/")
        args.runs = args.root / "runs" / "s3" / args.bucket.removeprefix("s3://")

    args.runs = absolute(args.runs or args.root / "runs")


def _begin(args: Args) -> None:
    r"""Prints where files are, checks that they can be there, and fetches those to be listed."""

    places = f"data {args.data}" + ("" if args.command == "simulate" else f", runs {args.runs}")
    places += f", a copy of which is in {args.bucket}" if args.bucket else ""
    out = sys.stderr if args.json or args.config is True else sys.stdout
    say(f"sda-ray {__version__}: root {args.root}, {places}", file=out)

    for place in (args.root, args.data, args.runs):
        existing = next(part for part in (place, *place.parents) if part.exists())

        if not existing.is_dir():
            raise UserError(f"{place} cannot be used: {existing} is a file, no directory.")

    if not args.bucket:
        return

    if args.command not in ("sweep", "plan", "stop", *LISTING):
        raise UserError(
            f"`sda-ray {args.command}` works on a directory, not on {args.bucket}: give it --runs "
            f"{args.runs}, where runs of this machine are, and those fetched by `sda-ray runs`."
        )

    if args.command in LISTING:
        from ..storage import Bucket, fetch_records

        fetch_records(Bucket(args.bucket), args.runs)


SETTINGS = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
SWEEP = argument("sweep", "SWEEP")
RUN = argument("run", "RUN")
RUNS_GIVEN = argument("run", "[RUN]...", nargs=-1)
JSON = option("--json", "For programs.", bool)
NAME = option("--name", "Another name than the script's.")
ADDRESS = option("--address", "A Ray cluster. Default: this machine alone.")

RESOURCES = _all(
    ADDRESS,
    option("--cpus-per-trial", "Default: 1.", Amount()),
    option("--gpus-per-trial", "Default: 1 if any.", Amount(zero=True)),
    option(
        "--parallel",
        "At most N trials at a time. A cluster that starts nodes on demand starts them for N.",
        COUNT,
    ),
)

WANDB = _all(
    option("--wandb", "Default: $WANDB_MODE, else offline.", ("online", "offline", "disabled")),
    option("--project", "Of W&B. Default: $WANDB_PROJECT, else sda-kolmogorov."),
    option("--entity", "Of W&B."),
    option("--tags", "Of W&B.", metavar="A,B"),
)

DEFINITION = _all(
    click.argument("sweep", metavar="SWEEP", shell_complete=COMPLETERS["SCRIPT"]),
    SETTINGS,
    NAME,
    option("--trials", "The number of trials wanted.", int),
    option("--finalists", "The least number of trials with all epochs.", click.IntRange(0)),
    option("--seeds", "Train what reaches the end with N seeds, and judge their mean.", COUNT),
    option("--fix", "Take a key out of SPACE.", metavar="KEY=VALUE", multiple=True),
)

LAUNCH = _all(
    DEFINITION,
    option(
        "--enqueue",
        "Try KEY=VALUE,… or the settings of a run next; repeatable.",
        metavar="WHAT",
        multiple=True,
    ),
    option(
        "--warm-start",
        "Learn from the finished runs of another sweep; repeatable.",
        metavar="SWEEP",
        multiple=True,
    ),
    option("--fork", "A new sweep, warm-started from the one it changes.", bool),
    option("--retry-failed", "Try failed runs again, where they were.", bool),
    option("--hours", "Stop in time, to be resumed.", Amount(), "H"),
    option(
        "--stall",
        "Kill and resume a trial that makes no step for so long. Default: 10, and at least 20 "
        "times its median step.",
        Amount(),
        "MINUTES",
        default=10.0,
    ),
    option("--keep-checkpoints", "Of active and paused runs and the best N.", click.IntRange(0)),
    option("--disk", "Limit of all checkpoints together, as 50GB.", metavar="SIZE"),
    option("--no-report", "Write no report.html at the end.", bool),
    option("--detach", "Run in the background; return once it runs.", bool),
    option(
        "--code",
        "Resume with the code that the sweep was started with, or with the current code. "
        "Default: recorded.",
        ("recorded", "current"),
        default="recorded",
    ),
    option("--job", "", hidden=True),  # of the script that `slurm` writes
    RESOURCES,
    WANDB,
)
