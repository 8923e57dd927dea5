r"""Tests for sda_ray.sweep.record: the record of a sweep, and what may change in it."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sda_ray.core.config import Config
from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease
from sda_ray.core.space import choice, integer, loguniform, uniform
from sda_ray.runs.path import sweep_directory
from sda_ray.search.promotion import Rules
from sda_ray.search.study import Study, draw_run, replicate_run
from sda_ray.sweep.definition import Sweep, load_script
from sda_ray.sweep.record import (
    check_changes,
    compare,
    load_record,
    read_sweep,
    with_recorded_rungs,
    write_sweep,
)

SPACE: dict[str, Any] = {
    "learning_rate": loguniform(1e-4, 1e-3),
    "activation": choice("SiLU", "ReLU"),
    "embedding": integer(8, 16, step=4),
    "hidden_channels,hidden_blocks": choice(((8, 16), (1, 1)), ((8, 32), (1, 2))),
}


@pytest.fixture
def sweep(small: Config) -> Sweep:
    return Sweep("x", small, SPACE, min_epochs=1)


def record(sweep: Sweep, fingerprint: str = "a" * 64, **options: Any) -> dict[str, Any]:
    return {
        "name": sweep.name,
        "trials": sweep.trials,
        "definition": sweep.check().definition(),
        "fingerprint": fingerprint,
        "options": options,
    }


def test_a_sweep_resumes_with_the_rungs_that_it_had(sweep: Sweep, tmp_path: Path) -> None:
    r"""Records without rungs are of a time when eta was 3 and rungs grew from the first."""

    long = replace(sweep, config=sweep.config | {"epochs": 60})
    definition = replace(long, eta=3, min_epochs=2).check().definition()
    del definition["rungs"]
    (directory := sweep_directory(tmp_path, "x")).mkdir(parents=True)
    write_sweep(directory, record(sweep) | {"definition": definition}, None)
    rungs = (2, 6, 18, 54, 60)

    cases: list[Any] = [{}, {"eta": 3}, {"min_epochs": 2}, {"eta": 3, "min_epochs": 2}]

    for stated in cases:
        resumed = with_recorded_rungs(replace(long, **({"min_epochs": None} | stated)), tmp_path)
        now = record(resumed)
        assert resumed.check().rules.rungs == rungs
        assert check_changes(tmp_path, now, resumed) == ()

    write_sweep(directory, now | {"options": {}}, None)
    assert load_record(tmp_path, "x")[0].check().rules.rungs == rungs

    other = with_recorded_rungs(replace(long, eta=4, min_epochs=None), tmp_path)

    with pytest.raises(UserError, match="eta was 3 and is 4"):
        check_changes(tmp_path, record(other), other)


def vary(sweep: Sweep, **space: Any) -> Sweep:
    r"""Returns a sweep with other domains; None takes a key out."""

    return replace(sweep, space={k: x for k, x in (SPACE | space).items() if x is not None})


def test_the_same_definition_has_no_changes(sweep: Sweep) -> None:
    changes = compare(record(sweep), record(replace(sweep, trials=99), data="elsewhere"))

    assert changes.widened == changes.refused == ()
    changes.check("x")


@pytest.mark.parametrize(
    ("key", "domain", "said"),
    [
        ("learning_rate", loguniform(1e-5, 1e-2), ": 0.0001 to 0.001 (log) → 1e-05 to 0.01 (log)"),
        ("learning_rate", loguniform(1e-4, 1e-2), "→ 0.0001 to 0.01 (log)"),
        ("activation", choice("ELU", "ReLU", "SiLU"), ": SiLU, ReLU → ELU, ReLU, SiLU"),
        ("embedding", integer(4, 24, step=4), ": 8 to 16 in steps of 4 → 4 to 24 in steps of 4"),
    ],
)
def test_wider_spaces_are_carried_on(sweep: Sweep, key: str, domain: Any, said: str) -> None:
    changes = compare(record(sweep), record(vary(sweep, **{key: domain})))

    assert changes.refused == ()
    assert len(changes.widened) == 1
    assert f"SPACE['{key}'] widened" in changes.widened[0]
    assert said in changes.widened[0]
    changes.check("x")


def test_groups_of_keys_are_widened_by_options(sweep: Sweep) -> None:
    name = "hidden_channels,hidden_blocks"
    more = choice(*SPACE[name].options, ((16, 16), (1, 1)))

    assert len(compare(record(sweep), record(vary(sweep, **{name: more}))).widened) == 1
    assert compare(record(vary(sweep, **{name: more})), record(sweep)).refused


@pytest.mark.parametrize(
    ("key", "domain"),
    [
        ("learning_rate", loguniform(2e-4, 1e-3)),
        ("learning_rate", loguniform(2e-4, 2e-3)),
        ("learning_rate", uniform(1e-4, 1e-3)),
        ("learning_rate", choice(1e-4, 1e-3)),
        ("activation", choice("SiLU", "ELU")),
        ("embedding", integer(6, 18, step=4)),
        ("embedding", integer(8, 16, step=2)),
        ("embedding", None),
        ("weight_decay", loguniform(1e-4, 1e-3)),
    ],
)
def test_spaces_that_do_not_contain_the_old_one_are_refused(
    sweep: Sweep, key: str, domain: Any
) -> None:
    changes = compare(record(sweep), record(vary(sweep, **{key: domain})))

    assert changes.widened == ()
    assert any(f"SPACE['{key}']" in line for line in changes.refused)

    with pytest.raises(UserError, match="exists and differs"):
        changes.check("x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"pruner": "none", "min_epochs": None}, 'pruner was "promotion" and is "none"'),
        ({"eta": 3}, "eta was 2 and is 3"),
        ({"sampler": "random"}, 'sampler was "tpe" and is "random"'),
    ],
)
def test_changed_settings_are_refused(sweep: Sweep, change: dict[str, Any], said: str) -> None:
    assert said in compare(record(sweep), record(replace(sweep, **change))).refused


def test_changed_config_and_data_are_refused_all_at_once(sweep: Sweep) -> None:
    other = replace(sweep, config=sweep.config | {"window": 5, "batch_size": 4})
    changes = compare(record(sweep), record(other, "b" * 64))

    assert changes.refused == (
        "CONFIG['window'] was 3 and is 5",
        "CONFIG['batch_size'] was 8 and is 4",
        "the data was that of fingerprint aaaaaaaaaaaa… and is that of fingerprint bbbbbbbbbbbb…",
    )

    with pytest.raises(UserError) as error:
        changes.check("x", Path("sweeps/x.py"))

    assert "sda-ray sweep x  " in str(error.value)
    assert "sda-ray sweep sweeps/x.py --name NEW" in str(error.value)
    assert "sda-ray sweep sweeps/x.py --fork" in str(error.value)
    assert all(line in str(error.value) for line in changes.refused)


def test_changed_objectives_are_refused(sweep: Sweep) -> None:
    before, now = record(sweep), record(sweep)
    now["definition"]["objectives"] = ["loss_valid", "parameters"]

    (line,) = compare(before, now).refused
    assert line.startswith('objectives was ["loss_valid"] and is ["loss_valid", "parameters"]')


def test_finalists_and_seeds_may_change(sweep: Sweep) -> None:
    changes = compare(record(sweep), record(replace(sweep, finalists=3, seeds=2)))

    assert changes.refused == ()
    assert {*changes.widened} == {"finalists was 1 and is 3", "seeds was 1 and is 2"}


def test_config_of_a_key_that_varies_plays_no_role(sweep: Sweep) -> None:
    other = replace(sweep, config=sweep.config | {"learning_rate": 7e-4})

    assert compare(record(sweep), record(other)).refused == ()


def one(trial: Any) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}


def two(trial: Any) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2)}


def test_function_is_the_same_as_long_as_it_draws_the_same(sweep: Sweep) -> None:
    first, second = (replace(sweep, space=space) for space in (one, two))

    assert compare(record(first), record(first)).refused == ()
    assert "draws other names, ranges" in compare(record(first), record(second)).refused[0]
    assert compare(record(first), record(sweep)).refused == ("SPACE was a function and is a dict",)
    assert compare(record(sweep), record(first)).refused == ("SPACE was a dict and is a function",)


FUNCTION = """
from sda_ray import CONFIG, Sweep

