r"""Tests for sda_ray.cli.live: the live view of a sweep."""

import json
import os
import pty
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_table import records

from sda_ray.cli.live import LiveTable, Pace
from sda_ray.search.promotion import Rules, TrialRecord, count_trials

RULES = Rules(40, 9, 1, 3)
TESTS = Path(__file__).parent

VIEW = """
import os, signal, sys, time
from pathlib import Path

sys.path[:0] = {places!r}

from sda_ray.cli.live import LiveTable
from sda_ray.core import leave_screens, on_signals
from test_table import records
from sda_ray.search import Rules


def interrupt(number):
    raise KeyboardInterrupt


with on_signals(interrupt), LiveTable(
    "demo", Rules(40, 9, 1, 3), Path("."), lambda: records(40), log=Path("ray.log")
):
    print("a message", flush=True)
    os.write(2, b"noise of C++")
    {ending}
"""
ENDINGS = {
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "an error": "raise ValueError('why')",
    "the end": "",
    "an abrupt end": "leave_screens(); os._exit(2)",
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for i in range(5):
        (tmp_path / f"crimson-cloud-{i}_run{i:05}").mkdir()

    return tmp_path


def shown(table: LiveTable, width: int, height: int) -> list[str]:
    table.console = Console(width=width, height=height, force_terminal=True, record=True)
    table.console.print(table._render())

    return table.console.export_text().splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("height", [12, 24, 60])
def test_view_fits_the_terminal(runs: Path, width: int, height: int) -> None:
    table = LiveTable("demo", RULES, runs, lambda: records(40))
    table.now = [r for r in records(40) if r.state != "running"] + records(1)
    lines = shown(table, width, height)
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("#")) + 1

    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("sweep demo  0:00:00  ━━━")
    assert lines[1].startswith(f"{count_trials(table.now)}/40 trials: 1 running"[: width - 1])
    assert lines[2].startswith("best loss_valid 0.2500: run 1 crimson-cloud-0"[: width - 1])
    assert "run00000" in lines[first]  # those in flight come first
    assert lines[-1].startswith("and ") == (height < 40)
    assert ("crimson-cloud-0_run00000" in lines[first]) == (width == 200)
    assert ("0.00123" in lines[first]) == (width >= 80)
    assert "…" not in lines[first] or width == 40  # columns are whole, or left out
    hidden = {40: "too narrow for 5 columns: ", 80: "too narrow for 1 column: activation"}
    assert height == 12 or any(hidden.get(width, "") in line for line in lines)


def test_rows_have_the_curve_the_rank_and_the_node_if_there_are_several(runs: Path) -> None:
    hosts = {"run00000": "a", "run00001": "b"}
    values = {1: 0.5, 3: 0.25}, {1: 0.25, 2: 0.25}
    now = [
        replace(record, state="running", values=x, until=27, epochs=27)
        for record, x in zip(records(2), values, strict=True)
    ]
    table = LiveTable("demo", Rules(40, 27, 1, 3), runs, lambda: now)

    assert not any("node" in line.split() for line in shown(table, 160, 24))

    for id, host in hosts.items():
        path = next(runs.glob(f"*_{id}"))
        texts = dict.fromkeys(("boot", "space", "since", "started"), "")
        holder = {"host": host, "pid": 1, "attempt": 0, **texts}
        (path / "lease.json").write_text(json.dumps(holder))

    lines = [line.split() for line in shown(table, 160, 24)]
    header = next(line for line in lines if line[:1] == ["#"])
    rows = {line[0]: dict(zip(header, line, strict=False)) for line in lines if line}

    assert "left" not in header and "memory" not in header and "GPU" not in header
    assert rows["1"]["curve"] == "█▁" and rows["1"]["rank"] == "1/1"
    assert rows["2"]["rank"] == "1/2" and rows["1"]["node"] == "a" and rows["2"]["node"] == "b"


def test_run_in_progress_has_its_time_left_its_memory_and_its_gpu(runs: Path) -> None:
    values, last = {epoch: 1 / epoch for epoch in range(1, 6)}, 5
    record = replace(records(1)[0], values=values, until=9, epochs=27)
    waiting = replace(records(2)[1], values={1: 0.5}, state="running", until=1)
    lines = [
        {"epoch": epoch, "loss_valid": x, "seconds": 3600.0, "memory": 12.0 + epoch}
        for epoch, x in values.items()
    ]

    for id in ("run00000", "run00001"):
        path = next(runs.glob(f"*_{id}"))
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        texts = dict.fromkeys(("boot", "space", "since", "started"), "")
        holder = {"host": "a", "pid": 1, "attempt": 0, "notes": {"gpu": "0.5 of 3"}, **texts}
        (path / "lease.json").write_text(json.dumps(holder))

    table = LiveTable("demo", Rules(40, 27, 1, 3), runs, lambda: [record, waiting])
    text = shown(table, 160, 24)
    rows = {line.split()[0]: line for line in text if line}

    assert all(x in rows["1"] for x in ("4 h to 9", "17 GB", "0.5 of 3"))
    assert not any(x in rows["2"] for x in (" to ", "GB", "of"))  # it is paused

    details = table.details(record)
    pace = 3600.0
    assert (9 - last - 1) * pace < details["left"] <= (9 - last) * pace
    assert (details["memory"], details["node"], details["gpu"]) == (17.0, "a", "0.5 of 3")


