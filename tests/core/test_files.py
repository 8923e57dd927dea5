r"""Tests for the sda_ray.core.files module."""

import errno
import fcntl
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sda_ray.core.errors import UserError
from sda_ray.core.files import (
    append_line,
    cut_torn_lines,
    find_torn_lines,
    lock_works,
    locked,
    open_atomic,
    read_json,
    read_lines,
    remove_leftovers,
    write_atomic,
    write_json,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
OBJECTS = st.dictionaries(st.text(), SCALARS | st.lists(SCALARS))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    r"""Lets writes beyond a size fail as on a full disk (EFBIG instead of ENOSPC)."""

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "state.pth"
    write_atomic(file, b"old")

    with pytest.raises(RuntimeError), open_atomic(file) as f:
        f.write(b"new")
        f.flush()
        raise RuntimeError

    with pytest.raises(OSError, match="too large"), file_size_limit(16):
        write_atomic(file, b"new" * 100)

    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.pth"]


def test_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "state.pth"
    code = "import sys; from sda_ray.core.files import *; i = 0\n"
    code += "while True: write_atomic(sys.argv[1], bytes([i]) * 2**20); i = (i + 1) % 256"

    for delay in (0.05, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code, str(file)])

        while not file.exists():
            time.sleep(0.01)

        time.sleep(delay)
        process.kill()
        process.wait()

        data = file.read_bytes()
        assert data == data[:1] * 2**20

    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["state.pth"]


def test_permissions_follow_the_umask_and_the_mode(tmp_path: Path) -> None:
    umask = os.umask(0o027)

    try:
        write_atomic(tmp_path / "shared", b"")
        write_atomic(tmp_path / "secret", b"", mode=0o600)
    finally:
        os.umask(umask)

    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_symlink_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    link = tmp_path / "link"
    link.symlink_to(outside)

    write_atomic(link, b"new")

    assert outside.read_bytes() == b"precious"
    assert link.read_bytes() == b"new"


@given(obj=OBJECTS)
def test_json_is_read_as_written(obj: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("json") / "run.json"
    write_json(file, obj)
    assert read_json(file) == obj


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b"9" * 5000, b"\0" * 9])
def test_damaged_json_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)

    with pytest.raises(UserError, match=r"run\.json is damaged"):
        read_json(file)


@pytest.mark.parametrize("value", ["[]", "{}", '{"a": 1}', "[1, 2]", "1"])
def test_json_of_many_small_values_is_refused_unparsed(value: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(f'{{"x": [{",".join([value] * (2**22 // (len(value) + 1) - 4))}]}}')
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"epoch":1}\n' * 2**21)

    for read, path in ((read_json, file), (read_lines, lines)):
        tracemalloc.start()

        with pytest.raises(UserError, match=rf"{path.name} is damaged: it has more values"):
            read(path)

        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * path.stat().st_size


def test_long_histories_and_records_are_read(tmp_path: Path) -> None:
    line = {"epoch": 1, "loss_train": 1 / 3, "loss_valid": 1 / 7, "lr": 1e-4, "seconds": 1 / 9}
    (tmp_path / "metrics.jsonl").write_text((json.dumps(line) + "\n") * 200_000)
    attempt = {
        "number": 1,
        "host": "node",
        "versions": {f"package{i}": "1.2.3" for i in range(20)},
    }
    write_json(tmp_path / "run.json", {"attempts": [attempt] * 4000})

    assert len(read_lines(tmp_path / "metrics.jsonl")) == 200_000
    assert len(read_json(tmp_path / "run.json")["attempts"]) == 4000


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json cannot be read: No such file"):
        read_json(tmp_path / "run.json")

    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)

    with open(tmp_path / "huge.json", "wb") as f:
        f.truncate(2**30)

    with pytest.raises(UserError, match=r"huge\.json has 1073741824 bytes"):
        read_json(tmp_path / "huge.json")


