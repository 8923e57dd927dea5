r"""The commands about sweeps as they stand: `sda-ray sweeps | status | best | dashboard`.

They read the study and the run directories, beside a driver or without one, and write nothing there.
Names and texts come from files: they are shown as plain text.
"""

import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core import (
    STALE,
    LeaseLost,
    UserError,
    format_duration,
    format_value,
    holder_alive,
    last_heartbeat,
    load_config,
    make_console,
    make_table,
    printable,
    read_holder,
    say,
)
from ..runs import RunPath, as_json, cost_of, sweep_directory, sweep_names
from .options import COUNT, JSON, SWEEP, Args, argument, command, option
from .render import STYLES, format_loss

if TYPE_CHECKING:
    from ..search import TrialRecord  # which loads optuna
    from .live import LiveTable

Row = dict[str, Any]  # a sweep or a run, as programs get it

LOOK = 2.0  # seconds between two looks at the files of a sweep
PAUSE = 60.0  # seconds between two blocks of `--watch` where no terminal is
FEW = 5  # failures that are shown
MANY = 20  # runs in progress that are shown


def _read(runs: Path, name: str) -> tuple[Row, list["TrialRecord"], Row]:
    r"""Returns what the study of a sweep says about it, its runs from best to worst, and its record.

    Raises:
        UserError: If there is no such sweep, or it is damaged.
    """

    from ..search import Study, count_trials, lacking_seeds, ranked
    from ..sweep import read_sweep
    from .table import exhausted

    sweep, directory = read_sweep(runs, name), sweep_directory(runs, name)
    objectives, target = sweep["definition"]["objectives"], sweep["trials"]
    driver, records = _driver(directory), list["TrialRecord"]()

    with suppress(LeaseLost):  # there is no study yet
        records = Study(directory / "study.journal", name, None, objectives).records()

    running = driver is not None and driver["alive"]
    closed = bool(records) and all(r.state != "running" for r in records)
    closed = closed and not any(lacking_seeds(records, sweep["definition"]["seeds"]))
    domains = [x for record in records for x in record.trial.distributions.values()]
    endless = any(getattr(domain, "step", 1) is None for domain in domains)  # a range of floats
    ended = count_trials(records) >= target or (exhausted(records, target) and not endless)
    own = [record for record in records if not record.source]
    statuses = [r.status if running or r.status != "running" else "interrupted" for r in own]
    records = ranked(records)
    complete = [record for record in records if _is_complete(record)]
    row = {
        "name": name,
        "state": "running" if running else "finished" if closed and ended else "stopped",
        "trials": count_trials(records),
        "target": target,
        "runs": Counter(status for status in STYLES for _ in range(statuses.count(status))),
        "objectives": objectives,
        "best": complete[0].value if complete else None,
        "epochs": sum(record.last for record in own),
        "age": _age(directory),
        "driver": driver,
    }

    return row, records, sweep


def _is_complete(record: "TrialRecord") -> bool:
    r"""Tells whether a configuration is complete, by its first run."""

    return record.state == "complete" and not record.replica_of


def _age(directory: Path) -> float:
    changes = [0.0]

    for name in ("study.journal", "sweep.json"):
        with suppress(OSError):
            changes.append((directory / name).stat().st_mtime)

    return max(0.0, time.time() - max(changes))


def _driver(directory: Path) -> Row | None:
    r"""Returns the driver of a sweep, unless it has ended gracefully, and whether it is alive.

    From another host the age of its heartbeat decides, by the clocks of both.
    """

    holder = read_holder(file := directory / "lease.json")

    if holder is None or holder["pid"] is None:
        return None

    if (alive := holder_alive(holder)) is None:
        alive = time.time() - last_heartbeat(file) / 1e9 < STALE

    from .table import seconds_held

    driver = {key: holder[key] for key in ("host", "pid", "since")}

    return driver | {"alive": alive, "seconds": seconds_held(holder)}


def _list(runs: Path) -> list[Row]:
    r"""Returns all sweeps, the last changed one first. Damaged ones have a fault."""

    rows: list[Row] = []

    for name in sweep_names(runs):
        try:
            rows.append(_read(runs, name)[0])
        except (UserError, OSError) as error:
            directory = sweep_directory(runs, name)
            row = {"age": _age(directory), "driver": _driver(directory), "fault": str(error)}
            rows.append({"name": name, "state": "damaged"} | row)

    return sorted(rows, key=lambda row: row["age"])


