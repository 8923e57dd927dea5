r"""Tests for sda_ray.runs.curves: the curves of runs, drawn in characters."""

from typing import Any

import numpy as np
import pytest

from sda_ray.runs.curves import chart


def lines(values: list[float]) -> list[dict[str, Any]]:
    return [{"epoch": n, "loss_valid": x} for n, x in enumerate(values, start=1)]


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [1.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [1e308, -1e308], [1e-300, 1e300]]
    + [[float("nan")], [float("inf"), 1.0, 2.0], [0.0] * 5000, [5e-324, 0.0]],
)
def test_any_curve_is_drawn(values: list[float]) -> None:
    drawn = chart(lines(values), {"loss_valid": ""}, width=30, height=5).plain

    assert all(len(line) <= 30 + 60 for line in drawn.splitlines())
    assert ("no losses" in drawn) == (not any(np.isfinite(values)))


def test_curve_falls_from_corner_to_corner() -> None:
    drawn = chart(lines([3.0, 2.0, 1.0]), {"loss_valid": ""}, width=20, height=6).plain
    rows = [line[11:] for line in drawn.splitlines()[:6]]

    assert rows[0][0] != " " and rows[-1][19] != " "
    assert rows[0].strip() == rows[0][:4].strip()
    assert "linear scale" in drawn


def test_scale_is_logarithmic_beyond_a_factor_of_ten() -> None:
    assert "linear" in chart(lines([1.0, 0.1]), {"loss_valid": ""}).plain
    assert "logarithmic" in chart(lines([1.0, 0.09]), {"loss_valid": ""}).plain
