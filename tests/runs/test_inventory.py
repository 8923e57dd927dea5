r"""Tests for sda_ray.runs.inventory: what run directories hold, whatever has become of them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from listing import SMALL, a, entry_of, lease_of, made, rewrite, runs, sda

from sda_ray.core.config import KEYS
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.runs.inventory import Entry, entries, in_full, select
from sda_ray.runs.metrics import TAIL, last_metrics, read_metrics
from sda_ray.runs.path import RunPath

__all__ = ["a", "made", "runs", "sda"]  # fixtures


def upstream(runs: Path) -> RunPath:
    r"""Makes a run directory as SDA does: config and weights alone."""

    path = RunPath(runs / "brisk-river-7_uuuuuuuu")
    path.directory.mkdir()
    config = {key: value for key, value in SMALL.items() if not KEYS[key].ours}
    path.config.write_text(json.dumps(config))
    shutil.copy(RunPath.find(runs, "aaaaaaaa").state, path.state)

    return path


# Reading


def test_entry_tells_what_the_run_is(a: RunPath) -> None:
    entry, lines = in_full(entry_of(a))

    assert (entry.status, entry.epoch, entry.epochs, entry.sweep) == ("finished", 3, 3, "width")
    assert entry.loss_valid == lines[-1]["loss_valid"]
    assert entry.sample_std == lines[-1]["sample_std"]
    assert entry.config == SMALL
    assert entry.size == sum(f.stat().st_size for f in a.directory.rglob("*") if f.is_file())
    assert 0 <= entry.age < 3600
    assert not entry.faults


def test_run_of_upstream_is_finished(runs: Path) -> None:
    entry = entry_of(upstream(runs))

    assert (entry.status, entry.epoch, entry.epochs) == ("finished", None, 3)
    assert entry.config == SMALL


def test_directory_that_is_no_run_is_passed_over(runs: Path) -> None:
    (runs / "backup_20240101").mkdir()
    (runs / "sweeps").mkdir()
    (runs / "notes_of_today.txt").write_text("")

    assert {entry.path.id for entry in entries(runs)} == {"aaaaaaaa", "bbbbbbbb", "cccccccc"}
    assert not list(entries(runs / "missing"))


def test_running_run_without_its_process_is_interrupted(a: RunPath) -> None:
    rewrite(a, status="running")
    assert entry_of(a).status == "interrupted"

    lease = Lease(a.lease, "run")
    assert entry_of(a).status == "running"

    lease.release()
    assert entry_of(a).status == "interrupted"


def test_killed_process_holds_nothing(a: RunPath) -> None:
    rewrite(a, status="running")
    code = (
        "import sys, time, pathlib; from sda_ray.core.lease import Lease;"
        "Lease(pathlib.Path(sys.argv[1]), 'run'); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(a.lease)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        assert entry_of(a).status == "running"
        child.kill()
        child.wait()

    assert entry_of(a).status == "interrupted"


@pytest.mark.parametrize("key", ["host", "machine"])
@pytest.mark.parametrize(
    ("seconds", "status"), [(0, "running"), (30, "running"), (600, "interrupted")]
)
def test_holder_elsewhere_is_judged_by_its_heartbeat_at_once(
    a: RunPath, seconds: float, status: str, key: str
) -> None:
    rewrite(a, status="running")
    lease_of(a, **{key: "another", "boot": "another"}, pid=1, started="1")
    os.utime(a.lease, times=(time.time() - seconds,) * 2)
    start = time.monotonic()

    assert entry_of(a).status == status
    assert time.monotonic() - start < 30  # one that waits for a heartbeat takes a minute


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\x80", b"[" * 10**5, b"{}"])
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_damaged_file_makes_a_damaged_row(a: RunPath, name: str, content: bytes) -> None:
    (a.directory / name).write_bytes(content)
    entry = entry_of(a)

    assert entry.status == "damaged"
    assert name in entry.faults[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"status": None},
        {"status": 3},
        {"sweep": {"a": 1}},
        {"attempts": 3},
        {"attempts": [1, {"number": [], "started": 5, "ended": {}, "versions": []}]},
        {"created": "yesterday"},
        {"created": "0001-01-01T00:00:00"},
        {"parent": ["x"], "trial": {}, "data": [1], "exact": "maybe", "reason": 10**100},
    ],
)
def test_any_record_can_be_shown(
    a: RunPath, sda: Callable[..., Any], changes: dict[str, Any]
) -> None:
    rewrite(a, **changes)

    assert "aaaaaaaa" in sda()
    assert "aaaaaaaa" in sda("show", "aaaaaaaa")
    assert sda("show", "aaaaaaaa", "--json")["id"] == "aaaaaaaa"
    assert sda("compare", "a", "b", "--json")["runs"]


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", "x", '{"epoch": "x"}', '{"epoch": 3, "loss_valid": "x"}', '{"epoch": true}']
    + ['{"epoch": -1}', '{"epoch": 3, "loss_valid": 1' + "0" * 400 + "}"],
)
def test_damaged_metrics_make_a_damaged_row(
    a: RunPath, sda: Callable[..., Any], line: str
) -> None:
    a.metrics.write_text(f"{line}\n{line}\n")

    assert "metrics.jsonl" in entry_of(a).faults[0]
    assert "metrics.jsonl" in sda("show", "aaaaaaaa")


def test_damage_in_the_middle_of_metrics_is_shown(a: RunPath, sda: Callable[..., Any]) -> None:
    first, *rest = a.metrics.read_text().splitlines()
    a.metrics.write_text("\n".join([first, "garbage", *rest, ""]))

    assert entry_of(a).status == "finished"  # the list looks at the end alone
    assert sda("show", "aaaaaaaa", "--json")["status"] == "damaged"


def test_files_that_are_none_are_not_opened(runs: Path, a: RunPath, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text(a.config.read_text())

    for file in (a.config, a.record, a.metrics, a.lease):
        file.unlink()

    refused = (a.record, a.config, a.metrics)
    a.config.symlink_to(outside)
    os.mkfifo(a.record)
    os.mkfifo(a.metrics)
    os.mkfifo(a.lease)
    entry = entry_of(a)

    assert entry.status == "damaged"
    assert all(str(file) in fault for file, fault in zip(refused, entry.faults, strict=True))
    assert "is a link to" in entry.faults[1]
    assert all("is not a regular file" in entry.faults[n] for n in (0, 2))
    assert len(list(entries(runs))) == 3


def test_lost_record_is_damage(a: RunPath) -> None:
    a.record.unlink()
    assert entry_of(a).faults == (f"{a.record} is missing.",)


def test_torn_line_is_ignored(a: RunPath) -> None:
    whole = last_metrics(a.metrics)

    with open(a.metrics, "a") as file:
        file.write('{"epoch": 4, "loss_va')

    assert last_metrics(a.metrics) == whole

    with open(a.metrics, "a") as file:
        file.write("\0\0\0\n")

    assert last_metrics(a.metrics) == whole
    assert read_metrics(a.metrics)[-1] == whole

    a.metrics.write_text('{"epoch": 1, "lo')
    assert last_metrics(a.metrics) == {}


def test_only_the_end_of_long_metrics_is_read(a: RunPath) -> None:
    lines = [json.dumps({"epoch": n, "loss_valid": 1 / n}) for n in range(1, 20001)]
    a.metrics.write_text("garbage" * TAIL + "\n" + "\n".join(lines) + "\n")

    assert last_metrics(a.metrics) == {"epoch": 20000, "loss_valid": 1 / 20000}

    a.metrics.write_text("x" * 2 * TAIL + "\n")

    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        last_metrics(a.metrics)


# Choosing


def ids(found: list[Entry]) -> list[str]:
    return [entry.path.id[0] for entry in found]


def test_runs_are_sorted_and_filtered(runs: Path) -> None:
    for hours, id in enumerate(("bbbbbbbb", "cccccccc", "aaaaaaaa")):
        rewrite(RunPath.find(runs, id), created=f"2024-01-01T0{hours}:00:00+00:00")

    every = list(entries(runs))
    losses = sorted(every, key=lambda entry: entry.loss_valid or 0)

    assert ids(select(every)) == ["a", "c", "b"]
    assert ids(select(every, sort="name")) == ids(sorted(every, key=lambda e: e.path.name))
    assert ids(select(every, sort="loss_valid")) == ids(losses)
    assert ids(select(every, sort="epoch"))[-1] == "c"
    assert ids(select(every, sort="learning_rate")) == ["a", "c", "b"]
    assert ids(select(every, sort="sweep"))[0] == "a"
    assert ids(select(every, limit=2)) == ["a", "c"]
    assert ids(select(every, sweep="width")) == ["a"]
    assert ids(select(every, status="interrupted")) == ["c"]
    assert ids(select(every, settings={"learning_rate": 1e-3})) == ["b"]

    sizes = [entry.size or 0 for entry in select(every, sort="size")]
    assert sizes == sorted(sizes, reverse=True) and all(sizes)


def test_missing_and_damaged_values_sort_last(runs: Path, a: RunPath) -> None:
    b = RunPath.find(runs, "bbbbbbbb")
    a.config.write_text("{")
    b.metrics.write_text('{"epoch": 1, "loss_valid": NaN}\n')

    assert ids(select(entries(runs), sort="learning_rate"))[-1] == "a"
    assert ids(select(entries(runs), sort="loss_valid"))[-1] == "b"
    assert ids(select(entries(runs), settings={"window": 3}, sort="name")).count("a") == 0


# Speed


def test_two_thousand_runs_are_listed_in_seconds(a: RunPath, tmp_path: Path) -> None:
    for n in range(2000):
        path = tmp_path / "many" / f"run-{n}_{n:08}"
        path.mkdir(parents=True)

        for file in (a.config, a.record, a.metrics, a.lease):
            os.link(file, path / file.name)

    start = time.process_time()  # whatever else the machine does

    assert len(select(entries(tmp_path / "many"), sort="size")) == 2000
    assert time.process_time() - start < 10
