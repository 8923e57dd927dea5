r"""The commands about runs: `sda-ray runs list | show | compare | prune` and `sda-ray sync`."""

import sys
from collections.abc import Sized
from dataclasses import replace
from pathlib import Path

import click

from ..core import (
    CONFIG,
    UserError,
    check_value,
    did_you_mean,
    format_size,
    make_console,
    make_table,
    parse_overrides,
    printable,
)
from ..runs import (
    SORTS,
    Entry,
    RunPath,
    as_json,
    changed_settings,
    compare,
    entries,
    in_full,
    prune_run,
    read_entry,
    refusal,
    resumable,
    row,
    select,
    source,
    sweep_names,
    sync_runs,
)
from .options import (
    COUNT,
    JSON,
    RUN,
    RUNS_GIVEN,
    SETTINGS,
    Actions,
    Args,
    argument,
    command,
    option,
    sda_ray,
)
from .render import comparison, listing, portrait

STATUSES = (
    *("running", "paused", "interrupted", "stopped", "finished", "diverged", "failed"),
    *("adopted", "damaged", "unknown"),
)


@sda_ray.group("runs", cls=Actions)
def runs() -> None:
    r"""Lists, shows, compares and prunes run directories.

    RUN is a path, a name, an id or an unambiguous beginning of one. Without an action, the runs are
    listed: `sda-ray runs window=5 --sort loss_valid`.
    """


@command("list", group=runs)
@SETTINGS
@option("--sweep", "Only of this sweep.", metavar="NAME")
@option("--status", "Only of this status.", STATUSES)
@option(
    "--sort",
    "age, name, status, epoch, loss_valid, denoising, skill, sweep, size or a setting. Default: age.",
    metavar="KEY",
    default="age",
)
@option("--limit", "At most N.", COUNT)
@JSON
def list_command(args: Args) -> None:
    r"""Lists runs, the newest first. KEY=VALUE keeps the runs whose config has this value.

    A run that says it is running while no process trains it is `interrupted`; `damaged` is one
    whose files cannot be read, and `sda-ray runs show RUN` says why. With --runs s3://BUCKET/PREFIX,
    settings, metrics and records are fetched first; weights stay in the bucket.

      sda-ray runs --sweep width --sort loss_valid --limit 10
    """

    if args.sort not in (*SORTS, *CONFIG):
        known = f"{', '.join(SORTS)} or a key of CONFIG"
        hint = did_you_mean(args.sort, (*SORTS, *CONFIG))
        raise UserError(f"--sort is '{args.sort}', but must be {known}.{hint}")

    if misplaced := [word for word in args.settings if "=" not in word]:
        raise UserError(
            f"'{misplaced[0]}' is neither an action (list, show, compare, prune) nor of the form "
            f"key=value. To see a run: sda-ray runs show {misplaced[0]}"
        )

    settings = {key: check_value(key, x) for key, x in parse_overrides(args.settings).items()}
    every = [replace(entry, record={}) for entry in entries(args.runs)]  # it is not shown
    chosen = select(every, args.sweep, args.status, settings, args.sort, args.limit)

    if args.json:
        print(as_json([row(entry) for entry in chosen]))
    elif chosen:
        total = format_size(sum(entry.size or 0 for entry in chosen))
        make_console().print(listing(chosen), f"\n{len(chosen)} of {len(every)} runs, {total}")
    elif every:
        hint = did_you_mean(args.sweep, sweep_names(args.runs)) if args.sweep else ""
        print(f"None of {len(every)} runs is like this.{hint}")
    else:
        print(f"There are no runs in {args.runs} yet. `sda-ray train` makes one.")


def _find(args: Args, run: str) -> Entry:
    directory = Path(run)  # a damaged run has no config.json to know its path by
    known = directory.is_dir() and directory.absolute().parent == args.runs
    entry = read_entry(RunPath.find(args.runs, directory.absolute().name if known else run))

    if entry is None:
        raise UserError(f"there is no run '{run}' in {args.runs}: its directory is empty.")

    return entry


@command("show", group=runs)
@RUN
@JSON
def show_command(args: Args) -> None:
    r"""Shows one run: its config, its curve, and where it came from."""

    entry, lines = in_full(_find(args, args.run))
    labels = source(entry, args.runs) | _evaluated(entry.path)

    if args.json:
        differs = changed_settings(entry.config or {})
        more = {"origin": labels, "differs": differs, "record": entry.record, "metrics": lines}
        print(as_json(row(entry) | more))
    else:
        console = make_console()
        console.print(portrait(entry, lines, labels, console.width))


def _evaluated(path: RunPath) -> dict[str, str]:
    r"""Returns how a run was evaluated, by label, if it was."""

    from ..runs import read_evaluation  # which loads h5py

    try:
        evaluation = read_evaluation(path)
    except UserError as error:
        return {"evaluation": str(error)}

    if evaluation is None:
        return {}

    most = max(map(len, evaluation.results.values()), default=0)
    names = ", ".join(evaluation.results) or "nothing yet"

    return {"evaluation": f"{names} of up to {most} trajectories, in {path.evaluation.name}"}


