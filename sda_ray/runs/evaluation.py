r"""Evaluations of finished runs on `test.h5`: how well their networks sample and assimilate.

The results of a run are in its directory, in `evaluation.json`: the numbers of each trajectory and
observation. The file is written after each of them, so that an evaluation may be killed at any time
and be started again.
"""

from __future__ import annotations

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from ..core import ProgressBar, UserError, locked_at_once, read_json, say, write_json
from ..data import TrajectoryDataset, check_file, fingerprint
from .path import RunPath

if TYPE_CHECKING:
    import torch

VERSION = 1  # of the metrics and what they are of
SAMPLES = "samples"  # the task of unconditional samples, beside the observations of the panel
STEPS, TAU = 256, 0.5  # of unconditional samples; of all corrections
IN_USE = " Another process may be evaluating the run."
SAMPLED = 8  # states of an unconditional sample, if the window is not longer


@dataclass(frozen=True)
class EvaluationSettings:
    r"""What the numbers of an evaluation depend on, beside the network and the data.

    Arguments:
        trajectories: The number of trajectories of `test.h5`, from the first.
        members: The number of members of an ensemble.
        steps: The number of sampling steps; by default that of each observation in the panel.
        corrections: The number of Langevin corrections per step.
        guidance: See :func:`sda_ray.assimilation.assimilate`.
        seed: The seed of the noise in observations and samples.
    """

    trajectories: int = 8
    members: int = 16
    steps: int | None = None
    corrections: int = 1
    guidance: str = "gaussian"
    seed: int = 0


# A first look. With fewer steps, ensembles that follow an observation closely fall apart.
QUICK = EvaluationSettings(trajectories=1, members=3, steps=32)
QUICK_OBSERVATIONS = (SAMPLES, "assim", "extrapolate", "subsample-4")


class Evaluation(msgspec.Struct):
    r"""The `evaluation.json` of a run: `results[observation][trajectory][metric]`.

    The weights and the data are given by their SHA-256.
    """

    version: str
    weights: str
    data: str
    settings: dict[str, Any]
    results: dict[str, dict[str, dict[str, Any]]] = {}

    @property
    def settled(self) -> tuple[Any, ...]:
        r"""What all results have in common. More trajectories only add to them."""

        same = {k: x for k, x in self.settings.items() if k != "trajectories"}

        return self.version, self.weights, self.data, same


class Task(NamedTuple):
    r"""An ensemble to sample and to judge: a run, an observation of the panel, a trajectory."""

    run: RunPath
    observation: str
    trajectory: int


Values = dict[str, Any]
Fields = dict[str, np.ndarray]
Draw = Callable[[RunPath, str, Fields], None]

# Applies a function to tasks, perhaps in parallel, and yields each with its result.
Results = Generator[tuple[Task, Values]]
MapTasks = Callable[[Callable[[Task], Values], Iterable[Task]], Results]


def map_here(function: Callable[[Task], Values], tasks: Iterable[Task]) -> Results:
    for task in tasks:
        yield task, function(task)


def evaluate_runs(
    paths: Sequence[RunPath],
    data: Path,
    settings: EvaluationSettings,
    observations: Sequence[str],
    map_tasks: MapTasks = map_here,
    draw: Draw | None = None,
) -> tuple[dict[RunPath, Evaluation], dict[RunPath, str]]:
    r"""Evaluates runs. Results that are there already are not computed again.

    It may be killed at any time and be called again. The numbers depend neither on that, nor on
    the order of the tasks. Those of all runs are for the same trajectories and noise.

    Arguments:
        paths: The runs.
        data: The directory of `test.h5`.
        settings: What the numbers depend on.
        observations: Names in the panel, see :data:`sda_ray.assimilation.operators.PANEL`, or
            `samples` for unconditional samples.
        map_tasks: A function that evaluates tasks, such as in parallel on Ray.
        draw: What draws figures of a run's observation from its fields, within the first task.

    Returns:
        The evaluations, and why runs have none: they are not finished, damaged or in use.

    Raises:
        UserError: If the data cannot be used or are too few.
    """

    from ..assimilation import PANEL_VERSION

    file = data / "test.h5"
    _check(file, settings.trajectories, observations)
    version = f"{VERSION}.{PANEL_VERSION}"
    base = Evaluation(version, "", fingerprint(data, ("test",)), asdict(settings))
    evaluations: dict[RunPath, Evaluation] = {}
    errors: dict[RunPath, str] = {}

    with ExitStack() as stack:
        for path in paths:
            try:
                lock = path.evaluation.with_suffix(".lock")
                stack.enter_context(locked_at_once(lock, IN_USE))
                _check_network(path, file, observations)
                evaluations[path] = _open(path, base)
            except UserError as error:
                errors[path] = str(error)

        every = [
            Task(path, observation, i)
            for i in range(settings.trajectories)
            for observation in observations
            for path in evaluations
        ]
        missing = [
            task
            for task in every
            if str(task.trajectory) not in evaluations[task.run].results.get(task.observation, {})
        ]
        function = functools.partial(evaluate_task, file, settings, draw)
        results = (map_tasks if missing else map_here)(function, missing)
        done = len(every) - len(missing)

        try:
            with ProgressBar("ensemble", len(every), done) as bar, closing(results):
                for task, values in results:
                    evaluation = evaluations[task.run]
                    rows = evaluation.results.setdefault(task.observation, {})
                    rows[str(task.trajectory)] = values
                    write_json(task.run.evaluation, msgspec.to_builtins(evaluation))
                    bar.advance()
        except KeyboardInterrupt:
            say(f"Interrupted after {bar.done} of {len(every)}. The same command resumes.")
            raise

    return evaluations, errors


