#!/usr/bin/env python3
r"""Throw-away machines on one Linux machine, for tests that need a real cluster.

Each host is one tree of processes with its own network, PIDs, mounts, name and IPC: it has its own
IP, sshd, /tmp, /dev/shm, home, and a copy-on-write copy of the machine's disk. `ray stop`, which
kills by name, sees its own host only. The hosts reach each other and nothing else.

  hosts.py up head w1 w2 [--ro DIR] [--rw DIR]     boots them, and one called `client`
  hosts.py exec client -- ray up -y cluster.yaml   runs a command on a host
  hosts.py kill w1          power cut: its link goes silent, then all of it dies
  hosts.py crash w1         all of it dies, and its kernel still closes connections
  hosts.py start w1         boots it again: same name, IP and disk, new /tmp
                            (--fresh: with an empty disk, as a machine that replaces it)
  hosts.py link w1 down     a partition of the network: it lives on; `link w1 up` ends that
  hosts.py status           one line per host
  hosts.py down             ends all of them; may be repeated

Needs root, overlayfs, iproute2 and openssh-server. $HOSTS_STATE (by default sda-hosts in the
temporary directory) holds the key for SSH, each host's /tmp, which survives it, and `shared`, which
every host has at /shared. $HOSTS_SUBNET and $HOSTS_TAG let two sets of hosts live side by side.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from namespaces import end, enter, is_alive, run, serve_host, serve_switch, spawn

STATE = Path(os.environ.get("HOSTS_STATE") or Path(tempfile.gettempdir()) / "sda-hosts")
SUBNET = os.environ.get("HOSTS_SUBNET", "10.231.7")
TAG = os.environ.get("HOSTS_TAG", "sda")
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"

State = dict[str, Any]


def load() -> State:
    try:
        return json.loads((STATE / "state.json").read_text())
    except FileNotFoundError:
        return {"hosts": {}, "switch": None, "binds": []}


def save(state: State) -> None:
    aside = STATE / "state.json.new"
    aside.write_text(json.dumps(state, indent=1))
    aside.replace(STATE / "state.json")


def host_of(state: State, name: str) -> dict[str, Any]:
    if name not in state["hosts"]:
        raise SystemExit(f"hosts: there is no '{name}', but {', '.join(state['hosts']) or 'none'}")

    return state["hosts"][name]


def boot(state: State, name: str) -> None:
    r"""Boots a host that is down, and connects it to the switch."""

    host, switch = host_of(state, name), state["switch"]

    if is_alive(host.get("process")):
        return

    host["boots"] = host.get("boots", 0) + 1
    tmp = STATE / "tmp" / f"{name}.{host['boots']}"
    tmp.mkdir(parents=True)
    tmp.chmod(0o1777)
    names = {other: known["ip"] for other, known in state["hosts"].items()}

    def main(wait: int) -> None:
        os.read(wait, 1)
        serve_host(STATE, name, host["ip"], names, state["binds"], tmp)

    process, go = spawn(f"{TAG}-{name}", STATE / f"{name}.log", main, switch)
    host["process"], host["tmp"] = process, str(tmp)
    save(state)

    # A cable: one end at the switch, the other in the host
    port, pid = host["port"], str(process["pid"])
    ip = ("ip", "link")
    subprocess.run(enter(switch, *ip, "del", port, network=True), stderr=subprocess.DEVNULL)
    peer = ("type", "veth", "peer", "name", "eth0", "netns", pid)
    run(*enter(switch, *ip, "add", port, *peer, network=True))
    run(*enter(switch, *ip, "set", port, "master", "br0", "up", network=True))
    os.write(go, b"1")
    os.close(go)


def wait_for_ssh(state: State, names: list[str], seconds: float = 60) -> None:
    r"""Waits until the sshd of each host answers the host itself."""

    until = time.monotonic() + seconds

    for name in names:
        host = host_of(state, name)
        probe = f"exec 3<>/dev/tcp/{host['ip']}/22 && head -c 4 <&3"

        while True:
            if not is_alive(host["process"]):
                raise SystemExit(f"hosts: {name} died, see {STATE}/{name}.log")

            command = enter(host["process"], "bash", "-c", probe)

            if subprocess.run(command, capture_output=True).stdout == b"SSH-":
                break

            if time.monotonic() > until:
                raise SystemExit(f"hosts: {name}'s sshd is silent, see {STATE}/{name}.log")

            time.sleep(0.05)


def up(args: argparse.Namespace) -> None:
    state = load()

    if any(is_alive(x.get("process")) for x in state["hosts"].values()) or is_alive(
        state["switch"]
    ):
        raise SystemExit("hosts: they are up. `hosts.py down` ends them")

    shutil.rmtree(STATE, ignore_errors=True)
    (STATE / "shared").mkdir(parents=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(STATE / "id_ed25519"))
    names = list(dict.fromkeys(["client", *args.names]))
    binds = [(p, True) for p in args.ro] + [(p, False) for p in args.rw]
    hosts = {name: {"ip": f"{SUBNET}.{10 + i}", "port": f"p{i}"} for i, name in enumerate(names)}
    process, go = spawn(f"{TAG}-switch", STATE / "switch.log", lambda wait: serve_switch(STATE))
    os.close(go)
    state = {
        "hosts": hosts,
        "binds": [(os.path.abspath(path), ro) for path, ro in binds],
        "switch": process,
    }
    save(state)
    until = time.monotonic() + 30

    while not (STATE / "switch.ready").exists():
        if time.monotonic() > until or not is_alive(process):
            raise SystemExit(f"hosts: no switch, see {STATE}/switch.log")

        time.sleep(0.02)

    for name in names:
        boot(state, name)

    wait_for_ssh(state, names)
    status(args)


def start(args: argparse.Namespace) -> None:
    state = load()
    host = host_of(state, args.name)

    if args.fresh and not is_alive(host.get("process")):
        disk = str(STATE / "mnt" / args.name)
        run("nsenter", "-t", str(state["switch"]["pid"]), "-m", "--", "rm", "-rf", disk)

    boot(state, args.name)
    wait_for_ssh(state, [args.name])


def set_link(state: State, name: str, way: str) -> None:
    port = host_of(state, name)["port"]
    run(*enter(state["switch"], "ip", "link", "set", port, way, network=True))


def link(args: argparse.Namespace) -> None:
    set_link(load(), args.name, args.way)


def kill(args: argparse.Namespace) -> None:
    state = load()
    set_link(state, args.name, "down")  # first silence: nobody is told of the death
    end(host_of(state, args.name)["process"])


def crash(args: argparse.Namespace) -> None:
    end(host_of(load(), args.name)["process"])


def execute(args: argparse.Namespace) -> None:
    process = host_of(load(), args.name)["process"]

    if not is_alive(process):
        raise SystemExit(f"hosts: {args.name} is down")

    env = {
        "PATH": args.path,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "PYTHONUNBUFFERED": "1",
        **dict(word.split("=", 1) for word in args.env),
    }
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    command = enter(process, *words)
    os.execvpe(command[0], command, env)


def status(args: argparse.Namespace) -> None:
    for name, host in load()["hosts"].items():
        alive = "up" if is_alive(host.get("process")) else "down"
        pid = (host.get("process") or {}).get("pid")
        boots, tmp = host.get("boots", 0), host.get("tmp")
        print(f"{name}\t{host['ip']}\t{alive}\tpid={pid}\tboots={boots}\ttmp={tmp}")


def down(args: argparse.Namespace) -> None:
    state = load()

    for host in state["hosts"].values():
        end(host.get("process"))

    end(state["switch"])

    if not args.keep:
        shutil.rmtree(STATE, ignore_errors=True)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("up")
    command.add_argument("names", nargs="+")
    command.add_argument("--ro", action="append", default=[], help="a directory all may read")
    command.add_argument("--rw", action="append", default=[], help="… and write, as on NFS")
    command.set_defaults(run=up)

    for name, function in {"start": start, "kill": kill, "crash": crash}.items():
        command = commands.add_parser(name)
        command.add_argument("name")
        command.set_defaults(run=function)

        if name == "start":
            command.add_argument("--fresh", action="store_true", help="with an empty disk")

    command = commands.add_parser("link")
    command.add_argument("name")
    command.add_argument("way", choices=["up", "down"])
    command.set_defaults(run=link)

    command = commands.add_parser("exec")
    command.add_argument("--env", action="append", default=[], metavar="KEY=VALUE")
    path = os.environ.get("HOSTS_PATH", f"{sys.prefix}/bin:{SYSTEM}")
    command.add_argument("--path", default=path)
    command.add_argument("name")
    command.add_argument("command", nargs=argparse.REMAINDER)
    command.set_defaults(run=execute)

    commands.add_parser("status").set_defaults(run=status)

    command = commands.add_parser("down")
    command.add_argument("--keep", action="store_true", help="keep logs, /tmp and /shared")
    command.set_defaults(run=down)

    return parser.parse_args(words)


if __name__ == "__main__":
    arguments = parse()
    arguments.run(arguments)
