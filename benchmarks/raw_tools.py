r"""What `raw_tune.py` stands on: a sweep by Ray Tune alone, and processes in places of their own."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("raw_tune.py")
LIMIT = 300.0  # seconds that a command may take
TOKEN = secrets.token_hex(32)  # so that nobody else gets at the Ray of this script
PATIENCE = 30.0  # seconds after which a sweep that has not begun counts as hanging

SWEEP = """
from sda_ray import CONFIG, Sweep, choice, loguniform, main

CONFIG = CONFIG | {
    "window": 3, "embedding": 8, "hidden_channels": (8, 16), "hidden_blocks": (1, 1),
    "epochs": 9, "batch_size": 8,
}
SPACE = {"learning_rate": %s}
sweep = Sweep("tiny", CONFIG, SPACE, trials=9, min_epochs=1, eta=3, sampler="%s")
"""


# Raw Ray Tune, in a process of its own


def value(x: float, epoch: int) -> float:
    r"""Returns curves that cross: what is good early is not what is good in the end."""

    return (x - 0.3) ** 2 / epoch + (1 - x) * epoch / 20


def tune_raw(
    directory: Path,
    how: str = "start",
    trials: int = 9,
    pause: float = 0.05,
    nan: bool = False,
    kept: bool = True,
    cpus: float = 1,
) -> None:
    r"""Runs trials by Ray Tune as its documentation shows it, and prints what came of it."""

    import ray
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    def trainable(config: dict[str, Any]) -> None:
        for epoch in range(1, 10):
            time.sleep(pause)
            bad = nan and config["x"] > 0.5
            tune.report({"loss": float("nan") if bad else value(config["x"], epoch)})

    class Watched(ASHAScheduler):
        def on_trial_result(self, controller: Any, trial: Any, result: Any) -> str:
            said = str(super().on_trial_result(controller, trial, result))
            known = len(dict(self._brackets[0]._rungs)[1])

            with open(directory / "rung.txt", "a") as file:
                file.write(f"{known}\n")

            return said

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        _temp_dir=str(directory / "ray"),
    )
    storage = JournalStorage(JournalFileBackend(str(directory / "study.journal")))
    more = {"storage": storage, "study_name": "tiny"} if kept else {}
    searcher = OptunaSearch(metric="loss", mode="min", seed=0, **more)
    asha = Watched(metric="loss", mode="min", max_t=9, reduction_factor=3)
    function = tune.with_resources(trainable, {"cpu": cpus})

    if how == "restore":
        count = len(tune.Tuner.restore(str(directory / "tune" / "tiny"), function).fit())
    elif how == "start":
        tuner = tune.Tuner(
            function,
            param_space={"x": tune.uniform(0.0, 1.0)},
            tune_config=tune.TuneConfig(
                num_samples=trials, search_alg=searcher, scheduler=asha, max_concurrent_trials=2
            ),
            run_config=tune.RunConfig(
                name="tiny", storage_path=str(directory / "tune"), verbose=0
            ),
        )
        count = len(tuner.fit())
    else:  # the one call that takes both an experiment to go on with and a number of trials
        found = tune.run(
            function,
            name="tiny",
            config={"x": tune.uniform(0.0, 1.0)},
            num_samples=trials,
            storage_path=str(directory / "tune"),
            search_alg=searcher,
            scheduler=asha,
            max_concurrent_trials=2,
            resume=True,
            verbose=0,
        )
        count = len(found.trials)

    print(f"RESULTS {count}", flush=True)


class Place:
    r"""Creates a directory with data of its own, and runs commands there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = {k: x for k, x in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))}
        self.env |= {
            "HOME": str(directory),
            "TMPDIR": str(directory),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            "SDA_RAY_ROOT": str(directory),
        }

    def start(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *words],
            env=self.env | more,
            cwd=self.directory,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def raw(self, **options: Any) -> "subprocess.Popen[str]":
        more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        more |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
        more |= {"RAY_raylet_start_wait_time_s": "120", "RAY_CHDIR_TO_TRIAL_DIR": "0"}

        return self.start(str(SCRIPT), "--raw", json.dumps(options), **more)

    def sweep(self, *words: str) -> "subprocess.Popen[str]":
        return self.start("-m", "sda_ray", "sweep", *words, "--parallel=2")

    def write(self, space: str = "loguniform(1e-4, 1e-2)", sampler: str = "random") -> None:
        r"""Writes a sweep script and random data."""

        import h5py
        import numpy as np

        (self.directory / "tiny.py").write_text(SWEEP % (space, sampler))
        (self.directory / "data").mkdir(exist_ok=True)
        rng = np.random.default_rng(0)

        for split, n in {"train": 20, "valid": 4, "test": 4}.items():
            with h5py.File(self.directory / "data" / f"{split}.h5", "w") as file:
                file["x"] = rng.standard_normal((n, 12, 2, 16, 16), dtype=np.float32)

    def study(self, file: str = "study.journal") -> list[Any]:
        r"""Returns the trials of a study as Optuna reads them, from a copy of the journal."""

        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        copy = self.directory / "copy.journal"

        if not (self.directory / file).exists():
            return []

        content = (self.directory / file).read_bytes()
        copy.write_bytes(content[: content.rfind(b"\n") + 1])

        try:
            storage = JournalStorage(JournalFileBackend(str(copy)))
            return optuna.load_study(study_name="tiny", storage=storage).trials
        except KeyError:
            return []

    def runs(self) -> dict[str, Any]:
        r"""Returns the newest trial of each run of our study."""

        trials = self.study("runs/sweeps/tiny/study.journal")

        return {trial.user_attrs["run_id"]: trial for trial in trials}


def family(pid: int) -> set[int]:
    r"""Returns a process that we started and all that it has started."""

    found = {pid}

    for _ in range(8):  # generations
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue

            if parent in found:
                found.add(int(stat.parent.name))

    return found


def kill(process: "subprocess.Popen[str]") -> None:
    r"""Kills a driver, then what it leaves behind."""

    left = family(process.pid) - {process.pid}
    process.kill()
    time.sleep(1)

    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    process.communicate()


def finish(process: "subprocess.Popen[str]", limit: float = LIMIT) -> tuple[int | None, str]:
    r"""Waits for a command and returns its exit code, None if it did not end, and its output."""

    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill(process)
        return None, ""

    return process.returncode, out


def until(what: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + LIMIT

    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)


def last_words(out: str) -> str:
    r"""Returns the last error in an output."""

    lines = [line.strip() for line in out.splitlines() if "Error" in line or "Exception" in line]

    return (lines or out.splitlines() or ["nothing"])[-1][:160]


def last(trial: Any) -> int:
    return max(trial.intermediate_values, default=0)
