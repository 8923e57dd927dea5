r"""Tests of assimilation: against the Kalman smoother, and of what a user may give."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import Chain, GaussianNoise, make_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import RUN, small
from torch import Tensor, nn

from sda_ray.assimilation.posterior import GUIDANCES, assimilate, fitting_members, member_rng
from sda_ray.core.errors import UserError
from sda_ray.nn.diffusion import VPSDE
from sda_ray.nn.guidance import DPSGaussianScore, GaussianScore, MMPSGaussianScore
from sda_ray.nn.score import MCScoreNet, load_score, load_sde

SHAPE = (5, 2, 16, 16)
CHAINS = [
    {"L": 8, "every": 3, "std": 0.3},
    {"L": 5, "d": 3, "every": 2, "std": 0.05, "rho": 0.95},
    {"L": 12, "d": 2, "every": 5, "std": 1.0, "rho": 0.5},
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def every_other(x: Tensor) -> Tensor:
    return x[..., ::2, :, ::4, ::4]


def observation() -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def run(score: Any = None, **changes: Any) -> Tensor:
    given: dict[str, Any] = {"y": observation(), "A": every_other, "std": 0.1, "shape": SHAPE}
    given |= {"members": 2, "steps": 2} | changes

    return assimilate(network() if score is None else score, **given)


def network() -> MCScoreNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return small(parametrization="v").eval()


def observe(chain: Chain) -> Tensor:
    return chain.simulate(torch.Generator().manual_seed(1))[1]


def limit(sde: VPSDE, steps: int) -> tuple[Tensor, Tensor]:
    r"""Returns the mean and the covariance of samples, exactly: a linear score makes them linear."""

    n = sde.shape.numel()
    start = torch.cat((torch.zeros(1, n), torch.eye(n))).double()
    x = sde.double().sample((n + 1,), steps=steps, start=start.reshape(-1, *sde.shape)).flatten(1)
    root = (x[1:] - x[0]).T

    return x[0], root @ root.T


def bias(found: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> tuple[float, float]:
    r"""Returns the errors of mean and covariance, in standard deviations and products of them."""

    std = true[1].diagonal().sqrt()
    mean = (found[0] - true[0]) / std
    cov = (found[1] - true[1]) / std / std[:, None]

    return mean.abs().max().item(), cov.abs().max().item()


# Kalman


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.floats(0.05, 2.0))
def test_smoother_equals_the_joint_gaussian(L: int, d: int, every: int, std: float) -> None:
    chain = make_chain(L, d, every, std)
    y = observe(chain)
    (mean, cov), (means, covs) = chain.posterior(y), chain.smooth(y)
    blocks = torch.stack([cov.reshape(L, d, L, d)[i, :, i] for i in range(L)])

    assert torch.allclose(means.flatten(), mean, atol=1e-9)
    assert torch.allclose(covs, blocks, atol=1e-9)


@pytest.mark.parametrize("alpha", ["lin", "cos", "exp"])
@pytest.mark.parametrize("given", CHAINS)
def test_sampler_with_the_posterior_score_is_the_smoother(
    given: dict[str, Any], alpha: str
) -> None:
    chain = make_chain(**given)
    true = chain.posterior(observe(chain))
    sde = VPSDE(GaussianNoise(*true, alpha), chain.shape, alpha)
    (mean, rough), (_, fine) = (bias(limit(sde, steps), true) for steps in (128, 256))

    # The step bias is of first order. That of the mean is due to the start, for which mu(1) is 0.
    assert mean < 0.01
    assert rough < 0.3 and fine < 0.65 * rough + 2e-3


@pytest.mark.parametrize("given", CHAINS)
def test_moment_matching_with_the_exact_prior_is_the_smoother(given: dict[str, Any]) -> None:
    chain = make_chain(**given)
    y = observe(chain)
    prior = VPSDE(GaussianNoise(*chain.joint()), chain.shape)
    guided = MMPSGaussianScore(y, chain.A, chain.std, prior, iterations=50, tolerance=1e-12)
    mean, cov = bias(limit(VPSDE(guided, chain.shape), 64), chain.posterior(y))

    assert mean < 0.02 and cov < 0.15


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("given", CHAINS[:2])
def test_members_have_the_moments_of_the_smoother(given: dict[str, Any], corrections: int) -> None:
    chain, M = make_chain(**given), 256
    y = observe(chain)
    means, covs = chain.smooth(y)
    x = assimilate(
        GaussianNoise(*chain.joint()),
        y,
        chain.A,
        chain.std,
        shape=chain.shape,
        members=M,
        steps=64,
        corrections=corrections,
        tau=0.1,
        guidance="mmps",
    )
    std = covs.diagonal(dim1=1, dim2=2).sqrt()

    # Four standard errors, and the bias of 64 steps
    assert ((x.mean(0) - means).abs() < (4 / M**0.5 + 0.02) * std).all()
    assert ((x.std(0) / std - 1).abs() < 4 / (2 * M) ** 0.5 + 0.06).all()


def test_windows_give_the_score_of_the_chain_as_they_grow() -> None:
    chain = make_chain(L=25, d=2, rho=0.6)
    exact = GaussianNoise(*chain.joint())
    x = torch.randn(3, 25, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double()

    for time in (0.2, 0.5, 0.8):
        t = torch.tensor([time] * 3).double()
        errors = []

        for order in (1, 2, 4, 8, 12):
            kernel = GaussianNoise(*make_chain(L=2 * order + 1, d=2, rho=0.6).joint())
            eps = MCScoreNet(kernel, order)(x, t)
            errors.append((eps - exact(x, t)).norm() / exact(x, t).norm())

        assert errors[-1] < 1e-12  # a single window
        assert all(b < a for a, b in itertools.pairwise(errors))
        assert errors[3] < 0.05 * errors[0] and errors[0] < 0.2


# Ensembles


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_members_depend_neither_on_chunks_nor_on_their_number(guidance: str) -> None:
    x = run(members=4, corrections=1, guidance=guidance)

    assert x.isfinite().all() and x.std(0).min() > 0

    for members, chunk in ((4, 1), (4, 3), (4, 4), (2, None), (2, 1)):
        y = run(members=members, corrections=1, guidance=guidance, chunk=chunk)

        # Not in all bits: how a convolution rounds may depend on the number of members.
        assert torch.allclose(y, x[:members], rtol=1e-3, atol=1e-5 * x.abs().max().item())

    assert run(members=2, corrections=1, guidance=guidance, seed=1)[0].ne(x[0]).all()


def test_members_are_the_same_bits_in_chunks_if_the_score_is_elementwise() -> None:
    def score(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        return 0.7 * x

    x = run(score, members=5)

    for members, chunk in ((5, 1), (5, 3), (2, 2)):
        assert run(score, members=members, chunk=chunk).equal(x[:members])

    assert run(score, members=3, first=2).equal(x[2:])


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_members_are_samples_of_the_guided_diffusion(guidance: str) -> None:
    prior, y = VPSDE(network(), SHAPE), observation()
    guided = {
        "gaussian": lambda: GaussianScore(y, every_other, 0.1, prior, gamma=0.05),
        "dps": lambda: DPSGaussianScore(y, every_other, prior, zeta=0.5),
        "mmps": lambda: MMPSGaussianScore(y, every_other, 0.1, prior, iterations=2),
    }[guidance]()
    rngs = [member_rng(3, i) for i in range(2)]
    x = VPSDE(guided, SHAPE).sample((2,), steps=3, corrections=2, tau=0.3, generator=rngs)
    options = {"guidance": guidance, "gamma": 0.05, "zeta": 0.5, "iterations": 2}

    assert run(steps=3, corrections=2, tau=0.3, seed=3, **options).equal(x)

    start = torch.stack([torch.randn(SHAPE, generator=member_rng(0, i)) for i in range(2)])
    x = VPSDE(guided, SHAPE).sample((2,), steps=3, start=start)

    assert run(steps=3, corrections=0, **options).equal(x)


def test_score_may_be_a_run_a_network_a_diffusion_or_a_function() -> None:
    shape, y = (7, 2, 64, 64), torch.zeros(4, 2, 16, 16)
    given: Any = {"y": y, "A": every_other, "std": 0.1, "shape": shape, "members": 1, "steps": 1}
    score = load_score(RUN)
    x = assimilate(RUN, **given)

    assert x.shape == (1, *shape)
    assert all(
        assimilate(other, **given).equal(x)
        for other in (str(RUN), score, load_sde(RUN, length=7), lambda x, t, c: score(x, t, c))
    )


@pytest.mark.parametrize("alpha", ["lin", "exp"])
def test_alpha_is_that_of_the_score(alpha: str) -> None:
    score = small(alpha=alpha).eval()
    plain = small().eval()
    score.load_state_dict(plain.state_dict(), strict=False)
    x = run(score)

    assert x.equal(run(VPSDE(plain, SHAPE, alpha=alpha)))
    assert x.equal(run(plain, alpha=alpha))
    assert not x.equal(run(plain))

    with pytest.raises(UserError, match=f"alpha is 'cos', but the score is for '{alpha}'"):
        run(score, alpha="cos")


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_lower_precision_of_the_network_stays_in_the_network(
    guidance: str, dtype: torch.dtype
) -> None:
    score = network().to(dtype)
    x = run(score, guidance=guidance)

    assert x.dtype == (torch.double if dtype == torch.double else torch.float)
    assert x.isfinite().all()
    assert {p.dtype for p in score.parameters()} == {dtype}


def test_network_in_training_drops_nothing_out_and_goes_on_training() -> None:
    score = small(parametrization="v", dropout=0.5).eval()
    expected = run(score)
    score.train()
    score.kernel.eval()
    next(score.kernel.children()).train()
    modes = [module.training for module in score.modules()]

    assert run(score).equal(expected)
    assert [module.training for module in score.modules()] == modes


def test_progress_reaches_the_total() -> None:
    calls: list[tuple[int, int]] = []
    run(members=3, chunk=2, steps=2, progress=lambda *call: calls.append(call))

    assert calls == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_interrupt_leaves_nothing_behind() -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    score, state = network(), torch.get_rng_state()

    with pytest.raises(KeyboardInterrupt):
        run(score, progress=interrupt)

    assert torch.is_grad_enabled() and torch.get_rng_state().equal(state)
    assert all(p.grad is None and p.requires_grad for p in score.parameters())
    assert run(score).equal(run())


def test_members_together_are_those_that_fit_in_memory() -> None:
    guided = GaussianScore(observation(), every_other, 0.1, VPSDE(network(), SHAPE))
    sizes = [fitting_members(guided, torch.zeros(SHAPE), 12, 4.0**i) for i in range(6, 20)]

    assert sizes[0] == 1 and sizes[-1] == 12
    assert sizes == sorted(sizes) and len(set(sizes)) > 2

    # What one member keeps for its gradient is more than its activations at full resolution.
    least = 10 * torch.zeros(SHAPE).nbytes
    assert fitting_members(guided, torch.zeros(SHAPE), 12, 6 * least) < 4


# Errors


class Diverging(nn.Module):
    def __init__(self, member: int | None) -> None:
        super().__init__()

        self.member = member

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        eps = x.clone()
        eps[slice(None) if self.member is None else self.member] *= torch.nan

        return eps


def test_divergence_of_all_members_is_an_error_and_of_some_a_warning() -> None:
    for chunk in (1, None):
        with pytest.raises(UserError, match=r"all 2 members diverged\. Try more steps or correct"):
            run(Diverging(None), chunk=chunk)

    with pytest.warns(UserWarning, match=r"1 of 3 members diverged and are not finite: \[1\]"):
        x = run(Diverging(1), members=3, chunk=3)

    assert x.isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_divergence_ends_early() -> None:
    calls: list[int] = []

    with pytest.raises(UserError, match="diverged"):
        run(Diverging(None), steps=64, progress=lambda done, total: calls.append(done))

    assert calls == [2]


OPERATORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shape": (lambda x: x[..., ::2, :, ::2, ::2], r"to \(2, 3, 2, 8, 8\), but .* \(2, 3, 2, 4, 4"),
    "members": (lambda x: x[0][..., ::2, :, ::4, ::4], "the first dimension is that of members"),
    "argmax": (lambda x: every_other(x).argmax(-1), "A maps"),
    "round": (lambda x: every_other(x).round(), "A has no derivative"),
    "detach": (lambda x: every_other(x).detach(), "A has no derivative"),
    "comparison": (lambda x: (every_other(x) > 0).float(), "A has no derivative"),
    "numpy": (lambda x: every_other(x).numpy(), "A fails for x of shape"),
    "list": (lambda x: every_other(x).tolist(), "must return a tensor"),
    "raises": (lambda x: x[:, :, 5], "A fails for x of shape .* IndexError"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_that_cannot_guide_is_refused(name: str) -> None:
    A, message = OPERATORS[name]

    with pytest.raises(UserError, match=message):
        run(A=A)


NAN = torch.full((3, 2, 4, 4), torch.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": 0}, "members is 0, but must be an integer of at least 1"),
        ({"steps": 0}, "steps is 0, but must be an integer of at least 1"),
        ({"steps": 2.5}, r"steps is 2\.5, but must be an integer"),
        ({"corrections": -1}, "corrections is -1, but must be an integer of at least 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"gamma": -1.0}, r"gamma is -1\.0, but must be a number of at least 0"),
        ({"tau": torch.nan}, "tau is nan"),
        ({"guidance": "gausian"}, "one of gaussian, dps, mmps. Did you mean 'gaussian'?"),
        (
            {"alpha": "cosine"},
            "alpha is 'cosine', but must be cos, lin or exp. Did you mean 'cos'?",
        ),
        ({"std": 0.0}, r"std is 0\.0, but must be finite and above 0"),
        ({"std": torch.ones(5)}, r"std has shape \(5,\), but must be a number or have \(3, 2"),
        ({"y": NAN}, "y has 96 of 96 numbers that are not finite. Leave out what is missing"),
        ({"y": torch.zeros(0)}, "nothing is observed"),
        ({"shape": ()}, r"shape is \(\), but must be that of a trajectory"),
        ({"shape": (2, 2, 16, 16), "y": torch.ones(1, 2, 4, 4)}, "with L at least 3, the window"),
        ({"score": 3}, "score is 3, but must be a noise estimator"),
        ({"score": Path("nowhere")}, "nowhere is not a directory"),
        ({"score": lambda x, t, c: x[:, 0]}, "noise estimate has shape"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changes)


@pytest.mark.parametrize("shape", [(7, 2, 32, 32), (7, 1, 64, 64)])
def test_shape_that_is_not_of_the_run_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"trajectories of .* are \(7, 2, 64, 64\)"):
        run(RUN, shape=shape)
