r"""The score network in the plainest formulation, from the names of its weights alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def convolve(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    x = F.pad(x, (weight.shape[-1] // 2,) * 4, mode="circular")

    return F.conv2d(x, weight, bias, stride)


def project(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normalize(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, unbiased=True, dim=1, keepdim=True)

    return (x - mean) / (var + 1e-5).sqrt()


def plain_unet(state: State, x: Tensor, e: Tensor, activation: str) -> Tensor:
    act = getattr(torch.nn, activation)()
    levels = len({key.split(".")[1] for key in state if key.startswith("descent")})

    def blocks(name: str, x: Tensor) -> Tensor:
        count = len({key.split(".")[2] for key in state if key.startswith(f"{name}.")})

        for i in range(count):
            y = x + project(state, f"{name}.{i}.project.0", e)[..., None, None]
            y = act(convolve(state, f"{name}.{i}.residue.1", normalize(y)))
            x = x + convolve(state, f"{name}.{i}.residue.3", y)

        return x

    skips = []

    for i in range(levels):
        x = convolve(state, "heads.0", x) if i == 0 else convolve(state, f"heads.{i}.0", x, 2)
        x = blocks(f"descent.{i}", x)
        skips.append(x)

    skips.pop()

    for i in range(levels):
        x = blocks(f"ascent.{i}", x)

        if skips:
            x = normalize(x).repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
            x = convolve(state, f"tails.{i}.2", x) + skips.pop()
        else:
            x = convolve(state, f"tails.{i}", x)

    return x


def plain_kernel(state: State, x: Tensor, t: Tensor, activation: str) -> Tensor:
    angle = t[:, None] * torch.pi * torch.arange(1, 17, dtype=x.dtype)
    e = torch.cat((angle.cos(), angle.sin()), dim=-1)
    e = project(state, "embedding.2", F.silu(project(state, "embedding.0", e)))

    y = (torch.arange(x.shape[-1], dtype=x.dtype) + 0.5) * 2 * torch.pi / x.shape[-1]
    forcing = torch.sin(4 * y).expand(x.shape[0], 1, *x.shape[-2:])

    return plain_unet(strip(state, "network."), torch.cat((x, forcing), dim=1), e, activation)


def plain_chain(state: State, x: Tensor, t: Tensor, activation: str, window: int) -> Tensor:
    k = window // 2
    kernel = strip(state, "kernel.")
    out = torch.empty_like(x)

    for i in range(k, x.shape[1] - k):
        s = plain_kernel(kernel, x[:, i - k : i + k + 1].flatten(1, 2), t, activation)
        s = s.unflatten(1, (window, -1))
        out[:, i] = s[:, k]

        if i == k:
            out[:, :k] = s[:, :k]
        if i == x.shape[1] - k - 1:
            out[:, i + 1 :] = s[:, k + 1 :]

    return out


def strip(state: State, prefix: str) -> State:
    return {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
