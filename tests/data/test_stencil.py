r"""Tests for the sda_ray.data.stencil module. What it computes is tested in test_flow.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sda_ray.data import stencil
from sda_ray.data.flow import KolmogorovFlow
from sda_ray.data.stencil import kernels


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def needs_compiler() -> None:
    if kernels() is None:
        pytest.skip("there is no C compiler")


@pytest.mark.parametrize("size", [3, 20, 64])
def test_compiled_and_eager_solver_agree(size: int) -> None:
    needs_compiler()
    x = torch.cat([KolmogorovFlow(64).prior([0, 1, 2])[..., :size, :size]] * 3)
    a, b = (KolmogorovFlow(size, compiled=c).transition(x) for c in (True, False))

    assert torch.allclose(a, b, atol=1e-5)


def test_values_that_are_not_finite_are_not_hidden() -> None:
    needs_compiler()
    flow = KolmogorovFlow(16)
    x = flow.prior([0, 1])
    x[0, 1, 7, 7] = torch.nan
    y = flow.transition(x)

    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kernels()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_without_a_working_compiler_the_eager_solver_computes(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = KolmogorovFlow(16, compiled=False)
    x = flow.prior([0])

    if fault == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(stencil, "FLAGS", ("-no-such-flag",))

    assert kernels() is None
    assert torch.equal(KolmogorovFlow(16).transition(x), flow.transition(x))
