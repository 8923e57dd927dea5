r"""The plan of a sweep before its start: time, memory, disk, and faults.

Configurations are drawn as the sweep would draw them, the operations of each distinct network are
counted on the meta device, and a few training steps on each kind of node turn them into seconds.

:func:`forecast` simulates the sweep. The rule that decides in a sweep decides here, too, see
:func:`sda_ray.search.promotion.decide`; each run has one random loss at all rungs. The forecast is
the mean of a few simulations.

For promotion it agrees with a formula. Of :math:`n` runs, all reach the first rung :math:`r`, and
about one in :math:`\eta^k` is promoted to the :math:`k`-th one after it, so that the mean is

.. math:: r + \sum_{k = 1}^K \eta^{-k} (r_k - r_{k - 1}) \approx r (1 + K (1 - 1 / \eta))

epochs per run. The formula leaves out runs that are promoted because they came first, the
finalists, and slots that are idle at the end.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster import Slots, local_gpus, memory_limit
from ..core import UserError
from ..data import DataInfo
from ..runs import Wandb
from ..search import PruneRule, Rules, TrialRecord, decide
from ..sweep import Sweep, find_faults, free_disk, load_script
from .probe import Node, Speed, epoch_seconds, probe_nodes

if TYPE_CHECKING:
    from .cost import Cost, Shape  # which imports torch

__all__ = [
    "Forecast",
    "Plan",
    "at_a_time",
    "estimate",
    "forecast",
    "format_duration",
    "memory_of",
    "plan_sweep",
    "times_of",
]

DRAWS = 1000
MOST = 256  # runs; a longer sweep is in proportion, up to a fifth too much for thousands
FEW = 24  # runs, where the rule that stops them is Optuna's
SWEEPS = 3
MARGIN = 0.85  # part of its share of a GPU that a trial may take by the plan
SMALL_FILES = 500_000, 700  # bytes of a run's other files: picture, records and W&B's; per epoch


@dataclass(frozen=True)
class Forecast:
    r"""The expected amount of training in a sweep.

    Arguments:
        epochs: The epochs of all runs together.
        busy: The seconds of training in all slots together.
        finish: The seconds from the start to the end.
    """

    epochs: float
    busy: float
    finish: float


@dataclass
class Plan:
    r"""The plan of a sweep.

    Arguments:
        name: The sweep's name.
        trials: The number of trials.
        wanted: The resources of a trial.
        faults: The reasons why the sweep cannot run.
        warnings: Probable mistakes.
        info: The data.
        sweep: The sweep in its normal form, if it has one.
        shapes: The distinct shapes, from small to large.
        order: The shape of each draw.
        nodes: The nodes that can hold a trial.
        slots: The number of trials at a time.
        whole: The forecast if nothing is pruned.
        pruned: The forecast with the sweep's pruner.
        known: Whether their times are known; else an epoch counts as a second.
        disk: The bytes that the runs take.
        free: The bytes that are free for them.
    """

    name: str
    trials: int = 0
    wanted: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    info: DataInfo | None = None
    sweep: Sweep | None = None
    shapes: list[Shape] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    slots: int = 0
    whole: Forecast | None = None
    pruned: Forecast | None = None
    known: bool = False
    disk: int = 0
    free: int = 0

    @property
    def unit(self) -> str:
        r"""The resource that is counted in hours: `GPU` or `CPU`."""

        return "GPU" if "GPU" in self.wanted else "CPU"

    def hours(self, forecast: Forecast | None) -> float | None:
        r"""Returns the GPU-hours or CPU-hours of a forecast, or None if they are unknown."""

        return forecast.busy * self.wanted[self.unit] / 3600 if forecast and self.known else None


def plan_sweep(
    source: Sweep | Path,
    runs: Path,
    data: Path,
    cpus: float = 1,
    gpus: float | None = None,
    parallel: int | None = None,
    address: str | None = None,
    wandb: Wandb | None = None,
    adjust: Callable[[Sweep], Sweep] = lambda sweep: sweep,
    report: Callable[[str], None] = lambda text: None,
) -> Plan:
    r"""Plans a sweep. Nothing is started, and nothing is left in the directory of runs.

    Arguments:
        source: The sweep, or its script.
        runs: The directory of all runs.
        data: The directory of the data.
        cpus: The CPUs of a trial.
        gpus: The GPUs of a trial. By default 1 if this machine has any.
        parallel: The most trials at a time. By default as many as fit.
        address: The address of a Ray cluster, or None for this machine.
        wandb: How trials log to W&B.
        adjust: Applies the options of the command line to the sweep of a script.
        report: Called with a text at each step.
    """

    slots = Slots(cpus, int(local_gpus() > 0) if gpus is None else gpus, parallel)
    sweep, broken = None, []

    try:
        sweep = load_script(source) if isinstance(source, Path) else source
        sweep = adjust(sweep)
    except UserError as error:
        broken = [str(error)]

    report(f"checking, with {DRAWS} draws")
    local = address is None
    found = find_faults(sweep, runs, data, slots, wandb or Wandb(), local, count=DRAWS)
    made = Plan(
        name=str(source) if sweep is None else sweep.name,
        trials=0 if sweep is None else sweep.trials,
        wanted=slots.wanted,
        faults=broken + found.faults,
        warnings=found.warnings,
        info=found.info,
        sweep=None if broken else found.sweep,
    )

    if made.sweep is not None and found.info is not None:
        from .cost import distinct_shapes

        made.shapes, made.order = distinct_shapes(found.draws, found.info, report)
        _check_disk(made, runs)

        if local and slots.wanted.keys() == {"CPU"}:
            machine = Node("this machine", "", slots.most or 1, memory_limit())
            check_memory(replace(made, nodes=[machine], warnings=[]), 0)

    if not local or not made.faults:
        _probe(made, slots, runs, data, address, report)

    if made.shapes:
        _forecast(made, slots)

    return made


def _probe(made: Plan, slots: Slots, *args: Any) -> None:
    r"""Surveys the nodes, and measures the smallest, the median and the largest shape there."""

    last = len(made.shapes) - 1
    chosen = sorted({0, last // 2, last}) if made.shapes else []
    configs = [made.shapes[i].config for i in chosen]

    try:
        made.nodes = probe_nodes(slots, configs, made.info, *args)
    except (UserError, OSError) as error:  # the directory of runs cannot be written
        made.faults += [str(error)] if isinstance(error, UserError) or not made.faults else []
        return

    if not made.nodes:
        made.warnings.append(
            "no live node can hold a trial: times and memory are unknown until there is one."
        )

    for node in made.nodes:
        made.faults += node.faults

    made.nodes = [node for node in made.nodes if not node.faults]


def at_a_time(node: Node, memory: float, gpus: float) -> int:
    r"""Returns the number of trials of some memory that a node can hold at a time."""

    if gpus:  # each is held to its share of a GPU
        return node.fit if memory <= MARGIN * min(1, gpus) * node.memory else 0

    return min(node.fit, int(node.memory // memory))


def memory_of(node: Node, cost: Cost) -> int:
    r"""Returns the bytes that a trial takes on a node, a lower bound if nothing was measured."""

    return cost.peak if node.speed is None else node.speed.memory(cost)


def _forecast(made: Plan, slots: Slots) -> None:
    r"""Sets the number of trials at a time, and the forecasts."""

    if any(shape.config["compile"] != "off" for shape in made.shapes):
        made.warnings.append("times are without torch.compile: it slows the first steps only.")

    assert made.sweep is not None
    check_memory(made, made.wanted.get("GPU", 0))
    places = _places(made)
    made.slots = sum(n for n, _ in places)
    made.slots = min(made.slots, slots.most or made.slots)
    made.known = made.slots > 0 and all(speed is not None for _, speed in places)
    seconds, end = times_of(made)
    rules, n = made.sweep.rules, max(1, made.slots)
    every = Rules(rules.target, rules.epochs, finalists=rules.finalists, pruner="none")
    made.whole = forecast(every, n, seconds, end)
    made.pruned = forecast(rules, n, seconds, end, made.sweep.stops())


def _places(made: Plan) -> list[tuple[int, Speed | None]]:
    r"""Returns the trials at a time, of the mean memory, and the speed of each node with any."""

    places = []

    for node in made.nodes:
        mean = statistics.fmean(memory_of(node, made.shapes[i].cost) for i in made.order)
        places.append((at_a_time(node, mean, made.wanted.get("GPU", 0)), node.speed))

    return [(n, speed) for n, speed in places if n]


def times_of(made: Plan) -> tuple[list[float], list[float]]:
    r"""Returns the seconds of an epoch, and those after the last one, for each draw of a plan.

    On nodes of several kinds, they give the same throughput in all. If they are unknown, an epoch
    takes 1.
    """

    assert made.info is not None
    speeds = [(n, speed) for n, speed in _places(made) if speed is not None]

    if not made.known:
        return [1.0] * len(made.order), [0.0] * len(made.order)

    total = sum(n for n, _ in speeds)
    times = []

    for shape in made.shapes:
        each = [(n, epoch_seconds(shape.config, shape.cost, s, made.info)) for n, s in speeds]
        times.append([total / sum(n / took[part] for n, took in each) for part in (0, 1)])

    return [times[i][0] for i in made.order], [times[i][1] for i in made.order]


def check_memory(made: Plan, gpus: float) -> None:
    r"""Adds a fault if no node has memory for the largest network, or warnings if some have not."""

    largest = max(made.shapes, key=lambda shape: shape.cost.peak)
    able = [x for x in made.nodes if at_a_time(x, memory_of(x, largest.cost), gpus)]

    if made.nodes and not able:
        has = ", ".join(f"{x.name} has {x.memory / 2**30:.1f} GiB" for x in made.nodes)
        takes = min(memory_of(node, largest.cost) for node in made.nodes)
        at_least = "at least " * all(node.speed is None for node in made.nodes)
        what = " ".join(
            f"{key}={largest.config[key]}" for key in ("hidden_channels", "window", "batch_size")
        )
        made.faults.append(
            f"a trial with {what} takes {at_least}{takes / 2**30:.1f} GiB, but {has}"
            f"{_share(gpus)}. Choose a smaller network or batch_size"
            f"{_larger(max(made.nodes, key=lambda x: x.memory), takes, gpus)}."
        )
        return

    for node in made.nodes:
        takes = memory_of(node, largest.cost)

        if (n := at_a_time(node, takes, gpus)) < node.fit and gpus:
            made.warnings.append(
                f"the largest do not fit on {node.name}, which has {node.memory / 2**30:.1f} GiB"
                f"{_share(gpus)}: choose a smaller network or batch_size"
                f"{_larger(node, takes, gpus)}."
            )
        elif n < node.fit:
            made.warnings.append(
                f"{node.name} runs {node.fit} trials at a time, but has memory for {n} of the "
                f"largest: give --parallel {max(1, n)}, or more CPUs or GPUs to each."
            )


def _share(gpus: float) -> str:
    return f" per GPU, of which a trial has {gpus:g}" if 0 < gpus < 1 else ""


def _larger(node: Node, takes: float, gpus: float) -> str:
    r"""Returns the advice to give trials a larger share of a GPU, if a larger one suffices."""

    least = math.ceil(20 * takes / MARGIN / node.memory) / 20

    return f", or give --gpus-per-trial {least:g}" if 0 < gpus < least <= 1 else ""


def _check_disk(made: Plan, runs: Path) -> None:
    r"""Compares the bytes that the runs leave on disk with those that are free."""

    sweep = made.sweep
    assert sweep is not None
    fixed, each = SMALL_FILES
    mean = statistics.fmean(
        2 * made.shapes[i].cost.checkpoint + made.shapes[i].cost.weights for i in made.order
    )
    epochs = forecast(sweep.rules, 1, [1.0]).epochs / sweep.trials
    made.disk = round(sweep.trials * (mean + fixed + each * epochs))
    made.free = free_disk(runs)

    if made.disk > made.free:
        made.faults.append(
            f"{sweep.trials} runs take {made.disk / 1e9:.1f} GB, but {runs} has {made.free / 1e9:.1f} "
            "GB free. Make room, give another directory with --runs, or take fewer trials."
        )


def forecast(
    rules: Rules,
    slots: int,
    seconds: Sequence[float],
    end: Sequence[float] = (0.0,),
    stops: PruneRule | None = None,
) -> Forecast:
    r"""Returns the expected amount of training in a sweep of new runs.

    Arguments:
        rules: The rules of the sweep.
        slots: The number of runs at a time.
        seconds: The time of an epoch, of one drawn configuration after the other.
        end: The time after the last epoch of each.
        stops: Whether a run that has reached a rung is stopped there, see :func:`decide`.
    """

    most, sweeps = (MOST, SWEEPS) if stops is None else (FEW, 1)  # Optuna takes long to decide
    share = max(1.0, rules.target / most)
    fewer = replace(rules, target=min(rules.target, most))
    few = min(slots, max(1, round(slots / share)))
    sums = [_simulate(fewer, few, seconds, end, stops, random.Random(i)) for i in range(sweeps)]

    # A longer sweep repeats this, in as many more slots as were removed here
    epochs, busy, finish = (sum(values) / sweeps for values in zip(*sums, strict=True))

    return Forecast(share * epochs, share * busy, finish * share * few / slots)


def estimate(sweep: Sweep, parallel: int, seconds: float | None = None) -> str:
    r"""Returns one line about the expected training of a sweep, for its start.

    Nothing is measured, and torch is not imported.

    Arguments:
        sweep: The sweep in its normal form.
        parallel: The number of trials at a time.
        seconds: The seconds of an epoch, such as the median of earlier runs, if they are known.
    """

    expected = forecast(sweep.rules, parallel, [seconds or 1.0])
    text = f"about {expected.epochs:,.0f} epochs in {sweep.trials} trials, {parallel} at a time"

    if seconds is None:
        return f"{text}; `sda-ray plan` measures how long they take"

    return f"{text}, done in about {format_duration(expected.finish)}"


def format_duration(seconds: float) -> str:
    r"""Returns a time in a unit that suits it."""

    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"

    return f"{seconds:.0f} s"


def _simulate(
    rules: Rules,
    slots: int,
    seconds: Sequence[float],
    end: Sequence[float],
    stops: PruneRule | None,
    rng: random.Random,
) -> tuple[float, float, float]:
    records: dict[int, TrialRecord] = {}
    live: list[tuple[float, int]] = []
    losses: list[float] = []
    first = rng.randrange(len(seconds))
    now = epochs = busy = 0.0

    while True:
        while len(live) < slots:
            action = decide(list(records.values()), [i for _, i in live], rules, stops=stops)

            if action.kind in ("wait", "stop"):
                break

            if action.kind == "prune":
                assert action.record is not None
                records[action.record.index] = replace(action.record, state="pruned")
                continue

            if action.record is None:
                record = TrialRecord(len(records) + 1, "", "running", action.until, rules.epochs)
                losses.append(rng.random())
            else:
                record = replace(action.record, state="running", until=action.until)
                record = replace(record, shown=action.shown)

            which = first + record.index
            more = record.until - record.last
            took = more * seconds[which % len(seconds)]
            took += end[which % len(end)] if record.until == rules.epochs else 0
            epochs, busy = epochs + more, busy + took
            records[record.index] = record
            heapq.heappush(live, (now + took, record.index))

        if not live:
            return epochs, busy, now

        now, i = heapq.heappop(live)
        record = records[i]
        reached = [rung for rung in rules.rungs if record.last < rung <= record.until]
        done = record.until == rules.epochs
        records[i] = replace(
            record,
            values=record.values | dict.fromkeys(reached, losses[i - 1]),
            state="complete" if done else "running",
        )
