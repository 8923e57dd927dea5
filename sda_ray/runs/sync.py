r"""Uploads runs to W&B's server after their training: the command `sda-ray sync`.

`metrics.jsonl` is the truth, and the server is asked how much of it it has. Nothing is marked in a
run's directory, so the command may be repeated, interrupted, or used with another server.

W&B's steps only increase. So every step is on the server once if its number of rows and its last
step are right.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import UserError, locked_at_once, open_regular, read_json, say
from .inventory import Entry, entries, is_held, read_entry
from .metrics import read_history
from .path import RunPath, sweep_directory
from .record import logged_config
from .tracking import Wandb, own_environment, start_run, summary

ENDED = ("finished", "diverged")
PATIENCE = 6.0  # seconds that the server may take for an answer
LAG = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between two looks at the rows that have arrived


class Unreachable(RuntimeError):
    r"""Raised if the server is absent, does not answer or refuses."""


def sync_runs(runs: Path, names: Sequence[str] = (), sweep: str | None = None) -> None:
    r"""Uploads runs: those named, all of a sweep, or by default the ended ones.

    Exits with 1 if one is missing afterwards.
    """

    free: list[Entry] = []

    if sweep is not None:
        own = (entry for entry in entries(runs) if entry.sweep == sweep)
        chosen = [x for x in own if x.status != "adopted" and x.epoch is not None]
    elif names:
        paths = dict.fromkeys(RunPath.find(runs, name) for name in names)
        chosen = [entry for path in paths if (entry := read_entry(path)) is not None]
    else:
        chosen = _ended(runs)

    for entry in chosen:
        if is_held(entry.path):
            say(f"{entry.path.directory.name} is left out: a process is using it.")
        else:
            free.append(entry)

    if not free:
        say("There is nothing to upload.")
        return

    done, hint = 0, " Another `sda-ray sync` may be running."

    try:
        api = _connect()

        with locked_at_once(runs / ".sync.lock", hint):
            for entry in free:
                name = entry.path.directory.name

                try:
                    wandb = Wandb.from_record(_settings(entry, runs), entry.path.record)
                    wandb = replace(wandb, mode="online")
                    sent = _upload(api, wandb, entry) + _send_evaluation(api, wandb, entry.path)
                    say(f"{name}: {sent}")
                    done += 1
                except (UserError, OSError) as error:
                    say(f"{name}: {error}", file=sys.stderr)
    except Unreachable as error:
        place = os.environ.get("WANDB_BASE_URL") or "its server"
        say(
            f"sda-ray: W&B at {place} cannot be used: {error}. {done} of {len(free)} runs are "
            "uploaded. The others are unchanged: repeat the command to continue.",
            file=sys.stderr,
        )
        sys.exit(1)

    say(f"{done} of {len(free)} runs are at {api.settings['base_url']}.")
    sys.exit(0 if done == len(free) else 1)


def _ended(runs: Path) -> list[Entry]:
    r"""Returns the runs that have ended, and prints which ones are left out.

    The paused runs of a sweep that does not run have ended until it is extended.
    """

    def has_ended(entry: Entry) -> bool:
        if entry.status == "paused" and entry.sweep is not None:
            return not is_held(RunPath(sweep_directory(runs, entry.sweep)))

        return entry.status in ENDED

    known = list(entries(runs))
    ended = [entry for entry in known if has_ended(entry) and entry.epoch is not None]
    public = [entry for entry in ended if _settings(entry, runs).get("mode") != "disabled"]
    # An adopted run is a copy of one that has its own place on W&B
    others = (entry for entry in known if entry.status != "adopted" and not has_ended(entry))
    unfinished = Counter(entry.status for entry in others)

    if unfinished:
        statuses = ", ".join(f"{n} {status}" for status, n in sorted(unfinished.items()))
        say(f"Not finished, and left out unless they are named: {statuses}.")

    if private := len(ended) - len(public):
        say(f"Trained with --wandb disabled, and left out unless named: {private}.")

    return public


def _settings(entry: Entry, runs: Path) -> dict[str, Any]:
    r"""Returns the W&B settings of a run, from its record or from that of its sweep."""

    settings, sweep = entry.record.get("wandb"), entry.record.get("sweep")

    if settings is None and sweep is not None:
        settings = {"group": sweep, "job_type": "trial"}  # if it was moved away from its sweep

        with suppress(UserError, KeyError, TypeError):
            settings = read_json(sweep_directory(runs, sweep) / "sweep.json")["options"]["wandb"]

    return settings if isinstance(settings, dict) else {}


def _rows(entry: Entry) -> dict[int, dict[str, Any]]:
    r"""Returns the rows of a run by step: its metrics, and its picture one step after them."""

    path = entry.path
    lines = read_history(path.metrics)

    if entry.config is None or not lines:
        faults = "; ".join(entry.faults) or f"{path.metrics} has no epochs"
        raise UserError(f"cannot be uploaded: {faults.rstrip('.')}.")

    rows: dict[int, dict[str, Any]] = {
        epoch: {k: x for k, x in line.items() if k != "epoch" and type(x) in (int, float)}
        for epoch, line in lines.items()
    }

    if entry.status == "finished" and os.path.lexists(path.samples):
        from wandb import Image

        os.close(open_regular(path.samples))

        try:
            rows[max(rows) + 1] = {"samples": Image(str(path.samples))}
        except Exception as error:  # a strange file makes PIL raise almost anything
            raise UserError(f"{path.samples} is not a picture to upload: {error}.") from error

    return rows


# The server


@contextmanager
def _reaching() -> Iterator[None]:
    r"""Raises any error but a UserError as :class:`Unreachable`."""

    start = time.monotonic()

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        late = time.monotonic() - start > 0.9 * PATIENCE
        reason = f"it does not answer within {PATIENCE:g} s" if late else summary(error)
        raise Unreachable(reason.rstrip(".")) from error


def _connect() -> Any:
    r"""Returns a client of the W&B server of this user's account."""

    import wandb

    with own_environment(), _reaching():
        wandb.setup(wandb.Settings(silent=True))

    with own_environment(), _reaching():  # the start of W&B's process is not the server's time
        api = wandb.Api(timeout=int(PATIENCE))
        _ = api.default_entity  # a request, to see whether the server answers

        return api


