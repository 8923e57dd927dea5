r"""Ray Tune's view of a run.

Tune receives numbers only: the run's directory, its checkpoints and its resumption are ours. A
trial's process is kept for the next trial, so that everything ends in :meth:`Trial.close`.
"""

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM
from typing import Any

from ray.tune import Trainable

from .allocator import give_memory_back
from .files import write_atomic

__all__ = ["REPORT_SECONDS", "Trial", "limit"]

REPORT_SECONDS = 2.0  # epochs shorter than this are reported together
CONTEXT = 2**29  # bytes of a GPU that CUDA itself takes for each process
LOOK_SECONDS = 0.2  # between two looks for the wish to stop


class Trial(Trainable):
    r"""Creates a trial: one run, or a stretch of one between two rungs.

    Its config has `runs`, `data`, `config`, `run_id`, `index`, `attempt`, `rungs`, `record`,
    `wandb`, `cpus` and `request`; and may have `gpus`, of which it takes no more memory than its
    share, `stall`, see :mod:`sda_ray.watchdog`, `short`, how
    often the run was short of memory, and `objectives`, if there are several. A step trains for
    2 s or up to the next rung and returns

    * `epochs`, the list of (epoch, value)
    * `event`: `running`, `complete`, `diverged`, `interrupted`, `stopped` (by the user, for good),
      `memory` (which was short) or `failed`. After all but the first the attempt has ended
    * `error`, and for a complete run `finals`, see :func:`sda_ray.outcome.finals`
    * `unreached`, whether W&B's server has failed this attempt
    * `longest`, the seconds that it went without looking for the wish to stop
    * `node`, Ray's id of the node that it runs on
    * `leaving`, whether it was interrupted since that is about to go
    """

    def setup(self, config: dict[str, Any]) -> None:
        from .leaving import watch

        self.spec = config
        self.leaving = watch()
        self.run: Any = None
        self.tracker: Any = None
        self.training: Iterator[dict[str, Any]] | None = None
        self.watchdog: Any = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.close("interrupted")
        self.setup(new_config)

        return True

    def step(self) -> dict[str, Any]:
        import ray

        from .presence import Vanished
        from .train import Interrupted, OutOfMemory
        from .training import Diverged

        values: list[tuple[int, float]] = []
        event, error, finals = "running", "", None

        try:
            if self.training is None:
                values += self._open()

            self.watchdog.phase()
            event = self._advance(values)

            if event == "complete":
                finals = self._finals()
        except Interrupted:
            event = "stopped" if self.stop.alone else "interrupted"
        except Diverged as e:
            event, error = "diverged", str(e)
        except OutOfMemory as e:
            event, error = "memory", str(e)
        except Vanished as e:
            event, error = "failed", str(e)
        except Exception as e:  # a bug or a bad configuration: told once, not tried again
            event, error = "failed", f"{type(e).__name__}: {e}"
            self._keep(traceback.format_exc())

        unreached = self.tracker is not None and self.tracker.failed
        longest = 0.0 if self.watchdog is None else self.watchdog.longest

        if event == "running":
            self.watchdog.rest()
        else:
            again = "failed" if self.spec.get("short") else "interrupted"
            self.close({"complete": "finished", "memory": again}.get(event, event))

        return {
            "event": event,
            "epochs": values,
            "error": error,
            "finals": finals,
            "unreached": unreached,
            "longest": longest,
            "node": ray.get_runtime_context().get_node_id(),
            "leaving": event == "interrupted" and self.leaving(),
        }

    def _open(self) -> list[tuple[int, float]]:
        r"""Opens the run and returns the values that it has already."""

        import ray
        import torch

        from .runs import Run
        from .tracking import Wandb
        from .train import train
        from .watchdog import STACKS, STALL, Watchdog

        spec = self.spec
        request, stall = Path(spec["request"]), spec.get("stall") or STALL
        self.watchdog = Watchdog(request.with_name(f"stacks.{spec['index']}.txt"), stall)
        self.watchdog.phase()
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        torch.set_num_threads(max(1, int(spec["cpus"])))
        share = min(1.0, spec.get("gpus") or 1.0)

        if device == "cuda" and share < 1:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(limit(share, total))

        self.run = Run(
            Path(spec["runs"]),
            spec["config"],
            id=spec["run_id"],
            number=spec["index"],
            wandb=Wandb(**spec["wandb"]),
            attempt=spec["attempt"],
            takeover=True,
            record=spec["record"] | {"trial": spec["index"]},
            device=device,
        )
        self.tracker = self.run.tracker  # which outlives the run's end
        self.watchdog.close()
        self.watchdog = Watchdog(self.run.path.directory / STACKS, stall)
        self.watchdog.phase()
        self.stop = _stop(request, spec["index"])
        self.training = train(
            self.run,
            Path(spec["data"]),
            device,
            spec["rungs"],
            stop=self.stop,
            after_step=self._after_step,
            share=share,
        )

        return [(epoch, line["loss_valid"]) for epoch, line in self.run.lines.items()]

    def _after_step(self, state: Any) -> None:
        self.watchdog.step()

        if self.leaving():
            self.stop.signal = SIGTERM

        if state.step == len(state.losses):  # the epoch's last
            self.watchdog.phase()

    def _advance(self, values: list[tuple[int, float]]) -> str:
        assert self.training is not None
        start = time.monotonic()

        for metrics in self.training:
            epoch = metrics["epoch"]
            values.append((epoch, metrics["loss_valid"]))
            self.watchdog.phase()

            if epoch == self.run.config["epochs"]:
                continue  # the loop's last turn finishes the run

            if epoch in self.spec["rungs"] or time.monotonic() - start > REPORT_SECONDS:
                return "running"

        return "complete"

    def _finals(self) -> list[float] | None:
        from .outcome import finals

        objectives = self.spec.get("objectives") or ()

        return finals(self.run.path, objectives) if len(objectives) > 1 else None

    def _keep(self, error: str) -> None:
        if self.run is not None:
            write_atomic(self.run.path.error, error.encode())

    def close(self, status: str) -> None:
        r"""Ends the attempt: checkpoint, W&B, lease. Never raises, and may be repeated."""

        run, training, watchdog = self.run, self.training, self.watchdog
        self.run = self.training = self.watchdog = None

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

        if watchdog is not None:
            watchdog.close()

        if run is not None:
            give_memory_back()  # before a smaller network comes, or nothing for a while

    def cleanup(self) -> None:
        self.close("interrupted")


def limit(share: float, total: int) -> float:
    r"""Returns the part of a GPU of `total` bytes that torch may take of a trial's share."""

    return max(share / 2, share - CONTEXT / total)


def _stop(request: Path, index: int) -> Any:
    r"""Returns the wish to stop that is expressed by the existence of a file.

    The file `request` is meant for all trials of the sweep, `request.N` for run N `alone`.
    """

    from .train import Stop

    class Request(Stop):
        looked = 0.0
        number: int | None = None
        alone = False

        @property
        def signal(self) -> int | None:
            if self.number is None and time.monotonic() - self.looked > LOOK_SECONDS:
                self.looked = time.monotonic()
                names: list[str] = []

                with suppress(OSError):  # a file system away for a while
                    # A listing is fresh on NFS, where the absence of a file may be remembered
                    names = os.listdir(request.parent)

                self.alone = f"{request.name}.{index}" in names
                self.number = SIGTERM if self.alone or request.name in names else None

            return self.number

        @signal.setter
        def signal(self, number: int | None) -> None:
            self.number = number

    return Request()
