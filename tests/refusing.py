r"""Commands that must be refused, on tiny data and a sweep script."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scene import SCRIPT

from sda_ray.cli.main import main

__all__ = ["Refuse", "handlers", "refuse", "root"]

Refuse = Callable[..., str]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    r"""Gives back the handler of SIGTERM, which the command line takes over."""

    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def root(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "tiny.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    return tmp_path


@pytest.fixture
def refuse(root: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    r"""Runs a command that must be refused with one message and without a trace."""

    def run(*words: str) -> str:
        before = sorted(path for path in root.rglob("*") if "__pycache__" not in path.parts)

        with pytest.raises(SystemExit) as exit:
            main(argv=list(words))

        out, err = capsys.readouterr()
        after = sorted(path for path in root.rglob("*") if "__pycache__" not in path.parts)
        assert exit.value.code == 2
        assert after == before, "something was written"
        assert len(re.findall(r"^sda-ray[ \w]*: ", err, re.M)) == 1
        assert "Traceback" not in out + err
        assert "sweep '" not in out, "the sweep was begun"

        return err

    return run
