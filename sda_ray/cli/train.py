r"""Single trainings as a person runs them: with progress, Ctrl-C, and what to do next."""

import functools
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..core import (
    CONFIG,
    NETWORK,
    Config,
    LeaseGone,
    LeaseLost,
    ProgressBar,
    UserError,
    check_config,
    load_config,
    parse_overrides,
)
from ..data import check_data
from ..nn import load_network
from ..runs import (
    CHECKPOINT_SECONDS,
    Interrupted,
    OutOfMemory,
    Run,
    RunPath,
    Stop,
    Wandb,
    check_extension,
    default_device,
    describe_extension,
    read_record,
    train_run,
)
from ..training import Diverged
from .arguments import Args
from .sweep import launch_options, wandb_options

__all__ = [
    "extend_run",
    "resume_run",
    "simulate_command",
    "start_replicas",
    "start_run",
    "train_command",
]

THREADS = 4096  # torch takes any number, and fails later on what it cannot start


def start_run(
    runs: Path,
    data: Path,
    config: Config,
    init: str | None,
    device: str | None,
    wandb: Wandb,
    interval: float = CHECKPOINT_SECONDS,
) -> None:
    r"""Trains a new run.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        config: The config.
        init: The run whose weights to begin with.
        device: Where to train, by default on a GPU if there is one.
        wandb: How to log to W&B.
        interval: The least time between two checkpoints, in seconds.
    """

    info = check_data(data)
    config = check_config(config, size=info.size, length=info.length)
    record: dict[str, Any] = {"data": info.fingerprint, "wandb": asdict(wandb)}
    device = _check_device(device)
    parent = None

    if init is not None:
        parent = RunPath.find(runs, init)
        _check_init(parent, config, info.size)
        record["parent"] = parent.id

    run = Run(runs, config, wandb=wandb, record=record, device=device, interval=interval)
    _follow(run, data, device, parent)


def extend_run(
    runs: Path,
    data: Path,
    name: str,
    changes: Config,
    device: str | None,
    wandb: Wandb,
    interval: float = CHECKPOINT_SECONDS,
) -> None:
    r"""Trains a longer version of a run, from where the two part; the run itself stays as it is.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        name: The run, see :meth:`sda_ray.runs.checkpoint.RunPath.find`.
        changes: The settings that change: `epochs`.
        device: Where to train, by default on a GPU if there is one.
        wandb: How to log to W&B.
        interval: The least time between two checkpoints, in seconds.
    """

    info = check_data(data)
    path = RunPath.find(runs, name)
    config = check_config(check_extension(path, changes), size=info.size, length=info.length)
    device = _check_device(device)
    record = describe_extension(path, info.fingerprint, device)
    run = Run(
        runs,
        config,
        wandb=wandb,
        record={**record, "data": info.fingerprint, "wandb": asdict(wandb)},
        device=device,
        interval=interval,
    )
    _follow(run, data, device, path)


def resume_run(
    runs: Path,
    data: Path,
    name: str,
    device: str | None,
    wandb: Wandb | None = None,
    takeover: bool = False,
    interval: float = CHECKPOINT_SECONDS,
) -> None:
    r"""Resumes a run from its newest checkpoint.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        name: The run, see :meth:`sda_ray.runs.checkpoint.RunPath.find`.
        device: Where to train, by default on a GPU if there is one.
        wandb: How to log to W&B, by default as before.
        takeover: Whether to take the run over from a process that trains it.
        interval: The least time between two checkpoints, in seconds.
    """

    path = RunPath.find(runs, name)
    record = _check_resume(path)

    if record.get("status") == "finished" and path.state.is_file():
        print(f"{path.directory.name} is finished: {path.state}")
        return

    info = check_data(data)

    if record.get("data", info.fingerprint) != info.fingerprint:
        raise UserError(
            f"{path.directory.name} was trained on other data than {data}. Give the directory of "
            "its data with --data."
        )

    config = check_config(load_config(path.config), size=info.size, length=info.length)
    parent = RunPath.of_id(runs, record["parent"]) if record.get("parent") else None
    device = _check_device(device)
    run = Run(
        path.directory.parent,
        config,
        path.id,
        wandb=wandb or Wandb.from_record(record.get("wandb"), path.record),
        takeover=takeover,
        device=device,
        interval=interval,
    )
    _follow(run, data, device, parent)


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
            f"on with `sda-ray sweep {record['sweep']}`."
        )

    if record.get("status") == "diverged":
        raise UserError(
            f"{name} diverged ({record.get('reason')}), and would do so again. Start another with "
            f"`sda-ray train --config {path.id} learning_rate=…`."
        )

    return record


def start_replicas(config: Config, count: int, options: Any) -> None:
    r"""Trains repeats of a config that differ in the seed, in parallel.

    They are a sweep over the seed, which is how they are resumed.

    Arguments:
        config: The config.
        count: The number of repeats.
        options: How they are carried out, :class:`sda_ray.sweep.launch.Options`.
    """

    from ..core import choice
    from ..runs import sweep_directory
    from ..sweep import Sweep, launch_sweep
    from . import table

    if count < 1:
        raise UserError(f"--replicas is {count}, but must be at least 1.")

    taken = (sweep_directory(options.runs, f"replicas-{n}") for n in range(1, 10**6))
    name = next(directory.name for directory in taken if not directory.exists())
    seeds = range(config["seed"], config["seed"] + count)
    sweep = Sweep(
        name, config, {"seed": choice(*seeds)}, trials=count, sampler="grid", pruner="none"
    )
    launch_sweep(sweep, replace(options, job_type="replica"), table)


