r"""Tests for sda_ray.sweep.enqueue: configurations of users and of runs in a SPACE."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sda_ray.core.config import CONFIG, Config, save_config
from sda_ray.core.errors import UserError
from sda_ray.core.files import write_json
from sda_ray.core.lease import Lease
from sda_ray.core.space import choice, integer, loguniform, uniform
from sda_ray.runs.path import RunPath
from sda_ray.search.reconcile import catch_up
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study, draw_run, replicate_run
from sda_ray.sweep.definition import Sweep
from sda_ray.sweep.enqueue import fit, parse_item, restore_runs

GROUP = "hidden_channels,hidden_blocks"
SPACE: dict[str, Any] = {
    "learning_rate": loguniform(1e-4, 1e-2),
    "activation": choice("SiLU", "ReLU"),
    "embedding": integer(8, 16, step=4),
    GROUP: choice(((8, 16), (1, 1)), ((8, 16), (1, 2)), ((8, 32), (1, 2))),
    "betas": choice((0.9, 0.999), (0.9, 0.99)),
}


@pytest.fixture
def sweep(small: Config) -> Sweep:
    return Sweep("x", small, SPACE, min_epochs=1).check()


@pytest.fixture
def run(small: Config, tmp_path: Path) -> Config:
    r"""The config of a run `apt-boar-1_aaaaaaaa`."""

    directory = tmp_path / "apt-boar-1_aaaaaaaa"
    directory.mkdir()
    config = small | {"learning_rate": 5e-3, "embedding": 12, "activation": "ReLU"}
    save_config(config, directory / "config.json")

    return config


def by_function(trial: Any) -> dict[str, Any]:
    values = {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}
    values["hidden_channels"] = trial.suggest_categorical("hidden_channels", [(8, 16), (8, 32)])

    if trial.suggest_categorical("averaged", [True, False]):
        values["ema"] = 1 - 2.0 ** -trial.suggest_int("half", 2, 8)
    else:
        values["dropout"] = trial.suggest_float("dropout", 0.0, 0.5)

    return values


@pytest.fixture
def conditional(sweep: Sweep) -> Sweep:
    return replace(sweep, space=by_function)


def faults(text: str, sweep: Sweep, runs: Path = Path("nowhere")) -> list[str]:
    with pytest.raises(UserError) as error:
        parse_item(text, sweep, runs)

    return str(error.value).split("\n")


def test_values_may_have_commas(sweep: Sweep) -> None:
    text = "learning_rate=3e-4, betas=0.9,0.99,hidden_channels=8,16,hidden_blocks=1,2,embedding=12"
    params = parse_item(text, sweep, Path())

    assert params == {
        "learning_rate": 3e-4,
        "embedding": 12,
        GROUP: "8,16;1,2",
        "betas": "0.9,0.99",
    }


@pytest.mark.parametrize("text", ["learning_rate=2e-3", "betas=(0.9, 0.99),activation=ReLU"])
def test_other_keys_are_drawn(sweep: Sweep, text: str) -> None:
    params = parse_item(text, sweep, Path())
    drawn = propose(sweep.draw, [], sampler="random", fixed=params)

    assert drawn is not None
    values, trial = drawn
    assert {name: trial.params[name] for name in params} == params
    assert trial.params.keys() == SPACE.keys()
    assert values.keys() >= {"learning_rate", "betas", "hidden_blocks"}


def test_one_key_of_a_group_is_enough_if_only_one_option_has_it(sweep: Sweep) -> None:
    assert parse_item("hidden_channels=8,32", sweep, Path()) == {GROUP: "8,32;1,2"}
    assert "several options. Give hidden_blocks" in faults("hidden_channels=8,16", sweep)[0]
    assert "not in SPACE" in faults("hidden_channels=8,32,hidden_blocks=1,1", sweep)[0]


def test_all_faults_are_reported_at_once(sweep: Sweep) -> None:
    text = "learning_rate=1,embedding=10,batch_size=4,activatoin=ReLU,betas=0.9,activation=Swish"
    found = faults(text, sweep)

    for said in (
        "learning_rate=1.0 is not in SPACE, which has 0.0001 to 0.01 (log).",
        "embedding=10 is not in SPACE, which has 8 to 16 in steps of 4.",
        "batch_size is not in SPACE, which has learning_rate, activation, embedding, hidden_chan",
        "SPACE has no key 'activatoin', but",
        "Did you mean 'activation'?",
        "betas is (0.9,), but must be 2 numbers",
        "activation is 'Swish', but must be",
    ):
        assert sum(said in line for line in found) == 1, said

    assert len(found) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("=3", "SPACE has no key ''"),
        ("3,learning_rate=1e-3", "'3' is not of the form key=value"),
        ("embedding=8,embedding=12", "embedding is given twice"),
        ("embedding=8 learning_rate=1e-3", "by commas, as embedding=8,learning_rate=1e-3"),
        ("embedding=8, learning_rate=1e-3 dropout=0", "embedding=8,learning_rate=1e-3,dropout=0"),
        ("learning_rate=nan", "must be a number"),
    ],
)
def test_malformed_items_are_refused(sweep: Sweep, text: str, said: str) -> None:
    assert said in "\n".join(faults(text, sweep))


@pytest.mark.parametrize("name", ["apt-boar-1_aaaaaaaa", "apt-boar-1", "aaaaaaaa", "aaaa", "PATH"])
def test_run_gives_all_keys_of_space(
    sweep: Sweep, run: Config, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = name.replace("PATH", str(tmp_path / "apt-boar-1_aaaaaaaa"))
    params = parse_item(text, sweep, tmp_path)
    drawn = propose(sweep.draw, [], fixed=params)

    assert drawn is not None
    assert sweep.config | drawn[0] == run
    assert capsys.readouterr().out == ""


def test_ignored_settings_of_a_run_are_reported(
    sweep: Sweep, run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(sweep, config=sweep.config | {"epochs": 9, "seed": 7}).check()
    parse_item("aaaaaaaa", other, tmp_path)
    (line,) = capsys.readouterr().out.splitlines()

    assert "epochs=3 where the sweep has 9; seed=0 where the sweep has 7" in line


def test_run_out_of_space_is_refused(sweep: Sweep, run: Config, tmp_path: Path) -> None:
    space = SPACE | {"learning_rate": uniform(0.01, 0.1), "embedding": integer(8, 16, step=8)}
    found = faults("aaaaaaaa", replace(sweep, space=space).check(), tmp_path)

    assert [line.split(" is not")[0].split(": ")[1] for line in found] == [
        "learning_rate=0.005",
        "embedding=12",
    ]


def test_unknown_run_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    assert "there is no run 'zzz'" in faults("zzz", sweep, tmp_path)[0]


def test_upstream_run_is_taken(tmp_path: Path) -> None:
    runs = Path(__file__).parents[1] / "reference" / "runs"
    config = CONFIG | {"window": 3, "hidden_channels": (8, 16), "hidden_blocks": (1, 2)}
    space = {"learning_rate": loguniform(1e-5, 1e-2), "embedding": choice(8, 16)}
    params = parse_item("crimson-cloud-4", Sweep("x", config, space).check(), runs)

    assert params == {"learning_rate": 2e-4, "embedding": 8}


# A SPACE that is a function


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("learning_rate=1e-3", {"learning_rate": 1e-3}),
        ("half=3", {"half": 3}),
        ("dropout=0.25,averaged=False", {"dropout": 0.25, "averaged": False}),
        ("hidden_channels=8,32,half=4", {"hidden_channels": "(8, 32)", "half": 4}),
    ],
)
def test_parameters_of_a_function_are_those_that_it_suggests(
    conditional: Sweep, text: str, params: dict[str, Any]
) -> None:
    found = parse_item(text, conditional, Path())

    assert found == params
    assert [type(found[name]) for name in params] == [type(x) for x in params.values()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("halv=3", "SPACE has no key 'halv', but"),
        ("half=1", "half=1 is not in SPACE, which has 2 to 8"),
        ("half=2.5", "half=2.5 is not in SPACE"),
        ("hidden_channels=8", "hidden_channels=8 is not in SPACE"),
        ("half=3,dropout=0.1", "SPACE never suggests half and dropout at once"),
        ("epochs=9", "epochs is not in SPACE"),
    ],
)
def test_parameters_that_a_function_never_suggests_are_refused(
    conditional: Sweep, text: str, said: str
) -> None:
    assert said in faults(text, conditional)[0]


def test_run_is_replayed_by_a_function(conditional: Sweep, small: Config) -> None:
    config = small | {"learning_rate": 5e-3, "dropout": 0.25}
    known = {"averaged": False}

    assert "suggests 'averaged'" in fit(conditional, config).faults[0]
    found = fit(conditional, config, known)
    assert not found.faults
    assert found.params == {
        "learning_rate": 5e-3,
        "hidden_channels": "(8, 16)",
        "averaged": False,
        "dropout": 0.25,
    }
    assert conditional.config | found.values == config
    assert found.distributions.keys() == found.params.keys()

    wrong = fit(conditional, small | {"ema": 0.9}, {"averaged": True, "half": 3})
    assert wrong.faults == ["ema=0.9 is not what SPACE makes of it, 0.875"]


# Lost runs


ENDS = {1: ("finished", 3), 2: ("paused", 1), 3: ("failed", 2), 4: ("running", 2)}


@pytest.mark.parametrize("function", [False, True])
def test_lost_runs_are_restored_from_their_directories(
    sweep: Sweep, tmp_path: Path, function: bool
) -> None:
    sweep = replace(sweep, space=by_function).check() if function else sweep
    lease = Lease(tmp_path / "lease.json", "the sweep")
    study = Study(tmp_path / "study.journal", "x", lease)
    (runs := tmp_path / "runs").mkdir()

    for number, (status, last) in ENDS.items():
        record = draw_run(study, study.records(), sweep.rules, sweep.config, sweep.propose)
        assert record is not None
        described = {"sweep": "x", "trial": number, "data": "d", "status": status}
        described |= {"created": "2026-05-01", "params": record.trial.params}
        make_run(runs, record.run_id, sweep.config | record.config, described, last)

    assert record is not None

    # One that was brought in, with another seed
    adopted = {"status": "adopted", "origin": {"path": "/old"}, "trial": None}
    config = sweep.config | record.config | {"seed": 9}
    make_run(runs, "brought0", config, described | adopted, 3)

    # Runs of an earlier sweep of the name, and of others
    for name, more in {"old": {"created": "2026-01-01"}, "other": {"sweep": "y"}}.items():
        make_run(runs, f"{name:0<8}", sweep.config, described | {"trial": 9} | more, 3)

    before, again = study.records(), Study(tmp_path / "again.journal", "x", lease)
    (line,) = restore_runs(again, sweep, runs, "d", "2026-04-01")
    catch_up(again, runs)
    after = again.records()

    def drawn(record: Any) -> tuple[Any, ...]:
        trial = record.trial
        return record.index, record.run_id, record.config, trial.params, trial.distributions

    assert line == (
        "again.journal had lost 5 runs: they are restored from their directories. What was queued "
        "is not: give it by --enqueue again."
    )
    assert [*map(drawn, after[:4])] == [*map(drawn, before)]
    assert [r.state for r in after] == ["complete", "running", "failed", "running", "complete"]
    assert [r.paused for r in after[:4]] == [False, True, False, False]
    assert (after[4].source, after[4].last, after[4].finals) == ("/old", 3, (1 / 3,))
    assert (after[4].run_id, after[4].config) == ("brought0", after[3].config)
    assert [r.values.keys() for r in after[:2]] == [{1, 2, 3}, {1}]
    assert restore_runs(again, sweep, runs, "d", "2026-04-01") == []

    # One that a stranger has made
    make_run(runs, "strange0", config, described | {"trial": 9, "replica_of": "x"}, 3)
    assert "apt-boar-9_strange0: invalid" in restore_runs(again, sweep, runs, "d", "2026-04")[1]

    # A further seed; the next one differs
    further = {"params": before[0].trial.params, "replica_of": 1, "trial": 6}
    config = sweep.config | before[0].config | {"seed": 5}
    make_run(runs, "further0", config, described | further, 2)
    restore_runs(again, sweep, runs, "d", "2026-04-01")
    seed = again.records()[-1]
    assert (seed.replica_of, seed.config["seed"], seed.until) == (1, 5, seed.epochs)
    assert replicate_run(again, before[0], sweep.config | {"seed": 4}).config["seed"] == 6

    with pytest.raises(UserError, match="it was trained on other data"):
        restore_runs(Study(tmp_path / "none.journal", "x", lease), sweep, runs, "e", "")

    lease.release()


def make_run(runs: Path, run_id: str, config: Config, record: dict[str, Any], last: int) -> None:
    path = RunPath(runs / f"apt-boar-{record['trial']}_{run_id}")
    path.directory.mkdir()
    save_config(config, path.config)
    write_json(path.record, record)
    lines = (f'{{"epoch": {e}, "loss_valid": {1 / e}}}\n' for e in range(1, last + 1))
    path.metrics.write_text("".join(lines))
