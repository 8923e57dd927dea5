r"""The way in: a sweep that was started before goes on with the code that it was started with.

The recorded code, see :mod:`sda_ray.sweep.code`, shall run whatever has become of the package since.
So nothing is imported here but the standard library, and whatever else is broken, the recorded code
is found, checked and handed over to. Only `__init__.py`, `__main__.py` and this module must be whole.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

__all__ = [
    "FLAGS",
    "PACKAGE",
    "Refused",
    "code_of",
    "differing",
    "digests",
    "execute",
    "find_root",
    "goes_on",
    "main",
    "point_at",
    "recorded",
    "redirect",
    "rescue",
    "verify",
]

PACKAGE = Path(__file__).resolve().parents[1]
LARGEST = 2**22  # bytes of a file of the package, at most
NAMED = 5  # files that are named where some differ

# The options of `sda-ray sweep` that have no value. All others have one.
FLAGS = ("--fork", "--retry-failed", "--detach", "--help", "-h")

# What a process runs that was handed over: sys.path must be right before anything is imported
PROGRAM = """\
import os, runpy, sys
_, sys.path[0], what, *rest = sys.argv
sys.argv = [what, *rest]
if what.endswith(".py"):
    sys.path.insert(1, os.path.dirname(what))
    runpy.run_path(what, run_name="__main__")
else:
    runpy.run_module("sda_ray", run_name="__main__")
