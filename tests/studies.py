r"""A study of a sweep, and runs to be put into it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated import draw

from sda_ray.core.lease import Lease
from sda_ray.search.promotion import TrialRecord
from sda_ray.search.sampler import propose
from sda_ray.search.study import Study

__all__ = ["add", "lease", "no_sync", "study"]


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Leaves out what only a power cut would miss, which is most of the time."""

    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    lease = Lease(tmp_path / "lease.json", "the sweep")
    yield lease
    lease.release()


@pytest.fixture
def study(tmp_path: Path, lease: Lease) -> Study:
    return Study(tmp_path / "study.journal", "test", lease)


def add(study: Study, **more: Any) -> TrialRecord:
    records = study.records()
    drawn = propose(draw, records, sampler="random")
    assert drawn is not None
    index = 1 + len(records)
    record = TrialRecord(index, f"run{index:05}", "running", 1, 9, attempt=1, config=drawn[0])

    return study.add(replace(record, **more), drawn[1])