def _check_init(parent: RunPath, config: Config, size: int) -> None:
    theirs = load_config(parent.config)
    differs = [f"{k} is {config[k]}, not {theirs[k]}" for k in NETWORK if config[k] != theirs[k]]

    if differs:
        raise UserError(
            f"the weights of {parent.directory.name} do not fit: {'; '.join(differs)}. Only "
            "settings that leave the network as it is can change."
        )

    found = load_network(parent.directory)[0].state_dict()["kernel.forcing"].shape[-1]

    if found != size:
        raise UserError(
            f"the weights of {parent.directory.name} are for fields of {found}x{found}, but the "
            f"data are {size}x{size}."
        )


def _check_device(device: str | None) -> str:
    name = device or default_device()

    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise UserError(f"device is '{name}', but must be cpu, cuda or cuda:N.")

        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used: {error}") from error

    return name


def _follow(run: Run, data: Path, device: str, parent: RunPath | None) -> None:
    r"""Trains an open run to its end, and shows it."""

    path, total, done = run.path, run.config["epochs"], max(run.lines, default=0)
    print(f"run {path.directory.name}: {total} epochs on {device} in {path.directory}", flush=True)
    init = parent.directory if parent is not None else None
    status, code = "failed", 1

    try:
        with Stop().on_signals() as stop, ProgressBar("epoch", total, done) as progress:
            for metrics in train_run(run, data, device, init=init, stop=stop):
                losses = (f"{key} {metrics[key]:.4f}" for key in ("loss_train", "loss_valid"))
                progress.update(metrics["epoch"], ", ".join(losses))

        status, code = "finished", 0
        print(f"finished: {os.path.relpath(path.state)}, {os.path.relpath(path.samples)}")
    except (Interrupted, KeyboardInterrupt):
        status, code = "interrupted", 128 + (stop.signal or signal.SIGINT)
        print(f"Stopped. Resume with `sda-ray train --resume {path.id}`.")
    except Diverged as error:
        status, code = "diverged", 1
        print(f"diverged: {error}. Try a smaller learning_rate.", file=sys.stderr)
    except LeaseLost as error:
        print(f"{error}: this process stops.", file=sys.stderr)
    except (OutOfMemory, LeaseGone) as error:
        print(f"sda-ray: {error}", file=sys.stderr)
    except UserError:  # the disk is full at the end
        status = "interrupted"
        raise
    finally:
        run.close(status)

    if code:
        sys.exit(code)


def simulate_command(args: Args) -> None:
    r"""Makes a data set."""

    from ..cluster import map_on_ray
    from ..data import PRESETS, simulate_dataset

    preset = PRESETS[args.preset]
    simulate_dataset(
        args.data,
        preset["trajectories"] if args.trajectories is None else args.trajectories,
        preset["size"] if args.size is None else args.size,
        args.seed,
        functools.partial(map_on_ray, workers=args.workers, address=args.address),
    )


def train_command(args: Args) -> None:
    r"""Trains a run, resumes or extends one, or trains replicas."""

    if sum(bool(given) for given in (args.resume, args.init, args.extend)) > 1:
        raise UserError("--resume, --init and --extend exclude each other.")

    if args.takeover and not args.resume:
        raise UserError("--takeover goes with --resume RUN.")

    if args.replicas is not None:
        if args.init or args.resume or args.extend or args.device or args.threads:
            raise UserError(
                "--replicas goes with none of --init, --resume, --extend, --device and --threads."
            )

        start_replicas(_config(args), args.replicas, launch_options(args))
        return

    for name in ("address", "cpus_per_trial", "gpus_per_trial", "parallel"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --replicas N.")

    if args.threads is not None:
        _set_threads(args.threads)

    if args.extend:
        if args.config:
            raise UserError("--extend takes the settings of RUN, and so goes without --config.")

        changes = parse_overrides(args.settings)
        extend_run(args.runs, args.data, args.extend, changes, args.device, wandb_options(args))
    elif args.resume:
        if args.settings or args.config:
            raise UserError(
                "--resume continues a run as it is. For other settings start a run from its "
                f"weights: sda-ray train --init {args.resume} key=value"
            )

        given = args.wandb or args.project or args.entity or args.tags
        wandb = wandb_options(args) if given else None
        resume_run(args.runs, args.data, args.resume, args.device, wandb, args.takeover)
    else:
        start_run(args.runs, args.data, _config(args), args.init, args.device, wandb_options(args))


def _set_threads(threads: int) -> None:
    if not 1 <= threads <= THREADS:
        raise UserError(f"--threads is {threads}, but must be from 1 to {THREADS}.")

    torch.set_num_threads(threads)


def _config(args: Args) -> Config:
    r"""Returns the settings of a training: key=value, before --config or --init, before CONFIG."""

    base = dict(CONFIG)

    if args.config and Path(args.config).is_file():
        base = load_config(Path(args.config).resolve())
    elif args.config or args.init:
        base = load_config(RunPath.find(args.runs, args.config or args.init).config)

    return check_config(base | parse_overrides(args.settings))
