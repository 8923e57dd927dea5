r"""Tests for sda_ray.plan.plan: what a sweep will take."""

import json
import random
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from planned import faults_of, plan, script, write

from sda_ray.cluster.nodes import check_files, memory_limit
from sda_ray.cluster.ray_node import local_cpus
from sda_ray.data.dataset import check_data
from sda_ray.plan.plan import (
    Expected,
    Plan,
    at_a_time,
    check_memory,
    check_time,
    estimate,
    expect,
    memory_of,
    plan_to_json,
    print_plan,
)
from sda_ray.search.promotion import Rules, TrialRecord, decide

__all__ = ["script"]  # fixtures


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def made(place: Path, data: Path) -> Plan:
    r"""The plan of a sweep over two widths, in which nothing is wrong."""

    script = write(
        place,
        "SPACE['hidden_channels'] = choice((8, 16), (16, 32))",
        "CONFIG['compile'] = 'on'",
    )

    return apart(script, place / "runs", data)


def apart(script: Path, runs: Path, data: Path) -> Plan:
    r"""Plans in a new process: one in which Ray was imported cannot start one of its own."""

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(plan, script, runs, data, gpus=0).result()


def test_plan_of_a_good_sweep_leaves_nothing_behind(made: Plan, place: Path) -> None:
    assert made.faults == []
    assert not (place / "runs").exists()


def test_plan_has_time_memory_and_disk(made: Plan) -> None:
    small, large = made.shapes

    assert any("without torch.compile" in warning for warning in made.warnings)
    assert small.config["hidden_channels"] == (8, 16)
    assert small.draws + large.draws == len(made.order) == 1000
    assert small.cost.parameters < large.cost.parameters
    assert made.slots == local_cpus()
    assert made.known and made.pruned is not None and made.whole is not None
    assert 0 < made.pruned.busy < made.whole.busy
    assert made.pruned.epochs < made.whole.epochs == 4 * 9
    assert 4 * small.cost.state < made.disk < made.free


