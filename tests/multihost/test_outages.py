r"""Tests on a real cluster: a sweep survives whatever happens to nodes, and no stranger gets in.

One sweep of 6 trials is started by `ray submit` and loses, one after the other: workers on a node
that kills them, a node to a power cut, one to a partition of the network, a spot machine with
notice, a machine that is replaced by another, and its head.
"""

import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from lab import CHECKOUT, ROOT, Lab, wait

TRIALS = 6
SECONDS = 60  # that a trial would take alone: all together, longer than what happens to the nodes
REDONE = 60  # seconds of training that a loss may cost, and a step

SCRIPT = """from sda_ray import CONFIG, Sweep, loguniform, main

CONFIG = CONFIG | {{
    "window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1),
    "batch_size": 8, "epochs": {epochs},
}}
sweep = Sweep(
    "small", CONFIG, {{"learning_rate": loguniform(1e-4, 1e-2)}}, trials={trials}, pruner="none"
)

if __name__ == "__main__":
    main(sweep)
"""

Runs = dict[str, dict[str, Any]]


def runs(lab: Lab) -> Runs:
    r"""Returns what the head's disk says of the runs."""

    found: Runs = {}

    for file in sorted(lab.disk("head").glob("root/sda/runs/*_*/run.json")):
        run, here = json.loads(file.read_text()), file.parent
        lines, saved = here / "metrics.jsonl", here / "checkpoint.pth"
        text = lines.read_text() if lines.exists() else ""
        start = datetime.fromisoformat(run["attempts"][-1]["started"]).timestamp()
        since = max(start, saved.stat().st_mtime) if saved.exists() else start
        found[here.name] = {
            "status": run.get("status"),
            "hosts": [x["host"] for x in run["attempts"]],
            "ended": ["ended" in x for x in run["attempts"]],
            "epochs": [json.loads(x)["epoch"] for x in text.splitlines(True) if x[-1] == "\n"],
            "unsaved": time.time() - since,
            "state": (here / "state.pth").exists(),
        }

    return found


def at_work(lab: Lab, host: str) -> Runs:
    r"""Returns the runs whose newest attempt is on a host, and has not ended."""

    return {
        name: run
        for name, run in runs(lab).items()
        if run["hosts"][-1:] == [host] and not run["ended"][-1] and run["epochs"]
    }


def wait_for_work(lab: Lab, host: str, seconds: float = 240) -> str:
    r"""Waits until a host trains a run, and returns which."""

    try:
        return next(iter(wait(f"a trial on {host}", lambda: at_work(lab, host), seconds)))
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{lab.monitor()}\n{lab.node_log(host)}")


def wait_for_move(lab: Lab, name: str, before: Runs, seconds: float = 300) -> None:
    r"""Waits until a run has a new attempt."""

    attempts = len(before[name]["hosts"])
    wait(f"{name} to go on", lambda: len(runs(lab)[name]["hosts"]) > attempts, seconds)


def per_epoch(lab: Lab) -> float:
    r"""Returns the seconds that an epoch takes on this machine at its best."""

    words = "window=3 embedding=8 hidden_channels=8,16 hidden_blocks=1,1 batch_size=8 epochs=200 --threads=1"
    lab.run("head", f"python -m sda_ray train {words} --data {ROOT}/data --runs /tmp/speed", 300)
    lines = lab.run("head", "cat /tmp/speed/*/metrics.jsonl").splitlines()

    return min(json.loads(line)["seconds"] for line in lines[10:])


@pytest.fixture(scope="module")
def epochs(lab: Lab) -> int:
    return min(5000, max(500, round(SECONDS / per_epoch(lab))))


def test_strangers_get_nothing_and_only_ssh_and_ray_listen(lab: Lab) -> None:
    head = lab.ips["head"]
    stranger = f"HOME=/tmp RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'0' * 64}"
    jobs = "curl -s -o /dev/null -w '%{http_code}' -m 10"

    # From another host
    gcs = (
        f"from ray._raylet import GcsClient; GcsClient(address='{head}:6379').get_all_node_info()"
    )
    said = lab.run("w1", f'{stranger} timeout 60 python -c "{gcs}" && echo got in', code=None)
    assert "got in" not in said

    client = f"import ray; ray.init('ray://{head}:10001')"
    said = lab.run("w1", f'{stranger} timeout 60 python -c "{client}" && echo got in', code=None)
    assert "got in" not in said
    assert lab.run("w1", f"{jobs} http://{head}:8265/api/jobs/", code=None).endswith("000")
    submit = f"{stranger} timeout 60 ray job submit --address http://{head}:8265 -- id"
    assert "uid=" not in lab.run("w1", submit, code=None)

    # On the head itself, the dashboard knows who has the token; so does the agent of each node
    assert "401" in lab.run("head", f"{jobs} http://127.0.0.1:8265/api/jobs/", code=None)
    token = '-H "Authorization: Bearer $(cat ~/.ray/auth_token)"'
    assert "200" in lab.run("head", f"{jobs} {token} http://127.0.0.1:8265/api/jobs/", code=None)
    assert lab.run("head", "stat -c %a ~/.ray/auth_token").strip() == "600"

    for host in ("head", "w1"):
        for line in lab.run(host, "ss -tlnpH").splitlines():
            address = line.split()[3].rsplit(":", 1)[0]
            program = line.split("users:")[-1]

            if not address.strip("[]").removeprefix("::ffff:").startswith("127."):
                pid = re.search(r"pid=(\d+)", program)
                command = lab.run(host, f"tr '\\0' ' ' < /proc/{pid[1] if pid else 0}/cmdline")
                assert re.search(r"sshd|ray::|/ray/|-m ray\.", command), f"{host}: {line}"


