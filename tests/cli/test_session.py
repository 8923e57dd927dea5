import json
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Cli, Start

from sda_ray.cli import session
from sda_ray.core.config import Config
from sda_ray.core.lease import is_alive
from sda_ray.runs.metrics import COSTS
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run

EPOCHS = "epochs=40"

# The command line, with a checkpoint at every instant
HASTY = """
import sys
from functools import partial
from sda_ray.cli import main as cli, session
session.Run = partial(session.Run, interval=0.0)
cli.main(argv=sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Config, data: Path) -> RunPath:
    r"""A run of 40 epochs that was never interrupted."""

    runs = tmp_path_factory.mktemp("whole") / "runs"
    run = Run(runs, small | {"epochs": 40}, wandb=Wandb("disabled"))
    list(train_run(run, data))
    run.close("finished")

    return run.path


def only_run(tmp_path: Path) -> RunPath:
    (path,) = RunPath.all(tmp_path / "runs")
    return path


def lines(path: RunPath) -> list[dict[str, float]]:
    text = path.metrics.read_text() if path.metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def record(path: RunPath) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.record.read_text())
    return found


def wait_for(process: "subprocess.Popen[str]", tmp_path: Path, epochs: int) -> RunPath:
    r"""Waits until a run has done some epochs."""

    while True:
        for path in RunPath.all(tmp_path / "runs"):
            if len(lines(path)) >= epochs:
                return path

        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def same(path: RunPath, whole: RunPath) -> bool:
    def timeless(path: RunPath) -> list[dict[str, float]]:
        return [{k: x for k, x in line.items() if k not in COSTS} for line in lines(path)]

    bits = [path.state.read_bytes() == whole.state.read_bytes(), timeless(path) == timeless(whole)]
    return all(bits) and path.checkpoint.read_bytes() == whole.checkpoint.read_bytes()


def test_train_twice_gives_the_same_bits(
    cli: Cli, cli_here: Cli, settings: list[str], tmp_path: Path
) -> None:
    for train in (cli, cli_here):
        done = train("train", "epochs=4", *settings)
        assert done.returncode == 0, done.stderr
        assert "epoch 4/4: loss_train" in done.stdout and "finished: runs/" in done.stdout

    a, b = RunPath.all(tmp_path / "runs")
    assert a.state.read_bytes() == b.state.read_bytes()
    assert record(a)["status"] == record(b)["status"] == "finished"


@pytest.mark.parametrize("program", ["", HASTY], ids=["no checkpoint yet", "checkpoints"])
def test_sigkill_then_resume_gives_the_same_bits(
    start: Start,
    cli_here: Cli,
    settings: list[str],
    tmp_path: Path,
    whole: RunPath,
    data: Path,
    program: str,
) -> None:
    process = start("train", EPOCHS, *settings, f"--data={data}", program=program)
    path = wait_for(process, tmp_path, 8)
    process.kill()
    process.wait()
    assert path.checkpoint.exists() == bool(program)
    assert record(path)["status"] == "running" and len(lines(path)) < 40

    done = cli_here("train", "--resume", path.id)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert same(only_run(tmp_path), whole)
    assert record(path)["exact"] is True


def test_same_command_resumes_the_run_that_was_stopped(
    start: Start, cli_here: Cli, settings: list[str], tmp_path: Path, whole: RunPath, data: Path
) -> None:
    process = start("train", EPOCHS, *settings, f"--data={data}")
    path = wait_for(process, tmp_path, 5)
    process.kill()
    process.wait()
    other = cli_here("train", "epochs=1", *settings)  # has other settings
    assert other.returncode == 0 and "is resumed" not in other.stdout

    done = cli_here("train", EPOCHS, *settings)
    assert done.returncode == 0, done.stderr
    assert f"{path.directory.name} has the same settings and data, and is resumed" in done.stdout
    assert same(path, whole) and len(list(RunPath.all(tmp_path / "runs"))) == 2

    # A run that starts from weights is another one, and so is its extension
    begin = ["train", "--init", path.id, "epochs=2", "scheduler=constant"]
    assert cli_here(*begin).returncode == 0
    (child,) = (x for x in RunPath.all(tmp_path / "runs") if record(x).get("parent"))
    extend = ["train", "--extend", child.id, "epochs=3"]
    assert cli_here(*extend).returncode == 0
    known = list(RunPath.all(tmp_path / "runs"))
    assert len(known) == 4

    for x in known:
        x.record.write_text(json.dumps(record(x) | {"status": "interrupted"}))

    for command, number in ((begin, 1), (extend, 1), ([*begin, "--new"], 0)):
        done = cli_here(*command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("is resumed") == number

    assert len(list(RunPath.all(tmp_path / "runs"))) == 5


def test_run_whose_host_has_just_died_is_resumed(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "is_alive", partial(is_alive, patience=0.2))
    run = Run(tmp_path, small, wandb=Wandb("disabled"))
    holder = json.loads(run.path.lease.read_text())
    run.path.lease.write_text(json.dumps(holder | {"host": "elsewhere", "boot": "other"}))

    assert session._stopped(tmp_path, run.config, {}) == run.path


def test_settings_of_a_run_do_not_hide_that_it_began_with_weights(
    cli_here: Cli, finished: RunPath, tmp_path: Path
) -> None:
    content = record(finished) | {"parent": "6k7cjnx7"}
    finished.record.write_text(json.dumps(content))

    for more in ([], ["--replicas", "2"]):
        done = cli_here("train", "--config", finished.id, *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "started with the weights of run '6k7cjnx7', not from scratch" in done.stderr

    assert list(RunPath.all(tmp_path / "runs")) == [finished]
    assert cli_here("train", "--config", str(finished.config), "epochs=1").returncode == 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_checkpoints_exits_and_says_how_to_resume(
    start: Start,
    cli_here: Cli,
    settings: list[str],
    tmp_path: Path,
    whole: RunPath,
    number: signal.Signals,
    code: int,
) -> None:
    process = start("train", EPOCHS, *settings)
    path = wait_for(process, tmp_path, 5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert f"sda-ray train --resume {path.id}" in output
    assert path.checkpoint.exists() and "Traceback" not in errors
    assert record(path)["status"] == "interrupted"

    before = len(lines(path))
    done = cli_here("train", "--resume", path.name)
    assert done.returncode == 0, done.stderr
    assert "came out different" not in done.stderr and len(lines(path)) > before
    assert same(only_run(tmp_path), whole)


def test_run_in_use_is_refused_and_takeover_ends_the_other(
    start: Start, cli_here: Cli, settings: list[str], tmp_path: Path
) -> None:
    process = start("train", "epochs=100000", *settings)
    path = wait_for(process, tmp_path, 1)
    done = cli_here("train", "--resume", path.id)
    assert done.returncode == 2
    assert f"in use by process {process.pid} on" in done.stderr
    assert "Traceback" not in done.stderr and process.poll() is None

    other = start("train", "--resume", path.id, "--takeover")
    assert process.wait(60) == -signal.SIGKILL
    before = len(lines(path))

    while len(lines(path)) <= before:
        assert other.poll() is None, other.communicate()[1]
        time.sleep(0.05)

    assert record(path)["status"] == "running"


# The command line, with little memory beside what it has to begin with
POOR = """
import resource, sys
from pathlib import Path
import torch
from sda_ray.cli import main as cli

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cli.main(argv=sys.argv[1:])
"""


@pytest.mark.parametrize("large", ["batch", "network"])
def test_out_of_memory_is_a_clear_failure(
    start: Start, settings: list[str], tmp_path: Path, large: str
) -> None:
    for split in ("train", "valid"):
        with h5py.File(tmp_path / f"{split}.h5", "w") as f:
            f.create_dataset("x", data=np.ones((2000, 3, 2, 16, 16), dtype=np.float32))

    kept = [word for word in settings if not word.startswith(("batch_size", "hidden_channels"))]
    width = {"batch": "64,64", "network": "2048,2048"}[large]
    words = ["epochs=1", *kept, "batch_size=2000", f"hidden_channels={width}"]
    process = start("train", f"--data={tmp_path}", *words, program=POOR)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    said = r"sda-ray: out of memory on cpu, with batch_size 2000 and a peak of \d\.\d+ GiB"
    assert re.match(said, errors), errors
    assert "Use a smaller batch_size" in errors and errors.count("\n") == 1
    assert record(only_run(tmp_path))["status"] == "failed"


def test_resume_with_other_threads_warns_and_marks_the_run(
    start: Start, settings: list[str], tmp_path: Path
) -> None:
    def train(*words: str, epochs: int) -> tuple[RunPath, str]:
        process = start("train", *words)
        path = wait_for(process, tmp_path, epochs)
        process.send_signal(signal.SIGTERM)

        return path, process.communicate(timeout=60)[1]

    path, errors = train(EPOCHS, *settings, "--threads=1", epochs=3)
    assert record(path)["exact"] is True and "threads" not in errors
    _, errors = train("--resume", path.id, "--threads=2", epochs=1 + len(lines(path)))
    assert "resumes with another threads than it started with" in errors
    assert record(path)["exact"] is False


@pytest.fixture
def finished(tmp_path: Path, whole: RunPath) -> RunPath:
    r"""The finished run, among the runs of this test."""

    directory = tmp_path / "runs" / whole.directory.name
    shutil.copytree(whole.directory, directory)

    return RunPath(directory)


def test_resume_of_a_finished_run_says_so(cli_here: Cli, finished: RunPath) -> None:
    before = {file: file.read_bytes() for file in finished.directory.iterdir()}
    done = cli_here("train", "--resume", finished.id)
    assert done.returncode == 0
    assert f"{finished.directory.name} is finished" in done.stdout
    assert {file: file.read_bytes() for file in finished.directory.iterdir()} == before


def test_finished_run_that_lost_its_weights_gets_them_back(
    cli_here: Cli, finished: RunPath, whole: RunPath
) -> None:
    finished.state.unlink()
    done = cli_here("train", "--resume", finished.id)
    assert done.returncode == 0, done.stderr
    assert same(finished, whole)


def test_init_starts_from_weights_and_names_its_parent(
    cli_here: Cli, finished: RunPath, tmp_path: Path
) -> None:
    done = cli_here("train", "--init", finished.id, "epochs=1", "learning_rate=1e-30", "seed=1")
    assert done.returncode == 0, done.stderr
    (child,) = (path for path in RunPath.all(tmp_path / "runs") if path != finished)
    assert record(child)["parent"] == finished.id
    assert lines(child)[0]["loss_valid"] == pytest.approx(lines(finished)[-1]["loss_valid"])


def test_init_that_does_not_fit_is_refused(
    cli_here: Cli, finished: RunPath, tmp_path: Path
) -> None:
    done = cli_here("train", "--init", finished.id, "embedding=16", "parametrization=v")
    assert done.returncode == 2
    assert "do not fit: embedding is 16, not 8; parametrization is v, not eps." in done.stderr
    assert list(RunPath.all(tmp_path / "runs")) == [finished]


def test_init_from_another_size_of_fields_is_refused(
    cli_here: Cli, finished: RunPath, tmp_path: Path
) -> None:
    (tmp_path / "larger").mkdir()

    for split in ("train", "valid"):
        with h5py.File(tmp_path / "larger" / f"{split}.h5", "w") as f:
            f.create_dataset("x", data=np.ones((4, 8, 2, 32, 32), dtype=np.float32))

    done = cli_here("train", "--init", finished.id, f"--data={tmp_path / 'larger'}")
    assert done.returncode == 2
    assert "are for fields of 16x16, but the data are 32x32" in done.stderr
    assert list(RunPath.all(tmp_path / "runs")) == [finished]


def test_diverged_run_exits_1_and_is_not_resumed(
    cli_here: Cli, settings: list[str], tmp_path: Path
) -> None:
    high = [word for word in settings if not word.startswith("learning_rate")]
    done = cli_here("train", "epochs=50", "learning_rate=100", *high)
    assert done.returncode == 1
    assert "diverged: loss_" in done.stderr and "Traceback" not in done.stderr
    path = only_run(tmp_path)
    assert record(path)["status"] == "diverged"

    done = cli_here("train", "--resume", path.id)
    assert done.returncode == 2
    assert "would do so again" in done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sweep": "demo"}, "belongs to sweep 'demo'.*carry on with `sda-ray sweep demo`"),
        ({"data": "other"}, "was trained on other data\\. .* with --data"),
    ],
)
def test_resume_that_does_not_fit_is_refused(
    cli_here: Cli, finished: RunPath, change: dict[str, str], message: str
) -> None:
    content = record(finished) | {"status": "interrupted"} | change
    finished.record.write_text(json.dumps(content))
    done = cli_here("train", "--resume", finished.id)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

    with pytest.raises(AssertionError, match=message):
        raise AssertionError(done.stderr)


def test_foreign_directory_is_not_resumed(
    cli_here: Cli, finished: RunPath, tmp_path: Path
) -> None:
    finished.directory.rename(tmp_path / "upstream")
    done = cli_here("train", "--resume", str(tmp_path / "upstream"))
    assert done.returncode == 2
    assert "cannot be resumed: a run is a directory of its own" in done.stderr
    assert not list(RunPath.all(tmp_path))
