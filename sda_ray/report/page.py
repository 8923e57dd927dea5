r"""The report as a page: one HTML file that needs no network."""

import base64
import gzip
import importlib.util
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..core import Hold, UserError, format_duration, format_value, plain, write_atomic
from ..runs import RunPath, timestamp
from ..search import TrialRecord, count_trials
from .figures import STATES, Figure, brief, figures, history_of_all
from .findings import Findings, Trial, read_findings

PICTURES = 3  # runs whose samples are shown
PICTURE = 70  # quality of their pictures
PLACE = Path(__file__).parent
COLUMNS, WHY = ("#", "run", "status", "epoch"), "why it stopped there"


def write_report(
    runs: Path, names: list[str], file: Path | None = None, hold: Hold = nullcontext
) -> Path:
    r"""Writes the report of one or several sweeps and returns its file.

    It shows the sweeps as they stand, also while they run, and reads them only.

    Arguments:
        runs: The directory of all runs.
        names: The names of the sweeps.
        file: The file, by default `report.html` in the directory of the first sweep.
        hold: Holds a lease during the write.

    Raises:
        UserError: If a sweep does not exist, has not begun, or its record is damaged.
    """

    from jinja2 import Environment, FileSystemLoader

    sweeps = [read_findings(runs, name) for name in dict.fromkeys(names)]
    file = file or sweeps[0].directory / "report.html"
    drawn = [list(figures(findings)) for findings in sweeps]
    shared = [history_of_all(sweeps)] if len(sweeps) > 1 and any(f.history for f in sweeps) else []
    environment = Environment(
        loader=FileSystemLoader(PLACE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(
        version=__version__,
        written=timestamp(),
        sweeps=[_sweep(findings, file) for findings in sweeps],
        figures=[[(x.title, x.note) for x in group] for group in drawn],
        shared=[(x.title, x.note) for x in shared],
        specs=_script([[_spec(x) for x in group] for group in (*drawn, shared)]),
        style=PLACE.joinpath("page.css").read_text(),
        program=PLACE.joinpath("page.js").read_text(),
        library=_library(),
    )

    with hold():
        write_atomic(file, page.encode(errors="replace"), mode=0o644)

    return file


def _spec(figure: Figure) -> dict[str, Any]:
    return {**figure.spec, "runs": figure.runs, "title": figure.title}


def _script(value: Any) -> Any:
    r"""Returns a value as JSON that can stand in a script of a page, whatever texts are in it."""

    from markupsafe import Markup

    text = json.dumps(_finite(value), separators=(",", ":"))

    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    elif isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    elif isinstance(value, float):
        return value if math.isfinite(value) else None

    return value


def _library() -> str:
    r"""Returns Plotly's program, compressed, as text. Importing plotly itself would take a second."""

    found = importlib.util.find_spec("plotly")

    if found is None or not found.submodule_search_locations:
        raise UserError("the report needs plotly: pip install plotly")

    file = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"

    return base64.b64encode(gzip.compress(file.read_bytes(), 6, mtime=0)).decode()


def _sweep(findings: Findings, file: Path) -> dict[str, Any]:
    best = findings.best
    definition = findings.sweep["definition"]
    keys = list(dict.fromkeys(key for t in findings.trials for key in findings.settings(t)))
    mean = ["mean over seeds"] if findings.seeded else []

    return {
        "name": findings.name,
        "objective": findings.objective,
        "found": list(findings.found()),
        "cost": list(findings.cost()),
        "doubts": list(findings.doubts()),
        "best": best and {k: format_value(x) for k, x in best.record.config.items()},
        "value": best and brief(best.record.value),
        "count": count_trials([trial.record for trial in findings.trials]),
        "target": findings.rules.target,
        "complete": len(findings.complete),
        "spent": findings.spent,
        "titles": [*COLUMNS, findings.objective, "±", *mean, "sample_std", *keys, "time", WHY],
        "rows": [_row(findings, trial, keys, file) for trial in findings.trials],
        "failures": [
            (t.record.index, t.name, t.record.status, plain(t.record.error))
            for t in findings.trials
            if t.record.status in ("failed", "diverged")
        ],
        "pictures": list(_pictures(findings)),
        "provenance": _provenance(findings),
        "config": {k: format_value(x) for k, x in definition["config"].items()},
    }


def _row(findings: Findings, trial: Trial, keys: list[str], file: Path) -> dict[str, Any]:
    r"""Returns a row of the table: cells of a text and what to sort it by, and a link."""

    record, settings = trial.record, findings.settings(trial)
    last = trial.metrics[-1] if trial.metrics else {}
    cells: list[tuple[str, Any]] = [
        (str(record.index), record.index),
        (trial.name, trial.name),
        (trial.record.status, trial.record.status),
        (f"{record.last}/{record.epochs}", record.last),
        (brief(own := record.trajectory.get(record.last)), own),
        (brief(findings.error(trial)), findings.error(trial)),
        *([(_mean(record), record.value if record.seeds else None)] * findings.seeded),
        (brief(last.get("sample_std")), last.get("sample_std")),
        *((brief(settings.get(key)), settings.get(key)) for key in keys),
        (format_duration(trial.seconds), trial.seconds),
        (trial.why, trial.why),
    ]
    link = None

    if trial.directory is not None:
        link = quote(os.path.relpath(trial.directory, file.resolve().parent)) + "/"

    return {
        "index": record.index,
        "color": STATES[trial.record.status],
        "link": link,
        "cells": [(plain(text), _key(value)) for text, value in cells],
    }


def _mean(record: TrialRecord) -> str:
    if not record.seeds:
        return "–"

    error = record.error_over_seeds

    return brief(record.value) + ("" if error is None else f" ± {error:.1g} ({len(record.seeds)})")


def _key(value: Any) -> str:
    r"""Returns the text by which the page sorts: a number as such, nothing last."""

    if isinstance(value, int | float):
        return repr(float(value)) if math.isfinite(value) else ""

    return "" if value is None else plain(format_value(value))


def _pictures(findings: Findings) -> Iterator[tuple[int, str, str]]:
    r"""Yields the number, the name and the samples, as WebP in base64, of the best runs."""

    from PIL import Image

    for trial in findings.complete[:PICTURES]:
        with suppress(OSError, ValueError, TypeError):
            file = RunPath(trial.directory).samples if trial.directory else None

            if file is not None and file.is_file():
                with Image.open(file) as image, io.BytesIO() as stream:
                    image.convert("RGB").save(stream, format="webp", quality=PICTURE)
                    text = base64.b64encode(stream.getvalue()).decode()
                    yield trial.record.index, trial.name, text


def _provenance(findings: Findings) -> dict[str, str]:
    definition, best = findings.sweep["definition"], findings.best
    runs = [trial.run for trial in findings.trials if trial.run.get("attempts")]
    attempts = [attempt for run in runs for attempt in run["attempts"]]
    last = best.run["attempts"][-1] if best and best.run.get("attempts") else {}
    rungs = ", ".join(map(str, findings.rules.rungs[:-1]))
    commits = {
        x.get("commit") + " with changes" * bool(x.get("dirty"))
        for x in attempts
        if x.get("commit")
    }
    found = {
        "started": findings.sweep.get("created"),
        "command": f"sda-ray sweep {findings.name}",
        "sampler": f"{definition['sampler']}, seed {definition['seed']}",
        "pruner": definition["pruner"] + (f", rungs at epochs {rungs}" if rungs else ""),
        "data": findings.sweep.get("fingerprint"),
        "code": findings.sweep.get("code"),
        "commit": ", ".join(sorted(commits)),
        "hosts": ", ".join(sorted({str(x.get("host")) for x in attempts})),
        "devices": ", ".join(sorted({str(x.get("device")) for x in attempts})),
        "versions": ", ".join(f"{k} {x}" for k, x in last.get("versions", {}).items()),
    }

    return {key: plain(x) for key, x in found.items() if x}
