r"""Tests for sda_ray.cli.render: the curves of runs, drawn in characters."""

import math
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from sda_ray.cli.render import chart, run_table, sparkline
from sda_ray.core.console import make_console
from sda_ray.search.promotion import TrialRecord


def lines(values: list[float]) -> list[dict[str, Any]]:
    return [{"epoch": n, "loss_valid": x} for n, x in enumerate(values, start=1)]


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [1.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [1e308, -1e308], [1e-300, 1e300]]
    + [[float("nan")], [float("inf"), 1.0, 2.0], [0.0] * 5000, [5e-324, 0.0]],
)
def test_any_curve_is_drawn(values: list[float]) -> None:
    drawn = chart(lines(values), {"loss_valid": ""}, width=30, height=5).plain

    assert all(len(line) <= 90 for line in drawn.splitlines())
    assert ("no losses" in drawn) == (not any(np.isfinite(values)))


def test_curve_falls_from_corner_to_corner() -> None:
    drawn = chart(lines([3.0, 2.0, 1.0]), {"loss_valid": ""}, width=40, height=10).plain
    rows = [[c for c in line if "\u2800" < c <= "\u28ff"] for line in drawn.splitlines()]
    firsts = [line.find(row[0]) for line, row in zip(drawn.splitlines(), rows, strict=True) if row]

    assert firsts == sorted(firsts) and firsts[-1] - firsts[0] > 20
    assert "linear scale" in drawn and "epoch" not in drawn


def test_scale_is_logarithmic_beyond_a_factor_of_ten() -> None:
    assert "linear" in chart(lines([1.0, 0.1]), {"loss_valid": ""}).plain
    assert "logarithmic" in chart(lines([1.0, 0.09]), {"loss_valid": ""}).plain


def test_sparkline_falls_where_the_loss_falls() -> None:
    curve = [1 / epoch for epoch in range(1, 100)]
    heights = ["▁▂▃▄▅▆▇█".index(x) for x in sparkline(curve)]

    assert heights == sorted(heights, reverse=True) and heights[::7] == [7, 0]
    assert sparkline([1.0, math.nan, 0.1, math.inf, 0.01]) == "█▅▁"
    assert sparkline([-1.0, 1.0]) == "▁█" and sparkline([]) == "" and len(sparkline([2.0])) == 1
    assert sparkline(curve, plain=True).isascii()


def test_settings_that_tell_runs_apart_are_the_last_to_be_left_out() -> None:
    configs = [
        {"alpha": "cos", "learning_rate": rate, "activation": act, "seed": seed}
        for rate, act in ((0.1, "SiLU"), (0.2, "GELU"))
        for seed in (11, 12, 13)
    ]
    records = [
        TrialRecord(i, "abcdefgh", "complete", 9, 9, {9: 0.5}, config=config)
        for i, config in enumerate(configs)
    ]
    more = {"curve": {"abcdefgh": "▁▁▁▁▁▁▁▁"}, "memory": {"abcdefgh": "0.12 GB"}}

    def headers(width: int) -> list[str]:
        table, *_ = run_table(records, {}, width, "loss_valid", more)
        assert isinstance(table, Table)
        return [str(column.header).replace("\n", "") for column in table.columns[5:]]

    settings = ["alpha", "learning_rate", "activation", "seed"]
    assert headers(120) == ["curve", "memory", *settings]
    assert headers(81) == ["curve", "memory", "alpha", "learning_rate", "seed"]
    assert headers(72) == ["curve", "memory", "learning_rate", "seed"]
    assert headers(56) == ["learning_rate", "seed"]
    assert headers(46) == ["seed"]


def test_table_of_runs_shows_texts_of_others_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "\x1b[2J"
    record = TrialRecord(1, "abcdefgh", "complete", 1, 1, {1: 0.5}, config={f"{odd}key": odd})
    make_console().print(*run_table([record], {}, 160, odd))

    assert capsys.readouterr().out.count("�[2J") == 3