TOP, SIZES, BATCH = 1e-2, (8, 16), 32

def space(trial):
    low = trial.suggest_float("low", 1e-4, 1e-3, log=True)
    size = trial.suggest_categorical("size", SIZES)
    rate = trial.suggest_float("rate", low, TOP)
    return {"learning_rate": rate, "embedding": size, "batch_size": BATCH}

sweep = Sweep("x", CONFIG, space)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1e-2, (", "1e-1, ("),
        ("(8, 16)", "(8, 32)"),
        ("), 32", "), 64"),
        ("low, TOP", "low,  # to\n  TOP"),
    ],
)
def test_what_a_function_refers_to_is_part_of_it(tmp_path: Path, old: str, new: str) -> None:
    changed, both = FUNCTION.replace(old, new), []

    for name, text in {"before.py": FUNCTION, "now.py": changed}.items():
        (tmp_path / name).write_text(text)
        both.append(record(load_script(tmp_path / name)))

    before, now = both
    said = "SPACE is a function that draws other names, ranges, options or values"
    assert compare(before, now).refused == (() if "# to" in new else (said,))

    del before["definition"]["space"]["draws"]  # as of a sweep that was started before
    assert compare(before, now).refused == ()
    assert before["definition"]["space"].keys() == {"function"}
    assert now["definition"]["space"].keys() == {"function", "draws"}


