r"""Pictures of unconditional samples of a network: their vorticity."""

import io

import numpy as np

from ..data import vorticity
from ..nn import VPSDE
from .rng import SAMPLES, rng

__all__ = ["draw_samples"]

PANEL = 128  # pixels along each side of a snapshot, at least
GAP = 4  # pixels around it

# ColorBrewer's RdBu, the other way round: from blue by white to red
COLORS = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"


def draw_samples(sde: VPSDE, seed: int, count: int = 2, steps: int = 64) -> bytes:
    r"""Samples windows and paints their vorticity as a PNG: a sample a row, a snapshot a column.

    The event shape of the diffusion is that of windows, :math:`(2K, H, W)`.
    """

    from PIL import Image  # takes a tenth of the time and memory of matplotlib

    generator = rng(SAMPLES, seed, device=sde.device)
    x = sde.sample((count,), steps=steps, generator=generator)
    w = vorticity(x.unflatten(1, (-1, 2)).cpu()).numpy()

    with io.BytesIO() as stream:
        Image.fromarray(_paint(w)).save(stream, format="png")
        return stream.getvalue()


def _paint(w: np.ndarray) -> np.ndarray:
    r"""Returns fields of shape :math:`(N, K, H, W)` as an image, with the origin at the lower left."""

    w = np.nan_to_num(w).astype(np.float64)
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
