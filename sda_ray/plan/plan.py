r"""The plan of a sweep before its start: time, memory, disk, and faults.

Configurations are drawn as the sweep would draw them, the operations of some networks are
counted on the meta device, and a few training steps on each kind of node turn them into seconds.

:func:`forecast` simulates the sweep. The rule that decides in a sweep decides here, too, see
:func:`sda_ray.search.promotion.decide`; the losses of a run are random, and alike at all rungs. The
forecast is the mean of some simulations.

For promotion it is near a formula: all runs reach the first rung :math:`r`, and about one in
:math:`\eta^k` is promoted to the :math:`k`-th one after it, which makes

.. math:: r + \sum_{k = 1}^K \eta^{-k} (r_k - r_{k - 1}) \approx r (1 + K (1 - 1 / \eta))

epochs per run. It leaves out early promotions, which depend on the order in which good runs come,
finalists, and slots that are idle at the end. :func:`expect` simulates the rest of a sweep under way.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from ..cluster import Slots, memory_limit
from ..core import (
    NETWORK,
    UserError,
    format_duration,
    format_size,
    format_value,
    make_console,
    make_table,
    plain,
)
from ..data import DataInfo
from ..search import FINAL, PruneRule, Rules, TrialRecord, count_trials, decide
from ..sweep import Options, Sweep, find_faults, free_disk, load_script
from .probe import Node, epoch_seconds, probe_nodes

if TYPE_CHECKING:
    from .cost import Cost, Shape  # which imports torch

DRAWS = 1000
MOST = 256  # runs; a longer sweep is in proportion, up to a fifth too much for thousands
SOME = 64  # runs, where a forecast has to be quick
FEW = 24  # runs, where the rule that stops them is Optuna's, which takes long to decide
SWEEPS = 3, 48  # simulations: at least, and at most
RUNS = 500  # that are simulated in all, as far as the number of simulations allows
CROSSING = 0.5  # by which runs change from rung to rung, where they differ by 1
LONG = 100 * 86400.0  # seconds
MARGIN = 0.85  # part of its share of a GPU that a trial may take by the plan
SMALL_FILES = 500_000, 700  # bytes of a run's other files: picture, records and W&B's; per epoch

# The table
FIXED = 64  # characters of a table without the keys of CONFIG
LONGEST = 13  # characters of such a key, or of its values, and of the space beside it
ROWS = 7  # shapes in a table, at most
UNKNOWN = "unknown"
SHOWN = tuple(key for key in (*NETWORK, "batch_size", "precision") if key != "alpha")
COLUMNS = (
    "draws",
    "parameters",
    "GFLOP\nper step",
    "memory",
    "s per\nepoch",
    "at a\ntime",
)


@dataclass(frozen=True)
class Forecast:
    r"""The expected amount of training in a sweep."""

    epochs: float  # of all runs together
    busy: float  # seconds of training in all slots together
    finish: float  # seconds from the start to the end


@dataclass
class Plan:
    r"""The plan of a sweep."""

    name: str
    trials: int = 0
    wanted: dict[str, float] = field(default_factory=dict)  # the resources of a trial
    faults: list[str] = field(default_factory=list)  # reasons why the sweep cannot run
    warnings: list[str] = field(default_factory=list)  # probable mistakes
    info: DataInfo | None = None
    sweep: Sweep | None = None  # in its normal form, if it has one
    shapes: list[Shape] = field(default_factory=list)  # the distinct ones, from small to large
    order: list[int] = field(default_factory=list)  # the shape of each draw
    nodes: list[Node] = field(default_factory=list)  # those that can hold a trial
    slots: int = 0  # trials at a time
    whole: Forecast | None = None  # if nothing is pruned
    pruned: Forecast | None = None  # with the sweep's pruner
    known: bool = False  # whether times are known; else an epoch counts as a second
    disk: int = 0  # bytes that the runs take
    free: int = 0  # bytes that are free for them

    @property
    def gpus(self) -> float:
        r"""The GPUs of a trial."""

        return self.wanted.get("GPU", 0)

    @property
    def unit(self) -> str:
        r"""The resource that is counted in hours: `GPU` or `CPU`."""

        return "GPU" if "GPU" in self.wanted else "CPU"

    def hours(self, forecast: Forecast | None) -> float | None:
        r"""Returns the GPU-hours or CPU-hours of a forecast, or None if they are unknown."""

        return forecast.busy * self.wanted[self.unit] / 3600 if forecast and self.known else None


def plan_sweep(
    source: Sweep | Path,
    options: Options,
    adjust: Callable[[Sweep], Sweep] = lambda sweep: sweep,
    report: Callable[[str], None] = lambda text: None,
) -> Plan:
    r"""Plans a sweep. Nothing is started, and nothing is left in the directory of runs.

    Arguments:
        source: The sweep, or its script.
        options: How it would be run.
        adjust: Applies the options of the command line to a script's sweep.
        report: Called with a text at each step.
    """

    slots = options.slots()
    runs, data, local = options.runs, options.data, options.address is None
    slots.grows = not local and options.parallel is not None
    sweep, broken = None, []

    try:
        sweep = load_script(source) if isinstance(source, Path) else source
        sweep = adjust(sweep)
    except UserError as error:
        broken = [str(error)]

    report(f"checking, with {DRAWS} draws")
    found = find_faults(sweep, options, slots, draws=DRAWS)
    plan = Plan(
        name=str(source) if sweep is None else sweep.name,
        trials=0 if sweep is None else sweep.trials,
        wanted=slots.wanted,
        faults=broken + found.faults,
        warnings=found.warnings,
        info=found.info,
        sweep=None if broken else found.sweep,
    )

    if plan.sweep is not None and found.info is not None:
        from .cost import distinct_shapes

        plan.shapes, plan.order = distinct_shapes(plan.sweep.configs(DRAWS), found.info, report)

        if local and slots.wanted.keys() == {"CPU"}:
            machine = Node("this machine", "", slots.most or 1, memory_limit())
            check_memory(replace(plan, nodes=[machine], warnings=[]))

    if not local or not plan.faults:
        _probe(plan, slots, runs, data, options.address, report)

    if plan.sweep is not None and plan.shapes:
        _forecast(plan, plan.sweep, slots)
        _check_disk(plan, plan.sweep, runs)

    return plan


def _probe(plan: Plan, slots: Slots, *args: Any) -> None:
    r"""Surveys the nodes, and measures the smallest, the median and the largest shape there."""

    last = len(plan.shapes) - 1
    chosen = sorted({0, last // 2, last}) if plan.shapes else []
    configs = [plan.shapes[i].config for i in chosen]
    peak = max((shape.cost.peak for shape in plan.shapes), default=0)

    try:
        nodes = probe_nodes(slots, configs, peak, plan.info, *args)
    except (UserError, OSError) as error:  # the directory of runs cannot be written
        plan.faults += [str(error)] if isinstance(error, UserError) or not plan.faults else []
        return

    if not nodes:
        plan.warnings.append(
            "no live node can hold a trial: times and memory are unknown until there is one."
        )

    plan.faults += [fault for node in nodes for fault in node.faults]
    plan.nodes = [node for node in nodes if not node.faults]


def at_a_time(node: Node, memory: float, gpus: float) -> int:
    r"""Returns the number of trials of some memory that a node can hold at a time."""

    if gpus:  # each is held to its share of a GPU
        return node.fit if memory <= MARGIN * min(1, gpus) * node.memory else 0

    return min(node.fit, int(node.memory // memory))


def memory_of(node: Node, cost: Cost) -> int:
    r"""Returns the bytes that a trial takes on a node, a lower bound if nothing was measured."""

    return cost.peak if node.speed is None else node.speed.memory(cost)


def _forecast(plan: Plan, sweep: Sweep, slots: Slots) -> None:
    r"""Sets the number of trials at a time, and the forecasts.

    On nodes of several kinds, an epoch takes the time that gives the same throughput in all.
    """

    if any(shape.config["compile"] != "off" for shape in plan.shapes):
        plan.warnings.append("times are without torch.compile: it slows the first steps only.")

    check_memory(plan)
    places = []  # trials of the mean memory at a time, and their speed

    for node in plan.nodes:
        mean = statistics.fmean(memory_of(node, plan.shapes[i].cost) for i in plan.order)

        if n := at_a_time(node, mean, plan.gpus):
            places.append((n, node))

    total = sum(n for n, _ in places)
    plan.slots = min(total, slots.most or total)
    plan.known = plan.slots > 0 and all(node.speed for _, node in places)
    rates = [
        sum(n / s for n, node in places if (s := seconds_of(plan, shape, node)))
        for shape in plan.shapes
    ]
    seconds = [total / rates[i] for i in plan.order] if plan.known else [1.0]
    rules, n = sweep.rules, max(1, plan.slots)
    every = replace(rules, min_epochs=None, recorded=None, pruner="none")
    plan.whole = forecast(every, n, seconds)
    plan.pruned = forecast(rules, n, seconds, sweep.stops())
    check_time(plan)


def seconds_of(plan: Plan, shape: Shape, node: Node) -> float | None:
    r"""Returns the seconds of an epoch on a node, or None if they are unknown."""

    if node.speed is None or plan.info is None:
        return None

    return epoch_seconds(shape.config, shape.cost, node.speed, plan.info)


def check_time(plan: Plan) -> None:
    r"""Adds a warning, the first one, if nobody waits for the end of a sweep."""

    if plan.known and plan.pruned is not None and plan.pruned.finish > LONG:
        plan.warnings.insert(
            0,
            f"the sweep takes about {format_duration(plan.pruned.finish)} here. Choose a smaller "
            "network, fewer epochs or trials, or more and faster nodes.",
        )


def check_memory(plan: Plan) -> None:
    r"""Adds a fault if no node has memory for the largest network, or warnings if some have not."""

    largest, gpus = max(plan.shapes, key=lambda shape: shape.cost.peak), plan.gpus
    share = f" per GPU, of which a trial has {gpus:g}" if 0 < gpus < 1 else ""
    takes = {node: memory_of(node, largest.cost) for node in plan.nodes}
    fit = {node: at_a_time(node, takes[node], gpus) for node in plan.nodes}

    if plan.nodes and not any(fit.values()):
        has = ", ".join(f"{x.name} has {format_size(x.memory)}" for x in plan.nodes)
        at_least = "at least " * all(node.speed is None for node in plan.nodes)
        words = " ".join(
            f"{key}={largest.config[key]}" for key in ("hidden_channels", "window", "batch_size")
        )
        best = max(plan.nodes, key=lambda node: node.memory)
        plan.faults.append(
            f"a trial with {words} takes {at_least}{format_size(min(takes.values()))}, but "
            f"{has}{share}. Choose a smaller network or batch_size"
            f"{_larger(best, min(takes.values()), gpus)}."
        )
        return

    for node, n in fit.items():
        if n < node.fit:
            advice = f"choose a smaller network or batch_size{_larger(node, takes[node], gpus)}"
            advice = advice if gpus else f"give --parallel {max(1, n)}, or more CPUs to each"
            plan.warnings.append(
                f"{node.name} runs {node.fit} trials at a time, but has memory for {n} of the "
                f"largest, {format_size(node.memory)}{share}: {advice}."
            )


def _larger(node: Node, takes: float, gpus: float) -> str:
    r"""Returns the advice to give trials a larger share of a GPU, if a larger one suffices."""

    least = math.ceil(20 * takes / MARGIN / node.memory) / 20

    return f", or give --gpus-per-trial {least:g}" if 0 < gpus < least <= 1 else ""


def _check_disk(plan: Plan, sweep: Sweep, runs: Path) -> None:
    r"""Compares the bytes that the runs leave on disk with those that are free."""

    fixed, each = SMALL_FILES
    costs = [plan.shapes[i].cost for i in plan.order]
    mean = statistics.fmean(2 * cost.state + cost.weights for cost in costs)
    assert plan.pruned is not None
    epochs = plan.pruned.epochs / sweep.trials
    plan.disk = round(sweep.trials * (mean + fixed + each * epochs))
    plan.free = free_disk(runs)

    if plan.disk > plan.free:
        plan.faults.append(
            f"{sweep.trials} runs take {plan.disk / 1e9:.1f} GB, but {runs} has {plan.free / 1e9:.1f} "
            "GB free. Make room, give another directory with --runs, or take fewer trials."
        )


def forecast(
    rules: Rules,
    slots: int,
    seconds: Sequence[float],
    stops: PruneRule | None = None,
) -> Forecast:
    r"""Returns the expected amount of training in a sweep of new runs.

    Arguments:
        rules: The rules of the sweep.
        slots: The number of runs at a time.
        seconds: The time of an epoch, of one drawn configuration after the other.
        stops: Whether a run that has reached a rung is stopped there, see :func:`decide`.
    """

    most = MOST if stops is None else FEW
    share = max(1.0, rules.target / most)
    fewer = replace(rules, target=min(rules.target, most))
    few = min(slots, max(1, round(slots / share)))
    sweeps = _count(fewer.target) if stops is None else 1
    sums = [_simulate(fewer, few, seconds, stops, random.Random(i), []) for i in range(sweeps)]

    # A longer sweep repeats this, in as many more slots as were removed here
    epochs, busy, finish = (sum(values) / sweeps for values in zip(*sums, strict=True))

    return Forecast(share * epochs, share * busy, finish * share * few / slots)


def _count(runs: int) -> int:
    r"""Returns the number of simulations of a sweep. Those of a few runs differ the most."""

    least, most = SWEEPS

    return max(least, min(most, RUNS // runs))


class Expected(NamedTuple):
    r"""The epochs that a sweep takes in all."""

    epochs: int  # that are expected
    deviation: float  # of these, between simulations
    most: int  # if all runs train to their ends


def expect(rules: Rules, records: Sequence[TrialRecord], slots: int = 1) -> Expected:
    r"""Returns the epochs that a sweep takes in all, given its runs so far.

    The rest is simulated from there, see :func:`forecast`. New runs are as likely to be good as
    those so far. If a pruner has the last word, all runs are taken to train to their ends.
    """

    own = [record for record in records if not record.source]
    going = [record for record in own if record.status == "running"]
    firsts = [r.epochs for r in own if r.state != "failed" and not r.replica_of]
    new = max(0, rules.target - len(firsts))
    most = (sum(firsts) + new * rules.epochs) * rules.seeds

    if rules.pruner in FINAL:
        return Expected(most, 0.0, most)

    # Of a long sweep, the simulations have some of the runs
    share = max(1.0, max(rules.target, len(records)) / SOME)
    whole = [r.index for r in records if not r.replica_of]
    some = {whole[int(i * share)] for i in range(math.ceil(len(whole) / share))}
    few = [r for r in records if (r.replica_of or r.index) in some]
    target, finalists = (
        count_trials(few) + math.ceil(new / share),
        math.ceil(rules.finalists / share),
    )
    fewer = replace(rules, target=target, finalists=finalists)
    at_once = max(1, round(slots / share))
    sweeps = range(_count(max(1, target, len(few))))
    rests = [_simulate(fewer, at_once, [1.0], None, random.Random(i), few)[0] for i in sweeps]
    bound = sum(record.last for record in own) + sum(r.until - r.last for r in going)
    mean = min(most, max(bound + new * rules.rungs[0], bound + share * statistics.fmean(rests)))

    return Expected(round(mean), math.sqrt(share) * statistics.pstdev(rests), most)


def estimate(rules: Rules, wanted: dict[str, float], parallel: int | None) -> str:
    r"""Returns one line about the expected training of a sweep, for its start. Measures nothing."""

    expected = expect(rules, (), parallel or 1)
    each = " ".join(f"{key}={x:g}" for key, x in wanted.items())
    slots = f", {parallel} trials at a time" if parallel else ""

    return (
        f"about {expected.epochs:,} ± {expected.deviation:,.0f} epochs{slots}, each with {each}; "
        "`sda-ray plan` measures how long they take"
    )


def _scores(
    records: Sequence[TrialRecord], rules: Rules
) -> tuple[dict[int, float], dict[int, TrialRecord]]:
    r"""Returns normal scores of runs, and the runs with scores in place of their values.

    The scores of the runs at a rung have the order of their values there.
    """

    scores = dict[int, float]()
    values: dict[int, dict[int, float]] = {r.index: dict.fromkeys([r.last], 0.0) for r in records}

    for rung in rules.rungs:
        there = [r for r in records if rung in r.values and not r.replica_of]
        there.sort(key=lambda r: math.inf if math.isnan(x := r.values[rung]) else x)
        before = sorted(scores[r.index] for r in there if r.index in scores)

        if len(before) < len(there):
            before = [NormalDist().inv_cdf((i + 0.5) / len(there)) for i in range(len(there))]

        for record, score in zip(there, before, strict=True):
            values[record.index][rung] = scores[record.index] = score

    return scores, {r.index: replace(r, values=values[r.index]) for r in records}


def _simulate(
    rules: Rules,
    slots: int,
    seconds: Sequence[float],
    stops: PruneRule | None,
    rng: random.Random,
    before: Sequence[TrialRecord],
) -> tuple[float, float, float]:
    r"""Returns what the rest of a sweep takes, from its runs so far, as a :class:`Forecast` does.

    Runs differ by a standard deviation of 1 at their first rung, and change by :data:`CROSSING`
    from rung to rung. What runs in flight still train up to their rungs is left out.
    """

    scores, records = _scores(before, rules)
    live = [(float(r.until - r.last), i) for i, r in records.items() if r.status == "running"]
    heapq.heapify(live)
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

            if action.record is None or action.kind == "replicate":
                index = max(records, default=0) + 1
                record = TrialRecord(index, "", "running", action.until, rules.epochs)
                record = replace(record, replica_of=action.record.index if action.record else 0)
            else:
                until = min(action.until, action.record.epochs)
                record = replace(action.record, state="running", until=until, shown=action.shown)

            more = record.until - record.last
            took = more * seconds[(first + record.index) % len(seconds)]
            epochs, busy = epochs + more, busy + took
            records[record.index] = record
            heapq.heappush(live, (now + took, record.index))

        if not live:
            return epochs, busy, now

        now, i = heapq.heappop(live)
        record = records[i]
        values = record.values | {record.until: 0.0}

        for rung in rules.rungs:
            if record.last < rung <= record.until:
                scores[i] = scores[i] + rng.gauss(0, CROSSING) if i in scores else rng.gauss(0, 1)
                values[rung] = scores[i]

        done = record.until == record.epochs
        records[i] = replace(record, values=values, state="complete" if done else "running")


def print_plan(plan: Plan) -> None:
    r"""Prints a plan: shapes, totals, warnings and faults."""

    console = make_console()

    if plan.shapes:
        unknown = Node("", UNKNOWN, 0, 0)

        for kind in dict.fromkeys(node.kind for node in plan.nodes) or [UNKNOWN]:
            nodes = [node for node in plan.nodes if node.kind == kind] or [unknown]
            console.print(_table(plan, nodes, console.width))

        console.print()

        for name, text in _totals(plan):
            console.print(f"{name:12} {text}")

    for text in plan.warnings:
        console.print(plain(f"warning: {text}"), style="yellow")

    for text in plan.faults:
        console.print(plain(f"fault: {text}"), style="red")

    if plan.faults:
        n = len(plan.faults)
        console.print(f"{n} fault{'s' * (n > 1)} to correct; nothing was started.")
    else:
        console.print(f"No faults in '{plan.name}'.")


def _table(plan: Plan, nodes: Sequence[Node], width: int) -> Table:
    node, count = nodes[0], len(nodes)
    values = {key: {shape.config[key] for shape in plan.shapes} for key in SHOWN}
    keys = [key for key in SHOWN if len(values[key]) > 1][: max(1, (width - FIXED) // LONGEST)]
    titles = [key.replace("_", "_\n", 1) for key in keys or ["shape"]]
    table = make_table(*titles, *COLUMNS, right=COLUMNS, fold=())
    table.title_justify = "left"
    table.title = f"{count}x {node.kind}" if count > 1 else node.kind
    last = len(plan.shapes) - 1

    for i in sorted({round(last * k / (ROWS - 1)) for k in range(ROWS)}, reverse=True):
        shape = plan.shapes[i]
        on, cost = _on(plan, shape, node), shape.cost
        known = on["seconds_per_epoch"] is not None
        table.add_row(
            *([format_value(shape.config[key]) for key in keys] or ["all"]),
            f"{shape.draws}",
            f"{cost.parameters:,}",
            f"{cost.flops / 1e9:,.1f}",
            format_size(on["memory"]) if known else f"> {format_size(cost.peak)}",
            f"{on['seconds_per_epoch']:.3g}" if known else UNKNOWN,
            f"{on['at_a_time']}" if node.fit else UNKNOWN,
        )

    return table


def _totals(plan: Plan) -> list[tuple[str, str]]:
    each = " ".join(f"{key}={x:g}" for key, x in plan.wanted.items())
    totals = [("trials", f"{plan.trials} trials, {plan.slots} at a time, each with {each}")]

    if plan.sweep is not None and plan.sweep.pruner != "none" and plan.pruned is not None:
        totals.append(("pruned", _time(plan, plan.pruned)))

    if plan.whole is not None:
        totals.append(("not pruned", _time(plan, plan.whole)))

    disk = f"{format_size(plan.disk)} for all runs, {format_size(plan.free)} free"
    notes = [("note", node.note) for node in plan.nodes if node.note]

    return [*totals, ("disk", disk), *notes]


def _time(plan: Plan, forecast: Forecast) -> str:
    epochs = f"{forecast.epochs:,.0f} epochs"
    hours = plan.hours(forecast)

    if hours is None:
        return f"{epochs}, time {UNKNOWN}"

    span = f"{epochs}, {hours:,.3g} {plan.unit}-hours, done in {format_duration(forecast.finish)}"

    if forecast.finish > LONG:  # a date has no year then, or there is none
        return span

    return f"{span}, {datetime.now() + timedelta(seconds=forecast.finish):%a %d %b %H:%M}"


def plan_to_json(plan: Plan) -> dict[str, Any]:
    r"""Returns a plan as JSON: numbers in bytes, seconds and hours, null where unknown."""

    def total(forecast: Forecast | None) -> dict[str, Any] | None:
        if forecast is None:
            return None

        finish = forecast.finish if plan.known else None
        return {"epochs": forecast.epochs, "hours": plan.hours(forecast), "finish": finish}

    return {
        "sweep": plan.name,
        "trials": plan.trials,
        "resources": plan.wanted,
        "unit": f"{plan.unit}-hours",
        "at_a_time": plan.slots,
        "shapes": [
            {"config": shape.config, "draws": shape.draws}
            | asdict(shape.cost)
            | {"nodes": [_on(plan, shape, node) for node in plan.nodes]}
            for shape in plan.shapes
        ],
        "nodes": [
            {"name": x.name, "kind": x.kind, "fit": x.fit, "memory": x.memory, "note": x.note}
            for x in plan.nodes
        ],
        "pruned": total(plan.pruned),
        "not_pruned": total(plan.whole),
        "disk": plan.disk,
        "disk_free": plan.free,
        "warnings": plan.warnings,
        "faults": plan.faults,
    }


def _on(plan: Plan, shape: Shape, node: Node) -> dict[str, Any]:
    memory = memory_of(node, shape.cost)

    return {
        "name": node.name,
        "memory": None if node.speed is None else memory,
        "seconds_per_epoch": seconds_of(plan, shape, node),
        "at_a_time": at_a_time(node, memory, plan.gpus),
    }