def test_function_must_make_the_same_of_the_parameters_of_all_runs(tmp_path: Path) -> None:
    (directory := sweep_directory(tmp_path, "x")).mkdir(parents=True)
    lease = Lease(directory / "lease.json", "the sweep")
    study = Study(directory / "study.journal", "x", lease)

    def sweep_of(old: str = "", new: str = "") -> Sweep:
        (tmp_path / "x.py").write_text(FUNCTION.replace(old, new))
        return load_script(tmp_path / "x.py").check()

    rules, config = Rules(1, 9), {"epochs": 9, "seed": 0}
    first = draw_run(study, [], rules, config, sweep_of().propose)
    assert first is not None
    replicate_run(study, first, config)  # whose seed is no change
    write_sweep(directory, record(sweep_of()), None)
    lease.release()

    for mended in (
        sweep_of("size = ", "size =  "),
        sweep_of("    return", "    assert rate\n    return"),
    ):
        assert check_changes(tmp_path, record(mended), mended) == ()

    changed = sweep_of('"learning_rate": rate', '"learning_rate": 2 * rate')

    with pytest.raises(
        UserError, match=r"of run 1, learning_rate=.* is not what SPACE makes of it"
    ):
        check_changes(tmp_path, record(changed), changed)


def test_records_of_older_versions_have_the_defaults_of_what_they_lack(
    sweep: Sweep, tmp_path: Path
) -> None:
    old = record(sweep)

    for key in ("ema", "precision"):
        del old["definition"]["config"][key]

    for key in ("objectives", "percentile", "patience"):
        old["definition"].pop(key, None)

    assert compare(old, record(sweep)).refused == ()
    changed = replace(sweep, config=sweep.config | {"ema": 0.99})
    assert compare(old, record(changed)).refused == ("CONFIG['ema'] was 0.0 and is 0.99",)

    directory = sweep_directory(tmp_path, "x")
    directory.mkdir(parents=True)
    write_sweep(directory, old, None)
    assert read_sweep(tmp_path, "x")["definition"]["objectives"] == ["loss_valid"]


def test_script_follows_a_widening_alone(sweep: Sweep, tmp_path: Path) -> None:
    directory, script = sweep_directory(tmp_path, "x"), tmp_path / "x.py"
    directory.mkdir(parents=True)
    copy = directory / "script.py"

    for text, now, kept in [
        ("first", sweep, "first"),
        ("a comment", replace(sweep, trials=3), "first"),
        ("wider", vary(sweep, learning_rate=loguniform(1e-5, 1e-2)), "wider"),
    ]:
        script.write_text(text)
        write_sweep(directory, record(now), script)
        assert copy.read_text() == kept

    write_sweep(directory, record(sweep), copy)  # carried on by its name
    assert copy.read_text() == "wider"
    definition = json.loads((directory / "sweep.json").read_text())["definition"]
    assert definition == record(sweep)["definition"]


