r"""Tests for sda_ray.cli.main: what is wrong is said at once, in one message, before anything starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Cli
from refusing import Refuse, handlers, refuse, root
from scene import SCRIPT
from sweeping import make_sweep

from sda_ray.cli.options import Args
from sda_ray.cli.sweep import chosen_sweep
from sda_ray.core.system import python_command

__all__ = ["handlers", "refuse", "root"]  # fixtures

# Faults of a configuration: words on the command line, and what the message must say
FAULTS = [
    ("learning_rat=1", "CONFIG has no key 'learning_rat'. Did you mean 'learning_rate'?"),
    ("Epochs=1", "Did you mean 'epochs'?"),
    ("epochs", "'epochs' is not of the form key=value"),
    ("epochs=many", "epochs is 'many', but must be an integer"),
    ("epochs=1.5", "epochs is '1.5', but must be an integer"),
    ("epochs=0", "epochs is 0, but must be"),
    ("epochs=-3", "epochs is -3, but must be"),
    ("batch_size=0", "batch_size is 0"),
    ("embedding=0", "embedding is 0"),
    ("kernel_size=4", "kernel_size is 4, but must be an odd integer"),
    ("window=4", "window is 4, but must be an odd integer"),
    ("window=1", "window is 1, but must be"),
    ("window=13", "window is 13, but must be at most 12, the snapshots of a trajectory"),
    ("hidden_blocks=1,1,1", "must have the same number of levels"),
    ("hidden_channels=8,16,32", "must have the same number of levels"),
    ("hidden_channels=8,1", "hidden_channels is (8, 1), but must be"),
    ("hidden_channels=8;16", "hidden_channels is '8;16', but must be a list of integers"),
    ("kernel_size=35", "kernel_size is 35, but must be at most 17"),
    ("learning_rate=0", "learning_rate is 0"),
    ("learning_rate=-1", "learning_rate is -1"),
    ("learning_rate=nan", "learning_rate is nan"),
    ("weight_decay=-0.1", "weight_decay is -0.1"),
    ("activation=Swish", "activation is 'Swish', but must be ELU, GELU, ReLU, SELU or SiLU"),
    ("activation=silu", "Did you mean 'SiLU'?"),
    ("optimizer=Adam", "optimizer is 'Adam', but must be AdamW.\n"),
    ("lr=1e-3", "CONFIG has no key 'lr'. Did you mean 'learning_rate'?"),
    ("wd=1e-3", "CONFIG has no key 'wd'. Did you mean 'weight_decay'?"),
    ("--lr 1e-3", "there is no option --lr. Settings are given as learning_rate=…"),
    ("scheduler=cosin", "Did you mean 'cosine'?"),
    ("seed=-1", "seed is -1"),
    ("hidden_channels=4096,4096 hidden_blocks=256,256", "weights, but must have at most"),
    ("hidden_channels=8,8,8,8,8,8 hidden_blocks=1,1,1,1,1,1", "must be divisible by 32"),
    ("epochs=1 epochs=2", "epochs is given twice"),
]

# Faults of a sweep's script: what is replaced in a good one
SCRIPTS = [
    ("import CONFIG", "import CONFIGS", "cannot be run: ImportError"),
    ("sweep = Sweep", "raise SystemExit('no') #", "cannot be run: SystemExit: no"),
    ("sweep = Sweep(", "sweep = (lambda *_, **__: 0)(", "defines 0 sweeps, but must define one"),
    ("sweep = Sweep", "other = Sweep('a', CONFIG, SPACE)\nsweep = Sweep", "defines 2 sweeps"),
    ("CONFIG = CONFIG", "CONFIG = (", "cannot be run: SyntaxError"),
    ('"learning_rate": log', '"learning_rates": log', "Did you mean 'learning_rate'?"),
    ("loguniform(1e-4, 1e-2)", "loguniform(1e-2, 1e-4)", "must be below the upper bound"),
    ("loguniform(1e-4, 1e-2)", "loguniform(0, 1e-2)", "learning_rate is 0"),
    ("loguniform(1e-4, 1e-2)", "1e-4", "SPACE['learning_rate'] is 0.0001, but must be choice("),
    ('choice("SiLU", "ReLU")', "choice()", "the choice is empty"),
    ('choice("SiLU", "ReLU")', 'choice("SiLU", "Relu")', "Did you mean 'ReLU'?"),
    ('"activation": choice("SiLU", "ReLU")', '"window": choice(3, 5)', "SPACE has 'window'"),
    ('"activation": choice("SiLU", "ReLU")', '"epochs": choice(3, 5)', "SPACE has 'epochs'"),
    ('"activation": choice("SiLU", "ReLU")', '"kernel_size": choice(3, 4)', "kernel_size is 4"),
    ("SPACE = {", "SPACE = {} and {", "SPACE is {}, but must be a dict"),
    ("SPACE = {", "SPACE = None and {", "SPACE is None, but must be a dict"),
    ("CONFIG, SPACE, trials", "None, SPACE, trials", "The configuration is None, but must be"),
    ("CONFIG, SPACE, trials", "CONFIG, lambda t: 1, trials", "SPACE returned 1, but must return"),
    ("CONFIG, SPACE, trials", "CONFIG, lambda t: {'epoch': 1}, trials", "Did you mean 'epochs'?"),
    ("CONFIG, SPACE, trials", "CONFIG, lambda t: t.x(), trials", "AttributeError"),
    ('"epochs": 9', '"epoch": 9', "CONFIG has no key 'epoch'. Did you mean 'epochs'?"),
    ("min_epochs=1", "min_epochs=10", "min_epochs is 10, but must be at most epochs (=9)"),
    ("min_epochs=1", "min_epochs=0", "min_epochs is 0, but must be an integer from 1"),
    ("eta=3, min_epochs=1", "eta=1", "eta is 1, but must be an integer from 2"),
    ("min_epochs=1", "seed=0.5", "seed is 0.5, but must be an integer from 0"),
    ("min_epochs=1", "finalists=-1", "finalists is -1"),
    (
        "min_epochs=1",
        "pruner='medium'",
        "pruner is 'medium', but must be one of promotion, median",
    ),
    ('sampler="random"', 'sampler="cmaes"', "sampler is 'cmaes', but must be one of tpe, random"),
    ('sampler="random"', 'sampler="grid"', "learning_rate has no finite set of options"),
    ("trials=8", "trials=True", "trials is True, but must be an integer from 1"),
    ('"tiny"', '"a/b"', "the sweep's name is 'a/b', but must be"),
    ('"tiny"', '""', "the sweep's name is '', but must be"),
    ('"tiny"', "7", "the sweep's name is 7, but must be"),
]


@pytest.mark.parametrize(("words", "message"), FAULTS, ids=[words for words, _ in FAULTS])
@pytest.mark.parametrize("command", ["train", "sweep", "replicas"])
def test_fault_of_a_configuration_is_refused(
    refuse: Refuse, command: str, words: str, message: str
) -> None:
    small = ["window=3", "embedding=8", "hidden_channels=8,16", "hidden_blocks=1,1"]
    given = {word.partition("=")[0] for word in words.split()}
    rest = [word for word in small if word.partition("=")[0] not in given]

    if command == "sweep":
        if given & {"learning_rate", "activation"}:
            fixed = [x for word in words.split() for x in ("--fix", word)]
            said = refuse("sweep", "tiny.py", *fixed)
        else:
            said = refuse("sweep", "tiny.py", *words.split())
    else:
        replicas = ["--replicas", "2"] if command == "replicas" else []
        said = refuse("train", *replicas, *rest, *words.split())

    assert message in said


@pytest.mark.parametrize(("old", "new", "message"), SCRIPTS, ids=[s[1] for s in SCRIPTS])
def test_fault_of_a_script_is_refused(
    root: Path, refuse: Refuse, old: str, new: str, message: str
) -> None:
    assert old in SCRIPT
    (root / "tiny.py").write_text(SCRIPT.replace(old, new))

    assert message in refuse("sweep", "tiny.py")


@pytest.mark.parametrize("command", ["train", "sweep tiny.py", "train --replicas 2"])
@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "foreign", "nan", "shape"])
def test_fault_of_the_data_is_refused(
    root: Path, data: Path, refuse: Refuse, command: str, split: str, fault: str
) -> None:
    file = root / "bad" / f"{split}.h5"
    shutil.copytree(data, root / "bad")

    if fault == "missing":
        file.unlink()
    elif fault == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif fault == "foreign":
        file.write_bytes(b"x" * 4096)
    elif fault == "nan":
        with h5py.File(file, "r+") as f:
            f["x"][2, 5, 1, 3, 3] = np.nan
    else:
        with h5py.File(file, "w") as f:
            f["x"] = np.ones((4, 12, 3, 16, 16), dtype=np.float32)

    small = ["window=3", "embedding=8", "hidden_channels=8,16", "hidden_blocks=1,1"]
    assert str(file) in refuse(*command.split(), "--data", "bad", *small)


def test_settings_may_stand_among_options(root: Path, refuse: Refuse) -> None:
    words = ["sweep", "tiny.py", "--trials", "3", "epochs=0", "--name", "x", "window=4"]
    said = refuse(*words)

    assert "epochs is 0" in said
    assert "window is 4" in said


def test_joined_key_cannot_be_fixed_alone(root: Path, refuse: Refuse) -> None:
    joined = '"hidden_channels, hidden_blocks": choice(((8, 16), (1, 1)), ((8,), (1,)))'
    (root / "tiny.py").write_text(SCRIPT.replace('"activation": choice("SiLU", "ReLU")', joined))

    assert "it is joined in 'hidden_channels, hidden_blocks'" in refuse(
        "sweep", "tiny.py", "--fix", "hidden_blocks=1,1"
    )
    assert "--fix hidden_blocks=1,1" in refuse("sweep", "tiny.py", "hidden_blocks=1,1")


def test_damaged_record_of_a_sweep_is_refused(root: Path, refuse: Refuse) -> None:
    directory = root / "runs" / "sweeps" / "old"
    directory.mkdir(parents=True)

    for content in ("{", "[]", "{}", '{"name": "old"}'):
        (directory / "sweep.json").write_text(content)
        assert "sweep.json is damaged" in refuse("sweep", "old")

    assert "which has old" in refuse("sweep", "new")


def test_faults_are_found_before_ray_is_imported(root: Path) -> None:
    code = """
