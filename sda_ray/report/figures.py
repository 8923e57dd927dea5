r"""The figures of a report, as Plotly reads them: plain dicts, in the colours of light and dark.

Where Optuna has the figure it is Optuna's. Colours that depend on the theme are left to the page.
"""

import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import format_value, printable
from ..search import quiet_optuna
from .findings import Findings, Trial

# Okabe and Ito's colours, which all kinds of colour vision tell apart
STATES = {
    "complete": "#009e73",
    "running": "#56b4e9",
    "paused": "#e69f00",
    "pruned": "#e69f00",
    "stopped": "#cc79a7",
    "diverged": "#d55e00",
    "failed": "#a04000",
}
BEST, OTHER, SPREAD = "#0072b2", "#999999", "#cc79a7"
MOST = 6  # parameters in slices and contours
CURVES = 500  # learning curves, from the best
PAIR = 10  # runs from which on two parameters are shown together

Spec = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    r"""A figure with its title, a sentence below it, and the numbers of the runs in its lines."""

    title: str
    note: str
    spec: Spec
    runs: tuple[int, ...] = ()  # of the lines of parallel coordinates, which select them


def figures(findings: Findings) -> Iterator[Figure]:
    r"""Yields the figures of a sweep that can be drawn from what it has so far."""

    parameters = _importances, _coordinates, _slices, _contour

    for draw in (_history, _curves, _rungs, *parameters, _seeds, _timeline, _cost):
        if (figure := draw(findings)) is not None:
            yield figure


def history_of_all(sweeps: list[Findings]) -> Figure:
    r"""Returns the history of several sweeps in one figure."""

    colors = list(STATES.values())
    traces = [
        _steps(findings, findings.name, colors[i % len(colors)], findings.spent)
        for i, findings in enumerate(sweeps)
        if findings.history
    ]
    note = "The best complete run after the epochs that all runs of a sweep had trained."

    return Figure("Sweeps", note, _spec(traces, "epochs spent", sweeps[0].objective, log=True))


def _spec(traces: list[Spec], x: str, y: str, log: bool = False, **layout: Any) -> Spec:
    axes = {
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}, **({"type": "log"} if log else {})},
    }

    return {"data": traces, "layout": {**axes, "showlegend": len(traces) > 1, **layout}}


def _steps(findings: Findings, name: str, color: str, end: int) -> Spec:
    points = findings.history
    best = np.minimum.accumulate([y for _, y, _ in points]).tolist()
    x, y = [x for x, *_ in points], best

    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [*x, max(end, x[-1])],
        "y": [*y, y[-1]],
        "line": {"shape": "hv", "color": color, "width": 3},
    }


def _history(findings: Findings) -> Figure | None:
    if not findings.history:
        return None

    x, y, names = zip(*findings.history, strict=True)
    line = findings.random_search
    traces = [
        _steps(findings, "best so far", BEST, findings.spent),
        {
            "type": "scatter",
            "mode": "markers",
            "name": "complete runs",
            "x": x,
            "y": y,
            "text": names,
            "marker": {"color": STATES["complete"], "size": 8},
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "the same runs, all to the end",
            "x": [x for x, _ in line],
            "y": [y for _, y in line],
            "line": {"color": OTHER, "dash": "dash"},
        },
    ]
    note = (
        "The dashed line is the expected best of a search that trains the same configurations to "
        "the end. Runs that paused are taken to improve from there as complete ones did."
    )

    return Figure(
        "History", note, _spec(traces, "epochs spent", findings.objective, log=_positive(y))
    )


def _positive(values: Any) -> bool:
    return all(x > 0 for x in values)


def _curves(findings: Findings) -> Figure | None:
    trials = [t for t in findings.trials if t.record.state != "diverged" and t.record.values]

    if not trials:
        return None

    traces: list[Spec] = []
    named: set[str] = set()

    for trial in reversed(trials[:CURVES]):
        curve = {e: x for e, x in trial.record.values.items() if math.isfinite(x)}
        group = "best" if trial is findings.best else trial.record.status
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(curve) == 1 else "lines",
                "name": group,
                "legendgroup": group,
                "showlegend": group not in named,
                "x": list(curve),
                "y": [_digits(x) for x in curve.values()],
                "line": {
                    "color": BEST if group == "best" else STATES[trial.record.status],
                    "width": 3 if group == "best" else 1,
                },
                "hovertemplate": f"run {trial.record.index}<br>epoch %{{x}}: %{{y:.4g}}",
            }
        )
        named.add(group)

    hidden = sum(t.record.state == "diverged" for t in findings.trials)
    lines = [
        {
            "type": "line",
            "x0": r,
            "x1": r,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"dash": "dot", "width": 1, "color": OTHER},
        }
        for r in findings.rules.rungs[:-1]
        if len(findings.rules.rungs) <= 12
    ]
    values = [x for trace in traces for x in trace["y"]]
    spec = _spec(traces, "epoch", findings.objective, _positive(values), shapes=lines)
    spec["layout"] |= {"hovermode": "closest", "showlegend": True}
    spec["layout"]["xaxis"]["type"] = "log"
    note = "Dotted lines are rungs, at which runs are compared." if lines else ""

    if hidden:
        note += f" {hidden} runs that diverged are left out."

    return Figure("Learning curves", note, spec)


