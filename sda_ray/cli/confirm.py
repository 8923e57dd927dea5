r"""The table of a confirmation: whether the winner of a sweep is real."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from rich.text import Text

from ..core import make_console, make_table, printable, say
from ..runs import RunPath
from ..sweep import Confirmation, read_confirmation
from .render import format_loss, short_settings


def show_confirmation(runs: Path, name: str) -> None:
    r"""Prints the table of a confirmation, and what follows from it."""

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
        settings = short_settings({key: x.config[key] for key in vary})
        cells = (i, x.rank, x.run, format_loss(x.value), _pm(*x.mean), behind, seeds, settings)
        table.add_row(*(Text(printable(cell)) for cell in cells))

    console.print(Text(f"\nConfirmation of {printable(found.sweep)}", style="bold"))
    console.print(table)

    for line in _sentences(found):
        console.print(line)

    own = shlex.join(printable(names.get(id, id)) for id in best.runs)
    sweep, other = shlex.quote(found.sweep), "" if name == f"{found.sweep}-confirm" else name
    words = f"{sweep} --name {shlex.quote(other)}" if other else sweep
    say(f"\nUse the configuration of {printable(names.get(best.run, best.run))}. What next?")

    if own:
        say(f"  sda-ray evaluate {own}   # its networks, one for each seed")

    say(f"  sda-ray confirm {words} --seeds {2 * len(found.seeds)}   # smaller errors")


def _sentences(found: Confirmation) -> Iterator[str]:
    r"""Yields what a confirmation says about the sweep, a sentence each."""

    (winner, *others), order = found.configurations, found.order
    difference, spread = found.behind(winner)
    flattery, error = found.flattery(winner)
    along = [found.flattery(x)[0] for x in others if x.values]

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
            + (f" The others were, by {fmean(along):.4f} on average." if along else "")
        )

    if len(found.seeds) == 1:
        yield "One seed has no standard error: --seeds 3 adds two."

    for x in order:
        if x.diverged:
            yield (
                f"! Of number {x.rank} of the sweep, {len(x.diverged)} runs diverged: it ranks "
                "behind all with fewer."
            )

    if lacking := sum(len(found.seeds) - len(x.values) - len(x.diverged) for x in order):
        yield f"! {lacking} runs are missing: they failed, were stopped, or have not begun."


def _pm(mean: float, error: float, sign: str = "") -> str:
    r"""Returns a mean and its standard error, in as many digits as that has a meaning for."""

    if math.isnan(mean):
        return "–"

    if not error > 0:
        return f"{mean:{sign}.4g}"

    places = max(0, 1 - math.floor(math.log10(error)))

    if places > 6:
        return f"{mean:{sign}.2g} ± {error:.2g}"

    return f"{mean:{sign}.{places}f} ± {error:.{places}f}"
