r"""What all tests share: clean surroundings, tiny data, a tiny network, the command line."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings

from sda_ray.cli.main import main
from sda_ray.core.config import CONFIG, Config, format_value

# A shell or nohup that runs the tests in the background has them, and all that they start, ignore
# these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# How long an example takes says something about the machine, and nothing about the code. A change
# is judged by the same examples each time; who looks for more chooses the profile `search`.
hypothesis_settings.register_profile("sda_ray", deadline=None, derandomize=True)
hypothesis_settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis_settings.load_profile("sda_ray")

torch.set_num_threads(1)  # the networks are tiny, and the machine may be shared

# Where these assert something, a failure is told in full, as in a test.
pytest.register_assert_rewrite("ordeal", "scene")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]

# Variables by which the one who runs the tests could change what they do
PERSONAL = (
    *("WANDB_", "SDA_RAY_", "RAY_", "SCRATCH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    "PYTHONUNBUFFERED",  # what is said arrives without it
)

SMALL = {
    "window": 3,
    "embedding": 8,
    "hidden_channels": (8, 16),
    "hidden_blocks": (1, 1),
    "batch_size": 8,
    "epochs": 3,
    "learning_rate": 1e-3,
}


# Whose files take longest, as they start a Ray or compile: they come first, so that no process is
# idle at the end
SLOW = ("sweep", "cluster", "cli", "storage", "plan", "training", "tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in SLOW)  # and as they were beside that


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    r"""A home of its own. Its path is short, since Ray puts sockets below it."""

    path = Path(tempfile.mkdtemp(prefix="sda-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    r"""The variables of this process without the user's settings."""

    return {name: x for name, x in os.environ.items() if not name.startswith(PERSONAL)}


@pytest.fixture(autouse=True)
def surroundings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Hides the user's settings and home, and seeds what a test may draw by accident."""

    for name in [name for name in os.environ if name.startswith(PERSONAL)]:
        monkeypatch.delenv(name)

    monkeypatch.setenv("HOME", str(home))
    torch.manual_seed(0)


@pytest.fixture
def env(home: Path, surroundings: None) -> dict[str, str]:
    r"""The variables of processes that tests start: no account, no W&B unless it is asked for."""

    package = str(Path(__file__).parents[1])

    return {
        **os.environ,
        "PYTHONPATH": package,
        "TMPDIR": str(home),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def cli(env: dict[str, str], data: Path, tmp_path: Path) -> Cli:
    r"""Runs the command line in `tmp_path`, on the tiny data, to its end."""

    def run(*words: str, timeout: float = 120, **variables: str) -> Any:
        command = [sys.executable, "-m", "sda_ray", words[0], f"--data={data}", *words[1:]]

        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**env, "SDA_RAY_ROOT": str(tmp_path), **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def cli_here(
    env: dict[str, str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Cli:
    r"""Runs the command line as `cli` does, in this process, which has all imported already."""

    def run(*words: str, **variables: str) -> Any:
        handler, warnings = signal.getsignal(signal.SIGTERM), logging.lastResort
        assert warnings is not None
        logging.root.addHandler(warnings)  # as in a process that is not pytest's
        code: Any = 0
        capsys.readouterr()

        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)

            for name, value in {**env, "SDA_RAY_ROOT": str(tmp_path), **variables}.items():
                patch.setenv(name, value)

            try:
                main(argv=[words[0], f"--data={data}", *words[1:]])
            except SystemExit as end:
                code = end.code
            finally:
                signal.signal(signal.SIGTERM, handler)
                logging.root.removeHandler(warnings)

        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


@pytest.fixture
def start(env: dict[str, str], data: Path, tmp_path: Path) -> Iterator[Start]:
    r"""Starts the command line as `cli` does, and does not wait. What is left is killed."""

    started = []

    def run(*words: str, program: str = "", **variables: str) -> "subprocess.Popen[str]":
        command = ["-c", program] if program else ["-m", "sda_ray"]
        options = words if program else (words[0], f"--data={data}", *words[1:])
        process = subprocess.Popen(
            [sys.executable, *command, *options],
            cwd=tmp_path,
            env={**env, "SDA_RAY_ROOT": str(tmp_path), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)

        return process

    yield run

    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""A directory of tiny data: 20, 4 and 4 smooth trajectories of 12 snapshots of 16x16."""

    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    grid = 2 * np.pi * np.arange(16) / 16

    for split, n in {"train": 20, "valid": 4, "test": 4}.items():
        phase = generator.uniform(0, 2 * np.pi, (n, 1, 2, 1, 1))
        time = 0.3 * np.arange(12).reshape(12, 1, 1, 1)
        x = np.sin(grid[:, None] + time + phase) + np.cos(2 * grid[None, :] - time + phase)

        with h5py.File(directory / f"{split}.h5", "w") as f:
            f.create_dataset("x", data=x.astype(np.float32))

    return directory


@pytest.fixture(scope="session")
def small() -> Config:
    r"""A config whose epochs, of 3 steps on the tiny data, take a blink."""

    return CONFIG | SMALL


@pytest.fixture
def settings(small: Config) -> list[str]:
    r"""The tiny network as words on the command line."""

    return [f"{key}={format_value(small[key])}" for key in SMALL if key != "epochs"]
