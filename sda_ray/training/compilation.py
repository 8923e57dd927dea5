r"""Training steps whose network is compiled by torch, for GPUs above all."""

import os
import shutil
from typing import Any

import torch

from ..core.errors import UserError
from ..nn.diffusion import VPSDE

__all__ = ["compiled"]


def compiled(sde: VPSDE, how: str) -> VPSDE:
    r"""Returns a diffusion with a compiled network, which shares its weights with the given one.

    The maths are the same, but the bits are not those of the eager network. Dropout draws what it
    draws there. The first step of each shape of batch takes as long as the compilation.

    Arguments:
        sde: The diffusion, which is left as it is.
        how: `off`; `on`; or `graphs`, for CUDA graphs in addition. Elsewhere that means `on`.

    Raises:
        UserError: If there is no compiler for the CPU.
    """

    if how == "off":
        return sde

    if sde.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "compile is on, but there is no C++ compiler here (g++, or what CXX names). Install one, "
            "or set compile=off."
        )

    import torch._dynamo.config as limits
    import torch._inductor.config as settings  # seconds, for those who want it

    settings.fallback_random = True
    # torch 2.13 counts the graphs of all networks of a process; after 8 of them it compiles no more
    limits.recompile_limit = limits.accumulated_recompile_limit = 2**20
    graphs = how == "graphs" and sde.device.type == "cuda"

    return VPSDE(_Compiled(sde.eps, graphs), sde.shape, sde.curve, sde.eta)


class _Compiled(torch.nn.Module):
    def __init__(self, network: torch.nn.Module, graphs: bool) -> None:
        super().__init__()

        mode = "reduce-overhead" if graphs else None
        self.network = torch.compile(network, mode=mode, dynamic=False)
        self.graphs = graphs

    def forward(self, *args: Any) -> Any:
        if self.graphs:  # what the step before has returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()

        return self.network(*args)
