r"""Tests for the upload of runs to W&B, by its own client, to a server on this machine."""

import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from offline import EPOCHS, ID, NAME, STEPS, WANDB, attempted, make_run, run
from wandb_server import HISTORY, SUMMARY, DyingServer, Refusal, WandbServer

from sda_ray.cli.main import main
from sda_ray.core.config import CONFIG
from sda_ray.core.files import locked, write_json
from sda_ray.core.lease import Lease
from sda_ray.runs.path import RunPath

__all__ = ["attempted", "run"]  # fixtures

Sync = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def sync(env: dict[str, str], tmp_path: Path) -> Sync:
    r"""Runs `sda-ray sync` on `tmp_path/runs`, to its end."""

    def start(server: dict[str, str], *words: str) -> Any:
        return subprocess.run(
            [sys.executable, "-m", "sda_ray", "sync", f"--runs={tmp_path / 'runs'}", *words],
            cwd=tmp_path,
            env={**env, **server},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return start


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as found:
        yield found


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def check(server: WandbServer, id: str = ID, name: str = NAME) -> None:
    r"""Asserts that a server has all of a run, once and in order."""

    found = server.runs[id]
    lines = [{"epoch": e, "loss_valid": 0.1 + 1 / e, "lr": 1e-3} for e in range(1, EPOCHS + 1)]
    rows = [{"epoch": row["_step"], **row} for row in found.history]

    assert [row["epoch"] for row in rows] == STEPS
    assert [{key: row[key] for key in lines[0]} for row in rows[:-1]] == lines
    assert rows[-1]["samples"]["_type"] == "image-file"
    assert any(rows[-1]["samples"]["path"] in file for file in found.files)
    assert (found.name, found.project, found.group) == (name, "flows", "width")
    assert found.tags == WANDB["tags"]
    assert json.loads(found.config)["learning_rate"]["value"] == CONFIG["learning_rate"]
    assert found.exit_code == 0


def test_run_of_killed_attempts_is_uploaded_once(
    run: RunPath, sync: Sync, server: WandbServer
) -> None:
    before = files(run.directory)

    done = sync(server.env, "--all")

    assert done.returncode == 0, done.stderr
    assert f"{NAME}_{ID}: uploaded, {len(STEPS)} rows" in done.stdout
    check(server)
    assert files(run.directory) == before

    rows = list(server.runs[ID].rows[HISTORY])
    again = sync(server.env, ID)

    assert again.returncode == 0
    assert "there already" in again.stdout
    assert server.runs[ID].rows[HISTORY] == rows


def test_evaluation_is_sent_into_the_summary_each_time_it_changes(
    run: RunPath, sync: Sync, server: WandbServer
) -> None:
    def evaluated(crps: float) -> "subprocess.CompletedProcess[str]":
        found = {"crps": crps, "mse": 0.04, "variance": 0.03, "members": 4.0, "ranks": [1, 2]}
        results = {"circle": {"0": found}}
        evaluation = {"version": "1.1", "weights": "", "data": "", "settings": {}}
        write_json(run.evaluation, evaluation | {"results": results})

        return sync(server.env, ID)

    for crps in (0.25, 0.5):
        done = evaluated(crps)
        summary = json.loads(server.runs[ID].rows[SUMMARY][-1])

        assert done.returncode == 0, done.stderr
        assert done.stdout.count(", and its evaluation") == 1
        assert summary["evaluation/circle/crps"] == crps
        assert summary["evaluation/circle/rmse"] == pytest.approx(0.2)
        assert summary["loss_valid"] > 0  # what was there stays

    assert "there already\n" in evaluated(0.5).stdout
    check(server)


def test_run_that_cannot_be_uploaded_does_not_keep_others_back(
    tmp_path: Path, sync: Sync, server: WandbServer
) -> None:
    make_run(tmp_path / "runs", "refused1", wandb=WANDB | {"project": "team/flows"})
    bomb = make_run(tmp_path / "runs", "strange1").samples
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", 30_000) + chunk(b"IDAT") + chunk(b"IEND")
    )
    make_run(tmp_path / "runs")

    done = sync(server.env, "--all")

    assert done.returncode == 1
    assert f"{NAME}_refused1: W&B refuses it: " in done.stderr
    assert f"{bomb} is not a picture to upload: " in done.stderr
    check(server)


def chunk(kind: bytes, size: int = 0) -> bytes:
    r"""Returns a part of a PNG: its header for so many pixels a side, or one that is empty."""

    data = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0) if size else b""

    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_rows_that_the_server_lacks_are_replayed(
    run: RunPath, sync: Sync, server: WandbServer
) -> None:
    origin = {"sweep": "width", "trial": 3, "study": "sweeps/width/study.journal"}
    write_json(run.record, json.loads(run.record.read_text()) | origin)

    assert f"uploaded, {len(STEPS)} rows" in sync(server.env, NAME).stdout
    check(server)
    config = json.loads(server.runs[ID].config)
    assert {key: config[key]["value"] for key in origin} == origin

    rows = server.runs[ID].rows
    beginning = rows[HISTORY][:4]
    rows[HISTORY], rows[SUMMARY] = list(beginning), beginning[-1:]

    assert "completed, from step 5 on" in sync(server.env, "--all").stdout
    assert rows[HISTORY][:4] == beginning
    check(server)


