r"""An open run: everything that a training writes to its directory and to W&B."""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..core import (
    Config,
    FileBackend,
    Lease,
    LeaseGone,
    LeaseLost,
    UserError,
    check_present,
    load_config,
    remove_leftovers,
    save_config,
    write_atomic,
)
from ..training import Metrics, Samples, TrainState, steady_epochs
from .checkpoint import (
    CHECKPOINT_SECONDS,
    keep_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_state,
)
from .metrics import History
from .path import RunPath, new_id, new_name
from .record import Record, logged_config, provenance, read_record, save_diff
from .tracking import Tracker, Wandb, safe_name

logger = logging.getLogger(__name__)

WANDB = Wandb()

CHECKPOINT_COST = 0.03  # the most that checkpoints may take of the time


class Run:
    r"""A run that is open for writing: a new one, or an existing one to resume.

    While it is open, its directory belongs to this process: see :mod:`sda_ray.core.lease`.

    Arguments:
        runs: The directory of all runs.
        config: The config, checked. That of an existing run is kept.
        id: The id of the run. An existing directory of this id is resumed.
        number: The number at the end of the run's name.
        attempt, takeover: See :class:`sda_ray.core.lease.Lease`.
        record: Further entries of `run.json`.
        device: Where the run trains, for the record.
        interval: The least time between two checkpoints, in seconds.

    Raises:
        UserError: If another process uses the run, or its directory cannot be written.
    """

    def __init__(
        self,
        runs: Path,
        config: Config,
        id: str | None = None,
        number: int | None = None,
        wandb: Wandb = WANDB,
        attempt: int | None = None,
        takeover: bool = False,
        record: dict[str, Any] | None = None,
        device: str | torch.device = "cpu",
        interval: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.id = id or new_id()
        self._least = self._interval = interval
        self._closed = False
        self._link = runs / f".{self.id}"

        try:
            name = self._make_directory(runs, number, wandb)
            self.lease = Lease(self.path.lease, f"run {name}_{self.id}", attempt, takeover)

            try:
                self._open(name, config, wandb, record or {}, device)
            except BaseException:
                self.lease.release()
                raise
        except OSError as error:
            raise UserError(f"a run in {runs} cannot be written: {error}.") from error

        self._last_save = time.monotonic()

    def _make_directory(self, runs: Path, number: int | None, wandb: Wandb) -> str:
        r"""Finds or makes the directory of the run and returns the run's name.

        A run that the W&B server names starts in the provisional directory `.{id}`, since W&B
        needs a directory before it gives the name.
        """

        runs.mkdir(parents=True, exist_ok=True)

        if (path := RunPath.of_id(runs, self.id)) is not None:
            self.path = path
            return path.name

        number = 1 + sum(1 for _ in RunPath.all(runs)) if number is None else number
        name = new_name(self.id, number)
        provisional = wandb.mode == "online" or self._link.is_dir()
        self.path = RunPath(self._link if provisional else runs / f"{name}_{self.id}")

        if self._link.is_symlink():  # its target was deleted
            self._link.unlink()

        self.path.directory.mkdir(exist_ok=True)

        return name

    def _open(
        self,
        name: str,
        config: Config,
        wandb: Wandb,
        record: dict[str, Any],
        device: str | torch.device,
    ) -> None:
        with self.lease.hold():
            remove_leftovers(self.path.directory)

            if not self.path.config.exists():
                save_config(config, self.path.config)

        self.config = load_config(self.path.config)
        self.history = History(self.path.metrics, self.lease.hold)
        named = self.path.directory != self._link
        shown = logged_config(self.config, read_record(self.path) | record)
        self.tracker = Tracker(self.path.directory, self.id, name, shown, wandb, named=named)

        try:
            self._settle(named)
            self.record = Record(self.path, self.lease.hold, record)
            self.record.begin(self.lease.attempt, provenance(device))

            save_diff(self.path, self.lease.hold)
        except BaseException:
            self.tracker.finish(good=False)
            raise

        for epoch in sorted(self.lines):
            if epoch >= self.tracker.next_step:
                self._send(self.lines[epoch])

    def _settle(self, named: bool) -> None:
        r"""Gives the provisional directory its name; a link stays while W&B writes."""

        with self.lease.hold():
            if self._link.is_symlink():  # of an attempt that was killed
                self._link.unlink()

            if not named:
                path = RunPath(self._link.with_name(f"{safe_name(self.tracker.name)}_{self.id}"))
                self._link.rename(path.directory)

                if self.tracker.writes:
                    self._link.symlink_to(path.directory.name)

                self.path, self.history.file = path, path.metrics
                self.lease.backend = FileBackend(path.lease)

    @property
    def lines(self) -> dict[int, Metrics]:
        r"""The metrics of the complete epochs, by epoch."""

        return self.history.lines

    def log(self, metrics: Metrics) -> None:
        r"""Appends an epoch to `metrics.jsonl`, then sends it to W&B.

        An epoch that is there already was repeated after a resume: it is compared instead.
        """

        if metrics["epoch"] not in self.lines:
            self.history.add(metrics)
            self._send(metrics)
        elif differs := self.history.differences(metrics):
            self.record["exact"] = False
            logger.warning(
                "epoch %d of %s came out different when it was repeated: %s.",
                metrics["epoch"],
                self.path.directory.name,
                differs,
            )

    def _send(self, metrics: Metrics) -> None:
        values = {key: x for key, x in metrics.items() if key != "epoch"}
        self.tracker.log(values, step=metrics["epoch"])

    def load(self, state: TrainState) -> None:
        r"""Loads the newest checkpoint of the run into a state, if there is one.

        A run that has epochs and no checkpoint restarts, to the same bits. The entry of this
        attempt in `run.json` then says why, as `restarted`.
        """

        saved = self.path.checkpoint.exists() or self.path.previous.exists()

        with self.lease.hold():
            checkpoint = load_checkpoint(self.path)

        if checkpoint is not None:
            try:
                state.load(*checkpoint)
            except ValueError as error:
                raise UserError(f"{self.path.checkpoint} does not fit config.json: {error}.")
        elif saved or (self.lines and "parent" not in self.record):
            name, level = self.path.directory.name, logging.WARNING if saved else logging.INFO
            why = "it has no whole checkpoint" if saved else "it has no checkpoint"
            logger.log(level, "%s: %s: it restarts at epoch 0, to the same bits.", name, why)
            self.record["attempts"][-1]["restarted"] = why
            self.record.write("running")

    def save(self, state: TrainState) -> None:
        r"""Saves a checkpoint, unless the newest one is at this step.

        A full disk does not stop the training: the old checkpoint stays. One at the start of a
        decay, from which longer runs start, stays as `checkpoint.decay.pth`, if it can.
        """

        if state.saved == state.position:
            return

        start, steady = time.monotonic(), steady_epochs(self.config)

        try:
            self.history.write()

            if steady and state.saved == (steady, 0):
                self._keep_start()

            save_checkpoint(self.path, state.tensors(), state.info(), self.lease.hold)
            state.saved = state.position
        except OSError as error:
            check_present(self.path.lease)
            logger.warning(
                "%s: no checkpoint was saved, and the one before stays: %s.",
                self.path.directory.name,
                error,
            )

        self._last_save = time.monotonic()
        self._interval = max(self._least, (self._last_save - start) / CHECKPOINT_COST)

    def _keep_start(self) -> None:
        try:
            keep_checkpoint(self.path, self.lease.hold)
        except OSError as error:
            logger.warning(
                "%s cannot be kept, so the run cannot be extended later: %s.",
                self.path.decay,
                error,
            )

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last_save >= self._interval

    def finish(self, state: TrainState, samples: Samples) -> None:
        r"""Saves the weights as `state.pth`, and `samples.png`, and marks the run finished.

        Raises:
            UserError: If these files cannot be written. Resuming the run writes them.
        """

        self.save(state)

        try:
            self.history.write()
            save_state(self.path, state.result.state_dict(), self.lease.hold)
            image = samples.picture(state)

            with self.lease.hold():
                write_atomic(self.path.samples, image)
                self.path.previous.unlink(missing_ok=True)

            self.tracker.log_image("samples", self.path.samples, state.epoch + 1)
            self.record.write("finished", epoch=state.epoch)
        except OSError as error:
            check_present(self.path.lease)
            sweep = self.record.get("sweep")
            command = f"sweep {sweep}" if sweep else f"train --resume {self.id}"
            raise UserError(
                f"{self.path.directory.name} is trained to its end, but its files cannot be "
                f"written: {error}. Make room and finish it with `sda-ray {command}`."
            ) from error

    def close(self, status: str, **more: Any) -> None:
        r"""Ends the attempt: status, W&B, lease. Safe to repeat."""

        if self._closed:
            return

        self._closed = True

        try:
            self.record.end(status, **more)
        except LeaseGone:
            pass
        except (LeaseLost, OSError) as error:
            logger.warning("run.json keeps its status: %s.", error)

        self.tracker.finish(good=status != "failed")

        with suppress(LeaseLost, OSError), self.lease.hold():
            self._link.unlink(missing_ok=True)

        self.lease.release()
