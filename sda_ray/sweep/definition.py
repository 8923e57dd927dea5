r"""The definition of a sweep: a name, a CONFIG, a SPACE and a few settings, made in a script."""

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import (
    Config,
    Space,
    UserError,
    check_config,
    check_space,
    check_value,
    draw_values,
    split_group,
)
from ..data import DataInfo
from ..search import FINAL, PruneRule, Rules, TrialRecord
from .record import definition_of

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

__all__ = [
    "OBJECTIVES",
    "PRUNERS",
    "SAMPLERS",
    "SETTINGS",
    "Sweep",
    "load_script",
]

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


def _setting_faults(sweep: Any) -> Iterator[str]:
    r"""Yields what is wrong with the settings of a sweep, apart from CONFIG and SPACE."""

    name = sweep.name

    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        yield (
            f"the sweep's name is {name!r}, but must be up to 64 letters, digits, dots, "
            "dashes and underscores, and begin with a letter or digit."
        )
    elif name.endswith(".py"):
        yield (
            f"the sweep's name is {name!r}, but must not end with .py: `sda-ray sweep {name}` "
            "would mean a script."
        )

    least = {"trials": 1, "seed": 0, "eta": 2, "finalists": 0, "min_epochs": 1, "patience": 1}

    for key, low in least.items():
        value = getattr(sweep, key)

        if value is None and key in ("min_epochs", "patience"):
            continue

        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            yield f"{key} is {value!r}, but must be an integer from {low}."

    percentile: Any = sweep.percentile
    number = isinstance(percentile, int | float) and not isinstance(percentile, bool)

    if not number or not 0 < percentile < 100:
        yield f"percentile is {percentile!r}, but must be a number between 0 and 100."
    elif percentile != 25 and sweep.pruner != "percentile":
        yield f"percentile is {percentile}, but only pruner='percentile' takes it."

    if sweep.patience is not None and sweep.pruner != "patience":
        yield f"patience is {sweep.patience}, but only pruner='patience' takes it."

    yield from _method_faults(sweep)
    yield from _objective_faults(sweep)


def _method_faults(sweep: Any) -> Iterator[str]:
    for key, options in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        value = getattr(sweep, key)

        if (isinstance(value, str) or not _is_method(key, value)) and value not in options:
            why = ""

            if key == "sampler" and str(value).lower().startswith("cma"):
                why = (
                    " CMA-ES is left out: Optuna's keeps its state in the study as a pickle, "
                    "and who may write a study could run code where it is read."
                )

            other = {"sampler": "a function of a seed", "pruner": "an Optuna pruner"}[key]
            yield f"{key} is {value!r}, but must be one of {', '.join(options)}, or {other}.{why}"

    if sweep.sampler == "gp" and sweep.pruner != "none":
        yield (
            f"sampler is 'gp', which learns from complete trials alone, and pruner is "
            f"{sweep.pruner!r}. Take pruner='none', or sampler='tpe'."
        )


def _objective_faults(sweep: Any) -> Iterator[str]:
    names: Any = sweep.objectives
    accepted = ", ".join(OBJECTIVES[1:])

    if not isinstance(names, tuple) or not names or names[0] != OBJECTIVES[0]:
        yield (
            f"objectives is {names!r}, but must be a tuple that begins with 'loss_valid'; "
            f"after it may come {accepted}."
        )
        return

    for name in dict.fromkeys(names):
        if name not in OBJECTIVES:
            yield f"objectives has {name!r}, but may have loss_valid, {accepted}."
        elif names.count(name) > 1:
            yield f"objectives has {name!r} twice, but may have it once."

    if len(names) > 1 and sweep.pruner != "none":
        yield (
            f"pruner is {sweep.pruner!r}, but trials with several objectives can only be "
            "compared at their end. Leave the pruner out, or take pruner='none'."
        )

    if len(names) == 1 and sweep.sampler == "nsga2":
        yield "sampler is 'nsga2', which is for several objectives. Take 'tpe'."


