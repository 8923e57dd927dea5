r"""Arithmetic of training: fp32 throughout, or lower inside the network where it does no harm.

In bf16, the convolutions and projections between the first and the last convolution take and give
bfloat16. The stream of features that they add to, the statistics of the layer norm and everything
around the network are in fp32. So is whatever happens outside of :func:`lowered`, as validation
and sampling.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def lowered(precision: str, device: torch.device) -> torch.autocast:
    r"""Computes in bf16 for as long as it is entered, if that is the precision."""

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def allowing_tf32(precision: str, device: torch.device) -> Iterator[None]:
    r"""Allows TF32 on CUDA for as long as it is entered, if that is the precision.

    It counts when a product is computed: the backward pass has to be inside, too.
    """

    wanted = precision == "tf32" and device.type == "cuda"

    if wanted:
        allow_tf32(True)

    try:
        yield
    finally:
        if wanted:
            allow_tf32(False)


def make_deterministic() -> None:
    r"""Makes CUDA compute the same bits every time, where it can, and fp32 in fp32."""

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # All memory is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    allow_tf32(False)  # torch takes it for convolutions unless told not to


def allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def full(x: Tensor) -> torch.autocast:
    r"""Returns a context in which a tensor's device keeps to full precision."""

    return torch.autocast(_device(x), enabled=False)


def lower(x: Tensor) -> Tensor:
    r"""Returns a tensor as the next convolution will want it.

    Autocast would lower it too, but only after it was padded.
    """

    device = _device(x)

    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _device(x: Tensor) -> str:
    r"""Returns the type of a tensor's device; the CPU's for meta, which has no autocast."""

    return "cpu" if x.is_meta else x.device.type
