r"""Tests of a sweep as a job of Slurm, on hosts that are killed and cut off under it."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import SHARED, SLOW, Lab, laboratory, obstacle, wait
from standin import Job, install

from sda_ray.cluster.join import read_head
from sda_ray.core import locked

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())

EPOCHS = 400  # which take a node minutes, so that others have joined before they are done

SWEEP = f"""
from sda_ray import CONFIG, Sweep, loguniform, main

small = {{
    "window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1),
    "batch_size": 8, "epochs": {EPOCHS},
}}
space = {{"weight_decay": loguniform(1e-4, 1e-2)}}
sweep = Sweep("jobs", CONFIG | small, space, trials=3, pruner="none")

if __name__ == "__main__":
    main(sweep)
"""

TAKEOVER = 120  # seconds within which a job that starts again drives its sweep


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    r"""Hosts of our own, on which nothing of Ray runs."""

    with laboratory(tmp_path_factory.mktemp("hosts"), ("w1", "w2", "w3")) as lab:
        yield lab


@pytest.fixture
def job(hosts: Lab) -> Iterator[Job]:
    r"""A job that was submitted on the client, by `sda-ray slurm`. A test that fails shows its logs."""

    shared = hosts.state / "shared"
    install(shared / "slurm")
    hosts.data("client", SHARED)
    (shared / "sda" / "jobs.py").write_text(SWEEP)
    variables = (
        "export PATH=/shared/slurm/bin:$PATH SLURM_STAND_IN=/shared/slurm WANDB_MODE=disabled "
        f"OMP_NUM_THREADS=1 SDA_RAY_ROOT={SHARED}"
    )

    for host in ("client", "w1", "w2", "w3"):
        if host != "client":
            hosts.home(host)

        hosts.run(host, f"echo '{variables}' >> ~/.bashrc")

    words = f"cd {SHARED} && sda-ray slurm jobs.py --submit -- --nodes=2 -c1 --time=1:00:00"
    said = hosts.run("client", words.replace("sda-ray", "python -m sda_ray"))
    assert "Submitted batch job 1" in said

    yield (job := Job(hosts, shared / "slurm"))

    for log in sorted(job.directory.glob("log.*")):
        print(f"== {log.name}", log.read_text(errors="replace"), sep="\n")


def test_job_survives_whatever_befalls_its_hosts(hosts: Lab, job: Job) -> None:
    root = hosts.state / "shared" / "sda"
    directory = root / "runs" / "sweeps" / "jobs"

    def attempt() -> int:
        file = directory / "lease.json"
        return int(json.loads(file.read_text())["attempt"]) if file.exists() else 0

    def epochs() -> dict[str, int]:
        files = root.glob("runs/*/metrics.jsonl")
        return {file.parent.name[-8:]: len(file.read_text().splitlines()) for file in files}

    def nodes() -> set[str]:
        found = [json.loads(file.read_text()) for file in root.glob("runs/*/lease.json")]
        return {lease["host"] for lease in found if lease["pid"]}

    def works() -> bool:
        return read_head(directory) is not None and len(nodes()) == 2

    # Two nodes, both of which work; before the end of its time it saves all, and is requeued
    process = job.start(["w1", "w2"])
    wait("both nodes to work", lambda: nodes() == {"w1", "w2"} and len(epochs()) >= 2, 180)
    job.signal("w1", "USR1")
    assert process.wait(SLOW * 120) == 75, job.log.read_text()
    assert job.requeued
    kept = epochs()
    statuses = [json.loads(file.read_text())["status"] for file in root.glob("runs/*/run.json")]
    assert set(statuses) == {"interrupted"}
    assert read_head(directory) is None
    assert not (directory / "token").exists()

    # Carried on, until the host of the driver loses its power
    process = job.start(["w1", "w2"])
    wait("it to go on", lambda: works() and sum(epochs().values()) > sum(kept.values()) + 5, 180)
    assert attempt() == 2
    hosts.hosts("kill", "w1")
    process.wait(60)

    # From another host, which is then cut off and frozen, with all that it has begun to write
    since = time.monotonic()
    process = job.start(["w2", "w3"])
    log = job.log
    wait("the sweep to be taken over", lambda: attempt() == 3, TAKEOVER)
    assert time.monotonic() - since < SLOW * TAKEOVER
    before = sum(epochs().values())
    wait("it to go on", lambda: works() and sum(epochs().values()) > before + 5, 180)
    hosts.hosts("link", "w2", "down")
    hosts.run("w2", "kill -STOP -1", code=None)

    # Between two writes: its lock would outlast it here, where a server takes it back after a while
    while any(is_locked(file) for file in root.rglob("*.lock")):
        hosts.run("w2", "kill -CONT -1", code=None)
        process.send_signal(signal.SIGCONT)
        hosts.run("w2", "sleep 0.1; kill -STOP -1", code=None)

    # From a third one, on which it ends
    since = time.monotonic()
    last = job.start(["w3"])
    wait("the sweep to be taken over", lambda: attempt() == 4, TAKEOVER)
    assert time.monotonic() - since < SLOW * TAKEOVER
    wait("the sweep to end", lambda: last.poll() is not None, 900)
    assert last.returncode == 0, job.log.read_text()
    assert sorted(epochs().values()) == 3 * [EPOCHS]
    assert len(list(root.glob("runs/*/state.pth"))) == 3

    # The one that was cut off comes back, finds that it was taken over, and writes not a byte
    written = snapshot(root)
    hosts.hosts("link", "w2", "up")
    hosts.run("w2", "kill -CONT -1", code=None)
    process.send_signal(signal.SIGCONT)  # what leads into the host has stopped with it
    code, said = process.wait(SLOW * 240), log.read_text()
    assert code != 0 or "Best configuration" in said, said  # it may see what the others have done
    try:
        wait(
            "its processes to end",
            lambda: not hosts.run("w2", "pgrep -f '[r]ay::' || true").strip(),
            120,
        )
    except TimeoutError as error:
        left = hosts.run("w2", "ps -eo pid,ppid,pgid,sid,etimes,stat,wchan:20,args")
        raise TimeoutError(f"{error}\n{left}\n{said}") from error

    assert snapshot(root) == written


def is_locked(file: Path) -> bool:
    try:
        with locked(file, wait=False):
            return False
    except BlockingIOError:
        return True


def snapshot(root: Path) -> dict[str, Any]:
    r"""Returns what every file in a directory is, and when it was last written."""

    return {
        str(file.relative_to(root)): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mtime_ns,
        )
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }
