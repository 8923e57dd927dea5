r"""The command `sda-ray runs`: list, show, compare and prune run directories.

Parsing is kept apart from reading, which needs torch: `sda-ray --help` stays quick.
"""

import sys
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import CONFIG, UserError, check_value, did_you_mean, parse_overrides
from .arguments import Args

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..runs import Entry, RunPath

__all__ = ["compare_command", "list_command", "prune_command", "show_command"]


def _console() -> "Console":
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False
    )


def _print(*parts: "RenderableType") -> None:
    console = _console()

    for part in parts:
        console.print(part)


def list_command(args: Args) -> None:
    r"""Lists runs."""

    from ..core import format_size
    from ..runs import SORTS, as_json, entries, row, select
    from .render import listing

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, but must be at least 1.")

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
    every = list(entries(args.runs))
    chosen = select(every, args.sweep, args.status, settings, args.sort, args.limit)

    if args.json:
        print(as_json([row(entry) for entry in chosen]))
    elif chosen:
        total = format_size(sum(entry.size or 0 for entry in chosen))
        _print(listing(chosen), f"\n{len(chosen)} of {len(every)} runs, {total}")
    elif every:
        print(f"None of {len(every)} runs is like this.")
    else:
        print(f"There are no runs in {args.runs} yet. `sda-ray train` makes one.")


def _find(args: Args, run: str) -> "Entry":
    from ..runs import RunPath, read_entry

    directory = Path(run)  # a damaged run has no config.json to know its path by
    known = directory.is_dir() and directory.absolute().parent == args.runs
    entry = read_entry(RunPath.find(args.runs, directory.absolute().name if known else run))

    if entry is None:
        raise UserError(f"there is no run '{run}' in {args.runs}: its directory is empty.")

    return entry


def show_command(args: Args) -> None:
    r"""Shows one run."""

    from ..runs import as_json, changed_settings, in_full, row, source
    from .render import portrait

    entry, lines = in_full(_find(args, args.run))
    labels = source(entry, args.runs)

    if args.json:
        differs = changed_settings(entry.config or {})
        more = {"origin": labels, "differs": differs, "record": entry.record, "metrics": lines}
        print(as_json(row(entry) | more))
    else:
        _print(portrait(entry, lines, labels, _console().width))


def compare_command(args: Args) -> None:
    r"""Compares runs."""

    from ..runs import as_json, compare, in_full, row
    from .render import comparison

    full = [in_full(_find(args, run)) for run in (args.run, *args.others)]
    entries, lines = [entry for entry, _ in full], [x for _, x in full]

    if len({entry.path.directory for entry in entries}) < len(entries):
        raise UserError("the same run is given twice. Give different runs.")

    found = compare(entries, lines)

    if args.json:
        print(as_json({"runs": [row(entry) for entry in entries], **found}))
    else:
        _print(comparison(entries, found))


def prune_command(args: Args) -> None:
    r"""Shows what pruning would free, and does it if that is agreed."""

    from ..core import format_size, printable
    from ..runs import as_json, prune_run
    from .render import savings

    paths, spared = _prunable(args)
    files = {path.directory.name: found for path, found in paths.items()}
    total = sum(sum(found.values()) for found in files.values())
    done: dict[str, int] = {}

    if not args.json:
        _print(*(printable(f"{name} stays: {reason}", 500) for name, reason in spared.items()))
        _print(savings(files)) if files else None
        print(f"Resumable state of {_runs(files)} that finished: {format_size(total)}.")

    errors: dict[str, str] = {}

    if files and (args.yes or (not args.json and _agreed())):
        for path in paths:
            try:
                done[path.directory.name] = prune_run(path)
            except UserError as error:
                errors[path.directory.name] = str(error)

    if args.json:
        rows = {name: {file.name: n for file, n in found.items()} for name, found in files.items()}
        freed = sum(done.values())
        print(
            as_json(
                {"runs": rows, "size": total, "spared": spared, "errors": errors, "freed": freed}
            )
        )
    elif done:
        print(f"Freed {format_size(sum(done.values()))} in {_runs(done)}.")
    elif files and not errors:
        print("Nothing was removed." + ("" if args.yes else " Give --yes to do it."))

    if errors:
        raise UserError("\n".join(errors.values()))


def _runs(found: Sized) -> str:
    return "1 run" if len(found) == 1 else f"{len(found)} runs"


def _prunable(
    args: Args,
) -> tuple[dict["RunPath", dict[Path, int]], dict[str, str]]:
    r"""Returns the resumable state that may go, by run, and why that of other runs must stay."""

    from ..runs import entries, refusal, resumable

    chosen = [_find(args, run) for run in args.run] if args.run else list(entries(args.runs))
    reasons = {entry.path.directory.name: refusal(entry) for entry in chosen}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}

    if args.run and refused:
        raise UserError("\n".join(f"{name} stays: {reason}" for name, reason in refused.items()))

    finished = {e.path.directory.name: e for e in chosen if e.record.get("status") == "finished"}
    spared = {name: reason for name, reason in refused.items() if name in finished}
    paths = {e.path: resumable(e.path) for name, e in finished.items() if name not in refused}

    return {path: files for path, files in paths.items() if files}, spared


def _agreed() -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False

    try:
        return input("Remove it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
