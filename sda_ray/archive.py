r"""The record of a sweep, `runs/sweeps/{name}/sweep.json`: what makes it this sweep.

Beside it lie a copy of its script and its study. A sweep whose definition has changed is another
sweep: carried on, its runs could not be compared.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .domain import Space, space_from_json, space_to_json
from .errors import UserError
from .files import read_json, write_json

__all__ = [
    "check_unchanged",
    "definition_of",
    "read_sweep",
    "space_of",
    "sweep_directory",
    "write_sweep",
]


def sweep_directory(runs: Path, name: str) -> Path:
    return runs / "sweeps" / name


def definition_of(config: dict[str, Any], space: Space, **settings: Any) -> dict[str, Any]:
    r"""Returns the definition of a sweep as JSON.

    A space that is a function stands there as the digest of its source.

    Raises:
        UserError: If the source of the space cannot be found.
    """

    described = space_to_json(space)

    if described is None:
        try:
            source = inspect.getsource(space)  # type: ignore[arg-type]
        except (OSError, TypeError) as error:
            raise UserError(
                f"SPACE is {space!r}, whose source cannot be read: {error}. Write it as a function "
                "of the script."
            ) from error

        described = {"function": hashlib.sha256(source.encode()).hexdigest()}

    return json.loads(json.dumps({"config": config, "space": described, **settings}))


def space_of(definition: dict[str, Any]) -> Space | None:
    r"""Returns the space of a definition, or None if it is a function, which the script has."""

    space = definition["space"]

    return None if space.keys() == {"function"} else space_from_json(space)


def write_sweep(directory: Path, content: dict[str, Any], script: Path | None) -> None:
    r"""Writes the record of a sweep; with the first, a copy of its script.

    Arguments:
        directory: The directory of the sweep.
        content: `name`, `trials`, `definition`, `fingerprint` of the data, and `options`.
        script: The script of a new sweep.
    """

    file = directory / "sweep.json"

    if script is not None and not file.exists():
        shutil.copyfile(script, directory / "script.py")

    write_json(file, content)


def read_sweep(runs: Path, name: str) -> dict[str, Any]:
    r"""Returns the record of a sweep, see :func:`write_sweep`.

    Raises:
        UserError: If there is no such sweep, or its record is damaged.
    """

    file = sweep_directory(runs, name) / "sweep.json"

    if "/" in name or not file.is_file():
        known = sorted(f.parent.name for f in runs.glob("sweeps/*/sweep.json"))
        raise UserError(
            f"there is no sweep '{name}' in {runs / 'sweeps'}, which has "
            f"{', '.join(known) or 'none'}. Give a script, such as sweeps/demo.py, to start one."
        )

    content = read_json(file)
    keys = {"name", "trials", "definition", "fingerprint", "options"}

    if not isinstance(content, dict) or not keys <= content.keys():
        raise UserError(f"{file} is damaged: it must be an object with {', '.join(sorted(keys))}.")

    return content


def check_unchanged(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    r"""Compares two records of a sweep.

    Raises:
        UserError: If they define different sweeps. The message says in what.
    """

    old, new = dict(_items(before)), dict(_items(now))
    changes = [
        f"{key} was {_show(old.get(key))} and is {_show(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]

    if changes:
        raise UserError(
            f"sweep '{name}' exists and differs: {'; '.join(changes)}. Carry it on as it is with "
            f"`sda-ray sweep {name}`, or start another with --name NEW."
        )


def _items(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    definition = dict(content["definition"])

    for part in ("config", "space"):
        for key, value in definition.pop(part).items():
            yield f"{part.upper()}['{key}']", value

    yield from definition.items()
    yield "the data", content["fingerprint"]


def _show(value: Any) -> str:
    text = json.dumps(value)

    return text if len(text) <= 60 else f"{text[:57]}…"
