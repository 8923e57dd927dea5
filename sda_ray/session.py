r"""Single trainings as a person runs them: with progress, Ctrl-C, and what to do next."""

import os
import signal
import sys
import time
from pathlib import Path

from .checkpoint import RunPath
from .config import Config, check_config, load_config
from .data import check_data
from .errors import UserError
from .runs import Run, Wandb, read_record
from .train import Interrupted, Stop, default_device, train
from .training import Diverged

__all__ = ["resume_run", "start_replicas", "start_run"]


def start_run(
    runs: Path, data: Path, config: Config, init: str | None, device: str | None, wandb: Wandb
) -> None:
    r"""Trains a new run.

    Arguments:
        runs: The directory of all runs.
        data: The directory of the data.
        config: The config.
        init: The run whose weights to begin with.
        device: Where to train, by default on a GPU if there is one.
        wandb: How to log to W&B.
    """

    info = check_data(data)
    config = check_config(config, size=info.size, length=info.length)
    record = {"data": info.fingerprint}
    parent = None

    if init is not None:
        parent = RunPath.find(runs, init)
        _check_init(parent, config)
        record["parent"] = parent.id

    device = _check_device(device)
    _follow(Run(runs, config, wandb=wandb, record=record, device=device), data, device, parent)


def resume_run(
    runs: Path, data: Path, name: str, device: str | None, wandb: Wandb, takeover: bool
) -> None:
    r"""Goes on with a run from its newest checkpoint."""

    path = RunPath.find(runs, name)
    record = read_record(path)
    info = check_data(data)

    if record.get("status") == "finished":
        print(f"{path.directory.name} is finished: {path.state}")
        return

    if record.get("data", info.fingerprint) != info.fingerprint:
        raise UserError(
            f"{path.directory.name} was trained on other data than {data}. Give the directory of "
            "its data with --data."
        )

    if record.get("sweep"):
        raise UserError(
            f"{path.directory.name} belongs to sweep '{record['sweep']}', which decides how far "
            f"it goes: carry on with `sda-ray sweep {record['sweep']}`."
        )

    config = check_config(load_config(path.config), size=info.size, length=info.length)
    parent = RunPath.of_id(runs, record["parent"]) if record.get("parent") else None
    device = _check_device(device)
    run = Run(
        path.directory.parent, config, path.id, wandb=wandb, takeover=takeover, device=device
    )
    _follow(run, data, device, parent)


def start_replicas(config: Config, count: int, root: Path, runs: Path, **options: object) -> None:
    r"""Trains repeats of a config that differ in the seed, in parallel.

    They are a sweep over the seed, which is how they are resumed.
    """

    from .space import choice
    from .sweep import Sweep, launch, sweep_directory

    if count < 1:
        raise UserError(f"--replicas is {count}, but must be at least 1.")

    taken = (sweep_directory(runs, f"replicas-{n}") for n in range(1, 10**6))
    name = next(directory.name for directory in taken if not directory.exists())
    seeds = range(config["seed"], config["seed"] + count)
    sweep = Sweep(
        name, config, {"seed": choice(*seeds)}, trials=count, sampler="grid", pruner="none"
    )
    launch(sweep, root=root, runs=runs, job_type="replica", **options)  # type: ignore[arg-type]


def _check_init(parent: RunPath, config: Config) -> None:
    theirs = load_config(parent.config)
    shape = ("window", "embedding", "hidden_channels", "hidden_blocks", "kernel_size")
    differs = [f"{k} is {config[k]}, not {theirs[k]}" for k in shape if config[k] != theirs[k]]

    if differs:
        raise UserError(
            f"the weights of {parent.directory.name} do not fit: {'; '.join(differs)}. Only "
            "settings that leave the network as it is can change."
        )

    if not parent.state.is_file():
        raise UserError(
            f"{parent.directory.name} has no state.pth: it is not finished. Go on with it by "
            f"`sda-ray train --resume {parent.id}`."
        )


def _check_device(device: str | None) -> str:
    import torch

    name = device or default_device()

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used: {error}") from error

    return name


def _follow(run: Run, data: Path, device: str, parent: RunPath | None) -> None:
    r"""Trains an open run to its end, and shows it."""

    path, total = run.path, run.config["epochs"]
    print(f"run {path.directory.name}: {total} epochs on {device} in {path.directory}", flush=True)
    resume = f"sda-ray train --resume {path.id}"
    status, code = "failed", 1

    try:
        with Stop().on_signals() as stop, _Progress(total) as progress:
            init = parent.directory if parent is not None else None

            for metrics in train(run, data, device, init=init, stop=stop):
                progress.show(metrics["epoch"], metrics["loss_train"], metrics["loss_valid"])

        status, code = "finished", 0
        print(f"finished: {os.path.relpath(path.state)}, {os.path.relpath(path.samples)}")
    except Interrupted:
        status, code = "interrupted", 128 + (stop.signal or signal.SIGINT)
        print(f"Stopped at a checkpoint. Go on with `{resume}`.")
    except Diverged as error:
        status, code = "diverged", 1
        print(f"diverged: {error}. Try a smaller learning_rate.", file=sys.stderr)
    finally:
        run.close(status)

    if code:
        sys.exit(code)


class _Progress:
    r"""Creates a progress bar with losses and time left; off a terminal, a line now and then."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console()
        self.total = total
        self.said = 0.0
        self.bar = None

        if console.is_terminal:
            columns = "[bold]{task.description}", BarColumn(), MofNCompleteColumn()
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("epoch", total=total)

    def __enter__(self) -> "_Progress":
        if self.bar is not None:
            self.bar.start()

        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, epoch: int, loss_train: float, loss_valid: float) -> None:
        losses = f"loss_train {loss_train:.4f}, loss_valid {loss_valid:.4f}"

        if self.bar is not None:
            self.bar.update(self.task, completed=epoch, description=losses)
        elif time.monotonic() - self.said > 10 or epoch == self.total:
            self.said = time.monotonic()
            print(f"epoch {epoch}/{self.total}: {losses}", flush=True)