import sys
from sda_ray.cli.main import main

try:
    main(argv=["sweep", "tiny.py", "epochs=0"])
except SystemExit as exit:
    assert exit.code == 2
assert not {"ray", "wandb"} & sys.modules.keys()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=root)


def test_interrupt_of_code_from_a_string_leaves_the_exit_code(root: Path) -> None:
    (root / "interrupted.py").write_text("""
from sda_ray.cli.main import main

try:
    main(argv=["stop", "unknown"])  # imports all that it needs
except SystemExit:
    pass

try:
    exec("raise KeyboardInterrupt")
except KeyboardInterrupt:
    pass

main(argv=["stop", "unknown"])
""")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-m", "interrupted"]
    assert subprocess.run(words, env=env, cwd=root).returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_output_that_cannot_be_written_is_one_line(root: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "sda_ray", "runs"]
        done = subprocess.run(
            words, env=env, cwd=root, stdout=full, stderr=subprocess.PIPE, text=True
        )

    assert done.returncode == 1, done.stderr
    assert done.stderr == "sda-ray: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_character_that_an_encoding_lacks_is_no_error(root: Path, encoding: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-m", "sda_ray", "train", "--help"]
    done = subprocess.run(
        words, env=env | {"PYTHONIOENCODING": encoding}, cwd=root, capture_output=True
    )

    assert done.returncode == 0, done.stderr
    assert b"N runs with the seeds seed " in done.stdout


