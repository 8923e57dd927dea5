r"""The record of a sweep, `runs/sweeps/{name}/sweep.json`, and what may change in it.

A copy of its script and its study are in the same directory. A sweep whose definition has changed
is another sweep, since its runs could not be compared. Only its SPACE may grow.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import (
    CONFIG,
    Space,
    UserError,
    covers,
    domain_from_json,
    is_alive,
    read_json,
    space_from_json,
    space_to_json,
    split_group,
    write_atomic,
    write_json,
)
from ..runs import sweep_directory

__all__ = [
    "Changes",
    "check_changes",
    "compare",
    "definition_of",
    "read_sweep",
    "space_of",
    "write_sweep",
]

# The settings that older records lack
LATER: dict[str, Any] = {"objectives": ["loss_valid"], "percentile": 25.0, "patience": None}


def definition_of(
    config: dict[str, Any], space: Space, outline: Sequence[str] = (), **settings: Any
) -> dict[str, Any]:
    r"""Returns the definition of a sweep as JSON.

    A space that is a function is described by the digests of its source and of what it draws from,
    which depends on what the function refers to as well: see :func:`sda_ray.search.sampler.draw_summary`.

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

        parts = {"function": source, "draws": "\n".join(outline)}
        described = {k: hashlib.sha256(text.encode()).hexdigest() for k, text in parts.items()}

    return json.loads(json.dumps({"config": config, "space": described, **settings}))


def space_of(definition: dict[str, Any]) -> Space | None:
    r"""Returns the space of a definition, or None if it is a function, which the script has."""

    space = definition["space"]

    return None if "function" in space else space_from_json(space)


def write_sweep(directory: Path, content: dict[str, Any], script: Path | None) -> None:
    r"""Writes the record of a sweep, after a copy of the script that it was defined by.

    Arguments:
        directory: The directory of the sweep.
        content: `name`, `trials`, `definition`, `fingerprint` of the data, and `options`; and
            `code`, the hash of the code, unless the recorded one stays.
        script: The script of the sweep. It is copied unless the recorded definition is the same.
    """

    file, copy = directory / "sweep.json", directory / "script.py"
    before = read_json(file) if file.exists() else {}
    same = before.get("definition") == content["definition"]

    if script is not None and not same and script.resolve() != copy.resolve():
        write_atomic(copy, script.read_bytes())

    kept = {key: before[key] for key in ("code",) if key in before}
    write_json(file, kept | content)


