r"""What is wrong with a cluster file, before `ray up` pays for it: Ray's own check, and ours.

    python -m sda_ray.cluster.clusterfile cluster.yaml

Ray's check knows the outline only: a misspelt key of EC2 fails at the first launch of a worker,
long after `ray up` has said that all is well, and a node without the token is open to everybody.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["check_cluster", "main"]

STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
TOKEN = ".ray/auth_token"
MAKE = "(umask 077; ray get-auth-token --generate)"  # Ray itself would let others read it
LOCAL = ("127.0.0.1", "localhost", "::1")
PIN = re.compile(r"\bray(?:\[[^\]]*\])?==(\d+(?:\.\w+)*)")
IMAGE = re.compile(r"\brayproject/[\w-]+:(\d+\.\d+\.\d+)")


def check_cluster(file: Path) -> list[str]:
    r"""Returns what is wrong with a cluster file, one line each. It is not changed.

    Relative paths in it are relative to the current directory, as they are for `ray up`.
    """

    import yaml

    try:
        text = file.read_text()
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [f"{file} cannot be read: {' '.join(str(error).split())}"]

    if not isinstance(config, dict):
        return [f"{file} is no cluster file: it has no keys."]

    checks = (_unchanged(text), _schema(config), _names(config), _access(config))

    return [x for found in (*checks, _paths(config), _versions(config)) for x in found]


def _unchanged(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if "CHANGE-ME" in line.partition("#")[0]:
            yield f"line {number} still says CHANGE-ME: {line.strip()}"


def _schema(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields what Ray itself finds."""

    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()

    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "the file"
        yield f"Ray refuses {where}: {error.message}"
    except (Exception, SystemExit) as error:  # Ray 2.60 aborts in many ways
        words = " ".join((said.getvalue() or str(error)).split())
        yield f"Ray refuses the file: {words or type(error).__name__}"


def _types(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    found = config.get("available_node_types")

    for name, node in found.items() if isinstance(found, dict) else ():
        if isinstance(node, dict):
            yield name, node


def _names(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields names that Ray passes on as they are, and nobody knows."""

    aws = (config.get("provider") or {}).get("type") == "aws"

    for name, node in _types(config):
        for key in node.get("resources") or {}:
            usual = key.upper().rstrip("S")

            if usual in ("CPU", "GPU") and key != usual:
                yield f"node type {name}: resource '{key}' is no {usual} to Ray. Write {usual}."

        if aws:
            for where, known in _unknown(node.get("node_config") or {}, _run_instances()):
                near = f" It knows {', '.join(known)}." if len(known) < 30 else ""
                yield f"node type {name}: EC2 knows no '{where}' of an instance.{near}"


def _run_instances() -> Any:
    r"""Returns what EC2 takes for a new machine, as its own client has it, if that is here."""

    try:
        from botocore.session import get_session
    except ImportError:
        return None

    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _unknown(given: Any, shape: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    r"""Yields keys, in whatever depth, that a shape of EC2's client has not, and those it has."""

    if shape is not None and shape.type_name == "structure" and isinstance(given, dict):
        for key, value in given.items():
            if key in shape.members:
                yield from _unknown(value, shape.members[key], f"{path}{key}.")
            else:
                yield f"{path}{key}", list(shape.members)
    elif shape is not None and shape.type_name == "list" and isinstance(given, list):
        for value in given:
            yield from _unknown(value, shape.member, path)


def _access(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields who could get in."""

    mounts = config.get("file_mounts") or {}
    setup = [x for key, x in config.items() if key.endswith("setup_commands") and x]
    commands = [str(command) for part in setup for command in part]

    if not any(str(target).endswith(TOKEN) for target in mounts):
        yield f"file_mounts has no '~/{TOKEN}': the nodes would not know the token."
    elif not any("chmod 600" in x and TOKEN in x for x in commands):
        yield f"setup_commands must `chmod 600 ~/{TOKEN}`: others on a node could read the token."

    for key in STARTS:
        starts = [str(x) for x in config.get(key) or () if "ray start" in str(x)]

        if not starts:
            yield f"{key} has no `ray start`."

        for command in starts:
            before = command.partition("ray start")[0]

            if not re.search(r"\bRAY_AUTH_MODE=[\"']?token\b", before):
                yield f"{key} must export RAY_AUTH_MODE=token before `ray start`."

            if "SDA_RAY_ROOT=" not in before:
                yield f"{key} must export SDA_RAY_ROOT before `ray start`."

            host = re.search(r"--dashboard-host[= ][\"']?([^\s\"']+)", command)

            if host and host[1] not in LOCAL:
                yield f"{key} opens the dashboard to {host[1]}: write --dashboard-host=127.0.0.1."

    provider = config.get("provider") or {}

    for name, node in _types(config) if provider.get("type") == "aws" else ():
        groups = (node.get("node_config") or {}).get("SecurityGroupIds")

        if not groups and "security_group" not in provider:
            yield (
                f"node type {name} has no SecurityGroupIds: the group that Ray makes lets the "
                "whole internet in by SSH."
            )


def _paths(config: dict[str, Any]) -> Iterator[str]:
    for target, source in (config.get("file_mounts") or {}).items():
        path = Path(str(source)).expanduser()

        if not path.exists():
            hint = f" Make it: {MAKE}" if str(target).endswith(TOKEN) else ""
            here = "" if path.is_absolute() else f" in {Path.cwd()}, from where you run `ray up`"
            yield f"file_mounts: {source} does not exist{here}.{hint}"
        elif str(target).endswith(TOKEN) and path.stat().st_mode & 0o077:
            yield f"{source} can be read by others: chmod 600 {source}"


def _versions(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields versions of Ray other than that of this machine: they do not talk to each other."""

    found: dict[str, str] = {}
    words = str(config)

    for name in set(re.findall(r"(?:-c|--constraint) ?=?([\w./-]+\.txt)", words)):
        if (file := Path(name)).is_file():
            found |= dict.fromkeys(PIN.findall(file.read_text()), name)

    found |= dict.fromkeys(PIN.findall(words) + IMAGE.findall(words), "the file itself")

    try:
        here = version("ray")
    except PackageNotFoundError:
        return

    for other, where in found.items():
        if other != here:
            yield f"the nodes get Ray {other} by {where}, but here it is {here}."

    if not found:
        yield "no version of Ray is pinned: the nodes get the newest, whatever it is by then."


def main(words: list[str]) -> int:
    r"""Says what is wrong with cluster files, and returns whether anything is."""

    wrong = 0

    for word in words or ["cluster.yaml"]:
        faults = check_cluster(Path(word))
        wrong += len(faults)
        print(f"{word}: {f'{len(faults)} to mend' if faults else 'fine'}")

        for fault in faults:
            print(f"  {fault}")

    if wrong == 0 and _run_instances() is None:
        print("Keys of EC2 were not looked at: boto3 is missing (pip install -e '.[cluster]').")

    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