def test_cost_counts_what_paused_runs_do_not_train(runs: Path) -> None:
    now = [replace(records(2)[1], values={1: 0.5}), replace(records(3)[2], source="elsewhere")]
    line = {"epoch": 1, "loss_valid": 0.5, "seconds": 3600.0}
    (runs / "crimson-cloud-1_run00001" / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    table = LiveTable("demo", RULES, runs, lambda: now)

    assert table._spent() == "1 h of training, 8 h saved by pausing"
    assert table._totals().epochs == 1  # those of runs that were brought in are not this sweep's


def test_time_left_follows_from_the_pace_and_has_a_spread() -> None:
    steady, uneven = Pace(), Pace()

    for i in range(81):
        if i == 9:
            assert steady.left(1, 9) is None

        steady.add(i, i)
        uneven.add(i * i / 80, i)

    found = steady.left(160, 81)
    assert found is not None
    assert found[0] == pytest.approx(160, rel=0.03) and found[2] - found[1] < 8

    found = uneven.left(160, 80)
    assert found is not None and found[1] < 0.8 * found[0] < found[0] < 0.8 * found[2]


def test_without_a_terminal_there_is_a_line_per_event(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = records(3)[2]

    with LiveTable("demo", RULES, runs, list) as table:
        table.notify("draw", TrialRecord(1, "run00000", "running", 9, 9, config=record.config))
        table.notify("running", record)
        table.notify("complete", record)

    started, complete = capsys.readouterr().out.splitlines()
    assert "run 1 run00000 starts: epoch 0/9, loss_valid –, learning_rate=0.00123" in started
    assert "run 3 run00002 complete: epoch 9/9, loss_valid 2.2500" in complete


def test_without_a_terminal_there_is_a_line_about_the_state_from_time_to_time(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveTable("demo", RULES, runs, lambda: records(6)) as table:
        table.remind()
        assert not capsys.readouterr().out
        table.told -= 301

        for _ in range(2):
            table.remind()

    (line,) = capsys.readouterr().out.splitlines()
    assert "sweep 'demo': 54 of about " in line and "2 running" in line
    assert "best loss_valid 0.2500: run 1 crimson-cloud-0, epoch 9/9, for " in line


def test_text_of_others_is_shown_plainly(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "crimson-cloud-2_run00002").rename(runs / "x\x1b[2J[bold]_run00002")
    table = LiveTable("demo", RULES, runs, lambda: records(5))
    table.notify("failed", replace(records(5)[4], error="a\x1b]0;title\x07"))
    out = capsys.readouterr().out

    assert "a�]0;title�" in out and "\x1b" not in out
    assert any("x�[2J[bold]" in line for line in shown(table, 160, 24))


def watched(command: list[str], env: dict[str, str], directory: Path) -> tuple[str, int]:
    r"""Runs a command in a terminal of its own. Returns what that got, and the exit status."""

    pid, fd = pty.fork()

    if not pid:
        os.chdir(directory)
        os.execve(command[0], command, env)

    output, deadline = b"", time.monotonic() + 60

    while time.monotonic() < deadline:
        try:
            output += os.read(fd, 2**16)
        except OSError:  # the other side has ended
            break
    else:
        os.kill(pid, signal.SIGKILL)

    os.close(fd)

    return output.decode(), os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("ending", ENDINGS)
def test_terminal_is_returned_with_messages_and_the_state(tmp_path: Path, ending: str) -> None:
    places = [str(TESTS), str(TESTS.parents[1])]
    script = tmp_path / "view.py"
    script.write_text(VIEW.format(places=places, ending=ENDINGS[ending]))
    env = os.environ | {"TERM": "xterm"}
    output, _ = watched([sys.executable, str(script)], env, tmp_path)
    screen, _, after = output.rpartition("\x1b[?1049l")

    assert "\x1b[?1049h" in screen and "noise of C++" not in output
    assert "\x1b" not in after.removeprefix("\x1b[?25h")
    assert "a message\r\n" in after and "sweep 'demo': " in after
    assert (tmp_path / "ray.log").read_text() == "noise of C++"
    assert ("is in ray.log" in after) == (ending in ("an error", "an abrupt end"))
    assert ("ValueError: why" in after) == (ending == "an error")


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_dumb_terminal_gets_lines(tmp_path: Path, term: str) -> None:
    places = [str(TESTS), str(TESTS.parents[1])]
    script = tmp_path / "view.py"
    script.write_text(VIEW.format(places=places, ending=""))
    output, _ = watched([sys.executable, str(script)], os.environ | {"TERM": term}, tmp_path)

    assert bool(re.search("\x1b", output)) == (term != "dumb")
    assert "a message\r\n" in output
