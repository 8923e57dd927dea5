r"""Tests for the run directories as people see them: listed, shown, compared and pruned."""

import argparse
import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from sda_ray.browse import add_runs_parser, runs_command, with_action
from sda_ray.checkpoint import RunPath
from sda_ray.config import CONFIG
from sda_ray.curves import TAIL, chart, last_metrics, read_metrics
from sda_ray.details import compare, in_full
from sda_ray.errors import UserError
from sda_ray.inventory import Entry, entries, read_entry, select
from sda_ray.keys import KEYS
from sda_ray.lease import Lease
from sda_ray.reclaim import prune, refusal, resumable
from sda_ray.runs import Run
from sda_ray.tracking import Wandb
from sda_ray.train import train

SMALL = CONFIG | {
    "window": 3,
    "embedding": 8,
    "hidden_channels": (4, 8),
    "hidden_blocks": (1, 1),
    "epochs": 3,
    "batch_size": 8,
}


def make(runs: Path, data: Path, id: str, epochs: int | None = None, **more: Any) -> RunPath:
    r"""Trains a run, to its end or for some epochs."""

    record = {"sweep": more.pop("sweep", None)}
    run = Run(runs, SMALL | more, id=id, wandb=Wandb("disabled"), record=record)
    training = train(run, data)

    for metrics in training:
        if metrics["epoch"] == epochs:
            break

    training.close()  # type: ignore[attr-defined]
    run.close("finished" if epochs is None else "interrupted")

    return run.path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""Two finished runs, one of them of a sweep, and one that was interrupted."""

    root = tmp_path_factory.mktemp("inventory")
    rng = np.random.default_rng(0)
    (root / "data").mkdir()

    for name, count in {"train": 8, "valid": 2}.items():
        with h5py.File(root / "data" / f"{name}.h5", "w") as file:
            file["x"] = rng.standard_normal((count, 4, 2, 8, 8), dtype=np.float32)

    make(root / "runs", root / "data", "aaaaaaaa", sweep="width")
    make(root / "runs", root / "data", "bbbbbbbb", learning_rate=1e-3)
    make(root / "runs", root / "data", "cccccccc", epochs=1)

    return root / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


@pytest.fixture
def a(runs: Path) -> RunPath:
    return RunPath.find(runs, "aaaaaaaa")


@pytest.fixture
def sda(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    r"""Runs `sda-ray runs …` and returns what it prints; with --json, decoded."""

    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description)

    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    add_runs_parser(command)

    def run(*words: str) -> Any:
        args = parser.parse_args(with_action(["runs", *words]))
        args.runs = runs
        runs_command(args)
        printed = capsys.readouterr().out

        return json.loads(printed) if args.json else printed

    return run


def entry_of(path: RunPath) -> Entry:
    entry = read_entry(path)
    assert entry is not None

    return entry


def rewrite(path: RunPath, **changes: Any) -> None:
    record = json.loads(path.record.read_text()) | changes
    path.record.write_text(json.dumps(record))


def lease_of(path: RunPath, **changes: Any) -> None:
    path.lease.write_text(json.dumps(json.loads(path.lease.read_text()) | changes))


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
        "import sys, time, pathlib; from sda_ray.lease import Lease;"
        "Lease(pathlib.Path(sys.argv[1]), 'run'); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(a.lease)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        assert entry_of(a).status == "running"
        child.kill()
        child.wait()

    assert entry_of(a).status == "interrupted"


@pytest.mark.parametrize(
    ("seconds", "status"), [(0, "running"), (30, "running"), (600, "interrupted")]
)
def test_holder_elsewhere_is_judged_by_its_heartbeat_at_once(
    a: RunPath, seconds: float, status: str
) -> None:
    rewrite(a, status="running")
    lease_of(a, host="another", boot="another", pid=1, started="1")
    os.utime(a.lease, times=(time.time() - seconds,) * 2)
    start = time.monotonic()

    assert entry_of(a).status == status
    assert time.monotonic() - start < 1


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

    a.config.symlink_to(outside)
    os.mkfifo(a.record)
    os.mkfifo(a.metrics)
    os.mkfifo(a.lease)
    entry = entry_of(a)

    assert entry.status == "damaged"
    assert [fault.split()[-5:] for fault in entry.faults] == [
        ["is", "not", "a", "regular", "file."]
    ] * 3
    assert len(list(entries(runs))) == 3


def test_lost_record_is_damage(a: RunPath) -> None:
    a.record.unlink()
    assert entry_of(a).faults == (f"{a.record} is missing.",)


def test_torn_line_is_ignored(a: RunPath) -> None:
    whole = last_metrics(a)

    with open(a.metrics, "a") as file:
        file.write('{"epoch": 4, "loss_va')

    assert last_metrics(a) == whole

    with open(a.metrics, "a") as file:
        file.write("\0\0\0\n")

    assert last_metrics(a) == whole
    assert read_metrics(a)[-1] == whole

    a.metrics.write_text('{"epoch": 1, "lo')
    assert last_metrics(a) == {}


def test_only_the_end_of_long_metrics_is_read(a: RunPath) -> None:
    lines = [json.dumps({"epoch": n, "loss_valid": 1 / n}) for n in range(1, 20001)]
    a.metrics.write_text("garbage" * TAIL + "\n" + "\n".join(lines) + "\n")

    assert last_metrics(a) == {"epoch": 20000, "loss_valid": 1 / 20000}

    a.metrics.write_text("x" * 2 * TAIL + "\n")

    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        last_metrics(a)


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


# The command


def test_list_takes_filters(sda: Callable[..., Any]) -> None:
    assert [row["id"][0] for row in sda("learning_rate=1e-3", "--json")] == ["b"]
    assert [row["id"][0] for row in sda("list", "hidden_channels=4,8", "--json", "--limit", "1")]
    assert sda("--status", "paused", "--json") == []
    assert "None of 3 runs" in sda("--sweep", "nothing")
    assert "3 of 3 runs" in sda("--sort", "size")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sort", "los_valid"], "Did you mean 'loss_valid'"),
        (["--limit", "0"], "--limit is 0, but must be at least 1"),
        (["aaaaaaaa"], "To see a run: sda-ray runs show aaaaaaaa"),
        (["windw=3"], "Did you mean 'window'"),
        (["window=4"], "window is 4, but must be an odd integer"),
        (["show", "zzz"], "there is no run 'zzz'"),
        (["compare", "a", "aaaaaaaa"], "the same run is given twice"),
        (["prune", "cccccccc"], "it is interrupted, and only finished runs are pruned"),
    ],
)
def test_mistakes_are_explained(sda: Callable[..., Any], words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sda(*words)

    assert message in str(caught.value)


def test_show_tells_config_curve_and_origin(runs: Path, sda: Callable[..., Any]) -> None:
    a = RunPath.find(runs, "aaaaaaaa")
    rewrite(RunPath.find(runs, "bbbbbbbb"), parent="aaaaaaaa", trial=7)
    shown = sda("show", "bbbbbbbb")

    for text in ("(CONFIG has 96,192,384)", "━ loss_valid", "torch ", "attempt", "trial", "7"):
        assert text in shown

    assert a.directory.name in shown  # its parent
    assert "* learning_rate" in shown and "* weight_decay" not in shown

    found = sda("show", "--json", str(a.directory))
    assert found["differs"].keys() == {key for key in CONFIG if SMALL[key] != CONFIG[key]}
    assert found["origin"]["sweep"] == "width"
    assert [line["epoch"] for line in found["metrics"]] == [1, 2, 3]
    assert found["record"]["attempts"][0]["number"] == 1


def test_damaged_run_is_shown_by_its_path(a: RunPath, sda: Callable[..., Any]) -> None:
    a.config.unlink()
    assert "config.json" in sda("show", str(a.directory))


def test_control_characters_never_reach_the_terminal(a: RunPath, sda: Callable[..., Any]) -> None:
    rewrite(a, sweep="\x1b[31mred[bold]", reason="\x1b]0;title\x07", status="odd\x1b")

    for words in ([], ["show", "aaaaaaaa"], ["compare", "aaaaaaaa", "bbbbbbbb"]):
        printed = sda(*words)
        assert "\x1b" not in printed and "\x07" not in printed

    assert "red[bold]" in sda()


def test_compare_shows_what_differs(runs: Path, sda: Callable[..., Any]) -> None:
    found = sda("compare", "aaaaaaaa", "bbbbbbbb", "cccccccc", "--json")

    assert found["config"] == {"learning_rate": [2e-4, 1e-3, 2e-4]}
    assert found["metrics"]["epoch"] == [3, 3, 1]
    assert len(found["metrics"]["loss_valid_at_1"]) == 3
    assert "window" in found["equal"] and not found["notes"]
    assert "learning_rate" in sda("compare", "aaaaaaaa", "bbbbbbbb")


def test_compare_warns_of_losses_that_cannot_be_compared(runs: Path) -> None:
    a, b = (RunPath.find(runs, id) for id in ("aaaaaaaa", "bbbbbbbb"))
    b.config.write_text(json.dumps(SMALL | {"window": 5}))
    rewrite(a, data="x")
    rewrite(b, data="y")
    found = compare([entry_of(a), entry_of(b)], [read_metrics(a), read_metrics(b)])

    assert [note.split()[1] for note in found["notes"]] == ["windows", "runs"]


# The curve


def lines(values: list[float]) -> list[dict[str, Any]]:
    return [{"epoch": n, "loss_valid": x} for n, x in enumerate(values, start=1)]


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [1.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [1e308, -1e308], [1e-300, 1e300]]
    + [[float("nan")], [float("inf"), 1.0, 2.0], [0.0] * 5000, [5e-324, 0.0]],
)
def test_any_curve_is_drawn(values: list[float]) -> None:
    drawn = chart(lines(values), {"loss_valid": ""}, width=30, height=5).plain

    assert all(len(line) <= 30 + 60 for line in drawn.splitlines())
    assert ("no losses" in drawn) == (not any(np.isfinite(values)))


def test_curve_falls_from_corner_to_corner() -> None:
    drawn = chart(lines([3.0, 2.0, 1.0]), {"loss_valid": ""}, width=20, height=6).plain
    rows = [line[11:] for line in drawn.splitlines()[:6]]

    assert rows[0][0] != " " and rows[-1][19] != " "
    assert rows[0].strip() == rows[0][:4].strip()
    assert "linear scale" in drawn


def test_scale_is_logarithmic_beyond_a_factor_of_ten() -> None:
    assert "linear" in chart(lines([1.0, 0.1]), {"loss_valid": ""}).plain
    assert "logarithmic" in chart(lines([1.0, 0.09]), {"loss_valid": ""}).plain


# Pruning


def test_nothing_is_pruned_without_consent(runs: Path, sda: Callable[..., Any]) -> None:
    before = {file: file.stat().st_size for file in runs.rglob("*") if file.is_file()}
    printed = sda("prune")

    assert "Resumable state of 2 runs that finished" in printed and "--yes" in printed
    assert sda("prune", "--json")["freed"] == 0
    assert before == {f: f.stat().st_size for f in runs.rglob("*") if f.is_file()}


def test_prune_frees_finished_runs_only(runs: Path, a: RunPath, sda: Callable[..., Any]) -> None:
    shutil.copy(a.checkpoint, a.previous)
    c = RunPath.find(runs, "cccccccc")
    before = {file for file in runs.rglob("*") if file.is_file()}
    weights = a.state.read_bytes()
    found = sda("prune", "--yes", "--json")
    gone = before - {file for file in runs.rglob("*") if file.is_file()}

    assert gone == {a.checkpoint, a.previous, RunPath.find(runs, "bbbbbbbb").checkpoint}
    assert found["freed"] == found["size"] > 0 and not found["errors"]
    assert c.checkpoint.exists()
    assert a.state.read_bytes() == weights
    assert sda("prune", "--yes", "--json")["runs"] == {}
    assert entry_of(a).status == "finished"


@pytest.mark.parametrize(("answer", "gone"), [(b"y\n", True), (b"\n", False)])
def test_prune_asks_on_a_terminal(runs: Path, a: RunPath, answer: bytes, gone: bool) -> None:
    code = (
        "import argparse, pathlib, sys; from sda_ray.browse import runs_command; runs_command("
        "argparse.Namespace(action='prune', run=['aaaaaaaa'], yes=False, json=False, "
        "runs=pathlib.Path(sys.argv[1])))"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code, str(runs)]

    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        said = b""

        while b"[y/N]" not in said:
            said += os.read(ours, 4096)

        assert a.checkpoint.exists() and b"checkpoint.pth" in said
        os.write(ours, answer)

        with contextlib.suppress(OSError):  # EIO at its end
            while os.read(ours, 4096):
                pass

        assert child.wait() == 0

    os.close(ours)
    assert a.checkpoint.exists() != gone


def test_prune_takes_runs(runs: Path, a: RunPath, sda: Callable[..., Any]) -> None:
    assert "Freed" in sda("prune", "aaaaaaaa", "--yes")
    assert not resumable(a)
    assert resumable(RunPath.find(runs, "bbbbbbbb"))


def test_run_in_use_is_never_pruned(a: RunPath, sda: Callable[..., Any]) -> None:
    lease = Lease(a.lease, "run")
    found = sda("prune", "--yes", "--json")

    assert "a process is at it" in found["spared"][a.directory.name]
    assert a.checkpoint.exists()

    with lease.hold(), pytest.raises(UserError, match="cannot be locked"):
        prune(a)

    lease.release()
    assert prune(a) > 0


@pytest.mark.parametrize("seconds", [0, 600])
def test_run_in_use_elsewhere_is_never_pruned(a: RunPath, seconds: float) -> None:
    lease_of(a, host="another", boot="another", pid=1, started="1")
    os.utime(a.lease, times=(time.time() - seconds,) * 2)

    with pytest.raises(UserError, match="a process is at it"):
        prune(a)


def test_checkpoint_stays_while_it_is_all_there_is(a: RunPath) -> None:
    weights = a.state.read_bytes()
    a.state.write_bytes(weights[:-100])

    with pytest.raises(UserError, match="does not load"):
        prune(a)

    a.state.unlink()

    with pytest.raises(UserError, match="all that is left of the weights"):
        prune(a)

    assert a.checkpoint.exists()


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl", "lease.json"])
def test_damaged_run_is_never_pruned(a: RunPath, name: str) -> None:
    (a.directory / name).write_text("garbage\ngarbage\n")

    assert "damaged" in (refusal(entry_of(a)) or "")

    with pytest.raises(UserError, match="damaged"):
        prune(a)


@pytest.mark.parametrize("status", ["running", "paused", "failed", "diverged"])
def test_unfinished_run_is_never_pruned(a: RunPath, status: str) -> None:
    rewrite(a, status=status)

    with pytest.raises(UserError, match="only finished runs are pruned"):
        prune(a)


def test_pruned_run_still_loads(a: RunPath) -> None:
    from sda_ray.score import load_score

    prune(a)
    assert all(torch.isfinite(p).all() for p in load_score(a.directory).parameters())


# Speed


def test_two_thousand_runs_are_listed_in_seconds(a: RunPath, tmp_path: Path) -> None:
    for n in range(2000):
        path = tmp_path / "many" / f"run-{n}_{n:08}"
        path.mkdir(parents=True)

        for file in (a.config, a.record, a.metrics, a.lease):
            os.link(file, path / file.name)

    start = time.monotonic()

    assert len(select(entries(tmp_path / "many"), sort="size")) == 2000
    assert time.monotonic() - start < 10
