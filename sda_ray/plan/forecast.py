r"""How much of its runs a sweep will train, found by going through it with made-up losses.

The rule that decides in a sweep decides here: :func:`sda_ray.search.promotion.decide`. Each run has a random
loss, which says how good it is at all rungs alike; slots that are free do what the rule says; an
epoch takes as long as it takes. Means over a few such sweeps are the forecast.

For promotion they agree with a formula. Of :math:`n` runs, all reach the first rung :math:`r`, and
about one in :math:`\eta^k` goes on to the :math:`k`-th one after it, so that the mean is

.. math:: r + \sum_{k = 1}^K \eta^{-k} (r_k - r_{k - 1}) \approx r (1 + K (1 - 1 / \eta))

epochs a run. It leaves out what the forecast has: runs that were promoted because they came first,
the finalists, and slots that wait in the end.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..search.promotion import PruneRule, Rules, TrialRecord, decide

__all__ = ["Forecast", "forecast"]

MOST = 256  # runs; a longer sweep is in proportion, up to a fifth too much for thousands
FEW = 24  # runs, where the rule that stops them is Optuna's
SWEEPS = 3


@dataclass(frozen=True)
class Forecast:
    r"""Creates what a sweep is expected to take.

    Arguments:
        epochs: The epochs of all runs together.
        busy: The seconds of all slots together in which they train.
        finish: The seconds from the start to the end.
    """

    epochs: float
    busy: float
    finish: float


def forecast(
    rules: Rules,
    slots: int,
    seconds: Sequence[float],
    end: Sequence[float] = (0.0,),
    stops: PruneRule | None = None,
) -> Forecast:
    r"""Returns what a sweep of new runs is expected to take.

    Arguments:
        rules: The rules of the sweep.
        slots: The number of runs at a time.
        seconds: The time of an epoch, of one drawn configuration after the other.
        end: The time after the last epoch of each.
        stops: Whether a run that has reached a rung is stopped there, see :func:`decide`.
    """

    most, sweeps = (MOST, SWEEPS) if stops is None else (FEW, 1)  # Optuna's verdicts take long
    share = max(1.0, rules.target / most)
    fewer = replace(rules, target=min(rules.target, most))
    few = min(slots, max(1, round(slots / share)))
    found = [_sweep(fewer, few, seconds, end, stops, random.Random(i)) for i in range(sweeps)]

    # A longer sweep does the same more often, in as many more slots as were taken away here.
    epochs, busy, finish = (sum(values) / sweeps for values in zip(*found, strict=True))

    return Forecast(share * epochs, share * busy, finish * share * few / slots)


def _sweep(
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
