r"""The mailbox of a sweep: what other processes ask of its driver, and what the driver answers.

A request is a file `{id}.json`, its answer `{id}.answer.json`, both whole or absent. Whoever takes
a request deletes it first: it is carried out at most once, whatever dies meanwhile, and one that
is still there was not begun.
"""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_json

__all__ = ["Answer", "Request", "answer", "mailbox_of", "pending", "post", "take", "tidy", "wait"]

ANSWER = ".answer.json"
LOOK = 0.1  # seconds between two looks for an answer
CHECK = 1.0  # seconds between two looks at whether there is anybody to answer
OLD = 3600.0  # seconds after which nobody waits for an answer any more


@dataclass(frozen=True)
class Request:
    r"""Creates a request.

    Arguments:
        id: Names its file. Ids sort by the time of posting.
        kind: What is asked for.
        content: The particulars.
        fault: Why the file is no request, if it is none.
    """

    id: str
    kind: str = ""
    content: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Answer:
    r"""Creates an answer: a sentence, and whether what was asked for is done."""

    text: str
    good: bool = True


def mailbox_of(sweep: Path) -> Path:
    r"""Returns the mailbox in the directory of a sweep."""

    return sweep / "requests"


def post(directory: Path, kind: str, **content: Any) -> str:
    r"""Leaves a request and returns its id.

    Raises:
        OSError: If it cannot be written.
    """

    directory.mkdir(parents=True, exist_ok=True)
    id = f"{time.time_ns():020}-{secrets.token_hex(4)}"
    write_json(directory / f"{id}.json", {"kind": kind, "content": content})

    return id


def pending(directory: Path) -> list[Request]:
    r"""Returns the requests that nobody has taken, the oldest first."""

    try:
        names = sorted(os.listdir(directory))
    except OSError:  # no request yet, or a file system away for a while
        return []

    ids = [name.removesuffix(".json") for name in names if _is_request(name)]

    return [_read(directory, id) for id in ids]


def _is_request(name: str) -> bool:
    return name.endswith(".json") and not name.endswith(ANSWER) and not name.startswith(".")


def _read(directory: Path, id: str) -> Request:
    try:
        found = read_json(directory / f"{id}.json")
    except UserError as error:
        return Request(id, fault=str(error))

    if not isinstance(found, dict):
        return Request(id, fault="a request must be a JSON object.")

    kind, content = found.get("kind"), found.get("content")

    if not isinstance(kind, str) or not isinstance(content, dict):
        return Request(id, fault="a request must have a kind, a text, and a content, an object.")

    return Request(id, kind, content)


def take(directory: Path, id: str) -> bool:
    r"""Deletes a request, and tells whether it was still there: it is then the caller's."""

    try:
        (directory / f"{id}.json").unlink()
    except OSError:  # withdrawn, or a stranger's directory
        return False

    return True


def answer(directory: Path, id: str, text: str, good: bool = True) -> None:
    r"""Answers a request.

    Raises:
        OSError: If the answer cannot be written.
    """

    write_json(directory / f"{id}{ANSWER}", {"text": text, "good": good})


def wait(
    directory: Path, id: str, alive: Callable[[], bool], patience: float = 60.0
) -> Answer | None:
    r"""Waits for an answer, and deletes it.

    Arguments:
        directory: The mailbox.
        id: The id of the request.
        alive: Tells whether there is anybody to answer. Asked about once a second.
        patience: The most seconds to wait.

    Returns:
        The answer, or None if there is none and nobody to give it, or for too long.
    """

    deadline = time.monotonic() + patience
    check = time.monotonic() + CHECK

    while (found := _collect(directory, id)) is None and time.monotonic() < deadline:
        if time.monotonic() >= check:
            if not alive():
                return _collect(directory, id)  # its last words

            check = time.monotonic() + CHECK

        time.sleep(LOOK)

    return found


def _collect(directory: Path, id: str) -> Answer | None:
    file = directory / f"{id}{ANSWER}"

    try:
        found = read_json(file)
    except UserError:  # not there yet
        return None

    with suppress(OSError):
        file.unlink()

    return Answer(str(found["text"]), bool(found["good"]))


def tidy(directory: Path) -> None:
    r"""Deletes old answers, and requests half written, that nobody waits for any more."""

    with suppress(OSError):
        for entry in list(os.scandir(directory)):
            left = entry.name.endswith(ANSWER) or entry.name.startswith(".")
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime

            if left and entry.is_file(follow_symlinks=False) and age > OLD:
                os.unlink(entry.path)
