#!/usr/bin/env python3
r"""A stand-in for Slurm, in as much as a job of `sda-ray slurm` has to do with it.

As `sbatch`, `srun`, `scontrol` and `squeue` it is what the hosts have on their PATH. A job is a
directory in $SLURM_STAND_IN, which all hosts see; a test starts it on hosts, by :class:`Job`.
"""

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["Job", "install"]

NAMES = ("sbatch", "srun", "scontrol", "squeue")
SSH = ("ssh", "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR")


def install(place: Path) -> Path:
    r"""Makes the commands, each of which is this file, and returns their directory."""

    (place / "bin").mkdir(parents=True)

    for name in NAMES:
        (place / "bin" / name).write_bytes(Path(__file__).read_bytes())
        (place / "bin" / name).chmod(0o755)

    return place / "bin"


class Job:
    r"""Creates what a test, in the place of Slurm, does with a job that was submitted.

    Arguments:
        lab: The hosts.
        place: The directory of the stand-in, as this machine sees it.
        number: The number of the job.
    """

    def __init__(self, lab: Any, place: Path, number: int = 1) -> None:
        self.lab = lab
        self.number = number
        self.directory = place / str(number)
        self.script = shlex.quote((self.directory / "script").read_text())
        self.starts = 0

    def start(self, hosts: list[str], cpus: int = 1) -> "subprocess.Popen[bytes]":
        r"""Starts the job on hosts, its script on the first, as a job that was requeued if so."""

        environment = {
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOB_NODELIST": ",".join(hosts),
            "SLURM_CPUS_ON_NODE": str(cpus),
            "SLURM_NTASKS": str(len(hosts)),
        }

        if self.starts:
            environment["SLURM_RESTART_COUNT"] = str(self.starts)

        self.starts += 1
        said = " ".join(f"export {key}={x};" for key, x in environment.items())
        words = f"{said} echo $$ > /shared/slurm/{self.number}/pid; exec bash {self.script}"

        return self.lab.start(hosts[0], words, self.log)

    @property
    def log(self) -> Path:
        return self.directory / f"log.{self.starts}"

    def signal(self, host: str, name: str) -> None:
        r"""Sends a signal to the first process of the job, as `--signal=B:` says."""

        self.lab.run(host, f"kill -{name} $(cat /shared/slurm/{self.number}/pid)")

    @property
    def requeued(self) -> bool:
        return (self.directory / "requeued").exists()


def sbatch(place: Path, script: str) -> int:
    number = 1 + sum(x.name.isdigit() for x in place.iterdir())
    (place / str(number)).mkdir()
    (place / str(number) / "script").write_text(os.path.abspath(script))
    print(f"Submitted batch job {number}")

    return 0


def scontrol(place: Path, *words: str) -> int:
    if words[:2] == ("show", "hostnames"):
        print(*words[2].split(","), sep="\n")
        return 0

    assert words[0] == "requeue", words
    (place / words[1] / "requeued").touch()

    return 0


def squeue(place: Path, *words: str) -> int:
    print("RUNNING" if "--format=%T" in words else "1:00:00")

    return 0


def srun(place: Path, *words: str) -> int:
    r"""Runs a command on hosts, by SSH: its variables and standard input are the same on all."""

    given = [word for word in words if word.startswith("--") and "=" in word]
    options = dict(word[2:].split("=", 1) for word in given)
    command = words[max(i for i, word in enumerate(words) if word.startswith("--u")) + 1 :]
    hosts = options["nodelist"].split(",")
    assert int(options["ntasks"]) == int(options["nodes"]) == len(hosts)
    environment = {**os.environ, "SLURM_STEP_ID": "0"}
    own = ("PATH", "PYTHONPATH", "SLURM", "OMP_", "WANDB_")
    said = [f"{key}={shlex.quote(x)}" for key, x in environment.items() if key.startswith(own)]
    remote = f"cd {shlex.quote(os.getcwd())} && exec env {' '.join(said)} {shlex.join(command)}"
    tasks = [subprocess.Popen([*SSH, host, remote], stdin=subprocess.PIPE) for host in hosts]

    def forward() -> None:
        while data := os.read(0, 4096):
            for task in tasks:
                assert task.stdin is not None
                task.stdin.write(data)
                task.stdin.flush()

        for task in tasks:
            assert task.stdin is not None
            task.stdin.close()

    threading.Thread(target=forward, daemon=True).start()

    return max(task.wait() for task in tasks)


if __name__ == "__main__":
    commands: dict[str, Any] = {
        "sbatch": sbatch,
        "srun": srun,
        "scontrol": scontrol,
        "squeue": squeue,
    }
    sys.exit(commands[Path(sys.argv[0]).name](Path(os.environ["SLURM_STAND_IN"]), *sys.argv[1:]))
