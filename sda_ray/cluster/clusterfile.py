r"""Checks of a cluster file before `ray up` spends money on it.

    python -m sda_ray.cluster.clusterfile cluster.yaml

Ray's own check ends at the outline, and a cluster without the token is open to anyone who can
connect. Keys of a cloud provider below `node_config` are left to the provider.
"""

import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["check_cluster", "main"]

STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
TOKEN = ".ray/auth_token"
MAKE_TOKEN = "(umask 077; ray get-auth-token --generate)"  # Ray's own file is open to others
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PIN = re.compile(r"\bray(?:\[[^\]]*\])?==(\d+(?:\.\w+)*)")
IMAGE = re.compile(r"\brayproject/[\w-]+:(\d+\.\d+\.\d+)")

# https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html
KEYS = [
    "cluster_name",
    "max_workers",
    "upscaling_speed",
    "idle_timeout_minutes",
    "docker",
    "provider",
    "auth",
    "available_node_types",
    "head_node_type",
    "file_mounts",
    "cluster_synced_files",
    "file_mounts_sync_continuously",
    "rsync_exclude",
    "rsync_filter",
    "metadata",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "no_restart",
]
NODE_KEYS = [
    "node_config",
    "resources",
    "labels",
    "min_workers",
    "max_workers",
    "idle_timeout_s",
    "priority",
    "docker",
    "initialization_commands",
    "worker_setup_commands",
]


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
    more = (
        () if outline else (_resources(config), _access(config), _paths(config), _versions(config))
    )

    return [*_placeholders(text), *outline, *(fault for check in more for fault in check)]


def _placeholders(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if "CHANGE-ME" in line.partition("#")[0]:
            yield f"line {number} still says CHANGE-ME: {line.strip()}"


def _outline(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields keys that Ray does not know, misses, or expects to hold something else."""

    types = config.get("available_node_types", {})
    provider = config.get("provider")
    yield from _unknown("the file", config, KEYS)

    if not isinstance(config.get("cluster_name"), str):
        yield "cluster_name is missing."

    if not isinstance(provider, dict) or "type" not in provider:
        yield "provider is missing, or has no type."

    for key in KEYS:
        if key.endswith("_commands") and not isinstance(config.get(key, []), list):
            yield f"{key} must be a list of commands."

    if not isinstance(config.get("file_mounts", {}), dict):
        yield "file_mounts must map paths on the nodes to paths here."

    if not isinstance(types, dict) or not all(isinstance(x, dict) for x in types.values()):
        yield "available_node_types must map names to node types."
        return

    if types and config.get("head_node_type") not in types:
        yield f"head_node_type is {config.get('head_node_type')!r}, but must be one of {', '.join(types)}."

    for name, node in types.items():
        yield from _unknown(f"node type {name}", node, NODE_KEYS)

        for key in ("resources", "node_config"):
            if not isinstance(node.get(key), dict):
                yield f"node type {name}: {key} is missing."

        most = node.get("max_workers", config.get("max_workers", 0))

        if node.get("min_workers", 0) > most:
            yield f"node type {name}: min_workers is {node['min_workers']}, but max_workers {most}."


def _unknown(where: str, given: dict[str, Any], known: list[str]) -> Iterator[str]:
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1, 0.5)
            yield f"{where} has '{key}', which Ray does not know." + "".join(
                f" Did you mean '{x}'?" for x in near
            )


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
    r"""Yields ways in for others."""

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


def _versions(config: dict[str, Any]) -> Iterator[str]:
    r"""Yields versions of Ray that differ from this machine's: they cannot talk to each other."""

    pinned: dict[str, str] = {}
    words = str(config)

    for name in set(re.findall(r"(?:-c|--constraint) ?=?([\w./-]+\.txt)", words)):
        if (file := Path(name)).is_file():
            pinned |= dict.fromkeys(PIN.findall(file.read_text()), name)

    pinned |= dict.fromkeys(PIN.findall(words) + IMAGE.findall(words), "the file itself")

    try:
        own = version("ray")
    except PackageNotFoundError:
        return

    for other, where in pinned.items():
        if other != own:
            yield f"the nodes get Ray {other} by {where}, but this machine has {own}."

    if not pinned:
        yield "no version of Ray is pinned: the nodes would get the newest one."


def main(words: list[str]) -> int:
    r"""Prints the faults of cluster files, and returns 1 if there are any."""

    count = 0

    for word in words or ["cluster.yaml"]:
        faults = check_cluster(Path(word))
        count += len(faults)
        print(f"{word}: {f'{len(faults)} to correct' if faults else 'fine'}")

        for fault in faults:
            print(f"  {fault}")

    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
