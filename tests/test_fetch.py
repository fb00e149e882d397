"""Fetched files: downloaded once on each node, complete or not at all, resumed, never mixed from two versions."""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import boto3
import numpy as np
import obstore
import pytest
import requests

from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.models.files import weights_id
from diffsmooth.pipeline.models.weights import load_weights
from diffsmooth.pipeline.storage import fetch as fetching
from diffsmooth.pipeline.storage import remote
from diffsmooth.pipeline.storage.fetch import fetch, fetch_first, file_sha256
from diffsmooth.pipeline.storage.remote import ObjectFile, list_objects
from tests.s3_servers import credentials, serve

ROOT = Path(__file__).parent.parent
MB = 2**20
CONTENT = np.random.default_rng(0).bytes(4 * MB)
OTHER = np.random.default_rng(1).bytes(4 * MB)


class Server:
    """One file at every path, for HTTP and S3 clients, with the failures that a test sets."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.cuts: list[int] = []  # each next connection breaks after this many bytes
        self.knows_ranges = self.knows_if_range = self.has_etag = self.says_length = True
        self.statuses: dict[str, int] = {}  # path -> the status of its answer
        self.redirects: dict[str, str] = {}
        self.pause = 0.0  # seconds before each 64 kB
        self.gets: list[tuple[str, int]] = []  # path and first byte of each answer that has a body
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = serve(Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[path])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        etag = f'"{hashlib.md5(self.content).hexdigest()}"'
        asked = request.headers.get("Range") if self.knows_ranges else None
        if asked and self.knows_if_range and request.headers.get("If-Range", etag) != etag:
            asked = None
        status = self.statuses.get(path) or (206 if asked else 200)
        if request.headers.get("If-Match", etag) != etag:
            status = 412
        if status >= 400:
            request.send_error(status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.gets.append((path, start))
        body = self.content[start:]
        request.send_response(status)
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.has_etag:
            request.send_header("ETag", etag)
        if self.says_length:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.cuts:
            body = body[: self.cuts.pop(0)]
        for begin in range(0, len(body), 65536):
            time.sleep(self.pause)
            try:
                request.wfile.write(body[begin : begin + 65536])
            except OSError:
                return

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    for module in (fetching, remote):
        monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    credentials(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture(params=["http", "s3"])
def uri(request, server, monkeypatch) -> str:
    """The server's file, by HTTP and as an S3 object."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return "s3://bucket/models/net.pt" if request.param == "s3" else f"{server.url}/bucket/models/net.pt"


def files_in(cache: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in cache.iterdir() if path.suffix != ".lock")


def test_local_files_are_used_in_place(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"abc")
    assert fetch(str(path)) == path
    assert fetch(str(path), hashlib.sha256(b"abc").hexdigest()) == path
    with pytest.raises(UserError, match=r"a\.pt: the file has sha256 ba7816bf.*, not the expected 0000"):
        fetch(str(path), "0" * 64)
    with pytest.raises(UserError, match=r"b\.pt: no such file; give the path of an existing file"):
        fetch(str(tmp_path / "b.pt"))
    with pytest.raises(UserError, match="a folder, not a regular file"):
        fetch(str(tmp_path))
    with pytest.raises(UserError, match="ftp://a/b: this kind of URI cannot be read"):
        fetch("ftp://a/b")


