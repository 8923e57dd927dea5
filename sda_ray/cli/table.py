r"""How a sweep is announced and followed, its leaderboard, and what to do next."""

import json
import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.text import Text

from ..core import UserError, format_value, make_console, read_holder, say
from ..runs import RunPath, is_off, last_metrics, read_metrics, sweep_directory
from ..search import (
    Rules,
    Study,
    TrialRecord,
    average_seeds,
    count_trials,
    importances,
    lacking_seeds,
    rank_key,
)
from ..sweep import read_study, read_sweep, recorded_rules, watch
from .live import LOOK
from .live import LiveTable as LiveTable
from .options import SWEEP, Args, command
from .render import REMEDY, format_loss, format_std, run_table


def announce(
    title: str,
    rules: Rules,
    records: Sequence[TrialRecord],
    directory: Path,
    wanted: dict[str, float],
    parallel: int | None,
) -> None:
    r"""Prints the definition of a sweep that starts, its state, and an estimate of its training."""

    from ..plan import estimate

    rungs = ", ".join(map(str, rules.rungs))
    say(f"sweep '{title}' in {directory}: {rules.target} trials, rungs at epochs {rungs}")

    if records:
        brought = sum(bool(record.source) for record in records)
        under_way = sum(r.state == "running" and not r.paused for r in records)
        paused = sum(r.state == "running" and r.paused for r in records)
        say(
            f"resumed: {len(records) - brought} runs so far, {under_way} of them in progress, "
            f"{paused} paused" + (f"; {brought} brought in" if brought else "")
        )

    say(f"estimate: {estimate(rules, wanted, parallel)}")


def leaderboard(
    title: str,
    records: Sequence[TrialRecord],
    runs: Path,
    count: int = 10,
    objective: str = "loss_valid",
) -> None:
    r"""Prints the best runs of a sweep, and how far its numbers carry."""

    console = make_console()
    compared = average_seeds(records)
    finished = sorted((r for r in compared if r.value is not None), key=rank_key)
    paths = {path.id: path for path in RunPath.all(runs)}
    names = {id: path.name for id, path in paths.items()}
    best = [r for r in finished[:count] if r.run_id in paths]
    lines = {r.run_id: judgement(paths[r.run_id], objective) for r in best}
    scores = {r.run_id: x for r in best if (x := _crps(paths[r.run_id])) is not None}
    brief = all(quick for quick, _ in scores.values())  # quick ones compare with no others
    deviations = {id: x["sample_std"] for id, x in lines.items() if "sample_std" in x}
    more = {
        "±": {id: f"{x[key]:.2g}" for id, x in lines.items() if (key := f"{objective}_se") in x}
        | {r.run_id: f"{se:.2g}" for r in best if (se := r.error_over_seeds) is not None},
        "seeds": {r.run_id: str(len(r.seeds)) for r in best if r.seeds},
        "sample_std": {id: format_std(x) for id, x in deviations.items()},
        "CRPS (quick)" if brief else "CRPS": {
            id: format_loss(x) for id, (quick, x) in scores.items() if quick == brief
        },
    }
    console.print(Text(f"\nLeaderboard of {title}", style="bold"))
    console.print(*run_table(finished[:count], names, console.width, objective, more), sep="\n")

    if len(finished) > count:
        console.print(f"and {len(finished) - count} more.")

    if more["seeds"]:
        console.print(
            "Where several seeds were trained, the value is their mean, and ± its standard error."
        )

    if off := sum(map(is_off, deviations.values())):
        console.print(
            f"! Samples of {off} of these runs are off the data by more than a factor of two: "
            f"{REMEDY}."
        )

    if len({record.config.get("seed") for record in records}) <= 1:
        console.print(
            f"One seed, selected as the best of {len(records)}: the winner's {objective} is "
            "flattered by the selection. `sda-ray confirm` trains the best with other seeds."
        )


def judgement(path: RunPath, objective: str) -> dict[str, Any]:
    r"""Returns the newest metrics with the objective, or nothing if they are damaged."""

    line: dict[str, Any] = {}

    with suppress(UserError, OSError):
        line = last_metrics(path.metrics)

        if objective not in line:  # it is measured at rungs
            lines = reversed(read_metrics(path.metrics))
            line = next((x for x in lines if objective in x), line)

    return line


def _crps(path: RunPath) -> tuple[bool, float] | None:
    r"""Returns whether a run was evaluated by `--quick`, and its mean CRPS of `assim`, if any."""

    if not path.evaluation.exists():
        return None

    from ..runs import QUICK, read_evaluation  # which loads h5py

    with suppress(UserError, OSError):
        if evaluation := read_evaluation(path):
            found = [row.get("crps") for row in evaluation.results.get("assim", {}).values()]
            numbers = [x for x in found if isinstance(x, int | float)]
            quick = evaluation.settings.get("steps") == QUICK.steps
            return (quick, statistics.mean(numbers)) if numbers else None

    return None


