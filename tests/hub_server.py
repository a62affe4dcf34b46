"""A Hub on this machine, as its own client sees one: what it is told to store, it stores in memory.

The client reads its address when it is imported, so whoever talks to it needs a process of its own, with
``environment_for``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0" * 40


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on a free port, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def environment_for(address: str, home: Path, **more: str) -> dict[str, str]:
    """This process's environment, with that Hub and a cache of its own, and nothing between."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and key != "HF_TOKEN"}
    hub = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    return {**kept, **hub, **more}


@dataclass
class Repository:
    """What was uploaded."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """Repositories by name, and the one token that may write."""

    token: str = "hf_right"
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256, before a commit names them."""

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its address, until the block ends."""
        with served(type("Handler", (_Handler,), {"hub": self})) as address:
            yield address


class _Handler(BaseHTTPRequestHandler):
    """The part of the Hub's interface that uploads use (huggingface_hub 2: preupload, LFS, commit)."""

    hub: Hub

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        name, _, rest = name.partition("/tree/") if "/tree/" in name else (name.removesuffix("/revision/main"), "", "")
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, error="RepoNotFound")
        elif rest:
            self.answer(
                200, [{"type": "file", "path": f, "size": len(c), "oid": COMMIT} for f, c in repository.files.items()]
            )
        else:
            siblings = [{"rfilename": name} for name in repository.files]
            self.answer(
                200, {"id": name, "modelId": name, "sha": COMMIT, "private": repository.private, "siblings": siblings}
            )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(403, {"error": "Forbidden: you need the right token"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
            self.answer(200, {"url": f"{self.address}/{name}"})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer(200, {"files": [self.mode(file) for file in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {o["oid"]: {"upload": {"href": f"{self.address}/blob/{o['oid']}"}} for o in objects}
            self.answer(200, {"transfer": "basic", "objects": [{**o, "actions": upload[o["oid"]]} for o in objects]})
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            self.commit(self.hub.repositories[name], [json.loads(line) for line in body.splitlines() if line.strip()])
            self.answer(
                200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.address}/{name}/commit/{COMMIT}"}
            )
        else:
            self.answer(404, {"error": path})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[self.path.removeprefix("/blob/")] = content
        self.answer(200, {})

    @staticmethod
    def mode(file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, status: int, body: Any, error: str | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
