r"""Tests for sda_ray.cli.options: what words a command takes, and where its files are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from refusing import Refuse, handlers, refuse, root

from sda_ray.cli.main import main

__all__ = ["handlers", "refuse", "root"]  # fixtures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweep none.py", "there is no sweep script none.py"),
        ("sweep none", "there is no sweep 'none' in "),
        ("sweep data", "there is no sweep 'data' in "),
        ("sweep ../x", "there is no sweep '../x' in "),
        ("sweep tiny.py --trials 0", "trials is 0, but must be an integer from 1"),
        ("sweep tiny.py --trials x", "Invalid value for '--trials': 'x' is not a valid integer"),
        ("sweep tiny.py --name a/b", "the sweep's name is 'a/b'"),
        (
            "sweep tiny.py --parallel 0",
            "Invalid value for '--parallel': 0 is not in the range x>=1",
        ),
        (
            "sweep tiny.py --cpus-per-trial 0",
            "Invalid value for '--cpus-per-trial': 0.0 is not in the range x>0",
        ),
        (
            "sweep tiny.py --cpus-per-trial nan",
            "Invalid value for '--cpus-per-trial': nan is not finite",
        ),
        (
            "sweep tiny.py --cpus-per-trial inf",
            "Invalid value for '--cpus-per-trial': inf is not finite",
        ),
        (
            "sweep tiny.py --gpus-per-trial inf",
            "Invalid value for '--gpus-per-trial': inf is not finite",
        ),
        ("sweep tiny.py --cpus-per-trial 64", "a trial wants CPU=64, but this machine has CPU="),
        ("sweep tiny.py --gpus-per-trial 64", "a trial wants CPU=1 GPU=64, but this machine has"),
        ("sweep tiny.py --trails 8", "Did you mean '--trials'?"),
        ("sweep tiny.py --fix seed=1", "--fix seed: SPACE has no key seed."),
        ("sweep tiny.py --fix activatio=SiLU", "Did you mean 'activation'?"),
        ("sweep tiny.py activation=SiLU", "--fix activation=SiLU"),
        ("sweep tiny.py --wandb=of", "Invalid value for '--wandb': 'of' is not one of"),
        ("sweep", "Missing argument 'SWEEP'"),
        ("train --resume none", "there is no run 'none' in "),
        ("train --init none", "there is no run 'none' in "),
        ("train --config none", "there is no run 'none' in "),
        ("train --config tiny.py", "tiny.py is damaged, or not JSON"),
        ("train --replicas 0", "Invalid value for '--replicas': 0 is not in the range x>=1"),
        ("train --replicas 2 --resume x", "--replicas goes with none of --init, --resume"),
        ("train --resume x epochs=2", "--resume continues a run as it is"),
        ("train --resume x --init y", "--resume, --init and --extend exclude each other"),
        ("train --takeover", "--takeover goes with --resume RUN"),
        ("train --parallel 2", "--parallel goes with --replicas N"),
        ("train --device abacus", "device 'abacus' cannot be used"),
        ("train --device meta", "device is 'meta', but must be cpu, cuda or cuda:N"),
        ("train --threads 0", "Invalid value for '--threads': 0 is not in the range 1<=x<=4096"),
        (f"train --threads {10**14}", f"{10**14} is not in the range 1<=x<=4096"),
        (f"simulate --trajectories {10**10}", f"is {10**10}, but must be at most 1048576"),
        (f"simulate --seed {2**63}", f"seed is {2**63}, but must be from 0 to {2**63 - 1}"),
        ("simulate --seed -1", "seed is -1, but must be from 0 to"),
        ("sweep tiny.py --name tiny.py", "must not end with .py: `sda-ray sweep tiny.py` would"),
        (f"sweep {300 * 'x'}.py", "File name too long: "),
        (f"train --resume {300 * 'x'}", "File name too long: "),
        (f"train --root {300 * 'x'}", "File name too long: "),
        ("train epochs=1 --data nowhere", "/nowhere"),
        ("train epochs=1 --runs tiny.py", "tiny.py cannot be used: "),
        ("sweep tiny.py --root tiny.py", "tiny.py is a file, no directory"),
        ("train --epochs 3", "there is no option --epochs. Settings are given as epochs=…"),
        ("bake", "there is no command 'bake'"),
        ("trian", "Did you mean 'train'?"),
        ("train --resume=", "--resume is empty, but must say something, or be left out."),
        ("train --init=", "--init is empty"),
        ("train --extend= epochs=9", "--extend is empty"),
        ("train --config=", "--config is empty"),
        ("train --device=", "--device is empty"),
        ("sweep tiny.py --name=", "--name is empty"),
        ("plan tiny.py --name=", "--name is empty"),
        ("sweep tiny.py --runs=", "--runs is empty"),
        ("simulate --data=", "--data is empty"),
        ("runs --root=", "--root is empty"),
        ("simulate x=1", "Got unexpected extra argument (x=1)"),
    ],
)
def test_fault_of_a_command_is_refused(refuse: Refuse, words: str, message: str) -> None:
    assert message in refuse(*words.split())


@pytest.mark.parametrize(
    ("words", "variables", "places"),
    [
        ("", {}, ("here", "here/data", "here/runs")),
        ("--root x", {"SDA_RAY_ROOT": "/y"}, ("here/x", "here/x/data", "here/x/runs")),
        ("", {"SDA_RAY_ROOT": "/y", "SCRATCH": "/s"}, ("/y", "/y/data", "/y/runs")),
        ("--runs a --data ../b", {}, ("here", "b", "here/a")),
        ("", {"SCRATCH": "/s"}, ("here", "here/data", "here/runs")),
    ],
)
def test_places_are_absolute_and_in_the_first_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    variables: dict[str, str],
    places: tuple[str, str, str],
) -> None:
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")

    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit):
        main(argv=["sweep", "none", *words.split()])

    root, data, runs = (str(tmp_path / place) for place in places)
    first = capsys.readouterr().out.splitlines()[0]
    assert re.sub(r"^sda-ray \S+: ", "", first) == f"root {root}, data {data}, runs {runs}"


def test_scratch_is_the_root_without_runs_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", "/scratch/me")

    with pytest.raises(SystemExit):
        main(argv=["sweep", "none"])

    assert "root /scratch/me/sda/kolmogorov, " in capsys.readouterr().out


def test_directory_that_was_removed_is_only_needed_without_a_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    with pytest.raises(SystemExit):
        main(argv=["runs"])

    assert "the current directory has been removed. Change to" in capsys.readouterr().err
    main(argv=["runs", "--root", str(tmp_path)])
    assert "There are no runs" in capsys.readouterr().out


def test_no_command_is_a_request_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv=[])

    assert end.value.code == 0
    assert "Commands:" in capsys.readouterr().out


def test_runs_are_listed_where_no_action_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "runs").mkdir()

    for words in (["--sort", "epoch", "window=5"], ["list"], ["--json"]):
        main(argv=["runs", *words])
        assert "run" in capsys.readouterr().out or words == ["--json"]


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["da"], ["dashboard"]),
        (["st"], ["status", "stop"]),
        (["attach", ""], ["depth", "width"]),
        (["status", "w"], ["width"]),
        (["sweep", "d"], ["depth"]),
        (["sweep", "depth", "--warm-start", ""], ["depth", "width"]),
        (["report", "width", "de"], ["depth"]),
        (["attach", "--root", "/nowhere", ""], []),
        (["runs", ""], ["list", "show", "compare", "prune"]),
        (["runs", "--sor"], ["--sort"]),
        (["runs", "--sweep", "w"], ["width"]),
        (["runs", "show", "crimson"], ["crimson-cloud-1_abcdefgh"]),
        (["train", "--resume", "c"], ["crimson-cloud-1_abcdefgh"]),
        (["evaluate", "c"], ["crimson-cloud-1_abcdefgh"]),
        (["nonsense", "--h"], ["--help"]),
    ],
)
def test_shell_completes_commands_options_sweeps_and_runs(
    tmp_path: Path, env: dict[str, str], words: list[str], completed: list[str]
) -> None:
    for name in ("depth", "width"):
        (tmp_path / "runs" / "sweeps" / name).mkdir(parents=True)
        (tmp_path / "runs" / "sweeps" / name / "sweep.json").touch()

    (tmp_path / "runs" / "crimson-cloud-1_abcdefgh").mkdir()
    (tmp_path / "runs" / "crimson$(id)_abcdefgh").mkdir()  # a shell would run it
    program = tmp_path / "sda-ray"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sda_ray "$@"\n')
    program.chmod(0o755)
    script = """
        compopt() { :; }  # works where a key was pressed
        eval "$(sda-ray completion bash)"
        COMP_WORDS=(sda-ray "$@"); COMP_CWORD=$#
        _sda_ray_completion sda-ray
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        cwd=tmp_path,
        env={**env, "PATH": f"{tmp_path}:{env['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout.split() == completed and not done.stderr


def test_completion_loads_nothing_heavy(tmp_path: Path, env: dict[str, str]) -> None:
    program = """if True:
        import atexit, sys
        heavy = {"torch", "h5py", "ray", "optuna", "wandb"}
        atexit.register(lambda: print(heavy & {*sys.modules}, file=sys.stderr))
        from sda_ray.cli.main import main
        main()
    """

    for words in ("", "sweep ", "best ", "report "):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=env
            | {
                "_SDA_RAY_COMPLETE": "bash_complete",
                "COMP_WORDS": f"sda-ray {words}",
                "COMP_CWORD": str(len(words.split()) + 1),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and done.stderr.strip() == "set()", done.stderr
