from pathlib import Path
from typing import Any

import pytest
import torch

from sda_ray.core.config import CONFIG, Config
from sda_ray.core.errors import UserError
from sda_ray.training.compilation import compiled
from sda_ray.training.loop import TrainState

SIZE = 8
TINY: Config = CONFIG | {
    "window": 3,
    "embedding": 4,
    "hidden_channels": (4, 8),
    "hidden_blocks": (1, 1),
    "batch_size": 4,
    "dropout": 0.2,
    "compile": "on",
}


def step(state: TrainState, n: int) -> tuple[float, list[torch.Tensor]]:
    r"""Returns the loss of a step, and the gradients."""

    generator = torch.Generator().manual_seed(n)
    x = torch.randn(4, 6, SIZE, SIZE, generator=generator)
    torch.manual_seed(n)  # what dropout draws from
    state.sde.train()
    loss = state.compiled.loss(x, generator=generator)
    state.sde.eval()
    loss.backward()

    return float(loss.detach()), [
        p.grad.clone() for p in state.score.parameters() if p.grad is not None
    ]


@pytest.mark.filterwarnings("default")  # of torch's own compiler
def test_compiled_step_has_the_maths_of_the_eager_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    eager, ours = TrainState(TINY | {"compile": "off"}, SIZE), TrainState(TINY, SIZE)

    for n in range(1, 4):
        (expected, grads), (loss, found) = step(eager, n), step(ours, n)
        assert loss == pytest.approx(expected, rel=1e-6)

        for a, b in zip(grads, found, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm() + 1e-7  # single numbers may cancel out

        for state in (eager, ours):
            state.lr = 1e-3
            state.update(n)

    assert list(ours.tensors()) == list(eager.tensors())  # a checkpoint looks the same
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]


def test_network_is_compiled_however_many_were_before(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""A process of a sweep has many of them, and their bits must not depend on how many."""

    graphs: list[Any] = []
    compile = torch.compile

    def backend(graph: Any, _: Any) -> Any:  # a compiler that takes no time
        graphs.append(graph)
        return graph.forward

    def count(network: Any, **options: Any) -> Any:
        return compile(network, **options | {"mode": None, "backend": backend})

    monkeypatch.setattr(torch, "compile", count)
    torch.compiler.reset()

    for width in range(10):
        config = TINY | {"hidden_channels": (4 + width,), "hidden_blocks": (1,)}
        state = TrainState(config, SIZE)
        state.compiled.loss(torch.randn(2, 6, SIZE, SIZE))
        assert len(graphs) == width + 1


def test_without_a_compiler_the_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sde = TrainState(TINY | {"compile": "off"}, SIZE).sde
    assert compiled(sde, "off") is sde
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(UserError, match="no C\\+\\+ compiler here"):
        compiled(sde, "graphs")
