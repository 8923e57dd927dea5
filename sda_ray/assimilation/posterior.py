r"""Assimilation: ensembles of trajectories given observations of them."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ..core import (
    ALPHAS,
    UserError,
    cgroup_memory,
    check_value,
    did_you_mean,
    is_out_of_memory,
    script_error,
    short_repr,
)
from ..nn import VPSDE, DPSGaussianScore, GaussianScore, MMPSGaussianScore, load_sde
from .operators import parse

GUIDANCES = ("gaussian", "dps", "mmps")
SHARE = 0.5  # of the free memory, since others allocate, too

Operator = Callable[[Tensor], Tensor]


def assimilate(
    score: Any,
    y: Tensor,
    A: Operator | str,
    std: float | Tensor,
    *,
    shape: Sequence[int],
    members: int = 16,
    steps: int = 256,
    corrections: int = 1,
    tau: float = 0.5,
    guidance: str = "gaussian",
    gamma: float = 1e-2,
    zeta: float = 1.0,
    iterations: int = 8,
    alpha: str | None = None,
    seed: int = 0,
    first: int = 0,
    chunk: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    r"""Samples trajectories from the posterior :math:`p(x | y)`, where :math:`y = A(x) + \epsilon`.

    The noise of a member is a function of the seed, the member and the step. So member 3 is the
    same among 4 members or 16, and in chunks of any size, up to the rounding of the network,
    which may depend on how many members are computed together.

    The score may be in fp16 or bf16. Everything around it is in fp32 then.

    References:
        | Score-based Data Assimilation (Rozet et al., 2023)
        | https://arxiv.org/abs/2306.10574

    Example:
        >>> y = A(truth) + 0.1 * torch.randn(4, 2, 16, 16)
        >>> x = assimilate("crimson-cloud-4", y, A, 0.1, shape=(16, 2, 64, 64), members=4)
        >>> x.shape
        torch.Size([4, 16, 2, 64, 64])

    Arguments:
        score: The prior: a noise estimator :math:`\epsilon_\phi(x, t, c)` of trajectories, as
            :func:`sda_ray.nn.score.load_score` returns; its diffusion, as
            :func:`sda_ray.nn.diffusion.load_sde` returns; or a finished run, by name, id or
            directory, whose trajectories may be longer than its window.
        y: The observation of one trajectory.
        A: The observation operator, from :math:`(B, S)` to :math:`(B, *)`, where :math:`*` is the
            shape of the observation; or its text form, such as `"every(4) coarsen(8)"`.
        std: The standard deviation of the observation's noise, a number or that of each.
        shape: The shape :math:`S` of a trajectory, usually :math:`(L, C, H, W)`.
        members: The number of members.
        steps: The number of discrete time steps.
        corrections: The number of Langevin corrections per time step.
        tau: The amplitude of the corrections.
        guidance: `gaussian`, that of SDA; `dps`, diffusion posterior sampling; or `mmps`, moment
            matching.
        gamma: How much the error of :math:`\hat{x}` adds to the variance, for `gaussian`.
        zeta: The strength of the guidance, for `dps`.
        iterations: The most iterations of conjugate gradients, for `mmps`.
        alpha: The noise schedule of a score that does not say it; by default that of a run, else
            `cos`.
        seed: The seed, at least 0.
        first: The number of the first member, for an ensemble that is drawn in several calls.
        chunk: The number of members that are computed together. By default as many as fit in
            memory, measured with one and two members.
        progress: What is called after each step, with the steps of members done and their total.

    Returns:
        The members, with shape :math:`(M, S)`. Members that diverged are not finite, and a
        warning says which.

    Raises:
        UserError: If an argument does not fit the others, or all members diverged.
    """

    y, std, shape = torch.as_tensor(y), torch.as_tensor(std), tuple(shape)
    chunks = {} if chunk is None else {"chunk": chunk}
    _check_least(1, members=members, steps=steps, iterations=iterations, **chunks)
    _check_least(0, corrections=corrections, seed=seed, first=first)
    _check_least(0, Real, tau=tau, gamma=gamma, zeta=zeta)
    _check_observation(y, std)

    if guidance not in GUIDANCES:
        raise UserError(
            f"guidance is {short_repr(guidance)}, but must be one of {', '.join(GUIDANCES)}."
            f"{did_you_mean(guidance, GUIDANCES)}"
        )

    if min(shape, default=0) < 1:
        raise UserError(f"shape is {shape}, but must be that of a trajectory, as (16, 2, 64, 64).")

    # Prior
    prior = _prior(score, shape, alpha, y.device)
    like = _like(prior, y)
    y, std = y.to(like), std.to(like)

    # Posterior
    A = parse(A) if isinstance(A, str) else A
    _check_operator(A, y, shape)
    guided: nn.Module

    if guidance == "gaussian":
        guided = GaussianScore(y, A, std, prior, gamma)
    elif guidance == "dps":
        guided = DPSGaussianScore(y, A, prior, zeta)
    else:
        guided = MMPSGaussianScore(y, A, std, prior, iterations)

    posterior = type(prior)(guided, shape, prior.curve, prior.eta)

    # Samples
    with _evaluated(prior):
        if chunk is None:
            chunk = fitting_members(guided, like.expand(shape), members, _free_memory(like.device))

        done, total, parts = 0, members * steps, []

        for begin in range(0, members, chunk):
            numbers = range(begin, min(begin + chunk, members))
            rngs = [member_rng(seed, first + i) for i in numbers]
            x = torch.stack([torch.randn(shape, generator=g, dtype=like.dtype) for g in rngs]).to(
                like
            )

            for later in posterior.reverse(x, None, steps, corrections, tau, rngs):
                x, done = later, done + len(x)

                if progress is not None:
                    progress(done, total)

                if not _finite(x).any():
                    done = (begin + len(x)) * steps
                    break

            parts.append(x)

    return _checked(torch.cat(parts))


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    r"""Lets nothing in a module drop out for as long as it is entered."""

    training = [part for part in module.modules() if part.training]
    module.eval()

    try:
        yield
    finally:
        for part in training:
            part.training = True


def member_rng(seed: int, member: int) -> torch.Generator:
    r"""Returns the generator of a member's noise: at the start, then in each correction."""

    entropy = np.random.SeedSequence(seed, spawn_key=(member,)).generate_state(1, np.uint64)[0]

    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def fitting_members(guided: nn.Module, x: Tensor, members: int, free: float) -> int:
    r"""Returns how many members go together, in chunks of about equal size.

    The memory of one step is measured with one and with two members. On CUDA this is the peak of
    what is allocated. Elsewhere it is twice what is kept for the gradient, since the peak was found
    to be 1.4 to 2.1 times as much.

    Arguments:
        guided: The guided score.
        x: A trajectory, for its shape, type and device.
        members: The number of members.
        free: The bytes that are free, of which half are used.
    """

    if members == 1:
        return 1

    try:
        one, two = (_memory(guided, x.new_zeros(n, *x.shape)) for n in (1, 2))
    except Exception as e:
        if not is_out_of_memory(e):
            raise

        return 1

    state = 8 * x.numel() * x.element_size()  # noise, noise estimates, gradients
    most = max(1, min(members, int(SHARE * free / (max(0, two - one) + state))))

    return math.ceil(members / math.ceil(members / most))


