r"""The W&B client of a run. No other module that trains imports wandb.

W&B never stops a training: any failure here is a warning. `metrics.jsonl` is the truth, and is
replayed above the server's last step.
"""

import atexit
import configparser
import logging
import netrc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import msgspec

from ..core import Config, UserError

logger = logging.getLogger(__name__)

PATIENCE = 7.5  # seconds that W&B may take to start, and to finish

MAX_TAG, MAX_PROJECT = 64, 128  # characters that W&B takes

# The variables that W&B may see: a run has its own name and place
LOCAL = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING")
SERVER = (  # and the account, which do not concern a run offline
    "WANDB_API_KEY",
    "WANDB_APP_URL",
    "WANDB_BASE_URL",
    "WANDB_CREDENTIALS_FILE",
    "WANDB_HTTP_TIMEOUT",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_INSECURE_DISABLE_SSL",
)


@dataclass(frozen=True)
class Wandb:
    r"""The W&B settings of a run. Offline needs no account and no network."""

    mode: str = "offline"
    project: str = "sda-kolmogorov"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None
    job_type: str = "train"

    @staticmethod
    def from_options(
        mode: str | None = None,
        project: str | None = None,
        entity: str | None = None,
        tags: str | None = None,
    ) -> "Wandb":
        r"""Returns settings from options, else the variables `WANDB_*`, else the defaults."""

        env = os.environ.get
        mode = mode or env("WANDB_MODE") or "offline"
        words = (tags or env("WANDB_TAGS") or "").split(",")
        labels = tuple(word.strip() for word in words if word.strip())

        if mode not in ("online", "offline", "disabled"):
            raise UserError(f"W&B's mode is '{mode}', but must be online, offline or disabled.")

        project = project or env("WANDB_PROJECT") or "sda-kolmogorov"

        if set(project) & set("/\\#?%:"):
            raise UserError(f"W&B's project is '{project}', but must have none of / \\ # ? % :")

        for what, limit, texts in (("project", MAX_PROJECT, [project]), ("tag", MAX_TAG, labels)):
            if long := [text for text in texts if len(text) > limit]:
                raise UserError(
                    f"W&B's {what} '{long[0]}' has {len(long[0])} characters, but must have at "
                    f"most {limit}."
                )

        return Wandb(mode, project, entity or env("WANDB_ENTITY") or None, labels)

    @staticmethod
    def from_record(entry: Any, file: Path) -> "Wandb":
        r"""Returns the settings in the entry `wandb` of a file, which may be damaged."""

        entry = entry if isinstance(entry, dict) else {}

        try:
            wandb = Wandb(**entry | {"tags": tuple(entry.get("tags") or ())})
            return msgspec.convert(asdict(wandb), Wandb)
        except (TypeError, msgspec.ValidationError) as error:
            raise UserError(f"{file} is damaged: its entry 'wandb': {error}.") from error


def safe_name(name: str) -> str:
    r"""Returns a name that a server chose, reduced to what may stand in a path."""

    allowed = (c if (c.isascii() and c.isalnum()) or c in "-." else "-" for c in name)
    return "".join(allowed).lstrip(".")[:128] or "run"


class Tracker:
    r"""The W&B run of a training: a new one, or one that is resumed.

    If the server does not answer, it is offline. Its `failed` says why a server that was asked for
    could not be used, or not to the end; its `missing`, why nothing, or no more, is written at all.
    A run that is not `named` yet is named by the server.
    """

    def __init__(
        self, directory: Path, id: str, name: str, config: Config, wandb: Wandb, named: bool = True
    ) -> None:
        self._run: Any = None
        self.name = name
        self.failed = self.missing = ""

        modes = () if wandb.mode == "disabled" else dict.fromkeys((wandb.mode, "offline"))

        for mode in modes:
            try:
                if self.failed:
                    logger.warning("The run continues offline.")
                    _end_service()  # otherwise the next run waits for the dead server, too

                given = name if named or mode == "offline" else None
                self._run = start_run(directory, id, given, config, replace(wandb, mode=mode))
                self.name = self._run.name or name
                self.missing = ""
                break
            except Exception as error:  # a dead server, a bad key
                logger.warning("W&B cannot be used: %s", error)
                self.missing = summary(error)
                self.failed = self.failed or (self.missing if mode == "online" else "")

    @property
    def writes(self) -> bool:
        return self._run is not None

    @property
    def next_step(self) -> float:
        r"""The first step that the server lacks; infinity without a server."""

        online = self._run is not None and not self._run.offline
        return self._run.starting_step if online else float("inf")

    def log(self, values: dict[str, Any], step: int) -> None:
        r"""Sends the values of a step. Steps must increase."""

        if self._run is None:
            return

        try:
            self._run.log(values, step=step, commit=True)
        except Exception as error:
            logger.warning("W&B has failed (%s). The run continues without it.", error)
            self.missing = summary(error)
            self.failed = self.failed or ("" if self._run.offline else self.missing)
            self._run = None

    def log_image(self, key: str, file: Path, step: int) -> None:
        if self._run is not None:
            from wandb import Image

            self.log({key: Image(str(file))}, step)

    def finish(self, good: bool = True) -> None:
        r"""Finishes the W&B run within seconds. Safe to repeat."""

        run, self._run = self._run, None

        if run is None:
            return

        online, start = not run.offline, time.monotonic()

        try:
            run.finish(exit_code=0 if good else 1)

            # wandb 0.31 gives up silently
            if online and time.monotonic() - start > 0.9 * PATIENCE:
                self.failed = self.failed or "it does not take the end of a run"
        except Exception as error:
            logger.warning("W&B has not finished cleanly: %s", error)
            self.failed = self.failed or (summary(error) if online else "")