@command("compare", group=runs)
@RUN
@argument("others", "RUN...", nargs=-1, required=True)
@JSON
def compare_command(args: Args) -> None:
    r"""Compares runs: the settings that differ, beside their metrics."""

    full = [in_full(_find(args, run)) for run in (args.run, *args.others)]
    chosen = [entry for entry, _ in full]

    if len({entry.path.directory for entry in chosen}) < len(chosen):
        raise UserError("the same run is given twice. Give different runs.")

    found = compare(chosen, [lines for _, lines in full])

    if args.json:
        print(as_json({"runs": [row(entry) for entry in chosen], **found}))
    else:
        make_console().print(comparison(chosen, found))


@command("prune", group=runs)
@RUNS_GIVEN
@option("--yes", "Do it without asking.", bool)
@JSON
def prune_command(args: Args) -> None:
    r"""Deletes checkpoint.pth and checkpoint.prev.pth of finished runs, all or those given.

    What would be freed is shown first; then you are asked, on a terminal, or --yes is needed.
    Weights, config, metrics and records stay, but a pruned run cannot be extended to more epochs. A
    run that a process holds is never touched.
    """

    paths, spared = _prunable(args)
    files = {path.directory.name: found for path, found in paths.items()}
    total = sum(sum(found.values()) for found in files.values())
    freed: dict[str, int] = {}
    errors: dict[str, str] = {}

    if not args.json:
        _show_prunable(files, spared)
        print(f"Resumable state of {_runs(files)} that finished: {format_size(total)}.")

    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not args.json

    if files and (args.yes or (terminal and click.confirm("Remove it?"))):
        for path in paths:
            try:
                freed[path.directory.name] = prune_run(path)
            except UserError as error:
                errors[path.directory.name] = str(error)

    if args.json:
        result = {
            "runs": {name: {f.name: n for f, n in found.items()} for name, found in files.items()},
            "size": total,
            "spared": spared,
            "errors": errors,
            "freed": sum(freed.values()),
        }
        print(as_json(result))
    elif freed:
        print(f"Freed {format_size(sum(freed.values()))} in {_runs(freed)}.")
    elif files and not errors:
        print("Nothing was removed." + ("" if args.yes else " Give --yes to do it."))

    if errors:
        raise UserError("\n".join(errors.values()))


def _runs(found: Sized) -> str:
    return "1 run" if len(found) == 1 else f"{len(found)} runs"


def _prunable(args: Args) -> tuple[dict[RunPath, dict[Path, int]], dict[str, str]]:
    r"""Returns the resumable state that may go, by run, and why that of other runs must stay."""

    chosen = [_find(args, run) for run in args.run] if args.run else list(entries(args.runs))
    reasons = {entry.path.directory.name: refusal(entry) for entry in chosen}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}

    if args.run and refused:
        raise UserError("\n".join(f"{name} stays: {reason}" for name, reason in refused.items()))

    finished = {e.path.directory.name: e for e in chosen if e.record.get("status") == "finished"}
    spared = {name: reason for name, reason in refused.items() if name in finished}
    paths = {e.path: resumable(e.path) for name, e in finished.items() if name not in refused}

    return {path: files for path, files in paths.items() if files}, spared


def _show_prunable(files: dict[str, dict[Path, int]], spared: dict[str, str]) -> None:
    console = make_console()
    table = make_table("run", "resumable state", "size", right=("size",))

    for name, reason in spared.items():
        console.print(printable(f"{name} stays: {reason}", 500))

    for name, sizes in files.items():
        names = " ".join(file.name for file in sizes)
        table.add_row(printable(name), names, format_size(sum(sizes.values())))

    if files:
        console.print(table)


@command("sync")
@RUNS_GIVEN
@option("--all", "All runs that have ended, and the paused ones of sweeps that do not run.", bool)
@option("--sweep", "All runs of this sweep.", metavar="NAME")
def sync_command(args: Args) -> None:
    r"""Uploads runs that were trained offline, or without reaching the server, to W&B.

    RUN is a path, a name, an id or an unambiguous beginning of one. Each run keeps its name, id, group
    and steps. Rows that are on the server are not sent again; a run in use is left out. The server
    and the account are those of `wandb login`, or of WANDB_BASE_URL and WANDB_API_KEY.

      sda-ray sync --all
      sda-ray sync --sweep width
    """

    if bool(args.all) + bool(args.run) + bool(args.sweep) != 1:
        raise UserError(
            "give the runs to upload, or --all for those that have ended, or --sweep NAME, and "
            "only one of them."
        )

    sync_runs(args.runs, args.run, args.sweep)
