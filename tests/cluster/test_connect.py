r"""Tests for sda_ray.cluster.connect: a Ray of our own, and nobody else's."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from sda_ray.cluster.connect import RayGone, Slots, connected, fitting, map_on_ray
from sda_ray.cluster.ray_node import local_cpus
from sda_ray.core.errors import UserError

# Starts a Ray where another one seems to be running, says what it is like, and waits for a line
PROGRAM = """
import json, os, sys
from pathlib import Path
from sda_ray.cluster.connect import Slots, check_ray_init, connected

check_ray_init()

def below(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return children + [x for child in children for x in below(child)]

with connected(modules=["colorsys"]) as scratch:
    import ray

    @ray.remote(num_cpus=1)
    def look():
        return os.getcwd(), os.nice(0), os.environ["RAY_AUTH_MODE"]

    node, = ray.nodes()
    said = {
        "scratch": str(scratch),
        "address": ray.get_runtime_context().gcs_address,
        "cpus": node["Resources"]["CPU"],
        "worker": ray.get(look.remote()),
        "imported": "colorsys" in sys.modules,
        "processes": [[int(pid), os.getpgid(int(pid))] for pid in below(os.getpid())],
        "slots": [Slots(1, 0)(), Slots(0.5, 0)(), Slots(1, 0, 1)(), Slots(1, 1)()],
    }
    try:
        Slots(64, 0).check()
    except ValueError as error:
        said["refused"] = str(error)

    try:
        check_ray_init()
    except ValueError as error:
        said["again"] = str(error)

    slots, asked = Slots(1, 0), []
    slots.avoided = {node["NodeID"]: "node bad: 3 workers in a row died there"}
    slots.forgive = lambda: asked.append(1) or len(asked) == 1
    slots()
    said["asked"] = [len(asked)]
    slots._room, slots._counted = slots._room - 61, slots._counted - 61
    slots()  # some are given back
    said["asked"].append(len(asked))
    slots._counted -= 61

    try:
        slots()
    except ValueError as error:
        said["left"] = str(error)

    print(json.dumps(said), flush=True)
    sys.stdin.readline()
"""

# What a stranger on this machine can try
STRANGER = """
import sys
from sda_ray.cluster.connect import connected
with connected(sys.argv[1]):
    import ray
    print(ray.cluster_resources())
"""


@pytest.fixture
def place() -> Iterator[Path]:
    r"""A short directory, since Ray puts sockets below it."""

    place = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))
    (place / "home").mkdir()
    (place / "tmp").mkdir()
    yield place
    shutil.rmtree(place, ignore_errors=True)


def start(place: Path, *prefix: str, program: str = PROGRAM) -> "subprocess.Popen[str]":
    env = {key: x for key, x in os.environ.items() if not key.startswith("RAY_")} | {
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_ADDRESS": "127.0.0.1:1",
    }
    command = [*prefix, sys.executable, "-c", program]
    pipe = subprocess.PIPE

    return subprocess.Popen(
        command, env=env, cwd=place, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    )


def hear(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None

    return json.loads(process.stdout.readline())


def wait_for_end(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 60

    for pid in pids:
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, Path(f"/proc/{pid}/cmdline").read_text()
            time.sleep(0.1)


def test_ray_of_our_own_is_private_and_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taskset = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    first = start(place, *(taskset if shutil.which("taskset") else []))
    said = hear(first)
    scratch = Path(said["scratch"])

    # Not the one of RAY_ADDRESS; as many CPUs as our affinity
    assert not said["address"].endswith(":1")
    assert scratch.parent == place / "tmp"
    assert said["cpus"] == (1 if shutil.which("taskset") else local_cpus())
    assert said["worker"] == [str(place), 0, "token"]
    assert said["imported"]
    assert said["again"].startswith("the script has called ray.init, but a sweep starts a Ray of")

    # Ctrl-C in a terminal reaches no process of Ray
    assert len(said["processes"]) > 3
    assert os.getpgid(first.pid) not in {group for _, group in said["processes"]}

    # What fits
    if shutil.which("taskset"):
        assert said["slots"] == [1, 2, 1, 0]

    assert "a trial wants CPU=64, but node " in said["refused"]
    assert "--cpus-per-trial" in said["refused"]

    # Nothing is given up before it is known that no node is to be had
    assert said["asked"] == [0, 1]
    assert "no node left for a trial: node bad: 3 workers in a row died" in said["left"]

    # Nobody else gets in
    env = {**os.environ, "HOME": str(place / "tmp"), "RAY_AUTH_MODE": "token"}
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, said["address"]],
        env=env | {"RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert stranger.returncode != 0
    assert "CPU" not in stranger.stdout
    assert "is that of another sweep or user" in stranger.stderr
    assert "InvalidAuthToken" not in stranger.stderr  # Ray's lines, one for each try

    # Killed, its Ray ends, and leaves a directory, which the next one removes
    first.kill()
    first.communicate()
    assert scratch.exists()
    wait_for_end(pid for pid, _ in said["processes"])
    stranger_directory = place / "tmp" / "sda-ray-stranger"
    stranger_directory.mkdir()

    # Nor does the job of another Ray reach it
    job = {"runtime_env": {"env_vars": {"A": "1"}, "pip": ["nonsense"]}, "metadata": {}}
    monkeypatch.setenv("JOB", json.dumps(job))
    prefix = "import os\nos.environ['RAY_JOB_CONFIG_JSON_ENV_VAR'] = os.environ['JOB']\n"
    second = start(place, program=prefix + PROGRAM)
    said = hear(second)
    assert said["worker"] == [str(place), 0, "token"]
    assert not scratch.exists()
    assert stranger_directory.exists()
    assert Path(said["scratch"]).exists()
    _, errors = second.communicate("\n", timeout=60)

    assert second.returncode == 0
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR is ignored" in errors
    assert not Path(said["scratch"]).exists()
    assert list((place / "home").iterdir()) == []


def test_script_that_imports_ray_first_is_refused(place: Path) -> None:
    r"""Ray has read by then that it needs no token, and anyone could run code in it."""

    first = start(place, program="import ray\n" + PROGRAM)
    _, errors = first.communicate(timeout=120)

    assert first.returncode != 0
    assert "ray was imported before the sweep started a Ray of its own" in errors


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (["env", "PYTHONOPTIMIZE=2"], "Ray needs docstrings: unset PYTHONOPTIMIZE"),
        (["unshare", "--user", "--net"], "127.0.0.1 does not answer: [Errno 101] Network is"),
    ],
)
def test_process_that_cannot_start_a_ray_is_refused_at_once(
    prefix: list[str], message: str, place: Path
) -> None:
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip(f"{prefix[0]} is not allowed here")

    begin = time.monotonic()
    process = start(place, *prefix)
    _, errors = process.communicate(timeout=120)

    assert process.returncode != 0 and message in errors
    assert time.monotonic() - begin < 60
    assert [*(place / "tmp").iterdir()] == []


def test_address_without_a_cluster_is_an_error() -> None:
    # Not `auto`: that would find a Ray of somebody else on this machine, and wait for it.
    with pytest.raises(UserError, match="no Ray at 'nonsense'"), connected("nonsense"):
        pass


@pytest.mark.parametrize(
    ("cpus", "gpus", "fits"),
    [(1, 0, 32), (0.1, 0, 320), (1, 1, 4), (1, 0.1, 32), (2, 0.1, 16), (1, 0.4, 8), (1, 3, 1)],
)
def test_as_many_trials_fit_as_ray_would_place(cpus: float, gpus: float, fits: int) -> None:
    r"""A share of a GPU lies on a single one: 0.4 fits twice on each."""

    assert fitting(Slots(cpus, gpus).wanted, {"CPU": 32.0, "GPU": 4.0}) == fits


def test_trials_at_a_time_on_this_machine_are_known_before_ray_starts() -> None:
    assert Slots(1, 0).local() == local_cpus()
    assert Slots(0.5, 0).local() == 2 * local_cpus()
    assert Slots(0.5, 0, most=1).local() == 1


def test_trials_leave_cpus_to_other_commands_unless_their_number_is_given() -> None:
    slots, limited, here = Slots(1, 0), Slots(1, 0, most=9), local_cpus()
    assert slots._shared(9) == 9
    slots.left = limited.left = lambda: 0

    assert limited._shared(9) == 9
    assert [slots._shared(n) for n in (0, here, here + 5)] == [0, 1, 5]  # 5 where others joined


def test_trial_that_fits_nowhere_is_refused_before_ray_starts() -> None:
    with pytest.raises(UserError, match=r"wants CPU=64, but this machine has CPU=\d+ GPU=\d+"):
        Slots(64, 0).check_local()

    with pytest.raises(UserError, match="wants CPU=1 GPU=99, but this machine"):
        Slots(1, 99).check_local()

    Slots(1, 0).check_local()


def test_nodes_of_one_name_are_all_looked_at() -> None:
    nodes = [("node vm", {"CPU": 4.0}), ("node vm", {"CPU": 1.0}), *2 * [("node vm", {})]]
    Slots(4, 0)._check(nodes)

    with pytest.raises(UserError, match=r"CPU=1 GPU=0, node vm has CPU=0 GPU=0\. Lower"):
        Slots(8, 0)._check(nodes)


def test_ray_without_a_node_is_gone() -> None:
    with pytest.raises(RayGone, match="Ray is gone: it has no node"):
        Slots(4, 0)._check([])


def mapped() -> dict[int, tuple[int, int]]:
    return dict(map_on_ray(lambda i: (i, os.getpid()), range(5), workers=2))


def test_every_item_is_mapped_on_workers() -> None:
    # A process in which Ray was imported, as by other tests, cannot start one of its own
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(mapped).result()

    assert {i: result[0] for i, result in found.items()} == {i: i for i in range(5)}
    assert os.getpid() not in {pid for _, pid in found.values()}


def test_map_needs_a_worker() -> None:
    with pytest.raises(UserError, match="workers is 0, but must be at least 1"):
        next(map_on_ray(str, [1], workers=0))
