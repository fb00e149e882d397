"""A double of the Hugging Face Hub on 127.0.0.1: repositories with revisions, gated ones, listings, byte ranges."""

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

    def commit(self, repository: str, revision: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[repository][revision].items())).encode()).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.requests.append(f"{request.command} {path}")
        is_listing, separator = path.startswith("api/"), "/tree/" if path.startswith("api/") else "/resolve/"
        repository, _, rest = path.removeprefix("api/").removeprefix("models/").partition(separator)
        revisions = self.repositories.get(repository)
        if revisions is None:
            return self.refuse(request, 401, "RepoNotFound")
        if repository in self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(request, 401, "GatedRepo")
        named = {self.commit(repository, name): name for name in revisions}
        revision, _, file = rest.partition("/")
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

    def refuse(
        self, request: BaseHTTPRequestHandler, status: int, code: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send(request, status, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": code}, b"{}")

    def send(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        request.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, and an empty cache of it."""
    one = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            one.answer(self)

        do_GET = do_HEAD = handle_any

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