def test_one_request_and_then_the_cached_file(server, uri, cache):
    path = fetch(uri, hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".pt"
    assert path.parent == cache
    assert fetch(uri) == path
    assert server.gets == [("/bucket/models/net.pt", 0)]
    assert files_in(cache) == ["net.pt", "net.pt.sha256.json"]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFSMOOTH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetching.cache_folder() == tmp_path / "xdg" / "diffsmooth"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetching.cache_folder() == tmp_path / ".cache" / "diffsmooth"


def test_broken_connections_are_resumed(server, uri):
    server.cuts = [MB, 2 * MB, 0, 0]
    assert fetch(uri).read_bytes() == CONTENT
    starts = [start for _, start in server.gets]
    assert len(starts) == 5
    for start, cut in zip(starts, [0, MB, 3 * MB, 3 * MB, 3 * MB], strict=True):
        assert cut - len(starts) * fetching._CHUNK <= start <= cut  # a client of a store hands over whole chunks


def test_persistent_failure_ends_the_tries_and_the_next_call_resumes(server, uri, cache):
    server.cuts = [MB] + [0] * 4
    with pytest.raises(RunError, match=r"failed 5 times in a row.*to resume it"):
        fetch(uri)
    assert files_in(cache) == ["net.pt.part", "net.pt.part.json"]
    assert fetch(uri).read_bytes() == CONTENT
    starts = [start for _, start in server.gets]
    assert len(starts) == 6
    assert all(MB - fetching._CHUNK <= start <= MB for start in starts[1:])


def test_changed_file_is_downloaded_again(server, uri):
    server.cuts = [MB] + [0] * 4
    with pytest.raises(RunError):
        fetch(uri)
    server.content = OTHER
    server.gets.clear()
    assert fetch(uri).read_bytes() == OTHER
    assert [start for _, start in server.gets] == [0]


@pytest.mark.parametrize("failing", ["knows_if_range", "knows_ranges", "has_etag"])
def test_changed_file_is_downloaded_again_from_a_limited_server(server, failing):
    setattr(server, failing, False)
    server.cuts = [MB] + [0] * 4
    with pytest.raises(RunError):
        fetch(f"{server.url}/net.pt")
    server.content = OTHER
    assert fetch(f"{server.url}/net.pt").read_bytes() == OTHER


def test_without_ranges_each_try_starts_from_zero(server, uri):
    server.knows_ranges = False
    server.cuts = [MB, 2 * MB]
    assert fetch(uri).read_bytes() == CONTENT
    assert {start for _, start in server.gets} == {0}


def test_length_may_be_unknown(server):
    server.says_length = False
    assert fetch(f"{server.url}/net.pt").read_bytes() == CONTENT


KILLED = "import sys; from diffsmooth.pipeline.storage.fetch import fetch; fetch(sys.argv[1])"


def test_killed_download_is_resumed(server, uri, cache):
    server.pause = 0.02
    process = subprocess.Popen([sys.executable, "-c", KILLED, uri], cwd=ROOT)
    limit = time.monotonic() + 30
    while sum(path.stat().st_size for path in cache.glob("*.part")) < MB if cache.exists() else True:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = cache.glob("*.part")
    size = part.stat().st_size
    server.pause = 0.0
    assert fetch(uri).read_bytes() == CONTENT
    assert [start for _, start in server.gets] == [0, size]


def test_download_killed_before_its_last_step_costs_one_byte(server, uri, cache):
    path = fetch(uri)
    part = path.with_name(path.name + ".part")
    path.rename(part)
    etag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    path.with_name(path.name + ".part.json").write_text(json.dumps({"etag": etag, "total": len(CONTENT)}))
    assert fetch(uri).read_bytes() == CONTENT
    assert [start for _, start in server.gets] == [0, len(CONTENT) - 1]


ETAG = f'"{hashlib.md5(CONTENT).hexdigest()}"'


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{",
        "[]",
        "null",
        100_000 * "[",
        json.dumps({"etag": 7, "total": len(CONTENT)}),
        json.dumps({"etag": ETAG, "total": "large"}),
        json.dumps({"etag": ETAG, "total": -1}),
        json.dumps({"etag": ETAG, "total": 10}),
        json.dumps({"etag": ETAG, "total": 10**30}),
        json.dumps({"etag": ETAG, "total": 0}),
        json.dumps({"etag": '"of another version"', "total": MB}),
        json.dumps({"total": MB}),
    ],
    ids=lambda state: state[:40],
)
def test_damaged_or_wrong_state_of_a_partial_download_does_no_harm(server, uri, state):
    path = fetch(uri)
    path.with_name(path.name + ".part").write_bytes(CONTENT[:MB])
    path.with_name(path.name + ".part.json").write_text(state)
    path.unlink()
    assert fetch(uri).read_bytes() == CONTENT