@given(objects=st.lists(OBJECTS, max_size=4))
def test_lines_are_read_as_appended(
    objects: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("lines") / "metrics.jsonl"

    for obj in objects:
        append_line(file, obj)

    assert read_lines(file) == objects


def test_diverged_loss_is_kept(tmp_path: Path) -> None:
    append_line(tmp_path / "metrics.jsonl", {"loss_train": math.nan})
    assert math.isnan(read_lines(tmp_path / "metrics.jsonl")[0]["loss_train"])


def test_file_cut_anywhere_loses_only_its_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    objects = [{"epoch": i, "name": "é\n"} for i in range(3)]

    for obj in objects:
        append_line(file, obj)

    data = file.read_bytes()

    for end in range(len(data) + 1):
        file.write_bytes(data[:end])
        whole = data[:end].count(b"\n")

        assert read_lines(file) == objects[:whole]
        assert len(cut_torn_lines(file)) == end - (data[:end].rfind(b"\n") + 1)

        append_line(file, objects[0])
        assert read_lines(file) == objects[:whole] + objects[:1]


@pytest.mark.parametrize("torn", [b"\0" * 64, b'{"epoch": \0\0\0}\n', b'{"epo', b"\n", b"3\n"])
def test_torn_last_line_is_ignored_and_cut(torn: bytes, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line(file, {"epoch": 0})
    whole = file.read_bytes()
    file.write_bytes(whole + torn)

    assert read_lines(file) == [{"epoch": 0}]
    assert cut_torn_lines(file) == torn
    assert file.read_bytes() == whole
    assert cut_torn_lines(file) == b""


@pytest.mark.parametrize("line", ["{", "[]", "3", "", "\0"])
def test_damage_before_the_last_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 0}\n' + line + '\n{"epoch": 2}\n')

    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 2"):
        read_lines(file)


@pytest.mark.parametrize("size", [10, 2**16, 2**18])
def test_several_torn_lines_are_found_from_the_end(size: int, tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    line = json.dumps({"text": "x" * size}).encode() + b"\n"
    torn = b'{"a": \0\0}\n{"b": 1'
    file.write_bytes(3 * line + torn)

    assert find_torn_lines(file) == (3 * len(line), torn)
    assert cut_torn_lines(file) == torn
    assert find_torn_lines(file) == (3 * len(line), b"")


def test_file_of_another_kind_is_not_emptied(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("epoch,loss\n0,1.0\n")

    for use in (read_lines, cut_torn_lines):
        with pytest.raises(UserError, match="none of its lines is a JSON object"):
            use(file)

    assert file.read_text() == "epoch,loss\n0,1.0\n"


def test_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "metrics.jsonl") == []
    assert cut_torn_lines(tmp_path / "metrics.jsonl") == b""


def test_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line(file, {"epoch": 0})
    size = file.stat().st_size

    with pytest.raises(OSError), file_size_limit(size + 5):
        append_line(file, {"epoch": 1})

    assert file.stat().st_size == size
    append_line(file, {"epoch": 1})
    assert read_lines(file) == [{"epoch": 0}, {"epoch": 1}]


def test_first_line_is_either_written_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, fsync = tmp_path / "metrics.jsonl", os.fsync

    def fail(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(os, "fsync", fail)
        append_line(file, {"epoch": 0})

    append_line(file, {"epoch": 0})
    assert read_lines(file) == [{"epoch": 0}]


def test_line_appended_by_another_process_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    code = "import sys; from sda_ray.core.files import *\n"
    code += "for i in range(50): append_line(sys.argv[1], {'text': 'x' * 10_000})"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file)]) for _ in range(2)]

    assert [w.wait() for w in writers] == [0, 0]
    assert [json.dumps(o) for o in read_lines(file)] == [json.dumps({"text": "x" * 10_000})] * 100


HOLD = "import sys, time; from sda_ray.core.files import locked\nwith locked(sys.argv[1]):\n"
HOLD += "    print('held', flush=True); time.sleep(60)"


def test_lock_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"

    for shared in (False, True):
        with pytest.raises(BlockingIOError), locked(file, shared=shared, wait=False):
            pytest.fail("two processes held one lock")

    other.kill()
    other.communicate()

    with locked(file) as f:
        f.write(b"mine")


def test_shared_lock_has_several_holders(tmp_path: Path) -> None:
    file = tmp_path / ".lock"

    shared = locked(file, shared=True), locked(file, shared=True, wait=False)
    refused = pytest.raises(BlockingIOError)

    with shared[0], shared[1], refused, locked(file, wait=False):
        pytest.fail("an exclusive lock was shared")


def test_lock_file_is_no_link(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "other")

    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock"):
        pytest.fail("a link was followed")


def test_locks_of_a_local_disk_work(tmp_path: Path) -> None:
    assert lock_works(tmp_path) is None
    assert lock_works(tmp_path / "missing") is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "code", [errno.EAGAIN, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=os.strerror
)
def test_file_systems_without_locks_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "cannot be locked" in (lock_works(tmp_path) or "")


def test_locks_that_exclude_nobody_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert "two processes can lock the same file" in (lock_works(tmp_path) or "")


@pytest.mark.parametrize(
    ("mount", "local"),
    [
        ("lustre rw,flock", False),
        ("lustre rw,localflock", True),
        ("nfs4 rw,vers=4.2,local_lock=none", False),
        ("nfs rw,vers=3,nolock", True),
        ("nfs rw,vers=3,local_lock=flock", True),
        ("fuse.sshfs rw", True),
        ("ext4 rw", False),
    ],
)
def test_locks_that_other_hosts_do_not_see_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str, local: bool
) -> None:
    (tmp_path / "runs").mkdir()
    kind, options = mount.split()
    root = SimpleNamespace(mountpoint="/", fstype="ext4", opts="rw")
    runs = SimpleNamespace(mountpoint=str(tmp_path / "runs"), fstype=kind, opts=options)
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [root, runs])

    assert bool(lock_works(tmp_path / "runs")) is local
    assert lock_works(tmp_path) is None
