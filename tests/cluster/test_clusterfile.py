r"""Tests for sda_ray.cluster.clusterfile: what Ray's own check of a cluster file misses is found."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from sda_ray.cluster.clusterfile import check_cluster, main

ROOT = Path(__file__).parents[2]
FILES = ["cluster.yaml", "cluster.local.yaml"]

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    r"""Makes a copy of a cluster file as a user would fill it in, with more changes."""

    token = home / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("0" * 64)
    token.chmod(0o600)

    monkeypatch.chdir(tmp_path)

    for name in ("sda_ray", "sweeps", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)

    def make(name: str = "cluster.yaml", changes: dict[str, str] | None = None) -> Path:
        filled = {"ami-CHANGE-ME": "ami-0", "sg-CHANGE-ME": "sg-0", "CHANGE-ME": "192.0.2.1"}
        text = (ROOT / name).read_text()

        for given, wanted in {**filled, **(changes or {})}.items():
            assert given in text or given in filled
            text = text.replace(given, wanted)

        (tmp_path / "filled.yaml").write_text(text)

        return tmp_path / "filled.yaml"

    return make


@pytest.mark.parametrize("name", FILES)
def test_files_of_ours_have_no_fault_once_filled_in(make: Make, name: str) -> None:
    assert check_cluster(make(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_what_is_to_be_changed_is_named_with_its_line(make: Make, name: str) -> None:
    make(name)
    faults = [x for x in check_cluster(ROOT / name) if "CHANGE-ME" in x]
    lines = (ROOT / name).read_text().splitlines()

    assert len(faults) >= 2
    assert all("CHANGE-ME" in lines[int(fault.split()[1]) - 1] for fault in faults)


CASES = {
    "gpus": ({'"GPU": 1}': '"gpus": 1}'}, ["resource 'gpus' is no GPU", "Write GPU"]),
    "gpu": ({'"GPU": 1}': '"gpu": 1}'}, ["resource 'gpu' is no GPU"]),
    "key": ({"InstanceType: g5.xlarge": "InstanceTyp: g5.xlarge"}, ["gpu", "'InstanceTyp'"]),
    "deep": ({"HttpTokens: required": "HttpToken: required"}, ["'MetadataOptions.HttpToken'"]),
    "list": ({"Encrypted: true": "Encrypt: true"}, ["'BlockDeviceMappings.Ebs.Encrypt'"]),
    "token": ({'"~/.ray/auth_token"': '"~/token"'}, ["file_mounts has no '~/.ray/auth_token'"]),
    "mode": ({"chmod 600": "chmod 644"}, ["setup_commands must `chmod 600 ~/.ray/auth_token`"]),
    "auth": (
        {"RAY_AUTH_MODE=token": "RAY_AUTH=token"},
        ["head_start_ray_commands must export RAY_AUTH_MODE", "worker_start_ray_commands must"],
    ),
    "root": ({"SDA_RAY_ROOT": "SDA_ROOT"}, ["must export SDA_RAY_ROOT before `ray start`"]),
    "dashboard": ({"host=127.0.0.1": "host=0.0.0.0"}, ["opens the dashboard to 0.0.0.0"]),
    "ssh": ({"      SecurityGroupIds:": "      # "}, ["no SecurityGroupIds", "SSH"]),
    "version": ({"'.[cluster]'": "'ray[default]==2.9.3'"}, ["get Ray 2.9.3 by the file itself"]),
    "unpinned": ({"-c constraints.txt": ""}, ["no version of Ray is pinned"]),
    "schema": ({"idle_timeout_minutes": "idle_minutes"}, ["Ray refuses", "idle_minutes"]),
    "missing": ({"./LICENSE": "./LICENCE"}, ["./LICENCE does not exist"]),
}


@pytest.mark.parametrize("case", CASES)
def test_fault_is_found(make: Make, case: str) -> None:
    if case in ("key", "deep", "list"):
        pytest.importorskip("botocore")  # of the extra `cluster`

    changes, words = CASES[case]
    said = "\n".join(check_cluster(make("cluster.yaml", changes)))

    for word in words:
        assert word in said


def test_versions_pinned_elsewhere_are_compared_with_that_of_this_machine(make: Make) -> None:
    file = make()
    pins = file.parent / "constraints.txt"
    pins.unlink()
    pins.write_text("ray==2.9.3\n")

    assert check_cluster(file) == [
        f"the nodes get Ray 2.9.3 by constraints.txt, but here it is {version('ray')}."
    ]


def test_token_that_others_can_read_is_a_fault(make: Make, home: Path) -> None:
    file = make()
    (home / ".ray" / "auth_token").chmod(0o644)

    assert check_cluster(file) == [
        "~/.ray/auth_token can be read by others: chmod 600 ~/.ray/auth_token"
    ]


@pytest.mark.parametrize("text", ["", "[", "just words", "cluster_name: x"])
def test_nonsense_is_said_to_be_such(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)

    assert check_cluster(tmp_path / "x.yaml")
    assert check_cluster(tmp_path / "missing.yaml")


def test_command_says_what_is_wrong(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make())]) == 0
    assert "fine" in capsys.readouterr().out

    assert main([str(make(changes={"chmod 600": "chmod 644"}))]) == 1
    assert "1 to mend" in capsys.readouterr().out
