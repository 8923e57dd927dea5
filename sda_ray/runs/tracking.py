r"""What W&B is told of a run. Nothing else that trains imports wandb.

W&B never stands in the way: whatever fails here is a warning, and the training goes on.
`metrics.jsonl` is the truth.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.patches import replaced
from ..core.config import Config
from ..core.errors import UserError

__all__ = ["PRIVATE", "Tracker", "Wandb", "own_environment", "safe_name"]

logger = logging.getLogger(__name__)

PATIENCE = 7.5  # seconds that W&B may take to begin, and to end

# Where W&B's server is, and who asks. What a run is called and where it goes, we say ourselves.
CONNECTION = (
    "WANDB_API_KEY",
    "WANDB_APP_URL",
    "WANDB_BASE_URL",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_CREDENTIALS_FILE",
    "WANDB_DATA_DIR",
    "WANDB_HTTP_TIMEOUT",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_INSECURE_DISABLE_SSL",
)


# What W&B is not told: code, what is installed, command lines, variables of Slurm
PRIVATE: dict[str, Any] = {
    "disable_git": True,
    "disable_code": True,
    "save_code": False,  # else the account's setting decides
    "x_disable_meta": True,
    "x_save_requirements": False,
}


@dataclass(frozen=True)
class Wandb:
    r"""Creates the W&B settings of a run. Offline needs no account and no network."""

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
        r"""Returns settings: options first, then the variables `WANDB_*`, then the defaults."""

        env = os.environ.get
        mode = mode or env("WANDB_MODE") or "offline"
        labels = tags or env("WANDB_TAGS") or ""

        if mode not in ("online", "offline", "disabled"):
            raise UserError(f"W&B's mode is '{mode}', but must be online, offline or disabled.")

        project = project or env("WANDB_PROJECT") or "sda-kolmogorov"

        if set(project) & set("/\\#?%:"):
            raise UserError(f"W&B's project is '{project}', but must have none of / \\ # ? % :")

        return Wandb(
            mode,
            project,
            entity or env("WANDB_ENTITY") or None,
            tuple(tag.strip() for tag in labels.split(",") if tag.strip()),
        )

    @staticmethod
    def from_record(kept: Any, file: Path) -> "Wandb":
        r"""Returns the settings that a file, which may be damaged, says that a run has."""

        kept = kept if isinstance(kept, dict) else {}

        try:
            made = Wandb(**kept | {"tags": tuple(kept.get("tags") or ())})
            words = (made.mode, made.project, made.job_type, made.entity or "", made.group or "")
            "".join([*words, *made.tags])
            return made
        except TypeError:
            raise UserError(f"{file} is damaged: its entry 'wandb' makes no sense.")


def safe_name(name: str) -> str:
    r"""Returns a name given by a server as it may stand in a path."""

    allowed = (c if (c.isascii() and c.isalnum()) or c in "-." else "-" for c in name)
    return "".join(allowed).lstrip(".")[:128] or "run"


class Tracker:
    r"""Creates a W&B run, or goes on with it; offline, if the server does not answer.

    Its `failed` tells why the server, if it was wanted, could not be used, or not to the end.

    Arguments:
        directory: Where W&B puts its own files, in `wandb/`.
        id: The id of the run.
        name: The name of the run.
        config: The config of the run, see :func:`sda_ray.runs.record.logged_config`.
        wandb: The settings.
        named: Whether the run has its name already. Otherwise the server gives it one.
    """

    def __init__(
        self, directory: Path, id: str, name: str, config: Config, wandb: Wandb, named: bool = True
    ) -> None:
        self._run: Any = None
        self.name = name
        self.failed = ""

        if wandb.mode == "disabled":
            return

        try:
            given = name if named or wandb.mode == "offline" else None
            self._run = _init(directory, id, given, config, wandb, wandb.mode)
            self.name = self._run.name or name
        except Exception as error:  # a dead server, a bad key
            logger.warning("W&B cannot be used: %s", error)

            if wandb.mode == "online":
                self.failed = _words(error)
                self._retreat(directory, id, config, wandb)

    def _retreat(self, directory: Path, id: str, config: Config, wandb: Wandb) -> None:
        import wandb as client

        try:
            client.teardown()  # else the next one waits for the dead server, too
            self._run = _init(directory, id, self.name, config, wandb, "offline")
            logger.warning("The run goes on offline.")
        except Exception as error:
            logger.warning("W&B cannot be used offline either: %s", error)

    @property
    def writes(self) -> bool:
        r"""Whether W&B writes to its directory."""

        return self._run is not None

    @property
    def next_step(self) -> float:
        r"""The first step that the server has not got; without a server, none is missing."""

        online = self._run is not None and not self._run.offline
        return self._run.starting_step if online else float("inf")

    def log(self, values: dict[str, Any], step: int) -> None:
        r"""Sends the values of a step. Steps must grow."""

        if self._run is None:
            return

        try:
            self._run.log(values, step=step, commit=True)
        except Exception as error:
            logger.warning("W&B has failed (%s). The run goes on without it.", error)
            self.failed = self.failed or ("" if self._run.offline else _words(error))
            self._run = None

    def log_image(self, key: str, file: Path, step: int) -> None:
        r"""Sends a picture."""

        if self._run is not None:
            import wandb

            # Else it loads pandas, to find that the picture is no table
            with _spared(sys.modules.get("wandb.util"), pd_available=False):
                self.log({key: wandb.Image(str(file))}, step)

    def finish(self, good: bool = True) -> Path | None:
        r"""Ends the W&B run, within seconds. Safe to repeat.

        Returns:
            The log whose end is on its way to the disk, see :func:`sda_ray.runs.fragments.await_end`.
        """

        run, self._run = self._run, None

        if run is None:
            return None

        online, start = not run.offline, time.monotonic()

        try:
            run.finish(exit_code=0 if good else 1)

            # wandb 0.31 gives up silently
            if online and time.monotonic() - start > 0.9 * PATIENCE:
                self.failed = self.failed or "it does not take the end of a run"
        except Exception as error:
            logger.warning("W&B has not ended well: %s", error)
            self.failed = self.failed or (_words(error) if online else "")
            return None

        return None if online else Path(run.settings.sync_file)


def _words(error: Exception) -> str:
    r"""Returns an error in one line that is not too long."""

    return " ".join(str(error).split())[:300] or type(error).__name__


def _init(
    directory: Path, id: str, name: str | None, config: Config, wandb: Wandb, mode: str
) -> Any:
    import wandb as client

    settings = client.Settings(
        init_timeout=PATIENCE,
        finish_timeout=PATIENCE,
        silent=True,
        console="off",
        **PRIVATE,
        reinit="create_new",  # the default returns a run that was not finished
        x_transaction_log_flush_interval=1.0,  # a kill loses 1 s of rows, not 15
    )

    # Else it looks for another config of W&B Launch, and loads a third of wandb for that
    spared = _spared(client.Run, _detect_and_apply_job_inputs=lambda run: None)

    with own_environment(), spared:
        return client.init(
            mode=mode,  # type: ignore[arg-type]
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
            settings=settings,
        )


def _spared(owner: Any, **attributes: Any) -> AbstractContextManager[None]:
    r"""Replaces what costs seconds in wandb 0.31 and is of no use, as far as wandb has it."""

    return replaced(owner, **{name: x for name, x in attributes.items() if hasattr(owner, name)})


@contextmanager
def own_environment() -> Iterator[None]:
    r"""Hides the variables by which W&B would give this run another id, name, group or sweep."""

    hidden = {k: v for k, v in os.environ.items() if k.startswith("WANDB_")}

    for key in hidden.keys() - set(CONNECTION):
        del os.environ[key]

    # wandb 0.31 reports on itself when a process ends, for up to 22 s if the server is ill
    os.environ["WANDB_ERROR_REPORTING"] = "false"

    try:
        yield
    finally:
        for key, value in hidden.items():
            os.environ.setdefault(key, value)

        atexit.register(_limit_ending)  # after wandb's own, and so called before it


def _limit_ending() -> None:
    r"""Lets wandb's service end within seconds: wandb 0.31 waits for it for ever.

    With a server that accepts and never answers, a service now and then does not end.
    """

    timer = threading.Timer(PATIENCE, _kill_services)
    timer.daemon = True
    timer.start()


def _kill_services() -> None:
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = file.read_text(errors="replace").partition("(")[2].rpartition(")")

            if name == "wandb-core" and int(rest.split()[1]) == os.getpid():
                os.kill(int(file.parent.name), signal.SIGKILL)
