r"""Random numbers without a state: every draw is a function of what it is for."""

import numpy as np
import torch

__all__ = ["INIT", "NOISE", "ORDER", "SAMPLES", "START", "VALID", "rng"]

INIT, ORDER, START, NOISE, VALID, SAMPLES = range(6)  # streams of random numbers


def rng(stream: int, *key: int, device: str | torch.device = "cpu") -> torch.Generator:
    r"""Returns a generator that is a function of a stream and up to three numbers."""

    entropy = (stream, *key, *(0,) * (3 - len(key)))
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]

    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))
