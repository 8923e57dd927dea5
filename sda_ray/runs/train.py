r"""The training of one run, from its config to its weights, or from the epochs of a shorter one.

The first epochs of a run with a `constant` schedule, or before the decay of a `wsd` one, do not
depend on how many follow. So a longer run may start from a checkpoint of a shorter one, which it
extends, and ends in the same bits as if it had trained all epochs itself.
"""

import functools
import logging
import resource
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..core import (
    Config,
    LeaseGone,
    LeaseLost,
    UserError,
    check_present,
    is_out_of_memory,
    keep_memory,
    load_config,
    on_signals,
)
from ..data import DataChanged, TrajectoryDataset, fingerprint
from ..nn import load_network, make_deterministic
from ..training import (
    Denoising,
    Diverged,
    Ensembles,
    Measure,
    Metrics,
    Samples,
    TrainState,
    Validation,
    epochs,
    steady_epochs,
    validate,
)
from .checkpoint import read_checkpoint
from .metrics import read_history
from .path import RunPath
from .record import check_same_data, differences, provenance, read_record
from .run import Run

logger = logging.getLogger(__name__)

RESIDENT = 1 / 8  # share of a GPU's memory that the data may take; a plan leaves as much free


class Interrupted(RuntimeError):
    r"""Raised if a training was asked to stop. Its text is empty once a checkpoint is saved."""


class OutOfMemory(RuntimeError):
    r"""Raised if a training does not fit into the memory. The message says what to do."""


