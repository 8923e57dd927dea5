r"""Tests for sda_ray.plan: everything that is wrong is found, and the rest is foreseen."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rich.console import Console

from sda_ray.archive import write_sweep
from sda_ray.bill import plan_to_json, print_plan
from sda_ray.cluster import local_cpus
from sda_ray.data import check_data
from sda_ray.definition import load_script
from sda_ray.errors import UserError
from sda_ray.places import look_here
from sda_ray.plan import Plan, at_a_time, check_memory, memory_of, plan
from sda_ray.slots import Slots
from sda_ray.start import Start, check_start, confirm, remember
from sda_ray.tracking import Wandb

SCRIPT = """
from sda_ray import CONFIG, Sweep, choice, integer, loguniform, uniform

CONFIG = CONFIG | {
    "window": 3,
    "embedding": 8,
    "hidden_channels": (8, 16),
    "hidden_blocks": (1, 1),
    "batch_size": 8,
    "epochs": 9,
}
SPACE = {"learning_rate": loguniform(1e-4, 1e-2)}
MORE = {}
"""

SWEEP = "sweep = Sweep(**{'name': 'test', 'config': CONFIG, 'space': SPACE, 'trials': 4} | MORE)\n"

SOMETIMES = """
def SPACE(trial):
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-2)
    if rate > 9e-3:
        raise ArithmeticError("too fast")
    return {"learning_rate": rate}
"""

BEYOND = """
def SPACE(trial):
    return {"learning_rat": trial.suggest_float("learning_rate", 1e-4, 1e-2)}
