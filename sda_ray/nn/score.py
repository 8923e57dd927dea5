r"""Score networks of Kolmogorov-flow trajectories."""

import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..core import (
    KEYS,
    NETWORK,
    Config,
    UserError,
    check_config,
    check_value,
    default_root,
    find_run,
    load_config,
    open_regular,
)
from .diffusion import VPSDE
from .precision import full
from .unet import UNet

MAX_SIZE = 4096  # cells along an axis; a file that claims more is not one of ours
MAX_PICKLE = 16 * 2**20  # bytes that name the tensors of a file; a thousand take 0.3 MB

MARKED = ("alpha", "parametrization")  # keys without which SDA would use the weights wrongly

# All that a file of tensors calls. torch's own list also has what takes memory for nothing.
CALLS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
}


class TimeEmbedding(nn.Sequential):
    r"""Creates an embedding of the diffusion time.

    The network sees :math:`\cos(k \pi t)`, then :math:`\sin(k \pi t)`, for :math:`k = 1 \dots 16`.
    """

    freqs: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(nn.Linear(32, 256), nn.SiLU(), nn.Linear(256, features))

        self.register_buffer("freqs", torch.pi * torch.arange(1, 16 + 1))

    def forward(self, t: Tensor) -> Tensor:
        t = self.freqs * t.unsqueeze(-1)
        t = torch.cat((t.cos(), t.sin()), dim=-1).to(self.freqs.dtype)

        return super().forward(t)


class ScoreUNet(nn.Module):
    r"""Creates a U-Net score network of windows of a Kolmogorov flow.

    It estimates the noise in a window of :math:`C` channels, 2 for each of its snapshots. The
    forcing of the flow is part of its input. The rest is up to :class:`sda_ray.nn.unet.UNet`,
    :math:`F_\phi`. With the parametrization `eps`, that is the noise itself. With `v`, it is

    .. math:: \epsilon_\phi(x(t), t) = \sigma(t) \, x(t) + \mu(t) \, F_\phi(x(t), t)

    so that :math:`\hat{x} = (x(t) - \sigma(t) \, \epsilon_\phi) / \mu(t)
    \approx \mu(t) \, x(t) - \sigma(t) \, F_\phi` has a bounded error at all times, where that of
    `eps` grows as :math:`1 / \mu(t)`.

    References:
        | Progressive Distillation for Fast Sampling of Diffusion Models (Salimans et al., 2022)
        | https://arxiv.org/abs/2202.00512
    """

    forcing: Tensor

    def __init__(
        self,
        channels: int,
        embedding: int = 64,
        size: int = 64,
        alpha: str = "cos",
        parametrization: str = "eps",
        **kwargs: Any,
    ) -> None:
        super().__init__()

        self.embedding = TimeEmbedding(embedding)
        self.network = UNet(channels + 1, channels, embedding, **kwargs)
        schedule = VPSDE(nn.Identity(), (channels, size, size), alpha)
        self.schedule = schedule if parametrization == "v" else None

        y = 2 * torch.pi / size * (torch.arange(size) + 1 / 2)
        self.register_buffer("forcing", torch.sin(4 * y).expand(1, size, size).clone())

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        r"""
        Arguments:
            x: The noisy windows :math:`x(t)`, with shape :math:`(*, C, H, W)`.
            t: The times, with shape :math:`()` or :math:`(*)`.
            c: There is no context: must be None.

        Returns:
            The estimated noise, with shape :math:`(*, C, H, W)`.
        """

        if c is not None:
            raise ValueError("c is given, but this network has no context: it must be None.")

        if x.shape[-2:] != self.forcing.shape[-2:]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but this network was made for fields of "
                f"{tuple(self.forcing.shape[-2:])}."
            )

        y = x.reshape(-1, *x.shape[-3:])
        f = self.forcing.to(y.dtype).expand(len(y), -1, -1, -1)

        with full(y):
            e = self.embedding(t.reshape(-1))

        y = self.network(torch.cat((y, f), dim=1), e).reshape(x.shape)

        if self.schedule is None:
            return y

        wide = torch.promote_types(x.dtype, torch.float32)

        return self.schedule.perturb(y.to(wide), t.to(wide), x.to(wide)).to(x.dtype)


