r"""A W&B server for tests, in memory and on this machine only.

It speaks what the client needs for runs: a few operations of GraphQL, the stream of rows, and
uploads. As at W&B, the server names the runs.
"""

import base64
import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "someone"
HISTORY = "wandb-history.jsonl"
SUMMARY = "wandb-summary.json"

Json = dict[str, Any]


@dataclass
class ServedRun:
    r"""Creates what the server knows of a run. `files` are the rows of each stream."""

    id: str
    project: str
    name: str
    config: str = "{}"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    rows: dict[str, list[str]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None

    @property
    def history(self) -> list[Json]:
        return [json.loads(row) for row in self.rows.get(HISTORY, [])]

    @property
    def key(self) -> str:
        return base64.b64encode(f"{self.project}/{self.id}".encode()).decode()

    def describe(self) -> Json:
        r"""Returns the run in W&B's words."""

        count = {
            f"{stream}LineCount": len(self.rows.get(f"wandb-{stream}.jsonl", []))
            for stream in ("history", "events")
        }
        summary = self.rows.get(SUMMARY, ["{}"])[-1]

        history = self.history
        keys = {"lastStep": history[-1]["_step"], "keys": {}} if history else None

        return {
            "id": self.key,
            "state": "finished",
            "historyKeys": keys,
            "name": self.id,
            "displayName": self.name,
            "config": self.config,
            "tags": self.tags,
            "project": {"name": self.project, "entity": {"name": ENTITY}},
            "logLineCount": len(self.rows.get("output.log", [])),
            "historyTail": json.dumps(self.rows.get(HISTORY, [])[-1:]),
            "eventsTail": "[]",
            "summaryMetrics": summary,
            "wandbConfig": '{"t": {}}',
            **count,
        }


class WandbServer:
    r"""Creates a server on a free port of this machine, which serves inside a `with` block.

    `env` are the variables that lead a client to it, `runs` what it has got.
    """

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"server_": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # killed clients
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.env = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def query(self, operation: str, values: Json) -> Json:
        r"""Answers an operation of GraphQL; one that is not known here, by nothing."""

        answers: dict[str, Callable[[Json], Json]] = {
            "Viewer": self._viewer,
            "GetDefaultEntity": self._viewer,
            "Run": self._run,
            "RunResumeStatus": self._resume,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_files,
        }

        return answers[operation](values) if operation in answers else {}

    def _viewer(self, _: Json) -> Json:
        teams: Json = {"edges": []}
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams}

        return {"viewer": viewer}

    def _run(self, values: Json) -> Json:
        run = self.runs.get(values["name"])

        return {"project": {"run": run.describe() if run is not None else None}}

    def _resume(self, values: Json) -> Json:
        run = self.runs.get(values["name"])
        bucket = run.describe() if run is not None else None
        project = values["project"]

        return {"model": {"name": project, "entity": {"name": ENTITY}, "bucket": bucket}}

    def _upsert(self, values: Json) -> Json:
        found = next((r for r in self.runs.values() if values.get("id") == r.key), None)
        id = found.id if found is not None else values["name"]
        new = id not in self.runs

        if new:
            name = f"crimson-cloud-{len(self.runs) + 1}"
            self.runs[id] = ServedRun(id, values["project"], name)

        run = self.runs[id]
        run.name = values.get("displayName") or run.name
        run.config = values.get("config") or run.config
        run.group = values.get("groupName") or run.group
        run.tags = values.get("tags") or run.tags

        if values.get("summaryMetrics"):
            run.rows[SUMMARY] = [values["summaryMetrics"]]

        return {"upsertBucket": {"bucket": run.describe(), "inserted": new}}

    def _create_files(self, values: Json) -> Json:
        run = self.runs[values["run"]]
        files = [{"name": f, "uploadUrl": f"{self.url}/{run.id}/{f}"} for f in values["files"]]

        return {"createRunFiles": {"runID": run.key, "uploadHeaders": [], "files": files}}

    def stream(self, id: str, sent: Json) -> None:
        r"""Takes rows: those from an offset on replace what was there."""

        run = self.runs[id]

        for name, chunk in (sent.get("files") or {}).items():
            run.rows.setdefault(name, [])[chunk["offset"] :] = chunk["content"]

        if sent.get("complete"):
            run.exit_code = sent.get("exitcode", 0)


class _Handler(BaseHTTPRequestHandler):
    server_: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._read()
        self._answer({})

    def do_PUT(self) -> None:
        self._read()
        _, id, name = self.path.split("/", 2)

        with self.server_.lock:
            self.server_.runs[id].files.add(name)

        self._answer({})

    def do_POST(self) -> None:
        sent = json.loads(self._read() or b"{}")

        with self.server_.lock:
            if self.path.endswith("/graphql"):
                named = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
                operation = sent.get("operationName") or (named[1] if named else "")
                answer = {"data": self.server_.query(operation, sent.get("variables") or {})}
            else:  # …/files/{entity}/{project}/{id}/file_stream
                self.server_.stream(self.path.split("/")[-2], sent)
                answer = {}

        self._answer(answer)

    def _read(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, answer: Json) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class DyingServer(WandbServer):
    r"""Creates a server that dies when it has got some rows of a history."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.left = rows
        self.dead = False

    def query(self, operation: str, values: Json) -> Json:
        assert not self.dead, "nobody is here"
        return super().query(operation, values)

    def stream(self, id: str, sent: Json) -> None:
        assert not self.dead, "nobody is here"
        chunk = (sent.get("files") or {}).get(HISTORY)

        if chunk is None:
            super().stream(id, sent)
            return

        chunk["content"] = chunk["content"][: self.left]
        super().stream(id, {"files": {HISTORY: chunk}})
        self.left -= len(chunk["content"])
        self.dead = self.left == 0
        assert not self.dead, "gone before it answers"


class Refusal(BaseHTTPRequestHandler):
    r"""Refuses whatever is asked, as W&B does if the key is wrong."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
