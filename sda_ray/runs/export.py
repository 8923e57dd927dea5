r"""Exports of finished runs: a directory to share, with the network, its config and a model card.

An export has no path, host, user or account of W&B.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core import (
    CONFIG,
    KEYS,
    Config,
    UserError,
    format_value,
    open_atomic,
    open_regular,
    printable,
    save_config,
    write_atomic,
)
from ..nn import MCScoreNet, load_network
from .evaluation import Evaluation, read_evaluation, summarize
from .figures import draw_curve
from .inventory import Entry, in_full, read_entry, source
from .path import RunPath

CARD = "README.md"
FILES = {"config.json", "state.pth", "model.safetensors", CARD, "samples.png", "curve.png"}
HEAD = "---\nlibrary_name: sda_ray\n"  # by which an export is known
SDA_SIZE = 64  # cells along each axis, the only ones that SDA's network has a forcing for

# Metrics at the end of a training, with what they are
METRICS = {
    "loss_train": "mean loss over the last epoch",
    "loss_valid": "loss on validation data, ± its standard error",
    "loss_valid_raw": "the same without averaging the weights",
    "denoising": "loss by which networks of any window compare, ± its standard error",
    "skill": "CRPS of ensembles given observations, ± its standard error",
    "sample_std": "standard deviation of samples, relative to that of the data; 1 is perfect",
    "sample_spectrum": "difference of the log10 spectra of samples and data; 0 is perfect",
    "sample_divergence": "divergence of samples, relative to that of the data; 1 is perfect",
}

# Metrics of an evaluation that the card shows
JUDGED = (
    *("crps", "rmse", "spread_skill", "chi2", "residual"),
    *("sample_std", "sample_spectrum", "sample_divergence"),
)


def export_run(path: RunPath, target: Path, force: bool = False) -> None:
    r"""Writes a finished run into a new or empty directory.

    The directory is written aside and renamed: it is whole or absent, whatever interrupts.

    Arguments:
        force: Whether an earlier export may be replaced, but nothing else.

    Raises:
        UserError: If the run is not finished or is damaged, or the directory has something else.
    """

    target, entry = target.resolve(), read_entry(path)

    if entry is None or entry.faults:
        raise UserError("\n".join(entry.faults if entry else [f"{path.directory} has no run."]))

    score, config = load_network(path.directory)
    _check_target(target, force)
    aside, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp") for _ in "12")

    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        _write(aside, entry, score, config)

        if force and target.exists():
            target.rename(old)

        aside.rename(target)  # over an empty directory at most
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}.") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)

        for left in (old, aside):
            shutil.rmtree(left, ignore_errors=True)


def _check_target(target: Path, force: bool) -> None:
    if target == Path.cwd():  # it would be another directory afterwards
        raise UserError(f"{target} is the current directory. Give another one.")

    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return

    if not force or not target.is_dir():
        raise UserError(
            f"{target} exists and is not an empty directory. Give another one, or --force to "
            "replace an earlier export."
        )

    names = {file.relative_to(target).as_posix() for file in target.rglob("*")}
    others = {name for name in names - FILES if not re.fullmatch(r"evaluation(/.*\.png)?", name)}
    card = target / CARD

    if others or not card.is_file() or not card.read_bytes().startswith(HEAD.encode()):
        what = f"has {min(others)}, which no export has" if others else "is not an export"
        raise UserError(f"{target} {what}: --force leaves it alone. Give another directory.")


def _write(directory: Path, entry: Entry, score: MCScoreNet, config: Config) -> None:
    from safetensors.torch import save

    path = entry.path
    entry, lines = in_full(entry)
    evaluation = read_evaluation(path)
    weights = {name: x.contiguous() for name, x in score.state_dict().items()}
    metadata = {"format": "pt", "config": json.dumps(config)}

    save_config(config, directory / "config.json")
    write_atomic(directory / "model.safetensors", save(weights, metadata))

    if lines:
        draw_curve(directory / "curve.png", lines)

    for file in (path.state, path.samples, *_figures(path)):
        if file.is_file():
            copy = directory / file.relative_to(path.directory)
            copy.parent.mkdir(exist_ok=True)

            with os.fdopen(open_regular(file), "rb") as f, open_atomic(copy) as g:
                shutil.copyfileobj(f, g)

    figures = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*.png"))
    card = _card(entry, score, config, lines, evaluation, figures)
    write_atomic(directory / CARD, card.encode())


def _figures(path: RunPath) -> list[Path]:
    r"""Returns the figures of an evaluation by us. Others may have odd names, or be elsewhere."""

    directory = path.evaluation.with_suffix("")
    files = [] if directory.is_symlink() else directory.glob("*.png")

    return [file for file in files if re.fullmatch(r"[\w-]+\.png", file.name)]


# The model card


def _card(
    entry: Entry,
    score: MCScoreNet,
    config: Config,
    lines: Sequence[dict[str, Any]],
    evaluation: Evaluation | None,
    figures: Sequence[str],
) -> str:
    name, last = printable(entry.path.name or entry.path.id), lines[-1] if lines else {}
    size = score.state_dict()["kernel.forcing"].shape[-1]
    weights = sum(p.numel() for p in score.parameters())
    values = {key: last[key] for key in METRICS if math.isfinite(last.get(key, math.nan))}
    images = [f"![{Path(figure).stem}]({figure})" for figure in figures]
    settings = {key: (_code(format_value(x)), KEYS[key].about) for key, x in config.items()}
    parts = [
        _head(name, values),
        f"# {_code(name)}",
        f"A score network of {config['window']} consecutive states of Kolmogorov flow, two "
        f"velocities on a periodic grid of {size}×{size} cells, for [score-based data "
        f"assimilation](https://arxiv.org/abs/2306.10574). It has {weights:,} weights and "
        "estimates the noise in trajectories of any length from that window on. Velocities are "
        "not normalised.",
        "## Use",
        _usage(config, size),
        "## Results",
        f"At the end of the training, epoch {last.get('epoch', config['epochs'])}:"
        if values
        else "The run has no record of its metrics.",
        _table(("metric", "value", ""), _results(values, last)),
        *(image for image in images if "(evaluation/" not in image),
        *_evaluation(evaluation),
        *(image for image in images if "(evaluation/" in image),
        "## Settings",
        _table(("key", "value", ""), ((_code(key), *row) for key, row in settings.items())),
        "## Provenance",
        _table(("", ""), ((key, _code(x)) for key, x in _provenance(entry, lines).items())),
    ]

    return "\n\n".join(part for part in parts if part) + "\n"


def _head(name: str, values: dict[str, float]) -> str:
    r"""Returns the metadata of a model card on Hugging Face. JSON is YAML, too."""

    result = {
        "task": {"type": "other", "name": "Denoising of trajectories"},
        "dataset": {"type": "kolmogorov-flow", "name": "Kolmogorov flow"},
        "metrics": [{"type": key, "name": METRICS[key], "value": x} for key, x in values.items()],
    }
    fields = {
        "license": "unknown",
        "tags": ["diffusion", "score-based-data-assimilation", "kolmogorov-flow", "safetensors"],
        "metrics": list(values),
        "model-index": [{"name": name, "results": [result] if values else []}],
    }

    return HEAD + "".join(f"{key}: {json.dumps(x)}\n" for key, x in fields.items()) + "---"


def _usage(config: Config, size: int) -> str:
    ours = [key for key in CONFIG if KEYS[key].ours and KEYS[key].network]
    against = [f"`{key}={config[key]}`" for key in ours if config[key] != CONFIG[key]]
    against += [f"fields of {size}×{size} cells"] if size != SDA_SIZE else []
    refuses = f"does not load `state.pth`: it does not know {' and '.join(against)}"
    does = refuses if against else 'loads `state.pth`, too: `load_score(Path("state.pth"))`'

    return f"""In this directory:

