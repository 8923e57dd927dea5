#!/usr/bin/env python
r"""The search space that SDA's authors once used for the Kolmogorov score, adapted.

64 configurations are drawn at random and trained to the end, as theirs were. Two things differ:
the window is 5 instead of 2, since a window has a centre and so an odd length; and all trials
train for 256 epochs, where 256, 384 and 512 were options, since losses after different numbers of
epochs tell more of the epochs than of the rest.

References:
    | Score-based Data Assimilation (Rozet et al., 2023)
    | https://arxiv.org/abs/2306.10574
"""

from sda_ray import CONFIG, Sweep, choice, loguniform, main

CONFIG = CONFIG | {"window": 5, "epochs": 256}

SPACE = {
    "embedding": choice(64, 128, 256),
    "hidden_channels,hidden_blocks": choice(
        ((64, 96, 128), (3, 3, 3)),
        ((64, 96, 128, 192), (3, 3, 3, 3)),
    ),
    "kernel_size": choice(3, 5),
    "activation": choice("GELU", "SiLU"),
    "batch_size": choice(32, 64),
    "learning_rate": loguniform(1e-4, 1e-3),
    "weight_decay": loguniform(1e-3, 1e-2),
    "scheduler": choice("linear", "cosine", "exponential"),
}

sweep = Sweep("upstream", CONFIG, SPACE, trials=64, seed=0, sampler="random", pruner="none")

if __name__ == "__main__":
    main(sweep)