def _digits(x: float) -> float:
    return float(f"{x:.5g}")


def _rungs(findings: Findings) -> Figure | None:
    found = findings.correlations()

    if not found:
        return None

    trace = {
        "type": "bar",
        "x": [f"epoch {rung}" for rung, *_ in found],
        "y": [tau for _, tau, _ in found],
        "text": [f"{tau:.2f}, {n} runs" for _, tau, n in found],
        "marker": {"color": BEST},
    }
    note = (
        "Kendall's τ between the order at a rung and at the end, over complete runs: 1 is the same "
        "order, 0 none. Only runs that did well at the rungs are complete, which lowers it."
    )
    spec = _spec([trace], "", "rank correlation with the end")
    spec["layout"]["yaxis"]["range"] = [-1.05, 1.15]

    return Figure("May the rungs be trusted?", note, spec)


def _importances(findings: Findings) -> Figure | None:
    if not findings.shares:
        return None

    rows = list(reversed(findings.shares.items()))
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, _ in rows],
        "x": [share for _, (share, *_) in rows],
        "marker": {"color": BEST},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, high - share) for _, (share, _, high) in rows],
            "arrayminus": [max(0.0, share - low) for _, (share, low, _) in rows],
        },
    }
    note = f"PED-ANOVA over {len(findings.complete)} complete runs, with 90 % intervals."

    return Figure("What mattered", note, _spec([trace], "share", ""))


# Parameters

EXPECTED = "Runs that paused are shown with the objective that they are expected to end with."


def _optuna(findings: Findings, name: str, least: int, **options: Any) -> Spec | None:
    r"""Returns a figure of Optuna without its theme, in which each run has its expected objective."""

    import optuna

    trials = [t for t in findings.trials if t.record.run_id in findings.expected]
    title = findings.objective + " at the end" * (len(findings.complete) < len(trials))

    if len(trials) < least or not any(t.record.trial.params for t in trials):
        return None

    with quiet_optuna(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study()

        for trial in sorted(trials, key=lambda t: t.record.index):
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.record.trial.params,
                    distributions=trial.record.trial.distributions,
                    value=findings.expected[trial.record.run_id],
                )
            )

        plot = getattr(optuna.visualization, f"plot_{name}")
        figure = plot(study, target=lambda trial: trial.value, target_name=title, **options)

    spec: Spec = json.loads(figure.to_json())

    for key in ("template", "title"):
        spec["layout"].pop(key, None)

    return spec


def _coordinates(findings: Findings) -> Figure | None:
    r"""Draws parallel coordinates that can be brushed, which those of Optuna 5 cannot."""

    known = [t for t in findings.trials if t.record.run_id in findings.expected]
    keys = list(dict.fromkeys(key for t in known for key in t.record.trial.params))
    full = [t for t in known if {*keys} <= t.record.trial.params.keys()]
    trials = sorted(full, key=lambda t: t.record.index)

    if len(trials) < 2:
        return None

    values = [_digits(findings.expected[t.record.run_id]) for t in trials]
    dimensions = [_dimension(key, trials) for key in keys]
    line = {"color": values, "colorscale": "Viridis", "reversescale": True, "showscale": True}
    objective = {"label": findings.objective, "values": values}
    trace = {"type": "parcoords", "line": line, "dimensions": [*dimensions, objective]}
    layout = {"margin": {"l": 90, "r": 30, "t": 56, "b": 30}}
    note = f"Drag along an axis to select runs, in the table, too. {EXPECTED}"

    if len(trials) < len(known):
        note += f" {len(known) - len(trials)} runs lack some of the parameters."

    indices = tuple(t.record.index for t in trials)

    return Figure("Parallel coordinates", note, {"data": [trace], "layout": layout}, indices)


def _dimension(key: str, trials: list[Trial]) -> Spec:
    r"""Returns an axis: options by their number, and the logarithm of what is drawn on that scale."""

    domain = trials[0].record.trial.distributions[key]
    values = [t.record.trial.params[key] for t in trials]

    if not hasattr(domain, "low"):
        options = list(dict.fromkeys(values))
        texts = [printable(x, 30) for x in options]
        places = list(range(len(options)))
        found = [options.index(x) for x in values]

        return {"label": key, "values": found, "tickvals": places, "ticktext": texts}

    if not domain.log:
        return {"label": key, "values": [_digits(x) for x in values]}

    low, high = (math.log10(f(values)) for f in (min, max))
    ticks = [low + (high - low) * i / 4 for i in range(5)]

    return {
        "label": key,
        "values": [_digits(math.log10(x)) for x in values],
        "tickvals": ticks,
        "ticktext": [f"{10**x:.2g}" for x in ticks],
    }