def conclude(
    title: str,
    target: int,
    records: Sequence[TrialRecord],
    runs: Path,
    importances: Mapping[str, tuple[float, float, float]],
    objective: str = "loss_valid",
) -> None:
    r"""Prints the leaderboard of a finished sweep, and the commands to try next."""

    leaderboard(title, records, runs, objective=objective)
    complete = sorted((r for r in average_seeds(records) if r.state == "complete"), key=rank_key)

    if not complete:
        say("No run is complete: run.json and error.txt in the run directories say why.")
        return

    if all(record.config.keys() == {"seed"} for record in complete):
        _conclude_repeats(complete, objective)
        return

    best = complete[0]
    path = RunPath(Path(best.source)) if best.source else RunPath.of_id(runs, best.run_id)
    values = " ".join(f"{key}={format_value(x)}" for key, x in best.config.items())
    say(f"\nBest configuration: {values}")

    if importances:
        texts = (f"{k} {x:.2f} ({a:.2f} to {b:.2f})" for k, (x, a, b) in importances.items())
        say(f"What mattered:      {', '.join(texts)}")
        say(f"                    PED-ANOVA over {len(complete)} complete runs, 90 % intervals")

    if path is None:
        say(f"Its directory, of run {best.run_id}, is gone.")
        return

    here = os.path.relpath(path.directory)
    code = f"from sda_ray import load_score; print(load_score({json.dumps(here)}))"
    say(f"Its weights:        {here}/state.pth\n")
    say("What next?")

    if not exhausted(records, target):
        more = 2 * max(target, count_trials(records))
        say(f"  sda-ray sweep {title} --trials {more}   # go on searching")

    say(f"  sda-ray confirm {title}   # other seeds: is the winner luck?")
    say(f"  sda-ray dashboard {title}   # curves")
    say(f"  python -c {shlex.quote(code)}")


def exhausted(records: Sequence[TrialRecord], target: int) -> bool:
    r"""Tells whether a sweep has ended with fewer runs than wanted, though few of them failed."""

    ended = all(record.state != "running" for record in records)
    own = [record for record in records if not (record.source or record.replica_of)]
    failed = sum(record.state == "failed" for record in own)

    return ended and count_trials(records) < target and failed <= Rules(target, 1).failures


def _conclude_repeats(complete: Sequence[TrialRecord], objective: str) -> None:
    r"""Prints what repeats that differ in the seed alone say together."""

    losses = [record.values[record.last] for record in complete]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    say(f"\n{objective} over {len(losses)} seeds: {statistics.mean(losses):.4f}{spread}")
    say("The number behind ± is the standard deviation over seeds.")


@command("attach")
@SWEEP
def attach_command(args: Args) -> None:
    r"""Shows the live view of a sweep that runs elsewhere.

    In the background, in a job, or on another machine that sees the directory of runs. Ctrl-C leaves
    the sweep running. When the sweep ends, its leaderboard is shown.

      sda-ray attach width
    """

    runs, name = args.runs, args.sweep
    read_sweep(runs, name)  # or there is none
    directory = sweep_directory(runs, name)
    file, journal = directory / "lease.json", directory / "study.journal"
    holder = read_holder(file)
    driven = holder is not None and holder["pid"] is not None
    alive = watch(file, holder) if holder is not None and driven else lambda: False

    try:
        while alive() and not (journal.exists() and journal.stat().st_size):
            time.sleep(LOOK)

        study = read_study(runs, name)

        if holder is not None and alive():
            say(
                f"sweep '{name}' is driven by process {holder['pid']} on {holder['host']}. Ctrl-C "
                f"leaves it running; `sda-ray stop {name}` stops it.",
            )
            _follow(runs, name, study, alive, seconds_held(holder))
        else:
            say(f"sweep '{name}' does not run. This is how it stands:")
    except KeyboardInterrupt:
        say(f"\nSweep '{name}' keeps running. Attach again with `sda-ray attach {name}`.")
        return

    show_end(runs, name, study)


def _follow(
    runs: Path, name: str, study: Study, alive: Callable[[], bool], seconds: float
) -> None:
    r"""Shows a sweep that has been running for some seconds, until it ends."""

    rules = recorded_rules(read_sweep(runs, name))
    table = LiveTable(name, rules, runs, study.records, study.objectives[0])
    table.start -= seconds

    if not table.full:
        say(table.state())

    with table:
        while True:
            table.rules = recorded_rules(read_sweep(runs, name))
            ended = not alive()
            table.look()

            if ended:
                return

            time.sleep(LOOK)


def seconds_held(holder: dict[str, Any]) -> float:
    r"""Returns for how long a lease has been held, as far as clocks agree."""

    try:
        since = datetime.fromisoformat(holder["since"])
        return max(0.0, (datetime.now(timezone.utc) - since).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def show_end(runs: Path, name: str, study: Study) -> None:
    r"""Prints the leaderboard, and the commands to try next."""

    records = study.records()
    sweep, objective = read_sweep(runs, name), study.objectives[0]
    target = sweep["trials"]
    unfinished = {record.index for record in records if record.state == "running"}
    unfinished |= {r.index for r in lacking_seeds(records, sweep["definition"]["seeds"])}
    under_way = len(unfinished)

    if "confirms" in sweep and records and not under_way:
        from .results import show_confirmation

        show_confirmation(runs, name)
        return

    if records and not under_way:
        conclude(name, target, records, runs, importances(records), objective)
        return

    leaderboard(name, records, runs, objective=objective)
    say(
        f"\n{count_trials(records)} of {target} trials so far, {under_way} not at their end: "
        f"`sda-ray sweep {name}` carries them on."
    )
