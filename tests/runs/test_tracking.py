import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from conftest import Cli, Start
from wandb_server import WandbServer

from sda_ray.core.errors import UserError
from sda_ray.runs.path import RunPath
from sda_ray.runs.record import logged_config
from sda_ray.runs.tracking import Wandb, own_environment, wandb_faults, wandb_server


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def only_run(tmp_path: Path) -> RunPath:
    (path,) = RunPath.all(tmp_path / "runs")
    assert not list((tmp_path / "runs").glob(".*")), "a provisional directory was left"

    return path


def rows(server: WandbServer, id: str) -> list[tuple[int, float]]:
    r"""Returns the (step, loss) of the epochs that the server shows."""

    history = server.runs[id].history
    return [(row["_step"], row["loss_valid"]) for row in history if "loss_valid" in row]


def recorded(path: RunPath) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.metrics.read_text().splitlines()]
    return [(line["epoch"], line["loss_valid"]) for line in lines]


# Settings


def test_options_come_before_variables_before_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Wandb.from_options() == Wandb("offline", "sda-kolmogorov")

    for name, value in (
        ("WANDB_MODE", "disabled"),
        ("WANDB_PROJECT", "theirs"),
        ("WANDB_ENTITY", "us"),
        ("WANDB_TAGS", "a, b"),
    ):
        monkeypatch.setenv(name, value)

    assert Wandb.from_options() == Wandb("disabled", "theirs", "us", ("a", "b"))
    options = Wandb.from_options("online", "mine", "me", "c")
    assert options == Wandb("online", "mine", "me", ("c",))


@pytest.mark.parametrize("project", ["team/flows", "50%", "a:b"])
def test_project_that_the_server_refuses_is_refused(project: str) -> None:
    with pytest.raises(UserError, match=f"project is '{project}', but must have none of / "):
        Wandb.from_options(project=project)


@pytest.mark.parametrize("what", ["project", "tag"])
def test_names_that_are_too_long_for_wandb_are_refused(what: str) -> None:
    name = "a" * (129 if what == "project" else 65)

    with pytest.raises(UserError, match=f"{what} '{name}' has {len(name)} characters, but must h"):
        Wandb.from_options(**{"tags" if what == "tag" else what: f"{name}"})


def test_settings_are_read_from_a_record_that_may_be_damaged(tmp_path: Path) -> None:
    kept = {"mode": "online", "project": "flows", "tags": ["a", "b"]}
    assert Wandb.from_record(kept, tmp_path) == Wandb("online", "flows", tags=("a", "b"))
    assert Wandb.from_record(None, tmp_path) == Wandb.from_record([], tmp_path) == Wandb()
    assert Wandb.from_record({"tags": None}, tmp_path) == Wandb()

    for damaged in ({"modus": "online"}, {"tags": 3}, {"project": None}, {"tags": [1]}):
        with pytest.raises(UserError, match="is damaged: its entry 'wandb': "):
            Wandb.from_record(damaged, tmp_path / "run.json")


def test_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")

    with pytest.raises(UserError, match="mode is 'dryrun', but must be online, offline or disab"):
        Wandb.from_options()


# Offline


def test_offline_run_has_our_name_and_id_whatever_the_environment_says(
    cli: Cli, settings: list[str], tmp_path: Path
) -> None:
    strange = {
        "WANDB_RUN_ID": "zzzzzzzz",
        "WANDB_NAME": "strange-name",
        "WANDB_DIR": str(tmp_path / "strange"),
        "WANDB_RUN_GROUP": "strange-group",
        "WANDB_SWEEP_ID": "strange-sweep",
        "WANDB_RESUME": "must",
        "WANDB_JOB_TYPE": "strange-job",
        "WANDB_NOTES": "strange-notes",
        "WANDB_DISABLED": "true",
    }
    done = cli("train", "epochs=2", *settings, WANDB_MODE="offline", **strange)
    assert done.returncode == 0, done.stderr
    path = only_run(tmp_path)
    (fragment,) = path.directory.glob(f"wandb/offline-run-*-{path.id}/run-{path.id}.wandb")
    content = fragment.read_bytes()
    assert path.name.encode() in content and b"loss_valid" in content
    assert b"strange" not in content and b"zzzzzzzz" not in content
    assert not (tmp_path / "strange").exists() and not (tmp_path / "wandb").exists()


