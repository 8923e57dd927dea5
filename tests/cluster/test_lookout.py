r"""Tests for sda_ray.cluster.lookout: what trials are lost to, beside what Ray says of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from byhand import Desk

from sda_ray.cluster.lookout import Lookout

# As Ray 2.60 says it of a node that has lost its network, before it takes the node for dead
CUT = "The actor b3848af is unavailable: The actor is temporarily unavailable: RpcError.\n"


def test_trial_whose_node_dies_before_its_first_report_is_lost_to_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"NodeID": "dead", "Alive": False}, {"NodeID": "well", "Alive": True}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    (tmp_path / "error.txt").write_text(CUT)
    desk = Desk(tmp_path / "sweep")
    lookout = Lookout(desk.driver)

    for name, node in {"a": "dead", "b": "well"}.items():
        spec = desk.driver.suggest(name)
        assert spec is not None
        desk.driver.losses.places[spec["index"]] = (node, node)
        lookout.lose(SimpleNamespace(trial_id=name, error_file=str(tmp_path / "error.txt")))

    assert [*desk.driver.live] == ["a", "b"]  # not known yet

    lookout._settle_doubts()
    assert [*desk.driver.live] == ["b"]

    lookout.doubts = {name: (reason, 0.0) for name, (reason, _) in lookout.doubts.items()}
    lookout._settle_doubts()  # a minute later
    assert [*desk.driver.live] == []
    assert [record.lost for record in desk.study.records()] == [0, 1]
