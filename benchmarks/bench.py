#!/usr/bin/env python
r"""Measures all that we claim about speed, and writes it to `benchmarks/results/`.

Each suite is a script of its own here that yields its results as it finds them; it runs in a
process of its own, one after another. What was measured is saved at once: a run that was
interrupted resumes where it was when the same command is given again.

    python benchmarks/bench.py [--only step sampling ...] [--quick] [--again]
"""

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measured import Result

HERE = Path(__file__).parent
SUITES = {
    "step": "a training step",
    "sampling": "sampling, guided and not",
    "original": "step and sampling, against the package sda",
    "validation": "noise of the validation loss",
    "data": "memory of the data of several trials",
    "trials": "cost of a trial and of a start",
    "simulation": "the flow solver",
    "checkpoint": "a checkpoint",
    "study": "a study of thousands of runs",
}
MARK = "result: "


def run_suite(name: str, quick: bool) -> None:
    r"""Prints each result of a suite as JSON, in a line that begins with the mark."""

    if name == "original" and not importlib.import_module(name).is_installed():
        sys.exit("the package sda is not installed")

    if not (HERE / f"{name}.py").exists():
        sys.exit(f"there is no {name}.py")

    script = importlib.import_module(name)

    if not hasattr(script, "results"):
        sys.exit(f"{name}.py has no results")

    for result in script.results(quick):
        print(MARK + json.dumps(asdict(result)), flush=True)

    peaks = (resource.getrusage(x).ru_maxrss for x in (-1, 0))  # of children, and itself
    print(MARK + json.dumps({"peak": max(peaks) * 1024}), flush=True)