def test_offline_run_needs_no_variable_about_the_server(
    cli: Cli, settings: list[str], tmp_path: Path
) -> None:
    malformed = {
        "WANDB_BASE_URL": "localhost:8080",
        "WANDB_APP_URL": "",
        "WANDB_HTTP_TIMEOUT": "20s",
        "WANDB_API_KEY": "0123456789" * 4 + "\n",
        "WANDB_IDENTITY_TOKEN_FILE": "/nonexistent",
        "WANDB_INSECURE_DISABLE_SSL": "maybe",
    }
    done = cli("train", "epochs=1", *settings, WANDB_MODE="offline", **malformed)
    assert done.returncode == 0 and "W&B" not in done.stderr, done.stderr
    assert list(only_run(tmp_path).directory.glob("wandb/offline-run-*/run-*.wandb"))


def test_server_variables_are_given_trimmed_and_only_online(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key\n")
    monkeypatch.setenv("WANDB_BASE_URL", "")
    monkeypatch.setenv("WANDB_CACHE_DIR", "/cache")

    for offline in (False, True):
        with own_environment(offline):
            assert os.environ.get("WANDB_API_KEY") == (None if offline else "key")
            assert "WANDB_BASE_URL" not in os.environ
            assert os.environ["WANDB_CACHE_DIR"] == "/cache"

        assert os.environ["WANDB_API_KEY"] == "key\n" and os.environ["WANDB_BASE_URL"] == ""


# Online


def test_online_the_server_names_the_run_and_gets_each_epoch_once(
    cli: Cli, settings: list[str], tmp_path: Path, server: WandbServer
) -> None:
    done = cli("train", "epochs=5", *settings, "--tags", "a,b", **server.env)
    assert done.returncode == 0, done.stderr
    path = only_run(tmp_path)
    assert path.name == "crimson-cloud-1"
    served = server.runs[path.id]
    assert (served.name, served.project, served.tags) == (path.name, "sda-kolmogorov", ["a", "b"])
    assert json.loads(served.config)["epochs"]["value"] == 5
    assert rows(server, path.id) == recorded(path)
    assert [step for step, _ in rows(server, path.id)] == [1, 2, 3, 4, 5]
    assert any("samples" in name for name in served.files)
    assert served.exit_code == 0
    assert json.loads(path.record.read_text())["name"] == path.name

    for link in (path.directory / "wandb").iterdir():
        assert link.exists(), f"{link} leads nowhere"


def test_online_killed_and_resumed_shows_each_epoch_once_in_order(
    start: Start, cli: Cli, settings: list[str], tmp_path: Path, server: WandbServer
) -> None:
    process = start("train", "epochs=80", *settings, **server.env)

    while (
        len(list(tmp_path.glob("runs/*_*/metrics.jsonl"))) == 0
        or len(recorded(next(RunPath.all(tmp_path / "runs")))) < 5
    ):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)

    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = RunPath.all(tmp_path / "runs")
    done = cli("train", "--resume", path.id, **server.env)
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path) == path
    assert rows(server, path.id) == recorded(path)
    assert [step for step, _ in rows(server, path.id)] == list(range(1, 81))


