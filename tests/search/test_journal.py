r"""Tests for sda_ray.search.journal: a study survives faults of its file."""

import json
import logging
import os
import shutil
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from simulated import Sweeping, outcomes
from studies import add, lease, no_sync

from sda_ray.core.errors import UserError
from sda_ray.core.lease import Lease, LeaseLost
from sda_ray.search.journal import Journal
from sda_ray.search.promotion import Rules
from sda_ray.search.sampler import quiet_optuna
from sda_ray.search.study import Study

__all__ = ["lease", "no_sync"]  # fixtures

RULES = Rules(target=6, epochs=9, min_epochs=1, eta=3)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sweeping:
    r"""A finished sweep."""

    sweeping = Sweeping(tmp_path_factory.mktemp("whole") / "sweep", RULES)
    sweeping.drive()

    return sweeping


# Torn ends


def test_journal_cut_at_any_byte_of_its_last_records_loses_the_torn_one_only(
    journal: Path, lease: Lease, whole: Sweeping
) -> None:
    lines = whole.journal.read_bytes().splitlines(keepends=True)
    start, tail = b"".join(lines[:-3]), b"".join(lines[-3:])

    for cut in range(len(tail) + 1):
        journal.write_bytes(start + tail[:cut])
        records = Study(journal, "simulated", lease).records()
        kept = start + b"".join(x for x in tail[:cut].splitlines(True) if x.endswith(b"\n"))

        assert journal.read_bytes() == kept
        assert len(records) == RULES.target


def test_torn_append_of_many_values_is_cut_back_to_whole_records(
    journal: Path, lease: Lease
) -> None:
    study = Study(journal, "test", lease)
    record = add(study, until=9)
    before = journal.read_bytes()
    study.report(record, {e: 1 / e for e in range(1, 10)})
    after = journal.read_bytes()

    for cut in range(len(before), len(after), 37):
        journal.write_bytes(after[:cut])
        (found,) = Study(journal, "test", lease).records()
        count = after[len(before) : cut].count(b"\n")

        assert found.values == {e: 1 / e for e in range(1, count + 1)}
        assert Study(journal, "test", lease).report(found, {9: 1 / 9}).last == 9


def test_torn_record_of_any_length_is_cut(journal: Path, lease: Lease) -> None:
    study = Study(journal, "test", lease)
    add(study)
    whole = journal.read_bytes()

    for torn in (b"", b"x" * 10**6, b"{}" * 8, whole.splitlines()[0]):
        journal.write_bytes(whole + torn)

        assert len(Study(journal, "test", lease).records()) == 1
        assert journal.read_bytes() == whole


def test_sweep_resumes_from_a_journal_cut_anywhere(tmp_path: Path, whole: Sweeping) -> None:
    expected = list(outcomes(whole.drive()))
    size = whole.journal.stat().st_size

    for n, end in enumerate(range(size - 400, size, 23)):
        copy = tmp_path / f"copy{n}"
        shutil.copytree(whole.journal.parent, copy)
        os.truncate(copy / "study.journal", end)

        assert list(outcomes(Sweeping(copy, RULES).drive())) == expected


# Locks


def test_lock_of_optuna_is_never_waited_for(journal: Path, lease: Lease) -> None:
    r"""The lease alone decides who writes."""

    study = Study(journal, "test", lease)
    JournalFileSymlinkLock(str(journal)).acquire()
    add(study)
    assert len(Study(journal, "test", lease).records()) == 1


def test_study_is_not_written_without_the_lease(
    tmp_path: Path, journal: Path, lease: Lease
) -> None:
    study = Study(journal, "test", lease)
    add(study)
    before = journal.read_bytes()
    other = Lease(tmp_path / "lease.json", "the sweep", attempt=99, takeover=True)

    with pytest.raises(LeaseLost, match="the sweep was taken over"):
        add(study)

    assert journal.read_bytes() == before
    other.release()


def test_other_errors_are_not_waited_for(journal: Path, lease: Lease) -> None:
    study = Study(journal, "test", lease)
    journal.rename(journal.with_suffix(".moved"))
    journal.mkdir()

    with pytest.raises((OSError, UserError), match="Is a directory"):
        add(study)


# Other files


def test_damage_in_the_middle_is_named_and_left(journal: Path, whole: Sweeping) -> None:
    lines = whole.journal.read_bytes().splitlines(keepends=True)
    lease = Lease(journal.with_name("lease.json"), "x")

    for garbage in (b"garbage\n", b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"op_code": 99}\n', b"\n"):
        journal.write_bytes(b"".join([*lines[:4], garbage, *lines[4:]]))
        before = journal.read_bytes()

        with pytest.raises(UserError, match=r"study\.journal is damaged: its line 5 is not a rec"):
            Study(journal, "simulated", lease)

        assert journal.read_bytes() == before

    lease.release()


@pytest.mark.parametrize("content", [b"", b"x", b"no journal\n" * 9, b"\0" * 10**5])
def test_files_other_than_journals_are_left_unchanged(
    journal: Path, lease: Lease, content: bytes
) -> None:
    journal.write_bytes(content)

    with pytest.raises(UserError, match=r"is not a journal|is empty: its records are lost"):
        Study(journal, "test", lease)

    assert journal.read_bytes() == content


def test_lines_of_something_else_are_no_records(journal: Path, lease: Lease) -> None:
    journal.write_text(json.dumps({"epoch": 1, "loss_valid": 0.5}) + "\n")

    with pytest.raises(UserError, match="its line 1 is not a record of a study"):
        Study(journal, "test", lease)


def test_journal_of_another_study_is_refused(journal: Path, lease: Lease) -> None:
    with quiet_optuna():
        storage = JournalStorage(JournalFileBackend(str(journal)))
        optuna.create_study(storage=storage, study_name="theirs").add_trial(
            optuna.trial.create_trial(value=1.0)
        )

    before = journal.read_bytes()

    with pytest.raises(UserError, match="holds the study 'theirs', not 'test'"):
        Study(journal, "test", lease)

    assert journal.read_bytes() == before


@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_only_regular_files_are_opened(
    tmp_path: Path, journal: Path, lease: Lease, kind: str
) -> None:
    if kind == "directory":
        journal.mkdir()
    elif kind == "pipe":
        os.mkfifo(journal)
    else:
        (tmp_path.parent / "elsewhere").touch()
        journal.symlink_to(tmp_path.parent / "elsewhere")

    with pytest.raises(UserError, match=r"study\.journal"):
        Study(journal, "test", lease)


def test_journal_appears_with_its_first_record(journal: Path, lease: Lease) -> None:
    opened = Journal(journal, lease)
    assert not journal.exists()

    opened.append_logs([{"op_code": 0}, {"op_code": 0}])
    assert journal.read_bytes().count(b"\n") == 2


def test_records_appended_by_others_are_read(
    journal: Path, lease: Lease, caplog: pytest.LogCaptureFixture
) -> None:
    study = Study(journal, "test", lease)
    add(study)

    # As a note written in a dashboard is
    storage = JournalStorage(JournalFileBackend(str(journal)))
    theirs = optuna.load_study(storage=storage, study_name="test")
    theirs.set_user_attr("note", "promising")
    add(study)

    assert study.study.user_attrs["note"] == "promising"
    assert len(study.records()) == len(Study(journal, "test", lease).records()) == 2
    assert len(optuna.load_study(storage=storage, study_name="test").trials) == 2
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
