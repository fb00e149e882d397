"""The spot watcher, with a fake metadata service and a fake `ray` command."""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.aws.spot_watcher import Metadata, find_node_id, seconds_left
from cluster.aws.spot_watcher import watch as watch_notices

WATCHER = Path(__file__).parent.parent / "cluster/aws/spot_watcher.py"
NODE = "e57dbd576cecf0a581b0f273cb82f3672827e0482da46ea726637a1a"
TOKEN_HEADER = "X-aws-ec2-metadata-token"


@pytest.fixture
def service():
    """A fake IMDSv2: it requires a token, answers 404 without a notice, and revokes its first token at request 3."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self):
            seconds = int(self.headers[f"{TOKEN_HEADER}-ttl-seconds"])
            self.server.tokens.append(f"token-{len(self.server.tokens)}")
            self.answer(200 if self.path == "/latest/api/token" and seconds > 60 else 400, self.server.tokens[-1])

        def do_GET(self):
            self.server.looks += 1
            if self.server.looks == 3:
                self.server.tokens.append("another")
            if self.headers[TOKEN_HEADER] != self.server.tokens[-1]:
                self.answer(401, "")
            elif self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
                self.answer(404, "")
            else:
                self.answer(200, json.dumps(self.server.notice))

        def answer(self, status, text):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.tokens, server.looks, server.notice = [], 0, None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def raylet():
    """A process that looks like the raylet of this machine's node of the cluster at 10.0.0.9:6379."""
    code = "import time; time.sleep(60)"
    process = subprocess.Popen(
        ["raylet", "-c", code, f"--node_id={NODE}", "--gcs-address=10.0.0.9:6379"], executable=sys.executable
    )
    yield
    process.kill()
    process.wait()


@pytest.fixture
def calls(tmp_path):
    """The file to which a fake `ray` writes its arguments, one per line; its first call fails."""
    kept = tmp_path / "calls"
    command = tmp_path / "ray"
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" -- >> {kept}\n[ $(grep -c "^--$" {kept}) -gt 1 ]\n')
    command.chmod(0o755)
    return kept


def watch(service, folder) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{service.server_address[1]}/",
        "http_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-I", WATCHER, "10.0.0.9:6379", "--interval", "0.05"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_notice_drains_the_node_until_ray_accepts_it(service, raylet, calls, tmp_path):
    process = watch(service, tmp_path)
    limit = time.monotonic() + 20
    while service.looks < 5:
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert not calls.exists()
    assert len(service.tokens) == 3  # the first, the one that revoked it, and the watcher's new one
    end = datetime.now(UTC) + timedelta(seconds=118)
    service.notice = {"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}
    _, words = process.communicate(timeout=20)
    assert process.returncode == 0
    assert f"draining node {NODE}" in words
    refused, accepted = calls.read_text().split("\n--\n")[:2]
    *call, seconds = accepted.splitlines()
    assert refused.splitlines()[:-1] == call
    assert call == [
        "drain-node", "--address", "10.0.0.9:6379", "--node-id", NODE, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "AWS announced terminate of this spot node", "--deadline-remaining-seconds",
    ]  # fmt: skip
    assert 90 <= int(seconds) <= 118


def test_silent_service_is_reported_once(service, monkeypatch, caplog):
    """The warning is repeated only after the service has answered."""
    answers = iter([OSError("a"), OSError("b"), None, ValueError("c"), OSError("d"), KeyboardInterrupt()])

    class Silent:
        def notice(self):
            answer = next(answers)
            if answer is not None:
                raise answer

    with pytest.raises(KeyboardInterrupt):
        watch_notices("10.0.0.9:6379", Silent(), 0.0)
    assert [record.args[0].args[0] for record in caplog.records] == ["a", "c"]


def test_unreachable_service_is_an_os_error(service):
    service.server_close()
    service.shutdown()
    with pytest.raises(OSError, match="refused"):
        Metadata(f"http://127.0.0.1:{service.server_address[1]}").notice()


@pytest.mark.parametrize(
    ("notice", "left"),
    [
        ({"time": "2026-01-01T00:01:30Z"}, 90),
        ({"time": "2025-12-31T23:59:00Z"}, 0),
        ({"time": "soon"}, 120),
        ({"time": "2026-01-01T00:01:30"}, 120),
        ({}, 120),
    ],
)
def test_seconds_left_until_the_interruption(notice, left):
    assert seconds_left(notice, datetime(2026, 1, 1, tzinfo=UTC)) == left


def test_node_id_is_that_of_a_raylet_of_the_same_cluster(tmp_path):
    for pid, words in {
        "1": ["/x/raylet", f"--node_id={NODE}", "--gcs-address=10.0.0.8:6379"],
        "2": ["python", "raylet", "--node_id=aa", "--gcs-address=10.0.0.9:6379"],
        "3": ["/x/raylet/raylet", "--node_id=bb", "--gcs-address=10.0.0.9:6379"],
        "self": ["/x/raylet", "--node_id=cc", "--gcs-address=10.0.0.9:6379"],
    }.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes("\0".join(words).encode())
    (tmp_path / "4").mkdir()
    assert find_node_id("10.0.0.9:6379", tmp_path) == "bb"
    assert find_node_id("10.0.0.7:6379", tmp_path) is None
