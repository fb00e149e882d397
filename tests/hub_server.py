"""A double of the Hugging Face Hub on 127.0.0.1.

Repositories with revisions, gated ones, listings, byte ranges, commits and pull requests.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from tests.s3_servers import serve

TOKEN = "hf_testingtoken"


@dataclass
class Hub:
    """What the server holds: for each repository (datasets/ORG/NAME or ORG/NAME) and revision its files."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)  # each next download breaks after this many bytes
    received: list[bytes] = field(default_factory=list)  # bodies of requests that write

    def commit(self, repository: str, revision: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[repository][revision].items())).encode()).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.requests.append(f"{request.command} {path}")
        if request.command == "POST":
            return self.write(request, path)
        is_listing, separator = path.startswith("api/"), "/tree/" if path.startswith("api/") else "/resolve/"
        repository, _, rest = path.removeprefix("api/").removeprefix("models/").partition(separator)
        revisions = self.repositories.get(repository)
        if revisions is None:
            return self.refuse(request, 401, "RepoNotFound")
        if repository in self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(request, 401, "GatedRepo")
        named = {self.commit(repository, name): name for name in revisions}
        pull_requests = [name for name in revisions if rest.startswith(f"{name}/")]
        revision = pull_requests[0] if pull_requests else rest.partition("/")[0]
        file = rest.removeprefix(revision).removeprefix("/")
        revision = named.get(revision, revision)
        if revision not in revisions:
            return self.refuse(request, 404, "RevisionNotFound")
        headers = {"X-Repo-Commit": self.commit(repository, revision)}
        if is_listing:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in revisions[revision].items()
            ]
            return self.send(request, 200, headers, json.dumps(entries).encode())
        if file not in revisions[revision]:
            return self.refuse(request, 404, "EntryNotFound", headers)
        content = revisions[revision][file]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(request, 206 if start else 200, headers, content[start:])

    def write(self, request: BaseHTTPRequestHandler, path: str) -> None:
        """Answer the requests of a commit; it needs the token."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.received.append(body)
        if path == "api/validate-yaml":
            return self.send(request, 200, {}, b'{"errors": [], "warnings": []}')
        repository, _, action = path.removeprefix("api/").removeprefix("models/").rpartition("/main")[0].rpartition("/")
        if repository not in self.repositories:
            return self.refuse(request, 404, "RepoNotFound")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(request, 403, "Forbidden")
        if action == "preupload":
            names = [one["path"] for one in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.send(request, 200, {}, json.dumps({"files": files}).encode())
        revisions = self.repositories[repository]
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
        }
        answer, revision = {"success": True}, "main"
        if "create_pr=1" in request.path:
            revision = f"refs/pr/{len(revisions)}"
            answer["pullRequestUrl"] = f"{self.url}/{repository}/discussions/{len(revisions)}"
        revisions[revision] = {**revisions["main"], **added}
        commit = self.commit(repository, revision)
        answer |= {"commitOid": commit, "commitUrl": f"{self.url}/{repository}/commit/{commit}"}
        return self.send(request, 200, {}, json.dumps(answer).encode())

    def refuse(
        self, request: BaseHTTPRequestHandler, status: int, code: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send(request, status, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": code}, b"{}")

    def send(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        request.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, and an empty cache of it."""
    one = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            one.answer(self)

        do_GET = do_HEAD = do_POST = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = serve(Handler)
    one.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", one.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield one
    server.shutdown()
    server.server_close()
