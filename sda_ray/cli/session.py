r"""Trainings as a person runs them: with progress, Ctrl-C, and what to do next."""

import os
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..core import (
    NETWORK,
    Config,
    LeaseGone,
    LeaseLost,
    ProgressBar,
    UserError,
    check_config,
    is_alive,
    load_config,
    say,
)
from ..data import DataInfo, check_data
from ..nn import load_network
from ..runs import (
    Interrupted,
    OutOfMemory,
    Run,
    RunPath,
    Stop,
    Wandb,
    check_extension,
    check_same_data,
    default_device,
    describe_extension,
    entries,
    is_off,
    read_record,
    train_run,
)
from ..training import Diverged, check_compiler
from .render import REMEDY


def start_run(
    runs: Path,
    data: Path,
    config: Config,
    device: str | None,
    wandb: Wandb,
    init: str | None = None,
    extend: str | None = None,
    new: bool = False,
) -> None:
    r"""Trains a run from scratch, from the weights of another one, or as a longer version of it.

    One like it that was stopped is resumed, unless a `new` one is wanted.

    Arguments:
        config: The settings; of a longer version, those that change.
        init: The run whose weights it starts from.
        extend: The run of which it is a longer version, from where the two part.
    """

    info = _check_data(data)
    record: dict[str, Any] = {"data": info.fingerprint}
    parent = None

    if name := init or extend:
        parent = RunPath.find(runs, name)
        record["parent"] = parent.id

    if parent and extend:
        config = check_extension(parent, config)
        record["extends"] = parent.id

    config = check_config(config, size=info.size, length=info.length)
    device = check_device(device, config)

    if parent and init:
        _check_init(parent, config, info.size)

    if not new and (path := _stopped(runs, config, record)):
        resume_run(runs, data, str(path.directory), device, wandb, info=info)
        return

    if parent and extend:
        record |= describe_extension(parent, info.fingerprint, device)

    record["wandb"] = asdict(wandb)
    run = Run(runs, config, wandb=wandb, record=record, device=device)
    _follow(run, data, device, parent)


def resume_run(
    runs: Path,
    data: Path,
    name: str,
    device: str | None,
    wandb: Wandb | None = None,
    takeover: bool = False,
    info: DataInfo | None = None,
) -> None:
    r"""Resumes a run from its newest checkpoint, and logs to W&B as before by default.

    The data are checked, unless their `info` is given.
    """

    path = RunPath.find(runs, name)
    record = _check_resume(path)

    if record.get("status") == "finished" and path.state.is_file():
        say(f"{path.directory.name} is finished: {path.state}")
        return

    info = info or _check_data(data)

    check_same_data(path, record, info.fingerprint)
    config = load_config(path.config, info.size, info.length)
    parent = RunPath.of_id(runs, record["parent"]) if record.get("parent") else None
    device = check_device(device, config)
    run = Run(
        path.directory.parent,
        config,
        path.id,
        wandb=wandb or Wandb.from_record(record.get("wandb"), path.record),
        takeover=takeover,
        device=device,
    )
    _follow(run, data, device, parent)


def _check_data(data: Path) -> DataInfo:
    info = check_data(data)

    for line in info.warnings:
        say(f"Note: {line}")

    return info


def _stopped(runs: Path, config: Config, record: dict[str, Any]) -> RunPath | None:
    r"""Returns the run of a config and a record that was stopped last, and says so."""

    stopped = [
        entry
        for entry in entries(runs)
        if entry.status in ("running", "interrupted", "failed") and entry.sweep is None
        if entry.config == config
        if all(entry.record.get(key) == record.get(key) for key in ("data", "parent", "extends"))
    ]

    for entry in sorted(stopped, key=lambda entry: str(entry.record.get("updated")), reverse=True):
        if not is_alive(entry.path.lease):  # on a host that has died, it seems to run for a minute
            name = entry.path.directory.name
            say(f"{name} has the same settings and data, and is resumed. --new starts another.")
            return entry.path

    return None