def _is_method(key: str, value: Any) -> bool:
    from optuna.pruners import BasePruner

    return callable(value) if key == "sampler" else isinstance(value, BasePruner)


def _method(method: Any) -> str:
    r"""Returns a sampler or pruner as it is recorded: an object by its class and parameters."""

    if isinstance(method, str):
        return method

    from ..search import method_text

    return method_text(method(0) if callable(method) else method)


@dataclass(frozen=True)
class Sweep:
    r"""A sweep: a name, a CONFIG, a SPACE and settings.

    Arguments:
        name: The name of its record and of its group on W&B.
        config: The CONFIG of all trials.
        space: The keys of CONFIG that vary, see :mod:`sda_ray.core.space`.
        trials: The number of trials wanted.
        seed: The seed of all draws. That of the trainings is CONFIG's.
        sampler: `tpe`, `random`, `gp` (a Gaussian process), `grid` (all combinations of options) or
            `nsga2`; or a function of a seed that returns an Optuna sampler, which is called for
            each draw. By default `tpe`, and `nsga2` for several objectives.
        pruner: The rule that stops trials early. `promotion`, see :mod:`sda_ray.search.promotion`; by final
            verdicts `median`, `percentile`, `patience`, `hyperband` or any Optuna pruner, see
            :mod:`sda_ray.search.pruners`; or `none`. By default `promotion`, and `none` for several
            objectives.
        min_epochs: The first rung; for `median`, `percentile`, `patience` and pruners of Optuna the
            distance of all rungs. By default `epochs` over the third power of `eta`.
        eta: One in `eta` trials is promoted at each rung.
        finalists: The least number of trials that get the full number of epochs.
        objectives: The metrics to minimise: `loss_valid` and, after it, any of `parameters`, `seconds`
            (of training), `loss_train` and `loss_valid_se`.
        percentile: The share of trials, in percent, that `pruner="percentile"` lets continue.
        patience: The epochs without a new best value after which `pruner="patience"` stops a
            trial. By default three times `min_epochs`.
        script: The file that the sweep was made in.
    """

    name: str
    config: Config
    space: Space
    trials: int = 16
    seed: int = 0
    sampler: "str | Callable[[int], BaseSampler]" = ""
    pruner: "str | BasePruner" = ""
    min_epochs: int | None = None
    eta: int = 3
    finalists: int = 1
    objectives: tuple[str, ...] = OBJECTIVES[:1]
    percentile: float = 25.0
    patience: int | None = None
    script: Path | None = None

    def __post_init__(self) -> None:
        # JSON makes lists of tuples
        names: Any = self.objectives

        if isinstance(names, list):
            object.__setattr__(self, "objectives", names := tuple(names))

        several = isinstance(names, tuple) and len(names) > 1
        defaults = {"sampler": ("tpe", "nsga2"), "pruner": ("promotion", "none")}

        for key, values in defaults.items():
            if not getattr(self, key):
                object.__setattr__(self, key, values[several])

    def check(self, data: DataInfo | None = None) -> "Sweep":
        r"""Returns the sweep in its normal form.

        Raises:
            UserError: If anything is wrong with it, or does not fit the data. The message has one
                line for each fault.
        """

        checked, faults = self.examine(data)

        if faults:
            raise UserError("\n".join(faults))

        return checked

    def examine(self, data: DataInfo | None = None) -> tuple["Sweep", list[str]]:
        r"""Returns the sweep in its normal form, and everything that is wrong with it."""

        known = {} if data is None else {"size": data.size, "length": data.length}
        faults = list(_setting_faults(self))
        config: Config | None = None
        space, first = self.space, self.min_epochs

        try:
            config = check_config(self.config, **known)
        except UserError as error:
            faults += str(error).split("\n")

        epochs = _epochs(self.config) if config is None else config["epochs"]

        if isinstance(first, int) and epochs is not None and first > epochs:
            faults.append(f"min_epochs is {first}, but must be at most epochs (={epochs}).")

        known_pruner = isinstance(self.pruner, str) or _is_method("pruner", self.pruner)
        pruner = _method(self.pruner) if known_pruner else ""

        try:
            space = check_space(self.space, config, **known, pruner=pruner)
        except UserError as error:
            faults += str(error).split("\n")

        if faults or config is None:
            return self, faults

        if self.pruner != "none" and first is None:
            first = max(1, config["epochs"] // self.eta**3)

        checked = replace(self, config=config, space=space, min_epochs=first)

        return checked, checked._draw_faults(known)

    def _draw_faults(self, known: dict[str, int]) -> list[str]:
        r"""Returns the faults that only draws show: of functions, and of grids."""

        if not callable(self.space) and self.sampler != "grid" and isinstance(self.sampler, str):
            return []

        from ..search import check_kinds, sample

        try:
            if self.sampler == "grid" or callable(self.sampler):
                self.propose(())

            drawn = sample(self.draw, count=32 if callable(self.space) else 0)

            for values, _ in drawn:
                check_config(self.config | values, **known)

            if self.sampler == "tpe":
                check_kinds(trial for _, trial in drawn)
        except UserError as error:
            return str(error).split("\n")
        except Exception as error:
            return [f"SPACE cannot be drawn from: {type(error).__name__}: {error}."]

        return []

    def draw(self, trial: Any) -> Config:
        r"""Returns values for the keys of SPACE, as an Optuna trial suggests them."""

        return draw_values(self.space, trial, _method(self.pruner))

    def propose(self, records: Sequence[TrialRecord], fixed: dict[str, Any] | None = None) -> Any:
        r"""Draws a configuration that no run has, see :func:`sda_ray.search.sampler.propose`."""

        from ..search import distributions, propose

        group = None

        if self.pruner == "hyperband":
            from ..search import hyperband_brackets

            group = hyperband_brackets(self.rules, self.name)

        return propose(
            self.draw,
            records,
            self.seed,
            self.sampler,
            fixed,
            None if callable(self.space) else distributions(self.draw),
            self.config,
            len(self.objectives),
            group,
        )

    def stops(self) -> PruneRule | None:
        r"""Returns the rule of the pruner, if its verdicts are final."""

        if self.pruner in ("promotion", "none"):
            return None

        from ..search import prune_rule

        pruner = None if isinstance(self.pruner, str) else self.pruner

        return prune_rule(self.rules, self.name, self.percentile, self.patience, pruner)

    def warnings(self) -> list[str]:
        r"""Returns what is allowed and probably not intended."""

        said = []

        if len(self.objectives) > 1:
            said.append(
                "with several objectives nothing is pruned: every trial is trained to its end."
            )

        for key in ("scheduler", "warmup"):
            if self.pruner not in ("none", "patience") and key in self._keys():
                said.append(
                    f"SPACE has {key!r}, and trials are compared before their end, where what "
                    "decays faster looks better than it is. To be fair to all, take pruner='none'."
                )

        return said

    def _keys(self) -> set[str]:
        r"""Returns the keys of CONFIG that vary; of a function, those of its first draws."""

        if not callable(self.space):
            return {key for name in self.space for key in split_group(name)}

        from ..search import sample

        return {key for values, _ in sample(self.draw, count=32) for key in values}

    @property
    def rules(self) -> Rules:
        first = self.min_epochs if self.pruner != "none" else None
        epochs = self.config["epochs"]

        return Rules(
            self.trials, epochs, first, self.eta, self.finalists, pruner=_method(self.pruner)
        )

    def definition(self) -> dict[str, Any]:
        r"""Returns the definition of the sweep, without the number of trials, as JSON."""

        from ..search import draw_summary

        drawn = draw_summary(self.draw) if callable(self.space) else ()

        return definition_of(
            self.config,
            self.space,
            drawn,
            **{key: getattr(self, key) for key in SETTINGS}
            | {"sampler": _method(self.sampler), "pruner": _method(self.pruner)},
        )


def _epochs(config: Any) -> int | None:
    r"""Returns the epochs of a configuration that may have faults, if they are accepted."""

    try:
        return int(check_value("epochs", config["epochs"]))
    except (UserError, KeyError, TypeError, IndexError):
        return None


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
