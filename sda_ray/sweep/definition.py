r"""The definition of a sweep: a name, a CONFIG, a SPACE and a few settings, made in a script."""

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ..core import (
    Choice,
    Config,
    Space,
    UserError,
    check_config,
    check_space,
    draw_values,
    format_value,
    script_error,
    space_to_json,
    split_group,
    to_python,
)
from ..runs import MEASURED
from ..search import FINAL, GEOMETRIC, PruneRule, Rules, TrialRecord, geometric_rungs

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

    from ..data import DataInfo  # which loads h5py

T = TypeVar("T")

PRUNERS = ("promotion", *FINAL, "none")
SAMPLERS = ("tpe", "random", "gp", "grid", "nsga2")
JUDGES: tuple[str, ...] = ("loss_valid", *MEASURED)  # what runs can be compared by
OBJECTIVES: tuple[str, ...] = (*JUDGES, "parameters", "seconds", "loss_train", "loss_valid_se")
LOSSES = ("loss_valid", "loss_train", "loss_valid_se")  # of one window and alpha
DRAWS = 32  # of a SPACE that is a function
WINDOWS = 256  # draws of a SPACE that is a function, to find its largest window


def caught(faults: list[str], call: Callable[[], T]) -> T | None:
    r"""Returns the result of a call, or None if it raises a UserError, whose lines are added."""

    try:
        return call()
    except UserError as error:
        faults += str(error).split("\n")

    return None


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

    least = {
        "trials": 1,
        "seed": 0,
        "eta": 2,
        "finalists": 0,
        "min_epochs": 1,
        "patience": 1,
        "seeds": 1,
    }

    for key, low in least.items():
        value = getattr(sweep, key)
        left_out = value is None and key in ("eta", "min_epochs", "patience")

        if not left_out and (type(value) is not int or value < low):
            yield f"{key} is {value!r}, but must be an integer from {low}."

    percentile: Any = sweep.percentile

    if type(percentile) not in (int, float) or not 0 < percentile < 100:
        yield f"percentile is {percentile!r}, but must be a number between 0 and 100."
    elif percentile != 25 and sweep.pruner != "percentile":
        yield f"percentile is {percentile}, but only pruner='percentile' takes it."

    if sweep.patience is not None and sweep.pruner != "patience":
        yield f"patience is {sweep.patience}, but only pruner='patience' takes it."

    yield from _method_faults(sweep)
    yield from _objective_faults(sweep)


def _rung_faults(rungs: Any, first: int | None, epochs: int) -> Iterator[str]:
    if rungs is None:
        return

    sound = isinstance(rungs, tuple) and all(type(x) is int and 0 < x < epochs for x in rungs)

    if not sound or list(rungs) != sorted({*rungs}) or rungs[:1] not in ((), (first,)):
        yield (
            f"rungs is {rungs!r}, but must be rising epochs from min_epochs (={first}) to below "
            f"epochs (={epochs})."
        )


def _method_faults(sweep: Any) -> Iterator[str]:
    for key, options, other in (
        ("sampler", SAMPLERS, "a function of a seed"),
        ("pruner", PRUNERS, "an Optuna pruner"),
    ):
        value = getattr(sweep, key)

        if value in options if isinstance(value, str) else _is_method(key, value):
            continue

        yield f"{key} is {value!r}, but must be one of {', '.join(options)}, or {other}." + (
            " CMA-ES is left out: Optuna's keeps its state in the study as a pickle, and who may "
            "write a study could run code where it is read."
        ) * (key == "sampler" and str(value).lower().startswith("cma"))

    if sweep.sampler == "gp" and sweep.pruner != "none":
        yield (
            f"sampler is 'gp', which learns from complete trials alone, and pruner is "
            f"{sweep.pruner!r}. Take pruner='none', or sampler='tpe'."
        )