def test_rows_that_are_not_those_of_the_run_are_an_error(
    run: RunPath, sync: Sync, server: WandbServer
) -> None:
    r"""As after `wandb sync` of attempts that overlap: it gives the rows of the second new steps."""

    assert sync(server.env, NAME).returncode == 0
    rows = server.runs[ID].rows[HISTORY]
    rows += [json.dumps(json.loads(row) | {"_step": 8 + i}) for i, row in enumerate(rows[3:])]
    before = list(rows)

    done = sync(server.env, "--all")

    assert done.returncode == 1
    assert "W&B has 11 rows of it, to step 11, which are not its first ones" in done.stderr
    assert server.runs[ID].rows[HISTORY] == before


def test_server_that_dies_leaves_the_rest_for_later(
    run: RunPath, sync: Sync, server: WandbServer
) -> None:
    before = files(run.directory)

    with DyingServer(rows=3) as dying:
        start = time.monotonic()
        done = sync(dying.env, "--all")

    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert "0 of 1 runs are uploaded" in done.stderr
    assert files(run.directory) == before
    server.runs = dying.runs

    assert "completed, from step 4 on" in sync(server.env, "--all").stdout
    check(server)


def test_server_that_is_absent_refuses_or_hangs_is_an_error_soon(run: RunPath, sync: Sync) -> None:
    before = files(run.directory)
    refusing = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=refusing.serve_forever, daemon=True).start()
    silent, absent = socket.socket(), socket.socket()

    for listener in (silent, absent):
        listener.bind(("127.0.0.1", 0))

    silent.listen(64)
    ports = {"absent": absent.getsockname()[1], "silent": silent.getsockname()[1]}
    ports["refusing"] = refusing.server_address[1]
    done: dict[str, Any] = {}

    def try_to(kind: str) -> None:
        url, start = f"http://127.0.0.1:{ports[kind]}", time.monotonic()
        result = sync({"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}, "--all")
        done[kind] = (result.returncode, result.stderr, time.monotonic() - start)

    threads = [threading.Thread(target=try_to, args=(kind,)) for kind in ports]

    for thread in threads:
        thread.start()

    for thread in threads:
        thread.join()

    refusing.shutdown()
    refusing.server_close()
    silent.close()
    absent.close()

    quickest = min(seconds for _, _, seconds in done.values())

    for code, errors, seconds in done.values():
        assert code == 1
        assert "Traceback" not in errors
        assert "repeat the command to continue" in errors
        assert seconds < quickest + 30, done  # W&B itself would wait for minutes

    assert "does not answer within 6 s" in done["silent"][1]
    assert "verify credentials" in done["refusing"][1]
    assert files(run.directory) == before


def test_second_upload_at_the_same_time_is_refused(
    run: RunPath, sync: Sync, server: WandbServer
) -> None:
    with locked(run.directory.with_name(".sync.lock")):
        done = sync(server.env, ID)

    assert done.returncode == 2 and not server.runs
    assert "Another `sda-ray sync` may be running" in done.stderr


def test_without_an_account_an_error_says_what_to_do(run: RunPath, sync: Sync) -> None:
    done = sync({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "--all")

    assert done.returncode == 1
    assert "wandb login" in done.stderr


def test_finished_runs_that_no_process_uses_are_uploaded(
    tmp_path: Path, sync: Sync, server: WandbServer
) -> None:
    runs = tmp_path / "runs"
    make_run(runs, "finished")
    make_run(runs, "unended1", status="paused")
    make_run(runs, "paused01", status="paused", sweep="over")
    make_run(runs, "paused02", status="paused", sweep="runs")
    make_run(runs, "aborted1", status="interrupted", sweep="over")
    (runs / "sweeps/runs").mkdir(parents=True)
    drives = Lease(runs / "sweeps/runs/lease.json", "sweep 'runs'")
    make_run(runs, "private1", wandb=WANDB | {"mode": "disabled"})
    damaged = make_run(runs, "damaged1").metrics
    damaged.write_text("{\n" + damaged.read_text())
    lease = Lease(make_run(runs, "inuse123").lease, "a run")

    try:
        done = sync(server.env, "--all")
    finally:
        lease.release()
        drives.release()

    assert done.returncode == 1
    assert f"{damaged} is damaged" in done.stderr
    assert set(server.runs) == {"finished", "paused01"}
    assert f"{NAME}_inuse123 is left out: a process is using it" in done.stdout
    assert "left out unless they are named: 1 interrupted, 2 paused" in done.stdout
    assert "Trained with --wandb disabled, and left out unless named: 1" in done.stdout

    assert "2 of 2 runs are at" in sync(server.env, "--sweep", "over").stdout
    assert set(server.runs) == {"finished", "paused01", "aborted1"}
    assert sync(server.env, "unended1").returncode == 0
    assert [row["_step"] for row in server.runs["unended1"].history] == STEPS[:-1]


@pytest.mark.parametrize("words", [[], ["--all", ID], ["--all", "--sweep=x"]])
def test_either_runs_or_all_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv=["sync", f"--root={tmp_path}", *words])

    assert "give the runs to upload, or --all" in capsys.readouterr().err