"""

# What a user writes into the script, and what is said of it
MISTAKES = {
    "syntax": ("SPACE = {", "cannot be run: SyntaxError"),
    "import": ("import no_such_module", "No module named 'no_such_module'"),
    "argument": ("MORE = {'min_epoch': 2}", "unexpected keyword argument 'min_epoch'"),
    "second sweep": ("other = Sweep('other', CONFIG, SPACE)", "defines 2 sweeps"),
    "config no dict": ("CONFIG = 3", "must be a dict of CONFIG's keys"),
    "unknown key": ("CONFIG['learning_rates'] = 1e-3", "Did you mean 'learning_rate'?"),
    "missing key": ("del CONFIG['window']", "window is missing"),
    "type": ("CONFIG['epochs'] = '9'", "epochs is '9', but must be an integer"),
    "word": ("CONFIG['activation'] = 'silu'", "Did you mean 'SiLU'?"),
    "range of value": ("CONFIG['learning_rate'] = -1", "learning_rate is -1, but must be"),
    "even kernel": ("CONFIG['kernel_size'] = 4", "kernel_size is 4, but must be an odd integer"),
    "levels": ("CONFIG['hidden_blocks'] = (1, 1, 1)", "must have the same number of levels"),
    "long window": ("CONFIG['window'] = 13", "window is 13, but must be at most 12"),
    "downsampling": (
        "CONFIG |= {'hidden_channels': (4,) * 6, 'hidden_blocks': (1,) * 6}",
        "16 must be divisible by 32",
    ),
    "warm-up": ("CONFIG['warmup'] = 10", "warmup is 10, but must be at most epochs"),
    "far too big": (
        "CONFIG |= {'hidden_channels': (4096, 4096)}",
        "must have at most 1e+09. Take fewer",
    ),
    "space no dict": ("SPACE = [1e-3]", "must be a dict of keys of CONFIG and their ranges"),
    "unknown key in space": ("SPACE['batchsize'] = choice(8)", "Did you mean 'batch_size'?"),
    "plain value": ("SPACE['batch_size'] = [4, 8]", "but must be choice(…), uniform(…)"),
    "empty choice": ("SPACE['batch_size'] = choice()", "the choice is empty"),
    "choice of a list": ("SPACE['batch_size'] = choice((4, 8))", "takes its options one by one"),
    "same option twice": ("SPACE['batch_size'] = choice(4, 4)", "has 4 2 times"),
    "reversed bounds": ("SPACE['dropout'] = uniform(0.5, 0.1)", "must be below the upper bound"),
    "log of 0": ("SPACE['weight_decay'] = loguniform(0, 1)", "above 0 for a logarithm"),
    "range of tuples": ("SPACE['hidden_channels'] = integer(8, 16)", "take choice(…)"),
    "real integer": ("SPACE['batch_size'] = uniform(4, 8)", "take integer(…)"),
    "even in range": ("SPACE['kernel_size'] = integer(1, 5)", "must be even"),
    "levels in space": (
        "SPACE['hidden_channels'] = choice((8, 16), (8, 16, 32))",
        "(2 of 4 combinations, as hidden_channels=8,16,32)",
    ),
    "epochs": ("SPACE['epochs'] = choice(4, 8)", "SPACE has 'epochs', but pruned trials"),
    "window": ("SPACE['window'] = choice(3, 5)", "the denoising losses of different windows"),
    "rarely raises": (SOMETIMES, "ArithmeticError: too fast"),
    "returns unknown": (BEYOND, "Did you mean 'learning_rate'?"),
    "name": ("MORE = {'name': 'my sweep'}", "the sweep's name is 'my sweep'"),
    "trials": ("MORE = {'trials': 0}", "trials is 0, but must be"),
    "min_epochs": ("MORE = {'min_epochs': 10}", "min_epochs is 10, but must be at most epochs"),
    "eta": ("MORE = {'eta': 1}", "eta is 1, but must be"),
    "sampler": ("MORE = {'sampler': 'bayes'}", "sampler is 'bayes', but must be"),
    "pruner": ("MORE = {'pruner': 'asha'}", "pruner is 'asha', but must be"),
    "disk": ("MORE = {'trials': 10**9}", "GB free. Make room"),
}


def write(directory: Path, *parts: str) -> Path:
    script = directory / "script.py"
    script.write_text("\n".join((SCRIPT, *parts, SWEEP)))

    return script


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write(tmp_path)


def told(made: Plan) -> str:
    return "\n".join(made.faults)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_script_is_caught(mistake: str, tmp_path: Path, data: Path) -> None:
    text, expected = MISTAKES[mistake]
    made = plan(write(tmp_path, text), tmp_path / "runs", data)

    assert expected in told(made)
    assert not made.nodes, "Ray was started"
    assert not (tmp_path / "runs").exists()


def test_script_without_a_sweep_is_caught(tmp_path: Path, data: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    assert "defines 0 sweeps" in told(plan(tmp_path / "script.py", tmp_path / "runs", data))
    assert "there is no sweep script" in told(plan(tmp_path / "no.py", tmp_path / "runs", data))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def spoil(file: Path) -> None:
    with h5py.File(file, "r+") as f:
        f["x"][3, 5] = np.nan


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(Path.unlink, "there is no file"), (cut, "valid.h5"), (spoil, "is not finite")],
)
def test_damaged_data_are_caught(
    damage: Any, expected: str, script: Path, tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    damage(tmp_path / "data" / "valid.h5")

    assert expected in told(plan(script, tmp_path / "runs", tmp_path / "data"))


def test_resources_that_no_node_has_are_caught(script: Path, tmp_path: Path, data: Path) -> None:
    made = plan(script, tmp_path / "runs", data, cpus=local_cpus() + 1)
    assert "Lower --cpus-per-trial" in told(made)

    made = plan(script, tmp_path / "runs", data, gpus=99)
    assert "a trial wants CPU=1 GPU=99" in told(made)


def test_place_that_cannot_be_written_is_caught(script: Path, data: Path) -> None:
    assert "runs cannot be written to /proc/runs" in told(plan(script, Path("/proc/runs"), data))


def test_missing_key_of_wandb_is_caught(
    script: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = Wandb("online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    made = plan(script, tmp_path / "runs", data, cpus=999, wandb=online)
    assert "there is no key for api.wandb.ai" in told(made)

    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    made = plan(script, tmp_path / "runs", data, cpus=999, wandb=online)
    assert "there is no key" not in told(made)


def test_other_sweep_of_the_name_is_caught(script: Path, tmp_path: Path, data: Path) -> None:
    info = check_data(data)
    before = replace(load_script(script).check(info), seed=1)
    record = {"definition": before.definition(), "fingerprint": info.fingerprint}
    directory = tmp_path / "runs" / "sweeps" / "test"
    directory.mkdir(parents=True)
    write_sweep(directory, {"name": "test", "trials": 4, "options": {}, **record}, script)

    assert "sweep 'test' exists and differs" in told(plan(script, tmp_path / "runs", data))


def test_low_limit_of_files_is_caught(env: dict[str, str]) -> None:
    import subprocess

    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
from sda_ray.places import check_machine
check_machine()
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "processes may open 32 files here" in done.stderr


def test_all_mistakes_are_told_at_once(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data" / "train.h5")
    cut(tmp_path / "data" / "valid.h5")
    script = write(
        tmp_path,
        "CONFIG |= {'kernel_size': 4, 'activation': 'silu', 'widow': 5}",
        "SPACE |= {'batch_size': choice(), 'epoch': choice(2, 3)}",
        "MORE = {'name': 'my sweep', 'trials': 0, 'sampler': 'bayes', 'min_epochs': 10}",
    )
    made = plan(script, Path("/proc/runs"), tmp_path / "data", cpus=999, wandb=Wandb("online"))

    for expected in (
        "train.h5 holds a number",
        "valid.h5",
        "kernel_size is 4",
        "Did you mean 'SiLU'?",
        "Did you mean 'window'?",
        "the choice is empty",
        "Did you mean 'epochs'?",
        "my sweep",
        "trials is 0",
        "'bayes'",
        "min_epochs is 10",
        "/proc/runs",
        "--cpus-per-trial",
        "no key for",
    ):
        assert expected in told(made)

    assert len(set(made.faults)) == len(made.faults)


def test_what_is_odd_is_a_warning_only(tmp_path: Path, data: Path) -> None:
    script = write(
        tmp_path,
        "CONFIG['batch_size'] = 64",
        "SPACE = {'scheduler': choice('linear', 'cosine')}",
    )
    made = plan(script, tmp_path / "runs", data, cpus=999)
    warnings = "\n".join(made.warnings)

    assert len(made.faults) == 1
    assert "an epoch is one step" in warnings
    assert "SPACE has 'scheduler'" in warnings
    assert "SPACE has 2 configurations, fewer than the 4 trials" in warnings


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

    return plan(script, place / "runs", data, gpus=0)


def test_plan_of_a_good_sweep_leaves_nothing_behind(made: Plan, place: Path) -> None:
    assert made.faults == []
    assert not (place / "runs").exists()


def test_plan_tells_time_memory_and_disk(made: Plan) -> None:
    small, large = made.shapes

    assert any("without torch.compile" in warning for warning in made.warnings)
    assert small.config["hidden_channels"] == (8, 16)
    assert small.draws + large.draws == len(made.order) == 1000
    assert small.cost.parameters < large.cost.parameters
    assert made.slots == local_cpus()
    assert made.known and made.pruned is not None and made.whole is not None
    assert 0 < made.pruned.busy < made.whole.busy
    assert made.pruned.epochs < made.whole.epochs == 4 * 9
    assert 4 * small.cost.checkpoint < made.disk < made.free


def test_plan_is_printed_for_people_and_machines(made: Plan) -> None:
    console = Console(file=io.StringIO(), width=160)
    print_plan(made, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    found = json.loads(json.dumps(plan_to_json(made)))

    assert "16,32" in text and "CPU-hours" in text and "Nothing is wrong" in text
    assert found["faults"] == [] and found["at_a_time"] == made.slots
    assert all(shape["nodes"][0]["seconds_per_epoch"] > 0 for shape in found["shapes"])


def test_network_that_fits_no_node_is_caught(made: Plan) -> None:
    nodes = [replace(node, memory=2**27) for node in made.nodes]
    tight = replace(made, nodes=nodes, faults=[], warnings=[])
    check_memory(tight, 0)

    assert "a trial with hidden_channels=(16, 32)" in told(tight)
    assert "has 0.1 GiB. Take a smaller network" in told(tight)


def test_node_with_memory_for_few_trials_is_told_of(made: Plan) -> None:
    node = replace(made.nodes[0], memory=1000, fit=4)

    assert [at_a_time(node, memory, 0) for memory in (100, 400, 1001)] == [4, 2, 0]
    assert at_a_time(replace(node, gpus=2), 400, 0.5) == 4


@pytest.mark.parametrize(("gpus", "most"), [(1, 850), (0.5, 425), (0.25, 212), (2, 850)])
def test_trial_fits_its_share_of_a_gpu_with_a_margin(made: Plan, gpus: float, most: int) -> None:
    node = replace(made.nodes[0], memory=1000, fit=4, gpus=4)

    assert at_a_time(node, most, gpus) == 4
    assert at_a_time(node, most + 1, gpus) == 0


def test_share_of_a_gpu_that_is_too_small_is_caught(made: Plan) -> None:
    takes = memory_of(made.nodes[0], max(made.shapes, key=lambda x: x.cost.peak).cost)
    nodes = [replace(node, memory=2 * takes, gpus=1) for node in made.nodes]
    tight = replace(made, nodes=nodes, faults=[], warnings=[])

    check_memory(tight, 0.75)
    assert tight.faults == tight.warnings == []
    check_memory(tight, 0.5)
    assert "per GPU, of which a trial has 0.5." in tight.faults[0]
    assert tight.faults[0].endswith("or give --gpus-per-trial 0.6.")


def test_start_is_checked_and_knows_what_the_plan_found(
    made: Plan, place: Path, data: Path
) -> None:
    sweep, runs, slots = load_script(place / "script.py"), place / "started", Slots(1, 0)
    unplanned = check_start(sweep, runs, data, slots, Wandb())
    assert unplanned.first and unplanned.hours is None

    remember(made, runs, data)
    start = check_start(sweep, runs, data, slots, Wandb())
    assert start.hours == pytest.approx(made.hours(made.pruned), rel=0.2)

    longer = check_start(replace(sweep, trials=64), runs, data, slots, Wandb())
    assert longer.hours is not None and start.hours is not None
    assert longer.hours > 8 * start.hours

    other = replace(sweep, config=sweep.config | {"batch_size": 4})
    assert check_start(other, runs, data, slots, Wandb()).hours is None

    with pytest.raises(UserError, match=r"(?s)name is 'a b'.*--cpus-per-trial"):
        check_start(replace(sweep, name="a b"), runs, data, Slots(999, 0), Wandb())


def test_remembered_data_are_checked_again_when_they_change(
    script: Path, tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    sweep, runs = load_script(script), tmp_path / "runs"
    check_start(sweep, runs, tmp_path / "data", Slots(1, 0), Wandb())
    spoil(tmp_path / "data" / "train.h5")

    with pytest.raises(UserError, match="is not finite"):
        check_start(sweep, runs, tmp_path / "data", Slots(1, 0), Wandb())


def test_node_that_reaches_other_files_is_told_of(tmp_path: Path, data: Path) -> None:
    fingerprint = check_data(data).fingerprint
    (tmp_path / "token").write_text("token")

    model, memory, faults, _ = look_here(tmp_path, data, fingerprint, "token")
    assert model and memory > 2**28 and faults == []

    _, _, faults, _ = look_here(tmp_path, data, "0" * 64, "other")
    assert len(faults) == 2
    assert "must be shared by all nodes" in faults[0]
    assert "are others than those of the sweep" in faults[1]

    _, _, faults, _ = look_here(tmp_path, tmp_path, fingerprint, "token")
    assert "there is no file" in faults[0]
    assert [file.name for file in tmp_path.iterdir()] == ["token"]


def test_node_of_a_cluster_need_not_have_the_files(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDA_RAY_LOCAL", str(tmp_path / "local"))
    _, _, faults, missing = look_here(tmp_path / "runs", data, "0" * 64, "token", away=True)
    assert faults == [] and missing == [str(tmp_path / "runs"), str(data)]

    (tmp_path / "file").touch()
    monkeypatch.setenv("SDA_RAY_LOCAL", str(tmp_path / "file"))
    _, _, faults, _ = look_here(tmp_path / "runs", data, None, "token", away=True)
    assert "Set SDA_RAY_LOCAL on this node" in faults[0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_long_first_start_on_a_terminal_is_asked_about(
    script: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_script(script).check()
    start = Start(sweep, check_data(data), hours=2.0, finish=7200.0, unit="GPU")
    confirm(start)  # without a terminal

    monkeypatch.setattr(sys, "stdin", Terminal("yes\nno\n"))
    monkeypatch.setattr(sys, "stdout", Terminal())
    confirm(start)

    with pytest.raises(UserError, match="was not started"):
        confirm(start)

    for other in (
        replace(start, first=False),
        replace(start, hours=None),
        replace(start, hours=0.9),
        replace(start, unit="CPU"),
    ):
        confirm(other)  # would read on, and find nothing

    confirm(start, ask_above=3.0)
