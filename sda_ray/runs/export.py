r"""Runs for others: a directory to share, and whether the training comes out the same elsewhere.

An export has the network, its config and a model card. It has no path, host, user or account of
W&B. A reproduction trains the first epochs of a run again and compares them bit for bit.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..core import (
    CONFIG,
    KEYS,
    Config,
    ProgressBar,
    UserError,
    format_value,
    open_atomic,
    open_regular,
    printable,
    save_config,
    write_atomic,
)
from ..data import fingerprint
from ..nn import MCScoreNet, load_network
from ..training import Diverged, Metrics
from .evaluation import Evaluation, format_interval, read_evaluation, summarize
from .figures import draw_curve
from .inventory import Entry, in_full, read_entry, source
from .metrics import read_history
from .path import RunPath
from .record import check_same_data, differences, read_record
from .run import Run
from .tracking import Wandb
from .train import train_run

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


def export_run(path: RunPath, target: Path) -> None:
    r"""Writes a finished run into a new or empty directory.

    The directory is written aside and renamed: it is whole or absent, whatever interrupts.

    Raises:
        UserError: If the run is not finished or is damaged, or the directory has something else.
    """

    target, entry = target.resolve(), read_entry(path)

    if entry is None or entry.faults:
        raise UserError("\n".join(entry.faults if entry else [f"{path.directory} has no run."]))

    score, config = load_network(path.directory)

    if target == Path.cwd():  # it would be another directory afterwards
        raise UserError(f"{target} is the current directory. Give another one.")

    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty directory. Give another one.")

    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")

    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        _write(aside, entry, score, config)
        aside.rename(target)  # over an empty directory at most
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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

    # Those that we drew: a stranger's may have odd names, or be elsewhere
    drawn = path.evaluation.with_suffix("")
    images = [] if drawn.is_symlink() else drawn.glob("*.png")
    images = [file for file in images if re.fullmatch(r"[\w-]+\.png", file.name)]

    for file in (path.state, path.samples, *images):
        if file.is_file():
            copy = directory / file.relative_to(path.directory)
            copy.parent.mkdir(exist_ok=True)

            with os.fdopen(open_regular(file), "rb") as f, open_atomic(copy) as g:
                shutil.copyfileobj(f, g)

    figures = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*.png"))
    card = _card(entry, score, config, lines, evaluation, figures)
    write_atomic(directory / "README.md", card.encode())


# The model card


def _card(
    entry: Entry,
    score: MCScoreNet,
    config: Config,
    lines: Sequence[Metrics],
    evaluation: Evaluation | None,
    figures: Sequence[str],
) -> str:
    name, last = printable(entry.path.name or entry.path.id), lines[-1] if lines else {}
    size = score.state_dict()["kernel.forcing"].shape[-1]
    weights = sum(p.numel() for p in score.parameters())
    values = {key: last[key] for key in METRICS if math.isfinite(last.get(key, math.nan))}
    errors = {key: f" ± {last[f'{key}_se']:.1g}" for key in values if f"{key}_se" in last}
    results = [(_code(k), f"{x:.4g}{errors.get(k, '')}", METRICS[k]) for k, x in values.items()]
    images = [f"![{Path(figure).stem}]({figure})" for figure in figures]
    settings = [(_code(k), _code(format_value(x)), KEYS[k].about) for k, x in config.items()]
    provenance = [(key, _code(x)) for key, x in _provenance(entry, lines).items()]
    ended = f"At the end of the training, epoch {last.get('epoch', config['epochs'])}:"
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
        ended if values else "The run has no record of its metrics.",
        _table(("metric", "value", ""), results),
        *(image for image in images if "(evaluation/" not in image),
        *_evaluation(evaluation),
        *(image for image in images if "(evaluation/" in image),
        "## Settings",
        _table(("key", "value", ""), settings),
        "## Provenance",
        _table(("", ""), provenance),
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
        "library_name": "sda_ray",
        "license": "unknown",
        "tags": ["diffusion", "score-based-data-assimilation", "kolmogorov-flow", "safetensors"],
        "metrics": list(values),
        "model-index": [{"name": name, "results": [result] if values else []}],
    }

    return "---\n" + "".join(f"{key}: {json.dumps(x)}\n" for key, x in fields.items()) + "---"


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


def _evaluation(evaluation: Evaluation | None) -> Iterable[str]:
    r"""Yields the means of an evaluation over test data, with their 95 % intervals."""

    if evaluation is None:
        return

    summary = summarize(evaluation)
    titles = [key for key in JUDGED if any(key in metrics for metrics in summary.values())]
    rows = [
        [_code(name), *(format_interval(metrics.get(key)) for key in titles)]
        for name, metrics in summary.items()
    ]
    settings = (f"{printable(key)} {x}" for key, x in evaluation.settings.items() if x is not None)
    yield f"On test data, by `sda-ray evaluate` with {_code(', '.join(settings))}:"
    yield _table(("observation", *titles), rows)


def _provenance(entry: Entry, lines: Sequence[Metrics]) -> dict[str, Any]:
    def distinct(records: Iterable[dict[str, Any]], key: str) -> str:
        values = (str(x[key]) for x in records if x.get(key) is not None)
        return ", then ".join(dict.fromkeys(values))

    labels = source(entry, entry.path.directory.parent)
    kept = ("started", "sweep", "trial", "parent", "attempts", "exact", "commit", "data", "from")
    attempts = entry.record.get("attempts", [])
    versions = [attempt.get("versions", {}) for attempt in attempts]
    found = {key: labels.get(key) for key in kept}
    found |= {key: distinct(attempts, key) for key in ("device", "threads", "code")}
    found |= {key: distinct(versions, key) for key in ("python", "sda_ray", "numpy", "torch")}
    found["hours"] = f"{sum(x.get('seconds', 0.0) for x in lines) / 3600:.3g}" if lines else None
    found["run"], found["seed"] = entry.path.id, (entry.config or CONFIG)["seed"]

    return {key: x for key, x in found.items() if x not in (None, "")}


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (titles, ["---"] * len(titles), *rows)]

    return "\n".join(f"| {line} |" for line in lines) if len(lines) > 2 else ""


def _code(value: Any) -> str:
    r"""Returns a value, which anyone may have written, as code in Markdown."""

    return f"`{printable(value).replace('`', chr(39)).replace('|', '/')}`"


# Reproduction


def first_attempt(path: RunPath) -> dict[str, Any]:
    r"""Returns the provenance of the first epochs of a run.

    Raises:
        UserError: If it is not recorded.
    """

    record = read_record(path)

    if not record.get("attempts"):
        raise UserError(
            f"{path.directory.name} cannot be reproduced: no run.json says where it was trained, "
            "as for runs of SDA's own code, exports and adopted runs."
        )

    return record["attempts"][0]


def reproduce_run(
    path: RunPath, config: Config, data: Path, epochs: int, device: str
) -> tuple[str, list[str]]:
    r"""Trains the first epochs of a run again, in a temporary directory, and compares the losses.

    The run itself is only read. One that extends another is trained from scratch.

    Returns:
        Where the bits differ, or an empty text; and what else does, one sentence each.

    Raises:
        UserError: If the run has fewer epochs, the data are not those of the run, or the weights
            that it started from are gone.
        OutOfMemory: If the memory is too small.
    """

    record, before = read_record(path), read_history(path.metrics)
    name, fault = path.directory.name, ""
    parent: RunPath | None = None

    if epochs > (last := max(before, default=0)):
        raise UserError(f"--epochs is {epochs}, but {name} has {last} epochs.")

    check_same_data(path, record, fingerprint(data))

    if "parent" in record and "extends" not in record:
        parent = RunPath.of_id(path.directory.parent, record["parent"])

        if parent is None:
            raise UserError(
                f"{name} started with the weights of run '{record['parent']}', which is not in "
                f"{path.directory.parent}. Put that run back, or train from scratch with "
                f"`sda-ray train --config {shlex.quote(str(path.config))}`."
            )

    kept = {key: x for key, x in record.items() if key in ("data", "rungs")}
    init = parent.directory if parent else None

    with tempfile.TemporaryDirectory(prefix="sda-ray-") as directory:
        wandb = Wandb("disabled")
        run = Run(
            Path(directory), config, wandb=wandb, record=kept, device=device, interval=math.inf
        )

        try:
            with (
                ProgressBar("epoch", epochs) as bar,
                closing(train_run(run, data, device, init=init)) as training,  # type: ignore[type-var]
            ):
                for metrics in itertools.islice(training, epochs):
                    bar.update(metrics["epoch"], f"loss_valid {metrics['loss_valid']:.4f}")

                    if fault := _compare(before.get(metrics["epoch"], {}), metrics):
                        break
        except Diverged as error:
            fault = f"it diverged, which the run did not: {error}"
        finally:
            run.close("stopped")

        then, now = first_attempt(path), run.record["attempts"][-1]

    differ = differences(then, now)

    if not fault:
        return "", [f"Another {' and '.join(differ)} made no difference."] if differ else []

    causes = [
        f"Different {key}: {_described(key, then)} then, {_described(key, now)} now."
        for key in differ
    ]

    if not record.get("exact", True):
        causes.append("The run itself resumed elsewhere, or a repeated epoch of it differs.")

    return fault, causes


def _compare(before: Metrics, now: Metrics) -> str:
    r"""Says how the losses of an epoch differ from those recorded, or nothing."""

    losses = ("loss_train", "loss_valid")
    differ = [key for key in losses if key in before and before[key] != now[key]]
    texts = [f"{key} {before[key]!r} then, {now[key]!r} now" for key in differ]
    error = before.get("loss_valid_se", 0.0)

    if differ and error > 0:
        share = max(abs(now[key] - before[key]) for key in differ) / error
        texts.append(f"at most {share:.2g} times the standard error of loss_valid")

    return f"epoch {now['epoch']} differs: {'; '.join(texts)}" if differ else ""


def _described(key: str, attempt: dict[str, Any]) -> str:
    r"""Returns a respect in which the provenance of an attempt differs from another's."""

    if key == "code":
        changed = " with changes" if attempt.get("dirty") else ""
        return f"{str(attempt['code'])[:12]}, commit {attempt.get('commit')}{changed}"

    return str({**attempt.get("versions", {}), **attempt}.get(key))