def test_trials_and_finalists_of_the_command_line_are_those_of_the_sweep(tmp_path: Path) -> None:
    (script := tmp_path / "tiny.py").write_text(SCRIPT)
    args = Args(sweep=str(script), script_sweep=None, trials=5, finalists=3)
    sweep, _ = chosen_sweep(args, None)

    assert (sweep.trials, sweep.finalists) == (5, 3)


@pytest.mark.parametrize("words", [["runs"], ["best", "width"]])
def test_pipe_that_is_closed_ends_a_command_quietly(
    tmp_path: Path, env: dict[str, str], words: list[str]
) -> None:
    make_sweep(tmp_path / "runs", "width", 4)
    command = [sys.executable, "-m", "sda_ray", *words, f"--root={tmp_path}"]

    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as done:
        assert done.stdout and done.stderr
        done.stdout.readline()
        done.stdout.close()

        assert (done.wait(60), done.stderr.read()) == (141, b"")


@pytest.mark.parametrize("close", [0, 1, 2])
def test_closed_stream_is_one_that_nobody_reads(root: Path, close: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = f"import os; open('fds', 'w').write(os.readlink('/proc/self/fd/{close}'))"
    program = f"""
import os, sys, subprocess
os.close({close})
sys.{("stdin", "stdout", "stderr")[close]} = None  # as Python does
from sda_ray import main
main(argv=["runs"])
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=root, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert ("There are no runs" in done.stdout) is (close != 1)
    assert (root / "fds").read_text() == os.devnull


def test_json_is_alone_on_standard_output(root: Path, cli_here: Cli) -> None:
    space = "def space(trial):\n    print('drawn')\n    return {}\n\nsweep"
    text = SCRIPT.replace("sweep", space, 1).replace("CONFIG, SPACE", "CONFIG, space")
    (root / "tiny.py").write_text(f"print('loaded')\n{text}")
    done = cli_here("plan", "tiny.py", "--json", "epochs=0", "--fix=a=1")

    assert "loaded" in done.stderr and json.loads(done.stdout)["faults"], done.stderr


PROGRAM = SCRIPT.replace("__name__ ==", "'' ==")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("main(sweep)", "there is no directory"),
        ("threading.Thread(target=main, args=[sweep]).start()", "in the main thread of a process"),
    ],
)
def test_sweep_is_run_by_the_file_that_made_it(root: Path, more: str, said: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    (root / "width.py").write_text(PROGRAM)
    launcher = f"import threading\nfrom width import main, sweep\n{more}\n"
    (root / "launcher.py").write_text(launcher)

    for words in (["launcher.py"], ["-c", launcher]):
        done = subprocess.run(
            [sys.executable, *words, "--data=none"],
            env=env,
            cwd=root,
            capture_output=True,
            text=True,
        )
        assert said in done.stderr and "Traceback" not in done.stderr
        assert not (root / "runs").exists()


@pytest.mark.parametrize("words", [["-"], ["-c", PROGRAM + "main(sweep)"]])
def test_sweep_without_a_file_is_refused(root: Path, words: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *words],
        env=env,
        cwd=root,
        input=PROGRAM + "main(sweep)",
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert done.stderr.startswith("sda-ray: sweep 'tiny' was not made in a file, from which it")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["optuna.py", "random.py"])
def test_script_with_the_name_of_a_library_runs_as_a_module_of_the_package(
    root: Path, script: str
) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    (root / script).write_text(SCRIPT)

    for command in (["-m", "sda_ray"], python_command("sda-ray")[1:]):
        done = subprocess.run(
            [
                sys.executable,
                *command,
                "sweep",
                script,
                "sampler=x",
                "epochs=0",
                "--wandb=disabled",
            ],
            env=env,
            cwd=root,
            capture_output=True,
            text=True,
        )
        assert "CONFIG has no key 'sampler'" in done.stderr and "Traceback" not in done.stderr