"""


class Refused(Exception):
    r"""Signals that recorded code must not be run, and why."""


def main() -> None:
    r"""Runs the command line, of a sweep that was started before by the code recorded with it."""

    if sys.argv[1:2] == ["sweep"]:
        _hand_over(sys.argv[2:], "sda-ray", sys.argv[1:])

    import_module("sda_ray.cli.main").main()


def rescue() -> None:
    r"""Hands the script that runs over to the recorded code of its sweep, if there is any.

    To be called where the package cannot be imported by `python SCRIPT`.
    """

    script = getattr(sys.modules.get("__main__"), "__file__", None)

    if script and script.endswith(".py"):
        script = os.path.abspath(script)
        _hand_over([script, *sys.argv[1:]], script, sys.argv[1:])


def _hand_over(words: Sequence[str], what: str, rest: Sequence[str]) -> None:
    r"""Goes on with the recorded code of the sweep that is meant, if it is sure which one is.

    What is wrong with it is said later, by the start of the sweep.
    """

    with suppress(OSError, ValueError, SyntaxError, RecursionError, Refused):
        name, options = _read(words)

        if not name or options.get("--code") == "current":
            return

        root = find_root(options.get("--root"))
        given = options.get("--runs") or str(root / "runs")

        if given.startswith("s3://"):  # a copy is there
            given = str(root / "runs" / "s3" / given.removeprefix("s3://").rstrip("/"))

        runs = Path(given).expanduser().absolute()

        if (found := recorded(runs / "sweeps" / name)) is None:
            return

        place, code = found
        before, now = verify(place, code), digests(PACKAGE)

        if before == now:
            redirect(place)
        else:
            print(goes_on(name, differing(before, now)), flush=True)
            execute(place, what, rest)


def _read(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    r"""Returns the name of the sweep that is meant, or none, and the options that have a value."""

    options: dict[str, str] = {}
    meant, rest = "", iter(words)

    for word in rest:
        if word in FLAGS:
            if word not in ("--retry-failed", "--detach"):  # help, or a new sweep
                return "", options
        elif word.startswith("-"):
            key, equals, value = word.partition("=")
            options[key] = value if equals else next(rest, "")
        elif not meant:
            meant = word

    if "--name" in options:
        meant = options["--name"]
    elif meant.endswith(".py"):
        meant = _name_in(Path(meant))

    return ("" if "/" in meant or "=" in meant or meant in ("..", ".") else meant), options


def _name_in(script: Path) -> str:
    r"""Returns the name of the sweep in a script that reads `Sweep("name", …)`, once."""

    tree = ast.parse(script.read_bytes())
    names = {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "Sweep"
        for argument in [*call.args[:1], *(k.value for k in call.keywords if k.arg == "name")]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }

    return names.pop() if len(names) == 1 else ""


def find_root(given: str | None) -> Path:
    r"""Returns the root, absolute. Nothing else looks at these variables."""

    here = Path.cwd()

    if given or os.environ.get("SDA_RAY_ROOT"):
        root = Path(given or os.environ["SDA_RAY_ROOT"])
    elif (here / "runs").is_dir() or (here / "data").is_dir():
        root = here
    elif os.environ.get("SCRATCH"):
        root = Path(os.environ["SCRATCH"]) / "sda" / "kolmogorov"
    else:
        root = here

    return Path(os.path.abspath(root.expanduser()))


def digests(package: Path) -> dict[str, str]:
    r"""Returns the SHA-256 of each file of a package, by its name in there.

    Caches, hidden files, and what snapshots say of their origin are no part of it.
    """

    found = {}

    for directory, folders, files in os.walk(package):
        folders[:] = sorted(x for x in folders if x != "__pycache__" and not x.startswith("."))

        for name in files:
            if not name.startswith((".", "origin.")) and not name.endswith(".pyc"):
                file = Path(directory, name)

                with open(file, "rb") as f:
                    data = f.read(LARGEST)

                found[file.relative_to(package).as_posix()] = hashlib.sha256(data).hexdigest()

    return dict(sorted(found.items()))


def code_of(files: Mapping[str, str]) -> str:
    r"""Returns the hash of code: a SHA-256 over the names and contents of its files."""

    lines = (f"{digest} {name}\n" for name, digest in sorted(files.items()))

    return hashlib.sha256("".join(lines).encode()).hexdigest()


def recorded(directory: Path) -> tuple[Path, str] | None:
    r"""Returns where the recorded code of a sweep is and its hash, or None if none is recorded."""

    try:
        code = json.loads((directory / "sweep.json").read_bytes()).get("code")
    except (OSError, ValueError, AttributeError):
        return None

    if not isinstance(code, str) or not re.fullmatch("[0-9a-f]{64}", code):
        return None

    return directory / "code" / code[:16], code


def verify(place: Path, code: str) -> dict[str, str]:
    r"""Returns the digests of recorded code, if it is what was recorded and nobody else's.

    Raises:
        Refused: If it is not whole, or has been changed, or another user owns any of it.
    """

    package = place / "sda_ray"

    if not package.is_dir():
        raise Refused(f"{package} is missing")

    every = [
        Path(where, x) for where, *kinds in os.walk(package) for names in kinds for x in names
    ]

    for part in (place.parent, place, package, *every):
        status = os.lstat(part)

        if status.st_uid not in (0, os.geteuid()):
            raise Refused(f"{part} belongs to another user (number {status.st_uid})")

        if os.path.islink(part):
            raise Refused(f"{part} is a link")

    if code_of(files := digests(package)) != code:
        raise Refused(f"{package} is not what was recorded: files in it are changed or damaged")

    return files


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    r"""Returns the names of the files that two codes do not have alike."""

    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def goes_on(name: str, files: Sequence[str]) -> str:
    r"""Returns a line on the files that differ from the recorded code, which a sweep goes on with."""

    named = ", ".join(files[:NAMED]) + ", …" * (len(files) > NAMED)
    count = f"{len(files)} file" + "s" * (len(files) != 1)

    return (
        f"sweep '{name}' goes on with the code that it was started with: {count} of {PACKAGE} "
        f"differ{'s' * (len(files) == 1)}: {named} (--code current takes that up)"
    )


def redirect(place: Path) -> list[str]:
    r"""Lets what is yet to be imported of the package come from recorded code that is the same.

    Returns:
        Where it came from before.
    """

    before = list(sys.modules["sda_ray"].__path__)
    point_at(place / "sda_ray")

    return before


def point_at(package: Path) -> None:
    r"""Lets what is yet to be imported of the package, and of packages in it, come from a directory."""

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "sda_ray" and hasattr(module, "__path__"):
            module.__path__[:] = [str(package.joinpath(*name.split(".")[1:]))]


def execute(place: Path, what: str, rest: Sequence[str]) -> NoReturn:
    r"""Replaces this process by one that runs the recorded code.

    Arguments:
        place: Where the recorded code is.
        what: `sda-ray`, or the script that was started.
        rest: The arguments that it was given.
    """

    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *flags, "-c", PROGRAM, str(place), what, *rest])
