r"""Uploads runs to W&B's server after their training, and asks what the server has.

Each step is on the server once when its rows are as many as they should be and the last step is
the right one, since W&B lets steps only grow.
"""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import Config
from ..core.errors import UserError
from .fragments import Fragment, sync_fragments
from .tracking import PRIVATE, Wandb, own_environment

__all__ = ["Server", "Target", "Unreachable", "upload"]

PATIENCE = 6.0  # seconds that the server may take for an answer
LAG = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between two looks at what has arrived

# What W&B's own client asks before it goes on with a run. It changes nothing.
QUESTION = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { name historyLineCount historyTail }
  }
}
"""


class Unreachable(RuntimeError):
    r"""Signals that the server is absent, silent or unwilling."""


@dataclass(frozen=True)
class Target:
    r"""Creates what a run shall be on the server.

    Arguments:
        id: Its id.
        name: Its name.
        wandb: Its project, entity, tags, group and job type.
        config: Its config, see :func:`sda_ray.runs.record.logged_config`.
        rows: Its metrics by step.
        image: Its picture, if it has one, which comes one step after the metrics.
        good: Whether its training went well.
    """

    id: str
    name: str
    wandb: Wandb
    config: Config
    rows: dict[int, dict[str, float]]
    image: Path | None = None
    good: bool = True

    @property
    def steps(self) -> list[int]:
        steps = sorted(self.rows)
        return [*steps, steps[-1] + 1] if self.image is not None else steps

    @property
    def whole(self) -> tuple[int, int]:
        r"""The number of rows and the last step on a server that has all of it."""

        return len(self.steps), self.steps[-1]

    @property
    def patience(self) -> float:
        r"""The seconds that its upload may take."""

        return PATIENCE + len(self.rows) / 100

    def has_prefix(self, found: tuple[int, int]) -> bool:
        r"""Tells whether a number of rows and a last step are those of its beginning."""

        count, last = found
        return count <= len(self.steps) and (count == 0 or self.steps[count - 1] == last)

    def is_held_by(self, fragments: Sequence[Fragment]) -> bool:
        r"""Tells whether fragments hold every step once, with its values, and nothing else."""

        rows = [row for fragment in fragments for row in fragment.rows]

        return (
            [step for step, _ in rows] == self.steps
            and all(_agree(values, self.rows.get(step, {})) for step, values in rows)
            and all(self._is_of(fragment.run) for fragment in fragments)
            and fragments[-1].ended
        )

    def _is_of(self, run: dict[str, str]) -> bool:
        return run == {
            "id": self.id,
            "name": self.name,
            "project": self.wandb.project,
            "entity": self.wandb.entity or "",
            "group": self.wandb.group or "",
            "job_type": self.wandb.job_type,
        }


def _agree(found: dict[str, str], wanted: dict[str, float]) -> bool:
    return all(key in found and _same(found[key], x) for key, x in wanted.items())


def _same(text: str, x: float) -> bool:
    try:
        found = float(text.strip('"'))
    except ValueError:
        return False

    return found == x or (math.isnan(found) and math.isnan(x))


class Server:
    r"""Creates a connection to the W&B server that the account of this user is at.

    Raises:
        Unreachable: If there is no server, no account, or no answer within seconds.
    """

    def __init__(self) -> None:
        import wandb as client

        start = time.monotonic()

        try:
            with own_environment():
                client.setup(client.Settings(silent=True))
                self._api = client.Api(timeout=int(PATIENCE))
        except Exception as error:
            raise Unreachable(_reason(error, time.monotonic() - start)) from error

    @property
    def url(self) -> str:
        return str(self._api.settings["base_url"])

    def ask(self, target: Target) -> tuple[int, int]:
        r"""Returns the number of rows that the server has of a run, and its last step.

        A run that the server has not got has no rows.

        Raises:
            Unreachable: If the server does not answer.
        """

        where = target.wandb
        names = {"project": where.project, "entity": where.entity, "name": target.id}
        start = time.monotonic()

        try:  # `wandb.Api` has no public way to ask only for this, which is all we need
            answer = self._api._service_api.execute_graphql(QUESTION, names)
            bucket = ((answer or {}).get("model") or {}).get("bucket")

            if not bucket:
                return 0, 0

            return bucket["historyLineCount"] or 0, _last_step(bucket["historyTail"])
        except Exception as error:
            raise Unreachable(_reason(error, time.monotonic() - start)) from error

    def has(self, target: Target) -> bool:
        r"""Tells whether the server has all of a run, with a moment for what is on its way."""

        for seconds in LAG:
            time.sleep(seconds)

            if (found := self.ask(target)) == target.whole or found[0] > target.whole[0]:
                return found == target.whole

        return False


def _last_step(tail: str | None) -> int:
    rows = json.loads(tail or "[]")
    row = json.loads(rows[-1]) if rows and isinstance(rows[-1], str) else (rows or [{}])[-1]

    return int(row.get("_step", 0))


def _reason(error: Exception, seconds: float) -> str:
    if seconds > 0.9 * PATIENCE:
        return f"it does not answer within {PATIENCE:g} s"

    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def upload(server: Server, target: Target, fragments: Sequence[Fragment]) -> str:
    r"""Brings a run to the server, each step once. Safe to repeat, and to interrupt.

    Fragments are uploaded as they are if the server has nothing of the run and they hold all of
    it. Otherwise what the server lacks is sent. Where its rows are not the run's beginning, as
    after `wandb sync` on fragments that overlap, the run is rewound there and sent anew.

    Returns:
        How it was done, in words.

    Raises:
        Unreachable: If the server does not answer, or has not got all of the run afterwards.
    """

    found = server.ask(target)

    if found == target.whole:
        return "there already"

    if found == (0, 0) and fragments and target.is_held_by(fragments):
        sync_fragments(fragments, target.patience)

        if server.has(target):
            return f"uploaded, {len(target.steps)} rows"

        found = server.ask(target)

    fits = target.has_prefix(found)
    keep = found[1] if fits else 0
    _replay(target, keep, rewind=not fits)

    if not server.has(target):
        count, last = server.ask(target)
        raise Unreachable(
            f"it has {count} rows to step {last} of {target.name}_{target.id}, but should have "
            f"{target.whole[0]} to step {target.whole[1]}"
        )

    if not fits:
        return f"replayed, {len(target.steps)} rows, instead of {found[0]} that were not its own"

    return f"completed, from step {keep + 1} on" if keep else f"replayed, {len(target.steps)} rows"


def _replay(target: Target, keep: int, rewind: bool) -> None:
    r"""Sends the rows and the picture of a run, as its training does.

    Arguments:
        target: The run.
        keep: The last step that the server has and keeps.
        rewind: Whether it has to forget others.
    """

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, own_environment():
        image = target.image and _open_image(target.image)
        past = f"{target.id}?_step={keep}"
        run = _begin(target, scratch, **{"resume_from": past} if rewind else {"resume": "allow"})

        if run.starting_step > keep + 1:  # the summary, which W&B goes by, is ahead of the rows
            run.finish()
            run = _begin(target, scratch, resume_from=past)

        for step in target.steps:
            if step > keep:
                values: dict[str, Any] = dict(target.rows.get(step, {}))

                if step not in target.rows:
                    values["samples"] = image

                run.log(values, step=step, commit=True)

        run.finish(exit_code=0 if target.good else 1)


def _open_image(file: Path) -> Any:
    from wandb import Image

    try:
        return Image(str(file))
    except Exception as error:  # whatever a strange file provokes in PIL
        raise UserError(f"{file} is not a picture to upload: {error}.") from error


def _begin(target: Target, directory: str, **resume: str) -> Any:
    import wandb as client

    settings = client.Settings(
        init_timeout=PATIENCE,
        finish_timeout=target.patience,
        silent=True,
        console="off",
        **PRIVATE,
        reinit="create_new",
        x_disable_stats=True,  # those of this machine say nothing of the training
    )
    start = time.monotonic()

    try:
        return client.init(
            mode="online",
            dir=directory,
            project=target.wandb.project,
            entity=target.wandb.entity,
            id=target.id,
            name=target.name,
            config=target.config,
            tags=target.wandb.tags,
            group=target.wandb.group,
            job_type=target.wandb.job_type,
            settings=settings,
            **resume,  # type: ignore[arg-type]
        )
    except client.errors.UsageError as error:  # as a project that W&B allows no run in
        raise UserError(f"W&B does not take it: {_reason(error, 0.0)}.") from error
    except Exception as error:
        raise Unreachable(_reason(error, time.monotonic() - start)) from error
