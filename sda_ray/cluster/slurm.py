r"""Sweeps as jobs of Slurm: the script of a job, and the process that it runs.

The script runs `python -m sda_ray.cluster.slurm`, the first process of the job. It starts Ray on its
own node and, by `srun`, on all others, then the sweep's driver, and handles Slurm's signals:

* SIGUSR1, shortly before the end of the job: the driver stops, every trial saves a checkpoint, and
  the job is requeued.
* SIGTERM: the same, without requeueing. Slurm itself requeues jobs that it preempts.

The token of the job's Ray is made here and reaches the other nodes through the standard input of
`srun`: no command, environment or script contains it.
"""

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core import UserError, deadline, log_warnings, python_command, say
from .join import stay
from .ray_node import RayNode, own_ip, started

# Default options of sbatch -> the spellings of options that replace them
DEFAULTS = {
    "--job-name={name}": "-J --job-name",
    "--output={directory}/slurm-%j.log": "-o --output",
    "--ntasks-per-node=1": "-n --ntasks --ntasks-per-node",
    "--open-mode=append": "--open-mode",
    "--requeue": "--requeue --no-requeue",
    "--signal=B:USR1@120": "--signal",
}

SCRIPT = """\
#!/bin/bash
# Resumes sweep '{name}' from its current state. Written by `sda-ray slurm`; submit it with
#
#   sbatch {file}
#
{options}

# The first process of the job starts Ray on all nodes, for this job alone. Before the time limit,
# trials save a checkpoint and the job is requeued; it ends when the sweep is done.
{environment}exec {command}
"""

TIME_UP = os.EX_TEMPFAIL  # exit code of a sweep whose time is up, see :mod:`sda_ray.sweep.launch`
STOP_TIMEOUT = 100.0  # seconds for the driver to stop, if the end of the job is unknown
REQUEUE_BEFORE = 20.0  # seconds before its end at which the job is requeued in any case

# Variables of the whole allocation, which srun would apply to a part of it
WHOLE = (
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_TASK",
    "SLURM_TRES_PER_TASK",
)


def job_script(
    name: str, directory: Path, file: Path, words: Sequence[str], given: Sequence[str]
) -> str:
    r"""Returns the script of a job that runs a sweep.

    Arguments:
        file: The file of the script.
        words: The arguments of `sda-ray sweep`.
        given: The options of sbatch.
    """

    command = python_command("sda_ray.cluster.slurm", f"--job={name}", *words)
    package = Path(__file__).parents[2]
    environment = f"export PYTHONPATH={shlex.quote(str(package))}${{PYTHONPATH:+:$PYTHONPATH}}\n"

    return SCRIPT.format(
        name=name,
        file=shlex.quote(str(file)),
        options="\n".join(f"#SBATCH {line}" for line in _options(name, directory, given)),
        environment="" if package.name == "site-packages" else environment,
        command=shlex.join(command),
    )


def _options(name: str, directory: Path, given: Sequence[str]) -> list[str]:
    r"""Returns the options of a script, one per line: the defaults, then those of the user."""

    place = str(directory).replace("%", "%%")  # %j, for one, is the number of the job
    lines = [
        _quote(option.format(name=f"sda-ray-{name}", directory=place))
        for option, spellings in DEFAULTS.items()
        if not names(given) & set(spellings.split())
    ]

    for word in given:
        if word.startswith("-"):
            lines.append(_quote(word))
        else:
            lines[-1] += " " + _quote(word)

    return lines


def names(given: Sequence[str]) -> set[str]:
    r"""Returns the names of options: `-c` of `-c4`, `--time` of `--time=1:00`."""

    return {
        word.partition("=")[0] if word.startswith("--") else word[:2]
        for word in given
        if word.startswith("-")
    }