def test_dead_server_costs_seconds_and_the_run_goes_on_offline(
    cli: Cli, settings: list[str], tmp_path: Path
) -> None:
    with WandbServer() as server:
        env = server.env

    done = cli("train", "epochs=2", *settings, **env)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert "W&B cannot be used" in done.stderr and "continues offline" in done.stderr
    path = only_run(tmp_path)
    assert path.state.exists()

    # What W&B costs at the start and at the end; imports and epochs take long on a busy machine
    record = json.loads(path.record.read_text())
    taken = datetime.fromisoformat(json.loads(path.lease.read_text())["since"])
    begun = datetime.fromisoformat(record["attempts"][0]["started"])
    assert (begun - taken).total_seconds() + ended - path.record.stat().st_mtime < 40

    fragments = list(path.directory.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(fragments) == 1 and path.name.encode() in fragments[0].read_bytes()


def test_server_that_dies_does_not_stop_the_training(
    start: Start, settings: list[str], tmp_path: Path
) -> None:
    with WandbServer() as server:
        process = start("train", "epochs=60", *settings, **server.env)

        while not list(tmp_path.glob("runs/*_*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)

    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        pytest.fail("the training waits for the server")

    assert process.returncode == 0, errors
    path = only_run(tmp_path)
    assert path.state.exists() and len(recorded(path)) == 60


def test_key_and_server_are_those_of_wandb_login(
    server: WandbServer, tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    (fault,) = wandb_faults(Wandb("online"))
    assert "no key for api.wandb.ai" in fault

    variables = env | {"HOME": str(tmp_path), "WANDB_MODE": "online"}
    login = [sys.executable, "-m", "wandb", "login", "--host", server.url, "0" * 40]
    done = subprocess.run(login, env=variables, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert wandb_server() == server.url
    assert not [*wandb_faults(Wandb("online"))]

    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")

    (fault,) = wandb_faults(Wandb("online"))
    assert "no key for other.example" in fault


# What is told


def test_wandb_is_told_nothing_of_the_surroundings(
    cli: Cli, settings: list[str], tmp_path: Path
) -> None:
    strange = {"SLURM_JOB_NAME": "strange-job", "MY_TOKEN": "strange-token"}
    done = cli("train", "epochs=1", *settings, "--tags=x", WANDB_MODE="offline", **strange)
    assert done.returncode == 0, done.stderr
    path = only_run(tmp_path)
    files = [file for file in path.directory.glob("wandb/offline-run-*/**/*") if file.is_file()]
    sent = [file for file in files if file.suffix == ".wandb" or "files" in file.parts]
    content = b"".join(file.read_bytes() for file in sent)
    assert b"loss_valid" in content

    for word in (b"strange", b"--data", sys.executable.encode(), b"h5py=="):
        assert word not in content


def test_config_carries_where_the_run_comes_from() -> None:
    record = {"sweep": "width", "trial": 3, "study": "sweeps/width/study.journal", "host": "x"}
    config = {"epochs": 9}
    assert logged_config(config, record) == config | {k: record[k] for k in record if k != "host"}
    assert logged_config(config, {"sweep": None, "trial": ["strange"]}) == config


@pytest.mark.parametrize(
    ("mode", "tag", "printed"),
    [
        ("online", "", "True False"),
        ("offline", "", "False False"),
        ("offline", "a" * 65, "False True"),
    ],
)
def test_tracker_tells_whether_the_server_or_the_client_has_failed(
    mode: str, tag: str, printed: str, tmp_path: Path, env: dict[str, str]
) -> None:
    code = (
        "import pathlib, sys; from sda_ray.runs.tracking import Tracker, Wandb; "
        "t = Tracker(pathlib.Path(sys.argv[1]), 'abcd1234', 'a-b-1', {}, Wandb(sys.argv[2], "
        "tags=tuple(sys.argv[3:]))); "
        "t.log({'a': 1}, 1); t.finish(); print(bool(t.failed), bool(t.missing))"
    )

    with WandbServer() as server:
        env |= server.env

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), mode, *filter(None, [tag])],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == printed, done.stderr


@pytest.mark.parametrize("value", ["true", "false", None])
def test_error_reporting_of_wandb_is_off_unless_the_user_wants_it(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")  # restored after the test
    monkeypatch.delenv("WANDB_ERROR_REPORTING")

    if value is not None:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", value)

    with own_environment():
        assert os.environ["WANDB_ERROR_REPORTING"] == (value or "false")

    assert os.environ["WANDB_ERROR_REPORTING"] == (value or "false")


# The end of a process

FROZEN = """
import os, pathlib, signal, subprocess, sys
from sda_ray.core.config import CONFIG
from sda_ray.runs.tracking import Tracker, Wandb

code = "import ctypes as c, sys; c.CDLL(None).prctl(15, sys.argv[1].encode()); print(); input()"
name = "x" * 14 + "\N{LATIN SMALL LETTER E WITH ACUTE}"  # Linux cuts it to 15 bytes
command = [sys.executable, "-c", code, name]
strange = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
strange.stdout.readline()
tracker = Tracker(pathlib.Path(sys.argv[1]), "abcd1234", "a-b-1", CONFIG, Wandb())
tracker.finish()

for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
    name, _, rest = file.read_text(errors="replace").partition("(")[2].rpartition(")")
    if name == "wandb-core" and int(rest.split()[1]) == os.getpid():
        os.kill(int(file.parent.name), signal.SIGSTOP)
        print("frozen")
"""


def test_process_ends_though_the_service_of_wandb_does_not(
    env: dict[str, str], tmp_path: Path
) -> None:
    script = [sys.executable, "-c", FROZEN, str(tmp_path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (0, "frozen\n"), done.stderr