```python
from sda_ray import load_sde, plot

sde = load_sde(".", length={max(16, config["window"])})
plot(sde.sample((2,), steps=64)).save("trajectories.png")
```

The weights alone are in `model.safetensors` and, the same bits, in `state.pth`:

```python
from safetensors.torch import load_file

weights = load_file("model.safetensors")  # or torch.load("state.pth", weights_only=True)
```

The code of [SDA](https://github.com/francois-rozet/sda) {does}."""


def _results(values: dict[str, float], last: dict[str, Any]) -> Iterable[Sequence[str]]:
    for key, x in values.items():
        error = last.get(f"{key}_se")
        shown = f"{x:.4g}" + ("" if error is None else f" ± {error:.1g}")
        yield _code(key), shown, METRICS[key]


def _evaluation(evaluation: Evaluation | None) -> Iterable[str]:
    r"""Yields the means of an evaluation over test data, with their 95 % intervals."""

    if evaluation is None:
        return

    summary = summarize(evaluation)
    titles = [key for key in JUDGED if any(key in metrics for metrics in summary.values())]
    rows = [
        [_code(name), *(_interval(metrics.get(key)) for key in titles)]
        for name, metrics in summary.items()
    ]
    settings = (f"{printable(key)} {x}" for key, x in evaluation.settings.items() if x is not None)
    yield f"On test data, by `sda-ray evaluate` with {_code(', '.join(settings))}:"
    yield _table(("observation", *titles), rows)


def _interval(interval: Sequence[float] | None) -> str:
    mean, low, high = interval or (None, None, None)
    text = "" if mean is None else f"{mean:.3g}"

    return text if low == high else f"{text} [{low:.3g}, {high:.3g}]"


def _provenance(entry: Entry, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    labels = source(entry, entry.path.directory.parent)
    kept = ("started", "sweep", "trial", "parent", "attempts", "exact", "commit", "data", "from")
    attempts = entry.record.get("attempts", [])
    versions = [attempt.get("versions", {}) for attempt in attempts]
    found = {key: labels.get(key) for key in kept}
    found |= {key: _distinct(attempts, key) for key in ("device", "threads", "code")}
    found |= {key: _distinct(versions, key) for key in ("python", "sda_ray", "numpy", "torch")}
    found["hours"] = f"{sum(x.get('seconds', 0.0) for x in lines) / 3600:.3g}" if lines else None
    found["run"], found["seed"] = entry.path.id, (entry.config or CONFIG)["seed"]

    return {key: x for key, x in found.items() if x not in (None, "")}


def _distinct(records: Iterable[dict[str, Any]], key: str) -> str:
    return ", then ".join(dict.fromkeys(str(x[key]) for x in records if x.get(key) is not None))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (titles, ["---"] * len(titles), *rows)]

    return "\n".join(f"| {line} |" for line in lines) if len(lines) > 2 else ""


def _code(value: Any) -> str:
    r"""Returns a value, which anyone may have written, as code in Markdown."""

    return f"`{printable(value).replace('`', chr(39)).replace('|', '/')}`"
