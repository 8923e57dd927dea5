r"""Reproduction of a run: its first epochs are trained again, elsewhere, and compared bit for bit."""

import itertools
import math
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
        UserError: If it is not recorded, or belongs to a run that is gone.
    """

    if not (attempts := _start(path)[0].get("attempts")):
        raise UserError(
            f"{path.directory.name} cannot be reproduced: no run.json says where it was trained, "
            "as for runs of SDA's own code, exports and adopted runs."
        )

    return attempts[0]


def reproduce_run(
    path: RunPath, config: Config, data: Path, epochs: int, device: str
) -> tuple[str, list[str]]:
    r"""Trains the first epochs of a run again, in a temporary directory, and compares the losses.

    The run itself is only read. A longer version of another is trained from that one's start.

    Returns:
        Where the bits differ, or an empty text; and what else does, one sentence each.

    Raises:
        UserError: If the run has fewer epochs, the data are not those of the run, or the weights
            that it started from are gone.
        OutOfMemory: If the memory is too small.
    """

    record, before = read_record(path), read_history(path.metrics)

    if missing := {*range(1, epochs + 1)} - before.keys():
        raise UserError(
            f"--epochs is {epochs}, but {path.directory.name} has no epoch {min(missing)}."
        )

    if "data" in record and not has_fingerprint(data, record["data"]):
        raise UserError(
            f"{path.directory.name} was trained on other data than {data}. Give the directory of "
            "its data with --data."
        )

    keys: tuple[str, ...] = ("data", "rungs")
    kept = {key: record[key] for key in keys if key in record}
    fault, init = "", _start(path)[1]

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

                    if fault := _compare(before[metrics["epoch"]], metrics):
                        break
        except Diverged as error:
            fault = f"it diverged, which the run did not: {error}"
        finally:
            run.close("stopped")

        causes = _causes(first_attempt(path), run.record["attempts"][-1])

    if fault and not record.get("exact", True):
        causes.append("The run itself resumed elsewhere, or a repeated epoch of it differs.")

    return fault, causes


def _start(path: RunPath) -> tuple[dict[str, Any], Path | None]:
    r"""Returns the record of the run that trained the first epochs of a run, of which that may be
    a longer version, and the run with whose weights it started, if not from scratch."""

    record = read_record(path)

    while "parent" in record:
        if (parent := RunPath.of_id(path.directory.parent, record["parent"])) is None:
            raise UserError(
                f"{path.directory.name} started from run '{record['parent']}', which is not in "
                f"{path.directory.parent}. Put that run back."
            )

        if "extends" not in record:
            return record, parent.directory

        record = read_record(parent)

    return record, None


def _compare(before: Metrics, now: Metrics) -> str:
    r"""Says how the losses of an epoch differ from those recorded, or nothing."""

    differ = [key for key in LOSSES if before.get(key) != now[key]]
    texts = [f"{key} {before.get(key)!r} then, {now[key]!r} now" for key in differ]
    error = before.get("loss_valid_se", 0.0)

    if differ and error > 0:
        share = max(abs(now[key] - before.get(key, math.nan)) for key in differ) / error
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