def _memory(guided: nn.Module, x: Tensor) -> int:
    r"""Returns the bytes that a guided score takes."""

    t = x.new_tensor(0.5)
    sizes: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        guided(x, t)

    if x.device.type == "cuda":
        return torch.cuda.max_memory_allocated(x.device) - before

    return 2 * sum(sizes.values())


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    taken = psutil.Process().memory_info().rss

    return min(psutil.virtual_memory().available, cgroup_memory() - taken)


def _prior(score: Any, shape: tuple[int, ...], alpha: str | None, device: torch.device) -> VPSDE:
    if alpha is not None:
        check_value("alpha", alpha)

    if isinstance(score, str | Path):
        prior = load_sde(score, device, length=shape[0])

        if shape != (own := tuple(prior.shape)):
            raise UserError(f"shape is {shape}, but trajectories of {score} are {own}.")
    elif isinstance(score, VPSDE):
        prior = score
    elif callable(score):
        module = score if isinstance(score, nn.Module) else _Function(score)
        curves = [name for name in ALPHAS if hasattr(module, f"alpha_{name}")]
        prior = VPSDE(module, shape, curves[0] if curves else alpha or "cos")
    else:
        raise UserError(
            f"score is {short_repr(score)}, but must be a noise estimator (x, t, c), a diffusion "
            "or a finished run."
        )

    if alpha is not None and alpha != prior.curve:
        raise UserError(
            f"alpha is {alpha!r}, but the score is for {prior.curve!r}. Leave out alpha."
        )

    return prior


