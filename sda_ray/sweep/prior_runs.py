r"""Bringing finished runs into a sweep: `sda-ray adopt`, `--warm-start` and `--fork`.

Config and metrics of each run are copied into a directory of its own, whole or not at all; then a
line in the study says that it is there. Whatever is killed in between is found by the next try.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import cut_torn_line, remove_leftovers
from ..core.lease import Lease
from ..data.dataset import check_data, fingerprint
from ..runs.inventory import entries
from ..runs.path import RunPath, sweep_directory
from .definition import Sweep
from .priors import Prior, bring_all, place
from .record import compare, read_sweep, write_sweep
from .steering import Absent, ask_for, live

if TYPE_CHECKING:
    from .coverage import Known

__all__ = ["adopt", "fork", "gather", "warm_start"]

Item = dict[str, Any]  # what the study is told of a run, see `Prior.item`


def adopt(
    words: Sequence[str],
    sweep: Sweep,
    runs: Path,
    data: Path,
    record_of: Callable[[Sweep, Any], dict[str, Any]],
) -> None:
    r"""Brings finished runs into a sweep, which is running, has run, or has yet to start.

    Arguments:
        words: Directories of runs, directories of such directories, or runs by name or id.
        sweep: The sweep.
        runs: The directory of all runs of the sweep.
        data: The directory of its data.
        record_of: Makes the record of a sweep from its normal form and a summary of the data.

    Raises:
        UserError: If the sweep is another than what is recorded, or it covers none of the runs.
    """

    sources = [path for word in words for path in _expand(word, runs)]
    info = check_data(data)
    sweep = sweep.check(info)
    directory = sweep_directory(runs, sweep.name)
    content = record_of(sweep, info)

    if (directory / "sweep.json").exists():
        before = read_sweep(runs, sweep.name)
        content["trials"] = before["trials"]
        changes = compare(before, content)
        changes.check(sweep.name, sweep.script)

        if changes.widened and live(directory):
            raise UserError(
                f"sweep '{sweep.name}' is running, with a SPACE that is not as wide: "
                f"{'; '.join(changes.widened)}. Stop it first: sda-ray stop {sweep.name}"
            )

    items = gather(sources, sweep, runs, data)

    if not items:
        raise UserError(f"sweep '{sweep.name}' covers none of the {len(sources)} runs.")

    _deliver(items, sweep, directory, content)


def _expand(word: str, runs: Path) -> list[Path]:
    r"""Returns the directories of runs that a word stands for."""

    directory = Path(word)

    if directory.is_dir() and not (directory / "config.json").is_file():
        found = sorted(file.parent for file in directory.glob("*/config.json"))

        if not found:
            raise UserError(f"{directory} is not the directory of a run, nor has it any.")

        return found

    return [RunPath.find(runs, word).directory]


def _deliver(items: list[Item], sweep: Sweep, directory: Path, content: dict[str, Any]) -> None:
    r"""Tells the driver of the sweep of runs, or the study itself if nobody drives it."""

    from ..search.study import Study

    with suppress(Absent):
        ask_for(directory, priors=items)
        return

    lease = Lease(directory / "lease.json", f"sweep '{sweep.name}'")

    try:
        remove_leftovers(directory)
        write_sweep(directory, content, sweep.script)
        study = Study(directory / "study.journal", sweep.name, lease, sweep.objectives)
        print(bring_all(study, items))
    finally:
        lease.release()


def warm_start(other: str, sweep: Sweep, runs: Path, data: Path) -> list[Item]:
    r"""Returns what :func:`sda_ray.sweep.priors.bring_all` shall add of the finished runs of a sweep.

    Arguments:
        other: The name of that sweep, which may be running.
        sweep: The sweep that they are brought into, checked.
        runs: The directory of all runs.
        data: The directory of the data.

    Raises:
        UserError: If there is no such other sweep.
    """

    read_sweep(runs, other)

    if other == sweep.name:
        raise UserError(f"sweep '{other}' has its own runs already: give another.")

    finished = ("finished", "adopted")
    mine = [e.path for e in entries(runs) if e.sweep == other and e.status in finished]
    known = _drawn(runs, other) if callable(sweep.space) else {}
    print(f"sweep '{other}' has {len(mine)} finished runs", flush=True)

    return gather([path.directory for path in mine], sweep, runs, data, known)


def _drawn(runs: Path, name: str) -> Known:
    r"""Returns the parameters of the runs of a sweep, from a copy of its study."""

    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from ..search.sampler import quiet_optuna

    with tempfile.TemporaryDirectory() as place, quiet_optuna():
        copy = Path(place) / "study.journal"
        shutil.copyfile(sweep_directory(runs, name) / "study.journal", copy)
        cut_torn_line(copy)
        storage = JournalStorage(JournalFileBackend(str(copy)))
        trials = optuna.load_study(storage=storage, study_name=name).get_trials(deepcopy=False)

    return {t.user_attrs["run_id"]: t.params for t in trials if "run_id" in t.user_attrs}


def fork(sweep: Sweep, runs: Path, data: Path) -> Sweep:
    r"""Returns a sweep by the first name NAME-2, NAME-3, … that is free, or that it has already.

    Arguments:
        sweep: The sweep, by the name of the one that it differs from.
        runs: The directory of all runs.
        data: The directory of the data.
    """

    now = {"definition": sweep.check().definition(), "fingerprint": fingerprint(data)}
    number = 2

    while True:
        name = f"{sweep.name}-{number}"

        if not (sweep_directory(runs, name) / "sweep.json").exists():
            return replace(sweep, name=name)

        changes = compare(read_sweep(runs, name), now)

        if not changes.widened and not changes.refused:  # killed, and tried again
            return replace(sweep, name=name)

        number += 1


def gather(
    sources: Iterable[Path], sweep: Sweep, runs: Path, data: Path, known: Known | None = None
) -> list[Item]:
    r"""Copies the runs that a sweep covers into directories of its own, and says which it does not.

    Arguments:
        sources: The directories of the runs.
        sweep: The sweep, checked.
        runs: The directory of all runs.
        data: The directory of the data.
        known: The parameters that the runs were drawn with, by their ids.

    Returns:
        What the study is to be told.
    """

    from .coverage import Refusal, collect  # with torch, and networks

    digest = fingerprint(data)
    items = []

    for found in collect(sources, sweep, runs, data, known, _tracked):
        if isinstance(found, Refusal):
            said = "passed over" if found.known else "left out"
            print(f"  {said}: {found.path.name}: {found.reason}", flush=True)
            continue

        try:
            copy = place(found, sweep.name, runs, digest)
        except OSError as error:
            raise UserError(
                f"{found.path.directory} cannot be copied to {runs}: {error}."
            ) from error

        loss = found.lines[-1]["loss_valid"]
        notes = "".join(f"; {note}" for note in found.notes)
        name = found.path.directory.name
        print(f"  covered: {name}: loss_valid {loss:.4f}{notes} ({copy.name})", flush=True)
        items.append(found.item)

    return items


def _tracked(todo: Sequence[Prior]) -> Iterator[Prior]:
    r"""Yields runs whose loss has to be measured, and shows how far that is."""

    from rich.console import Console
    from rich.progress import track

    console = Console()

    if todo:
        print(f"measuring the loss of {len(todo)} runs by their weights …", flush=True)

    for i, prior in enumerate(
        track(todo, "measuring", console=console, disable=not console.is_terminal), start=1
    ):
        if not console.is_terminal:
            print(f"  {i}/{len(todo)} {prior.path.directory.name} …", flush=True)

        yield prior