def read_evaluation(path: RunPath) -> Evaluation | None:
    r"""Returns the evaluation of a run, or None if there is none.

    Raises:
        UserError: If it is damaged.
    """

    if not path.evaluation.exists():
        return None

    try:
        return msgspec.convert(read_json(path.evaluation), Evaluation)
    except msgspec.ValidationError as error:
        raise UserError(f"{path.evaluation} is damaged: {error}. Delete it.") from error


Summary = dict[str, dict[str, tuple[float, float, float]]]


def summarize(evaluation: Evaluation) -> Summary:
    r"""Returns the metrics of each observation: the mean over trajectories, and its 95 % interval.

    Of `rmse`, `spread` and `spread_skill`, the squares are averaged first. The interval is found by
    bootstrap over trajectories; that of a single one is no interval.
    """

    import torch

    from ..assimilation import bootstrap

    summary: Summary = {}

    for observation, results in evaluation.results.items():
        rows = [{k: x for k, x in row.items() if k != "ranks"} for row in results.values()]
        most = max(rows, key=len).keys()  # those of an ensemble that diverged are few
        rows = [row for row in rows if row.keys() == most]
        keys = [key for key in most if all(math.isfinite(row[key]) for row in rows)]
        x = torch.tensor([[row[key] for key in keys] for row in rows]).double()

        if not keys:
            summary[observation] = {}
            continue

        mean = _pool(dict(zip(keys, x.mean(0), strict=True)))

        def statistic(x: torch.Tensor, keys: Any = keys) -> torch.Tensor:
            return torch.stack([*_pool(dict(zip(keys, x.mean(0), strict=True))).values()])

        low, high = bootstrap(x, statistic) if len(x) > 1 else (statistic(x), statistic(x))
        ends = zip(low.tolist(), high.tolist(), strict=True)
        summary[observation] = {
            key: (float(value), *interval)
            for (key, value), interval in zip(mean.items(), ends, strict=True)
        }

    return summary


def format_interval(interval: Sequence[float] | None) -> str:
    r"""Returns a mean and its interval, if it has one, as `0.123 [0.12, 0.13]`."""

    mean, low, high = interval or (None, None, None)
    text = "" if mean is None else f"{mean:.3g}"

    return text if low == high else f"{text} [{low:.3g}, {high:.3g}]"


