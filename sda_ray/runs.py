r"""Runs: what a training leaves in its directory and shows on W&B."""

import logging
import os
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    RunPath,
    load_checkpoint,
    new_id,
    new_name,
    save_checkpoint,
    save_state,
)
from .config import Config, load_config, save_config
from .errors import UserError
from .files import (
    append_line,
    cut_torn_line,
    read_json,
    read_lines,
    remove_leftovers,
    write_atomic,
    write_json,
)
from .lease import Lease
from .provenance import provenance
from .samples import draw_samples
from .training import Metrics, TrainState

__all__ = ["Run", "Wandb", "read_record"]

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0  # between two checkpoints, unless they cost more than …
CHECKPOINT_COST = 0.03  # … this part of the time

NOISY = ("seconds", "time")  # keys of metrics.jsonl that no two attempts share


@dataclass(frozen=True)
class Wandb:
    r"""Creates the W&B settings of a run. Offline needs no account and no network."""

    mode: str = "offline"
    project: str = "sda-kolmogorov"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None
    job_type: str = "train"

    @staticmethod
    def from_options(
        mode: str | None = None,
        project: str | None = None,
        entity: str | None = None,
        tags: str | None = None,
    ) -> "Wandb":
        r"""Returns settings: options first, then the variables `WANDB_*`, then the defaults."""

        env = os.environ.get
        mode = mode or env("WANDB_MODE") or "offline"
        labels = tags or env("WANDB_TAGS") or ""

        if mode not in ("online", "offline", "disabled"):
            raise UserError(f"W&B's mode is '{mode}', but must be online, offline or disabled.")

        return Wandb(
            mode,
            project or env("WANDB_PROJECT") or "sda-kolmogorov",
            entity or env("WANDB_ENTITY") or None,
            tuple(tag.strip() for tag in labels.split(",") if tag.strip()),
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_record(path: RunPath) -> dict[str, Any]:
    r"""Returns the `run.json` of a run, or an empty dict if there is none, as in SDA's runs."""

    return read_json(path.record) if path.record.exists() else {}


class Run:
    r"""Creates a run, or opens one to go on with it.

    While it is open, its directory belongs to this process: see :mod:`sda_ray.lease`.

    Arguments:
        runs: The directory of all runs.
        config: The config, checked. That of an existing run is kept.
        id: The run's id. A directory of this id is gone on with.
        number: The number at the end of the run's name.
        wandb: How to log to W&B.
        attempt: The number of this attempt, if the caller counts them.
        takeover: Whether to take the run from a process that seems to be at it.
        record: What `run.json` shall say beside what is found out here.
        device: Where the run trains, for the record.

    Raises:
        UserError: If another process is at the run.
    """

    def __init__(
        self,
        runs: Path,
        config: Config,
        id: str | None = None,
        number: int | None = None,
        wandb: Wandb = Wandb(),  # noqa: B008 (frozen)
        attempt: int | None = None,
        takeover: bool = False,
        record: dict[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        runs.mkdir(parents=True, exist_ok=True)
        id = id or new_id()
        path = RunPath.of_id(runs, id)
        self._wandb = None
        self._link: Path | None = None

        if path is None:
            number = number or 1 + sum(1 for _ in RunPath.all(runs))
            path = self._create(runs, id, new_name(id, number), config, wandb)

        self.path = path
        self.lease = Lease(path.lease, f"run {path.directory.name}", attempt, takeover)

        with self.lease.hold():
            remove_leftovers(path.directory)
            cut_torn_line(path.metrics)

            if not path.config.exists():
                save_config(config, path.config)

        self.config = load_config(path.config)
        self.lines = {line["epoch"]: line for line in read_lines(path.metrics)}
        self.record = {"id": path.id, "name": path.name, "created": _now(), "exact": True}
        self.record |= read_record(path) | (record or {})
        self._begin_attempt(provenance(device))

        if self._wandb is None and wandb.mode != "disabled":
            self._wandb = _init_wandb(path, path.name, self.config, wandb)

        self._replay()
        self.interval = CHECKPOINT_SECONDS
        self._last_save = time.monotonic()

    def _create(
        self, runs: Path, id: str, name: str, config: Config, wandb: Wandb
    ) -> RunPath:
        r"""Makes the run's directory. Online, the W&B server gives the name.

        W&B wants a directory before it tells the name: it starts under a provisional one, which
        stays behind as a link for as long as W&B writes.
        """

        if wandb.mode != "online":
            path = RunPath(runs / f"{name}_{id}")
            path.directory.mkdir()
            return path

        provisional = runs / f".{id}"
        provisional.unlink() if provisional.is_symlink() else None
        provisional.mkdir(exist_ok=True)
        self._wandb = _init_wandb(RunPath(provisional), None, config, wandb)
        given = self._wandb.name if self._wandb is not None else None
        path = RunPath(runs / f"{_safe(given) or name}_{id}")
        provisional.rename(path.directory)
        provisional.symlink_to(path.directory.name)
        self._link = provisional

        return path

    def _begin_attempt(self, now: dict[str, Any]) -> None:
        attempts = self.record.setdefault("attempts", [])
        first = attempts[0] if attempts else now
        differs = [k for k in ("device", "threads", "versions") if first.get(k) != now[k]]

        if differs:
            self.record["exact"] = False
            logger.warning(
                "%s goes on with another %s than it began with: its bits may differ from those "
                "of an uninterrupted run.",
                self.path.directory.name,
                " and ".join(differs),
            )

        attempts.append({"number": self.lease.attempt, "started": _now(), **now})
        self.set_status("running")

    def _replay(self) -> None:
        r"""Sends what W&B's server has not got of the epochs in `metrics.jsonl`."""

        if self._wandb is None or self._wandb.offline:
            return

        for epoch in sorted(e for e in self.lines if e >= self._wandb.starting_step):
            self._send(self.lines[epoch])

    def set_status(self, status: str, **more: Any) -> None:
        r"""Writes `run.json` with a new status."""

        self.record |= {"status": status, "updated": _now(), **more}

        with self.lease.hold():
            write_json(self.path.record, self.record)

    def log(self, metrics: Metrics) -> None:
        r"""Appends an epoch to `metrics.jsonl`, then sends it to W&B.

        An epoch that is there already was done again after a resume: it is compared instead.
        """

        before = self.lines.get(metrics["epoch"])

        if before is None:
            with self.lease.hold():
                append_line(self.path.metrics, metrics)

            self.lines[metrics["epoch"]] = metrics
            self._send(metrics)
            return

        differs = [
            key
            for key, value in metrics.items()
            if key not in NOISY and key in before and before[key] != value
        ]

        if differs:
            self.record["exact"] = False
            logger.warning(
                "epoch %d of %s came out different when it was done again: %s.",
                metrics["epoch"],
                self.path.directory.name,
                ", ".join(f"{key} {before[key]} before, {metrics[key]} now" for key in differs),
            )

    def _send(self, metrics: Metrics) -> None:
        if self._wandb is not None:
            sent = {key: x for key, x in metrics.items() if key != "epoch"}
            self._wandb.log(sent, step=metrics["epoch"], commit=True)

    def load(self, state: TrainState) -> None:
        r"""Brings a state to the newest checkpoint of the run, if there is one."""

        if (found := load_checkpoint(self.path)) is not None:
            state.load(*found)

    def save(self, state: TrainState) -> None:
        r"""Saves a checkpoint, unless the newest one is at this very step.

        A disk that is full does not stop the training: the old checkpoint stays.
        """

        if state.saved == state.position:
            return

        start = time.monotonic()

        try:
            save_checkpoint(self.path, state.tensors(), state.info(), self.lease.hold)
            state.saved = state.position
        except OSError as error:
            logger.warning("%s: no checkpoint was saved: %s", self.path.directory.name, error)

        self._last_save = time.monotonic()
        self.interval = max(CHECKPOINT_SECONDS, (self._last_save - start) / CHECKPOINT_COST)

    @property
    def due(self) -> bool:
        r"""Whether it is time for a checkpoint."""

        return time.monotonic() - self._last_save >= self.interval

    def finish(self, state: TrainState) -> None:
        r"""Saves the weights as `state.pth`, and `samples.png`, and marks the run finished."""

        self.save(state)
        save_state(self.path, state.score.state_dict(), self.lease.hold)
        image = draw_samples(state.sde, self.config["seed"])

        with self.lease.hold():
            write_atomic(self.path.samples, image)
            self.path.previous.unlink(missing_ok=True)

        if self._wandb is not None:
            import wandb

            picture = wandb.Image(str(self.path.samples))
            self._wandb.log({"samples": picture}, step=state.epoch + 1, commit=True)

        self.set_status("finished", epoch=state.epoch)

    def close(self, status: str | None = None, **more: Any) -> None:
        r"""Ends the attempt: status, W&B, lease. Safe to repeat."""

        if self._wandb is not None:
            good = (status or self.record["status"]) != "failed"
            self._wandb.finish(exit_code=0 if good else 1)
            self._wandb = None

        if self._link is not None:
            self._link.unlink(missing_ok=True)
            self._link = None

        if status is not None:
            self.record["attempts"][-1]["ended"] = _now()
            self.set_status(status, **more)

        self.lease.release()


def _safe(name: str | None) -> str:
    r"""Returns a name given by a server as it may stand in a path."""

    return "".join(c if c.isalnum() or c in "-." else "-" for c in name or "").lstrip(".")[:128]


def _init_wandb(path: RunPath, name: str | None, config: Config, wandb: Wandb) -> Any:
    r"""Starts W&B in a run's directory; offline, if the server does not answer."""

    import wandb as client

    def init(mode: str) -> Any:
        return client.init(
            mode=mode,  # type: ignore[arg-type]
            dir=path.directory,
            project=wandb.project,
            entity=wandb.entity,
            id=path.id.lstrip("."),
            name=name,
            resume="allow",
            config=config,
            tags=wandb.tags,
            group=wandb.group,
            job_type=wandb.job_type,
            settings=client.Settings(
                init_timeout=8,
                finish_timeout=8,
                silent=True,
                console="off",
                disable_git=True,
                x_transaction_log_flush_interval=1.0,  # a kill loses 1 s of rows, not 15
            ),
        )

    try:
        return init(wandb.mode)
    except Exception as error:  # a dead server, a bad key: training never stops for W&B
        if wandb.mode == "offline":
            raise

        logger.warning("W&B cannot be reached (%s): the run goes on offline.", error)
        client.teardown()

        return init("offline")
