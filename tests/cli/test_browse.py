r"""Tests for sda_ray.cli.runs: runs are listed, shown, compared and pruned."""

import contextlib
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

import pytest
import torch
from listing import SMALL, a, entry_of, lease_of, made, rewrite, runs, sda
from scene import SCRIPT

from sda_ray.cli.main import main
from sda_ray.core.config import CONFIG
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.runs.checkpoint import prune_run, refusal, resumable
from sda_ray.runs.inventory import compare
from sda_ray.runs.metrics import read_metrics
from sda_ray.runs.path import RunPath

__all__ = ["a", "made", "runs", "sda"]  # fixtures

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
        (["--limit", "0"], "Invalid value for '--limit': 0 is not in the range x>=1"),
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


def test_show_prints_config_curve_and_origin(runs: Path, sda: Callable[..., Any]) -> None:
    a = RunPath.find(runs, "aaaaaaaa")
    rewrite(RunPath.find(runs, "bbbbbbbb"), parent="aaaaaaaa", trial=7)
    shown = sda("show", "bbbbbbbb")

    for text in ("(CONFIG has 96,192,384)", " loss_valid", "torch ", "attempt", "trial", "7"):
        assert text in shown

    assert a.directory.name in shown  # its parent
    assert "* learning_rate" in shown and "* weight_decay" not in shown

    found = sda("show", "--json", str(a.directory))
    assert found["differs"].keys() == {key for key in CONFIG if SMALL[key] != CONFIG[key]}
    assert found["origin"]["sweep"] == "width"
    assert [line["epoch"] for line in found["metrics"]] == [1, 2, 3]
    assert found["record"]["attempts"][0]["number"] == 1


def test_show_says_whether_a_run_was_evaluated(a: RunPath, sda: Callable[..., Any]) -> None:
    assert "evaluation" not in sda("show", "aaaaaaaa")

    results: dict[str, Any] = {"samples": {"0": {}}, "circle": {"0": {}, "1": {}}}
    kept = {"version": "1.1", "weights": "", "data": "", "settings": {}, "results": results}
    a.evaluation.write_text(json.dumps(kept))
    assert "samples, circle of up to 2 trajectories" in sda("show", "aaaaaaaa")
    assert "circle" in sda("show", "aaaaaaaa", "--json")["origin"]["evaluation"]

    a.evaluation.write_text("{")
    assert "evaluation.json is damaged" in sda("show", "aaaaaaaa").replace("\n", "")


def test_damaged_run_is_shown_by_its_path(a: RunPath, sda: Callable[..., Any]) -> None:
    a.config.unlink()
    assert "config.json" in sda("show", str(a.directory))


def test_control_characters_never_reach_the_terminal(a: RunPath, sda: Callable[..., Any]) -> None:
    rewrite(a, sweep="\x1b[31mred[bold]", reason="\x1b]0;title\x07", status="odd\x1b")

    for words in ([], ["show", "aaaaaaaa"], ["compare", "aaaaaaaa", "bbbbbbbb"]):
        printed = sda(*words)
        assert "\x1b" not in printed and "\x07" not in printed

    assert "red[bold]" in sda()


@pytest.mark.parametrize(
    "words",
    [
        ["runs", "show", "evil"],
        ["train", "--resume", "evil0000"],
        ["sweep", "other"],
        ["stop", "other"],
        ["attach", "other"],
        ["sync", "--all"],
        ["adopt", "RUNS", "--sweep", "tiny.py"],
    ],
)
def test_errors_and_reports_are_plain_and_quote_names(
    a: RunPath, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any, made: Path
) -> None:
    escape, root = "\x1b]0;title\x07\x1b[2J", a.directory.parents[1]
    rewrite(a, status=f"odd{escape}", sweep=f"x; touch y #{escape}")
    a.directory.rename(a.directory.with_name(f"evil{escape}-1_evil0000"))
    shutil.copytree(
        a.directory.with_name(f"evil{escape}-1_evil0000"), root / "runs/evil-2_evil0002"
    )
    (root / "runs/sweeps" / f"s{escape}").mkdir(parents=True)
    (root / "runs/sweeps" / f"s{escape}" / "sweep.json").write_text("{}")
    (root / "tiny.py").write_text(SCRIPT)
    monkeypatch.chdir(root)
    words = [str(root / "runs") if word == "RUNS" else word for word in words]

    with contextlib.suppress(SystemExit):
        main(argv=[*words, "--root", str(root), "--data", str(made.parent / "data")])

    out, err = capfd.readouterr()
    assert "\x1b" not in out + err and "\x07" not in out + err
    assert "�" in out + err

    if words[0] == "train":
        assert "sda-ray sweep 'x; touch y #" in err


def test_warnings_are_plain(runs: Path) -> None:
    code = "import logging; from sda_ray.cli.main import main; import sys\n"
    code += "try: main(argv=['runs', '--runs', sys.argv[1]])\n"
    code += "finally: logging.getLogger('any').warning('run %s', '\\x1b[2J')\n"
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=True
    )
    assert done.stderr == "WARNING: run �[2J\n"


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
    found = compare([entry_of(a), entry_of(b)], [read_metrics(a.metrics), read_metrics(b.metrics)])

    assert [note.split()[1] for note in found["notes"]] == ["windows", "runs"]


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
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sda_ray", "runs", "prune", "aaaaaaaa", "--runs", str(runs)]

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

    assert "a process uses it" in found["spared"][a.directory.name]
    assert a.checkpoint.exists()

    with lease.hold(), pytest.raises(UserError, match="cannot be locked"):
        prune_run(a)

    lease.release()
    assert prune_run(a) > 0


@pytest.mark.parametrize("seconds", [0, 600])
def test_run_in_use_elsewhere_is_never_pruned(a: RunPath, seconds: float) -> None:
    lease_of(a, host="another", boot="another", pid=1, started="1")
    os.utime(a.lease, times=(time.time() - seconds,) * 2)

    with pytest.raises(UserError, match="a process uses it"):
        prune_run(a)


def test_checkpoint_stays_while_it_is_all_there_is(a: RunPath) -> None:
    weights = a.state.read_bytes()
    a.state.write_bytes(weights[:-100])

    with pytest.raises(UserError, match="does not load"):
        prune_run(a)

    a.state.unlink()

    with pytest.raises(UserError, match="the weights are only in the checkpoint"):
        prune_run(a)

    assert a.checkpoint.exists()


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl", "lease.json"])
def test_damaged_run_is_never_pruned(a: RunPath, name: str) -> None:
    (a.directory / name).write_text("garbage\ngarbage\n")

    assert "damaged" in (refusal(entry_of(a)) or "")

    with pytest.raises(UserError, match="damaged"):
        prune_run(a)


@pytest.mark.parametrize("status", ["running", "paused", "failed", "diverged"])
def test_unfinished_run_is_never_pruned(a: RunPath, status: str) -> None:
    rewrite(a, status=status)

    with pytest.raises(UserError, match="only finished runs are pruned"):
        prune_run(a)


def test_pruned_run_still_loads(a: RunPath) -> None:
    from sda_ray.nn.score import load_score

    prune_run(a)
    assert all(torch.isfinite(p).all() for p in load_score(a.directory).parameters())
