r"""The commands that hand a run to others: `sda-ray export | reproduce`."""

import shlex
import sys
from pathlib import Path

import click

from ..core import UserError, load_config, say
from ..runs import RunPath, entries, select, sweep_directory
from .options import COUNT, RUN, Args, command, option
from .train import THREADS


@command("export")
@RUN
@click.argument("directory", metavar="DIR")
@option("--force", "Replace an earlier export.", bool)
def export_command(args: Args) -> None:
    r"""Writes a finished run into DIR, to be shared: a directory that is new or empty.

    It holds config.json and state.pth, as in the run; model.safetensors, the same weights;
    README.md, a model card with metrics, settings and provenance; samples, the learning curve and
    figures of an evaluation. `load_sde("DIR")` loads it. It has no path, host, user or account.

      sda-ray export crimson-cloud-4 crimson
      sda-ray export crimson-cloud-4 crimson --force
    """

    from ..runs import export_run

    path, target = _find(args), Path(args.directory).expanduser()
    export_run(path, target, args.force)
    say(f"{path.directory.name} is in {target}. Its README.md says how to load it.")


@command("reproduce")
@RUN
@option("--epochs", "How many, from the first. Default: 1.", COUNT, default=1)
@option("--device", "cpu, cuda, … Default: cpu if the run was on one of this kind, else as train.")
@option("--threads", "CPU threads. Default: those of the run.", THREADS)
def reproduce_command(args: Args) -> None:
    r"""Trains the first epochs of a run again and says whether their losses have the same bits.

    It trains in a temporary directory, without W&B, and leaves the run as it is. If the bits
    differ, it says by how much, and which of versions, code, device and threads do; the exit code is
    1. Data other than those of the run are refused.

      sda-ray reproduce crimson-cloud-4
      sda-ray reproduce crimson-cloud-4 --epochs 8 --data /scratch/kolmogorov
    """

    import torch

    from ..data import check_data
    from ..runs import OutOfMemory, cpu_model, default_device, first_attempt, reproduce_run
    from .session import check_device

    path = _find(args)
    name, first = path.directory.name, first_attempt(path)
    info = check_data(args.data)
    config = load_config(path.config, info.size, info.length)
    device = "cpu" if first.get("device") == cpu_model() else default_device()
    device = check_device(args.device or device, config)
    threads = THREADS.convert(args.threads or first.get("threads") or 1, None, None)
    torch.set_num_threads(threads)
    epochs = f"{args.epochs} epoch{'s' * (args.epochs > 1)}"
    say(f"{name}: {epochs} on {device}, threads: {threads}")

    try:
        fault, causes = reproduce_run(path, config, args.data, args.epochs, device)
    except OutOfMemory as error:
        say(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say("Interrupted. Nothing was compared, and nothing is left.")
        sys.exit(130)

    say(f"{name}: {fault or f'the same bits over {epochs}'}.")

    for cause in causes:
        say(cause)

    if fault and not causes:
        say("Versions, code, device and threads are those of the run.")

    sys.exit(1 if fault else 0)


def _find(args: Args) -> RunPath:
    r"""Finds a run. For the name of a sweep, an error names its best one."""

    try:
        return RunPath.find(args.runs, args.run)
    except UserError:
        if not sweep_directory(args.runs, args.run).is_dir():
            raise

    finished = select(entries(args.runs), args.run, "finished")
    objective = finished[0].objective if finished else "loss_valid"
    best = [entry.path.directory.name for entry in select(finished, sort=objective, limit=1)]
    hint = f"Its best run is {shlex.quote(best[0])}." if best else "None of its runs is finished."

    raise UserError(f"'{args.run}' is a sweep, but `sda-ray {args.command}` takes a run. {hint}")
