r"""Processes in namespaces of their own, with what Linux offers and nothing else.

Nothing is pinned in /run/netns, and nothing is mounted outside: with the first process of a
namespace, the kernel ends all others in it and removes its mounts and links.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["end", "enter", "is_alive", "run", "serve_host", "serve_switch", "spawn"]

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
ALL = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
PR_SET_NAME = 15
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

SSHD = """PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
UseDNS no
StrictModes no
MaxStartups 100
MaxSessions 100
PrintMotd no
Subsystem sftp internal-sftp
"""

Process = dict[str, Any]  # `pid` and `start`, in ticks: together, the identity of a process

libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str, **options: Any) -> "subprocess.CompletedProcess[Any]":
    return subprocess.run(command, check=True, **options)


def enter(process: Process, *command: str, network: bool = False) -> list[str]:
    r"""Returns the command that runs another in the namespaces of a process, or in its network."""

    which = ["-n"] if network else ["-m", "-p", "-n", "-u", "-i"]

    return ["nsenter", "-t", str(process["pid"]), *which, "--", *command]


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(process: Process | None) -> bool:
    stat = _stat(process["pid"]) if process else []

    return bool(process and stat and stat[19] == process["start"] and stat[0] not in "ZX")


def end(process: Process | None) -> None:
    r"""Kills the first process of a namespace, and with it all others there."""

    if process is None or not is_alive(process):
        return

    os.kill(process["pid"], signal.SIGKILL)
    until = time.monotonic() + 20

    while is_alive(process) and time.monotonic() < until:
        time.sleep(0.02)


def spawn(
    name: str, log: Path, main: Callable[[int], None], switch: Process | None = None
) -> tuple[Process, int]:
    r"""Runs a function as the first process of new namespaces, detached from this one.

    Arguments:
        name: What the process is called.
        log: The file that takes what it says.
        main: Given a descriptor from which a byte can be read once all is set up for it.
        switch: A process from whose mounts to start.

    Returns:
        The process, and the descriptor to which to write that byte.
    """

    said, say = os.pipe()
    wait, go = os.pipe()

    if (pid := os.fork()) == 0:
        os.close(said)
        os.close(go)

        try:
            _isolate(name, log, say, switch)
            main(wait)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    os.close(say)
    os.close(wait)
    os.waitpid(pid, 0)
    text = os.read(said, 32)
    os.close(said)

    if not text:
        raise SystemExit(f"hosts: could not start {name}: root and namespaces are needed")

    return {"pid": int(text), "start": _stat(int(text))[19]}, go


def _isolate(name: str, log: Path, say: int, switch: Process | None) -> None:
    r"""Moves on into new namespaces, as a child which is the first process there."""

    os.setsid()

    if switch is not None:  # the disks of all hosts are mounted there
        mounts = os.open(f"/proc/{switch['pid']}/ns/mnt", os.O_RDONLY)
        _check(libc.setns(mounts, CLONE_NEWNS), "setns")
        os.close(mounts)

    _check(libc.unshare(ALL), "unshare")

    if child := os.fork():
        os.write(say, str(child).encode())
        os._exit(0)

    os.close(say)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def _check(code: int, what: str) -> None:
    if code != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _reap() -> NoReturn:
    r"""Does what a first process must: it collects orphans, as Ray's daemons are."""

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})

    while True:
        found = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, 5)

        if found and found.si_signo == signal.SIGTERM:
            os._exit(0)

        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def serve_switch(state: Path) -> None:
    r"""Is what connects the hosts, and keeps their disks, which nobody else sees."""

    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "br0", "type", "bridge")
    run("ip", "link", "set", "br0", "up")
    run("mount", "--make-rprivate", "/")
    (state / "mnt").mkdir()
    _mount("tmpfs", state / "mnt", "-t", "tmpfs", "-o", "size=4g,mode=755")
    (state / "switch.ready").touch()
    _reap()


