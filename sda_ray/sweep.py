r"""Sweeps, from a definition to a finished study.

To start a sweep, to carry it on after a crash and to extend it is one operation: :func:`launch`.
"""

import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .archive import check_unchanged, read_sweep, space_of, sweep_directory, write_sweep
from .cluster import Slots, connect
from .data import check_data
from .definition import SETTINGS, Sweep, load_script
from .errors import UserError
from .files import remove_leftovers
from .lease import Lease
from .pruner import decide
from .tracking import Wandb

__all__ = ["Sweep", "launch", "load_record", "sweep_directory"]

OFFLINE = Wandb()


def load_record(runs: Path, name: str) -> tuple[Sweep, dict[str, Any]]:
    r"""Returns a recorded sweep, and the options that it was last run with.

    Raises:
        UserError: If there is no such sweep, or its record is damaged.
    """

    found = read_sweep(runs, name)
    definition = found["definition"]
    script = sweep_directory(runs, name) / "script.py"
    space = space_of(definition)

    if space is None:
        space = load_script(script).space

    settings = {key: definition[key] for key in SETTINGS}
    sweep = Sweep(name, definition["config"], space, found["trials"], **settings)

    return replace(sweep, script=script if script.exists() else None), found["options"]


def launch(
    sweep: Sweep,
    root: Path,
    runs: Path,
    data: Path,
    wandb: Wandb = OFFLINE,
    address: str | None = None,
    cpus: float = 1,
    gpus: float | None = None,
    parallel: int | None = None,
    job_type: str = "trial",
) -> None:
    r"""Starts a sweep, carries it on, or extends it: whatever its record calls for.

    Everything is checked before anything is written and before Ray is started. There is one
    driver to a sweep at a time.

    Arguments:
        sweep: The sweep.
        root: What recorded paths are relative to.
        runs: The directory of all runs.
        data: The directory of the data.
        wandb: How trials log to W&B.
        address: The address of a Ray cluster, or None for a Ray of our own on this machine.
        cpus: The CPUs of a trial.
        gpus: The GPUs of a trial. By default 1 if this machine has any.
        parallel: The most trials at a time. By default as many as fit.
        job_type: What the runs are, for W&B.

    Raises:
        UserError: If anything is wrong.
    """

    from .table import announce, conclude

    # Checks
    info = check_data(data)
    sweep = sweep.check(info)
    slots = Slots(cpus, _gpus() if gpus is None else gpus, parallel)
    wandb = replace(wandb, group=sweep.name, job_type=job_type)
    directory = sweep_directory(runs, sweep.name)
    record = {
        "name": sweep.name,
        "trials": sweep.trials,
        "definition": sweep.definition(),
        "fingerprint": info.fingerprint,
        "options": {
            "data": os.path.relpath(data, root),
            "cpus": cpus,
            "gpus": slots.wanted.get("GPU", 0),
            "wandb": asdict(wandb),
        },
    }

    if (directory / "sweep.json").exists():
        check_unchanged(sweep.name, read_sweep(runs, sweep.name), record)

    if address is None:
        slots.check_local()

    # Sweep
    directory.mkdir(parents=True, exist_ok=True)
    lease = Lease(directory / "lease.json", f"sweep '{sweep.name}'")

    try:
        remove_leftovers(directory)
        write_sweep(directory, record, sweep.script)
        study = _open_study(directory, sweep.name, lease, runs)
        announce(sweep.name, sweep.rules, study.records(), directory)

        spec = {
            "runs": str(runs),
            "data": str(data),
            "config": sweep.config,
            "rungs": sweep.rules.rungs,
            "cpus": cpus,
            "wandb": asdict(wandb),
            "record": {
                "sweep": sweep.name,
                "study": f"sweeps/{sweep.name}/study.journal",
                "data": info.fingerprint,
                "wandb": asdict(wandb),
            },
            "request": str(directory / "stop"),
        }
        _drive(sweep, study, spec, slots, address, _again(sweep.name, root, runs))
        study.close()
    finally:
        lease.release()

    conclude(sweep.name, sweep.trials, study.records(), directory, runs)


def _open_study(directory: Path, name: str, lease: Lease, runs: Path) -> Any:
    from .study import Study, reconcile

    study = Study(directory / "study.journal", name, lease)
    reconcile(study, runs)

    return study


def _drive(
    sweep: Sweep, study: Any, spec: dict[str, Any], slots: Slots, address: str | None, again: str
) -> None:
    r"""Runs trials until there is nothing left to do, or exits and says how to carry on."""

    from .driver import Driver
    from .sampler import propose
    from .table import LiveTable

    records = study.records()
    failed = sum(record.state == "failed" for record in records)
    rules = replace(sweep.rules, excused=failed)

    if decide(records, (), rules).kind == "stop":
        return

    table = LiveTable(sweep.name, sweep.trials, Path(spec["runs"]), study.records)
    driver = Driver(
        study,
        rules,
        lambda seen, fixed: propose(sweep.draw, seen, sweep.seed, sweep.sampler, fixed),
        spec,
        slots,
        table.notify,
        Path(spec["request"]),
    )

    try:
        with table, connect(address) as scratch:
            from .executor import execute  # imports Ray, which must be set up by then

            slots.check()
            resources = {"cpu": spec["cpus"], "gpu": slots.wanted.get("GPU", 0)}
            execute(driver, resources, scratch)
    except KeyboardInterrupt:
        pass  # the second Ctrl-C, or one while Ray starts

    if driver.done:
        return

    if driver.hopeless:
        raise UserError(
            f"the first {len(driver.errors)} runs failed alike, so the sweep stops: "
            f"{driver.errors[0]}. Mend it, then carry on with `{again}`."
        )

    print(f"Stopped. Nothing is lost: carry on with `{again}`.")
    sys.exit(130)


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())


def _again(name: str, root: Path, runs: Path) -> str:
    r"""Returns the command that carries a sweep on from the current directory."""

    command = f"sda-ray sweep {name}"

    if root != Path.cwd():
        command += f" --root {shlex.quote(str(root))}"

    if runs != root / "runs":
        command += f" --runs {shlex.quote(str(runs))}"

    return command