def _objective_faults(sweep: Any) -> Iterator[str]:
    names: Any = sweep.objectives
    accepted = ", ".join(OBJECTIVES)

    if not isinstance(names, tuple) or not names or names[0] not in JUDGES:
        judges = ", ".join(map(repr, JUDGES[:-1]))
        yield (
            f"objectives is {names!r}, but must be a tuple that begins with {judges} or "
            f"{JUDGES[-1]!r}; after it may come others of {accepted}."
        )
        return

    for name in dict.fromkeys(names):
        if name not in OBJECTIVES:
            yield f"objectives has {name!r}, but may have {accepted}."
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
            distance of all rungs. By default `epochs` / 16, or over the third power of another
            `eta` than 2.
        eta: One in `eta` trials is promoted at each rung. By default 2.
        rungs: The epochs of all rungs before the end. By default `min_epochs` and, above it, `epochs`
            over the powers of `eta`.
        finalists: The least number of trials that get the full number of epochs.
        seeds: The number of seeds with which a trial that gets there is trained: CONFIG's and the
            next ones. It is judged by their mean. A further seed does not count as a trial.
        objectives: The metrics to minimise. The first is what runs are compared by, pruned and
            ranked: `loss_valid`; or `denoising` or `skill`, by which runs of any `window` and
            `alpha` compare, see :mod:`sda_ray.training.validation`. After it may come the others,
            `parameters`, `seconds` (of training), `loss_train` and `loss_valid_se`.
        percentile: The share of trials, in percent, that `pruner="percentile"` lets continue.
        patience: The epochs without a new best value after which `pruner="patience"` stops a
            trial. By default three times `min_epochs`.
        script: The script that `sda-ray sweep` was given.
        module: The file of the module that made the sweep, if it has one.
        derived: Whether `dataclasses.replace` made it.
    """

    name: str
    config: Config
    space: Space
    trials: int = 16
    seed: int = 0
    sampler: "str | Callable[[int], BaseSampler]" = ""
    pruner: "str | BasePruner" = ""
    min_epochs: int | None = None
    eta: int | None = None
    rungs: tuple[int, ...] | None = None
    finalists: int = 1
    objectives: tuple[str, ...] = OBJECTIVES[:1]
    percentile: float = 25.0
    patience: int | None = None
    seeds: int = 1
    script: Path | None = None
    module: Path | None = field(default=None, init=False, repr=False, compare=False)
    derived: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Numbers may be NumPy's
        for key in ("trials", *SETTINGS):
            object.__setattr__(self, key, to_python(getattr(self, key)))

        # JSON makes lists of tuples
        for key in ("objectives", "rungs"):
            if isinstance(value := getattr(self, key), list | tuple):
                object.__setattr__(self, key, tuple(map(to_python, value)))

        names: Any = self.objectives
        several = isinstance(names, tuple) and len(names) > 1
        defaults = {"sampler": ("tpe", "nsga2"), "pruner": ("promotion", "none")}

        for key, values in defaults.items():
            if not getattr(self, key):
                object.__setattr__(self, key, values[several])

        frame = inspect.currentframe()

        while frame is not None and frame.f_code.co_name != "<module>":
            if frame.f_globals.get("__name__") == "dataclasses":
                object.__setattr__(self, "derived", True)

            frame = frame.f_back

        file = frame and frame.f_globals.get("__file__")

        if file and os.path.isfile(file):
            object.__setattr__(self, "module", Path(file).resolve())

    def check(self, data: "DataInfo | None" = None) -> "Sweep":
        r"""Returns the sweep in its normal form.

        Raises:
            UserError: If anything is wrong with it, or does not fit the data. The message has one
                line for each fault.
        """

        checked, faults = self.examine(data)

        if faults:
            raise UserError("\n".join(faults))

        return checked

    def examine(
        self, data: "DataInfo | None" = None, draws: int = DRAWS
    ) -> tuple["Sweep", list[str]]:
        r"""Returns the sweep in its normal form, and everything that is wrong with it.

        This is where CONFIG and SPACE are checked; nothing checks them, or a draw, again.

        Arguments:
            data: The data, if they are known.
            draws: The number of draws to check of a SPACE that is a function.
        """

        known: dict[str, Any] = {} if data is None else {"size": data.size, "length": data.length}
        faults = list(_setting_faults(self))
        first, pruner = self.min_epochs, str(self.pruner)
        config = caught(faults, lambda: check_config(self.config, whole=False))
        epochs = self.config.get("epochs") if isinstance(self.config, Mapping) else None

        if isinstance(first, int) and isinstance(epochs, int | float) and first > epochs:
            faults.append(f"min_epochs is {first}, but must be at most epochs (={epochs}).")

        losses = self._compares_losses
        space = caught(
            faults, lambda: check_space(self.space, config, **known, pruner=pruner, losses=losses)
        )

        if config is None or space is None or faults:
            return self, faults

        checked = replace(
            self, config=config, space=space, **self._rung_settings(config["epochs"])
        )

        if faults := list(_rung_faults(checked.rungs, checked.min_epochs, config["epochs"])):
            return self, faults

        if callable(space):
            faults = checked._draw_faults(known, draws)

        if not faults and self.seeds > 1 and "seed" in checked._keys():
            faults.append(
                f"seeds is {self.seeds}, but SPACE has 'seed': each trial has its own. Leave one "
                "of them out."
            )

        if not faults and data is not None:
            for name, states in checked.measured.items():
                if states > data.length:
                    faults.append(
                        f"objectives has {name!r}, which takes {states} states for a window of "
                        f"{(states + 1) // 2}, but trajectories have {data.length}. Take a "
                        "smaller window, or objectives=('loss_valid',)."
                    )

        if not faults and (self.sampler == "grid" or callable(self.sampler)):
            try:
                caught(faults, lambda: checked.propose(()))
            except Exception as error:  # of the user's own function
                faults = [f"SPACE cannot be drawn from: {script_error(error)}."]

        return checked, faults

    def _rung_settings(self, epochs: int) -> dict[str, Any]:
        r"""Returns the settings of all rungs, of which those that are not given follow."""

        eta = self.eta or 2
        first, rungs = self.min_epochs, self.rungs

        if first is None and rungs:
            first = rungs[0]
        elif first is None and self.pruner != "none":
            first = max(1, epochs // eta ** (4 if eta == 2 else 3))

        if rungs is None and first and self.pruner in GEOMETRIC:
            rungs = geometric_rungs(first, epochs, eta)

        return {"eta": eta, "min_epochs": first, "rungs": rungs}

    def _draw_faults(self, known: dict[str, Any], count: int) -> list[str]:
        r"""Returns what is wrong with draws of a SPACE that is a function, and how often."""

        from optuna import TrialPruned

        from ..search import check_kinds, sample

        faults: dict[str, list[dict[str, Any]]] = {}  # the parameters with which each occurs

        def attempt(trial: Any) -> Config:
            try:
                values = self.draw(trial)
                check_config(self.config | values, **known)
                return values
            except TrialPruned:
                raise
            except UserError as error:
                lines = str(error).split("\n")
            except (Exception, SystemExit) as error:  # of the user's own function
                lines = [script_error(error)]

            for line in lines:
                faults.setdefault(line, []).append(trial.params)

            return {}

        trials = [trial for _, trial in sample(attempt, count)]
        texts = [] if trials else [f"SPACE raised TrialPruned in all of {count} draws."]

        for line, cases in sorted(faults.items(), key=lambda item: -len(item[1]))[:8]:
            case = " ".join(f"{key}={format_value(x)}" for key, x in cases[0].items())
            case = f", as {case}" if case else ""
            texts.append(f"SPACE: {line} ({len(cases)} of {count} draws{case})")

        if self.sampler == "tpe":
            caught(texts, lambda: check_kinds(trials))

        return texts

    def configs(self, count: int) -> list[Config]:
        r"""Returns configurations drawn at random."""

        from ..search import sample

        return [self.config | values for values, _ in sample(self.draw, count)]

    def draw(self, trial: Any) -> Config:
        r"""Returns values for the keys of SPACE, as an Optuna trial suggests them."""

        return draw_values(self.space, trial, str(self.pruner), self._compares_losses)

    @property
    def _compares_losses(self) -> bool:
        r"""Whether an objective is a denoising loss, which is one of a window and an `alpha`."""

        return not isinstance(self.objectives, tuple) or bool({*self.objectives} & {*LOSSES})

    @cached_property
    def measured(self) -> dict[str, int]:
        r"""The objectives that are measured where a run is judged, each with a number of states.

        They are so many that the middle one has its full window, whatever window is drawn.
        """

        names = [name for name in MEASURED if name in self.objectives]

        if not names:
            return {}

        return dict.fromkeys(names, 2 * max(self._windows()) - 1)

    @property
    def judged(self) -> dict[str, Any]:
        r"""Entries in the records of runs, unless they are judged by losses alone."""

        objective, *_ = self.objectives

        return {"objective": objective, "measured": self.measured} if self.measured else {}

    def _windows(self) -> list[int]:
        r"""Returns windows that are drawn, the largest among them."""

        if callable(self.space):
            configs = [self.config, *self.configs(WINDOWS)]
            return [config["window"] for config in configs]

        for name, domain in self.space.items():
            if "window" in (keys := split_group(name)):
                ends = domain.options if isinstance(domain, Choice) else (domain.low, domain.high)
                return [x if len(keys) == 1 else x[keys.index("window")] for x in ends]

        return [self.config["window"]]

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

    def warnings(self, data: "DataInfo | None" = None) -> list[str]:
        r"""Returns what is allowed and probably not intended."""

        texts = list(data.warnings) if data else []
        keys, batch = self._keys(), self.config["batch_size"]

        if data and batch > (n := data.trajectories["train"]) and "batch_size" not in keys:
            texts.append(
                f"batch_size is {batch}, but there are {n} trajectories to train with: an epoch is "
                "one step."
            )

        if len(self.objectives) > 1:
            texts.append(
                "with several objectives nothing is pruned: every trial is trained to its end."
            )

        for key in ("scheduler", "warmup"):
            if self.pruner not in ("none", "patience") and key in keys:
                texts.append(
                    f"SPACE has {key!r}, and trials are compared before their end, where what "
                    "decays faster looks better than it is. To be fair to all, take pruner='none'."
                )

        return texts

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
            self.trials,
            epochs,
            first,
            self.eta or 2,
            self.finalists,
            pruner=_method(self.pruner),
            recorded=self.rungs if first else None,
            seeds=self.seeds,
        )

    def definition(self) -> dict[str, Any]:
        r"""Returns the definition of the sweep, without the number of trials, as JSON.

        A space that is a function is described by the digest of what it draws from, see
        :func:`sda_ray.search.sampler.draw_summary`; its source may change.
        """

        settings = {key: getattr(self, key) for key in SETTINGS}
        settings |= {"sampler": _method(self.sampler), "pruner": _method(self.pruner)}
        space = space_to_json(self.space)

        if space is None:
            from ..search import draw_summary

            summary = "\n".join(draw_summary(self.draw))
            digest = hashlib.sha256(summary.encode()).hexdigest()
            space = {"function": True, "draws": digest}

        if self.measured:
            settings["measured"] = self.measured

        return json.loads(json.dumps({"config": self.config, "space": space, **settings}))


OTHERS = ("name", "config", "space", "trials", "script", "module", "derived")
SETTINGS = tuple(field.name for field in fields(Sweep) if field.name not in OTHERS)


class _Given(SystemExit):
    r"""Ends a script that is being loaded once it has called `main(sweep)`."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self.sweep = sweep