class _Function(nn.Module):
    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()

        self.f = f

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return self.f(x, t, c)


def _like(prior: VPSDE, y: Tensor) -> Tensor:
    r"""Returns a number of the type and on the device to compute with."""

    tensors = (*prior.parameters(), *prior.buffers(), y)
    x = next((x for x in tensors if x.is_floating_point()), y.float())

    return torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _check_least(least: int, kind: Any = Integral, **values: Any) -> None:
    for name, x in values.items():
        if not isinstance(x, kind) or isinstance(x, bool) or not least <= x < math.inf:
            noun = "an integer" if kind is Integral else "a number"
            raise UserError(f"{name} is {short_repr(x)}, but must be {noun} of at least {least}.")


def _check_observation(y: Tensor, std: Tensor) -> None:
    if y.numel() == 0:
        raise UserError(f"y has shape {tuple(y.shape)}: nothing is observed.")

    if bad := int((~y.isfinite()).sum()):
        raise UserError(
            f"y has {bad} of {y.numel()} numbers that are not finite. Leave out what is missing, "
            "from y and from A."
        )

    if not (std > 0).all() or not std.isfinite().all():
        raise UserError(f"std is {short_repr(std.min().item())}, but must be finite and above 0.")

    try:
        fits = torch.broadcast_shapes(std.shape, y.shape) == y.shape
    except RuntimeError:
        fits = False

    if not fits:
        raise UserError(
            f"std has shape {tuple(std.shape)}, but must be a number or have {tuple(y.shape)}, "
            "the shape of y."
        )


def _check_operator(A: Operator, y: Tensor, shape: tuple[int, ...]) -> None:
    r"""Checks the shape and the derivative of A(x) for two trajectories of noise."""

    rng = member_rng(0, 0)
    x = torch.randn(2, *shape, generator=rng, dtype=y.dtype).to(y).requires_grad_()

    with torch.enable_grad():
        try:
            z = A(x)
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"A fails for x of shape {tuple(x.shape)}: {script_error(e)}") from e

    if not isinstance(z, Tensor):
        raise UserError(f"A returns {short_repr(z)}, but must return a tensor.")

    if z.shape != (2, *y.shape):
        raise UserError(
            f"A maps {tuple(x.shape)} to {tuple(z.shape)}, but must map it to {(2, *y.shape)}: y "
            f"has shape {tuple(y.shape)}, and the first dimension is that of members. Index from "
            "the end, as in x[..., ::4, :, :, :]."
        )

    slope = None

    if z.requires_grad:
        weights = torch.randn(z.shape, generator=rng, dtype=y.dtype).to(y)
        (slope,) = torch.autograd.grad(z, x, weights.to(z.dtype), allow_unused=True)

    if slope is None or not slope.any():
        raise UserError(
            "A has no derivative, so that y cannot guide. Do without argmax, round, comparisons, "
            "detach, item and NumPy in it."
        )


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().flatten(1).all(1)


def _checked(x: Tensor) -> Tensor:
    bad = (~_finite(x)).nonzero().flatten().tolist()
    advice = (
        "Try more steps or corrections, a larger gamma (gaussian), a smaller zeta (dps), or a "
        "network trained with parametrization=v."
    )

    if len(bad) == len(x):
        raise UserError(f"The samples of all {len(x)} members diverged. {advice}")

    if bad:
        warnings.warn(
            f"The samples of {len(bad)} of {len(x)} members diverged and are not finite: "
            f"{short_repr(bad)}. {advice}",
            stacklevel=3,
        )

    return x
