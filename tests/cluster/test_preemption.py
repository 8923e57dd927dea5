r"""Tests for sda_ray.cluster.preemption: the notice of a spot machine, and drained nodes."""

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from sda_ray.cluster import preemption
from sda_ray.cluster.preemption import draining_nodes, has_notice

WHEN = 1_800_000_000


class Metadata(BaseHTTPRequestHandler):
    r"""Creates a stand-in for the metadata service of AWS, in its second version."""

    taken = False  # whether the machine is about to be taken away
    session = 0

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self._say(200, f"session-{self.session}")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/spot/instance-action"
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(WHEN))

        if self.headers["X-aws-ec2-metadata-token"] != f"session-{self.session}":
            self._say(401, "")
        elif self.taken:
            self._say(200, json.dumps({"action": "terminate", "time": when}))
        else:
            self._say(404, "Not Found")

    def _say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    class Service(Metadata):
        pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("SDA_RAY_METADATA", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which is not asked
        yield Service
        server.shutdown()


def test_notice_is_found(service: type[Metadata]) -> None:
    assert not has_notice()

    service.taken = True
    assert has_notice()

    service.session += 1  # the one of before is over
    assert has_notice()


def test_no_machine_but_those_of_aws_is_asked(
    service: type[Metadata], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.taken = True
    monkeypatch.setattr(preemption, "SERVICE", os.environ["SDA_RAY_METADATA"])
    monkeypatch.setattr(preemption, "VENDOR", tmp_path / "vendor")
    monkeypatch.delenv("SDA_RAY_METADATA")
    assert not has_notice()

    (tmp_path / "vendor").write_text("QEMU\n")
    assert not has_notice()

    (tmp_path / "vendor").write_text("Amazon EC2\n")
    assert has_notice()

    monkeypatch.setattr(preemption, "SERVICE", "http://127.0.0.1:1")
    assert not has_notice()


def test_no_node_is_drained_for_a_ray_that_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import state

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(state, "state", object())  # as if the method was gone
    assert draining_nodes() == set()

    monkeypatch.delattr(state, "state")
    assert draining_nodes() == set()
