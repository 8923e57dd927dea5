r"""Tests for exports: what one holds, and what it leaves alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from networks import SMALL, small
from opened import DISABLED, finished, runs

from sda_ray import load_score
from sda_ray.core.config import Config, save_config
from sda_ray.core.errors import UserError
from sda_ray.core.files import write_json
from sda_ray.runs.export import export_run
from sda_ray.runs.path import RunPath
from sda_ray.runs.run import Run

__all__ = ["finished", "runs"]  # fixtures


def card_of(directory: Path) -> tuple[dict[str, Any], str]:
    r"""Returns the metadata and the text of a model card."""

    _, head, text = (directory / "README.md").read_text().split("---\n", 2)

    return yaml.safe_load(head), text


def bare(directory: Path, **changes: Any) -> RunPath:
    r"""Returns a run as one of SDA's own code: weights and config alone."""

    directory.mkdir(parents=True)
    save_config(SMALL | changes, directory / "config.json")
    torch.save(small(64, **changes).state_dict(), directory / "state.pth")

    return RunPath(directory)


def edit(path: RunPath, **changes: Any) -> None:
    write_json(path.record, json.loads(path.record.read_text()) | changes)


@pytest.mark.parametrize("left", ["state.pth", "model.safetensors"])
def test_exported_network_has_the_bits_of_the_run(
    finished: Run, tmp_path: Path, left: str
) -> None:
    export_run(finished.path, tmp_path / "out")
    (tmp_path / "out" / ({"state.pth", "model.safetensors"} - {left}).pop()).unlink()
    ours, theirs = load_score(finished.path.directory), load_score(tmp_path / "out")
    x, t = torch.randn(1, 5, 2, 16, 16), torch.rand(1)

    assert torch.equal(ours(x, t), theirs(x, t))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_export_has_the_files_of_the_contract_and_the_state_of_the_run(
    finished: Run, tmp_path: Path
) -> None:
    figures = finished.path.directory / "evaluation"
    figures.mkdir()
    (figures / "assim-fields.png").write_bytes(b"\x89PNG")
    (figures / "assim-fields.csv").write_text("")
    export_run(finished.path, tmp_path / "new" / "out")
    files = {f.relative_to(tmp_path / "new" / "out") for f in tmp_path.glob("new/out/**/*.*")}

    expected = {"config.json", "state.pth", "model.safetensors", "README.md", "samples.png"}
    expected |= {"curve.png", "evaluation/assim-fields.png"}
    assert {file.as_posix() for file in files} == expected
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out"]

    for name in ("state.pth", "samples.png", "config.json"):
        written = (tmp_path / "new" / "out" / name).read_bytes()
        assert written == (finished.path.directory / name).read_bytes()


def test_card_has_metadata_metrics_with_errors_settings_and_provenance(
    finished: Run, tmp_path: Path
) -> None:
    edit(finished.path, sweep="width", data="abc")
    export_run(finished.path, tmp_path / "out")
    head, text = card_of(tmp_path / "out")
    last = finished.lines[3]
    first = json.loads(finished.path.record.read_text())["attempts"][0]

    assert (head["library_name"], head["license"]) == ("sda_ray", "unknown")
    (result,) = head["model-index"][0]["results"]
    assert {x["type"]: x["value"] for x in result["metrics"]}["loss_valid"] == last["loss_valid"]
    assert f"{last['loss_valid']:.4g} ± {last['loss_valid_se']:.1g}" in text
    assert "| `hidden_channels` | `8,16` |" in text and "![curve](curve.png)" in text

    for row in ("sweep | `width`", "data | `abc`", "seed | `0`", f"code | `{first['code']}`"):
        assert f"| {row} |" in text


def test_card_has_the_means_of_an_evaluation(finished: Run, tmp_path: Path) -> None:
    rows = {"0": {"crps": 0.5, "ranks": [1, 2]}, "1": {"crps": 0.5, "ranks": [2, 1]}}
    evaluation = {"version": "1", "weights": "", "data": "", "settings": {"members": 4}}
    write_json(finished.path.evaluation, evaluation | {"results": {"assim": rows}})
    export_run(finished.path, tmp_path / "out")
    text = card_of(tmp_path / "out")[1]

    assert "with `members 4`:" in text
    assert "| observation | crps |\n| --- | --- |\n| `assim` | 0.5 |\n" in text