def _place(api: Any, wandb: Wandb, id: str) -> str:
    return f"{wandb.entity or api.default_entity}/{wandb.project}/{id}"


def _progress(api: Any, wandb: Wandb, id: str) -> tuple[int, int]:
    r"""Returns the number of rows that the server has of a run, and its last step, 0 for none."""

    from wandb.errors import CommError

    with _reaching():
        try:
            data = api.run(_place(api, wandb, id)).load(force=True)
        except (CommError, ValueError) as error:
            if isinstance(getattr(error, "exc", error), ValueError):  # no such run
                return 0, 0

            raise

        return data["historyLineCount"] or 0, (data["historyKeys"] or {}).get("lastStep", 0)


def _upload(api: Any, wandb: Wandb, entry: Entry) -> str:
    r"""Sends the rows of a run that the server lacks, and describes that. Safe to interrupt.

    Raises:
        Unreachable: If the server does not answer, or lacks a part of the run afterwards.
        UserError: If the run is damaged, or the server refuses it or has other rows.
    """

    from wandb.errors import UsageError

    path, rows = entry.path, _rows(entry)
    steps = list(rows)
    count, last = _progress(api, wandb, path.id)

    if count > len(steps) or (count and steps[count - 1] != last):
        raise UserError(
            f"W&B has {count} rows of it, to step {last}, which are not its first ones. To upload "
            f"it to another project, name that in the entry 'wandb' of {path.record}."
        )

    if count == len(steps):
        return "there already"

    config = logged_config(entry.config or {}, entry.record)
    patience = PATIENCE + len(steps) / 100

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        with _reaching():
            try:  # the load of this machine says nothing about the training
                run = start_run(scratch, path.id, path.name, config, wandb, patience, stats=False)
            except UsageError as error:  # such as a project that takes no runs
                raise UserError(f"W&B refuses it: {summary(error).rstrip('.')}.") from error

        for step in steps[count:]:
            run.log(rows[step], step=step, commit=True)

        run.finish(exit_code=1 if entry.status == "failed" else 0)

    for seconds in LAG:
        time.sleep(seconds)
        arrived, last = _progress(api, wandb, path.id)

        if (arrived, last) == (len(steps), steps[-1]):
            rest = f"completed, from step {steps[count]} on"
            return rest if count else f"uploaded, {arrived} rows"

    raise Unreachable(
        f"it has {arrived} rows to step {last} of {path.directory.name}, but should have "
        f"{len(steps)} to step {steps[-1]}"
    )


def _send_evaluation(api: Any, wandb: Wandb, path: RunPath) -> str:
    r"""Sends the means of a run's evaluation that its summary on the server lacks."""

    from .evaluation import read_evaluation, summarize  # load h5py, and torch if there is one

    if (evaluation := read_evaluation(path)) is None:
        return ""

    values = {
        f"evaluation/{observation}/{metric}": interval[0]
        for observation, metrics in summarize(evaluation).items()
        for metric, interval in metrics.items()
    }

    with _reaching():
        run = api.run(_place(api, wandb, path.id))
        run.load(force=True)

        if all(run.summary.get(key) == value for key, value in values.items()):
            return ""

        run.summary.update(values)

    return ", and its evaluation"
