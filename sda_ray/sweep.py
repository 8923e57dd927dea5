r"""Sweeps: from a script to a finished study.

A sweep is a name, a CONFIG, a SPACE and a few settings. Its record `runs/sweeps/{name}/` holds
`sweep.json` (all of that), a copy of the script, and the study. To start a sweep, to carry it on
after a crash and to extend it is one operation: :func:`launch`.
"""

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import RunPath
from .cluster import connect
from .config import Config, check_config, format_value
from .data import DataInfo, check_data
from .errors import UserError
from .files import read_json, remove_leftovers, write_json
from .lease import Lease
from .pruner import Record, Rules, decide, order
from .runs import Wandb
from .space import Space, check_space, draw, space_from_json, space_to_json

__all__ = ["Sweep", "launch", "load_record", "load_script", "sweep_directory"]

logger = logging.getLogger(__name__)

PRUNERS = ("promotion", "none")
SAMPLERS = ("tpe", "random", "grid")


@dataclass(frozen=True)
class Sweep:
    r"""Creates a sweep.

    Arguments:
        name: The name of its record and of its group on W&B.
        config: The CONFIG of all trials.
        space: The keys of CONFIG that vary, see :mod:`sda_ray.space`.
        trials: The number of trials wanted.
        seed: The seed of all draws. That of the trainings is CONFIG's.
        sampler: `tpe`, `random` or `grid` (all combinations of choices, in order).
        pruner: `promotion`, see :mod:`sda_ray.pruner`, or `none`.
        min_epochs: The first rung. By default the third power of `eta` below `epochs`.
        eta: One in `eta` trials goes on at each rung.
        finalists: The least number of trials that get the full number of epochs.
        script: The file that the sweep was made in.
    """

    name: str
    config: Config
    space: Space
    trials: int = 16
    seed: int = 0
    sampler: str = "tpe"
    pruner: str = "promotion"
    min_epochs: int | None = None
    eta: int = 3
    finalists: int = 1
    script: Path | None = None

    def check(self, data: DataInfo | None = None) -> "Sweep":
        r"""Returns the sweep in its normal form.

        Raises:
            UserError: If anything is wrong with it, or does not fit the data.
        """

        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise UserError(
                f"the sweep's name is {self.name!r}, but must be up to 64 letters, digits, dots, "
                "dashes and underscores."
            )

        for key, least in (("trials", 1), ("seed", 0), ("eta", 2), ("finalists", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{key} is {value!r}, but must be an integer from {least}.")

        for key, options in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, key) not in options:
                raise UserError(
                    f"{key} is {getattr(self, key)!r}, but must be one of {', '.join(options)}."
                )

        known = {} if data is None else {"size": data.size, "length": data.length}
        config = check_config(self.config, **known)
        first = self.min_epochs

        if self.pruner == "promotion" and first is None:
            first = max(1, config["epochs"] // self.eta**3)

        if first is not None and not 1 <= first <= config["epochs"]:
            raise UserError(
                f"min_epochs is {first}, but must be an integer from 1 to epochs "
                f"(={config['epochs']})."
            )

        space = check_space(self.space, config, **known, pruner=self.pruner)
        _try_function(space, config, known, self.pruner)

        return replace(self, config=config, space=space, min_epochs=first)

    @property
    def rules(self) -> Rules:
        first = self.min_epochs if self.pruner == "promotion" else None

        return Rules(self.trials, self.config["epochs"], first, self.eta, self.finalists)

    def definition(self) -> dict[str, Any]:
        r"""Returns what makes the sweep this one, as JSON. The number of trials is not part."""

        space: Any = space_to_json(self.space)

        if space is None:
            source = inspect.getsource(self.space)  # type: ignore[arg-type]
            space = {"function": hashlib.sha256(source.encode()).hexdigest()}

        keys = ("seed", "sampler", "pruner", "min_epochs", "eta", "finalists")
        defined = {"config": self.config, "space": space} | {k: getattr(self, k) for k in keys}

        return json.loads(json.dumps(defined))


def _try_function(space: Space, config: Config, known: dict[str, int], pruner: str) -> None:
    r"""Draws a few configurations from a space that is a function, and checks them."""

    if callable(space):
        from .study import sample

        for values in sample(lambda trial: draw(space, trial, pruner), count=32):
            check_config(config | values, **known)


def sweep_directory(runs: Path, name: str) -> Path:
    return runs / "sweeps" / name


def load_script(script: Path) -> Sweep:
    r"""Returns the sweep that a script defines.

    Raises:
        UserError: If there is no such script, or not exactly one sweep in it.
    """

    if not script.is_file():
        raise UserError(f"there is no sweep script {script}.")

    spec = importlib.util.spec_from_file_location("sda_ray_sweep", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{script} cannot be run: {type(error).__name__}: {error}.") from error

    sweeps = [x for x in vars(module).values() if isinstance(x, Sweep)]

    if len(sweeps) != 1:
        raise UserError(f"{script} defines {len(sweeps)} sweeps, but must define one.")

    return replace(sweeps[0], script=script)


def load_record(runs: Path, name: str) -> tuple[Sweep, dict[str, Any]]:
    r"""Returns a recorded sweep, and the options that it was last run with.

    Raises:
        UserError: If there is no such sweep.
    """

    directory = sweep_directory(runs, name)

    if not (directory / "sweep.json").is_file():
        known = sorted(file.parent.name for file in runs.glob("sweeps/*/sweep.json"))
        raise UserError(
            f"there is no sweep '{name}' in {runs / 'sweeps'}, which has "
            f"{', '.join(known) or 'none'}. Give a script, such as sweeps/demo.py, to start one."
        )

    found = read_json(directory / "sweep.json")
    defined, options = found["definition"], found["options"]
    script = directory / "script.py" if (directory / "script.py").exists() else None

    if "function" in defined["space"]:
        assert script is not None
        space = load_script(script).space
    else:
        space = space_from_json(defined["space"])

    return Sweep(name, **defined | {"space": space}, trials=found["trials"], script=script), options


def _record(
    sweep: Sweep, directory: Path, fingerprint: str, options: dict[str, Any]
) -> None:
    r"""Writes the record of a sweep, or compares with the one that is there."""

    file = directory / "sweep.json"
    defined = sweep.definition() | {"data": fingerprint}

    if file.exists():
        before = read_json(file)
        old = _flat(before["definition"] | {"data": before["fingerprint"]})
        new = _flat(defined)
        changes = [
            f"{key} was {_show(old.get(key))}, is {_show(new.get(key))}"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]

        if changes:
            raise UserError(
                f"sweep '{sweep.name}' exists and differs: {'; '.join(changes)}. Carry it on as "
                f"it is with `sda-ray sweep {sweep.name}`, or start another with --name NEW."
            )
    elif sweep.script is not None:
        shutil.copyfile(sweep.script, directory / "script.py")

    content = {
        "name": sweep.name,
        "trials": sweep.trials,
        "definition": sweep.definition(),
        "fingerprint": fingerprint,
        "options": options,
    }
    write_json(file, content)


def _flat(defined: dict[str, Any]) -> dict[str, Any]:
    rest = {key: x for key, x in defined.items() if key not in ("config", "space")}
    config = {f"CONFIG['{key}']": x for key, x in defined["config"].items()}
    space = {f"SPACE['{key}']": x for key, x in defined["space"].items()}

    return config | space | rest


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def launch(
    sweep: Sweep,
    root: Path,
    runs: Path,
    data: Path,
    wandb: Wandb = Wandb(),  # noqa: B008 (frozen)
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

    info = check_data(data)
    sweep = sweep.check(info)
    gpus = _gpus() if gpus is None else gpus
    wandb = replace(wandb, group=sweep.name, job_type=job_type)
    options = {
        "data": os.path.relpath(data, root),
        "cpus": cpus,
        "gpus": gpus,
        "wandb": asdict(wandb),
    }

    directory = sweep_directory(runs, sweep.name)
    directory.mkdir(parents=True, exist_ok=True)
    lease = Lease(directory / "lease.json", f"sweep '{sweep.name}'")

    try:
        remove_leftovers(directory)
        _record(sweep, directory, info.fingerprint, options)
        _drive(sweep, directory, lease, runs, data, info, wandb, address, cpus, gpus, parallel)
    finally:
        lease.release()


def _drive(
    sweep: Sweep,
    directory: Path,
    lease: Lease,
    runs: Path,
    data: Path,
    info: DataInfo,
    wandb: Wandb,
    address: str | None,
    cpus: float,
    gpus: float,
    parallel: int | None,
) -> None:
    from .study import Study, reconcile
    from .table import LiveTable, leaderboard

    study = Study(directory / "study.journal", sweep.name, lease, sweep.seed, sweep.sampler)
    reconcile(study, runs)
    records, rules = study.records(), sweep.rules
    _announce(sweep, records, directory)

    if decide(records, (), rules, exhausted=False).kind != "stop":
        spec = {
            "runs": str(runs),
            "data": str(data),
            "config": sweep.config,
            "rungs": rules.rungs,
            "cpus": cpus,
            "wandb": asdict(wandb),
            "record": {"sweep": sweep.name, "data": info.fingerprint},
        }

        table = LiveTable(sweep.name, sweep.trials, runs, study.records)

        with connect(address) as scratch, table:
            from .driver import Driver  # imports Ray, which must be set up by then

            slots = _Slots(cpus, gpus, parallel)
            slots.check()
            driver = Driver(
                study,
                rules,
                lambda trial: draw(sweep.space, trial, sweep.pruner),
                spec,
                slots,
                table.notify,
            )

            with _on_signals(driver.stop):
                driver.run({"cpu": cpus, "gpu": gpus}, gpus == 0, scratch)

        if not driver.done:
            _interrupted(sweep, driver.errors)
            return

    for record in study.records():
        if record.state == "running" and record.paused:
            study.tell(record, "pruned")

    records = study.records()
    leaderboard(sweep.name, records, runs)
    _what_next(sweep, records, directory, runs)


class _Slots:
    r"""Creates the count of the trials that fit on the live cluster at a time."""

    def __init__(self, cpus: float, gpus: float, most: int | None) -> None:
        self.wanted = {key: x for key, x in {"CPU": cpus, "GPU": gpus}.items() if x > 0}
        self.most = most

    def on(self, node: dict[str, Any]) -> int:
        has = node["Resources"]
        return min((int(has.get(key, 0) // x) for key, x in self.wanted.items()), default=1)

    def __call__(self) -> int:
        import ray

        total = sum(self.on(node) for node in ray.nodes() if node["Alive"])

        return min(total, self.most or total)

    def check(self) -> None:
        r"""Raises a UserError if no node can ever hold a trial: Ray would wait for ever."""

        import ray

        if self() == 0:
            nodes = [
                f"{node['NodeManagerHostname']} with "
                + " ".join(f"{key}={node['Resources'].get(key, 0):g}" for key in ("CPU", "GPU"))
                for node in ray.nodes()
                if node["Alive"]
            ]
            wanted = " ".join(f"{key}={x:g}" for key, x in self.wanted.items())
            raise UserError(
                f"a trial wants {wanted}, which no node has: there is {', '.join(nodes)}. Lower "
                "--cpus-per-trial or --gpus-per-trial."
            )


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())


@contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    r"""Stops in good order at SIGINT or SIGTERM; a second one stops at once."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before[number])
        print(
            "\nStopping: every trial saves a checkpoint first. Once more to stop at once.",
            flush=True,
        )
        stop()

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}

    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(sweep: Sweep, records: list[Record], directory: Path) -> None:
    rungs = ", ".join(map(str, sweep.rules.rungs))
    print(f"sweep '{sweep.name}' in {directory}: {sweep.trials} trials, rungs at epochs {rungs}")

    if records:
        open_ = sum(record.state == "running" for record in records)
        print(f"carried on: {len(records)} runs so far, {open_} of them under way")


def _interrupted(sweep: Sweep, errors: list[str]) -> None:
    if errors:
        raise UserError(
            f"the first {len(errors)} failed runs failed alike, so the sweep stops: {errors[0]}. "
            f"Mend it, then carry on with `sda-ray sweep {sweep.name}`."
        )

    print(f"Stopped. Nothing is lost: carry on with `sda-ray sweep {sweep.name}`.")
    sys.exit(130)


def _what_next(sweep: Sweep, records: list[Record], directory: Path, runs: Path) -> None:
    complete = sorted((r for r in records if r.state == "complete"), key=order)

    if not complete:
        print("No run is complete: see error.txt in the run directories.")
        return

    best = complete[0]
    path = RunPath.of_id(runs, best.run_id)
    assert path is not None
    values = " ".join(f"{key}={format_value(x)}" for key, x in best.config.items())
    run, here = path.directory.name, os.path.relpath(path.directory)

    print(f"\nBest configuration: {values}")
    print(f"Its weights:        {here}/state.pth\n")
    print("What next?")
    print(f"  sda-ray sweep {sweep.name} --trials {2 * sweep.trials}   # go on searching")
    print(f"  sda-ray train --config {run} --replicas 3   # other seeds")
    print(f"  optuna-dashboard {os.path.relpath(directory / 'study.journal')}   # curves")
    print(f"  python -c \"from sda_ray import load_score; print(load_score('{here}'))\"")
