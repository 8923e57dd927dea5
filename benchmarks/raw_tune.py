#!/usr/bin/env python
r"""What breaks in raw Ray Tune with Optuna, and holds in sda_ray?

Each fault is provoked twice: with `ray.tune`, `OptunaSearch` on a study that is kept in a file,
and `ASHAScheduler`, around a function that plays a training; and with a sweep of sda_ray that
trains tiny networks on random data. What is printed was observed in the studies afterwards.

    python benchmarks/raw_tune.py [--only CASE] [--side raw|ours]

The exit code is 1 if sda_ray does not hold one. All of it takes some minutes on two cores.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raw_tools import PATIENCE, Place, finish, kill, last, last_words, tune_raw, until, value

Seen = tuple[bool, str]  # whether it went well, and what was seen


# Cases: a pruned trial counts as complete


def raw_pruned(place: Place) -> Seen:
    finish(place.raw())
    trials = [t for t in place.study() if t.state.name == "COMPLETE"]
    epochs = [_epoch(t) for t in trials]
    short = [epoch for epoch in epochs if epoch < 9]

    return bool(trials) and not short, (
        f"{len(short)} of {len(trials)} COMPLETE trials were stopped early and count with their "
        f"value at epoch {', '.join(map(str, sorted(set(short)))) or '-'}"
    )


def _epoch(trial: Any) -> int:
    r"""Returns the epoch whose value a trial was told with."""

    return next(e for e in range(1, 10) if value(trial.params["x"], e) == trial.value)


def ours_pruned(place: Place) -> Seen:
    code, _ = finish(place.sweep("tiny.py"))
    trials = list(place.runs().values())
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    pruned = [t for t in trials if t.state.name == "PRUNED"]
    good = code == 0 and len(trials) == 9 == len(complete) + len(pruned)
    whole = all(last(t) == 9 and t.value == t.intermediate_values[9] for t in complete)

    return good and whole and all(last(t) < 9 for t in pruned), (
        f"{len(complete)} COMPLETE, all with the value of epoch 9; {len(pruned)} PRUNED with "
        "their curves"
    )


# A trial whose loss is not a number


def raw_nan(place: Place) -> Seen:
    finish(place.raw(nan=True))
    trials = place.study()
    open_ = [t for t in trials if t.state.name == "RUNNING"]

    return not open_, f"{len(open_)} of {len(trials)} trials RUNNING after the end of the sweep"


def ours_nan(place: Place) -> Seen:
    place.write("choice(100.0, 1e-3)", "grid")
    code, out = finish(place.sweep("tiny.py", "--trials=2"))
    trials = list(place.runs().values())
    told = [f"{t.state.name} {t.user_attrs.get('status', '')}".strip() for t in trials]

    return code == 0 and told == ["PRUNED diverged", "COMPLETE"], (
        f"exit code {code}: {', '.join(told) or last_words(out)}"
    )


# A driver that was killed


def raw_killed(place: Place) -> Seen:
    process = place.raw(pause=0.4)
    until(lambda: sum(t.state.name == "COMPLETE" for t in place.study()) >= 2, process)
    kill(process)
    before = len(place.study())
    code, out = finish(place.raw(how="restore", pause=0.4))
    after = place.study()
    open_ = sum(t.state.name == "RUNNING" for t in after)
    said = "it hangs" if code is None else f"exit code {code}, {last_words(out)}"

    return code == 0 and not open_ and len(after) == 9, (
        f"killed with {before} trials; Tuner.restore: {said}; then {len(after)} trials in the "
        f"study, {open_} of them RUNNING"
    )


def ours_killed(place: Place) -> Seen:
    process = place.sweep("tiny.py")
    until(lambda: sum(last(t) > 0 for t in place.runs().values()) >= 3, process)
    kill(process)
    before = {run: t.params for run, t in place.runs().items()}
    code, _ = finish(place.sweep("tiny"))
    after = place.runs()
    lost = [run for run, params in before.items() if after[run].params != params]
    open_ = sum(t.state.name == "RUNNING" for t in after.values())

    return code == 0 and not lost and not open_ and len(after) == 9, (
        f"killed with {len(before)} runs; the same command: exit code {code}, {len(after)} runs, "
        f"{len(lost)} lost, {open_} RUNNING"
    )


# What the pruner knows, after a driver was killed


def raw_pruner(place: Place) -> Seen:
    def known() -> list[int]:
        file = place.directory / "rung.txt"
        return [int(x) for x in file.read_text().split()] if file.exists() else []

    process = place.raw(pause=0.3, kept=False)  # in memory: else it cannot be restored
    until(lambda: known()[-1:] >= [5], process)
    time.sleep(2)
    kill(process)
    before = known()
    code, out = finish(place.raw(how="restore", pause=0.3, kept=False))
    after = known()[len(before) :]
    said = f"{after[0]} at the first decision after" if after else f"none: {last_words(out)}"

    return bool(after) and after[0] >= before[-1], (
        f"ASHA knew {before[-1:] or ['no']} values of its first rung before the kill, {said} "
        f"(exit code {code})"
    )


def ours_pruner(place: Place) -> Seen:
    found = []

    for name in ("whole", "killed"):
        there = Place(place.directory / name)
        there.directory.mkdir()
        there.write()
        process = there.sweep("tiny.py", "--parallel=1")

        if name == "killed":
            until(lambda there=there: len(there.runs()) >= 6, process)  # type: ignore[misc]
            kill(process)
            known = sum(1 in t.intermediate_values for t in there.runs().values())
            process = there.sweep("tiny", "--parallel=1")

        finish(process)
        found.append([(t.params, t.state, t.intermediate_values) for t in there.runs().values()])

    same = sum(a == b for a, b in zip(*found, strict=False))

    return found[0] == found[1] and len(found[0]) == 9, (
        f"killed with {known} values at the first rung: {same} of 9 runs end as in the same "
        "sweep undisturbed"
    )


# A finished sweep that is given more trials


def raw_extended(place: Place) -> Seen:
    finish(place.raw(trials=4))
    code, out = finish(place.raw(how="extend", trials=8))
    said = out.partition("RESULTS ")[2].strip()
    trials = len(place.study())

    return said == "8" and trials == 8, (
        f"num_samples 4, then 8 with resume: exit code {code}, {said or last_words(out)} results, "
        f"{trials} trials in the study"
    )


def ours_extended(place: Place) -> Seen:
    finish(place.sweep("tiny.py", "--trials=4"))
    before = {run: t.params for run, t in place.runs().items()}
    code, _ = finish(place.sweep("tiny", "--trials=8"))
    after = place.runs()
    kept = sum(after[run].params == params for run, params in before.items())

    return code == 0 and kept == 4 and len(after) == 8, (
        f"--trials 4, then 8: {len(after)} runs, the first {kept} among them"
    )


# More than any machine has


def raw_infeasible(place: Place) -> Seen:
    process = place.raw(cpus=64)
    until(place.study, process)  # its first draw
    code, out = finish(process, PATIENCE)
    trials = place.study()
    values = sum(last(t) > 0 for t in trials)
    said = "no end and no error" if code is None else f"exit code {code}: {last_words(out)}"

    return code is not None, (
        f"{said} for {PATIENCE:.0f} s; {len(trials)} trials in the study, {values} with a value"
    )


def ours_infeasible(place: Place) -> Seen:
    start = time.monotonic()
    code, out = finish(place.sweep("tiny.py", "--cpus-per-trial=64"), PATIENCE)
    said = out.strip().splitlines()[-1]

    return code == 2 and "CPU=64" in said and not place.runs(), (
        f"exit code {code} after {time.monotonic() - start:.1f} s: {said}"
    )


CASES = {
    "pruned": "trials that are stopped early",
    "nan": "a loss that is not a number",
    "killed": "a killed driver, with the study in a file",
    "pruner": "what the pruner knows after a kill",
    "extended": "a finished sweep that is given more trials",
    "infeasible": "a request that no node can meet",
}


def observe(side: str, case: str) -> Seen:
    directory = Path(tempfile.mkdtemp(prefix="raw-", dir="/tmp"))  # short, for Ray's sockets
    place = Place(directory)

    try:
        if side == "ours":
            place.write()

        return globals()[f"{side}_{case}"](place)
    except Exception as error:
        return False, f"could not be observed: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--side", choices=("raw", "ours"), help="one side")
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.raw:
        tune_raw(Path.cwd(), **json.loads(args.raw))
        return

    names = {"raw": "raw Ray Tune", "ours": "sda_ray"}
    fine = True

    for case in [args.only] if args.only else CASES:
        print(f"\n{case}: {CASES[case]}", flush=True)

        for side in [args.side] if args.side else names:
            good, said = observe(side, case)
            fine &= good or side == "raw"
            print(f"  {names[side]:12}  {'holds ' if good else 'BREAKS'}  {said}", flush=True)

    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