def test_sweep_survives_the_loss_of_every_node(lab: Lab, epochs: int, tmp_path: Path) -> None:
    text = SCRIPT.format(epochs=epochs, trials=TRIALS)
    lab.run("client", f"cat > ~/small.py <<'END'\n{text}END")
    log = tmp_path / "submit.log"
    command = f"cd {CHECKOUT} && ray submit ~/cluster.yaml ~/small.py --address auto"
    submit = lab.start("client", command, log)
    moved = {wait_for_work(lab, host) for host in lab.workers}
    assert len(moved) == 2
    unsaved = []

    def lose(host: str) -> tuple[str, Runs]:
        r"""Returns a run that a host is about to lose, and all runs."""

        name, before = wait_for_work(lab, host), runs(lab)
        unsaved.append(before[name]["unsaved"])
        assert submit.poll() is None, log.read_text()

        return name, before

    # A node on which workers die, and die, and die: no more trials there
    for _ in range(3):
        name, before = lose("w1")
        lab.run("w1", "kill -9 $(pgrep -f [r]ay::ResourceTrainable)")
        wait_for_death(lab, name, before, log)

    assert "w1: 3 workers in a row died there" in wait_for_words(log, "No trial of this sweep")
    assert not at_work(lab, "w1") or name in at_work(lab, "w1")

    # A power cut, and the same machine again: for Ray it is a new node, and may have trials
    lab.hosts("kill", "w1")
    lab.hosts("start", "w1")
    wait_for_work(lab, "w1")
    wait_for_move(lab, name, before)

    name, before = lose("w1")
    lab.hosts("kill", "w1")
    wait_for_move(lab, name, before)
    lab.hosts("start", "w1")

    # A partition: the process lives on, and finds its run taken when it is back
    wait_for_work(lab, "w1")
    name, before = lose("w2")
    lab.hosts("link", "w2", "down")
    lab.wait_for(["w2"], alive=False)
    wait_for_move(lab, name, before)
    lab.hosts("link", "w2", "up")

    # A new machine in the place of a dead one has nothing of it; and the head loses power, too
    wait_for_work(lab, "w2")
    lab.hosts("kill", "w1")
    lab.wait_for(["w1"], alive=False)
    lab.hosts("start", "w1", "--fresh")
    name, before = lose("w2")
    lab.hosts("kill", "head")
    submit.wait(120)
    lab.hosts("start", "head")
    lab.up()

    # The same command carries on; meanwhile, the run that was lost is trained by itself as well
    words = f"--config {ROOT}/runs/{name} --data {ROOT}/data --runs /tmp/alone --threads 1"
    alone = lab.start("head", f"python -m sda_ray train {words}", tmp_path / "alone.log")
    assert lab.start("client", command, log).wait(900) == 0, log.read_text()
    found = runs(lab)

    assert len(found) == TRIALS
    assert len(found[name]["hosts"]) > len(before[name]["hosts"])
    assert max(unsaved) <= REDONE + 15, unsaved  # seconds of training, and of looking

    for run in found.values():  # each ended, and no epoch of any was written twice
        assert run["status"] == "finished" and run["state"]
        assert run["epochs"] == list(range(1, epochs + 1))

    assert alone.wait(900) == 0, (tmp_path / "alone.log").read_text()
    assert same_weights(lab, name)


def wait_for_death(lab: Lab, name: str, before: Runs, log: Path) -> None:
    r"""Waits until it is seen that the worker of a run has died."""

    attempts = len(before[name]["hosts"])

    def seen() -> bool:
        said = "workers in a row died there" in " ".join(log.read_text().split())

        return said or len(runs(lab)[name]["hosts"]) > attempts

    wait(f"the death of {name}", seen, 120)


def wait_for_words(log: Path, words: str) -> str:
    r"""Waits until a sweep has said something, and returns all that it said, in one line."""

    wait(words, lambda: re.search(words, " ".join(log.read_text().split())), 120)

    return " ".join(log.read_text().split())


def same_weights(lab: Lab, name: str) -> bool:
    r"""Tells whether a run, lost as often as it was, has the weights of one that never was."""

    code = (
        "import torch, pathlib, sys; "
        f"a = torch.load(pathlib.Path('{ROOT}/runs/{name}/state.pth').expanduser()); "
        "b = torch.load(next(pathlib.Path('/tmp/alone').glob('*/state.pth'))); "
        "print(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a))"
    )

    return lab.run("head", f'python -c "{code}"').split()[-1] == "True"