@command("sweeps")
@JSON
def sweeps_command(args: Args) -> None:
    r"""Lists all sweeps, the last changed one first: state, runs, best run, epochs trained, driver.

    A sweep is `running` if it has a driver, `stopped` if it can be resumed, `finished` if nothing is
    left to train, and `damaged` if its files cannot be read.

      sda-ray sweeps
      sda-ray sweeps --json | jq -r '.[] | select(.state == "running").name'
    """

    rows = _list(args.runs)

    if args.json:
        print(as_json(rows))
    elif rows:
        cells = [_cells(row) for row in rows]
        right = ("trials", "complete", "failed", "best", "epochs", "age")
        table = make_table(*cells[0], right=right, fold=("sweep", "driver"))

        for texts in cells:
            table.add_row(*(Text(printable(x), STYLES.get(x, "")) for x in texts.values()))

        faults = (printable(row["fault"], 400) for row in rows if "fault" in row)
        make_console().print(table, *faults, sep="\n")
    else:
        say(f"There are no sweeps in {args.runs} yet. `sda-ray sweep SCRIPT` starts one.")


def _cells(row: Row) -> dict[str, str]:
    sound, driver, counts = "fault" not in row, row["driver"], row.get("runs", Counter())
    objective = row["objectives"][0] if sound and row["objectives"][0] != "loss_valid" else ""

    return {
        "sweep": row["name"],
        "state": row["state"],
        "trials": f"{row['trials']}/{row['target']}" if sound else "–",
        "complete": str(counts["complete"]),
        "failed": str(counts["failed"] + counts["diverged"]),
        "best": f"{objective} {format_loss(row.get('best'))}".strip(),
        "epochs": f"{row['epochs']:,}" if sound else "–",
        "age": format_duration(row["age"]),
        "driver": f"{driver['host']}:{driver['pid']}" if driver and driver["alive"] else "–",
    }


@command("status")
@argument("sweep", "[SWEEP]", required=False)
@option("--watch", "Show it anew every 2 s, until the sweep ends or Ctrl-C.", bool)
@JSON
def status_command(args: Args) -> None:
    r"""Shows a sweep as it stands: progress, best run, cost, failures, and runs in progress.

    Without SWEEP it shows those that run, else the last changed one. Epochs are compared with those
    that the sweep is expected to take, and with all of all trials. Where no terminal is, --watch
    prints every 60 s.

      sda-ray status
      sda-ray status width --watch
    """

    from rich.live import Live

    if args.watch and args.json:
        raise UserError("--watch is for people, and goes without --json.")

    rows = [] if args.sweep else _list(args.runs)
    running = [row["name"] for row in rows if row["state"] == "running"]
    names = [args.sweep] if args.sweep else running or [row["name"] for row in rows[:1]]

    if not names and not args.json:
        say(f"There are no sweeps in {args.runs} yet. `sda-ray sweep SCRIPT` starts one.")
        return

    console = make_console()
    live = (
        Live(console=console, auto_refresh=False) if console.is_terminal and args.watch else None
    )

    with suppress(KeyboardInterrupt), live or nullcontext():
        while True:
            found = [_details(args.runs, name) for name in names]
            rows = [row for row, _ in found]
            blocks = [_block(row, table, console.width) for row, table in found]

            if args.json:
                print(as_json(rows[0] if args.sweep else rows))
            elif live:
                live.update(Group(*blocks), refresh=True)
            else:
                console.print(*blocks)

            if not args.watch or all(row["state"] != "running" for row in rows):
                return

            time.sleep(LOOK if live else PAUSE)


