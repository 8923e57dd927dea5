r"""Ray Tune's view of a run.

Tune receives numbers only: the run's directory, its checkpoints and its resumption are ours. A
trial's process is kept for the next trial, so that everything ends in :meth:`Trial.close`.
"""

import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM
from typing import Any

from ray.tune import Trainable

from .files import write_atomic

__all__ = ["REPORT_SECONDS", "Trial"]

REPORT_SECONDS = 2.0  # epochs shorter than this are reported together
LOOK_SECONDS = 0.2  # between two looks for the wish to stop


class Trial(Trainable):
    r"""Creates a trial: one run, or a stretch of one between two rungs.

    Its config has `runs`, `data`, `config`, `run_id`, `index`, `attempt`, `rungs`, `record`,
    `wandb`, `cpus` and `request`. A step trains for 2 s or up to the next rung and returns
    `epochs`, the list of (epoch, value); `event`: `running`, `complete`, `diverged`, `interrupted`
    or `failed`; `error`; and `unreached`, whether W&B's server has failed this attempt. After all
    events but the first the attempt has ended.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.spec = config
        self.run: Any = None
        self.tracker: Any = None
        self.training: Iterator[dict[str, Any]] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.close("interrupted")
        self.setup(new_config)

        return True

    def step(self) -> dict[str, Any]:
        from .presence import Vanished
        from .train import Interrupted, OutOfMemory
        from .training import Diverged

        values: list[tuple[int, float]] = []
        event, error = "running", ""

        try:
            if self.training is None:
                values += self._open()

            event = self._advance(values)
        except Interrupted:
            event = "interrupted"
        except Diverged as e:
            event, error = "diverged", str(e)
        except (OutOfMemory, Vanished) as e:
            event, error = "failed", str(e)
        except Exception as e:  # a bug or a bad configuration: told once, not tried again
            event, error = "failed", f"{type(e).__name__}: {e}"
            self._keep(traceback.format_exc())

        if event != "running":
            self.close("finished" if event == "complete" else event)

        unreached = self.tracker is not None and self.tracker.failed

        return {"event": event, "epochs": values, "error": error, "unreached": unreached}

    def _open(self) -> list[tuple[int, float]]:
        r"""Opens the run and returns the values that it has already."""

        import ray
        import torch

        from .runs import Run
        from .tracking import Wandb
        from .train import train

        spec = self.spec
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        torch.set_num_threads(max(1, int(spec["cpus"])))

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
        stop = _stop(Path(spec["request"]))
        self.training = train(self.run, Path(spec["data"]), device, spec["rungs"], stop=stop)

        return [(epoch, line["loss_valid"]) for epoch, line in self.run.lines.items()]

    def _advance(self, values: list[tuple[int, float]]) -> str:
        assert self.training is not None
        start = time.monotonic()

        for metrics in self.training:
            epoch = metrics["epoch"]
            values.append((epoch, metrics["loss_valid"]))

            if epoch == self.run.config["epochs"]:
                continue  # the loop's last turn finishes the run

            if epoch in self.spec["rungs"] or time.monotonic() - start > REPORT_SECONDS:
                return "running"

        return "complete"

    def _keep(self, error: str) -> None:
        if self.run is not None:
            write_atomic(self.run.path.error, error.encode())

    def close(self, status: str) -> None:
        r"""Ends the attempt: checkpoint, W&B, lease. Never raises, and may be repeated."""

        run, training = self.run, self.training
        self.run = self.training = None

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

    def cleanup(self) -> None:
        self.close("interrupted")


def _stop(request: Path) -> Any:
    r"""Returns the wish to stop that is expressed by the existence of a file."""

    from .train import Stop

    class Request(Stop):
        looked = 0.0
        number: int | None = None

        @property
        def signal(self) -> int | None:
            if self.number is None and time.monotonic() - self.looked > LOOK_SECONDS:
                self.looked = time.monotonic()
                self.number = SIGTERM if request.exists() else None

            return self.number

        @signal.setter
        def signal(self, number: int | None) -> None:
            self.number = number

    return Request()
