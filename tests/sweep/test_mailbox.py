r"""Tests for sda_ray.sweep.mailbox: requests are carried out once or not at all, and answered."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sda_ray.sweep.mailbox import OLD, answer, pending, post, take, tidy, wait


def test_requests_come_in_the_order_of_posting_with_their_content(tmp_path: Path) -> None:
    box = tmp_path / "requests"
    assert pending(box) == []  # nobody has asked for anything yet

    ids = [post(box, "trials", trials=n) for n in range(5)]

    assert [(r.id, r.kind, r.content) for r in pending(box)] == [
        (id, "trials", {"trials": n}) for n, id in enumerate(ids)
    ]


def test_request_is_taken_once(tmp_path: Path) -> None:
    id = post(tmp_path, "stop")

    assert [take(tmp_path, id) for _ in range(3)] == [True, False, False]
    assert pending(tmp_path) == []


def test_answer_reaches_the_one_who_waits_and_nothing_is_left(tmp_path: Path) -> None:
    id = post(tmp_path, "stop")

    def drive() -> None:
        (request,) = pending(tmp_path)
        assert take(tmp_path, request.id)
        answer(tmp_path, request.id, "no", good=False)

    timer = threading.Timer(0.3, drive)
    timer.start()
    found = wait(tmp_path, id, alive=lambda: True)
    timer.join()

    assert found is not None and (found.text, found.good) == ("no", False)
    assert list(tmp_path.iterdir()) == []


def test_nobody_waits_for_the_dead_or_for_ever(tmp_path: Path) -> None:
    id = post(tmp_path, "stop")
    start = time.monotonic()

    assert wait(tmp_path, id, alive=lambda: False) is None
    assert wait(tmp_path, id, alive=lambda: True, patience=0.3) is None
    assert time.monotonic() - start < 5


def test_last_words_are_heard(tmp_path: Path) -> None:
    id = post(tmp_path, "stop")

    def dies() -> bool:
        answer(tmp_path, id, "it stops")
        return False

    found = wait(tmp_path, id, alive=dies)
    assert found is not None and found.text == "it stops"


@pytest.mark.parametrize(
    "content",
    ["", "nonsense", "[]", "3", '{"kind": 3, "content": {}}', '{"kind": "stop"}', "[" * 10**5],
)
def test_nonsense_is_a_request_with_a_fault_that_can_be_taken(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "x.json").write_text(content)

    (request,) = pending(tmp_path)
    assert request.fault
    assert take(tmp_path, request.id)


def test_what_is_no_file_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "directory.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "notes.txt")
    post(tmp_path, "stop")

    requests = pending(tmp_path)  # does not hang
    assert [r.kind for r in requests if not r.fault] == ["stop"]
    assert not take(tmp_path, "directory")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_only_what_nobody_waits_for_any_more_is_tidied_up(tmp_path: Path) -> None:
    def age(file: Path, seconds: float) -> Any:
        os.utime(file, (time.time() - seconds,) * 2)

    for id, seconds in {"new": 0.0, "old": OLD + 60}.items():
        answer(tmp_path, id, "done")
        (tmp_path / f"{id}.json").write_text(json.dumps({"kind": "stop", "content": {}}))
        (tmp_path / f".{id}.json.tmp").touch()

        for file in tmp_path.glob(f"*{id}*"):
            age(file, seconds)

    age(tmp_path / ".old.json.tmp", OLD + 60)
    tidy(tmp_path)
    tidy(tmp_path / "missing")

    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [".new.json.tmp", "new.answer.json", "new.json", "old.json"]