def _details(runs: Path, name: str) -> tuple[Row, "LiveTable"]:
    r"""Returns a sweep with its best run, its cost, its failures and its runs in progress."""

    from ..plan import expect
    from ..sweep import recorded_rules
    from .live import LiveTable

    row, records, sweep = _read(runs, name)
    rules, paths = recorded_rules(sweep), {path.id: path for path in RunPath.all(runs)}
    own = [record for record in records if not record.source]
    seconds = sum(cost_of(paths.get(record.run_id), record.last).seconds for record in own)
    busy = row["runs"]["running"]
    expected, deviation, most = expect(rules, records, busy or 1)
    left = expected - row["epochs"]
    pace = busy * row["epochs"] / seconds if seconds else 0.0  # epochs a second

    table = LiveTable(name, rules, runs, lambda: records, row["objectives"][0])
    table.paths = paths
    going = [r for r in own if r.status == "running" and row["state"] == "running"]
    details = {
        "best": next((_run(r, paths) for r in records if _is_complete(r)), None),
        "expected": expected,
        "deviation": deviation,
        "most": most,
        "seconds": seconds,
        "saved": sum(record.epochs - record.last for record in own if record.paused),
        "failures": [_run(r, paths) for r in own if r.state in ("failed", "diverged")],
        "left": left / pace if left > 0 and pace > 0 else None,
        "left_deviation": deviation / pace if pace > 0 else None,
        "running": [_run(r, paths) | {"until": r.until} | table.details(r) for r in going],
    }

    return row | details, table


def _run(record: "TrialRecord", paths: Mapping[str, RunPath]) -> Row:
    path, ended = paths.get(record.run_id), record.trial.datetime_complete

    return {
        "index": record.index,
        "run": path.directory.name if path else record.run_id,
        "state": record.state,
        "epochs": record.last,
        "value": record.value,
        "finals": record.finals,
        "config": record.config,
        "age": time.time() - ended.timestamp() if ended else None,  # since its end
        "error": record.error,
    }


def _block(row: Row, table: "LiveTable", width: int) -> RenderableType:
    r"""Returns the details of a sweep for a terminal."""

    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")

    for label, text in (("state", _state(row)), *_lines(row)):
        grid.add_row(f"  {label}", Text(printable(text, 1000), STYLES.get(label, "")))

    indices = [run["index"] for run in row["running"][:MANY]]
    going = [record for record in table.now if record.index in indices]
    parts = [Text(), *table.rows(going, width)] if going else []

    return Group(Text(printable(f"sweep {row['name']}"), "bold"), grid, *parts)


def _state(row: Row) -> str:
    driver, age = row["driver"], format_duration(row["age"])
    process = driver and f"process {driver['pid']} on {driver['host']}"

    if row["state"] == "running":
        return f"running for {format_duration(driver['seconds'])}, driven by {process}"

    if row["state"] == "finished":
        return f"finished {age} ago"

    died = f"; its driver, {process}, died" if driver else ""

    return f"stopped {age} ago{died}. To resume: sda-ray sweep {shlex.quote(row['name'])}"


def _lines(row: Row) -> Iterator[tuple[str, str]]:
    r"""Yields labels and texts about a sweep."""

    saved = f"; pausing saved {row['saved']:,} epochs" if row["saved"] else ""
    running = row["state"] != "finished" and row["expected"] < row["most"]
    forecast = f" of about {row['expected']:,} ± {row['deviation']:,.0f}" if running else ""
    counts = ", ".join(f"{n} {status}" for status, n in row["runs"].items())
    yield "runs", f"{row['trials']}/{row['target']}: {counts or 'none has started'}"
    yield "epochs", f"{row['epochs']:,}{forecast}; {row['most']:,} if all runs train to the end"

    if best := row["best"]:
        value = f"{row['objectives'][0]} {format_loss(best['value'])}"
        yield "best", f"{value}, {best['run']}, found {format_duration(best['age'])} ago"
        yield "", _settings(best["config"])
    else:
        yield "best", "no run is complete yet"

    yield "training", f"{format_duration(row['seconds'])}{saved}"

    for run in row["failures"][:FEW]:
        reason = next(iter(run["error"].splitlines()), "no reason is recorded")
        yield run["state"], f"{run['run']}: {reason}"

    if (more := len(row["failures"]) - FEW) > 0:
        yield "", f"and {more} more"

    if row["left"] is not None:
        off = f" ± {format_duration(row['left_deviation'])}" if row["deviation"] else ""
        yield "time left", f"about {format_duration(row['left'])}{off}"


def _settings(config: Mapping[str, Any]) -> str:
    texts = {k: f"{x:.4g}" if isinstance(x, float) else format_value(x) for k, x in config.items()}

    return " ".join(f"{key}={text}" for key, text in texts.items())


