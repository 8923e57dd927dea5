r"""The settings of a sweep, apart from CONFIG and SPACE, and what goes together."""

import re
from typing import Any

from ..core.errors import UserError
from ..search.promotion import FINAL

__all__ = ["OBJECTIVES", "PRUNERS", "SAMPLERS", "SETTINGS", "check_settings"]

PRUNERS = ("promotion", *FINAL, "none")
SAMPLERS = ("tpe", "random", "gp", "grid", "nsga2")
OBJECTIVES = ("loss_valid", "parameters", "seconds", "loss_train", "loss_valid_se")
SETTINGS = (
    "seed",
    "sampler",
    "pruner",
    "min_epochs",
    "eta",
    "finalists",
    "objectives",
    "percentile",
    "patience",
)


def check_settings(sweep: Any) -> None:
    r"""Checks the settings of a sweep, apart from CONFIG and SPACE.

    Raises:
        UserError: If anything is wrong with them, or they do not go together.
    """

    if not isinstance(sweep.name, str) or not re.fullmatch(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", sweep.name
    ):
        raise UserError(
            f"the sweep's name is {sweep.name!r}, but must be up to 64 letters, digits, dots, "
            "dashes and underscores, and begin with a letter or digit."
        )

    if sweep.name.endswith(".py"):
        raise UserError(
            f"the sweep's name is {sweep.name!r}, but must not end with .py: `sda-ray sweep "
            f"{sweep.name}` would mean a script."
        )

    least = {"trials": 1, "seed": 0, "eta": 2, "finalists": 0}

    if sweep.min_epochs is not None:
        least["min_epochs"] = 1

    if sweep.patience is not None:
        least["patience"] = 1

    for key, low in least.items():
        value = getattr(sweep, key)

        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise UserError(f"{key} is {value!r}, but must be an integer from {low}.")

    if sweep.patience is not None and sweep.pruner != "patience":
        raise UserError(f"patience is {sweep.patience}, but only pruner='patience' takes it.")

    _check_percentile(sweep)
    _check_methods(sweep)
    _check_objectives(sweep)


def _check_percentile(sweep: Any) -> None:
    value: Any = sweep.percentile
    number = isinstance(value, int | float) and not isinstance(value, bool)

    if not number or not 0 < value < 100:
        raise UserError(f"percentile is {value!r}, but must be a number between 0 and 100.")

    if value != 25 and sweep.pruner != "percentile":
        raise UserError(f"percentile is {value}, but only pruner='percentile' takes it.")


def _check_methods(sweep: Any) -> None:
    for key, options in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        value = getattr(sweep, key)

        if value not in options:
            why = ""

            if key == "sampler" and str(value).lower().startswith("cma"):
                why = (
                    " CMA-ES is left out: Optuna's keeps its state in the study as a pickle, "
                    "and who may write a study could run code where it is read."
                )

            raise UserError(f"{key} is {value!r}, but must be one of {', '.join(options)}.{why}")

    if sweep.sampler == "gp" and sweep.pruner != "none":
        raise UserError(
            f"sampler is 'gp', which learns from complete trials alone, and pruner is "
            f"{sweep.pruner!r}. Take pruner='none', or sampler='tpe'."
        )


def _check_objectives(sweep: Any) -> None:
    names: Any = sweep.objectives
    accepted = ", ".join(OBJECTIVES[1:])

    if not isinstance(names, tuple) or not names or names[0] != OBJECTIVES[0]:
        raise UserError(
            f"objectives is {names!r}, but must be a tuple that begins with 'loss_valid'; "
            f"after it may come {accepted}."
        )

    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"objectives has {name!r}, but may have loss_valid, {accepted}.")

        if names.count(name) > 1:
            raise UserError(f"objectives has {name!r} twice, but may have it once.")

    if len(names) > 1 and sweep.pruner != "none":
        raise UserError(
            f"pruner is {sweep.pruner!r}, but trials with several objectives can only be "
            "compared at their end. Leave the pruner out, or take pruner='none'."
        )

    if len(names) == 1 and sweep.sampler == "nsga2":
        raise UserError("sampler is 'nsga2', which is for several objectives. Take 'tpe'.")
