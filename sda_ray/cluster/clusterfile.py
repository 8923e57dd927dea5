r"""Checks of a cluster file before `ray up` spends money on it.

    python -m sda_ray.cluster.clusterfile cluster.yaml

Ray's own check ends at the outline, and a cluster without the token is open to anyone who can
connect. Keys of a cloud provider below `node_config` are left to the provider.
"""

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
TOKEN = ".ray/auth_token"
MAKE_TOKEN = "(umask 077; ray get-auth-token --generate)"  # Ray's own file is open to others
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = re.compile(r"--[\w-]+-port[= ](\d+)")
OUTGOING = range(32768, 61000)  # the ports that Linux gives to outgoing connections, by default


def check_cluster(file: Path) -> list[str]:
    r"""Returns the faults of a cluster file, one line each. The file is not changed.

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

    outline = [*_outline(config)]
    checks = () if outline else (_resources, _access, _paths)
    faults = [fault for check in checks for fault in check(config)]

    return [*_placeholders(text), *outline, *faults]


def _placeholders(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if "CHANGE-ME" in line.partition("#")[0]:
            yield f"line {number} still says CHANGE-ME: {line.strip()}"


def _outline(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields faults by Ray's schema of cluster files, which is beside its autoscaler in Ray 2.60."""

    from jsonschema import Draft7Validator

    ray = find_spec("ray")
    place = Path(ray.origin if ray and ray.origin else "")
    file = place.with_name("autoscaler") / "ray-schema.json"
    schema = json.loads(file.read_text()) if file.is_file() else {}

    for error in Draft7Validator(schema).iter_errors(config):
        yield f"{'.'.join(map(str, error.path)) or 'the file'}: {error.message}."


def _types(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return config.get("available_node_types") or {}


def _resources(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields misspelt resources: Ray takes any name for one of the user's own."""

    for name, node in _types(config).items():
        for key in node["resources"]:
            usual = key.upper().rstrip("S")

            if usual in ("CPU", "GPU") and key != usual:
                yield f"node type {name}: resource '{key}' is no {usual} to Ray. Write {usual}."


def _access(config: dict[str, Any]) -> Iterator[str]:
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

            for port in PORT.findall(command):
                if int(port) in OUTGOING:
                    yield (
                        f"{key} names port {port}, which an outgoing connection may hold: a node "
                        f"would fail to start now and then. Choose one below {OUTGOING.start}."
                    )

            host = re.search(r"--dashboard-host[= ][\"']?([^\s\"']+)", command)

            if host and host[1] not in LOOPBACK:
                yield f"{key} opens the dashboard to {host[1]}: write --dashboard-host=127.0.0.1."

    provider = config["provider"]

    for name, node in _types(config).items() if provider["type"] == "aws" else ():
        if not node["node_config"].get("SecurityGroupIds") and "security_group" not in provider:
            yield (
                f"node type {name} has no SecurityGroupIds: the group that Ray makes lets the "
                "whole internet in by SSH."
            )


def _paths(config: dict[str, Any]) -> Iterator[str]:
    for target, source in (config.get("file_mounts") or {}).items():
        path = Path(str(source)).expanduser()

        if not path.exists():
            hint = f" Create it: {MAKE_TOKEN}" if str(target).endswith(TOKEN) else ""
            where = "" if path.is_absolute() else f" in {Path.cwd()}, where you run `ray up`"
            yield f"file_mounts: {source} does not exist{where}.{hint}"
        elif str(target).endswith(TOKEN) and path.stat().st_mode & 0o077:
            yield f"{source} can be read by others: chmod 600 {source}"


if __name__ == "__main__":
    sys.exit("\n".join(check_cluster(Path(sys.argv[1]))) or None)
