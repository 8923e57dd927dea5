r"""Figures of runs. Those of evaluations are PNG and PDF, with the numbers behind them as CSV."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import open_atomic
from .path import RunPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..training import Metrics

SHOWN = 3  # states, members
STRIP = 8  # states in a strip
SIDE = 1.3  # inches of a field


def draw_evaluation(path: RunPath, name: str, fields: dict[str, np.ndarray]) -> None:
    r"""Draws an ensemble beside the truth into `evaluation/` in the directory of a run.

    Arguments:
        path: The run.
        name: The name of the observation, with which the files begin.
        fields: `truth`, of shape :math:`(L, 2, H, W)`, `members`, :math:`(M, L, 2, H, W)`, and `y`,
            :math:`(L', C', H', W')`, the observation; or the last alone may be missing.
    """

    from torch import from_numpy

    from ..assimilation import rank_histogram
    from ..data import isotropic_spectrum, vorticity

    truth, members = (from_numpy(fields[key]) for key in ("truth", "members"))
    w, ws = (vorticity(x).numpy() for x in (truth, members))
    spectra = [isotropic_spectrum(x).mean((-3, -2)).numpy() for x in (truth, members)]
    directory = path.directory / "evaluation"
    directory.mkdir(exist_ok=True)

    _save(directory / f"{name}-fields", *_fields(w, ws, fields.get("y")))
    _save(directory / f"{name}-strip", *_strip(w, ws))
    _save(directory / f"{name}-spectra", *_spectra(*spectra))

    if "y" in fields:
        _save(directory / f"{name}-ranks", *_ranks(rank_histogram(members, truth).numpy()))


def draw_curve(file: Path, lines: Sequence["Metrics"]) -> None:
    r"""Draws the losses of a run over its epochs as PNG. Those that are not finite are left out."""

    figure, ((ax,),) = _figure(1, 1, 5, 3)
    values = []

    for key in ("loss_train", "loss_valid"):
        points = [(x["epoch"], x[key]) for x in lines if math.isfinite(x.get(key, math.nan))]
        epochs, losses = np.reshape(points, (-1, 2)).T
        ax.plot(epochs, losses, marker=".", markersize=3, label=key)
        values += [*losses]

    if values and 0 < 10 * min(values) < max(values):
        ax.set_yscale("log")

    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch")
    ax.legend(fontsize=8)

    with open_atomic(file) as f:
        figure.savefig(f, format="png", dpi=150, bbox_inches="tight")


def _save(stem: Path, figure: "Figure", columns: Mapping[str, np.ndarray]) -> None:
    for kind in ("png", "pdf"):
        with open_atomic(stem.with_name(f"{stem.name}.{kind}")) as f:
            figure.savefig(f, format=kind, dpi=150, bbox_inches="tight")

    with open_atomic(stem.with_name(f"{stem.name}.csv")) as f:
        table = np.stack([*columns.values()], axis=1)
        np.savetxt(f, table, "%.6g", ",", header=",".join(columns), comments="")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height))
    spaces = {"wspace": 0.05, "hspace": 0.2, "left": 0, "right": 1, "bottom": 0, "top": 1}

    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=spaces)


def _image(axes: "Axes", w: np.ndarray, title: str, **options: Any) -> None:
    r"""Draws a field, by default a vorticity on the scale of `samples.png`."""

    from ..training import LIMIT  # which imports torch

    options = options or {"cmap": "RdBu_r", "vmin": -LIMIT, "vmax": LIMIT}
    axes.imshow(w.T, origin="lower", interpolation="nearest", **options)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _cells(states: Sequence[int], pictures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    r"""Returns the cells of pictures at some states, a row for each."""

    drawn = {name.replace(" ", "_"): x[[*states]] for name, x in pictures.items()}
    i, x, y = np.indices(next(iter(drawn.values())).shape)
    columns = {"state": np.array(states)[i], "x": x, "y": y, **drawn}

    return {name: column.ravel() for name, column in columns.items()}


def _fields(
    w: np.ndarray, ws: np.ndarray, y: np.ndarray | None
) -> tuple["Figure", dict[str, np.ndarray]]:
    r"""Draws the vorticity of some states: truth, mean, spread and members; and what is observed."""

    states = _spaced(len(w), SHOWN)
    pictures = {"truth": w, "mean": ws.mean(0), "spread": ws.std(0, ddof=1)}
    pictures |= {f"member {j}": x for j, x in enumerate(ws[:SHOWN])}
    spread = {"cmap": "viridis", "vmin": 0, "vmax": pictures["spread"].max()}
    seen = y is not None and min(y.shape[-2:]) > 1
    width = (len(pictures) + seen + 0.2) * SIDE
    figure, axes = _figure(len(states), len(pictures) + seen, width, len(states) * SIDE)

    for row, i in zip(axes, states, strict=True):
        for ax, (name, x) in zip(row, pictures.items(), strict=False):
            _image(ax, x[i], f"{name}, state {i}", **(spread if name == "spread" else {}))

    if seen and y is not None:
        observed = _spaced(len(y), len(states))

        for row, j in zip(axes, observed, strict=False):
            _image(row[-1], y[j, 0], f"observation {j}", cmap="gray")

        for row in axes[len(observed) :]:
            row[-1].set_axis_off()

    return figure, _cells(states, pictures)


def _strip(w: np.ndarray, ws: np.ndarray) -> tuple["Figure", dict[str, np.ndarray]]:
    r"""Draws the vorticity of the truth above that of a member, along the trajectory."""

    states = _spaced(len(w), STRIP)
    figure, axes = _figure(2, len(states), len(states) * SIDE, 2.2 * SIDE)

    pictures = {"truth": w, "member 0": ws[0]}

    for row, (name, x) in zip(axes, pictures.items(), strict=True):
        for ax, i in zip(row, states, strict=True):
            _image(ax, x[i], f"{name}, {i}")

    return figure, _cells(states, pictures)


def _spectra(truth: np.ndarray, members: np.ndarray) -> tuple["Figure", dict[str, np.ndarray]]:
    r"""Draws the spectrum of kinetic energy of the truth, and the range of the members'."""

    figure, ((ax,),) = _figure(1, 1, 4, 3)
    k = np.arange(1, len(truth))  # a logarithmic axis has no 0
    truth = truth[1:]
    low, middle, high = np.quantile(members[:, 1:], (0, 0.5, 1), axis=0)
    ax.loglog(k, truth, "k", label="truth")
    ax.loglog(k, middle, "C0", label="members, median")
    ax.fill_between(k, low, high, alpha=0.3, label="members, range")
    ax.set_xlabel("wavenumber")
    ax.set_ylabel("power")
    ax.legend(fontsize=8)

    return figure, {"k": k, "truth": truth, "low": low, "median": middle, "high": high}


def _ranks(counts: np.ndarray) -> tuple["Figure", dict[str, np.ndarray]]:
    r"""Draws how often the truth has each rank among the members; uniform if calibrated."""

    figure, ((ax,),) = _figure(1, 1, 4, 3)
    share = counts / counts.sum() * len(counts)
    ax.bar(np.arange(len(counts)), share)
    ax.axhline(1, color="k", linewidth=1)
    ax.set_xlabel("rank of the truth among the members")
    ax.set_ylabel("frequency, relative to uniform")

    return figure, {"rank": np.arange(len(counts)), "count": counts}


def _spaced(n: int, count: int) -> list[int]:
    r"""Returns at most `count` of n indices, with the first and the last."""

    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, count))})
