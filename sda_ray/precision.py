r"""Arithmetic of training: fp32 throughout, or lower inside the network where it does no harm.

In bf16, the convolutions and projections between the first and the last convolution take and give
bfloat16. The stream of features that they add to, the statistics of the layer norm and everything
around the network are in fp32. So is whatever happens outside of :func:`lowered`, as validation
and sampling.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["full", "lower", "lowered", "strict", "warn_slow"]

logger = logging.getLogger(__name__)


@contextmanager
def lowered(precision: str, device: torch.device) -> Iterator[None]:
    r"""Computes with a lower precision for as long as it is entered.

    Arguments:
        precision: `fp32`, `bf16` or `tf32`. The latter means something on CUDA only.
        device: Where the network is.
    """

    if precision == "bf16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    elif precision == "tf32" and device.type == "cuda":
        _allow_tf32(True)

        try:
            yield
        finally:
            _allow_tf32(False)
    else:
        yield


def strict() -> None:
    r"""Makes CUDA compute fp32 in fp32: torch takes TF32 for convolutions unless told not to."""

    _allow_tf32(False)


def warn_slow(precision: str, device: str) -> bool:
    r"""Warns of a precision that the device has no instructions for.

    Returns:
        Whether it did.
    """

    if precision != "bf16" or torch.device(device).type != "cpu" or _has_bf16():
        return False

    logger.warning(
        "precision is bf16, for which this CPU has no instructions (AVX512_BF16 or AMX): a step "
        "takes about 5 times as long as in fp32. Set precision=fp32."
    )

    return True


def _has_bf16() -> bool:
    r"""Tells whether the CPU computes in bf16. What cannot be told is taken for a yes."""

    asked = [getattr(torch.cpu, f"_is_{x}_supported", None) for x in ("avx512_bf16", "amx_tile")]

    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512") or any(
        ask is None or ask() for ask in asked
    )


def _allow_tf32(allowed: bool) -> None:
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
