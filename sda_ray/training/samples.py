r"""Pictures of trajectories, such as samples of a network: their vorticity."""

import io
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..data import vorticity
from ..nn import VPSDE
from .rng import SAMPLES, rng

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_samples", "plot"]

PANEL = 128  # pixels along each side of a snapshot, at least
GAP = 4  # pixels around it

# ColorBrewer's RdBu, the other way round: from blue by white to red
COLORS = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"


def draw_samples(sde: VPSDE, seed: int, count: int = 2, steps: int = 64) -> bytes:
    r"""Samples windows and paints their vorticity as a PNG: a sample a row, a snapshot a column.

    The event shape of the diffusion is that of windows, :math:`(2K, H, W)`.
    """

    generator = rng(SAMPLES, seed, device=sde.device)
    x = sde.sample((count,), steps=steps, generator=generator)

    with io.BytesIO() as stream:
        plot(x.unflatten(1, (-1, 2))).save(stream, format="png")
        return stream.getvalue()


def plot(x: Tensor) -> "Image":
    r"""Paints the vorticity of trajectories: a trajectory a row, a snapshot a column.

    The origin is at the lower left. Blue is negative, white zero, red positive.

    Example:
        >>> plot(sde.sample((2,))).save("samples.png")

    Arguments:
        x: The velocities, with shape :math:`(B, L, 2, H, W)`; or their vorticity, or other fields,
            with shape :math:`(B, L, H, W)`.
    """

    from PIL import Image  # takes a tenth of the time and memory of matplotlib

    if x.dim() not in (4, 5):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but must have (B, L, 2, H, W), or (B, L, H, W) for "
            "vorticity."
        )

    x = x.detach().cpu()

    return Image.fromarray(_paint((vorticity(x) if x.dim() == 5 else x).double().numpy()))


def _paint(w: np.ndarray) -> np.ndarray:
    w = np.nan_to_num(w)
    limit = float(np.abs(w).max()) or 1.0
    anchors = np.array([list(bytes.fromhex(color)) for color in COLORS.split()])
    at = np.linspace(-1, 1, len(anchors))
    rgb = np.stack([np.interp(w / limit, at, channel) for channel in anchors.T], axis=-1)
    rgb = rgb.swapaxes(2, 3)[:, :, ::-1]

    for axis in (2, 3):
        rgb = rgb.repeat(-(-PANEL // rgb.shape[axis]), axis=axis)

    edge = (0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)
    panels = np.pad(rgb, edge, constant_values=255)
    rows = panels.transpose(0, 2, 1, 3, 4).reshape(-1, panels.shape[1] * panels.shape[3], 3)
    image = np.pad(rows, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255)

    return image.round().astype(np.uint8)
