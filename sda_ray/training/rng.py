r"""Random numbers without a state: every draw is a function of what it is for."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = [
    "DENOISING",
    "DROPOUT",
    "ENSEMBLES",
    "INIT",
    "NOISE",
    "ORDER",
    "SAMPLES",
    "START",
    "VALID",
    "rng",
    "seeded",
]

# Streams of random numbers
INIT, ORDER, START, NOISE, VALID, SAMPLES, DROPOUT, DENOISING, ENSEMBLES = range(9)


def rng(stream: int, *key: int, device: str | torch.device = "cpu") -> torch.Generator:
    r"""Returns a generator that is a function of a stream and up to three numbers."""

    entropy = (stream, *key, *(0,) * (3 - len(key)))
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]

    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


@contextmanager
def seeded(stream: int, *key: int, device: str | torch.device = "cpu") -> Iterator[None]:
    r"""Makes what draws from torch's global generators a function of a stream and numbers.

    The generators are as they were before when it is left.
    """

    device = torch.device(device)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(rng(stream, *key).initial_seed())
        yield
