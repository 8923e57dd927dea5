r"""The commands about single trainings: `sda-ray simulate | train`.

The trainings themselves are in :mod:`sda_ray.cli.session`, which needs torch.
"""

import functools
import itertools
import os
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from ..core import (
    CONFIG,
    KEYS,
    Config,
    UserError,
    check_config,
    format_value,
    load_config,
    parse_overrides,
    say,
)
from .options import ADDRESS, COUNT, RESOURCES, SETTINGS, THREADS, WANDB, Args, command, option
from .sweep import launch_options, wandb_given, wandb_options

TRAIN = """Trains one score network, from a configuration to state.pth, in runs/{name}_{id}/.

  sda-ray train window=3 hidden_channels=16,32 hidden_blocks=1,1 epochs=32
  sda-ray train --resume RUN       RUN is a path, a name, an id or the beginning of one

The same command resumes a run that was stopped: one with the same settings, data and, after --init
or --extend, RUN. With --replicas it resumes, or shows, those of the same settings, data and code.
--new starts others.

Settings are those of SDA unless KEY=VALUE says otherwise:

""" + "\n".join(
    f"  {name:16} {key.about} ({format_value(key.default)}; {key.accepts})"
    for name, key in KEYS.items()
)


@command("simulate", runs=False)
@option("--preset", "Default: full.", ("full", "demo"), default="full")
@option("--trajectories", "Instead of the preset's.", int)
@option("--size", "Instead of the preset's.", int, "CELLS")
@option("--seed", "Default: 0.", int, default=0)
@option("--workers", "Processes. Default: all CPUs.", int)
@ADDRESS
def simulate_command(args: Args) -> None:
    r"""Simulates Kolmogorov flow and writes train.h5, valid.h5 and test.h5 (8:1:1).

    Only what is missing is computed. `full` is the data set of SDA: 1024 trajectories on a 256x256
    grid, averaged to 64x64. `demo` is 64 trajectories on a 64x64 grid, half a minute on two cores:
    for trying things out, not for results.

      sda-ray simulate --preset demo
      sda-ray simulate --preset full --data /scratch/kolmogorov
    """

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


@command("train", about=TRAIN)
@SETTINGS
@option("--resume", "Resume a run.", metavar="RUN")
@option("--init", "Start from the weights of a run.", metavar="RUN")
@option("--extend", "A longer run that begins as RUN did, with epochs=N.", metavar="RUN")
@option("--config", "Settings of a run, or a config.json.", metavar="RUN")
@option("--replicas", "N runs with the seeds seed … seed + N-1.", COUNT)
@option("--new", "Start another run, even if one like it was stopped.", bool)
@option("--device", "cpu, cuda, … Default: cuda if there is a GPU.")
@option("--threads", "CPU threads; bits depend on it. Default: all.", THREADS)
@option("--takeover", "With --resume: even if a process trains the run.", bool)
@RESOURCES
@WANDB
def train_command(args: Args) -> None:
    r"""Trains a network."""

    if sum(bool(given) for given in (args.resume, args.init, args.extend)) > 1:
        raise UserError("--resume, --init and --extend exclude each other.")

    if args.takeover and not args.resume:
        raise UserError("--takeover goes with --resume RUN.")

    if args.new and args.resume:
        raise UserError("--new starts another run, and so goes without --resume.")

    if args.replicas is not None:
        _train_replicas(args)
        return

    for name in ("address", "cpus_per_trial", "gpus_per_trial", "parallel"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --replicas N.")

    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)

    from . import session

    if args.extend and args.config:
        raise UserError("--extend takes the settings of RUN, and so goes without --config.")

    if args.resume:
        if args.settings or args.config:
            raise UserError(
                "--resume continues a run as it is. For other settings start a run from its "
                f"weights: sda-ray train --init {args.resume} key=value"
            )

        wandb = wandb_options(args) if wandb_given(args) else None
        session.resume_run(args.runs, args.data, args.resume, args.device, wandb, args.takeover)
    else:
        config = parse_overrides(args.settings) if args.extend else _config(args)
        session.start_run(
            args.runs,
            args.data,
            config,
            args.device,
            wandb_options(args),
            args.init,
            args.extend,
            args.new,
        )


def _train_replicas(args: Args) -> None:
    r"""Trains repeats that differ in the seed, as a sweep over it, which is how they resume."""

    from ..core import choice
    from ..runs import sweep_directory
    from ..sweep import Sweep, launch_sweep
    from . import table

    if args.init or args.resume or args.extend or args.device or args.threads:
        raise UserError(
            "--replicas goes with none of --init, --resume, --extend, --device and --threads."
        )

    config, options = _config(args), launch_options(args)
    names = (f"replicas-{n}" for n in itertools.count(1))
    directories = (sweep_directory(options.runs, name) for name in names)
    used = [d.name for d in itertools.takewhile(Path.exists, directories)]
    seeds = choice(*range(config["seed"], config["seed"] + args.replicas))
    name = f"replicas-{len(used) + 1}"
    sweep = Sweep(name, config, {"seed": seeds}, args.replicas, sampler="grid", pruner="none")

    if not args.new and (same := [x for x in used if _is_recorded(replace(sweep, name=x), args)]):
        sweep = replace(sweep, name=same[-1])
        say(f"{sweep.name} has the same settings and data. --new starts others.")

    launch_sweep(sweep, replace(options, job_type="replica"), table)


def _is_recorded(sweep: Any, args: Args) -> bool:
    r"""Tells whether a sweep of this name was started with this definition, on these data."""

    from ..data import fingerprint
    from ..runs import sweep_directory
    from ..sweep import check_code, compare, read_sweep

    with suppress(UserError):  # other code, or what the start explains
        check_code(sweep_directory(args.runs, sweep.name))
        record = read_sweep(args.runs, sweep.name)
        now = {"definition": sweep.check().definition(), "fingerprint": fingerprint(args.data)}
        return record["trials"] == sweep.trials and not any(astuple(compare(record, now)))

    return False


def _config(args: Args) -> Config:
    r"""Returns the settings of a training: key=value, before --config or --init, before CONFIG."""

    from ..runs import RunPath, read_record

    base = dict(CONFIG)

    if args.config and Path(args.config).is_file():
        base = load_config(Path(args.config).resolve())
    elif args.config or args.init:
        path = RunPath.find(args.runs, args.config or args.init)
        base, record = load_config(path.config), read_record(path)

        while shorter := RunPath.of_id(args.runs, record.get("extends", "")):
            record = read_record(shorter)

        if not args.init and "parent" in record and "extends" not in record:
            scratch = f"--config {os.path.relpath(path.config)}"
            raise UserError(
                f"{path.directory.name} started with the weights of run '{record['parent']}', not "
                f"from scratch. To repeat it, give --init {record['parent']} as well, which goes "
                f"without --replicas; to train from scratch with its settings, {scratch}."
            )

    return check_config(base | parse_overrides(args.settings))
