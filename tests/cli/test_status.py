r"""Tests for sda_ray.cli.status: what is told of sweeps, while they run and later."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Start
from sweeping import EPOCH, make_sweep, make_sweep_of_seeds

from sda_ray import choice
from sda_ray.cli.status import follow
from sda_ray.core.config import load_config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.search.promotion import rank_key
from sda_ray.search.study import Study

ENDS = {2: "failed", 3: "diverged"}
ODD = {"name": "width", "trials": 12, "fingerprint": "f", "options": {}} | {
    "definition": {"config": {"epochs": 1}, "space": {}, "finalists": []}
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    r"""A finished sweep of 12 trials, two of which fail or diverge."""

    return make_sweep(tmp_path / "runs", "width", 12, ends=ENDS)


def retarget(runs: Path, name: str, trials: int) -> None:
    file = runs / "sweeps" / name / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trials": trials}))


@pytest.fixture
def told(cli_here: Cli) -> Callable[..., Any]:
    r"""Returns what a command prints, read from JSON if that is asked for."""

    def run(*words: str) -> Any:
        done = cli_here(*words)
        assert done.returncode == 0, done.stderr

        return json.loads(done.stdout) if {"--json", "--config"} & {*words} else done.stdout

    return run


def test_numbers_are_those_of_the_study(study: Study, told: Callable[..., Any]) -> None:
    records = study.records()
    complete = sorted((r for r in records if r.state == "complete"), key=rank_key)
    (row,), status = told("sweeps", "--json"), told("status", "width", "--json")
    best = told("best", "width", "--top", "99", "--json")
    epochs = sum(record.last for record in records)

    assert [(x["value"], x["config"], x["epochs"]) for x in best] == [
        (r.value, r.config, r.last) for r in complete
    ]
    assert [x["finals"] for x in best] == [[r.trial.value] for r in complete]
    assert {x["se"] for x in best} == {0.01}
    assert row["best"] == status["best"]["value"] == complete[0].value
    assert row["epochs"] == status["epochs"] == epochs
    assert row["state"] == "finished" and row["trials"] == row["target"] == 12
    assert sum(row["runs"].values()) == len(records)
    assert status["seconds"] == EPOCH * epochs
    assert status["saved"] == sum(30 - r.last for r in records if r.state == "pruned") > 0
    assert status["epochs"] <= status["most"] and status["left"] is None
    assert {x["index"]: x["state"] for x in status["failures"]} == ENDS


def test_sweep_that_lacks_seeds_is_not_finished(tmp_path: Path, told: Callable[..., Any]) -> None:
    make_sweep(tmp_path / "runs", "width", 4, pruner="none")
    file = tmp_path / "runs" / "sweeps" / "width" / "sweep.json"
    record = json.loads(file.read_text())
    assert told("status", "width", "--json")["state"] == "finished"

    file.write_text(json.dumps(record | {"definition": record["definition"] | {"seeds": 2}}))
    assert told("status", "width", "--json")["state"] == "stopped"
    assert "4 of 4 trials so far, 4 not at their end" in told("attach", "width")


def test_configurations_are_ranked_by_the_mean_over_seeds(
    tmp_path: Path, told: Callable[..., Any]
) -> None:
    records = make_sweep_of_seeds(tmp_path / "runs", "seeds", 12).records()
    firsts = [r for r in records if r.state == "complete" and not r.replica_of]
    best, (row,) = told("best", "seeds", "--top=9", "--json"), told("sweeps", "--json")

    assert len(best) == len(firsts) and row["trials"] == 12
    assert row["epochs"] == sum(r.last for r in records)

    for x in best:  # a seed adds 0.01
        value = next(r.values[30] for r in firsts if r.index == x["index"])
        assert x["seeds"] == pytest.approx([value, value + 0.01, value + 0.02])
        assert x["value"] == pytest.approx(value + 0.01)
        assert x["se"] == pytest.approx(0.01 / 3**0.5)

    text = told("best", "seeds")
    assert "seeds" in text and "the value is their mean" in text and "One seed" not in text


def test_texts_say_the_same(study: Study, told: Callable[..., Any]) -> None:
    (row,), text = told("sweeps", "--json"), told("status")
    listing = told("sweeps").splitlines()[-1].split()

    assert listing[:3] == ["width", "finished", "12/12"] and f"{row['best']:.4f}" in listing
    assert f"{row['epochs']}; " in text and f"loss_valid {row['best']:.4f}" in text
    assert "it failed & <ended>" in text and "pausing saved " in text

    best = told("best", "width").splitlines()
    assert " ".join(["complete", "30/30", f"{row['best']:.4f}", "0.01"]) in " ".join(
        best[4].split()
    )
    assert any("sda-ray confirm width" in line for line in best)


def test_state_of_a_sweep_is_that_of_its_driver_and_runs(
    tmp_path: Path, study: Study, told: Callable[..., Any]
) -> None:
    directory = tmp_path / "runs" / "sweeps" / "width"
    lease = Lease(directory / "lease.json", "sweep 'width'")

    try:
        status = told("status", "width", "--json")
        assert status["state"] == "running" and status["driver"]["pid"] == os.getpid()
        assert f"{status['driver']['host']}:{os.getpid()}" in told("sweeps")
        assert f"driven by process {os.getpid()} on" in told("status")

        held = json.loads((directory / "lease.json").read_text())
    finally:
        lease.release()

    retarget(tmp_path / "runs", "width", 99)
    assert told("sweeps", "--json")[0]["state"] == "stopped"
    assert "To resume: sda-ray sweep width" in told("status") and "died" not in told("status")

    (directory / "lease.json").write_text(json.dumps(held | {"pid": 2**22 + 1}))
    assert f"its driver, process {2**22 + 1} on {held['host']}, died" in told("status")


def test_sweep_that_has_tried_all_options_is_finished(
    tmp_path: Path, told: Callable[..., Any]
) -> None:
    make_sweep(tmp_path / "runs", "few", 2, space={"activation": choice("SiLU", "GELU")})
    retarget(tmp_path / "runs", "few", 99)

    assert told("status", "few", "--json")["state"] == "finished"


def test_run_without_a_driver_is_interrupted(
    tmp_path: Path, study: Study, told: Callable[..., Any]
) -> None:
    lease = Lease(tmp_path / "runs" / "sweeps" / "width" / "lease.json", "sweep 'width'")

    try:
        study.journal.lease = lease
        record = next(r for r in study.records() if r.state == "pruned")
        study.start(record, 30, None)
        assert told("status", "width", "--json")["runs"]["running"] == 1
        assert told("status", "width", "--json")["left"] > 0
        (run,) = told("status", "width", "--json")["running"]
        assert run["index"] == record.index and run["until"] == 30
        assert run["left"] == pytest.approx((30 - record.last) * EPOCH, abs=EPOCH)
        assert " to 30 " in told("status", "width")
    finally:
        lease.release()

    row = told("status", "width", "--json")
    assert row["state"] == "stopped" and row["runs"]["interrupted"] == 1 and row["left"] is None


def test_running_sweeps_are_shown_by_default_else_the_newest(
    tmp_path: Path, study: Study, told: Callable[..., Any]
) -> None:
    make_sweep(tmp_path / "runs", "newer", 2)
    assert [x["name"] for x in told("status", "--json")] == ["newer"]

    lease = Lease(tmp_path / "runs" / "sweeps" / "width" / "lease.json", "sweep 'width'")

    try:
        assert [x["name"] for x in told("status", "--json")] == ["width"]
    finally:
        lease.release()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sweep.json", ""),
        ("sweep.json", "[1]"),
        ("sweep.json", '{"name": "width", "trials": 12, "definition": [], "options": {}}'),
        ("sweep.json", json.dumps(ODD)),
        ("study.journal", "nonsense\n"),
        ("study.journal", "null\n"),
        ("study.journal", ""),
        ("study.journal", '{"op_code": 0, "study_name": "other", "directions": [1]}\n'),
    ],
)
def test_damaged_sweep_has_a_row_and_hides_no_other(
    tmp_path: Path, study: Study, told: Callable[..., Any], cli_here: Cli, file: str, content: str
) -> None:
    make_sweep(tmp_path / "runs", "sound", 2)
    (tmp_path / "runs" / "sweeps" / "width" / file).write_text(content)
    states = {row["name"]: row["state"] for row in told("sweeps", "--json")}
    empty = file == "study.journal" and not content  # as before the first record

    assert states == {"sound": "finished", "width": "stopped" if empty else "damaged"}
    assert str(tmp_path) in told("sweeps") or empty

    for command in ("status", "best", "dashboard") if not empty else ():
        done = cli_here(command, "width")
        assert done.returncode == 2 and "Traceback" not in done.stderr

    for command in ("attach", "report") if empty else ():
        done = cli_here(command, "width")
        assert done.returncode == 2 and "sweep 'width' has not begun" in done.stderr


def test_journal_with_an_epoch_that_is_no_number_is_damaged(
    tmp_path: Path, study: Study, told: Callable[..., Any]
) -> None:
    file = tmp_path / "runs" / "sweeps" / "width" / "study.journal"
    file.write_text(re.sub(r'"step":\d+', '"step":null', file.read_text(), count=1))

    assert told("sweeps", "--json")[0]["state"] == "damaged"


def test_pipe_in_place_of_a_file_is_not_waited_for(
    tmp_path: Path, study: Study, told: Callable[..., Any]
) -> None:
    for name in ("sweep.json", "study.journal", "lease.json"):
        file = tmp_path / "runs" / "sweeps" / "width" / name
        file.unlink()
        os.mkfifo(file)

    assert told("sweeps", "--json")[0]["state"] == "damaged"


def test_text_of_others_is_shown_plainly(
    tmp_path: Path, study: Study, told: Callable[..., Any]
) -> None:
    for path in (tmp_path / "runs").glob("crimson-cloud-*"):
        path.rename(path.with_name(f"x\x1b[2J{path.name}"))

    (tmp_path / "runs" / "sweeps" / "width").rename(tmp_path / "runs" / "sweeps" / "a\x1b]0;b")
    text = told("sweeps")
    assert "a�]0;b" in text and "\x1b" not in text


@pytest.mark.parametrize("command", ["attach", "stop", "report", "sweep", "status", "best"])
def test_unknown_sweep_is_met_with_the_closest(study: Study, cli_here: Cli, command: str) -> None:
    done = cli_here(command, "widht")

    assert done.returncode == 2
    assert "there is no sweep 'widht'" in done.stderr and "Did you mean 'width'?" in done.stderr


def test_unknown_run_is_met_with_the_closest(tmp_path: Path, study: Study, cli_here: Cli) -> None:
    done = cli_here("runs", "show", "crimsn-cloud-7")

    assert done.returncode == 2 and "Did you mean 'crimson-cloud-7'?" in done.stderr


def test_filter_by_an_unknown_sweep_suggests_the_closest(
    study: Study, cli_here: Cli, told: Callable[..., Any]
) -> None:
    assert "Did you mean 'width'?" in cli_here("evaluate", "--sweep", "widht").stderr
    assert "Did you mean 'width'?" in told("runs", "--sweep", "widht")
    assert "Did you mean" not in told("runs", "--sweep", "width", "--status", "running")


def test_config_of_the_best_run_can_be_trained(
    tmp_path: Path, study: Study, told: Callable[..., Any], cli_here: Cli
) -> None:
    (best,) = told("best", "width", "--json")
    content = told("best", "width", "--config")
    (tmp_path / "best.json").write_text(json.dumps(content))

    assert best["config"].items() <= content.items()
    assert load_config(tmp_path / "best.json") == load_config(
        tmp_path / "runs" / best["run"] / "config.json"
    )

    done = cli_here("train", "--config", "best.json", "window=4")
    assert done.returncode == 2 and "window is 4" in done.stderr  # all else is accepted


def test_sweep_without_a_complete_run_has_no_best(
    tmp_path: Path, cli_here: Cli, told: Callable[..., Any]
) -> None:
    make_sweep(tmp_path / "runs", "poor", 1, ends={1: "diverged"})
    done = cli_here("best", "poor")

    assert done.returncode == 2 and "has no complete run yet" in done.stderr
    assert "no run is complete yet" in told("status", "poor")


def test_without_sweeps_it_is_said(told: Callable[..., Any]) -> None:
    assert told("sweeps", "--json") == told("status", "--json") == []
    assert "There are no sweeps in " in told("sweeps") and "There are no" in told("status")


def test_watch_ends_with_the_sweep(study: Study, told: Callable[..., Any]) -> None:
    assert told("status", "width", "--watch").count("finished") == 1


def test_sweeps_are_listed_without_what_is_heavy(study: Study, tmp_path: Path) -> None:
    program = (
        "import sys; from sda_ray.cli.main import main; main(argv=['sweeps']); "
        "sys.exit(str({'torch', 'h5py', 'ray', 'wandb'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert done.stderr.strip() == "set()", done.stderr
    assert "width" in done.stdout


# The dashboard


def test_copy_follows_a_journal_by_whole_lines(tmp_path: Path) -> None:
    journal, copy = tmp_path / "journal", tmp_path / "copy"
    journal.write_text("a\nb")
    size = follow(journal, copy, 0)
    assert copy.read_text() == "a\n"

    journal.write_text("a\nb\nc\n")
    assert follow(journal, copy, size) == 6 and copy.read_text() == "a\nb\nc\n"

    journal.write_text("d\n")
    assert follow(journal, copy, 6) == 0 and copy.read_text() == "a\nb\nc\n"

    journal.unlink()

    with pytest.raises(UserError, match="cannot be copied"):
        follow(journal, copy, 6)


@pytest.fixture
def dashboard(study: Study, start: Start) -> Iterator[tuple[Any, str]]:
    process = start("dashboard", "width")
    assert process.stdout is not None
    process.stdout.readline()  # places
    line = process.stdout.readline()

    yield process, line.split()[0]


def test_dashboard_follows_the_study_and_leaves_nothing(
    dashboard: tuple[Any, str], home: Path, study: Study, tmp_path: Path
) -> None:
    process, url = dashboard
    directory = tmp_path / "runs" / "sweeps" / "width"
    before = {file.name for file in directory.iterdir()}

    def trials() -> int:
        with urllib.request.urlopen(f"{url}api/studies/0?after=0", timeout=30) as answer:
            return len(json.load(answer)["trials"])

    count = trials()
    assert url.startswith("http://127.0.0.1:") and count >= 12
    assert {file.name for file in directory.iterdir()} == before  # no lock, no copy

    lease = Lease(directory / "lease.json", "sweep 'width'")

    try:
        study.journal.lease = lease
        study.add(study.records()[0], study.records()[0].trial)
        deadline = time.monotonic() + 60

        while trials() == count:
            assert time.monotonic() < deadline, "the copy does not follow"
            time.sleep(0.5)
    finally:
        lease.release()

    journal = directory / "study.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))  # an older copy was restored

    while trials() != count:
        assert time.monotonic() < deadline, "the copy does not begin anew"
        time.sleep(0.5)

    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert not list(home.glob("sda-ray-*"))


def test_dashboard_leaves_nothing_when_its_terminal_is_closed(
    dashboard: tuple[Any, str], home: Path
) -> None:
    process, _ = dashboard
    process.send_signal(signal.SIGHUP)

    assert process.wait(timeout=30) == 129
    assert not list(home.glob("sda-ray-*"))


def test_port_in_use_is_refused(dashboard: tuple[Any, str], cli_here: Cli) -> None:
    port = dashboard[1].rstrip("/").rpartition(":")[2]
    done = cli_here("dashboard", "width", "--port", port)

    assert done.returncode == 2 and f"port {port} is in use" in done.stderr
