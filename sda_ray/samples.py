r"""Pictures of what a network has learnt: the vorticity of unconditional samples."""

import io

import numpy as np

from .diffusion import VPSDE
from .flow import vorticity
from .streams import SAMPLES, rng

__all__ = ["draw_samples"]


def draw_samples(sde: VPSDE, seed: int, count: int = 2, steps: int = 64) -> bytes:
    r"""Draws windows from the prior and draws their vorticity.

    Each row is a sample, each column a snapshot of its window.

    Arguments:
        sde: The diffusion over windows, of shape :math:`(2K, H, W)`.
        seed: The seed of the samples.
        count: The number of samples.
        steps: The number of steps of the sampler.

    Returns:
        The picture as a PNG.
    """

    from matplotlib.figure import Figure

    generator = rng(SAMPLES, seed, device=sde.device)
    x = sde.sample((count,), steps=steps, generator=generator)
    w = vorticity(x.unflatten(1, (-1, 2)).cpu()).numpy()

    figure = Figure(figsize=(2 * w.shape[1], 2 * count), dpi=64)
    axes = figure.subplots(count, w.shape[1], squeeze=False)
    limit = float(np.abs(np.nan_to_num(w)).max()) or 1.0

    for i, row in enumerate(axes):
        for j, ax in enumerate(row):
            ax.imshow(w[i, j].T, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower")
            ax.set_axis_off()

    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, 0.03, 0.03)

    with io.BytesIO() as stream:
        figure.savefig(stream, format="png")
        return stream.getvalue()
