r"""Tests with damaged and hostile files: an error that names the file, and nothing else."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.nn.score import load_score, load_sde
from sda_ray.runs.checkpoint import _digest, read_checkpoint
from sda_ray.runs.inventory import entries
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run
from sda_ray.runs.tracking import Wandb
from sda_ray.runs.train import train_run
from sda_ray.training.loop import Diverged

NAME = "misty-river-1_abcd1234"
TEXTS = ("config.json", "metrics.jsonl", "run.json", "lease.json")
FILES = (*TEXTS, "checkpoint.pth", "state.pth")

VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**30, 10**400, 1e308, float("nan"), "", "../x")
VALUES += ("é" * 99, [], {}, [[]], {"a": {}}, [1e999], [None], "9" * 5000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path, small: Config) -> Path:
    r"""A directory with a run that stopped after its second epoch, and has a `state.pth` too."""

    runs = tmp_path_factory.mktemp("made")
    run = Run(runs, small, id="abcd1234", number=1, wandb=Wandb("disabled"))
    list(train_run(run, data))
    run.close("interrupted")
    run.path.directory.rename(runs / NAME)

    return runs


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


# Damage


def replaced(content: Any, rng: random.Random) -> Any:
    r"""Returns JSON in which one value, at any depth, is another."""

    if isinstance(content, dict | list) and content and rng.random() < 0.9:
        key: Any = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        content[key] = replaced(content[key], rng)
        return content

    return rng.choice(VALUES)


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(9)

    if name in TEXTS and kind >= 5:
        lines = data.splitlines() if name == "metrics.jsonl" else [data]
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(replaced(json.loads(lines[i]), rng)).encode()
        return b"\n".join(lines) + b"\n"

    if kind == 0:
        return data[:a]
    elif kind == 1:
        return data[:a] + rng.randbytes(min(b - a, 64)) + data[min(b, a + 64) :]
    elif kind == 2:
        return data[:b] + data[a:]
    elif kind == 3:
        return rng.choice(
            (b"", b"[" * 10**5, b"\0" * 999, b"\n" * 99, b"\xff\xfe{", b'{"a":' * 10**4)
        )
    elif kind == 4:
        number = rng.choice((b"9" * 5000, b"-1", b"1e999", b"NaN", b"1" * 30))
        return re.sub(rb"\d+", lambda m: number if rng.random() < 0.1 else m[0], data)

    flipped = bytearray(data)

    for _ in range(rng.choice((1, 8))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    return bytes(flipped)


def attempt(act: Callable[[], Any], name: str) -> str:
    r"""Returns what an act comes to: only an error that names the file is one to be accepted."""

    try:
        act()
    except UserError as error:
        assert name in str(error), f"{name} is not named: {error}"
        assert len(str(error)) < 5000
        return "refused"
    except Diverged:
        assert name == "config.json"  # such as another learning rate
        return "diverged"

    return "done"


def go_on(runs: Path, data: Path) -> None:
    run = Run(runs, {}, "abcd1234", wandb=Wandb("disabled"))

    try:
        for _, _ in zip(range(2), train_run(run, data), strict=False):
            pass
    finally:
        run.close("interrupted")


# Fuzz


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_of_a_run_is_named_or_passed_over(name: str, runs: Path, data: Path) -> None:
    rng = random.Random(f"0 {name}")
    whole = (runs / NAME / name).read_bytes()
    shutil.copytree(runs, runs.with_name("whole"))
    outcomes = set()
    slow = 12 if name != "state.pth" else 0

    for number in range(60):
        file = runs / NAME / name
        file.write_bytes(damaged(whole, name, rng))

        (entry,) = entries(runs)
        assert all(name in fault for fault in entry.faults), entry.faults

        if name in ("config.json", "state.pth"):
            outcomes.add(attempt(lambda: load_score(runs / NAME), name))
            outcomes.add(attempt(lambda: load_sde(runs / NAME), name))
        elif name == "checkpoint.pth":
            try:
                read_checkpoint(file)
            except ValueError as error:
                assert name in str(error)

        if number < slow:
            outcomes.add(attempt(lambda: go_on(runs, data), name))
            shutil.rmtree(runs)
            shutil.copytree(runs.with_name("whole"), runs)

    assert outcomes >= ({"done"} if name in ("checkpoint.pth", "lease.json") else {"refused"})


READ = """
import resource, sys
from pathlib import Path
from sda_ray.data.dataset import TrajectoryDataset, check_data
from sda_ray.core.errors import UserError

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

for directory in map(Path, sys.argv[1:]):
    print(directory.name, end=" ", flush=True)
    for act in (lambda: check_data(directory), lambda: TrajectoryDataset(directory / "train.h5", 3)):
        try:
            act()
        except UserError as error:
            assert "train.h5" in str(error), error
            print("refused", end=" ")
        else:
            print("done", end=" ")
    print(flush=True)
