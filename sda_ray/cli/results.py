r"""The commands about what was found: `sda-ray report | evaluate | export | reproduce`.

The end of a confirmation is shown here, too.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import click
from rich.text import Text

from ..core import (
    Hold,
    LeaseLost,
    UserError,
    did_you_mean,
    load_config,
    make_console,
    make_table,
    printable,
    say,
    write_atomic,
)
from ..runs import RunPath, as_json, entries, select, sweep_directory, sweep_names
from ..sweep import Confirmation, read_confirmation
from .options import (
    ADDRESS,
    COUNT,
    JSON,
    RUN,
    RUNS_GIVEN,
    THREADS,
    Args,
    argument,
    command,
    option,
)
from .render import format_loss, short_settings

if TYPE_CHECKING:
    from ..runs import EvaluationSettings, Summary  # which loads h5py

# The columns of the table, with their titles
METRICS = {
    "crps": "CRPS",
    "rmse": "RMSE",
    "spread_skill": "spread/skill",
    "chi2": "χ²",
    "residual": "residual",
    "sample_std": "std",
    "sample_spectrum": "spectrum",
    "sample_divergence": "divergence",
}
LOST = "diverged"


@command("report")
@argument("sweeps", "SWEEP...", nargs=-1, required=True)
@option("--output", "Default: report.html in the directory of the sweep.", metavar="FILE.html")
@option("--open", "Open it in the browser.", bool)
def report_command(args: Args) -> None:
    r"""Writes the report of a sweep, or compares several: one HTML file that works offline.

    What was found, at what cost, and what is doubtful about it; history, learning curves,
    parallel coordinates, slices, importances, a timeline, samples, all runs and why each stopped.
    The file needs no network and can be mailed. A sweep that runs is shown as it stands; every
    finished one has its report already.

      sda-ray report width --open
      sda-ray report width depth --output both.html
    """

    file = Path(args.output).absolute() if args.output else None

    if file and (file.suffix not in (".html", ".htm") or not file.parent.is_dir()):
        raise UserError(
            f"--output is '{args.output}', but must end with .html, in a directory that exists."
        )

    path = _write(args.runs, args.sweeps, file)
    say(os.path.relpath(path))

    if args.open and not webbrowser.open(path.as_uri()):
        say("There is no browser here: copy the file to a machine that has one.")


def _write(
    runs: Path, names: Sequence[str], file: Path | None = None, hold: Hold = nullcontext
) -> Path:
    from ..report import write_report  # which loads optuna

    try:
        return write_report(runs, list(names), file, hold)
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}.") from error


def report_end(runs: Path, name: str, hold: Hold) -> str:
    r"""Writes the report of a sweep at its end, and returns where it is, or why there is none.

    No fault of a figure may make a sweep fail that has ended well. A driver whose sweep was taken
    over writes nothing.
    """

    try:
        return f"\nReport: {os.path.relpath(_write(runs, [name], hold=hold))}"
    except LeaseLost:
        return ""
    except UserError as error:
        return f"\nNo report: {error}"
    except Exception as error:
        return f"\nNo report: {type(error).__name__}: {error}"


@command("evaluate")
@RUNS_GIVEN
@option("--sweep", "The best runs of this sweep.", metavar="NAME")
@option("--top", "How many of --sweep. Default: 3.", COUNT)
@option("--quick", "A few members and observations of one trajectory, in few steps.", bool)
@option("--only", "Of the panel, or samples. Default: all.", metavar="NAME,…")
@option("--trajectories", "Of test.h5. Default: 8, or all there are.", COUNT)
@option("--members", "Of an ensemble. Default: 16.", click.IntRange(2))
@option("--steps", "Of the sampler. Default: those of the panel.", COUNT)
@option("--corrections", "Per step. Default: 1.", click.IntRange(0))
@option("--guidance", "Default: gaussian, SDA's.", ("gaussian", "dps", "mmps"))
@option("--seed", "Of all noise. Default: 0.", click.IntRange(0))
@option("--table", "Write the table there, too.", metavar="FILE.csv|FILE.tex")
@option("--workers", "Processes. Default: all CPUs, or GPUs.", COUNT)
@ADDRESS
@JSON
def evaluate_command(args: Args) -> None:
    r"""Evaluates finished runs on test.h5, which nothing else opens.

    Trajectories are observed in the ways of a fixed panel, and ensembles are drawn from the
    posterior; others are drawn without an observation. The numbers go into evaluation.json in each
    run's directory, and figures with their numbers into evaluation/. What is there is not computed
    again: the command may be killed and repeated. docs/skill.md explains the numbers.

      sda-ray evaluate --sweep width --top 5 --table skill.tex
      sda-ray evaluate crimson-cloud-4 --quick
      sda-ray evaluate crimson-cloud-4 golden-lake-7 --only assim,samples --members 32
    """

    from ..cluster import map_on_ray
    from ..runs import draw_evaluation, evaluate_runs, summarize

    paths, errors = _paths(args)
    settings = _settings(args)
    observations = _observations(args.only, args.data, args.quick)
    file = Path(args.table).absolute() if args.table else None

    if file and file.suffix not in (".csv", ".tex"):
        raise UserError(f"--table is '{args.table}', but must end with .csv or .tex.")

    map_tasks = functools.partial(map_on_ray, workers=args.workers, address=args.address, gpu=True)
    evaluations, failures = evaluate_runs(
        paths, args.data, settings, observations, map_tasks, draw_evaluation
    )
    errors |= {path.directory.name: error for path, error in failures.items()}
    summaries = {path.directory.name: summarize(x) for path, x in evaluations.items()}
    rows = _rows(summaries, observations)

    if args.json:
        found = {path.directory.name: x for path, x in evaluations.items()}
        print(as_json({"summary": summaries, "results": {k: x.results for k, x in found.items()}}))
    else:
        _show(rows, settings)

    if file:
        _write_table(file, summaries, rows)

    if errors:
        raise UserError("\n".join(f"{name} is left out: {e}" for name, e in errors.items()))


def _paths(args: Args) -> tuple[list[RunPath], dict[str, str]]:
    r"""Returns the runs to evaluate, each once, and why others are none."""

    if bool(args.run) == bool(args.sweep):
        raise UserError("give the runs to evaluate, or --sweep NAME, and only one of them.")

    if args.top and not args.sweep:
        raise UserError("--top goes with --sweep NAME.")

    if args.sweep:
        if not (best := _best(args.runs, args.sweep, args.top or 3)):
            hint = did_you_mean(args.sweep, sweep_names(args.runs))
            raise UserError(f"no run of sweep '{args.sweep}' in {args.runs} is finished.{hint}")

        return best, {}

    found: dict[RunPath, None] = {}
    errors: dict[str, str] = {}

    for run in args.run:
        try:
            found[RunPath.find(args.runs, run)] = None
        except UserError as error:
            errors[run] = str(error)

    return list(found), errors


def _best(runs: Path, sweep: str, limit: int) -> list[RunPath]:
    finished = select(entries(runs), sweep, "finished")
    objective = finished[0].objective if finished else "loss_valid"

    return [entry.path for entry in select(finished, sort=objective, limit=limit)]


def _observations(only: str | None, data: Path, quick: bool) -> list[str]:
    r"""Returns the observations named, each by its name or by that of a group, as `subsample`."""

    from ..assimilation import PANEL
    from ..runs import QUICK_OBSERVATIONS, SAMPLES, fitting

    known = [SAMPLES, *PANEL]

    if only is None:
        wanted = [name for name in known if not quick or name in QUICK_OBSERVATIONS]
        fit = [name for name in fitting(data) if name in wanted]

        if left := [name for name in wanted if name not in fit]:
            say(f"The trajectories in {data}/test.h5 are too small for {', '.join(left)}.")

        return fit

    words = [word.strip() for word in only.split(",")]
    chosen = []

    for word in words:
        named = [name for name in known if name == word or name.startswith(f"{word}-")]

        if not named:
            raise UserError(
                f"--only has '{word}', but knows {', '.join(known)}.{did_you_mean(word, known)}"
            )

        chosen += named

    return list(dict.fromkeys(chosen))


def _settings(args: Args) -> EvaluationSettings:
    r"""Returns the settings given, in place of those by default."""

    from ..data import TrajectoryDataset
    from ..runs import QUICK, EvaluationSettings

    base = QUICK if args.quick else EvaluationSettings()
    count = len(TrajectoryDataset(args.data / "test.h5", window=1))
    base = replace(base, trajectories=min(base.trajectories, count))
    given = {key: x for key in asdict(base) if (x := getattr(args, key)) is not None}

    return replace(base, **given)


Rows = list[tuple[str, str, list[str]]]  # observation, run, and a text for each metric


def _rows(summaries: dict[str, Summary], observations: Sequence[str]) -> Rows:
    r"""Returns the table, by observation: the runs that compare are below one another."""

    from ..runs import SAMPLES, format_interval

    rows = []

    for observation in observations:
        for run, summary in summaries.items():
            values = summary.get(observation, {})
            cells = [format_interval(values.get(metric)) for metric in METRICS]

            if not any(cells):
                cells[[*METRICS].index("sample_std" if observation == SAMPLES else "crps")] = LOST

            rows.append((observation, run, cells))

    return rows


def _show(rows: Rows, settings: EvaluationSettings) -> None:
    r"""Prints a table for observations, and one for samples, whose metrics are others."""

    from ..runs import SAMPLES

    console = make_console()

    for samples in (False, True):
        part = [row for row in rows if (row[0] == SAMPLES) == samples]
        used = [i for i in range(len(METRICS)) if any(row[2][i] for row in part)]

        if not part:
            continue

        titles = [list(METRICS.values())[i] for i in used]
        table = make_table("observation", "run", *titles, right=titles)

        for observation, run, cells in part:
            name = Text(printable(run.rpartition("_")[0]))
            table.add_row(observation, name, *(cells[i] for i in used))

        console.print(table, "")

    many = settings.trajectories > 1
    about = f"{settings.trajectories} trajectories" if many else "one trajectory"
    intervals = ", with 95 % intervals over them" if many else ""
    say(f"Means over {about}{intervals}; {settings.members} members each. See docs/skill.md.")


def _write_table(file: Path, summaries: dict[str, Summary], rows: Rows) -> None:
    r"""Writes all numbers as CSV, or the table for LaTeX with its package `booktabs`."""

    import pandas as pd

    if file.suffix == ".csv":
        lines = [
            (run, observation, metric, *interval)
            for run, summary in summaries.items()
            for observation, values in summary.items()
            for metric, interval in values.items()
        ]
        columns = ["run", "observation", "metric", "mean", "low", "high"]
        text = pd.DataFrame(lines, columns=columns).to_csv(index=False)
    else:
        cells = [(observation, printable(run), *texts) for observation, run, texts in rows]
        columns = ["observation", "run", *METRICS.values()]
        table = pd.DataFrame(cells, columns=columns).to_latex(
            index=False, escape=True, column_format="ll" + "r" * len(METRICS)
        )
        text = table.replace("χ²", r"$\chi^2$")

    write_atomic(file, text.encode())


@command("export")
@RUN
@click.argument("directory", metavar="DIR")
def export_command(args: Args) -> None:
    r"""Writes a finished run into DIR, to be shared: a directory that is new or empty.

    It holds config.json and state.pth, as in the run; model.safetensors, the same weights;
    README.md, a model card with metrics, settings and provenance; samples, the learning curve and
    figures of an evaluation. `load_sde("DIR")` loads it. It has no path, host, user or account.

      sda-ray export crimson-cloud-4 crimson
      sda-ray export 6k7cjnx7 ~/networks/crimson
    """

    from ..runs import export_run

    path, target = _find(args), Path(args.directory).expanduser()
    export_run(path, target)
    say(f"{printable(path.directory.name)} is in {target}. Its README.md says how to load it.")


@command("reproduce")
@RUN
@option("--epochs", "How many, from the first. Default: 1.", COUNT, default=1)
@option("--device", "cpu, cuda, … Default: cpu if the run was on one of this kind, else as train.")
@option("--threads", "CPU threads. Default: those of the run.", THREADS)
def reproduce_command(args: Args) -> None:
    r"""Trains the first epochs of a run again and says whether their losses have the same bits.

    It trains in a temporary directory, without W&B, and leaves the run as it is. If the bits
    differ, it says by how much, and which of versions, code, device and threads do; the exit code is
    1. Data other than those of the run are refused.

      sda-ray reproduce crimson-cloud-4
      sda-ray reproduce crimson-cloud-4 --epochs 8 --data /scratch/kolmogorov
    """

    import torch

    from ..data import check_data
    from ..runs import OutOfMemory, cpu_model, default_device, first_attempt, reproduce_run
    from .session import check_device

    path = _find(args)
    name, first = printable(path.directory.name), first_attempt(path)
    info = check_data(args.data)
    config = load_config(path.config, info.size, info.length)
    device = "cpu" if first.get("device") == cpu_model() else default_device()
    device = check_device(args.device or device, config)
    threads = THREADS.convert(args.threads or first.get("threads") or 1, None, None)
    torch.set_num_threads(threads)
    epochs = f"{args.epochs} epoch{'s' * (args.epochs > 1)}"
    say(f"{name}: {epochs} on {device}, threads: {threads}")

    try:
        fault, causes = reproduce_run(path, config, args.data, args.epochs, device)
    except OutOfMemory as error:
        say(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say("Interrupted. Nothing was compared, and nothing is left.")
        sys.exit(130)

    say(f"{name}: {fault or f'the same bits over {epochs}'}.")

    for cause in causes:
        say(cause)

    if fault and not causes:
        say("Versions, code, device and threads are those of the run.")

    sys.exit(1 if fault else 0)


def _find(args: Args) -> RunPath:
    r"""Finds a run. For the name of a sweep, an error names its best one."""

    try:
        return RunPath.find(args.runs, args.run)
    except UserError:
        if not sweep_directory(args.runs, args.run).is_dir():
            raise

    best = [shlex.quote(path.directory.name) for path in _best(args.runs, args.run, 1)]
    hint = f"Its best run is {best[0]}." if best else "None of its runs is finished."

    raise UserError(f"'{args.run}' is a sweep, but `sda-ray {args.command}` takes a run. {hint}")


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

    for line in _sentences(found, name):
        console.print(line)

    own = shlex.join(printable(names.get(id, id)) for id in best.runs)
    sweep, other = shlex.quote(found.sweep), "" if name == f"{found.sweep}-confirm" else name
    words = f"{sweep} --name {shlex.quote(other)}" if other else sweep
    say(f"\nUse the configuration of {printable(names.get(best.run, best.run))}. What next?")

    if own:
        say(f"  sda-ray evaluate {own}   # its networks, one for each seed")

    say(f"  sda-ray confirm {words} --seeds {2 * len(found.seeds)}   # smaller errors")


def _sentences(found: Confirmation, name: str) -> Iterator[str]:
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
        yield (
            f"! {lacking} runs are missing: they failed, were stopped, or have not begun. To train "
            f"failed and remaining ones: sda-ray sweep {shlex.quote(name)} --retry-failed"
        )


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