def _pool(means: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    r"""Returns the metrics of several trajectories from the means of their numbers."""

    if "mse" not in means:
        return means

    mse, variance, members = (means.pop(key) for key in ("mse", "variance", "members"))
    skill = (mse - variance / members).clamp(min=0)
    roots = {"rmse": mse, "spread": variance, "spread_skill": variance / skill}

    return {"crps": means.pop("crps"), **{k: x.sqrt() for k, x in roots.items()}, **means}


def fitting(data: Path) -> list[str]:
    r"""Returns the observations that the trajectories of `test.h5` are large enough for."""

    from ..assimilation import PANEL

    x = TrajectoryDataset(data / "test.h5", window=1).x

    return [SAMPLES, *(name for name in PANEL if not _misfit(name, x.shape))]


def _misfit(name: str, shape: Sequence[int]) -> str | None:
    r"""Returns why trajectories of a shape :math:`(N, L, 2, H, W)` cannot be observed, or None."""

    import torch

    from ..assimilation import PANEL, parse

    observation = PANEL[name]

    if observation.states > shape[1]:
        return f"it takes {observation.states} states, and there are {shape[1]}"

    try:
        parse(observation.operator)(torch.zeros(observation.states, *shape[2:]))
    except UserError as error:
        return str(error).removesuffix(".")

    return None


def _check(file: Path, trajectories: int, observations: Sequence[str]) -> None:
    check_file(file)
    shape = TrajectoryDataset(file, window=1).x.shape

    if trajectories > shape[0]:
        raise UserError(
            f"trajectories is {trajectories}, but {file} has {shape[0]}. Take at most that many."
        )

    for name in observations:
        if name != SAMPLES and (misfit := _misfit(name, shape)):
            raise UserError(f"'{name}' does not fit {file}: {misfit}. Leave it out.")


def _check_network(path: RunPath, file: Path, observations: Sequence[str]) -> None:
    r"""Raises a UserError if a run has no network for the data and the observations."""

    from ..assimilation import PANEL
    from ..nn import load_sde

    window, _, *size = load_sde(path.directory).shape
    cells = [*TrajectoryDataset(file, window=1).x.shape[-2:]]

    if size != cells:
        raise UserError(f"its network is for fields of {size}, but those of {file} are {cells}.")

    for name in observations:
        if name != SAMPLES and PANEL[name].states < window:
            raise UserError(
                f"its window is {window}, but '{name}' observes {PANEL[name].states} states. "
                "Leave it out."
            )


def _open(path: RunPath, base: Evaluation) -> Evaluation:
    r"""Returns the evaluation to go on with: that on the disk if it is of the same kind."""

    weights = hashlib.sha256(path.state.read_bytes()).hexdigest()
    new = msgspec.structs.replace(base, weights=weights, results={})
    old = read_evaluation(path)

    if old is not None and old.settled != new.settled:
        say(f"{path.directory.name} was evaluated in another way, which is replaced.")
    elif old is not None:
        new.results = old.results

    return new


# One ensemble


def evaluate_task(
    file: Path, settings: EvaluationSettings, draw: Draw | None, task: Task
) -> Values:
    r"""Samples an ensemble and judges it, see :class:`Task`."""

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = TrajectoryDataset(file, window=1).x
    evaluate = _evaluate_samples if task.observation == SAMPLES else _evaluate_observation
    values, fields = evaluate(settings, task, data, device)

    if draw and task.trajectory == 0 and fields:
        draw(task.run, task.observation, fields)

    return values


def _evaluate_samples(
    settings: EvaluationSettings, task: Task, data: np.ndarray, device: str
) -> tuple[Values, Fields]:
    r"""Compares unconditional samples with as many real trajectories."""

    import torch

    from ..nn import load_sde
    from ..training import compare_samples

    states = max(SAMPLED, load_sde(task.run.directory).shape[0])
    sde = load_sde(task.run.directory, device, states)
    x = sde.sample(
        (settings.members,),
        steps=settings.steps or STEPS,
        corrections=settings.corrections,
        tau=TAU,
        generator=_rng(settings, task, device),
    ).cpu()
    real = torch.from_numpy(np.array(data[:, :states], dtype=np.float32))
    found = compare_samples(x.flatten(1, 2), real.flatten(1, 2))
    values = {key: value for key, value in found.items() if math.isfinite(value)}

    if not x.isfinite().all():
        return values, {}

    return values, {"truth": real[task.trajectory].numpy(), "members": x.numpy()}


def _evaluate_observation(
    settings: EvaluationSettings, task: Task, data: np.ndarray, device: str
) -> tuple[Values, Fields]:
    r"""Assimilates an observation of a trajectory, and compares the ensemble with the truth."""

    import torch

    from ..assimilation import (
        PANEL,
        assimilate,
        chi_square,
        cross_spectral_error,
        crps,
        divergence_ratio,
        energy,
        enstrophy,
        log_likelihood,
        parse,
        rank_histogram,
        spectral_error,
    )

    observation = PANEL[task.observation]
    A, std = parse(observation.operator), observation.std
    truth = torch.from_numpy(np.array(data[task.trajectory, : observation.states], np.float32))
    clean = A(truth)
    noise = torch.randn(clean.shape, generator=_rng(settings, task))
    y = clean + std * noise

    try:
        x = assimilate(
            task.run.directory,
            y.to(device),
            A,
            std,
            shape=truth.shape,
            members=settings.members,
            steps=settings.steps or observation.steps,
            corrections=settings.corrections,
            tau=TAU,
            guidance=settings.guidance,
            seed=_rng(settings, task).initial_seed(),
        ).cpu()
    except UserError:  # all members diverged: the rest has been checked
        return {"members": 0}, {}

    x = x[x.isfinite().flatten(1).all(1)]

    if len(x) < 2:
        return {"members": len(x)}, {}

    fields = {"truth": truth.numpy(), "members": x.numpy(), "y": y.numpy()}
    seen, mean = A(x), x.mean(0)
    values: Values = {
        "members": len(x),
        "crps": crps(x, truth).mean(),
        "mse": (mean - truth).square().mean(),
        "variance": x.var(0).mean(),
        "residual": (seen - y).square().mean().sqrt(),
        "chi2": chi_square(seen, y, std),
        "log_likelihood": log_likelihood(seen, y, std).mean(),
        "divergence": divergence_ratio(x, truth),
        "energy": energy(x).mean() / energy(truth).mean(),
        "enstrophy": enstrophy(x).mean() / enstrophy(truth).mean(),
    }

    for name, metric in (("spectral", spectral_error), ("cross_spectral", cross_spectral_error)):
        values |= {f"{name}_error_{i}": error for i, error in enumerate(metric(x, truth), 1)}

    ranks = rank_histogram(x, truth).tolist()

    return {key: float(x) for key, x in values.items()} | {"ranks": ranks}, fields


def _rng(settings: EvaluationSettings, task: Task, device: str = "cpu") -> torch.Generator:
    r"""Returns a generator that is the same for all runs."""

    import torch

    key = settings.seed, zlib.crc32(task.observation.encode()), task.trajectory
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)

    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