FORKED = """
import os, sys
from diffsmooth.pipeline.storage.fetch import fetch
children = []
for _ in range(8):
    children.append(os.fork())
    if not children[-1]:
        os._exit(fetch(sys.argv[1]).stat().st_size != int(sys.argv[2]))
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


def test_eight_processes_make_one_request(server):
    uri = f"{server.url}/net.pt"
    server.pause = 0.005
    subprocess.run([sys.executable, "-c", FORKED, uri, str(len(CONTENT))], cwd=ROOT, check=True)
    assert len(server.gets) == 1


def test_wrong_sha256_is_refused_and_not_kept(server, uri, cache):
    with pytest.raises(
        UserError, match=r"the downloaded file has sha256 \w{64}, not the expected 0{64}, and was removed"
    ):
        fetch(uri, "0" * 64)
    assert [path for path in cache.glob("*.pt*") if path.suffix in (".pt", ".part")] == []
    path = fetch(uri)
    with pytest.raises(UserError, match=f"not the expected 0{{64}}; delete {path} to download it again"):
        fetch(uri, "0" * 64)
    assert path.exists()


@pytest.mark.parametrize("stored", ["{", "[1]", '{"sha256": "x", "size": 1, "mtime_ns": 1}', "lie"])
def test_damaged_or_wrong_stored_hash_does_no_harm(server, stored):
    expected = hashlib.sha256(CONTENT).hexdigest()
    path = fetch(f"{server.url}/net.pt")
    status = path.stat()
    if stored == "lie":
        stored = json.dumps({"sha256": "0" * 64, "size": status.st_size, "mtime_ns": status.st_mtime_ns})
    path.with_name(path.name + ".sha256.json").write_text(stored)
    fetching._sha256.cache_clear()
    assert fetch(f"{server.url}/net.pt", expected) == path


def test_a_pin_is_checked_against_the_file_itself(server):
    """Neither a lying hash beside the file nor an unchanged modification time hides a changed byte."""
    uri, expected = f"{server.url}/net.pt", hashlib.sha256(CONTENT).hexdigest()
    path = fetch(uri, expected)
    assert weights_id(uri, expected) == expected
    before = path.stat()
    path.write_bytes(b"x" + CONTENT[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for call in (fetch, weights_id):
        with pytest.raises(UserError, match=f"sha256 .*{expected}.*delete {path} to download it again"):
            call(uri, expected)
    lie = {"sha256": expected, "size": before.st_size, "mtime_ns": before.st_mtime_ns}
    path.with_name(path.name + ".sha256.json").write_text(json.dumps(lie))
    with pytest.raises(UserError, match="sha256"):
        weights_id(uri, expected)


def test_the_cache_folder_is_private(server, cache, uri, monkeypatch):
    cache.parent.chmod(0o755)
    before = os.umask(0)
    try:
        fetch(uri)
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o777, 0o702):
        cache.chmod(mode)
        with pytest.raises(UserError, match=rf"cache: other users can change .*mode {mode:o}.*; run chmod 700 on it"):
            fetch(uri)
    cache.chmod(0o755)
    assert fetch(uri).read_bytes() == CONTENT
    monkeypatch.setattr(fetching.os, "geteuid", lambda: 12345)
    os.chown(cache, 54321, -1)
    with pytest.raises(UserError, match="owner 54321"):
        fetch(uri)


PAGE = b"\xef\xbb\xbf \n<!DOCTYPE html><html>sign in</html>"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("net.pt", PAGE, "a web page instead of the file"),
        ("net.pt", b"<?xml version='1.0'?><Error/>", "a web page"),
        ("net.safetensors", PAGE, "a web page"),
        ("net.safetensors", b"Not Found", "no safetensors file"),
        ("set.parquet", b"{}", "no .parquet file"),
        ("cifar-10-python.tar.gz", b"quota exceeded", "no .gz file"),
    ],
)
def test_a_wrong_download_does_not_enter_the_cache(server, cache, name, content, words):
    server.content = content
    uri = f"{server.url}/{name}"
    with pytest.raises(UserError, match=f"the server sent {words}.* and it was removed; correct the location"):
        fetch(uri)
    assert [path for path in cache.iterdir() if path.name.endswith((name, ".part"))] == []
    right = {".parquet": b"PAR1", ".safetensors": b"........{", ".gz": b"\x1f\x8b", ".pt": b"PK"}
    server.content = right[Path(name).suffix]
    assert fetch(uri).read_bytes() == server.content


def test_a_damaged_download_names_the_file_in_the_cache(server):
    uri = f"{server.url}/net.pt?token=secret"
    with pytest.raises(UserError, match=r"net\.pt\?\.\.\.: .*; delete .*-net\.pt to download it again") as error:
        load_weights(uri)
    assert "secret" not in str(error.value)
    assert str(fetch(uri)) in str(error.value)


def test_a_redirection_from_https_to_http_is_refused():
    response = requests.Response()
    response.status_code, response.url = 302, "https://host/a?token=secret"
    with fetching._Session() as session:
        for target in ("http://host/a", "HTTP://elsewhere/a?signature=secret"):
            response.headers["Location"] = target
            with pytest.raises(UserError, match=r"https://host/a\?\.\.\.: redirected to .*not encrypted") as error:
                session.get_redirect_target(response)
            assert "secret" not in str(error.value)
        for target in ("https://elsewhere/a", "/b"):
            response.headers["Location"] = target
            assert session.get_redirect_target(response) == target
        response.url, response.headers["Location"] = "http://host/a", "http://host/b"
        assert session.get_redirect_target(response) == "http://host/b"


def test_hashes_are_stored_while_the_file_is_unchanged(server, cache, monkeypatch):
    path = fetch(f"{server.url}/net.pt")
    fetching._sha256.cache_clear()
    with monkeypatch.context() as unreadable:
        unreadable.setattr(fetching, "_hash", None)
        assert file_sha256(path) == hashlib.sha256(CONTENT).hexdigest()
    path.write_bytes(OTHER)
    os.utime(path, ns=(0, 0))
    assert file_sha256(path) == hashlib.sha256(OTHER).hexdigest()


@pytest.mark.parametrize("found_out", ["before", "while writing"])
def test_full_disk(server, uri, cache, monkeypatch, found_out):
    class Usage:
        free = 1_500_000 if found_out == "before" else 10**12

    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: Usage)
    if found_out == "while writing":

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(fetching.os, "fsync", full)
    with pytest.raises(RunError, match=r"cache: the disk is full: 4\.2 MB are needed and .*DIFFSMOOTH_CACHE"):
        fetch(uri)
    assert not list(cache.glob("*.part"))


def test_unwritable_cache_is_named(server, uri, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(
        RunError, match=r"the cache folder cannot be used: (Not a directory|File exists); set DIFFSMOOTH_CACHE"
    ):
        fetch(uri)


def test_redirects_are_followed(server):
    server.redirects = {"/latest": "/models/net.pt"}
    server.cuts = [MB]
    assert fetch(f"{server.url}/latest").read_bytes() == CONTENT
    assert server.gets == [("/models/net.pt", 0), ("/models/net.pt", MB)]


def test_unreachable_hosts_are_named_without_secrets():
    with pytest.raises(UserError, match=r"https://no-such-host\.invalid/a\?\.\.\.: unknown host") as error:
        fetch("https://no-such-host.invalid/a?key=secret")
    assert "secret" not in str(error.value)
    with pytest.raises(RunError, match="Connection refused; check the network") as refused:
        fetch("http://user:secret@127.0.0.1:9/a")
    assert "secret" not in str(refused.value)
    with pytest.raises(UserError, match="s3://BUCKET/KEY"):
        fetch("s3://bucket")


def test_first_existing_candidate_is_fetched(server, tmp_path):
    server.statuses = {"/a": 404, "/b": 403, "/d": 503}
    a, b, c, d = (f"{server.url}/{name}" for name in "abcd")
    assert fetch_first([a, b, c]) == fetch(c)
    assert fetch_first([str(tmp_path / "none"), c]) == fetch(c)
    with pytest.raises(UserError, match=f"none of these files exists: {a}, {tmp_path}/none$"):
        fetch_first([a, str(tmp_path / "none")])
    with pytest.raises(UserError, match=rf"{b}: .*\(403"):
        fetch_first([a, b])
    with pytest.raises(RunError, match=d):
        fetch_first([d, c])


def test_progress_is_logged_without_secrets(server, monkeypatch, caplog):
    monkeypatch.setattr(fetching, "_PROGRESS_EVERY", 0.0)
    caplog.set_level(logging.INFO, "diffsmooth.pipeline.storage.fetch")
    server.cuts = [MB]
    fetch(f"{server.url}/net.pt?token=secret")
    lines = [record.getMessage() for record in caplog.records]
    assert any("25 % of 4 MB" in line for line in lines)
    assert any("resuming after 1 of 4 MB" in line for line in lines)
    assert not any("secret" in line for line in lines)


@pytest.fixture
def moto(moto_url, monkeypatch) -> object:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    return boto3.client("s3")


def test_s3_objects_are_fetched_and_resumed(moto, cache):
    key = "models/a b?c#d.pt"
    uri = f"s3://bucket/{key}"
    etag = moto.put_object(Bucket="bucket", Key=key, Body=CONTENT)["ETag"]
    path = fetch(uri)
    assert path.read_bytes() == CONTENT

    def interrupt(etag):
        """Leave half of the file, with a marked first byte that shows whether it is downloaded again."""
        path.unlink()
        path.with_name(path.name + ".part").write_bytes(b"#" + CONTENT[1 : 2 * MB])
        path.with_name(path.name + ".part.json").write_text(json.dumps({"etag": etag, "total": len(CONTENT)}))

    interrupt(etag)
    assert fetch(uri).read_bytes() == b"#" + CONTENT[1:]
    moto.put_object(Bucket="bucket", Key=key, Body=OTHER)
    interrupt(etag)
    assert fetch(uri).read_bytes() == OTHER
    with pytest.raises(UserError, match=r"s3://bucket/none: there is no such file \(404"):
        fetch("s3://bucket/none")
    with pytest.raises(UserError, match="there is no bucket nobucket"):
        fetch("s3://nobucket/a")
    with pytest.raises(UserError, match=r"s3://Not_A_Bucket!/a: no bucket can have the name .*; write s3://"):
        fetch("s3://Not_A_Bucket!/a")
    assert fetch_first(["s3://bucket/none", uri]) == path


def test_s3_objects_are_read_at_any_position(moto):
    for name in ("listed/b.parquet", "listed/a.parquet", "listed/deeper/c.parquet", "listed-too/d.parquet"):
        moto.put_object(Bucket="bucket", Key=name, Body=CONTENT)
    assert list_objects("s3://bucket/listed/") == ["s3://bucket/listed/a.parquet", "s3://bucket/listed/b.parquet"]
    file = ObjectFile("s3://bucket/listed/a.parquet")
    assert file.seek(-10, os.SEEK_END) == len(CONTENT) - 10
    assert file.read(100) == CONTENT[-10:]
    assert file.read(100) == b""
    file.seek(MB)
    assert file.read(5) + file.read(5) == CONTENT[MB : MB + 10]
    moto.put_object(Bucket="bucket", Key="listed/a.parquet", Body=OTHER)
    with pytest.raises(RunError, match="the file has changed"):
        file.read(5)
    with pytest.raises(UserError, match="no such file"):
        ObjectFile("s3://bucket/none")
    with pytest.raises(UserError, match="no bucket nobucket"):
        list_objects("s3://nobucket/set")


@pytest.mark.parametrize("cloud", ["gcs_server", "azure_server"])
def test_objects_in_other_clouds_are_fetched_listed_and_read_at_any_position(cloud, request, monkeypatch):
    server = request.getfixturevalue(cloud)
    server.use(monkeypatch)
    folder = f"{server.scheme}://bucket/set"
    client = remote.connect(folder)
    for name in ("set/b.parquet", "set/a.parquet", "set/deeper/c.parquet", "set-too/d.parquet"):
        obstore.put(client, name, b"PAR1" + CONTENT, use_multipart=False)
    assert list_objects(folder) == [f"{folder}/a.parquet", f"{folder}/b.parquet"]
    path = fetch(f"{folder}/a.parquet")
    assert path.read_bytes() == b"PAR1" + CONTENT
    etag = obstore.head(client, "set/a.parquet")["e_tag"]
    path.rename(path.with_name(path.name + ".part"))
    os.truncate(path.with_name(path.name + ".part"), MB)
    path.with_name(path.name + ".part.json").write_text(json.dumps({"etag": etag, "total": len(CONTENT) + 4}))
    assert fetch(f"{folder}/a.parquet").read_bytes() == b"PAR1" + CONTENT
    file = ObjectFile(f"{folder}/a.parquet")
    assert file.seek(-10, os.SEEK_END) == len(CONTENT) - 6
    assert file.read(100) == CONTENT[-10:]
    obstore.put(client, "set/a.parquet", OTHER, use_multipart=False)
    file.seek(0)
    with pytest.raises(RunError, match="the file has changed"):
        file.read(5)
    with pytest.raises(UserError, match=r"set/none: there is no such file \(404"):
        fetch(f"{folder}/none")
    with pytest.raises(UserError, match=r"there is no (bucket|container) nobucket"):
        list_objects(f"{server.scheme}://nobucket/a")