def read_sweep(runs: Path, name: str) -> dict[str, Any]:
    r"""Returns the record of a sweep, see :func:`write_sweep`, complete with all settings.

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

    return content | {"definition": LATER | content["definition"]}


@dataclass(frozen=True)
class Changes:
    r"""The changes in the definition of a sweep, a line for each.

    Arguments:
        widened: The domains that have grown, with which the sweep can be resumed.
        refused: All other changes, which make it another sweep.
    """

    widened: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def check(self, name: str, script: Path | None = None) -> None:
        r"""Raises a UserError that lists the changes and the choices.

        Arguments:
            name: The name of the sweep.
            script: The script that has changed.

        Raises:
            UserError: If the sweep cannot be resumed with the changes.
        """

        if not self.refused:
            return

        start = f"sda-ray sweep {script or 'SCRIPT'}"
        choices = {
            f"sda-ray sweep {name}": "resumes it as it was",
            f"{start} --name NEW": "starts another sweep",
            f"{start} --fork": "starts another from the finished runs that both have in common",
        }
        width = max(map(len, choices))

        raise UserError(
            "\n".join(
                [
                    f"sweep '{name}' exists and differs:",
                    *(f"  {line}" for line in self.refused),
                    "Choose one of:",
                    *(f"  {command:{width}}  # {what}" for command, what in choices.items()),
                ]
            )
        )


def compare(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    r"""Compares two records of a sweep, see :func:`write_sweep`.

    A SPACE may have grown: ranges of the same kind with wider bounds, choices with more options.
    The place of the data and the number of trials are not part of the definition.

    Arguments:
        before: The record of the sweep.
        now: What would be recorded now.
    """

    old, new = before["definition"], now["definition"]
    widened: list[str] = []
    refused = [
        f"{what} was {_show(was)} and is {_show(value)}"
        for what, was, value in _settings(old, new)
        if was != value
    ]

    for was, line in _spaces(old["space"], new["space"]):
        (widened if was else refused).append(line)

    if before["fingerprint"] != now["fingerprint"]:
        was, value = before["fingerprint"], now["fingerprint"]
        refused.append(f"the data was {_digest(was)} and is {_digest(value)}")

    return Changes(tuple(widened), tuple(refused))


def check_changes(
    runs: Path, record: dict[str, Any], script: Path | None = None
) -> tuple[str, ...]:
    r"""Returns how the SPACE of a sweep has grown since it was recorded, if it was.

    Arguments:
        runs: The directory of all runs.
        record: What would be recorded now. A new number of trials is no change.
        script: The script that it comes from, for messages.

    Raises:
        UserError: If the sweep differs otherwise, or is running with a SPACE that is not as wide.
    """

    name = record["name"]
    directory = sweep_directory(runs, name)

    if not (directory / "sweep.json").exists():
        return ()

    changes = compare(read_sweep(runs, name), record)
    changes.check(name, script)

    if changes.widened and is_alive(directory / "lease.json"):
        raise UserError(
            f"sweep '{name}' is running with a SPACE that is not as wide: "
            f"{'; '.join(changes.widened)}. Stop it first: sda-ray stop {name}"
        )

    return changes.widened


def _settings(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    r"""Yields the settings of two definitions; missing ones have defaults."""

    default = json.loads(json.dumps(CONFIG))
    was, value = default | old["config"], default | new["config"]

    # The CONFIG value of a key of SPACE does not matter, except that rungs depend on epochs.
    vary = _keys(old["space"]) & _keys(new["space"]) - {"epochs"}

    for key in {**was, **value}:
        if key not in vary:
            yield f"CONFIG['{key}']", was.get(key), value.get(key)

    was, value = LATER | old, LATER | new

    for key in {**was, **value}:
        if key not in ("config", "space"):
            yield key, was.get(key), value.get(key)


def _keys(space: dict[str, Any]) -> set[str]:
    return {key for name in space for key in split_group(name)}


def _spaces(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    r"""Yields a line for each change between two spaces, and whether a domain has grown."""

    if "function" in old or "function" in new:
        if "function" not in new:
            yield False, "SPACE was a function and is a dict"
        elif "function" not in old:
            yield False, "SPACE was a dict and is a function"
        elif old["function"] != new["function"]:
            yield False, "SPACE is a function whose source has changed, to what cannot be told"
        elif old.get("draws", new["draws"]) != new["draws"]:  # older records have none
            yield False, "SPACE is a function that draws otherwise: what it refers to has changed"

        return

    for name in {**old, **new}:
        was, value = old.get(name), new.get(name)

        if value is None:
            yield False, f"SPACE['{name}'] was {domain_from_json(was)} and is gone"
        elif was is None:
            yield False, f"SPACE['{name}'] was not there and is {domain_from_json(value)}"
        elif was != value:
            grown = covers(domain_from_json(value), domain_from_json(was))
            said = "widened: {} → {}" if grown else "was {} and is {}"
            yield (
                grown,
                f"SPACE['{name}'] {said.format(domain_from_json(was), domain_from_json(value))}",
            )


def _digest(fingerprint: Any) -> str:
    return f"that of fingerprint {str(fingerprint)[:12]}…"


def _show(value: Any) -> str:
    text = json.dumps(value)

    return text if len(text) <= 60 else f"{text[:57]}…"