def summary(error: Exception) -> str:
    r"""Returns an error as one line of limited length."""

    return " ".join(str(error).split())[:300] or type(error).__name__


def start_run(
    directory: Path | str,
    id: str,
    name: str | None,
    config: Config,
    wandb: Wandb,
    patience: float = PATIENCE,
    stats: bool = True,
) -> Any:
    r"""Starts or resumes a W&B run that prints nothing and starts and ends within seconds.

    Neither code nor installed packages, command lines or the variables of Slurm are sent. The
    server names a run without a name. Its end may take `patience` seconds.
    """

    import wandb as client

    with own_environment(wandb.mode == "offline"):
        return client.init(
            mode=wandb.mode,  # type: ignore[arg-type]
            dir=directory,
            project=wandb.project,
            entity=wandb.entity,
            id=id,
            name=name,
            resume="allow",
            config=config,
            tags=wandb.tags,
            group=wandb.group,
            job_type=wandb.job_type,
            settings=client.Settings(
                init_timeout=PATIENCE,
                finish_timeout=patience,
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,  # otherwise the account's setting decides
                x_disable_meta=True,
                x_disable_stats=not stats,
                x_save_requirements=False,
                x_transaction_log_flush_interval=1.0,  # a kill loses 1 s of rows, not 15
                reinit="create_new",  # the default returns a run that was not finished
            ),
        )


@contextmanager
def own_environment(offline: bool = False) -> Iterator[None]:
    r"""Hides the variables by which W&B would give this run another id, name, group or sweep.

    So are empty ones and, offline, those about the server: W&B refuses to start if one is malformed.
    """

    before = {k: v for k, v in os.environ.items() if k.startswith("WANDB_")}
    kept = LOCAL if offline else LOCAL + SERVER

    for key, value in before.items():
        if key in kept and value.strip():
            os.environ[key] = value.strip()  # a key from a file often ends with its line
        else:
            del os.environ[key]

    # wandb 0.31 reports its errors when a process ends, for up to 22 s if the server hangs
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

    try:
        yield
    finally:
        os.environ.update(before)
        atexit.register(_limit_service)  # after wandb's own handler, and so called before it


def _end_service() -> None:
    import wandb

    timer = _limit_service()

    with suppress(SystemExit):  # wandb exits with the code of a service that was killed
        wandb.teardown()

    timer.cancel()


def _limit_service() -> threading.Timer:
    r"""Makes wandb's service end within seconds: wandb 0.31 waits for it without a limit.

    With a server that accepts and never answers, the service sometimes does not end.
    """

    timer = threading.Timer(PATIENCE, _kill_services)
    timer.daemon = True
    timer.start()

    return timer


def _kill_services() -> None:
    import psutil

    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if process.name() == "wandb-core":
                process.kill()


# The account


def wandb_faults(wandb: Wandb) -> Iterator[str]:
    r"""Yields that W&B needs a key, or a token, and there is none, if so."""

    key, token = (os.environ.get(f"WANDB_{x}") for x in ("API_KEY", "IDENTITY_TOKEN_FILE"))

    if wandb.mode != "online":
        return

    if token and not Path(token).is_file():
        yield f"WANDB_IDENTITY_TOKEN_FILE is '{token}', but there is no such file."

    if key or token:
        return

    host = urlparse(wandb_server()).netloc  # with the port, as `wandb login` writes it
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()

    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(str(file)).authenticators(host):
            return

    yield (
        f"W&B is to be used online, but there is no key for {host}, neither in WANDB_API_KEY nor "
        f"in {file}. Do `wandb login`, or leave --wandb online out and `sda-ray sync` later."
    )


def wandb_server() -> str:
    r"""Returns the address of W&B's server: $WANDB_BASE_URL, or that of `wandb login --host`."""

    directory = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)

    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(directory / "settings")

    noted = settings.get("default", "base_url", fallback="https://api.wandb.ai")

    return os.environ.get("WANDB_BASE_URL") or noted