"""


def test_damaged_hdf5_is_named(data: Path, tmp_path: Path, env: dict[str, str]) -> None:
    rng = random.Random(0)
    whole = (data / "train.h5").read_bytes()
    directories = []

    for number in range(120):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "valid.h5").symlink_to(data / "valid.h5")
        head = 2048 if number % 4 else len(whole)  # where HDF5 keeps its structures
        bytes_ = damaged(whole[:head], "train.h5", rng) + whole[head:]
        (directory / "train.h5").write_bytes(bytes_)
        directories.append(str(directory))

    done = subprocess.run(
        [sys.executable, "-c", READ, *directories],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-2000:])
    assert len(done.stdout.splitlines()) == 120
    assert "refused refused" in done.stdout and "done done" in done.stdout


# Links and pipes


@pytest.mark.parametrize("name", [*FILES, "checkpoint.prev.pth", "lease.lock", "samples.png"])
def test_link_out_of_a_run_is_neither_read_nor_written(
    name: str, runs: Path, data: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    file = runs / NAME / name

    if file.exists():
        shutil.copy(file, outside)
        file.unlink()
    else:
        outside.write_text('{"epoch": 1}\ntorn')

    if name == "checkpoint.prev.pth":
        (runs / NAME / "checkpoint.pth").unlink()

    before = outside.read_bytes(), outside.stat().st_mtime_ns
    file.symlink_to(outside)
    (runs / NAME / ".x.tmp").symlink_to(outside)
    attempt(lambda: go_on(runs, data), name)
    assert (outside.read_bytes(), outside.stat().st_mtime_ns) == before

    if name in ("config.json", "state.pth"):
        file.unlink()
        file.symlink_to(outside)
        assert attempt(lambda: load_score(runs / NAME), name) == "refused"


def test_dangling_link_creates_nothing(runs: Path, data: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "lease.lock"):
        file = runs / NAME / name
        kept = file.read_bytes()
        file.unlink()
        file.symlink_to(tmp_path / "outside")
        assert attempt(lambda: go_on(runs, data), name) == "refused"
        assert not (tmp_path / "outside").exists()
        file.unlink()
        file.write_bytes(kept)


@pytest.mark.parametrize("name", [*FILES, "checkpoint.prev.pth"])
def test_pipe_does_not_hang(name: str, runs: Path, data: Path) -> None:
    (runs / NAME / name).unlink(missing_ok=True)
    os.mkfifo(runs / NAME / name)

    if name == "checkpoint.prev.pth":
        (runs / NAME / "checkpoint.pth").unlink()

    if name in ("config.json", "state.pth"):
        assert attempt(lambda: load_score(runs / NAME), name) == "refused"

    (entry,) = entries(runs)
    assert all(name in fault for fault in entry.faults)

    if name != "state.pth":
        attempt(lambda: go_on(runs, data), name)


# Bombs


def packed(tensors: Any, info: str = '{"epoch": 1, "step": 0}') -> bytes:
    stream = io.BytesIO()
    content = {"tensors": tensors, "info": info, "sha256": _digest({}, info)}
    torch.save(content, stream)
    return stream.getvalue()


def compressed(data: bytes) -> bytes:
    stream = io.BytesIO()

    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", 8) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))

    return stream.getvalue()


class Bytes:
    def __reduce__(self) -> Any:
        return bytearray, (2**40,)


BOMBS = {
    "it is compressed": lambda: compressed(packed({"x": torch.zeros(10**6)})),
    "its tensors have 4000000000000 bytes": lambda: packed({"x": torch.zeros(1).expand(10**12)}),
    "calls for '__builtin__ bytearray'": lambda: packed({"x": Bytes()}),
    "its step is 1000000000000": lambda: packed({}, '{"epoch": 1, "step": 1000000000000}'),
    "its epoch is None": lambda: packed({}, '{"epoch": null, "step": 0}'),
}


@pytest.mark.parametrize("reason", BOMBS)
def test_bomb_is_refused_before_memory_is_spent(reason: str, tmp_path: Path) -> None:
    path = RunPath(tmp_path)
    path.checkpoint.write_bytes(BOMBS[reason]())

    with pytest.raises(ValueError, match=rf"checkpoint\.pth is damaged .*{re.escape(reason)}"):
        read_checkpoint(path.checkpoint)


def test_checkpoint_beyond_its_config_is_not_read(runs: Path, data: Path) -> None:
    os.truncate(runs / NAME / "checkpoint.pth", 2**32)

    with pytest.raises(UserError, match=r"checkpoint\.pth has 4294967296 bytes, but at most"):
        go_on(runs, data)
