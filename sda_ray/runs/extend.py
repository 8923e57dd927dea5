r"""Extends runs: a longer run starts from the epochs that it has in common with a shorter one.

The first epochs of a run with a `constant` schedule, or before the decay of a `wsd` one, do not
depend on how many follow. So a longer run starts from a checkpoint of the shorter one, and ends in
the same bits as if it had trained all epochs itself.
"""

import logging
import shlex
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core import Config, UserError, load_config
from ..training import Metrics, TrainState, steady_epochs
from .checkpoint import keep_checkpoint, read_checkpoint
from .metrics import read_history
from .path import RunPath
from .record import differences, provenance, read_record
from .run import Run

logger = logging.getLogger(__name__)


def check_extension(path: RunPath, changes: Config) -> Config:
    r"""Returns the config of a longer version of a run. Its `epochs` alone may change.

    Raises:
        UserError: If the longer run would differ from one that is trained at once.
    """

    config, name = load_config(path.config), path.directory.name
    init = f"sda-ray train --init {shlex.quote(path.id)}"

    if set(changes) != {"epochs"}:
        raise UserError(
            f"a run is extended by epochs=N alone, not {', '.join(sorted(changes)) or 'nothing'}. "
            f"For other settings start a run from its weights: {init} key=value"
        )

    if changes["epochs"] <= config["epochs"]:
        raise UserError(
            f"epochs is {changes['epochs']}, but must be above {config['epochs']}, the epochs of "
            f"{name}."
        )

    if not steady_epochs(config):
        raise UserError(
            f"{name} cannot be extended to the same result as a longer run: its scheduler "
            f"'{config['scheduler']}' decays over all epochs, and that of one to be extended is "
            f"constant or wsd. Start from its weights: {init} epochs={changes['epochs']}"
        )

    return config | changes


def describe_extension(path: RunPath, fingerprint: str, device: str) -> dict[str, Any]:
    r"""Returns the entries about a run in the record of a longer version of it.

    The longer version trains on the data of a fingerprint, on a device.

    Raises:
        UserError: If the run was trained on other data, or has no checkpoint to start from.
    """

    record, name = read_record(path), path.directory.name

    if record.get("data", fingerprint) != fingerprint:
        raise UserError(
            f"{name} was trained on other data. Give the directory of its data with --data."
        )

    find_start(path)
    described = {"parent": path.id, "extends": path.id, "exact": record.get("exact", False)}
    judged = ("rungs", "objective", "measured")  # as it was
    described |= {key: record[key] for key in judged if record.get(key)}

    first = (record.get("attempts") or [{}])[0]

    if first and (differs := differences(first, provenance(device))):
        described["exact"] = False
        logger.warning(
            "%s was trained with another %s: the bits of the longer run may differ from those of "
            "one that is trained at once.",
            name,
            " and ".join(differs),
        )

    return described


def find_start(path: RunPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    r"""Returns the newest checkpoint of a run that every longer run has in common with it.

    Raises:
        UserError: If there is none.
    """

    config = load_config(path.config)
    last = steady_epochs(config), 0
    damaged = []

    for file in (path.checkpoint, path.previous, path.decay):
        if not file.is_file():
            continue

        try:
            tensors, info = read_checkpoint(file)
        except ValueError as error:
            damaged.append(f"; {error}")
            continue

        if (info["epoch"], info["step"]) <= last:
            return tensors, info

    raise UserError(
        f"{path.directory.name} has no checkpoint of epoch {last[0]} or before to start "
        f"from{''.join(damaged)}. Start a run from its weights: sda-ray train --init "
        f"{shlex.quote(path.id)}"
    )


def carry_over(
    run: Run, state: TrainState, parent: RunPath, validate: Callable[[], Metrics]
) -> None:
    r"""Starts a run from the checkpoint and the metrics that it has in common with a shorter one.

    It may be killed at any time and repeated: the checkpoint comes last. The last epoch of the
    shorter run, which several draws judged, may be an ordinary one of this run: it is validated
    again.
    """

    try:
        tensors, info = find_start(parent)
        state.load(tensors, info)
    except ValueError as error:
        raise UserError(f"the checkpoint of {parent.directory.name} cannot be used: {error}.")

    for epoch, metrics in sorted(read_history(parent.metrics).items()):
        if epoch <= state.epoch:
            ended = epoch == state.epoch == load_config(parent.config)["epochs"]
            judged = ("sample_", *run.record.get("measured", ()))
            kept = {k: x for k, x in metrics.items() if not (ended and k.startswith(judged))}
            run.log(kept | (validate() if ended else {}))

    state.saved = None
    run.save(state)


def keep_start(run: Run, state: TrainState) -> None:
    r"""Keeps the checkpoint at the start of a decay, if the run is there."""

    steady = steady_epochs(run.config)

    if state.saved == state.position == (steady, 0) and steady < run.config["epochs"]:
        try:
            keep_checkpoint(run.path, run.lease.hold)
        except OSError as error:
            logger.warning(
                "%s cannot be kept, so the run cannot be extended later: %s.",
                run.path.decay,
                error,
            )