def serve_host(
    state: Path,
    name: str,
    ip: str,
    hosts: dict[str, str],
    binds: Sequence[tuple[str, bool]],
    tmp: Path,
) -> None:
    r"""Is a host: a network card, a disk, and sshd.

    Arguments:
        state: The directory of all hosts.
        name: Its name.
        ip: Its address.
        hosts: The addresses of all hosts, by name.
        binds: Directories that it sees at their own path, and whether it may only read them.
        tmp: What is its `/tmp`.
    """

    socket.sethostname(name)
    run("ip", "link", "set", "lo", "up")
    run("ip", "addr", "add", f"{ip}/24", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    run("mount", "--make-rprivate", "/")
    base = state / "mnt" / name
    fresh = not base.exists()
    root = _make_root(base)
    _bind(root, [(str(state / "shared"), "/shared", False), *((p, p, ro) for p, ro in binds)], tmp)
    _make_etc(root, name, hosts, fresh)

    if fresh:  # an empty home: no file of the machine's, such as a token, leaks in
        _make_home(root / "root", state)

    os.chdir(root)
    run("pivot_root", ".", ".")
    run("umount", "-l", ".")
    os.chroot(".")
    os.chdir("/")
    os.environ.clear()
    os.environ.update(PATH=PATH, HOME="/root", LANG="C.UTF-8")
    run("ssh-keygen", "-A", stdout=subprocess.DEVNULL)
    subprocess.Popen(["/usr/sbin/sshd", "-D", "-e"])
    _reap()


def _mount(source: str, target: Path | str, *options: str) -> None:
    run("mount", *options, source, str(target))


def _make_root(base: Path) -> Path:
    r"""Mounts a copy-on-write copy of the machine's root, with devices of its own."""

    root = base / "root"

    for part in ("upper", "work", "root", "home"):
        (base / part).mkdir(parents=True, exist_ok=True)

    layers = f"lowerdir=/,upperdir={base}/upper,workdir={base}/work"
    _mount("overlay", root, "-t", "overlay", "-o", layers)
    _mount("tmpfs", root / "dev", "-t", "tmpfs", "-o", "mode=755,size=1m")

    for device in DEVICES:
        (root / "dev" / device).touch()
        _mount(f"/dev/{device}", root / "dev" / device, "--bind")

    (root / "dev/pts").mkdir()
    (root / "dev/shm").mkdir()
    options = "newinstance,ptmxmode=0666,mode=620"
    _mount("devpts", root / "dev/pts", "-t", "devpts", "-o", options)
    _mount("tmpfs", root / "dev/shm", "-t", "tmpfs", "-o", "mode=1777,size=1g")
    os.symlink("pts/ptmx", root / "dev/ptmx")
    os.symlink("/proc/self/fd", root / "dev/fd")

    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", root / "dev" / stream)

    _mount("tmpfs", root / "run", "-t", "tmpfs", "-o", "mode=755,size=64m")
    (root / "run/sshd").mkdir()
    (base / "home").chmod(0o700)
    _mount(str(base / "home"), root / "root", "--bind")
    _mount("proc", root / "proc", "-t", "proc")
    _mount("sysfs", root / "sys", "-t", "sysfs", "-o", "ro")

    return root


def _bind(root: Path, binds: Sequence[tuple[str, str, bool]], tmp: Path) -> None:
    r"""Mounts directories. All are opened before the first, which may hide others."""

    opened = [(os.open(source, os.O_PATH), target, ro) for source, target, ro in binds]
    _mount(str(tmp), root / "tmp", "--bind")

    for descriptor, target, ro in opened:
        place = Path(f"{root}{target}")
        place.mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", f"/proc/self/fd/{descriptor}", str(place), pass_fds=(descriptor,))
        os.close(descriptor)

        if ro:
            run("mount", "-o", "remount,bind,ro", str(place))


def _make_etc(root: Path, name: str, hosts: dict[str, str], fresh: bool) -> None:
    etc = root / "etc"
    lines = ["127.0.0.1 localhost", *(f"{ip} {other}" for other, ip in hosts.items())]
    (etc / "hostname").write_text(f"{name}\n")
    (etc / "hosts").write_text("\n".join(lines) + "\n")
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").write_text("options timeout:1 attempts:1\n")  # there is no name server
    (etc / "ssh/sshd_config").write_text(SSHD)

    for key in (etc / "ssh").glob("ssh_host_*") if fresh else ():
        key.unlink()


def _make_home(home: Path, state: Path) -> None:
    (home / ".ssh").mkdir(mode=0o700)

    for file in ("id_ed25519", "id_ed25519.pub"):
        shutil.copy(state / file, home / ".ssh" / file)

    shutil.copy(state / "id_ed25519.pub", home / ".ssh/authorized_keys")
    (home / ".profile").write_text("if [ -f ~/.bashrc ]; then . ~/.bashrc; fi\n")
    (home / ".bashrc").write_text("# of a test host\n")
