#!/usr/bin/env python
r"""Assimilates an observation of a simulated trajectory by a trained network, and paints it.

Rows of the picture, as vorticity, a state a column: the truth; what is observed of it; the mean of
the members; their standard deviation; and some members. The root-mean-square errors are printed.

    python examples/assimilate.py RUN
    python examples/assimilate.py RUN --every 4 --coarsen 8 --guidance mmps --output mmps.png
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from sda_ray import TrajectoryDataset, assimilate, plot, vorticity
from sda_ray.assimilation import GUIDANCES, parse
from sda_ray.core import ProgressBar

SHOWN = 2  # members


def picture(truth: Tensor, y: Tensor, x: Tensor, every: int, coarsen: int) -> Tensor:
    r"""Returns the vorticity of each row, with shape :math:`(4 + n, L, H, W)`."""

    observed = torch.zeros_like(truth[:, 0])
    coarse = vorticity(y) / coarsen  # per spacing of the fine grid
    observed[::every] = coarse.repeat_interleave(coarsen, -2).repeat_interleave(coarsen, -1)
    w = vorticity(x)

    return torch.stack((vorticity(truth), observed, w.mean(0), w.std(0), *w[:SHOWN]))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", help="the name, id or directory of a finished run")
    parser.add_argument(
        "--data", type=Path, default="data/valid.h5", help="simulated trajectories"
    )
    parser.add_argument("--trajectory", type=int, default=0, help="which of them")
    parser.add_argument("--start", type=int, default=0, help="its first state")
    parser.add_argument("--states", type=int, default=8, help="how many")
    parser.add_argument("--every", type=int, default=4, help="observe every k-th state")
    parser.add_argument("--coarsen", type=int, default=8, help="the cells that are averaged")
    parser.add_argument("--std", type=float, default=0.1, help="of the observation's noise")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--corrections", type=int, default=1)
    parser.add_argument("--guidance", choices=GUIDANCES, default="gaussian")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="assimilation.png")
    args = parser.parse_args(words)

    dataset = TrajectoryDataset(args.data, window=args.states)
    truth = dataset.windows([args.trajectory], [args.start])[0].unflatten(0, (args.states, 2))
    A = parse(f"every({args.every}) coarsen({args.coarsen})")
    y = A(truth)
    y = y + args.std * torch.randn(y.shape, generator=torch.Generator().manual_seed(args.seed))

    with ProgressBar("steps", args.members * args.steps) as bar:
        x = assimilate(
            args.run,
            y,
            A,
            args.std,
            shape=truth.shape,
            members=args.members,
            steps=args.steps,
            corrections=args.corrections,
            guidance=args.guidance,
            seed=args.seed,
            progress=lambda done, _: bar.update(done),
        )

    for name, error in (("mean", x.mean(0) - truth), ("member", x - truth), ("zero", truth)):
        print(f"root-mean-square error, {name}: {error.square().mean().sqrt():.3f}")

    plot(picture(truth, y, x, args.every, args.coarsen)).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
