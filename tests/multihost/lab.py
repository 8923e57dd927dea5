r"""A lab: machines of :mod:`hosts`, on which the project's own cluster file is launched.

The client has the checkout and the token, as a user's machine does; the others are what
`cluster.local.yaml` calls them. Everything is done as its first lines say.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

__all__ = ["ROOT", "SHARED", "Lab", "laboratory", "obstacle", "wait"]

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
VENV = Path(sys.prefix)
ROOT = "~/sda"  # on the disk of each host: no node sees that of another
SHARED = "/shared/sda"  # on a file system that all hosts have
NAMES = ("head", "w1", "w2")
TOOLS = {"sshd": "openssh-server", "rsync": "rsync", "ip": "iproute2", "nsenter": "util-linux"}
SLOW = float(os.environ.get("SDA_TEST_SLOW", "1"))  # times that this machine is slower

# What is asked on the head: without a driver of Ray, which would take seconds to start
NODES = """
import json
from ray._raylet import GcsClient
nodes = GcsClient(address="127.0.0.1:6379").get_all_node_info().values()
print(json.dumps({
    n.node_id.hex(): [n.node_manager_address, n.state == 0, dict(n.resources_total).get("CPU", 0)]
    for n in nodes
}))
"""


def obstacle() -> str:
    r"""Returns why there can be no hosts here, or nothing."""

    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts need root on Linux"

    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    found = {p.name for part in path.split(":") for p in Path(part or ".").glob("*")}

    if missing := [package for tool, package in TOOLS.items() if tool not in found]:
        return f"hosts need {' and '.join(missing)}"

    if "overlay" not in Path("/proc/filesystems").read_text():
        return "hosts need overlayfs"

    probe = ["unshare", "-m", "-n", "-p", "-f", "true"]

    if (done := subprocess.run(probe, capture_output=True, text=True)).returncode:
        return f"hosts need namespaces of their own: {done.stderr.strip()}"

    return ""


def wait(what: str, condition: Callable[[], Any], seconds: float, every: float = 0.5) -> Any:
    r"""Waits until a condition holds, looking every so many seconds, and returns what it gave."""

    until = time.monotonic() + SLOW * seconds

    while not (found := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {SLOW * seconds:.0f} s")

        time.sleep(every)

    return found


class Lab:
    r"""Creates the hosts, which are up until :meth:`close`.

    Arguments:
        state: The directory that holds all that is theirs, and is emptied first.
        names: The hosts beside the client.
        cpus: The trials at a time on a worker.
    """

    def __init__(self, state: Path, names: tuple[str, ...] = NAMES, cpus: int = 1) -> None:
        self.state, self.cpus = state, cpus
        self.environment = os.environ | {"HOSTS_STATE": str(state)}
        self.hosts("down")
        seen = dict.fromkeys((sys.base_prefix, str(VENV), str(CHECKOUT)))
        self.hosts("up", *names, *(f"--ro={path}" for path in seen if path != "/usr"))
        lines = self.hosts("status").splitlines()
        self.ips = {name: ip for name, ip, *_ in (line.split("\t") for line in lines)}
        self.workers = [name for name in names if name.startswith("w")]
        self.home("client")

    def hosts(self, *words: str) -> str:
        r"""Runs a command of `hosts.py` and returns what it says."""

        command = [sys.executable, str(HERE / "hosts.py"), *words]
        # Hosts outlive the command, and hold its output if they can
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=SLOW * 120
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

        return done.stdout

    def command(self, host: str, words: str) -> list[str]:
        r"""Returns the command that runs words of a shell on a host, as after a login."""

        shell = ["bash", "--login", "-c", f". ~/.bashrc; {words}"]

        return [sys.executable, str(HERE / "hosts.py"), "exec", host, "--", *shell]

    def run(self, host: str, words: str, seconds: float = 120, code: int | None = 0) -> str:
        r"""Runs words of a shell on a host to their end, and returns what they say."""

        done = subprocess.run(
            self.command(host, words),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SLOW * seconds,
        )
        assert code is None or done.returncode == code, f"{host}: {words}\n{done.stdout}"

        return done.stdout

    def start(self, host: str, words: str, log: Path) -> "subprocess.Popen[bytes]":
        r"""Starts words of a shell on a host."""

        with open(log, "wb") as output:
            return subprocess.Popen(
                self.command(host, words),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def disk(self, host: str) -> Path:
        r"""Returns the disk of a host that is up, as this machine sees it."""

        state = json.loads((self.state / "state.json").read_text())

        return Path(f"/proc/{state['hosts'][host]['process']['pid']}/root")

    def home(self, host: str) -> None:
        r"""Lets a host have the installed software at hand, as after `make demo`."""

        self.run(host, f"echo '. {VENV}/bin/activate; export PYTHONPATH={CHECKOUT}' >> ~/.bashrc")

    def cluster_file(self) -> str:
        r"""Returns `cluster.local.yaml` for these hosts.

        Addresses, user, key and paths are filled in, as a user does. The line that installs from
        PyPI, which no host reaches, gives the installed software of this machine instead, under
        what was sent; and shared memory and CPUs are such that all hosts fit on one machine.
        """

        text = (CHECKOUT / "cluster.local.yaml").read_text()
        workers = ", ".join(self.ips[name] for name in self.workers)
        changes = {
            "head_ip: CHANGE-ME": f"head_ip: {self.ips['head']}",
            "worker_ips: [CHANGE-ME]": f"worker_ips: [{workers}]",
            "ssh_user: CHANGE-ME": "ssh_user: root",
            "test -x ~/sda_ray/.venv/bin/pip || python3 -m venv --clear ~/sda_ray/.venv": "echo",
            "cd ~/sda_ray && .venv/bin/pip install -q -c constraints.txt -e '.[cluster]'": (
                f"ln -sfn {VENV} ~/sda_ray/.venv"
            ),
            "~/sda/": f"{ROOT}/",
            "SDA_RAY_ROOT=~/sda": f"PYTHONPATH=~/sda_ray SDA_RAY_ROOT={ROOT}",
            "ray start --head": f"ray start --head {STORE}",
            "$RAY_HEAD_IP:6379": f"$RAY_HEAD_IP:6379 --num-cpus={self.cpus} {STORE}",
        }

        for given, wanted in changes.items():
            assert given in text, f"cluster.local.yaml has no {given!r} any more"
            text = text.replace(given, wanted)

        return text

    def up(self) -> None:
        r"""Launches the cluster, and waits until all workers have joined."""

        self.run("client", f"cat > ~/cluster.yaml <<'END'\n{self.cluster_file()}END")
        self.run(
            "client", "test -e ~/.ray/auth_token || (umask 077; ray get-auth-token --generate)"
        )
        self.run("client", f"cd {CHECKOUT} && ray up -y --no-config-cache ~/cluster.yaml", 300)
        self.wait_for(self.workers, seconds=480)  # a worker that failed to start is tried again

    def nodes(self) -> dict[str, Any]:
        r"""Returns whether each node that was seen last at an address lives, by host."""

        said = self.run("head", f"python - <<'END'\n{NODES}END", 60, None).strip().splitlines()
        hosts = {ip: name for name, ip in self.ips.items()}

        try:
            known = json.loads(said[-1]).values() if said else []
        except ValueError:
            known = []  # Ray is not up there

        return {
            hosts[ip]: alive or any(a for other, a, _ in known if other == ip)
            for ip, alive, _ in known
        }

    def wait_for(self, names: list[str], alive: bool = True, seconds: float = 240) -> None:
        r"""Waits until nodes live, or are known to be dead."""

        try:
            wait(
                f"{names} {'up' if alive else 'dead'}",
                lambda: all(self.nodes().get(name, False) == alive for name in names),
                seconds,
                every=2,  # to look takes a second of a core
            )
        except TimeoutError as error:
            logs = [self.node_log(name) for name in names if alive and name != "head"]
            raise TimeoutError("\n".join((str(error), self.monitor(), *logs)))

    def monitor(self) -> str:
        r"""Returns the end of what Ray says of starting nodes."""

        logs = "/tmp/ray/session_latest/logs"

        return self.run("head", f"tail -n 40 {logs}/monitor.log {logs}/monitor.out", 60, None)

    def node_log(self, host: str) -> str:
        r"""Returns the ends of the logs of the raylet and its agents on a host."""

        logs = "raylet.out raylet.err dashboard_agent.log runtime_env_agent.log"

        return self.run(host, f"cd /tmp/ray/session_latest/logs; tail -n 20 {logs}", 60, None)

    def data(self, host: str = "head", root: str = ROOT) -> None:
        r"""Makes tiny data in the root on a host: 20, 4 and 4 trajectories of 12 states."""

        shared = self.state / "shared" / "data"
        shared.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)

        for split, n in {"train": 20, "valid": 4, "test": 4}.items():
            with h5py.File(shared / f"{split}.h5", "w") as f:
                f.create_dataset("x", data=rng.standard_normal((n, 12, 2, 16, 16), "f4"))

        self.run(host, f"mkdir -p {root}/data && cp /shared/data/*.h5 {root}/data/")

    def close(self) -> None:
        self.hosts("down")


STORE = "--object-store-memory=104857600"


@contextmanager
def laboratory(state: Path, names: tuple[str, ...] = NAMES) -> Iterator[Lab]:
    r"""Creates a lab that ends with the block, whatever happens."""

    lab = Lab(state, names)

    try:
        yield lab
    finally:
        lab.close()