class MCScoreNet(nn.Module):
    r"""Creates a score network of trajectories from one of windows.

    A trajectory is taken for a Markov chain of order :math:`k`: the score of a snapshot depends
    on the window of :math:`2k + 1` snapshots around it alone.

    References:
        | Score-based Data Assimilation (Rozet et al., 2023)
        | https://arxiv.org/abs/2306.10574

    Arguments:
        kernel: The score network of windows, of :math:`(2k + 1) C` channels.
        order: The order :math:`k` of the chain, at least 1.
    """

    def __init__(self, kernel: nn.Module, order: int) -> None:
        super().__init__()

        self.kernel = kernel
        self.order = order

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        r"""
        Arguments:
            x: The noisy trajectories :math:`x(t)`, with shape :math:`(B, L, C, H, W)`.
            t: The times, with shape :math:`()` or :math:`(B)`.
            c: The context passed to the kernel.

        Returns:
            The estimated noise, with shape :math:`(B, L, C, H, W)`.
        """

        x = self.unfold(x)

        if t.dim() > 0:
            t = t.reshape(-1, 1).expand(x.shape[:2])

        return self.fold(self.kernel(x, t, c))

    def unfold(self, x: Tensor) -> Tensor:
        r"""Returns the windows of trajectories, with shape
        :math:`(B, L - 2k, (2k + 1) C, H, W)`."""

        window = 2 * self.order + 1

        if x.dim() != 5 or x.shape[1] < window:
            raise UserError(
                f"x has shape {tuple(x.shape)}, but must have shape (B, L, C, H, W) with L at "
                f"least {window}, the window of the network."
            )

        return x.unfold(1, window, 1).movedim(-1, 2).flatten(2, 3)

    def fold(self, x: Tensor) -> Tensor:
        r"""Returns the center of each window, and what is before the first and after the last."""

        k = self.order
        x = x.unflatten(2, (2 * k + 1, -1))

        return torch.cat((x[:, 0, :k], x[:, :, k], x[:, -1, k + 1 :]), dim=1)


def network_settings(config: Config) -> Config:
    r"""Returns the settings of a config that describe its network, for :func:`make_score`."""

    return {key: config[key] for key in (*NETWORK, "dropout") if key in config}


