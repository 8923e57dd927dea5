r"""Ray Tune's view of a run.

Tune receives numbers only: the run's directory, its checkpoints and its resumption are ours. A
trial's process is kept for the next trial, so that everything ends in :meth:`Trial.close`.
"""

import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.tune import Trainable

__all__ = ["REPORT_SECONDS", "Trial"]

REPORT_SECONDS = 2.0  # epochs shorter than this are reported together


class Trial(Trainable):
    r"""Creates a trial: one run, or a stretch of one between two rungs.

    Its config has `runs`, `data`, `config`, `run_id`, `index`, `attempt`, `rungs`, `record`,
    `wandb` and `cpus`. A step trains for 2 s or up to the next rung and returns `epochs`, the list
    of (epoch, value), and `event`: `running`, `finished`, `diverged` or `failed`.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.spec = config
        self.run: Any = None
        self.training: Iterator[dict[str, Any]] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.close("interrupted")
        self.setup(new_config)

        return True

    def step(self) -> dict[str, Any]:
        from .training import Diverged

        values: list[tuple[int, float]] = []

        try:
            if self.training is None:
                values += self._open()

            return {"event": self._advance(values), "epochs": values, "error": ""}
        except Diverged as error:
            self.close("diverged")
            return {"event": "diverged", "epochs": values, "error": str(error)}
        except Exception as error:  # a bug or a bad configuration: told once, not tried again
            self._keep(traceback.format_exc())
            self.close("failed")
            reason = f"{type(error).__name__}: {error}"
            return {"event": "failed", "epochs": values, "error": reason}

    def _open(self) -> list[tuple[int, float]]:
        r"""Opens the run and returns the values that it has already."""

        import ray
        import torch

        from .runs import Run, Wandb
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
            record=spec["record"],
            device=device,
        )
        self.training = train(self.run, Path(spec["data"]), device, spec["rungs"])

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

        self.close("finished")

        return "finished"

    def _keep(self, error: str) -> None:
        if self.run is not None:
            self.run.path.error.write_text(error)

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

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert not os.listdir(checkpoint_dir), "Tune keeps no checkpoints of ours"
