r"""The definition of a sweep: a name, a CONFIG, a SPACE and a few settings, made in a script."""

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .archive import definition_of
from .config import Config, check_config
from .data import DataInfo
from .errors import UserError
from .pruner import Rules
from .space import Space, check_space, draw

__all__ = ["SETTINGS", "Sweep", "load_script"]

PRUNERS = ("promotion", "none")
SAMPLERS = ("tpe", "random", "grid")
SETTINGS = ("seed", "sampler", "pruner", "min_epochs", "eta", "finalists")


@dataclass(frozen=True)
class Sweep:
    r"""Creates a sweep.

    Arguments:
        name: The name of its record and of its group on W&B.
        config: The CONFIG of all trials.
        space: The keys of CONFIG that vary, see :mod:`sda_ray.space`.
        trials: The number of trials wanted.
        seed: The seed of all draws. That of the trainings is CONFIG's.
        sampler: `tpe`, `random` or `grid` (all combinations of options, in order).
        pruner: `promotion`, see :mod:`sda_ray.pruner`, or `none`.
        min_epochs: The first rung. By default `epochs` over the third power of `eta`.
        eta: One in `eta` trials goes on at each rung.
        finalists: The least number of trials that get the full number of epochs.
        script: The file that the sweep was made in.
    """

    name: str
    config: Config
    space: Space
    trials: int = 16
    seed: int = 0
    sampler: str = "tpe"
    pruner: str = "promotion"
    min_epochs: int | None = None
    eta: int = 3
    finalists: int = 1
    script: Path | None = None

    def check(self, data: DataInfo | None = None) -> "Sweep":
        r"""Returns the sweep in its normal form.

        Raises:
            UserError: If anything is wrong with it, or does not fit the data.
        """

        self._check_settings()

        known = {} if data is None else {"size": data.size, "length": data.length}
        config = check_config(self.config, **known)
        first = self.min_epochs

        if self.pruner == "promotion" and first is None:
            first = max(1, config["epochs"] // self.eta**3)

        if first is not None and first > config["epochs"]:
            raise UserError(
                f"min_epochs is {first}, but must be at most epochs (={config['epochs']})."
            )

        space = check_space(self.space, config, **known, pruner=self.pruner)
        checked = replace(self, config=config, space=space, min_epochs=first)
        checked._try_draws(known)

        return checked

    def _check_settings(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(
            r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name
        ):
            raise UserError(
                f"the sweep's name is {self.name!r}, but must be up to 64 letters, digits, dots, "
                "dashes and underscores, and begin with a letter or digit."
            )

        least = {"trials": 1, "seed": 0, "eta": 2, "finalists": 0}

        if self.min_epochs is not None:
            least["min_epochs"] = 1

        for key, low in least.items():
            value = getattr(self, key)

            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"{key} is {value!r}, but must be an integer from {low}.")

        for key, options in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, key) not in options:
                raise UserError(
                    f"{key} is {getattr(self, key)!r}, but must be one of {', '.join(options)}."
                )

    def _try_draws(self, known: dict[str, int]) -> None:
        r"""Tries what only a draw can tell: what functions return, and what a grid is made of."""

        if not callable(self.space) and self.sampler != "grid":
            return

        from .sampler import propose, sample

        try:
            if self.sampler == "grid":
                propose(self.draw, (), sampler="grid")

            for values in sample(self.draw, count=32 if callable(self.space) else 0):
                check_config(self.config | values, **known)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"SPACE cannot be drawn from: {type(error).__name__}: {error}."
            ) from error

    def draw(self, trial: Any) -> Config:
        r"""Returns values for the keys of SPACE, as an Optuna trial suggests them."""

        return draw(self.space, trial, self.pruner)

    @property
    def rules(self) -> Rules:
        first = self.min_epochs if self.pruner == "promotion" else None

        return Rules(self.trials, self.config["epochs"], first, self.eta, self.finalists)

    def definition(self) -> dict[str, Any]:
        r"""Returns what makes the sweep this one, as JSON. The number of trials is not part."""

        return definition_of(
            self.config, self.space, **{key: getattr(self, key) for key in SETTINGS}
        )


def load_script(script: Path) -> Sweep:
    r"""Returns the sweep that a script defines.

    Raises:
        UserError: If there is no such script, or not exactly one sweep in it.
    """

    if not script.is_file():
        raise UserError(f"there is no sweep script {script}.")

    spec = importlib.util.spec_from_file_location("sda_ray_sweep", script)

    if spec is None or spec.loader is None:
        raise UserError(f"{script} is no Python script: its name must end with .py.")

    module = importlib.util.module_from_spec(spec)

    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{script} cannot be run: {type(error).__name__}: {error}.") from error

    sweeps = [x for x in vars(module).values() if isinstance(x, Sweep)]

    if len(sweeps) != 1:
        raise UserError(f"{script} defines {len(sweeps)} sweeps, but must define one.")

    return replace(sweeps[0], script=script)
