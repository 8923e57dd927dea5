r"""Sweeps that go on without a terminal: on a cluster as a job of Ray, else in the background."""

import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cluster.slots import Slots
from ..core.errors import UserError
from ..core.lease import read_holder
from ..runs.path import sweep_directory
from ..sweep.code import recorded_code
from ..sweep.definition import Sweep
from ..sweep.launch import Options
from ..sweep.preflight import check_start

__all__ = ["detach"]

LOOK = 0.2  # seconds between two looks at whether it runs
PATIENCE = 180.0  # seconds for a job to be at its sweep
LINES = 20  # of what it printed, if it ends at once

# What a job is told of the environment. The environment of a job can be read by all who may submit
# one, so that secrets stay where they are: in ~/.netrc, or the cluster's own environment.
TOLD = re.compile(r"(SDA_RAY_|WANDB_)\w+|PYTHONPATH|OMP_NUM_THREADS")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def detach(sweep: Sweep, options: Options, words: Sequence[str], gpus: int) -> None:
    r"""Starts a sweep, or carries it on, in another process than this one, and returns.

    The sweep is checked here first.

    Arguments:
        sweep: The sweep.
        options: How it is carried out.
        words: The arguments of the command, without `sda-ray`.
        gpus: The GPUs of a trial, if that was not given.

    Raises:
        UserError: If anything is wrong with the sweep, or it cannot be started.
    """

    slots = Slots(options.cpus, gpus if options.gpus is None else options.gpus, options.parallel)
    start = check_start(sweep, options.runs, options.data, slots, options.wandb, options.address)
    name, words = start.sweep.name, [word for word in words if word != "--detach"]
    directory = sweep_directory(options.runs, name)
    directory.mkdir(parents=True, exist_ok=True)

    if options.address is None:
        where = _background(directory, words)
    else:
        where = _submit(directory, _words_of_job(words, options), options.address)

    print(
        f"sweep '{name}' runs {where}.\n"
        f"  sda-ray attach {name}   # its live table\n"
        f"  sda-ray stop {name}     # every trial saves a checkpoint first"
    )


def _background(directory: Path, words: Sequence[str]) -> str:
    r"""Starts the command as a process without a terminal, and returns where it runs."""

    file = directory / "detached.log"

    with open(file, "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "sda_ray", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a terminal that is closed does not end it
        )

    def ended() -> str | None:
        if process.poll() is None:
            return None

        with open(file, "rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")

    lease = directory / "lease.json"

    def runs() -> bool:
        mine = (read_holder(lease) or {}).get("pid") == process.pid
        return mine and recorded_code(directory) is not None  # from then on edits change nothing

    _await(runs, ended, process.wait)

    return f"in the background, as process {process.pid}; its output goes to {file}"


def _submit(directory: Path, words: Sequence[str], address: str) -> str:
    r"""Starts the command as a job of a cluster, and returns where it runs."""

    id = f"sda-ray-{re.sub(r'[^A-Za-z0-9_-]', '-', directory.name)}-{secrets.token_hex(3)}"
    told = {k: x for k, x in os.environ.items() if TOLD.fullmatch(k) and not SECRET.search(k)}
    lease = directory / "lease.json"
    before = (read_holder(lease) or {}).get("attempt", 0)
    command = shlex.join([sys.executable, "-m", "sda_ray", *words])

    try:
        client = _client(address)
        client.submit_job(
            entrypoint=f"cd {shlex.quote(os.getcwd())} && exec {command}",
            submission_id=id,
            runtime_env={"env_vars": told},
        )
    except (ImportError, ConnectionError, RuntimeError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the Ray at '{address}' takes no jobs: {said.rstrip('.')}. Its head needs the "
            "dashboard and its agent (`pip install 'ray[default]'` before `ray start`). Without "
            "them, start the sweep in tmux or screen, without --detach."
        ) from error

    def ended() -> str | None:
        over = client.get_job_status(id).is_terminal()
        return client.get_job_logs(id) if over else None

    def runs() -> bool:
        found = read_holder(lease) or {"attempt": 0, "pid": None}
        mine = found["attempt"] > before and found["pid"] is not None
        return mine and recorded_code(directory) is not None

    _await(runs, ended, lambda: int(client.get_job_status(id).name != "SUCCEEDED"))

    return f"as job {id} of Ray; `ray job logs {id}` shows its output"


def _client(address: str) -> Any:
    from ray.dashboard.utils import ray_address_to_api_server_url
    from ray.job_submission import JobSubmissionClient

    with _unset("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray 2.60 prefers them to what is given
        return JobSubmissionClient(ray_address_to_api_server_url(address))


@contextmanager
def _unset(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}

    try:
        yield
    finally:
        os.environ.update(before)


def _words_of_job(words: Sequence[str], options: Options) -> list[str]:
    r"""Returns the arguments of a job: what is asked for, and where everything is."""

    runs = options.bucket or str(options.runs)
    words = [*_without(words, "--address"), "--address", "auto"]

    return [*words, "--root", str(options.root), "--runs", runs, "--data", str(options.data)]


def _without(words: Sequence[str], option: str) -> list[str]:
    r"""Returns arguments without an option and its value."""

    kept: list[str] = []
    rest = iter(words)

    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)

    return kept


def _await(
    runs: Callable[[], bool], ended: Callable[[], str | None], code: Callable[[], int]
) -> None:
    r"""Waits until a sweep runs. If it has ended already, its words are ours, and its exit code.

    Arguments:
        runs: Tells whether it runs.
        ended: Returns what it printed, once it has ended.
        code: Returns its exit code then.
    """

    deadline = time.monotonic() + PATIENCE

    while not runs():
        if (said := ended()) is not None:
            lines = said.splitlines()
            print("\n".join(["…", *lines[-LINES:]] if len(lines) > LINES else lines), flush=True)
            sys.exit(code())

        if time.monotonic() > deadline:
            print(f"Nothing is seen of it for {PATIENCE:.0f} s, but it has not ended.")
            return

        time.sleep(LOOK)
