r"""Tests for sda_ray.assimilation.operators: what each observes, its text, what it refuses."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

from sda_ray.assimilation import PANEL, PANEL_VERSION, parse, points
from sda_ray.assimilation.operators import KINDS
from sda_ray.core import UserError
from sda_ray.data import coarsen, vorticity

index = st.integers(0, 40)
size = st.integers(1, 40)
radius = st.floats(0, 9, width=16).map(lambda r: f"{r:.4f}")

PARTS = st.one_of(
    st.sampled_from(["identity", "last", "vorticity", "saturate"]),
    st.builds("{}({})".format, st.sampled_from(["every", "coarsen", "subsample"]), size),
    st.builds("component({})".format, index),
    st.builds("every({}:{})".format, index, size),
    st.builds("every({}::{})".format, index, size),
    st.builds("box({}:{})".format, index, index),
    st.builds("box( {}:{}, {}:{} )".format, index, index, index, index),
    st.builds("ring({}:{})".format, radius, radius),
    st.lists(st.builds("{}, {}".format, index, index), min_size=1).map(
        lambda pairs: f"points({'; '.join(pairs)})"
    ),
)

# Each with a shape that it fits, and what it returns for x
DEFINITIONS = {
    "identity": lambda x: x,
    "every(3)": lambda x: x[..., ::3, :, :, :],
    "every(1:4)": lambda x: x[..., 1:4, :, :, :],
    "every(1::2)": lambda x: x[..., 1::2, :, :, :],
    "every(:5:4)": lambda x: x[..., [0, 4], :, :, :],
    "last": lambda x: x[..., -1:, :, :, :],
    "coarsen(4)": lambda x: coarsen(x, 4),
    "subsample(3)": lambda x: x[..., ::3, ::3],
    "box(4:12)": lambda x: x[..., 4:12, 4:12],
    "box(0:2, 3:16)": lambda x: x[..., 0:2, 3:16],
    "points(0,1; 7,15; 0,1)": lambda x: x[..., [0, 7, 0], [1, 15, 1]][..., None, :],
    "component(1)": lambda x: x[..., 1:, :, :],
    "vorticity": lambda x: vorticity(x)[..., None, :, :],
    "saturate": lambda x: x / (1 + x.abs()),
    "every(2) coarsen(2) vorticity saturate box(2:5)": lambda x: saturated(x)[..., 2:5, 2:5],
}


def saturated(x: Tensor) -> Tensor:
    w = vorticity(coarsen(x[..., ::2, :, :, :], 2))[..., None, :, :]

    return w / (1 + w.abs())


def trajectories(*batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*batch, 6, 2, 12, 16, dtype=dtype)


@pytest.mark.parametrize("text", DEFINITIONS)
def test_operator_observes_what_its_name_says(text: str) -> None:
    for x in trajectories(), trajectories(3), trajectories(2, 3), trajectories(0):
        y = parse(text)(x)
        assert torch.equal(y, DEFINITIONS[text](x))
        assert y.dim() == x.dim()


@pytest.mark.parametrize("text", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_operator_keeps_the_type(text: str, dtype: torch.dtype) -> None:
    x = trajectories(3, dtype=dtype)
    y, exact = parse(text)(x), parse(text)(x.double())

    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact, rtol=0.02, atol=0.05)
    assert parse(text)(x.to("meta")).shape == y.shape
    assert parse("ring(0:1)")(x.to("meta")).shape == parse("ring(0:1)")(x).shape


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:DeprecationWarning"
)  # PyTorch's own, by jvp
@pytest.mark.parametrize("text", [*DEFINITIONS, "ring(0.4:0.8)"])
def test_operator_is_differentiable_and_maps_over_batches(text: str) -> None:
    A = parse(text)
    x, v = trajectories(3), trajectories(3)

    assert torch.equal(vmap(A)(x), A(x))

    slope = jvp(A, (x,), (v,))[1]
    assert torch.allclose(slope, (A(x + 1e-5 * v) - A(x - 1e-5 * v)) / 2e-5, atol=1e-7)
    weights = torch.randn_like(slope)
    pulled = grad(lambda x: (A(x) * weights).sum())(x)
    assert torch.allclose((slope * weights).sum(), (pulled * v).sum())
    assert torch.allclose(slope, A(v)) == A.linear
    assert A.linear == ("saturate" not in text)


@given(st.lists(PARTS, min_size=1, max_size=5))
def test_text_of_an_operator_makes_an_equal_one(parts: list[str]) -> None:
    try:
        A = parse("  ".join(parts))
    except UserError as error:
        assert "Put vorticity first." in str(error)
        return

    assert str(A).split(" ") == [re.sub(r"\s", "", part) for part in parts]
    assert parse(str(A)) == parse(A) == A and hash(parse(str(A))) == hash(A)
    assert pickle.loads(pickle.dumps(A)) == A
    assert parse(f"{A} last") != A


def test_documentation_lists_every_operator() -> None:
    text = (Path(__file__).parents[2] / "docs" / "skill.md").read_text()

    part = text.partition("\n## Observations")[2].partition("\n## ")[0]

    assert set(re.findall(r"^\| `(\w+)", part, re.MULTILINE)) == set(KINDS)


def test_operators_are_composed_from_left_to_right() -> None:
    x = trajectories(2)
    A = parse("every(2)") | parse("coarsen(2) vorticity") | points([(0, 1), (2, 5)])

    assert parse("every(2) coarsen(2) vorticity points(0,1; 2,5)") == A
    assert A(x).shape == (2, 3, 1, 1, 2)
    assert torch.equal(A(x)[..., 0, 1], vorticity(coarsen(x[:, ::2], 2))[..., None, 2, 5])


def test_ring_is_that_of_the_notebook() -> None:
    axis = torch.linspace(-1, 1, 64)
    square = torch.cartesian_prod(axis, axis).square().sum(dim=-1).reshape(64, 64)
    mask = (square > 0.4) & (square < 0.6)

    x = torch.randn(8, 2, 64, 64)
    y = parse(PANEL["circle"].operator)(x)
    assert torch.equal(y, vorticity(x[-1])[None, None, None, mask])


def test_panel_fits_the_states_of_the_notebooks() -> None:
    shapes = {
        name: tuple(parse(o.operator)(torch.zeros(o.states, 2, 64, 64)).shape)
        for name, o in PANEL.items()
    }

    assert PANEL_VERSION == 1
    assert shapes == {
        "assim": (8, 2, 8, 8),
        "extrapolate": (3, 2, 8, 8),
        "saturate": (3, 1, 12, 12),
        "subsample-2": (8, 2, 32, 32),
        "subsample-4": (8, 2, 16, 16),
        "subsample-8": (8, 2, 8, 8),
        "subsample-16": (8, 2, 4, 4),
        "circle": (1, 1, 1, 612),
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("coarse(8)", "There is no operator 'coarse'. Did you mean 'coarsen'?"),
        ("every(4) xyzzy", "There is no operator 'xyzzy'. There are identity, every, last, "),
        ("coarsen", "'coarsen' is no operator. Write coarsen(k)."),
        ("coarsen(0)", "'coarsen(0)' is no operator. Write coarsen(k)."),
        ("coarsen(-2)", "'coarsen(-2)' is no operator. Write coarsen(k)."),
        ("coarsen(2.5)", "'coarsen(2.5)' is no operator. Write coarsen(k)."),
        ("last(2)", "'last(2)' is no operator. Write last."),
        ("every(::0)", "'every(::0)' is no operator. Write every(k) or every(i:j:k)."),
        ("box(4,12)", "'box(4,12)' is no operator. Write box(i:j) or box(i:j, k:l)."),
        ("points()", "'points()' is no operator. Write points(i,j; k,l; …)."),
        ("ring(0.5)", "'ring(0.5)' is no operator. Write ring(a:b)."),
        ("", "'' is no operator. One looks like 'every(4) coarsen(8)', or 'identity'"),
        ("every(4) coarsen(8", "'every(4) coarsen(8' is no operator."),
        ("every(4))", "'every(4))' is no operator."),
        ("box(4:12) vorticity", "'box(4:12) vorticity' takes the vorticity of a part of the"),
    ],
)
def test_text_that_is_no_operator_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        parse(text)


@pytest.mark.parametrize(
    "text, shape, needs",
    [
        ("every(2) coarsen(5)", (4, 2, 60, 64), "sides that 5 divides, but x has shape (2, 2, 6"),
        ("box(4:12)", (4, 2, 8, 64), "at least 12 rows and 12 columns, but x has shape (4, 2, 8"),
        ("points(0,9; 3,1)", (4, 2, 8, 8), "at least 4 rows and 10 columns"),
        (
            "vorticity",
            (4, 1, 8, 8),
            "the two channels of velocities, but x has shape (4, 1, 8, 8)",
        ),
        ("vorticity vorticity", (4, 2, 8, 8), "the two channels of velocities"),
        ("component(2)", (4, 2, 8, 8), "at least 3 channels"),
        ("every(2:5)", (4, 2, 8, 8), "at least 5 states"),
        ("last", (2, 8, 8), "trajectories (…, L, C, H, W), but x has shape (2, 8, 8)."),
        ("last", (0, 2, 8, 8), "trajectories (…, L, C, H, W)"),
    ],
)
def test_shape_that_an_operator_does_not_fit_is_refused(
    text: str, shape: tuple[int, ...], needs: str
) -> None:
    A = parse(text)

    with pytest.raises(UserError, match=re.escape(f"'{A.parts[-1]}' needs {needs}")):
        A(torch.zeros(shape))


@pytest.mark.parametrize("text", ["every(4:)", "box(5:5)", "box(7:3)", "ring(0.01:0.02)"])
def test_operator_that_observes_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"'{text}' leaves nothing of x, which has")):
        parse(text)(torch.zeros(4, 2, 8, 8))