def test_plan_is_printed_for_people_and_machines(
    made: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(made)
    text = capsys.readouterr().out
    found = json.loads(json.dumps(plan_to_json(made)))

    assert "16,32" in text and "CPU-hours" in text and "No faults in" in text
    assert found["faults"] == [] and found["at_a_time"] == made.slots
    assert all(shape["nodes"][0]["seconds_per_epoch"] > 0 for shape in found["shapes"])


def test_estimate_of_a_sweep_measures_nothing(made: Plan) -> None:
    assert made.sweep is not None and made.pruned is not None
    rules, wanted = made.sweep.rules, {"CPU": 1.0}
    text = estimate(rules, wanted, made.slots)

    assert float(text.split()[1]) == pytest.approx(made.pruned.epochs, rel=0.3)
    assert f"epochs, {made.slots} trials at a time, each with CPU=1; `sda-ray plan`" in text
    assert "at a time" not in estimate(rules, wanted, None)

    code = "import sys, sda_ray.plan.plan; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sweep_is_expected_to_take_what_its_runs_are_bound_for() -> None:
    rules = Rules(8, 9, 1, 3)
    expected, deviation, most = expect(rules, [])

    assert 8 < expected < most == 8 * 9 and 0 < deviation < expected

    runs = [TrialRecord(i, str(i), "running", 9, 9, {1: 0.5}) for i in range(1, 9)]
    assert expect(rules, runs) == (most, 0, most)  # all have been promoted to the end

    paused = [replace(run, until=1) for run in runs]
    assert expect(rules, paused).epochs == pytest.approx(expected, rel=0.3)

    failed = [replace(runs[0], state="failed"), *paused[1:]]
    assert expect(rules, failed).epochs > expect(rules, paused[1:]).epochs - 9 * 8 / 3

    complete = [replace(run, state="complete", values={1: 0.5, 9: 0.5}) for run in runs]
    assert expect(rules, complete) == (most, 0, most)

    final = replace(rules, pruner="median")
    assert expect(final, []) == (most, 0, most)


def test_expected_epochs_are_the_mean_and_come_true() -> None:
    rules = Rules(12, 18, 2, 3)
    first, halfway, taken = expect(rules, []), list[Expected](), list[int]()

    for seed in range(40):
        runs, rng = dict[int, TrialRecord](), random.Random(100 + seed)
        losses = [rng.random() for _ in range(rules.target)]

        while (action := decide([*runs.values()], (), rules)).kind != "stop":
            record = action.record or TrialRecord(len(runs) + 1, "", "running", 0, 18)
            values = record.values | dict.fromkeys([action.until], losses[record.index - 1])
            state = "complete" if action.until == rules.epochs else "running"
            runs[record.index] = replace(record, until=action.until, values=values, state=state)

            if len(runs) == 6 and not action.record:
                halfway.append(expect(rules, [*runs.values()]))

        taken.append(sum(record.last for record in runs.values()))
        assert expect(rules, [*runs.values()])[:2] == (taken[-1], 0)

    mean, spread = statistics.mean(taken), statistics.stdev(taken)
    off = [x.epochs - n for x, n in zip(halfway, taken, strict=True)]

    assert first.epochs == pytest.approx(mean, rel=0.1)
    assert first.deviation == pytest.approx(spread, rel=0.4)
    assert statistics.mean(off) == pytest.approx(0, abs=0.1 * mean)
    assert statistics.stdev(off) < spread  # what has happened so far is known


def test_network_that_fits_no_node_is_caught(made: Plan) -> None:
    nodes = [replace(node, memory=2**27) for node in made.nodes]
    tight = replace(made, nodes=nodes, faults=[], warnings=[])
    check_memory(tight)

    assert "a trial with hidden_channels=(16, 32)" in faults_of(tight)
    assert "has 134 MB. Choose a smaller network" in faults_of(tight)


@pytest.mark.parametrize(
    ("days", "span"),
    [(1, ""), (99, ""), (101, "101 d"), (682, "1.9 years"), (1e8, "273,785 years")],
)
def test_sweep_of_months_or_years_is_the_first_warning(
    made: Plan, days: float, span: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.pruned is not None
    forecast = replace(made.pruned, finish=86400.0 * days)
    long = replace(made, pruned=forecast, whole=forecast, warnings=["another"])
    check_time(long)
    print_plan(long)

    assert len(long.warnings) == 1 + bool(span)
    assert span == "" or f"takes about {span} here. Choose a smaller" in long.warnings[0]
    assert span in capsys.readouterr().out


def test_disk_that_is_too_small_does_not_hide_the_time(tmp_path: Path, data: Path) -> None:
    vast = apart(write(tmp_path, "MORE = {'trials': 10**9}"), tmp_path / "runs", data)

    assert "GB free. Make room" in faults_of(vast)
    assert vast.warnings[0].startswith("the sweep takes about ")
    assert " years here" in vast.warnings[0]
    assert not (tmp_path / "runs").exists()


def test_memory_limits_the_trials_at_a_time(made: Plan) -> None:
    node = replace(made.nodes[0], memory=1000, fit=4)

    assert [at_a_time(node, memory, 0) for memory in (100, 400, 1001)] == [4, 2, 0]
    assert at_a_time(node, 400, 0.5) == 4


@pytest.mark.parametrize(("gpus", "most"), [(1, 850), (0.5, 425), (0.25, 212), (2, 850)])
def test_trial_fits_its_share_of_a_gpu_with_a_margin(made: Plan, gpus: float, most: int) -> None:
    node = replace(made.nodes[0], memory=1000, fit=4)

    assert at_a_time(node, most, gpus) == 4
    assert at_a_time(node, most + 1, gpus) == 0


def test_share_of_a_gpu_that_is_too_small_is_caught(made: Plan) -> None:
    takes = memory_of(made.nodes[0], max(made.shapes, key=lambda x: x.cost.peak).cost)
    nodes = [replace(node, memory=2 * takes) for node in made.nodes]
    tight = replace(made, nodes=nodes, faults=[], warnings=[], wanted={"GPU": 0.75})

    check_memory(tight)
    assert tight.faults == tight.warnings == []
    tight.wanted = {"GPU": 0.5}
    check_memory(tight)
    assert "per GPU, of which a trial has 0.5." in tight.faults[0]
    assert tight.faults[0].endswith("or give --gpus-per-trial 0.6.")


def test_node_that_sees_other_files_is_a_fault(tmp_path: Path, data: Path) -> None:
    fingerprint = check_data(data).fingerprint
    (tmp_path / "token").write_text("token")

    assert memory_limit() > 2**28
    assert check_files(tmp_path, "token", data, fingerprint) == ([], [])

    faults, _ = check_files(tmp_path, "other", data, "0" * 64)
    assert len(faults) == 2
    assert "must be shared by all nodes" in faults[0]
    assert "differ from those of the sweep" in faults[1]

    faults, _ = check_files(tmp_path, "token", tmp_path, fingerprint)
    assert "there is no file" in faults[0]
    assert [file.name for file in tmp_path.iterdir()] == ["token"]


def test_node_of_a_cluster_need_not_have_the_files(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDA_RAY_LOCAL", str(tmp_path / "local"))
    faults, missing = check_files(tmp_path / "runs", "token", data, "0" * 64, remote=True)
    assert faults == [] and missing == [str(tmp_path / "runs"), str(data)]

    (tmp_path / "file").touch()
    monkeypatch.setenv("SDA_RAY_LOCAL", str(tmp_path / "file"))
    faults, _ = check_files(tmp_path / "runs", "token", data, None, remote=True)
    assert "Set SDA_RAY_LOCAL on this node" in faults[0]