def _names(findings: Findings) -> list[str]:
    r"""Returns the parameters to show, the most important first."""

    varied = {key for t in findings.trials for key in t.record.trial.params}
    ranked = [key for key in findings.shares if key in varied]

    return [*ranked, *sorted(varied - {*ranked})][:MOST]


def _slices(findings: Findings) -> Figure | None:
    if (found := _optuna(findings, "slice", 2, params=_names(findings))) is None:
        return None

    return Figure("Slices", EXPECTED, found)


def _contour(findings: Findings) -> Figure | None:
    names = _names(findings)[:2]

    if len(names) < 2 or (found := _optuna(findings, "contour", PAIR, params=names)) is None:
        return None

    return Figure(f"{names[0]} and {names[1]}", f"The two that mattered most. {EXPECTED}", found)


# Runs


def _seeds(findings: Findings) -> Figure | None:
    groups: dict[str, list[float]] = {}

    complete = [t for t in findings.trials if t.record.state == "complete"]

    for trial in complete:
        others = {k: x for k, x in trial.record.config.items() if k != "seed"}
        name = ", ".join(f"{k}={brief(x)}" for k, x in others.items()) or "all"
        groups.setdefault(name, []).append(trial.record.values[trial.record.last])

    if "seed" not in {key for t in complete for key in t.record.config}:
        return None

    shown = sorted(groups.items(), key=lambda item: sum(item[1]) / len(item[1]))[:20]
    traces = [
        {
            "type": "box",
            "name": name,
            "x": values,
            "boxpoints": "all",
            "orientation": "h",
            "marker": {"color": BEST},
        }
        for name, values in reversed(shown)
    ]
    spec = _spec(traces, findings.objective, "", showlegend=False)

    return Figure("Seeds", "Complete runs that differ in the seed alone are a row.", spec)


def brief(x: Any) -> str:
    r"""Returns a value in few digits, or a dash if there is none."""

    return "–" if x is None else f"{x:.4g}" if isinstance(x, float) else format_value(x)


def _timeline(findings: Findings) -> Figure | None:
    own = [trial for trial in findings.trials if not trial.record.source]
    spans = sorted(
        ((*attempt, t.record.index, t) for t in own for attempt in t.attempts),
        key=lambda span: span[:4],
    )

    if not spans:
        return None

    lanes: dict[str, list[float]] = {}  # the end of the last attempt in each slot, by host
    start, bars = spans[0][0], []

    for begin, end, host, index, trial in spans:
        ends = lanes.setdefault(host, [])
        slot = next((i for i, x in enumerate(ends) if x <= begin + 1), len(ends))
        ends[slot : slot + 1] = [end]
        bars.append((f"{host} {slot + 1}", begin - start, end - begin, index, trial))

    total = max(end for ends in lanes.values() for end in ends) - start
    units = {"seconds": 1, "minutes": 60, "hours": 3600}
    unit, size = max(
        (x for x in units.items() if total > 2 * x[1]), key=lambda x: x[1], default=("seconds", 1)
    )
    busy = sum(took for _, _, took, _, _ in bars)
    slots = sum(map(len, lanes.values()))
    traces = []

    for status in dict.fromkeys(trial.record.status for *_, trial in bars):
        chosen = [bar for bar in bars if bar[4].record.status == status]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": status,
                "y": [lane for lane, *_ in chosen],
                "base": [_digits(begin / size) for _, begin, *_ in chosen],
                "x": [_digits(took / size) for _, _, took, *_ in chosen],
                "text": [str(index) for *_, index, _ in chosen],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "marker": {"color": STATES[status], "line": {"width": 1, "color": "#ffffff"}},
                "hovertemplate": "run %{text}<br>%{x:.3g} " + unit,
            }
        )

    spec = _spec(traces, unit, "", barmode="overlay")
    spec["layout"]["yaxis"] |= {"type": "category", "categoryorder": "category descending"}
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(start))
    idle = max(0.0, 1 - busy / (slots * total)) if total else 0.0
    note = f"What ran where, from {began} UTC. Slots were idle for {idle:.0%} of the time."

    return Figure("Timeline", note, spec)


def _cost(findings: Findings) -> Figure | None:
    epochs: dict[str, int] = {}
    seconds: dict[str, float] = {}

    for trial in findings.trials:
        if not trial.record.source:
            epochs[trial.record.status] = epochs.get(trial.record.status, 0) + trial.record.last
            seconds[trial.record.status] = seconds.get(trial.record.status, 0.0) + trial.seconds

    if not any(epochs.values()):
        return None

    trace = {
        "type": "bar",
        "x": list(epochs),
        "y": list(epochs.values()),
        "text": [f"{seconds[key] / 3600:.3g} h" for key in epochs],
        "marker": {"color": [STATES[key] for key in epochs]},
    }

    return Figure(
        "Cost", "Epochs by where their runs stand now, and hours.", _spec([trace], "", "epochs")
    )
