r"""Tests for `sda-ray evaluate`."""

import csv
import json
from pathlib import Path

import pytest
from conftest import Cli
from kept import made, path_of, runs

from sda_ray.cli.main import main

__all__ = ["made", "runs"]  # fixtures

LEVELS = ("mean", "low", "high")


def test_runs_are_evaluated_on_ray_and_compared(runs: Path, cli: Cli, tmp_path: Path) -> None:
    words = ["--sweep=width", "--top=2", "--only=samples,circle", "--members=2", "--steps=2"]
    path_of(runs, 4).config.write_text("{")

    done = cli("evaluate", *words, "--trajectories=2", "--table=skill.csv", timeout=300)

    assert done.returncode == 0, done.stderr
    assert "χ²" in done.stdout and "Means over 2 trajectories" in done.stdout

    assert done.stdout.count(path_of(runs, 5).name) == 2
    assert path_of(runs, 4).name not in done.stdout

    rows = list(csv.DictReader((tmp_path / "skill.csv").read_text().splitlines()))
    (crps,) = [row for row in rows if row["metric"] == "crps"]
    assert float(crps["low"]) <= float(crps["mean"]) <= float(crps["high"])

    again = cli("evaluate", *words, "--trajectories=2", "--json", "--table=skill.tex", timeout=300)

    assert again.returncode == 0, again.stderr
    ((_, summary),) = json.loads(again.stdout)["summary"].items()
    assert summary["circle"]["crps"] == pytest.approx([float(crps[k]) for k in LEVELS])
    assert (tmp_path / "skill.tex").read_text().count(r"\\") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the runs to evaluate, or --sweep NAME"),
        (["00000004", "--sweep=width"], "only one of them"),
        (["00000004", "--top=3"], "--top goes with --sweep"),
        (["--sweep=with"], "no run of sweep 'with'"),
        (["00000004", "--only=circel"], "Did you mean 'circle'"),
        (["00000004", "--only=assim"], "'assim' does not fit"),
        (["00000004", "--table=x.pdf"], "must end with .csv or .tex"),
        (["00000004", "--trajectories=9"], "has 4"),
        (["nothing", "--only=samples"], "nothing is left out: there is no run 'nothing'"),
    ],
)
def test_mistakes_are_explained(
    runs: Path, data: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv=["evaluate", f"--runs={runs}", f"--data={data}", *words])

    assert caught.value.code == 2
    assert message in capsys.readouterr().err
