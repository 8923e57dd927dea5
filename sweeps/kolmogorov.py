#!/usr/bin/env python
r"""Which learning rate, weight decay and width train the Kolmogorov score best?

The window is fixed: the denoising losses of different windows are not comparable, for which there
is the objective `denoising`. The learning rate decays over all of CONFIG's epochs in every trial, so
that trials are compared at equal epochs of one schedule; a trial that stops at a rung never sees the
end of it.
"""

from sda_ray import CONFIG, Sweep, choice, loguniform, main

CONFIG = CONFIG | {"epochs": 256}

SPACE = {
    "hidden_channels": choice((64, 128, 256), (96, 192, 384)),
    "learning_rate": loguniform(2e-5, 2e-3),
    "weight_decay": loguniform(1e-5, 1e-1),
}

sweep = Sweep("kolmogorov", CONFIG, SPACE, trials=64, seed=0)

if __name__ == "__main__":
    main(sweep)
