#!/usr/bin/env python
r"""What does a state of the flow cost, against jax-cfd and the plain formulation?

All of them advance the same initial fields, each in a process of its own, on one core, whose CPU
time counts; compilation does not. The processes take turns. jax-cfd may be installed for another
interpreter than this one: say which with JAX_PYTHON.

    JAX_PYTHON=~/jax/bin/python python benchmarks/simulation.py [--states 8] [--rounds 3]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from measured import Result, in_turns

SIZE, DT, LENGTH = 256, 0.2, 128
FIELDS = 4  # that are advanced together where it says so
GOAL = 1.5


def plain(size: int) -> Callable[[Any], Any]:
    r"""Returns the transition as one first writes it, with whole arrays rolled for neighbours."""

    import math

    import torch
    from torch import Tensor

    h = 2 * math.pi / size
    steps = math.ceil(DT / (0.1 * h))
    tau = DT / steps
    y = (torch.arange(size) + 0.5) * h
    force = torch.stack([torch.sin(4 * y).expand(size, size), torch.zeros(size, size)])
    k = 2 * math.pi / size * torch.arange(size, dtype=torch.float64)
    eigenvalues = (2 * k.cos()[:, None] + 2 * k[: size // 2 + 1].cos() - 4) / h**2
    eigenvalues[0, 0] = torch.inf
    inverse = (1 / eigenvalues).float()

    def flux(c: Tensor, speed: Tensor, axis: int) -> Tensor:
        right, before, after = (c.roll(s, axis) for s in (-1, 1, -2))
        d = right - c
        s = torch.where(speed > 0, c - before, after - right)
        g = torch.where(s * d > 0, s * d / (s + d), 0)
        size = speed.abs()

        return speed * torch.where(speed > 0, c, right) + size * (1 - size * tau / h) * g

    def advection(w: Tensor, i: int) -> Tensor:
        c, change = w[..., i, :, :], torch.zeros_like(w[..., i, :, :])

        for j in (0, 1):
            speed = w[..., j, :, :]
            f = flux(c, (speed + speed.roll(-1, i - 2)) / 2, j - 2)
            change = change - (f - f.roll(1, j - 2)) / h

        return change

    def laplacian(w: Tensor) -> Tensor:
        return sum((w.roll(s, a) for s in (1, -1) for a in (-1, -2)), -4 * w) / h**2

    def step(w: Tensor) -> Tensor:
        change = torch.stack([advection(w, i) for i in (0, 1)], dim=-3)
        w = w + tau * (change + 1e-3 * laplacian(w) - 0.1 * w + force)
        u, v = w.unbind(-3)
        divergence = (u - u.roll(1, -2) + v - v.roll(1, -1)) / h
        q = torch.fft.irfft2(torch.fft.rfft2(divergence) * inverse, s=(size, size))

        return torch.stack([u - (q.roll(-1, -2) - q) / h, v - (q.roll(-1, -1) - q) / h], dim=-3)

    def transition(x: Tensor) -> Tensor:
        with torch.inference_mode():
            for _ in range(steps):
                x = step(x)

        return x

    return lambda x: transition(torch.as_tensor(x)).numpy()


def ours() -> Callable[[Any], Any]:
    import torch

    from sda_ray.data.flow import KolmogorovFlow

    flow = KolmogorovFlow(SIZE, dt=DT)

    return lambda x: flow.transition(torch.as_tensor(x)).numpy()


def jax_cfd(batched: bool) -> Callable[[Any], Any]:
    jax: Any = import_module("jax")
    jax.tree_map = jax.tree_util.tree_map  # jax-cfd 0.2.1 needs what newer versions have not
    cfd: Any = import_module("jax_cfd.base")

    grid = cfd.grids.Grid(shape=(SIZE, SIZE), domain=((0, 2 * np.pi), (0, 2 * np.pi)))
    boundaries = cfd.boundaries.periodic_boundary_conditions(2)
    forcing = cfd.forcings.simple_turbulence_forcing(
        grid=grid,
        constant_magnitude=1.0,
        constant_wavenumber=4.0,
        linear_coefficient=-0.1,
        forcing_type="kolmogorov",
    )
    longest = cfd.equations.stable_time_step(
        grid=grid, max_velocity=5.0, max_courant_number=0.5, viscosity=1e-3
    )
    steps = int(np.ceil(DT / longest))
    step = cfd.funcutils.repeated(
        f=cfd.equations.semi_implicit_navier_stokes(
            grid=grid, forcing=forcing, dt=DT / steps, density=1.0, viscosity=1e-3
        ),
        steps=steps,
    )

    def transition(x: Any) -> Any:
        fields = cfd.initial_conditions.wrap_variables(
            var=tuple(x), grid=grid, bcs=(boundaries, boundaries)
        )
        u, v = step(fields)

        return jax.numpy.stack((u.data, v.data))

    advance = jax.jit(jax.vmap(transition)) if batched else jax.jit(transition)

    def run(x: Any) -> Any:
        if batched:
            return np.asarray(advance(x))

        return np.stack([np.asarray(advance(y)) for y in x])

    return run


def measure(kind: str, fields: int, states: int, file: str, out: str) -> dict[str, float]:
    r"""Returns the CPU seconds of a trajectory of 128 states, and the memory at its peak.

    The least of the states counts: all of them do the same work, and what else the machine does
    can only add to it.
    """

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})

    if kind == "jax-cfd":
        transition = jax_cfd(batched=fields > 1)
    else:
        import torch

        torch.set_num_threads(1)
        transition = plain(SIZE) if kind == "plain" else ours()

    x = np.load(file)[:fields]
    x = transition(x)  # compiles, and is not counted
    seconds = []

    for _ in range(states - 1):
        start = time.process_time()
        x = transition(x)
        seconds.append(time.process_time() - start)

    np.save(out, x)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    return {"seconds": min(seconds) / fields * LENGTH, "peak": peak}


def has_jax(python: str) -> bool:
    words = [python, "-c", "import importlib.util as u; assert u.find_spec('jax_cfd')"]

    return subprocess.run(words, capture_output=True).returncode == 0


def compare(states: int = 8, rounds: int = 3) -> dict[str, dict[str, float]]:
    r"""Returns what each costs, by kind and number of fields, and how far it is from ours."""

    from sda_ray.data.flow import KolmogorovFlow

    jax = os.environ.get("JAX_PYTHON", sys.executable)
    kinds = ["ours", "plain", *["jax-cfd"] * has_jax(jax)]

    with TemporaryDirectory() as directory:
        file = str(Path(directory) / "fields.npy")
        np.save(file, KolmogorovFlow(SIZE).prior(range(FIELDS)).numpy())
        commands, outs = {}, {}

        for fields in (1, FIELDS):
            for kind in kinds:
                if kind == "plain" and fields > 1:
                    continue  # out of the cache, it would take minutes

                name = f"{kind} {fields}"
                outs[name] = str(Path(directory) / f"{name}.npy")
                python = jax if kind == "jax-cfd" else sys.executable
                words = [kind, str(fields), str(states), file, outs[name]]
                commands[name] = [python, __file__, "--measure", *words]

        found = in_turns(commands, rounds)

        for name in found:
            x, y = np.load(outs[name])[0], np.load(outs["ours 1"])[0]
            found[name]["difference"] = float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return found


def results(quick: bool) -> Iterator[Result]:
    found = compare(states=4 if quick else 8, rounds=1 if quick else 3)

    for fields, words in ((1, "one by one"), (FIELDS, f"{FIELDS} together")):
        x = found[f"ours {fields}"]

        for peer in ("jax-cfd", "plain"):
            if (y := found.get(f"{peer} {fields}")) is None:
                continue

            yield Result(
                f"simulation {SIZE}², {words}, {peer}",
                x["seconds"],
                y["seconds"],
                y["seconds"] / x["seconds"],
                GOAL if peer == "jax-cfd" else None,
                "CPU s a trajectory",
                f"memory {x['peak'] / 2**20:.0f} against {y['peak'] / 2**20:.0f} MiB; relative "
                f"difference of the states {y['difference']:.0e}",
            )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        kind, fields, states, file, out = sys.argv[2:]
        print(json.dumps(measure(kind, int(fields), int(states), file, out)))
        return

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--states", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    print(f"a trajectory of {LENGTH} states of {SIZE}², on one core")

    for name, x in compare(args.states, args.rounds).items():
        print(
            f"{name:10} {x['seconds']:6.2f} CPU s, {x['peak'] / 2**20:5.0f} MiB, relative "
            f"difference of the last state {x['difference']:.0e}"
        )


if __name__ == "__main__":
    main()
