r"""Samples of a network while it trains: their statistics, and pictures of their vorticity."""

import io
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data import divergence, isotropic_spectrum, vorticity
from .loop import SAMPLES, TrainState, rng
from .validation import Validation

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE_COST = 0.03  # the most that samples may take of the time
LEAST, MOST = (2, 16), (8, 64)  # samples, and steps of the sampler
OVERHEAD = 2  # items that a step takes as long as beside its own, on a CPU

LIMIT = 1.25  # of the vorticity in pictures, that of SDA
PANEL = 128  # pixels along each side of a snapshot, at least
GAP = 4  # pixels around it
LINE = 16  # pixels of a line of text

# ColorBrewer's RdBu, the other way round: from blue by white to red
COLORS = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"
ABOVE, BELOW, NEITHER = "ffd500", "00a651", "7f7f7f"  # the limits; not a number


class Samples:
    r"""Creates what draws samples at the rungs and at the end of a training, to judge it by.

    All draws of a run start from the same noise. Their number and their steps are such that they
    take at most 3 % of the time since the rung before, down to none, but at the end two at least.
    That is counted, not timed, so that a repeated epoch has the same samples: an item of training
    takes as long as three evaluations of the network, a step of the sampler as long as two items
    more than it has, and on a GPU as long as a batch.

    Arguments:
        validation: The validation, whose windows are the real ones.
        trajectories: The number of trajectories in an epoch.
        rungs: The epochs at which a run is judged, beside the last one.
    """

    def __init__(
        self, validation: Validation, trajectories: int, rungs: Collection[int] = ()
    ) -> None:
        self.data = validation.first.x
        self.evaluations = 3 * trajectories + len(self.data)  # in an epoch
        self.rungs = sorted(rungs)
        self._drawn: tuple[tuple[int, int], Tensor | None] = (-1, 0), None

    def size(self, state: TrainState) -> tuple[int, int]:
        r"""Returns the number of samples at the end of an epoch, and that of the sampler's steps."""

        epoch, last = state.epoch, state.config["epochs"]

        if epoch not in (*self.rungs, last):
            return 0, 0

        since = epoch - max((rung for rung in self.rungs if rung < epoch), default=0)
        budget = int(SAMPLE_COST * since * self.evaluations)
        steps = min(max(LEAST[1], budget // 6), MOST[1])
        count = budget // steps  # items that a step may take as long as

        if state.device.type == "cpu":
            count -= OVERHEAD
        elif count < state.config["batch_size"]:
            count = 0

        return min(max(count, LEAST[0] if epoch == last else 0), MOST[0]), steps

    def draw(self, state: TrainState) -> Tensor | None:
        r"""Returns the samples at the end of an epoch, windows of shape :math:`(B, 2K, H, W)`."""

        if self._drawn[0] != state.position:
            (count, steps), x = self.size(state), None

            if count:
                generator = rng(SAMPLES, state.config["seed"], device=state.device)
                x = state.result_sde.sample((count,), steps=steps, generator=generator).cpu()

            self._drawn = state.position, x

        return self._drawn[1]

    def __call__(self, state: TrainState) -> dict[str, float]:
        r"""Returns the statistics of samples, see :func:`compare_samples`, if any are drawn."""

        x = self.draw(state)

        return {} if x is None else compare_samples(x, self.data)

    def picture(self, state: TrainState) -> bytes:
        r"""Returns a PNG of the vorticity of the samples at the end, above that of real windows."""

        from PIL import Image, ImageDraw

        x = self.draw(state)
        assert x is not None
        scale = f"vorticity from -{LIMIT} to {LIMIT}, yellow above, green below"
        parts = {f"samples: {scale}": x[:2], "data": self.data[:1]}
        rows = [plot(y.unflatten(1, (-1, 2))) for y in parts.values()]
        image = Image.new("RGB", (rows[0].width, sum(LINE + y.height for y in rows)), "white")
        top = 0

        for title, row in zip(parts, rows, strict=True):
            ImageDraw.Draw(image).text((GAP, top + 2), title, "black")
            image.paste(row, (0, top + LINE))
            top += LINE + row.height

        with io.BytesIO() as stream:
            image.save(stream, format="png")
            return stream.getvalue()


def compare_samples(x: Tensor, data: Tensor) -> dict[str, float]:
    r"""Compares samples with data, both of shape :math:`(B, 2K, H, W)`: snapshots of velocities.

    Returns:
        `sample_std`, the standard deviation relative to that of the data; `sample_spectrum`, how far
        the isotropic spectrum is off, :math:`| \log_{10} (S / S_\mathrm{data}) |` in the mean over
        octaves of the wavenumber; and `sample_divergence`, the root mean square of the divergence
        relative to that of the data, which is not zero on a grid. A perfect network has about 1, 0
        and 1.
    """

    x, data = (y.double().unflatten(1, (-1, 2)) for y in (x, data))
    spectra = torch.stack([isotropic_spectrum(y).mean((0, 1, 2)) for y in (x, data)])
    edges = [2**i for i in range(min(x.shape[-2:]).bit_length() - 1)]
    bands = torch.stack([band.sum(-1) for band in spectra.tensor_split(edges, -1)[1:-1]])
    ratios = bands[:, 0] / bands[:, 1]
    both = [divergence(y).square().mean().sqrt() for y in (x, data)]

    return {
        "sample_std": float(x.std() / data.std()),
        "sample_spectrum": float(ratios.log10().abs().mean()),
        "sample_divergence": float(both[0] / both[1]),
    }


def plot(x: Tensor, limit: float | None = LIMIT) -> "Image":
    r"""Paints the vorticity of trajectories: a trajectory a row, a snapshot a column.

    The origin is at the lower left. Blue is negative, white zero, red positive. What is above or
    below the limit of the scale is yellow or green, and what is no number is gray.

    Example:
        >>> plot(sde.sample((2,))).save("samples.png")

    Arguments:
        x: The velocities, with shape :math:`(B, L, 2, H, W)`; or their vorticity, or other fields,
            with shape :math:`(B, L, H, W)`.
        limit: The largest value of the scale, by default that of SDA; that of the fields if None.
    """

    from PIL import Image  # takes a tenth of the time and memory of matplotlib

    if x.dim() not in (4, 5):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but must have (B, L, 2, H, W), or (B, L, H, W) for "
            "vorticity."
        )

    x = x.detach().cpu()

    return Image.fromarray(_paint((vorticity(x) if x.dim() == 5 else x).double().numpy(), limit))


def _paint(w: np.ndarray, limit: float | None) -> np.ndarray:
    limit = limit or float(np.abs(np.nan_to_num(w)).max()) or 1.0
    anchors, (above, below, neither) = map(_rgb, (COLORS, f"{ABOVE} {BELOW} {NEITHER}"))
    at = np.linspace(-limit, limit, len(anchors))
    rgb = np.stack([np.interp(w, at, channel) for channel in anchors.T], axis=-1)
    rgb[w > limit], rgb[w < -limit], rgb[np.isnan(w)] = above, below, neither
    rgb = rgb.swapaxes(2, 3)[:, :, ::-1]

    for axis in (2, 3):
        rgb = rgb.repeat(-(-PANEL // rgb.shape[axis]), axis=axis)

    edge = (0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)
    panels = np.pad(rgb, edge, constant_values=255)
    rows = panels.transpose(0, 2, 1, 3, 4).reshape(-1, panels.shape[1] * panels.shape[3], 3)
    image = np.pad(rows, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255)

    return image.round().astype(np.uint8)


def _rgb(colors: str) -> Any:
    return np.array([list(bytes.fromhex(color)) for color in colors.split()])