def make_score(
    window: int,
    embedding: int,
    hidden_channels: Sequence[int],
    hidden_blocks: Sequence[int],
    kernel_size: int,
    activation: str,
    size: int = 64,
    alpha: str = "cos",
    parametrization: str = "eps",
    dropout: float = 0.0,
) -> MCScoreNet:
    r"""Creates a score network.

    The network of a config is `make_score(**network_settings(config))`. The weights of a
    network for another `alpha` or `parametrization` than SDA's are of no use without it. A buffer
    `alpha_lin`, `alpha_exp` or `parametrization_v` in the state dict keeps SDA from loading them
    as if they were.

    Apart from the number of grid cells along each axis, its `size`, the arguments are keys of
    :data:`sda_ray.core.config.CONFIG`.
    """

    for name, value in (("activation", activation), ("parametrization", parametrization)):
        check_value(name, value)

    kernel = ScoreUNet(
        channels=2 * window,
        embedding=embedding,
        size=size,
        alpha=alpha,
        parametrization=parametrization,
        hidden_channels=tuple(hidden_channels),
        hidden_blocks=tuple(hidden_blocks),
        kernel_size=kernel_size,
        activation=getattr(nn, activation),
        dropout=dropout,
    )
    score = MCScoreNet(kernel, order=window // 2)

    for name, value in zip(MARKED, (alpha, parametrization), strict=True):
        if value != KEYS[name].default:
            score.register_buffer(f"{name}_{value}", torch.ones(()))

    return score


def load_score(run_directory: Path | str, device: str | torch.device = "cpu") -> MCScoreNet:
    r"""Loads the score network of a finished run, by SDA or by us. It does not drop out.

    The run is given by its directory; or by its name, its id or the beginning of one, if it is in
    `runs/` of $SDA_RAY_ROOT or of the current directory.

    Nothing in its `config.json` and `state.pth` is executed, and no weight is taken before all of
    them are known to fit the config. An export of a run loads too, from `model.safetensors` if it
    has no `state.pth`.

    Raises:
        UserError: If the run is not finished or its files do not belong together.
    """

    score, config = load_network(run_directory, device)

    if config["alpha"] != "cos":
        warnings.warn(
            f"The network of {run_directory} is for alpha={config['alpha']}: it samples wrongly "
            "with a VPSDE of another alpha. Load both by load_sde.",
            stacklevel=2,
        )

    return score


def load_network(
    run_directory: Path | str, device: str | torch.device = "cpu"
) -> tuple[MCScoreNet, Config]:
    r"""Loads the score network of a finished run as :func:`load_score`, and its config."""

    run = Path(run_directory)

    if isinstance(run_directory, str) and not run.is_dir() and len(run.parts) == 1:
        run = find_run(default_root() / "runs", run_directory)

    if not run.is_dir():
        raise UserError(f"{run} is not a directory. Give the directory of a run.")

    config, file = load_config(run / "config.json"), run / "state.pth"

    if not file.exists() and (exported := run / "model.safetensors").exists():
        file = exported

    if not file.exists():
        raise UserError(
            f"{file} does not exist: the run is not finished. Resume it with "
            f"`sda-ray train --resume {run}`."
        )

    state = _read_weights(file)
    size = _field_size(file, state)

    try:
        check_config(config, size=size)
    except UserError as e:
        raise UserError(f"{file} is for fields of {size}x{size}, but {run / 'config.json'}: {e}")

    with torch.device("meta"):
        score = make_score(**network_settings(config), size=size).float()

    _check_weights(file, state, score.state_dict(), config)
    score.to_empty(device=device).load_state_dict(state)

    return score.eval(), config


def load_sde(
    run_directory: Path | str, device: str | torch.device = "cpu", length: int | None = None
) -> VPSDE:
    r"""Loads the diffusion of a finished run, by SDA or by us: its network and its `alpha`.

    The run and its network, of trajectories, are as in :func:`load_score`. They have :math:`L`
    snapshots, those of a window by default: the event shape is :math:`(L, 2, N, N)`.

    Raises:
        UserError: If the run is not finished, its files do not belong together, or the
            trajectories are shorter than a window.
    """

    score, config = load_network(run_directory, device)
    window, size = config["window"], score.state_dict()["kernel.forcing"].shape[-1]
    length = window if length is None else length

    if length < window:
        raise UserError(f"length is {length}, but must be at least {window}, the run's window.")

    return VPSDE(score, (length, 2, size, size), alpha=config["alpha"]).eval()


def check_archive(f: BinaryIO) -> None:
    r"""Checks a file of `torch.save`, before it is loaded, for what would take memory.

    Raises:
        ValueError: If it is no archive, its entries are compressed or overlap, or it calls for
            more than tensors.
    """

    size = f.seek(0, os.SEEK_END)

    with zipfile.ZipFile(f) as archive:
        items = archive.infolist()

        if any(item.compress_type != zipfile.ZIP_STORED for item in items):
            raise ValueError("it is compressed")

        if sum(item.file_size for item in items) > size:
            raise ValueError("its entries declare more bytes than it has")

        for item in items:
            if item.filename.endswith(".pkl"):
                _check_pickle(archive.open(item))

    f.seek(0)


def _check_pickle(f: Any) -> None:
    for code, argument, position in pickletools.genops(f):
        if (position or 0) > MAX_PICKLE:
            raise ValueError(f"it has more than {MAX_PICKLE} bytes of names")

        calls = code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1")
        storage = str(argument).startswith("torch ") and str(argument).endswith("Storage")

        if calls and not (code.name == "GLOBAL" and (argument in CALLS or storage)):
            raise ValueError(f"it calls for '{argument}', which tensors do not need")


def total_size(tensors: Any) -> int:
    r"""Returns the bytes of tensors as they would be written out, expanded ones in full."""

    return sum(x.numel() * x.element_size() for x in tensors.values())


def _read_weights(file: Path) -> dict[str, Tensor]:
    r"""Returns the tensors in a file, on the CPU. Nothing in the file is executed."""

    with os.fdopen(open_regular(file), "rb") as f:
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(file)

            check_archive(f)

            # Mapped rather than read, so that a file is never in memory twice.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # any kind of damage, each with its own kind of exception
            reason = str(e).partition("\n")[0]
            raise UserError(f"{file} is damaged, or not a file of weights: {reason}") from e

    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{file} holds something else than a state dict: tensors by name.")

    # DataParallel and torch.compile prefix the names
    return {re.sub(r"(?<![^.])(module|_orig_mod)\.", "", str(key)): x for key, x in state.items()}


def _field_size(file: Path, state: dict[str, Tensor]) -> int:
    if "kernel.forcing" not in state:
        raise UserError(f"{file} has no 'kernel.forcing'. It is not the state of a score network.")

    shape = tuple(state["kernel.forcing"].shape)

    if len(shape) != 3 or shape[1] != shape[2] or not 0 < shape[1] <= MAX_SIZE:
        raise UserError(
            f"{file} has 'kernel.forcing' of shape {shape}, but it must be (1, N, N), with N at "
            f"most {MAX_SIZE}: the size of the fields."
        )

    return shape[1]


def _check_weights(
    file: Path, state: dict[str, Tensor], expected: dict[str, Tensor], config: Config
) -> None:
    r"""Checks that weights are for a config, of the tensors expected, and in the file."""

    source = file.with_name("config.json")

    for key in MARKED:
        marks = [x for x in KEYS[key].options if f"{key}_{x}" in state] or [KEYS[key].default]

        if marks != [config[key]]:
            raise UserError(
                f"{file} is for {key}={' and '.join(marks)}, but {source} has "
                f"{key}={config[key]}. They are not of the same run."
            )

    if wrong := mismatches(state, expected):
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{file} does not fit {source}: {'; '.join(wrong[:3])}{more}.")

    # An expanded tensor takes no space in the file, but would in memory.
    needed = total_size(expected)

    if needed > file.stat().st_size:
        raise UserError(f"{file} is shorter than the {needed} bytes of weights it should hold.")

    if bad := [name for name, x in state.items() if not x.isfinite().all()]:
        raise UserError(
            f"{file} has numbers that are not finite, in '{bad[0]}': it cannot be used. Train the "
            "network again, or copy the file again."
        )


def mismatches(given: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    r"""Returns how the names, shapes and dtypes of tensors differ from those expected."""

    wrong = []

    for key in dict.fromkeys((*expected, *given)):
        if key not in given:
            wrong.append(f"'{key}' is missing")
        elif key not in expected:
            wrong.append(f"'{key}' is unknown")
        elif (found := _kind(given[key])) != (wanted := _kind(expected[key])):
            wrong.append(f"'{key}' is {found}, but must be {wanted}")

    return wrong


def _kind(x: Tensor) -> str:
    layout = "" if x.layout is torch.strided else f" ({x.layout})"

    return f"{x.dtype} of shape {tuple(x.shape)}{layout}".removeprefix("torch.")