def _quote(word: str) -> str:
    plain = re.fullmatch(r"[\w@%+=:,./\[\]-]+", word)

    return word if plain else '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def main(words: Sequence[str]) -> None:
    r"""Runs a sweep in this allocation; with `--node`, a further node of its Ray."""

    log_warnings()

    try:
        sys.exit(_node() if words == ["--node"] else _run(words))
    except UserError as error:
        say(f"sda-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(words: Sequence[str]) -> int:
    r"""Runs Ray and the driver in this allocation, and returns the exit code of the job."""

    job = os.environ.get("SLURM_JOB_ID")

    if job is None:
        raise UserError("this runs in a Slurm job only: submit the script with sbatch.")

    received = _signals(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    end, token = deadline(None, os.environ), secrets.token_hex(32)
    others = _others(os.environ.get("SLURM_JOB_NODELIST", ""))
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    print(f"job {job}, start {int(restarts) + 1 if restarts.isdigit() else '?'}", flush=True)

    with started(token, ip=own_ip(others[0]) if others else None) as head:
        print(f"Ray at {head.address}: {head.cpus} CPUs here", flush=True)

        with _workers(others, head.address, token):
            code = _drive(words, head, received, end)

            # Before the nodes are released, which may take longer than the time left
            if code == TIME_UP or (code != 0 and signal.SIGUSR1 in received):
                code = _requeue(job)

    return code


def _signals(*numbers: int) -> list[int]:
    received: list[int] = []

    for number in numbers:
        signal.signal(number, lambda number, frame: received.append(number))

    return received


def _others(nodes: str) -> list[str]:
    r"""Returns the nodes of the allocation other than this one, the first."""

    if not set(nodes) & set("[,"):
        return []

    command = ["scontrol", "show", "hostnames", nodes]

    return subprocess.check_output(command, text=True).split()[1:]


@contextmanager
def _workers(nodes: list[str], address: str, token: str) -> Iterator[None]:
    r"""Starts a node of Ray on each of the others; they stop when their standard input ends."""

    if not nodes:
        yield
        return

    environment = {key: x for key, x in os.environ.items() if key not in WHOLE}
    command = [
        *["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"],
        "--cpu-bind=none",
        *[f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=0", "--wait=0", "--unbuffered"],
        *python_command("sda_ray.cluster.slurm", "--node"),
    ]
    step = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, start_new_session=True
    )
    assert step.stdin is not None

    try:
        with suppress(BrokenPipeError):
            step.stdin.write(f"{address} {token}\n".encode())
            step.stdin.flush()

        yield
    finally:
        with suppress(BrokenPipeError):
            step.stdin.close()

        with suppress(subprocess.TimeoutExpired):
            step.wait(30)

        step.kill()
        step.wait()


def _node() -> int:
    r"""Runs a node of Ray until standard input ends, or Slurm asks it to leave."""

    received = _signals(signal.SIGTERM, signal.SIGINT)
    address, token = sys.stdin.readline().split()
    ip = own_ip(address.rpartition(":")[0])
    os.set_blocking(sys.stdin.fileno(), False)

    def over() -> str:
        with suppress(BlockingIOError):
            if os.read(sys.stdin.fileno(), 1) == b"":
                return "the sweep has ended, or stopped"

        return "Slurm asked for it" if received else ""

    with started(token, address, ip) as node:
        print(f"{os.uname().nodename}: {node.cpus} CPUs here", flush=True)
        why = stay(node, over)

    print(f"{os.uname().nodename}: left: {why}", flush=True)

    return 0


def _drive(words: Sequence[str], head: RayNode, received: list[int], end: float | None) -> int:
    r"""Runs the driver to its end, passing on Slurm's signals. Returns its exit code."""

    command = python_command("sda-ray", "sweep", *words, f"--address={head.address}")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(head.directory / "token")}
    environment = os.environ | token
    environment.pop("RAY_ADDRESS", None)
    environment.pop("RAY_AUTH_TOKEN", None)
    driver = subprocess.Popen(command, env=environment, start_new_session=True)
    stopping, last = False, None if end is None else end + 90 - REQUEUE_BEFORE

    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return driver.wait(0.2)

            if received and not stopping:
                print("Slurm asks the sweep to stop", flush=True)
                driver.send_signal(signal.SIGTERM)
                stopping = True
                last = time.monotonic() + STOP_TIMEOUT if last is None else last

            if last is not None and time.monotonic() > last:
                print("the driver takes too long to stop: it is killed", flush=True)
                return TIME_UP
    finally:
        with suppress(ProcessLookupError):
            driver.kill()


def _requeue(job: str) -> int:
    r"""Requeues the job, unless it is about to end for another reason."""

    state = ""

    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30)
        state = done.stdout.strip()

    if state not in ("RUNNING", ""):  # cancelled, for one
        print(f"the job is {state}: it is not requeued", flush=True)
        return TIME_UP

    print("the sweep is not done: the job is requeued", flush=True)

    if subprocess.run(["scontrol", "requeue", job]).returncode:
        print("requeueing failed: submit the script again to resume the sweep", flush=True)

    return TIME_UP


if __name__ == "__main__":
    main(sys.argv[1:])