@command("best")
@SWEEP
@option("--top", "How many runs. Default: 1.", COUNT, default=1)
@option("--config", "Print config.json of the best run alone.", bool)
@JSON
def best_command(args: Args) -> None:
    r"""Shows the best complete runs of a sweep: objective, standard error, and settings that vary.

    The numbers are those of the study, in full with --json. Of several objectives, the first decides.

      sda-ray best width --top 5
      sda-ray best width --config > best.json && sda-ray train --config best.json epochs=512
    """

    from .table import judgement, leaderboard

    row, records, _ = _read(args.runs, args.sweep)
    best = [record for record in records if _is_complete(record)][: args.top]
    paths, objective = {path.id: path for path in RunPath.all(args.runs)}, row["objectives"][0]

    if not best:
        raise UserError(
            f"sweep '{args.sweep}' has no complete run yet. Its runs: sda-ray status {args.sweep}"
        )

    if (path := paths.get(best[0].run_id)) is None:
        raise UserError(f"the directory of run {best[0].index} ({best[0].run_id}) is gone.")

    if args.config:
        print(as_json(load_config(path.config)))
    elif args.json:
        lines = [judgement(paths[r.run_id], objective) if r.run_id in paths else {} for r in best]
        errors = [r.error_over_seeds for r in best]
        single = [line.get(f"{objective}_se") for line in lines]
        rows = [
            _run(r, paths) | {"se": one if se is None else se, "seeds": r.seeds}
            for r, se, one in zip(best, errors, single, strict=True)
        ]
        print(as_json(rows))
    else:
        leaderboard(args.sweep, records, args.runs, len(best), objective)
        run, sweep = shlex.quote(printable(path.directory.name)), shlex.quote(args.sweep)
        say(f"\n  sda-ray confirm {sweep}   # other seeds: is the winner luck?")
        say(f"  sda-ray train --config {run} --replicas 3   # this run alone, with other seeds")
        say(f"  sda-ray evaluate {run}   # how well it samples and assimilates")


@command("dashboard")
@SWEEP
@option("--port", "Default: 8080, or a free one.", click.IntRange(1, 65535))
def dashboard_command(args: Args) -> None:
    r"""Opens Optuna's dashboard on a sweep, on this machine alone, until Ctrl-C.

    The dashboard shows a copy of the study that follows it every 2 s, so the sweep may run, and what
    you write in the dashboard ends with it. All users of this machine can see it.

      sda-ray dashboard width
      ssh -L 8080:localhost:8080 HOST sda-ray dashboard width --port 8080   from another machine
    """

    from optuna_dashboard import wsgi

    _read(args.runs, args.sweep)
    journal = sweep_directory(args.runs, args.sweep) / "study.journal"

    with suppress(KeyboardInterrupt), TemporaryDirectory(prefix="sda-ray-") as directory:
        copy = Path(directory) / journal.name
        size = follow(journal, copy, 0)

        with _serve(wsgi(str(copy)), args.port) as server:
            say(f"http://127.0.0.1:{server.server_port}/ shows '{args.sweep}'. Ctrl-C ends it.")
            server.timeout = LOOK

            while True:
                server.handle_request()

                if not (size := follow(journal, copy, size)):  # Optuna has read the old one
                    copy = Path(mkdtemp(dir=directory)) / journal.name
                    size = follow(journal, copy, 0)
                    server.set_app(wsgi(str(copy)))


def follow(journal: Path, copy: Path, size: int) -> int:
    r"""Appends whole lines of a journal, from a size on, to its copy, and returns the new size.

    It is 0 if the journal has shrunk: it was replaced, and another copy begins.

    Raises:
        UserError: If the journal has been removed.
    """

    try:
        with open(journal, "rb") as f, open(copy, "ab") as g:
            if f.seek(0, os.SEEK_END) < size:
                return 0

            f.seek(size)
            lines, end, _ = f.read().rpartition(b"\n")

            return size + g.write(lines + end)
    except OSError as error:
        raise UserError(f"{journal} cannot be copied: {error}.") from error


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def _serve(app: Any, wanted: int | None) -> WSGIServer:
    for port in (wanted,) if wanted else (8080, 0):
        with suppress(OSError):
            return make_server("127.0.0.1", port, app, _Server, _Quiet)

    raise UserError(f"port {wanted} is in use. Give another one, or none for a free one.")