LOADING: list[Path] = []  # the scripts that are being loaded


def hand_over(sweep: Sweep) -> None:
    r"""Hands the sweep of `main(sweep)` to the command that loads the script, if one does."""

    if LOADING:
        raise _Given(sweep)


def look_beside(directory: Path) -> None:
    r"""Lets modules of a script's directory be imported, unless a library has their name."""

    place = str(directory)

    if sys.path[:1] == [place]:  # as `python SCRIPT` has it
        del sys.path[0]

    if place not in sys.path:
        sys.path.append(place)


def load_script(script: Path) -> Sweep:
    r"""Returns the sweep that a script defines; it may import modules beside it."""

    look_beside(script.resolve().parent)

    return run_script(script)


def run_script(script: Path) -> Sweep:
    r"""Returns the sweep that a script defines, or that it calls `main` with.

    It runs as a module that stays imported, not as `__main__`.

    Raises:
        UserError: If there is no such script, or not exactly one sweep in it.
    """

    if not script.is_file():
        raise UserError(f"there is no sweep script {script}.")

    module, file = ModuleType("sda_ray_sweep"), os.path.abspath(script)
    module.__file__ = file
    sys.modules[module.__name__] = module
    LOADING.append(script)

    try:
        exec(compile(script.read_bytes(), file, "exec", dont_inherit=True), vars(module))
    except _Given as given:
        return replace(given.sweep, script=script)
    except (Exception, SystemExit) as error:
        raise UserError(f"{script} cannot be run: {script_error(error)}.") from error
    finally:
        LOADING.pop()

    # A sweep may have several names, and another may be made of it
    sweeps = [*{id(x): x for x in vars(module).values() if isinstance(x, Sweep)}.values()]
    derived = [x for x in sweeps if x.derived]

    if len(derived or sweeps) != 1:
        raise UserError(f"{script} defines {len(sweeps)} sweeps, but must define one.")

    return replace((derived or sweeps)[0], script=script)