def _check_resume(path: RunPath) -> dict[str, Any]:
    r"""Returns the record of a run that can be resumed by itself."""

    name = path.directory.name

    if RunPath.of_id(path.directory.parent, path.id) != path:
        raise UserError(
            f"{path.directory} cannot be resumed: a run is a directory of its own "
            "{name}_{id}, with an id of 8 characters a-z and 0-9. Start from its weights with "
            "`sda-ray train --init`."
        )

    if not path.config.is_file():
        raise UserError(f"{name} has no config.json: it was stopped before it began. Remove it.")

    record = read_record(path)

    if record.get("sweep"):
        raise UserError(
            f"{name} belongs to sweep '{record['sweep']}', which decides how far it goes: carry "
            f"on with `sda-ray sweep {shlex.quote(record['sweep'])}`."
        )

    if record.get("status") == "diverged":
        raise UserError(
            f"{name} diverged ({record.get('reason')}), and would do so again. Start another with "
            f"`sda-ray train --config {shlex.quote(path.id)} learning_rate=…`."
        )

    return record


def _check_init(parent: RunPath, config: Config, size: int) -> None:
    theirs = load_config(parent.config)
    differs = [f"{k} is {config[k]}, not {theirs[k]}" for k in NETWORK if config[k] != theirs[k]]

    if differs:
        raise UserError(
            f"the weights of {parent.directory.name} do not fit: {'; '.join(differs)}. Only "
            "settings that leave the network as it is can change."
        )

    own = load_network(parent.directory)[0].state_dict()["kernel.forcing"].shape[-1]

    if own != size:
        raise UserError(
            f"the weights of {parent.directory.name} are for fields of {own}x{own}, but the "
            f"data are {size}x{size}."
        )


def check_device(device: str | None, config: Config) -> str:
    r"""Returns the name of a device, the default one if none is given.

    Raises:
        UserError: If it cannot be used, or a config that is compiled cannot be compiled for it.
    """

    name = device or default_device()

    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise UserError(f"device is '{name}', but must be cpu, cuda or cuda:N.")

        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used: {error}") from error

    check_compiler(config["compile"], torch.device(name))

    return name


def _follow(run: Run, data: Path, device: str, parent: RunPath | None) -> None:
    r"""Trains an open run to its end, and shows it."""

    path, total, done = run.path, run.config["epochs"], max(run.lines, default=0)
    say(f"run {path.directory.name}: {total} epochs on {device} in {path.directory}")
    init = parent.directory if parent is not None else None
    status, code = "failed", 1

    try:
        with Stop().on_signals() as stop, ProgressBar("epoch", total, done) as progress:
            for metrics in train_run(run, data, device, init=init, stop=stop):
                losses = (f"{key} {metrics[key]:.4f}" for key in ("loss_train", "loss_valid"))
                progress.update(metrics["epoch"], ", ".join(losses))

        status, code = "finished", 0
        say(f"finished: {os.path.relpath(path.state)}, {os.path.relpath(path.samples)}")

        if is_off(std := run.lines.get(total, {}).get("sample_std")):
            say(f"Its samples have {std:.3g} times the standard deviation of the data: {REMEDY}.")
    except (Interrupted, KeyboardInterrupt):
        status, code = "interrupted", 128 + (stop.signal or signal.SIGINT)
        say(f"Stopped. Resume with `sda-ray train --resume {path.id}`.")
    except Diverged as error:
        status, code = "diverged", 1
        say(f"diverged: {error}. Try a smaller learning_rate.", file=sys.stderr)
    except LeaseLost as error:
        say(f"{error}: this process stops.", file=sys.stderr)
    except (OutOfMemory, LeaseGone) as error:
        say(f"sda-ray: {error}", file=sys.stderr)
    except UserError:  # the disk is full at the end
        status = "interrupted"
        raise
    finally:
        run.close(status)

    if code:
        sys.exit(code)
