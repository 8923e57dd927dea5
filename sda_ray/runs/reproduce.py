r"""Reproduction of a run: its first epochs are trained again, elsewhere, and compared bit for bit."""

import itertools
import math
import shlex
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from ..core import Config, ProgressBar, UserError
from ..data import has_fingerprint
from ..training import Diverged, Metrics
from .metrics import read_history
from .path import RunPath
from .record import differences, read_record
from .run import Run
from .tracking import Wandb
from .train import train_run

LOSSES = ("loss_train", "loss_valid")


def first_attempt(path: RunPath) -> dict[str, Any]:
    r"""Returns the provenance of the first epochs of a run.

    Raises:
        UserError: If it is not recorded.
    """

    record = read_record(path)

    if not record.get("attempts"):
        raise UserError(
            f"{path.directory.name} cannot be reproduced: no run.json says where it was trained, "
            "as for runs of SDA's own code, exports and adopted runs."
        )

    return record["attempts"][0]


def reproduce_run(
    path: RunPath, config: Config, data: Path, epochs: int, device: str
) -> tuple[str, list[str]]:
    r"""Trains the first epochs of a run again, in a temporary directory, and compares the losses.

    The run itself is only read. One that extends another is trained from scratch.

    Returns:
        Where the bits differ, or an empty text; and what else does, one sentence each.

    Raises:
        UserError: If the run has fewer epochs, the data are not those of the run, or the weights
            that it started from are gone.
        OutOfMemory: If the memory is too small.
    """

    record, before = read_record(path), read_history(path.metrics)

    if epochs > (last := max(before, default=0)):
        raise UserError(f"--epochs is {epochs}, but {path.directory.name} has {last} epochs.")

    if "data" in record and not has_fingerprint(data, record["data"]):
        raise UserError(
            f"{path.directory.name} was trained on other data than {data}. Give the directory of "
            "its data with --data."
        )

    keys: tuple[str, ...] = ("data", "rungs")
    kept = {key: record[key] for key in keys if key in record}
    fault, init = "", _parent(path, record)

    with tempfile.TemporaryDirectory(prefix="sda-ray-") as directory:
        wandb = Wandb("disabled")
        run = Run(
            Path(directory), config, wandb=wandb, record=kept, device=device, interval=math.inf
        )

        try:
            with (
                ProgressBar("epoch", epochs) as bar,
                closing(train_run(run, data, device, init=init)) as training,  # type: ignore[type-var]
            ):
                for metrics in itertools.islice(training, epochs):
                    bar.update(metrics["epoch"], f"loss_valid {metrics['loss_valid']:.4f}")

                    if fault := _compare(before.get(metrics["epoch"], {}), metrics):
                        break
        except Diverged as error:
            fault = f"it diverged, which the run did not: {error}"
        finally:
            run.close("stopped")

        causes = _causes(first_attempt(path), run.record["attempts"][-1])

    if fault and not record.get("exact", True):
        causes.append("The run itself resumed elsewhere, or a repeated epoch of it differs.")

    return fault, causes


def _parent(path: RunPath, record: dict[str, Any]) -> Path | None:
    r"""Returns the run from whose weights a run started, if it did not start from scratch."""

    if "parent" not in record or "extends" in record:
        return None

    if (parent := RunPath.of_id(path.directory.parent, record["parent"])) is None:
        raise UserError(
            f"{path.directory.name} started with the weights of run '{record['parent']}', which "
            f"is not in {path.directory.parent}. Put that run back, or train from scratch with "
            f"`sda-ray train --config {shlex.quote(str(path.config))}`."
        )

    return parent.directory


def _compare(before: Metrics, now: Metrics) -> str:
    r"""Says how the losses of an epoch differ from those recorded, or nothing."""

    differ = [key for key in LOSSES if key in before and before[key] != now[key]]
    texts = [f"{key} {before[key]!r} then, {now[key]!r} now" for key in differ]
    error = before.get("loss_valid_se", 0.0)

    if differ and error > 0:
        share = max(abs(now[key] - before[key]) for key in differ) / error
        texts.append(f"at most {share:.2g} times the standard error of loss_valid")

    return f"epoch {now['epoch']} differs: {'; '.join(texts)}" if differ else ""


def _causes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    r"""Returns how two provenances differ, one sentence each."""

    def value(key: str, attempt: dict[str, Any]) -> str:
        if key == "code":
            changed = " with changes" if attempt.get("dirty") else ""
            return f"{str(attempt['code'])[:12]}, commit {attempt.get('commit')}{changed}"

        return str({**attempt.get("versions", {}), **attempt}.get(key))

    return [
        f"Different {key}: {value(key, before)} then, {value(key, now)} now."
        for key in differences(before, now)
    ]
