r"""Prior trials: finished runs that a sweep did not make, but knows of.

They stand in its study as complete runs with a source. The sampler learns from them, and they are
compared with at rungs; the number of trials wanted is without them.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..core.config import Config, save_config
from ..core.errors import UserError
from ..core.files import sync_directory, write_atomic, write_json
from ..core.keys import show
from ..runs.path import RunPath, new_name
from ..search.promotion import TrialRecord
from ..search.study import Study
from .fitting import Fit

__all__ = ["Prior", "bring_all", "bring_in", "place"]


@dataclass(frozen=True)
class Prior:
    r"""Creates a finished run that a sweep covers.

    Arguments:
        path: Where it is.
        origin: Where it comes from: the `path` and `id` of the run itself, if this is a copy.
        run_id: The id of its copy in the sweep, the same for each try to bring it in.
        config: Its config.
        fit: Its parameters in the sweep.
        lines: Its metrics, by which it is judged.
        finals: The values of all objectives of the sweep.
        notes: What people should know of it.
    """

    path: RunPath
    origin: dict[str, str]
    run_id: str
    config: Config
    fit: Fit
    lines: tuple[dict[str, Any], ...] = ()
    finals: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def item(self) -> dict[str, Any]:
        r"""What :func:`bring_in` takes, as JSON."""

        from optuna.distributions import distribution_to_json

        return {
            "run_id": self.run_id,
            "source": self.origin["path"],
            "epochs": self.config["epochs"],
            "config": self.fit.values,
            "params": self.fit.params,
            "distributions": {
                k: distribution_to_json(d) for k, d in self.fit.distributions.items()
            },
            "values": [[line["epoch"], line["loss_valid"]] for line in self.lines],
            "finals": self.finals,
        }


def place(prior: Prior, name: str, runs: Path, digest: str) -> Path:
    r"""Copies config and metrics of a run into a directory of a sweep's own, if there is none.

    Arguments:
        prior: The run.
        name: The name of the sweep.
        runs: The directory of all runs.
        digest: The fingerprint of the sweep's data.

    Returns:
        The directory.
    """

    with _alone(runs / "sweeps" / name / "priors.lock"):
        if (found := RunPath.of_id(runs, prior.run_id)) is not None:
            return found.directory

        number = re.search(r"-(\d{1,6})_", prior.path.directory.name)
        new = new_name(prior.run_id, int(number[1]) if number else 1)
        aside = RunPath(runs / f".{prior.run_id}.prior")
        shutil.rmtree(aside.directory, ignore_errors=True)  # of a try that was killed
        aside.directory.mkdir()

        save_config(prior.config, aside.config)
        write_atomic(aside.metrics, "".join(json.dumps(x) + "\n" for x in prior.lines).encode())
        write_json(
            aside.record,
            {
                "id": prior.run_id,
                "name": new,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "status": "adopted",
                "sweep": name,
                "data": digest,
                "origin": prior.origin | {"notes": prior.notes},
                "wandb": {"mode": "disabled"},
            },
        )

        directory = runs / f"{new}_{prior.run_id}"
        aside.directory.rename(directory)
        sync_directory(runs)

        return directory


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    r"""Lets one process at a time copy runs for a sweep."""

    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def bring_in(study: Study, item: Mapping[str, Any]) -> bool:
    r"""Adds a run to a study as a complete one, in one line of the journal.

    Arguments:
        study: The study, whose lease is held.
        item: What :attr:`Prior.item` returns.

    Returns:
        Whether it was not there before.

    Raises:
        UserError: If the item is something else.
    """

    from optuna.distributions import json_to_distribution
    from optuna.trial import TrialState, create_trial

    records = study.records()

    try:
        record = TrialRecord(
            1 + len(records),
            str(item["run_id"]),
            "complete",
            until=int(item["epochs"]),
            epochs=int(item["epochs"]),
            values={int(epoch): float(value) for epoch, value in item["values"]},
            config=dict(item["config"]),
            source=str(item["source"]),
            finals=tuple(map(float, item["finals"])),
        )
        spans = {k: json_to_distribution(text) for k, text in item["distributions"].items()}
        params = dict(item["params"])
        drawn = create_trial(state=TrialState.PRUNED, params=params, distributions=spans)

        if record.last != record.epochs or len(record.finals) != len(study.objectives):
            raise ValueError("its values are not those of a run that is complete")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{show(item)} is no finished run: {error}.") from error

    if new := all(record.run_id != other.run_id for other in records):
        study.bring(record, drawn)

    return new


def bring_all(study: Study, items: Iterable[Mapping[str, Any]]) -> str:
    r"""Adds runs to a study, see :func:`bring_in`, and returns a sentence on it."""

    brought = [bring_in(study, item) for item in items]
    new, before = sum(brought), len(brought) - sum(brought)
    said = f"{new} run{'s' * (new != 1)} brought in, for the sampler to learn from"

    return said + (f"; {before} had been before." if before else ".")