def test_code_on_the_card_runs(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(bare(runs / "a_00000001"), tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    _, text = card_of(Path())

    for code in (blocks := re.findall("```python\n(.*?)```", text, re.DOTALL)):
        exec(code.replace("steps=64", "steps=2"), {})

    assert len(blocks) == 2 and Path("trajectories.png").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "loads `state.pth`, too"),
        ({"dropout": 0.5}, "loads `state.pth`, too"),
        ({"parametrization": "v"}, "does not know `parametrization=v`."),
        ({"alpha": "exp"}, "does not know `alpha=exp`."),
    ],
)
def test_card_says_whether_the_code_of_sda_loads_it(
    tmp_path: Path, changes: Config, sentence: str
) -> None:
    export_run(bare(tmp_path / "a_00000001", **changes), tmp_path / "out")

    assert sentence in card_of(tmp_path / "out")[1]


def test_export_has_no_path_host_or_account(finished: Run, tmp_path: Path) -> None:
    record = json.loads(finished.path.record.read_text())
    attempts = [record["attempts"][0] | {"host": "secret-host"}]
    wandb = {"entity": "secret-entity", "project": "secret-project"}
    edit(finished.path, attempts=attempts, wandb=wandb, origin={"path": "/secret/path"})
    export_run(finished.path, tmp_path / "out")

    for file in (tmp_path / "out").iterdir():
        assert b"secret" not in (content := file.read_bytes())
        assert str(tmp_path).encode() not in content


def test_texts_of_strangers_stay_texts(finished: Run, tmp_path: Path) -> None:
    edit(finished.path, sweep="x`|<img src=y>\x1b[31m\n# title")
    export_run(finished.path, tmp_path / "out")

    assert "| sweep | `x'/<img src=y>�[31m�# title` |" in card_of(tmp_path / "out")[1]


def test_failed_export_leaves_nothing(finished: Run, tmp_path: Path) -> None:
    finished.path.evaluation.write_text("{")

    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        export_run(finished.path, tmp_path / "out" / "a")

    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("place", ["/proc/x", "file/x", "file"])
def test_place_that_cannot_be_written_is_an_error(
    finished: Run, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match=r"cannot be written|not an empty directory"):
        export_run(finished.path, tmp_path / place)

    with pytest.raises(UserError, match="is the current directory"):
        export_run(finished.path, Path())


def test_what_is_there_stays(finished: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_run(finished.path, out)  # into an empty directory
    (out / "README.md").write_text("mine")

    for place in (out, finished.path.directory):
        with pytest.raises(UserError, match=r"not an empty directory\. Give another one\."):
            export_run(finished.path, place)

    assert (out / "README.md").read_text() == "mine"


def test_run_without_final_weights_is_refused(runs: Path, tmp_path: Path, small: Config) -> None:
    run = Run(runs, small, wandb=DISABLED)
    run.close("interrupted")

    with pytest.raises(UserError, match=r"not finished. Resume it with `sda-ray train --resume"):
        export_run(run.path, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_figures_of_strangers_are_left_out(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "me.png").touch()
    (finished.path.directory / "evaluation").symlink_to(tmp_path / "private")
    export_run(finished.path, tmp_path / "a")
    assert not (tmp_path / "a" / "evaluation").exists()

    (finished.path.directory / "evaluation").unlink()
    (finished.path.directory / "evaluation").mkdir()
    (finished.path.directory / "evaluation" / "x](http:y) [.png").touch()
    export_run(finished.path, tmp_path / "b")
    assert "http:y" not in card_of(tmp_path / "b")[1]


def test_damaged_weights_are_not_exported(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path.directory, path := tmp_path / "b_00000002")
    (path / "state.pth").write_bytes(b"PK")

    with pytest.raises(UserError, match=r"state\.pth is damaged"):
        export_run(RunPath(path), tmp_path / "out")
