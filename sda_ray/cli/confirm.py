r"""The command `sda-ray confirm`: whether the winner of a sweep is real."""

import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from ..core import UserError, make_console, make_table, parse_overrides, printable, say
from ..runs import RunPath, sweep_directory
from .options import COUNT, JSON, RESOURCES, SETTINGS, SWEEP, WANDB, Args, command, option
from .render import format_loss

if TYPE_CHECKING:
    from ..sweep import Confirmation  # which loads optuna

TOP, SEEDS = 5, 3


@command("confirm")
@SWEEP
@SETTINGS
@option("--top", f"How many of the best configurations. Default: {TOP}.", COUNT)
@option("--seeds", f"How many seeds for each. Default: {SEEDS}.", COUNT)
@option("--name", "Default: SWEEP-confirm.")
@JSON
@RESOURCES
@WANDB
def confirm_command(args: Args) -> None:
    r"""Trains the best of a sweep again: is its winner real, or luck?

    The first of a leaderboard is the best of many numbers with noise, so its own is too good. Here
    the best configurations are trained again: all with the same seeds, which SWEEP has not used,
    and validated on other windows, times and noise. A table then has means and standard errors, and
    says whether the order survives, by how much the winner was flattered, and which configuration
    to use. Nothing is pruned: it takes as many whole trainings as --top times --seeds.

    The same command resumes it, as does `sda-ray sweep SWEEP-confirm`; with more --seeds it trains
    these too. Once it has ended, it prints the table again.

      sda-ray confirm width
      sda-ray confirm width --top 3 --seeds 5 epochs=1024
    """

    from ..sweep import read_confirmation

    name = args.name or f"{args.sweep}-confirm"

    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        _confirm(args, args.sweep, name)

    if args.json:
        print(json.dumps(read_confirmation(args.runs, name).as_json(), indent=2))


def _confirm(args: Args, parent: str, name: str) -> None:
    from ..data import fingerprint
    from ..sweep import launch_sweep, make_confirmation, read_sweep, resume_confirmation
    from . import table
    from .report import report_end
    from .sweep import launch_options, recorded_options

    settings, confirms = parse_overrides(args.settings), None
    epochs = settings.pop("epochs", None)

    if settings:
        raise UserError(f"{next(iter(settings))} is that of the sweep. Only epochs may differ.")

    if (sweep_directory(args.runs, name) / "sweep.json").exists():
        sweep = resume_confirmation(args.runs, parent, name, args.top, args.seeds, epochs)
        record = read_sweep(args.runs, name)
    else:
        top, seeds = args.top or TOP, args.seeds or SEEDS
        sweep, confirms = make_confirmation(args.runs, parent, name, top, seeds, epochs)
        record = read_sweep(args.runs, parent)

        if (count := len(confirms["runs"])) < top:
            say(
                f"Note: sweep '{parent}' has {count} complete configurations, all of which are "
                f"confirmed. `sda-ray sweep {parent} --finalists {top}` completes more."
            )

    options = recorded_options(args, launch_options(args), record["options"])
    options = replace(options, confirms=confirms, job_type="confirmation")

    if fingerprint(options.data) != record["fingerprint"]:
        raise UserError(f"{options.data} has other data than sweep '{parent}'. Give its --data.")

    launch_sweep(sweep, options, table, finish=lambda hold: report_end(args.runs, name, hold))


def show_confirmation(runs: Path, name: str) -> None:
    r"""Prints the table of a confirmation, and what follows from it."""

    from ..sweep import read_confirmation
    from .table import short_value

    found, console = read_confirmation(runs, name), make_console()
    names = {path.id: path.directory.name for path in RunPath.all(runs)}
    order, best = found.order, found.recommended
    right = ("#", "was", "value then", f"{found.objective} ± se", "behind ± se", "seeds")
    table = make_table(
        "#", "was", "run then", *right[2:], "settings", right=right, fold=["settings"]
    )
    vary = [key for key, x in best.config.items() if any(c.config[key] != x for c in order)]

    for i, x in enumerate(order, 1):
        behind = "–" if x is order[0] else _pm(*found.behind(x), sign="+")
        seeds = f"{len(x.values)}/{len(found.seeds)}"
        settings = " ".join(f"{key}={short_value(x.config[key])}" for key in vary)
        cells = (i, x.rank, x.run, format_loss(x.value), _pm(*x.mean), behind, seeds, settings)
        table.add_row(*(Text(printable(cell)) for cell in cells))

    console.print(Text(f"\nConfirmation of {found.sweep}", style="bold"))
    console.print(table)

    for line in _sentences(found):
        console.print(line)

    own = shlex.join(printable(names.get(id, id)) for id in best.runs)
    sweep, other = shlex.quote(found.sweep), "" if name == f"{found.sweep}-confirm" else name
    words = f"{sweep} --name {shlex.quote(other)}" if other else sweep
    say(f"\nUse the configuration of {printable(names.get(best.run, best.run))}. What next?")
    say(f"  sda-ray evaluate {own}   # its networks, one for each seed" if own else "")
    say(f"  sda-ray confirm {words} --seeds {2 * len(found.seeds)}   # smaller errors")


def _sentences(found: "Confirmation") -> Iterator[str]:
    r"""Yields what a confirmation says about the sweep, a sentence each."""

    winner, order, (flattery, error) = found.configurations[0], found.order, found.flattery
    difference, spread = found.behind(winner)

    if len(order) > 1:
        place = f"now number {order.index(winner) + 1}, {_pm(difference, spread)} behind the first"
        close = ", which is within one standard error" if difference <= spread else ""
        yield (
            f"The winner of the sweep is {'still first' if winner is order[0] else place + close}. "
            f"Kendall's τ between both orders is {found.tau:.2f}."
        )

    if not found.comparable:
        yield "The sweep measured after other epochs, or otherwise: its values do not compare."
    elif winner.values:
        yield (
            f"The winner was flattered by {_pm(flattery, error)}: it had {format_loss(winner.value)} "
            f"in the sweep, and has {_pm(*winner.mean)} over fresh seeds"
            f"{', within one standard error' if abs(flattery) <= error else ''}."
        )

    if len(found.seeds) == 1:
        yield "One seed has no standard error: --seeds 3 adds two."

    for x in order:
        if x.diverged:
            yield f"! Of number {x.rank} of the sweep, {len(x.diverged)} runs diverged: it ranks last."

    if lacking := sum(len(found.seeds) - len(x.values) - len(x.diverged) for x in order):
        yield f"! {lacking} runs are missing, since they failed or were stopped."


def _pm(mean: float, error: float, sign: str = "") -> str:
    r"""Returns a mean and its standard error, in as many digits as that has a meaning for."""

    if math.isnan(mean):
        return "–"

    if not error > 0:
        return f"{mean:{sign}.4g}"

    places = min(9, max(0, 1 - math.floor(math.log10(error))))

    return f"{mean:{sign}.{places}f} ± {error:.{places}f}"