class Stop:
    r"""A stop flag, which a training reads after every step."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def on_signals(self) -> Iterator["Stop"]:
        r"""Sets the flag on SIGINT, SIGTERM, SIGHUP and SIGQUIT, unless they are ignored.

        A second SIGINT interrupts at once.
        """

        def handle(number: int) -> None:
            if self.signal == signal.SIGINT == number:
                raise KeyboardInterrupt

            self.signal = number

        with on_signals(handle):
            yield self


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def train_run(
    run: Run,
    data: Path,
    device: str = "cpu",
    rungs: Iterable[int] = (),
    init: Path | None = None,
    stop: Stop | None = None,
    after_step: Callable[[TrainState], None] | None = None,
    share: float = 1.0,
) -> Iterator[Metrics]:
    r"""Trains a score network and yields the metrics of each epoch.

    Everything that an epoch leaves on disk is there before its metrics are yielded, so the caller
    may stop, or be killed, at any yield. Closing the generator saves a checkpoint. A run that has
    a checkpoint is resumed from it.

    Arguments:
        data: The directory of `train.h5` and `valid.h5`.
        rungs: Epochs at which the run is judged, by several draws, and a checkpoint is saved.
        init: The directory of a run to start from: from its weights, or from its checkpoint if the
            record says that this run extends it.
        stop: The stop flag.
        after_step: Called after every step, when all that it leaves on disk is there.
        share: The share of a GPU's memory that belongs to this training.

    Raises:
        DataChanged: If the data are not those that the record names.
        Diverged: If the loss is not finite or has exploded. The run is marked `diverged`.
        Interrupted: If the stop flag is set. A checkpoint is saved, unless the disk is full.
        OutOfMemory: If the memory is too small.
        LeaseGone: If the run's directory is gone.
    """

    config, cuda = run.config, torch.device(device).type == "cuda"

    with _memory(config["batch_size"], device):
        if cuda:
            make_deterministic()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            keep_memory()

        # Data
        trainset = TrajectoryDataset(data / "train.h5", window=config["window"])
        validset = TrajectoryDataset(data / "valid.h5", window=config["window"])

        if "data" in run.record and fingerprint(data) != run.record["data"]:
            raise DataChanged(
                f"the data in {data} are no longer those that {run.path.directory.name} was "
                "started with. Put them back."
            )

        if cuda:
            free, total = torch.cuda.mem_get_info(device)
            trainset.move(device, limit=int(RESIDENT * min(free, share * total)))

        seed = config["valid_seed"]
        validation = Validation(validset, device, seed=seed)

        rungs = {*rungs, *run.record.get("rungs", ())}  # a run may be resumed without its sweep
        samples = Samples(validation, len(trainset), rungs)
        measures = make_measures(run.record.get("measured", {}), validset, device, seed)

        # Network
        state = TrainState(config, size=trainset.shape[-1], device=device)
        run.load(state)

        if state.saved is None and init is not None and "extends" in run.record:
            again = functools.partial(validate, state, validation, rungs, samples, measures)
            _carry_over(run, state, RunPath(init), again)
        elif state.saved is None and init is not None:
            state.begin(load_network(init)[0].state_dict())
            run.save(state)
        elif state.saved is None and "parent" in run.record:
            raise UserError(
                f"{run.path.directory.name} has no checkpoint, and started with the weights of "
                f"run '{run.record['parent']}', which is gone. Start a new run."
            )

        # Training
        def end_step(state: TrainState) -> None:
            stopping = stop is not None and stop.signal is not None

            if stopping or run.due:
                run.save(state)

            if after_step is not None:
                after_step(state)

            if stopping:
                unsaved = state.saved != state.position
                raise Interrupted("no checkpoint could be saved" if unsaved else "")

        saved = {*rungs, config["epochs"], steady_epochs(config)}

        try:
            for metrics in epochs(state, trainset, validation, end_step, rungs, samples, measures):
                metrics["memory"] = _used(device)
                run.log(metrics)

                if metrics["epoch"] in saved or run.due:
                    run.save(state)

                yield metrics
        except GeneratorExit:  # the caller stops here
            with suppress(LeaseLost, LeaseGone):
                run.save(state)

            raise
        except Diverged as error:
            try:
                run.record.write("diverged", reason=str(error))
            except OSError as full:  # the divergence is a result even so
                check_present(run.path.lease)
                logger.warning("%s keeps its status: %s.", run.path.record, full)

            raise

        run.finish(state, samples)


def make_measures(
    measured: Mapping[str, int],
    validset: TrajectoryDataset,
    device: str | torch.device,
    seed: int = 0,
) -> dict[str, Measure]:
    r"""Returns the measures that the record of a run names, by which runs of any window compare.

    Arguments:
        measured: The number of states that each is measured over, the same for all runs compared.
        validset: The trajectories of `valid.h5`, with the window of the run.
        seed: The seed of what they draw.

    Raises:
        UserError: If there are too few states for the window.
    """

    kinds: dict[str, Any] = {"denoising": Denoising, "skill": Ensembles}

    for name, states in measured.items():
        if name not in kinds:
            raise UserError(
                f"run.json names the measure '{name}', but there is {', '.join(kinds)}."
            )

        if 2 * validset.window - 1 > states:
            raise UserError(
                f"window is {validset.window}, but the {name} of this sweep is measured over "
                f"{states} states, enough for windows up to {(states + 1) // 2}: its SPACE was not "
                "seen to draw larger ones. Start another sweep whose CONFIG has the largest window."
            )

    return {
        name: kinds[name](validset, states, device, seed=seed) for name, states in measured.items()
    }


@contextmanager
def _memory(batch_size: int, device: str) -> Iterator[None]:
    r"""Raises any lack of memory as :class:`OutOfMemory`."""

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise

        if torch.device(device).type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        raise OutOfMemory(
            f"out of memory on {device}, with batch_size {batch_size} and a peak of "
            f"{peak / 2**30:.2f} GiB before the allocation that failed. Use a smaller batch_size "
            "or network, or give each trial more (--gpus-per-trial, --cpus-per-trial)."
        ) from error


def _used(device: str) -> float:
    r"""Returns the GB that a training takes: at most so far on a GPU, else by its process now."""

    cuda = torch.device(device).type == "cuda"
    used = torch.cuda.max_memory_allocated(device) if cuda else psutil.Process().memory_info().rss

    return round(used / 1e9, 3)


# Longer runs


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

    record = read_record(path)
    check_same_data(path, record, fingerprint)
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
            path.directory.name,
            " and ".join(differs),
        )

    return described


def find_start(path: RunPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    r"""Returns the newest checkpoint of a run that every longer run has in common with it.

    Raises:
        UserError: If there is none.
    """

    last = steady_epochs(load_config(path.config)), 0
    damaged = []

    for file in (path.checkpoint, path.previous, path.decay):
        if file.is_file():
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


def _carry_over(
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
