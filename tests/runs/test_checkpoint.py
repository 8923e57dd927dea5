import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sda_ray.core.errors import UserError
from sda_ray.runs.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    save_state,
)
from sda_ray.runs.path import RunPath, new_id, new_name


@pytest.fixture
def path(tmp_path: Path) -> RunPath:
    (tmp_path / "misty-river-4_abcd1234").mkdir()
    return RunPath(tmp_path / "misty-river-4_abcd1234")


def tensors(value: float = 0.0) -> dict[str, Tensor]:
    return {
        "weight": torch.full((3, 4), value),
        "step": torch.tensor(value),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
    }


def save(path: RunPath, *values: int) -> None:
    for value in values:
        save_checkpoint(path, tensors(value), {"epoch": value, "step": 0})


def epoch(path: RunPath) -> Any:
    found = load_checkpoint(path)
    return None if found is None else found[1]["epoch"]


# Names


def test_name_and_id_are_split_at_the_last_underscore() -> None:
    path = RunPath(Path("runs/my_own_run_0a1b2c3d"))
    assert (path.name, path.id) == ("my_own_run", "0a1b2c3d")


def test_ids_are_8_characters_and_names_follow_from_them() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[a-z0-9]{8}", id) for id in ids)
    assert new_name("abcd1234", 4) == new_name("abcd1234", 4) != new_name("abcd1235", 4)
    assert re.fullmatch("[a-z]+-[a-z]+-4", new_name("abcd1234", 4))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("misty-river-4_abcd1234", "misty-field-5_abxy9876", "amber-moon-6_zzzz0000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()

    for name in ("sweeps", ".abcd9999", "amber_short"):
        (tmp_path / name).mkdir()

    (tmp_path / "file_abcd0000").touch()

    return tmp_path


@pytest.mark.parametrize(
    "word", ["amber-moon-6_zzzz0000", "amber-moon-6", "zzzz0000", "amber", "zz"]
)
def test_run_is_found_by_path_name_id_or_beginning(runs: Path, word: str) -> None:
    assert RunPath.find(runs, word).id == "zzzz0000"
    assert RunPath.find(runs / "elsewhere", str(runs / "amber-moon-6_zzzz0000")).id == "zzzz0000"


def test_ambiguous_beginning_is_refused_with_the_candidates(runs: Path) -> None:
    with pytest.raises(UserError, match="'ab' could be any of 2 runs: misty-field-5_abxy9876, mi"):
        RunPath.find(runs, "ab")


def test_unknown_run_is_refused(runs: Path) -> None:
    with pytest.raises(UserError, match=r"no run 'nope' in .*, which holds 3 runs"):
        RunPath.find(runs, "nope")


def test_run_of_an_id_is_found(runs: Path) -> None:
    found = RunPath.of_id(runs, "abcd1234")
    assert found is not None and found.name == "misty-river-4"
    assert RunPath.of_id(runs, "abcd9999") is None
    assert RunPath.of_id(runs / "none", "abcd1234") is None


# Checkpoints


def test_checkpoint_gives_back_what_was_saved(path: RunPath) -> None:
    save(path, 3)
    found = load_checkpoint(path)
    assert found is not None and found[1] == {"epoch": 3, "step": 0}

    for key, x in tensors(3).items():
        assert found[0][key].dtype == x.dtype and found[0][key].equal(x)


def test_the_one_before_is_kept(path: RunPath) -> None:
    save(path, 1, 2, 3)
    path.checkpoint.unlink()
    assert epoch(path) == 2
    assert sorted(file.name for file in path.directory.iterdir()) == ["checkpoint.prev.pth"]


@pytest.fixture
def two(path: RunPath) -> RunPath:
    save(path, 1, 2)
    return path


def truncations(size: int) -> Iterator[int]:
    yield from (0, 1, 10, size // 2, size - 100, size - 1)


def test_truncated_checkpoint_falls_back(two: RunPath, caplog: pytest.LogCaptureFixture) -> None:
    data = two.checkpoint.read_bytes()
    previous = two.previous.read_bytes()

    for size in truncations(len(data)):
        two.checkpoint.write_bytes(data[:size])
        two.previous.write_bytes(previous)
        caplog.clear()
        assert epoch(two) == 1, size
        assert "checkpoint.pth is damaged" in caplog.text


def test_flipped_bits_fall_back_or_do_no_harm(
    two: RunPath, caplog: pytest.LogCaptureFixture
) -> None:
    data = two.checkpoint.read_bytes()
    fallen = 0

    for position in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        two.checkpoint.write_bytes(flipped)
        caplog.clear()
        found = load_checkpoint(two)
        assert found is not None

        if found[1]["epoch"] == 2:  # a bit that nobody reads
            assert all(found[0][key].equal(x) for key, x in tensors(2).items())
        else:
            fallen += 1
            assert found[1]["epoch"] == 1
            assert "checkpoint.pth is damaged" in caplog.text

    assert fallen > 50


def test_damaged_checkpoint_never_becomes_the_previous_one(two: RunPath) -> None:
    two.checkpoint.write_bytes(b"damaged")
    assert epoch(two) == 1
    save(two, 3)
    two.checkpoint.unlink()
    assert epoch(two) == 1
    assert two.directory.joinpath("checkpoint.damaged.pth").read_bytes() == b"damaged"


def test_two_damaged_checkpoints_are_none(two: RunPath, caplog: pytest.LogCaptureFixture) -> None:
    two.checkpoint.write_bytes(b"damaged")
    two.previous.write_bytes(b"")
    assert load_checkpoint(two) is None
    assert "checkpoint.pth is damaged" in caplog.text
    assert "checkpoint.prev.pth is damaged" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_whole_checkpoint_is_not_damaged_because_memory_is_short(
    two: RunPath, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(torch, "load", load)
        load_checkpoint(two)

    assert epoch(two) == 2


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_no_pickle_is_executed(
    two: RunPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"tensors": {}, "info": Bomb(), "sha256": ""}, two.checkpoint)
    assert epoch(two) == 1
    assert not (tmp_path / "exploded").exists()


def test_lost_lease_leaves_everything_as_it_was(two: RunPath) -> None:
    def lost() -> AbstractContextManager[None]:
        raise RuntimeError("lost")

    def content() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in two.directory.iterdir()}

    before = content()

    with pytest.raises(RuntimeError, match="lost"):
        save_checkpoint(two, tensors(), {}, lost)

    with pytest.raises(RuntimeError, match="lost"):
        save_state(two, tensors(), lost)

    assert content() == before


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from sda_ray.runs.checkpoint import save_checkpoint, save_state
from sda_ray.runs.path import RunPath
path = RunPath(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
for save in (lambda x: save_checkpoint(path, x, {}), lambda x: save_state(path, x)):
    try:
        save({"x": torch.zeros(10000)})
    except OSError as error:
        print("OSError")
"""


def test_full_disk_is_an_oserror_and_leaves_the_files_whole(
    two: RunPath, env: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(two.directory)], env=env, capture_output=True, text=True
    )
    assert done.stdout == "OSError\nOSError\n", done.stderr
    names = sorted(file.name for file in two.directory.iterdir())
    assert names == ["checkpoint.prev.pth", "checkpoint.pth"]
    assert epoch(two) == 2


def test_state_is_a_plain_state_dict(path: RunPath) -> None:
    save_state(path, tensors(1))
    state = torch.load(path.state, weights_only=True)
    assert type(state) is dict and state.keys() == tensors().keys()


def test_same_state_makes_the_same_file(path: RunPath) -> None:
    save_state(path, tensors(1))
    before = path.state.read_bytes()
    save_state(path, tensors(1))
    assert path.state.read_bytes() == before
