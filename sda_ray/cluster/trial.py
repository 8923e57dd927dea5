r"""A trial: Ray Tune's view of a run.

Tune receives numbers only: the run's directory, its checkpoints and its resumption are ours. A
trial's process is kept for the next trial, so that everything ends in :meth:`Trial.close`.
"""

import math
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import tune

from ..core import release_memory, uncollected, write_atomic
from .ray_node import is_leaving

if TYPE_CHECKING:
    from ..runs import Stop

REPORT_SECONDS = 2.0  # epochs shorter than this are reported together
LOOK = 0.2  # seconds between two looks for the file that asks trials to stop
CONTEXT = 2**29  # bytes of a GPU that CUDA itself takes for each process


class Trial(tune.Trainable):
    r"""One run, or a stretch of one between two rungs.

    Its config has `runs`, `data`, `config`, `run_id`, `index`, `attempt`, `rungs`, `record`,
    `wandb`, `cpus` and `request`; and may have `gpus`, of which it takes no more memory than its
    share, `stall`, see :mod:`sda_ray.training.watchdog`, `short`, how often the run was short of
    memory, `objectives`, by default `loss_valid`, and `server`, see
    :func:`sda_ray.storage.server.serve_files`, if nodes may not see these directories: the trial finds
    out itself whether this one does, see :mod:`sda_ray.storage.client`.

    Tune calls :meth:`step` again and again, :meth:`reset_config` for the next trial in the same
    process, and :meth:`cleanup` at the end. Tune's checkpoints are not used. The first step of a
    trial returns at once, so that the driver knows where it is. Each other step lasts 2 s or up
    to the next rung. It returns

    * `epochs`, the list of (epoch, value)
    * `event`: `running`, `complete`, `diverged`, `interrupted`, `stopped` (by the user), `memory`
      (which was short) or `failed`. After all but the first the attempt has ended
    * `error`, for an interrupted run why it has no new checkpoint; and for a complete run `finals`,
      see :func:`sda_ray.runs.metrics.finals`
    * `unreached`, why W&B's server cannot be used by this attempt, if that was wanted
    * `longest`, the seconds that it went without looking for a stop request
    * `node` and `host`, Ray's id of its node and the name; from its first step `actor`, its handle
    * `halt`, why no trial of the sweep can be trained, if so
    * `leaving`, whether that node is about to go, which interrupts
    * `notes`, what the user should know, as pairs of a subject and a text

    What it returns is on the disk of the driver's node by then. A trial that is cut off from there
    raises :class:`sda_ray.storage.client.Disconnected`.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.spec = config
        self.greeted = False
        self.remote: Any = None
        self.data: Any = None  # keeps data that were fetched
        self.run: Any = None
        self.tracker: Any = None
        self.training: Iterator[dict[str, Any]] | None = None
        self.watchdog: Any = None

    def reset_config(self, config: dict[str, Any]) -> bool:
        r"""Ends the attempt and begins that of another config. Never raises."""

        self.close("interrupted")
        self.setup(config)

        return True

    def cleanup(self) -> None:
        self.close("interrupted")

    def step(self) -> dict[str, Any]:
        context = ray.get_runtime_context()
        result: dict[str, Any] = {"event": "running", "epochs": [], "error": ""}

        if self.greeted:
            result = self._advance_run()
        elif context.get_actor_id():
            result["actor"] = context.current_actor

        self.greeted = True
        where = {"node": context.get_node_id(), "host": socket.gethostname()}

        return {**result, **where, "leaving": is_leaving()}

    def _advance_run(self) -> dict[str, Any]:
        from ..core import LeaseGone, LeaseLost
        from ..data import DataChanged
        from ..runs import Interrupted, OutOfMemory, finals
        from ..storage import Disconnected
        from ..training import Diverged

        values: list[tuple[int, float]] = []
        event, error, last, halt = "running", "", None, ""
        objectives = self.spec.get("objectives") or ()

        try:
            if self.training is None:
                values += self._open()

            self.watchdog.phase()
            event = self._advance(values)

            if event == "complete" and len(objectives) > 1:
                last = finals(self.run.path, objectives)
            elif event == "running" and self.remote is not None:
                self._hand_over(values)
        except Disconnected:
            self.close("interrupted")
            raise
        except LeaseLost as e:
            self.close("interrupted")
            raise Disconnected(f"the trial was cut off from the head: {e}") from e
        except Interrupted as e:
            event = "stopped" if self.stop_flag.scope == "alone" else "interrupted"
            error = str(e)
        except DataChanged as e:
            event, halt = "interrupted", str(e).rstrip(".")
        except (Diverged, OutOfMemory, LeaseGone) as e:
            events = {Diverged: "diverged", OutOfMemory: "memory", LeaseGone: "failed"}
            event, error = events[type(e)], str(e)
        except Exception as e:  # a bug or a bad configuration: not tried again
            event, error = "failed", f"{type(e).__name__}: {e}"

            if self.run is not None:
                write_atomic(self.run.path.error, traceback.format_exc().encode())

        notes = {} if self.remote is None else dict(self.remote.notes)
        unreached = "" if self.tracker is None else self.tracker.failed

        if self.tracker is not None and self.tracker.missing:
            notes["W&B"] = f"W&B gets nothing of some runs: {self.tracker.missing}"

        longest = 0.0 if self.watchdog is None else self.watchdog.longest

        if event == "running":
            self.watchdog.rest()
        else:
            again = "failed" if self.spec.get("short") else "interrupted"
            wrong = self.close({"complete": "finished", "memory": again}.get(event, event))

            if isinstance(wrong, Disconnected):
                raise wrong

            if wrong is not None and event == "complete":
                event, error = "failed", f"its files cannot be kept on the head: {wrong}"
            elif wrong is not None:
                error = error or str(wrong)

        return {
            "event": event,
            "epochs": values,
            "error": error,
            "finals": last,
            "halt": halt,
            "unreached": unreached,
            "longest": longest,
            "notes": list(notes.items()),  # Tune flattens a dict
        }

    @uncollected()
    def _open(self) -> list[tuple[int, float]]:
        import torch

        from ..core import LeaseGone
        from ..runs import Run, Wandb, train_run
        from ..storage import Connection, RemoteRun, find_data, shares_files
        from ..training import STACKS, STALL, Watchdog

        spec = self.spec
        request, stall = Path(spec["request"]), spec.get("stall") or STALL
        server = spec.get("server")
        runs, data, early = Path(spec["runs"]), Path(spec["data"]), request.parent

        if server and not shares_files(server):
            self.remote = RemoteRun(server, spec["run_id"], spec["attempt"], spec["index"])
            runs = early = self.remote.runs
        elif not early.is_dir():  # the run would create the directory of runs anew
            raise LeaseGone(f"{early} was deleted or unmounted while it was in use.")

        name = STACKS if self.remote else f"stacks.{spec['index']}.txt"
        self.watchdog = Watchdog(early / name, stall)
        self.watchdog.phase()

        if self.remote is not None:
            self.remote.open(self.watchdog.phase)

        if server:
            expected = spec["record"]["data"]
            ask = Connection(server, "", 0).ask
            data, self.data = find_data(data, expected, ask, self.watchdog.phase)

        gpus = ", ".join(map(str, ray.get_gpu_ids()))
        device = "cuda" if gpus else "cpu"
        torch.set_num_threads(max(1, int(spec["cpus"])))
        share = min(1.0, spec.get("gpus") or 1.0)

        if device == "cuda" and share < 1:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total))

        self.run = Run(
            runs,
            spec["config"],
            id=spec["run_id"],
            number=spec["index"],
            wandb=Wandb(**spec["wandb"]),
            attempt=spec["attempt"],
            takeover=True,
            record=spec["record"]
            | {"trial": spec["index"], "params": spec.get("params")}
            | ({"replica_of": n} if (n := spec.get("replica_of")) else {}),
            device=device,
        )
        self.tracker = self.run.tracker  # which outlives the run's end

        if gpus:
            with suppress(OSError):
                self.run.lease.note(gpu=f"{share:g} of {gpus}" if share < 1 else gpus)

        self.watchdog.close()
        self.watchdog = Watchdog(self.run.path.directory / STACKS, stall)
        self.watchdog.phase()
        self.stop_flag = StopFlag(self._stop_request)

        if self.remote is not None:
            self.remote.watch(self.run.path)

        self.training = train_run(
            self.run,
            data,
            device,
            spec["rungs"],
            stop=cast("Stop", self.stop_flag),
            after_step=self._after_step,
            share=share,
        )

        return [self._value(line) for line in self.run.lines.values()]

    def _value(self, metrics: dict[str, Any]) -> tuple[int, float]:
        r"""Returns an epoch and its value, NaN if the objective is not measured there."""

        objective, *_ = self.spec.get("objectives") or ("loss_valid",)

        return metrics["epoch"], metrics.get(objective, math.nan)

    def _after_step(self, state: Any) -> None:
        self.watchdog.step()

        if state.step == len(state.losses):  # the epoch's last
            self.watchdog.phase()

    def _advance(self, values: list[tuple[int, float]]) -> str:
        assert self.training is not None
        start = time.monotonic()

        for metrics in self.training:
            epoch = metrics["epoch"]
            values.append(self._value(metrics))
            self.watchdog.phase()

            if epoch == self.run.config["epochs"]:
                continue  # the loop's last turn finishes the run

            if epoch in self.spec["rungs"] or time.monotonic() - start > REPORT_SECONDS:
                return "running"

        return "complete"

    def _hand_over(self, values: list[tuple[int, float]]) -> None:
        r"""Waits until the server has the epochs that are reported; at a rung, all of the run."""

        if values and values[-1][0] in self.spec["rungs"]:
            self.remote.flush(self.watchdog.phase)
        else:
            self.remote.push_lines()

    def _stop_request(self) -> str:
        r"""Returns why to stop: `leaving` (the node), `all` (trials), `alone` (this one), or none."""

        from ..storage import stop_scope

        if is_leaving():
            return "leaving"

        if self.remote is not None:
            return str(self.remote.stop_request())

        return stop_scope(Path(self.spec["request"]), self.spec["index"])

    def close(self, status: str) -> Exception | None:
        r"""Ends the attempt: checkpoint, W&B, lease. Never raises, and may be repeated.

        Returns:
            Why the server has not got all of it, if it has not.
        """

        run, training, watchdog = self.run, self.training, self.watchdog
        remote, data, wrong = self.remote, self.data, None
        self.run = self.training = self.watchdog = self.remote = self.data = None

        if watchdog is not None:
            watchdog.phase()

        try:
            if training is not None:
                training.close()  # type: ignore[attr-defined]
        except Exception:
            traceback.print_exc()

        try:
            if run is not None:
                run.close(status)
        except Exception:  # taken over by another attempt, or a full disk
            traceback.print_exc()

        if remote is not None:
            wrong = remote.close(watchdog.phase)

        if watchdog is not None:
            watchdog.close()

        if run is not None:
            release_memory()  # before a smaller network comes, or nothing for a while

        if data is not None:
            data.close()

        return wrong


def memory_fraction(share: float, total: int) -> float:
    r"""Returns the part of a GPU of `total` bytes that torch may take, given a trial's share."""

    return max(share / 2, share - CONTEXT / total)


class StopFlag:
    r"""A stop flag that looks now and then whether it is set.

    Tune creates the actors of trials without concurrency groups, so that a trial answers no call
    while it trains: it looks itself.

    Arguments:
        look: Returns why to stop, or an empty text.
    """

    def __init__(self, look: Callable[[], str]) -> None:
        self.look = look
        self.looked = 0.0
        self.scope = ""

    @property
    def signal(self) -> int | None:
        if not self.scope and time.monotonic() - self.looked > LOOK:
            self.looked = time.monotonic()
            self.scope = self.look()

        return SIGTERM if self.scope else None
