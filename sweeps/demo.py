#!/usr/bin/env python
r"""A first look, in a few minutes on two cores: small networks on the demo data.

What it finds says nothing about the networks of SDA, which are a thousand times as expensive. Samples
have the scale of the data after these few epochs, and not yet their vortices.
"""

from sda_ray import CONFIG, Sweep, choice, loguniform, main

CONFIG = CONFIG | {
    "window": 3,
    "embedding": 16,
    "hidden_channels": (16, 32),
    "hidden_blocks": (1, 1),
    "epochs": 18,
    "batch_size": 8,
    "parametrization": "v",  # after so few epochs, samples of SDA's eps are 60 times too large
}

SPACE = {
    "learning_rate": loguniform(1e-4, 1e-2),
    "weight_decay": loguniform(1e-5, 1e-1),
    "activation": choice("SiLU", "GELU", "ReLU"),
}

sweep = Sweep("demo", CONFIG, SPACE, trials=12, seed=0, min_epochs=2, eta=3)

if __name__ == "__main__":
    main(sweep)