def measure(name: str, quick: bool, found: dict[str, Any]) -> Iterator[Result]:
    r"""Runs a suite in a process, fills in what was found, and yields the results one by one."""

    command = [sys.executable, str(HERE / "bench.py"), "--suite", name, *["--quick"] * quick]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    start = time.monotonic()
    loads = [os.getloadavg()[0]]
    found |= {"quick": quick, "when": f"{datetime.now():%Y-%m-%d %H:%M}", "results": []}

    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )

        try:
            for line in process.stdout or ():
                if line.startswith(MARK):
                    x = json.loads(line[len(MARK) :])
                    loads.append(os.getloadavg()[0])

                    if "name" in x:
                        found["results"].append(x)
                        yield Result(**x)
                    else:
                        found |= x

            process.wait()
        finally:
            process.terminate()
            process.wait()

        errors.seek(0)
        error = errors.read().strip()

    loads.append(os.getloadavg()[0])
    found["load"] = [round(min(loads), 1), round(max(loads), 1)]
    found["seconds"] = round(time.monotonic() - start)

    if process.returncode:
        found["failed"] = (error.splitlines() or [f"exit code {process.returncode}"])[-1]


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): x.strip() for key, x in fields.items()}
    flags = fields.get("flags", "").split()
    names = ("sda-ray", "torch", "numpy", "ray", "optuna", "jax-cfd", "sda")

    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if x in flags],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: found for name in names if (found := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def table(report: dict[str, Any]) -> str:
    r"""Returns the report as Markdown."""

    at = report["machine"]
    lines = [
        "# Results",
        "",
        f"{at['cpu']}, {at['cores']} cores, {' '.join(at['instructions']) or 'no AVX2'}; "
        f"{at['system']}; {', '.join(f'{k} {v}' for k, v in at['versions'].items())}.",
        "",
        "A ratio is how many times better ours is. What each line means is in "
        "[README.md](../README.md). Nothing was measured on a GPU.",
        "",
        "| what | ours | peer | unit | ratio | goal | met? | note |",
        "|---|--:|--:|---|--:|--:|---|---|",
    ]

    for suite in report["suites"].values():
        for x in (Result(**x) for x in suite["results"]):
            goal, met = ("–", "–") if x.goal is None else (f"{x.goal:g}", "yes" if x.met else "no")
            numbers = f"{number(x.ours)} | {number(x.peer)} | {x.unit} | **{x.ratio:.2f}**"
            lines.append(f"| {x.name} | {numbers} | {goal} | {met} | {x.note} |")

    lines += [
        "",
        "| suite | measured | took | load average | most memory | |",
        "|---|---|--:|--:|--:|---|",
    ]

    for name, suite in report["suites"].items():
        low, high = suite.get("load", (0, 0))
        remark = f"not measured: {suite['failed']}" if "failed" in suite else ""
        remark = remark or ("quick" if suite["quick"] else "")
        peak = f"{suite['peak'] / 2**20:.0f} MiB" if "peak" in suite else "–"
        took = f"{suite.get('seconds', 0)} s"
        lines.append(f"| {name} | {suite['when']} | {took} | {low}–{high} | {peak} | {remark} |")

    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], file: Path) -> None:
    r"""Draws the ratios as bars, and the goals as marks across them."""

    import matplotlib

    matplotlib.use("agg")

    import matplotlib.pyplot as plt

    found = [Result(**x) for suite in report["suites"].values() for x in suite["results"]]

    if not found:
        return

    colors = {True: "tab:green", False: "tab:red", None: "tab:gray"}
    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(found)), layout="constrained")
    ratios = [min(x.ratio, 1e3) for x in found]
    bars = axes.barh([x.name for x in found], ratios, color=[colors[x.met] for x in found])
    axes.bar_label(bars, [f"{x.ratio:.2g}" for x in found], padding=3, fontsize=8)

    for i, x in enumerate(found):
        if x.goal is not None:
            axes.plot([x.goal] * 2, [i - 0.45, i + 0.45], color="black", linewidth=2)

    axes.axvline(1, color="black", linewidth=0.5)
    axes.set(xscale="log", xlabel="times better than the peer, or than the limit (black: goal)")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save(report: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / ".results.json.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(directory / "results.json")
    (directory / "results.md").write_text(table(report))
    plot(report, directory / "results.png")


def load(directory: Path) -> dict[str, Any]:
    file = directory / "results.json"
    report = json.loads(file.read_text()) if file.exists() else {"suites": {}, "left": []}

    return {"machine": machine(), "left": report["left"], "suites": report["suites"]}


def merged(report: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    r"""Returns the report with a suite filled in, the suites in their order."""

    report["suites"][name] = found
    report["suites"] = {x: report["suites"][x] for x in SUITES if x in report["suites"]}

    return report


def show(console: Any, x: Result) -> None:
    goal = "" if x.goal is None else f", goal {x.goal:g}: {'met' if x.met else 'not met'}"
    numbers = f"{number(x.ours)} against {number(x.peer)} {x.unit}"
    console.print(
        f"  {x.name}: {numbers}, ratio {x.ratio:.2f}{goal}", highlight=False, soft_wrap=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SUITES, help=", ".join(SUITES))
    parser.add_argument("--quick", action="store_true", help="fewer sizes, draws and rounds")
    parser.add_argument("--again", action="store_true", help="do not go on with what was begun")
    parser.add_argument("--directory", type=Path, default=HERE / "results")
    parser.add_argument("--suite", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.suite:
        return run_suite(args.suite, args.quick)

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console()
    report = load(args.directory)
    todo = args.only or (not args.again and report["left"]) or list(SUITES)
    report["left"] = [x for x in SUITES if x in todo or (args.only and x in report["left"])]

    if len(todo) < len(SUITES):
        console.print(
            f"To measure: {', '.join(todo)}. All: --again", highlight=False, soft_wrap=True
        )

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())

    with Progress(*columns, console=console) as progress:
        for i, name in enumerate(todo):
            line = progress.add_task(f"{i + 1}/{len(todo)} {name}: {SUITES[name]}", total=1)
            found: dict[str, Any] = {}

            for result in measure(name, args.quick, found):
                show(console, result)
                save(merged(report, name, found), args.directory)

            if "failed" in found:
                console.print(
                    f"  {name} was not measured: {found['failed']}",
                    highlight=False,
                    soft_wrap=True,
                )

            progress.update(line, completed=1)
            report["left"].remove(name)
            save(merged(report, name, found), args.directory)

    console.print(
        f"{args.directory}: results.md, results.json, results.png", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
