r"""Uploads runs to W&B's server after their training: the command `sda-ray sync`.

`metrics.jsonl` is the truth, and the server is asked how much of it it has. Nothing is marked in a
run's directory, so the command may be repeated, interrupted, or used with another server.

W&B's steps only increase. So every step is on the server once if its number of rows and its last
step are right.
"""

import fcntl
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import Config, UserError, open_regular, read_json
from .metrics import read_history
from .path import RunPath, sweep_directory
from .record import logged_config
from .tracking import Wandb, own_environment, summary, wandb_settings

if TYPE_CHECKING:
    from .inventory import Entry

__all__ = [
    "Server",
    "Target",
    "Unreachable",
    "sync_runs",
    "target_of",
    "upload",
]

ENDED = ("finished", "diverged")

PATIENCE = 6.0  # seconds that the server may take for an answer
LAG = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between two looks at what has arrived


class Unreachable(RuntimeError):
    r"""Signals that the server is absent, does not answer or refuses."""


def sync_runs(runs: Path, names: Sequence[str] = ()) -> None:
    r"""Uploads runs, by default the finished ones. Exits with 1 if one is missing in the end."""

    entries = _named(runs, names) if names else _finished(runs)
    chosen = {entry.path.directory.name: entry for entry in entries}
    done, failed = 0, 0

    if not chosen:
        print("There is nothing to upload.")
        return

    try:
        server = Server()

        for name, entry in chosen.items():
            try:
                with _locked(entry.path.directory):
                    print(f"{name}: {upload(server, target_of(entry, runs))}", flush=True)

                done += 1
            except (UserError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                failed += 1
    except Unreachable as error:
        place = os.environ.get("WANDB_BASE_URL") or "its server"
        print(
            f"sda-ray: W&B at {place} cannot be used: {error}. {done} of {len(chosen)} runs are "
            "uploaded. The others are unchanged: repeat the command to continue.",
            file=sys.stderr,
        )
        sys.exit(1)

    print(f"{done} of {len(chosen)} runs are at {server.url}.")
    sys.exit(1 if failed else 0)


def _named(runs: Path, names: Sequence[str]) -> "list[Entry]":
    from .inventory import read_entry

    entries = {path: read_entry(path) for path in (RunPath.find(runs, name) for name in names)}
    return [entry for entry in entries.values() if entry is not None and _is_free(entry)]


def _finished(runs: Path) -> "list[Entry]":
    r"""Returns the runs that have ended, and prints which ones are left out."""

    from .inventory import entries

    known = list(entries(runs))
    other = (*ENDED, "adopted")  # an adopted run is a copy of one that has its own place on W&B
    unfinished = Counter(entry.status for entry in known if entry.status not in other)
    ended = [entry for entry in known if entry.status in ENDED and entry.epoch is not None]
    private = [entry for entry in ended if _settings(entry, runs).get("mode") == "disabled"]

    if unfinished:
        statuses = ", ".join(f"{n} {status}" for status, n in sorted(unfinished.items()))
        print(f"Not finished, and left out unless they are named: {statuses}.")

    if private:
        print(f"Trained with --wandb disabled, and left out unless named: {len(private)}.")

    return [entry for entry in ended if entry not in private and _is_free(entry)]


def _is_free(entry: "Entry") -> bool:
    from .inventory import is_held

    if held := is_held(entry.path):
        print(f"{entry.path.directory.name} is left out: a process is using it.")

    return not held


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    r"""Keeps another `sda-ray sync` off the same run, where the file system has such locks."""

    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another `sda-ray sync` is uploading it.")
        except OSError:  # NFS locks no directories
            pass

        yield
    finally:
        os.close(handle)


# What a run is on the server


@dataclass(frozen=True)
class Target:
    r"""A run as it is on a server that has all of it.

    Arguments:
        id: Its id.
        name: Its name.
        wandb: Its project, entity, tags, group and job type.
        config: Its config, see :func:`sda_ray.runs.record.logged_config`.
        rows: Its metrics by step.
        image: Its picture, if it has one, which comes one step after the metrics.
        good: Whether its training did not fail.
    """

    id: str
    name: str
    wandb: Wandb
    config: Config
    rows: dict[int, dict[str, float]]
    image: Path | None = None
    good: bool = True

    @property
    def steps(self) -> list[int]:
        steps = sorted(self.rows)
        return [*steps, steps[-1] + 1] if self.image is not None else steps

    @property
    def whole(self) -> tuple[int, int]:
        r"""The number of rows and the last step on a server that has all of the run."""

        return len(self.steps), self.steps[-1]

    def has_prefix(self, count: int, last: int) -> bool:
        r"""Returns whether a number of rows and a last step are those of the run's beginning."""

        return count <= len(self.steps) and (count == 0 or self.steps[count - 1] == last)


def target_of(entry: "Entry", runs: Path) -> Target:
    r"""Returns a run as it is to be on the server.

    Raises:
        UserError: If its files are damaged or have no epochs.
    """

    path = entry.path
    lines = read_history(path.metrics)

    if entry.config is None or not lines:
        faults = "; ".join(entry.faults) or f"{path.metrics} has no epochs"
        raise UserError(f"cannot be uploaded: {faults.rstrip('.')}.")

    rows = {
        epoch: {k: x for k, x in line.items() if k != "epoch" and type(x) in (int, float)}
        for epoch, line in lines.items()
    }
    image = path.samples if entry.status == "finished" and os.path.lexists(path.samples) else None

    if image is not None:
        os.close(open_regular(image))

    return Target(
        path.id,
        path.name,
        Wandb.from_record(_settings(entry, runs), path.record),
        logged_config(entry.config, entry.record),
        rows,
        image,
        entry.status != "failed",
    )


def _settings(entry: "Entry", runs: Path) -> dict[str, Any]:
    r"""Returns the W&B settings of a run, from its record or from that of its sweep."""

    settings, sweep = entry.record.get("wandb"), entry.record.get("sweep")

    if settings is None and sweep is not None:
        settings = {"group": sweep, "job_type": "trial"}  # if it was moved away from its sweep

        with suppress(UserError, KeyError, TypeError):
            settings = read_json(sweep_directory(runs, sweep) / "sweep.json")["options"]["wandb"]

    return settings if isinstance(settings, dict) else {}


# The server


class Server:
    r"""A connection to the W&B server of this user's account.

    Raises:
        Unreachable: If there is no server, no account, or no answer within seconds.
    """

    def __init__(self) -> None:
        import wandb

        with _reaching(), own_environment():
            wandb.setup(wandb.Settings(silent=True))
            self.api = wandb.Api(timeout=int(PATIENCE))

    @property
    def url(self) -> str:
        return str(self.api.settings["base_url"])

    def progress(self, target: Target) -> tuple[int, int]:
        r"""Returns the number of rows that the server has of a run, and its last step.

        Of a run that the server does not know, both are 0.

        Raises:
            Unreachable: If the server does not answer.
        """

        import wandb

        with _reaching():
            entity = target.wandb.entity or self.api.default_entity

            try:
                run = self.api.run(f"{entity}/{target.wandb.project}/{target.id}")
                data = run.load(force=True)
            except (wandb.errors.CommError, ValueError) as error:
                if isinstance(getattr(error, "exc", error), ValueError):  # no such run
                    return 0, 0

                raise

            return data["historyLineCount"] or 0, (data["historyKeys"] or {}).get("lastStep", 0)

    def has(self, target: Target) -> bool:
        r"""Returns whether the server has all of a run, once what is in transit has arrived."""

        for seconds in LAG:
            time.sleep(seconds)

            if (rows := self.progress(target)) == target.whole or rows[0] > target.whole[0]:
                return rows == target.whole

        return False


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


def upload(server: Server, target: Target) -> str:
    r"""Uploads a run, each step once. Safe to repeat, and to interrupt.

    The rows that the server lacks are sent. If those it has are not the run's beginning, as after
    `wandb sync` of overlapping attempts, the run is rewound there and sent anew.

    Returns:
        What was done, in words.

    Raises:
        Unreachable: If the server does not answer, or lacks a part of the run afterwards.
        UserError: If the server refuses the run.
    """

    count, last = server.progress(target)

    if (count, last) == target.whole:
        return "there already"

    fits = target.has_prefix(count, last)
    keep = last if fits else 0
    _replay(target, keep, rewind=not fits)

    if not server.has(target):
        rows, end = server.progress(target)
        raise Unreachable(
            f"it has {rows} rows to step {end} of {target.name}_{target.id}, but should have "
            f"{target.whole[0]} to step {target.whole[1]}"
        )

    if not fits:
        return f"uploaded, {len(target.steps)} rows, instead of {count} that were not its own"

    return f"completed, from step {keep + 1} on" if keep else f"uploaded, {len(target.steps)} rows"


def _replay(target: Target, keep: int, rewind: bool) -> None:
    r"""Sends the rows and the picture of a run, as its training does.

    Arguments:
        target: The run.
        keep: The last step that the server has and keeps.
        rewind: Whether the server has to forget later ones.
    """

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, own_environment():
        image = None if target.image is None else _open_image(target.image)
        past = f"{target.id}?_step={keep}"
        run = _start(target, scratch, **{"resume_from": past} if rewind else {"resume": "allow"})

        if (
            run.starting_step > keep + 1
        ):  # the summary, which W&B resumes from, is ahead of the rows
            run.finish()
            run = _start(target, scratch, resume_from=past)

        for step in target.steps:
            if step > keep:
                values: dict[str, Any] = {**target.rows.get(step, {"samples": image})}
                run.log(values, step=step, commit=True)

        run.finish(exit_code=0 if target.good else 1)


def _open_image(file: Path) -> Any:
    from wandb import Image

    try:
        return Image(str(file))
    except Exception as error:  # a strange file makes PIL raise almost anything
        raise UserError(f"{file} is not a picture to upload: {error}.") from error


def _start(target: Target, directory: str, **resume: str) -> Any:
    import wandb

    settings = wandb_settings(
        PATIENCE + len(target.rows) / 100,
        x_disable_stats=True,  # those of this machine say nothing about the training
    )

    with _reaching():
        try:
            return wandb.init(
                mode="online",
                dir=directory,
                project=target.wandb.project,
                entity=target.wandb.entity,
                id=target.id,
                name=target.name,
                config=target.config,
                tags=target.wandb.tags,
                group=target.wandb.group,
                job_type=target.wandb.job_type,
                settings=settings,
                **resume,  # type: ignore[arg-type]
            )
        except wandb.errors.UsageError as error:  # such as a project that takes no runs
            raise UserError(f"W&B refuses it: {summary(error).rstrip('.')}.") from error