@pytest.mark.parametrize("name", ["nothing", "../x", "."])
def test_unknown_sweep_is_an_error_that_names_the_known_ones(
    sweep: Sweep, tmp_path: Path, name: str
) -> None:
    directory = sweep_directory(tmp_path, "x")
    directory.mkdir(parents=True)
    write_sweep(directory, record(sweep), None)

    with pytest.raises(UserError, match="which has x"):
        read_sweep(tmp_path, name)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    r"""The record of a sweep whose script imports another module, and writes when it is run."""

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "bounds", raising=False)
    script, directory = tmp_path / "scripts" / "x.py", sweep_directory(tmp_path / "runs", "x")
    directory.mkdir(parents=True)
    script.parent.mkdir()
    mark = f"from bounds import TOP\nopen({str(tmp_path / 'mark')!r}, 'w').close()\n"
    script.write_text(mark + FUNCTION.replace("TOP, SIZES", "SIZES").replace("1e-2, (", "(", 1))
    (script.parent / "bounds.py").write_text("TOP = 1e-2\n")
    write_sweep(directory, record(load_script(script)), script)
    (tmp_path / "mark").unlink()
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x != str(script.parent)])
    monkeypatch.delitem(sys.modules, "bounds")

    return directory


def test_recorded_script_finds_the_modules_beside_the_script(
    recorded: Path, tmp_path: Path
) -> None:
    before = read_sweep(tmp_path / "runs", "x")
    sweep, _ = load_record(tmp_path / "runs", "x")

    assert record(sweep)["definition"] == before["definition"]

    write_sweep(recorded, record(sweep), sweep.script)  # resumed by its name
    assert read_sweep(tmp_path / "runs", "x")["beside"] == before["beside"]

    tmp_path.joinpath("scripts").chmod(0o777)
    sys.path.pop()
    del sys.modules["bounds"]

    with pytest.raises(UserError, match=r"'bounds' .*are left out: others may write to"):
        load_record(tmp_path / "runs", "x")


def linked(part: Path) -> None:
    aside = part.with_name("aside")
    part.rename(aside)
    part.symlink_to(aside)


@pytest.mark.parametrize("name", ["runs", "sweeps", "x", "script.py"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda part: os.chown(part, 4321, -1), "belongs to another user"),
        (lambda part: part.chmod(part.stat().st_mode | 0o020), ".*may write to"),
        (lambda part: part.chmod(part.stat().st_mode | 0o002), "others may write to"),
    ],
    ids=["owner", "group", "others"],
)
def test_script_that_somebody_else_may_have_written_is_not_run(
    recorded: Path, tmp_path: Path, name: str, change: Callable[[Path], None], why: str
) -> None:
    if not why.startswith("others") and os.geteuid() != 0:
        pytest.skip("only root may give files away, and has no group of its own")

    change(
        next(x for x in (recorded / "script.py", recorded, *recorded.parents) if x.name == name)
    )

    with pytest.raises(UserError, match=rf"script\.py defines the space .* not run: .*{why}"):
        load_record(tmp_path / "runs", "x")

    assert not (tmp_path / "mark").exists()


def test_script_that_is_a_link_is_not_run(recorded: Path, tmp_path: Path) -> None:
    linked(recorded / "script.py")

    with pytest.raises(UserError, match=r"script.py defines the space .* not run: it is a link"):
        load_record(tmp_path / "runs", "x")

    assert not (tmp_path / "mark").exists()


def test_links_of_the_caller_lead_to_a_record(recorded: Path, tmp_path: Path) -> None:
    linked(tmp_path / "runs")
    assert load_record(tmp_path / "runs", "x")[0].name == "x"

    aside = tmp_path / "aside"
    aside.chmod(0o777)  # not that of the link, but of its target

    with pytest.raises(UserError, match=r"others may write to .*aside"):
        load_record(tmp_path / "runs", "x")


def test_window_that_segments_are_too_short_for_makes_another_sweep(sweep: Sweep) -> None:
    small = replace(sweep, space={"window": choice(3, 5)}, objectives=("denoising",))
    wider = replace(small, space={"window": choice(5, 3, 7)})
    same = replace(small, space={"window": choice(3, 5), "alpha": choice("cos", "lin")})

    assert compare(record(small), record(small)).refused == ()
    assert compare(record(small), record(wider)).refused == (
        'measured was {"denoising": 9} and is {"denoising": 13}',
    )
    assert not any("measured" in line for line in compare(record(small), record(same)).refused)
