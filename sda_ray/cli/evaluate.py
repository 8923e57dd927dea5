r"""The command `sda-ray evaluate`: how well finished networks sample and assimilate."""

import csv
import functools
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.text import Text

from ..core import UserError, did_you_mean, make_console, make_table, printable, say, write_atomic
from ..data import TrajectoryDataset
from ..runs import (
    QUICK,
    QUICK_OBSERVATIONS,
    SAMPLES,
    EvaluationSettings,
    RunPath,
    Summary,
    as_json,
    draw_evaluation,
    entries,
    evaluate_runs,
    fitting,
    select,
    summarize,
    sweep_names,
)
from .options import ADDRESS, COUNT, JSON, RUNS_GIVEN, Args, command, option

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
TEX = {"chi2": r"$\chi^2$"}


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
        text = _as_csv(summaries) if file.suffix == ".csv" else _as_tex(rows)
        write_atomic(file, text.encode())

    if errors:
        raise UserError("\n".join(f"{name} is left out: {e}" for name, e in errors.items()))


def _paths(args: Args) -> tuple[list[RunPath], dict[str, str]]:
    r"""Returns the runs to evaluate, each once, and why others are none."""

    if bool(args.run) == bool(args.sweep):
        raise UserError("give the runs to evaluate, or --sweep NAME, and only one of them.")

    if args.top and not args.sweep:
        raise UserError("--top goes with --sweep NAME.")

    if args.sweep:
        finished = select(entries(args.runs), args.sweep, "finished")
        objective = finished[0].objective if finished else "loss_valid"
        best = select(finished, sort=objective)
        paths = [entry.path for entry in best[: args.top or 3]]

        if not paths:
            hint = did_you_mean(args.sweep, sweep_names(args.runs))
            raise UserError(f"no run of sweep '{args.sweep}' in {args.runs} is finished.{hint}")

        return paths, {}

    found: dict[RunPath, None] = {}
    errors: dict[str, str] = {}

    for run in args.run:
        try:
            found[RunPath.find(args.runs, run)] = None
        except UserError as error:
            errors[run] = str(error)

    return list(found), errors


def _observations(only: str | None, data: Path, quick: bool) -> list[str]:
    r"""Returns the observations named, each by its name or by that of a group, as `subsample`."""

    from ..assimilation import PANEL

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

    base = QUICK if args.quick else EvaluationSettings()
    count = len(TrajectoryDataset(args.data / "test.h5", window=1))
    base = replace(base, trajectories=min(base.trajectories, count))
    given = {key: x for key in asdict(base) if (x := getattr(args, key)) is not None}

    return replace(base, **given)


Rows = list[tuple[str, str, list[str]]]  # observation, run, and a text for each metric


def _rows(summaries: dict[str, Summary], observations: Sequence[str]) -> Rows:
    r"""Returns the table, by observation: the runs that compare are below one another."""

    rows = []

    for observation in observations:
        for run, summary in summaries.items():
            values = summary.get(observation, {})
            cells = [_cell(values.get(metric)) for metric in METRICS]

            if not any(cells):
                cells[[*METRICS].index("sample_std" if observation == SAMPLES else "crps")] = LOST

            rows.append((observation, run, cells))

    return rows


def _cell(interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""

    mean, low, high = interval
    text = f"{mean:.3g}"

    return text if low == high else f"{text} [{low:.3g}, {high:.3g}]"


def _show(rows: Rows, settings: EvaluationSettings) -> None:
    r"""Prints a table for observations, and one for samples, whose metrics are others."""

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


def _as_csv(summaries: dict[str, Summary]) -> str:
    with io.StringIO(newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("run", "observation", "metric", "mean", "low", "high"))

        for run, summary in summaries.items():
            for observation, values in summary.items():
                for metric, interval in values.items():
                    writer.writerow((run, observation, metric, *interval))

        return stream.getvalue()


def _as_tex(rows: Rows) -> str:
    r"""Returns the table for LaTeX. It needs no package."""

    titles = [TEX.get(metric, title) for metric, title in METRICS.items()]
    lines = [
        rf"\begin{{tabular}}{{ll{'r' * len(titles)}}}",
        _tex_row(["observation", "run", *titles]),
        r"\hline",
        *(_tex_row([observation, _tex(run), *cells]) for observation, run, cells in rows),
        r"\end{tabular}",
    ]

    return "\n".join(lines) + "\n"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(f"\\{c}" if c in "_&%$#{}" else c for c in printable(text))
