"""A file by path, s3:// or https://, on this node once, however many processes ask for it.

The cache folder (DIFFSMOOTH_CACHE, else $XDG_CACHE_HOME/diffsmooth, else ~/.cache/diffsmooth) holds for each URI

    <hash of the URI>-<base name>     the file, whole
    ...part, ...part.json             what an interrupted download left, and of which version of the object it is
    ...sha256.json                    its hash, as long as size and time of change agree
    ...lock                           one download at a time

A cached file is not compared with its source again: sha256 says whether it is the right one.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout

from pipeline.errors import RunError, UserError
from pipeline.locations import is_remote, shown
from pipeline.storage.remote import Absent, Broken, Refused, bucket_and_key, check_status, named, s3_client

logger = logging.getLogger(__name__)

_CHUNK = 2**20
_TRIES = 5  # in a row that bring no new byte
_FIRST_PAUSE = 0.5  # seconds, doubled at each try
_TIMEOUTS = (15, 60)  # seconds: to connect, and between two reads
_PROGRESS_EVERY = 5.0  # seconds


class _Answer(NamedTuple):
    start: int  # position of the first byte: as asked for, or 0 where the server sends everything
    total: int | None  # bytes of the whole file, where the server says it
    etag: str | None  # names this version of the file; None where the download cannot be resumed
    chunks: Iterator[bytes]


def cache_folder() -> Path:
    """Where this node keeps what it has fetched."""
    if named := os.environ.get("DIFFSMOOTH_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "diffsmooth"


def fetch(uri: str, sha256: str | None = None) -> Path:
    """The local file of a path, s3:// or https:// URI; downloaded into the cache folder if this node lacks it.

    Raises: UserError for what is not there, may not be read, or has another sha256 than the given one; RunError for a
    full disk and for a network that stays broken.
    """
    if not is_remote(uri):
        path = Path(uri).expanduser()
        if not path.is_file():
            raise Absent(f"{uri}: no such file; give the path of an existing one, s3://BUCKET/KEY or https://...")
        return _checked(path, uri, sha256, "get the right file")
    if not uri.startswith(("s3://", "https://", "http://")):
        raise UserError(f"{shown(uri)}: cannot be read: give a path, s3://BUCKET/KEY or https://...")
    path = _entry(uri)
    if not path.is_file():
        with node_lock(path):
            if not path.is_file():
                _download(uri, path, sha256)
                return path
    return _checked(path, uri, sha256, f"delete {path} to have it fetched anew")


def at_hand(uri: str) -> bool:
    """Whether `fetch` would have nothing to download."""
    return (_entry(uri) if is_remote(uri) else Path(uri).expanduser()).is_file()


def fetch_first(candidates: Sequence[str]) -> Path:
    """The first of several paths or URIs that exists, fetched.

    Raises: UserError naming all where none exists, and as `fetch` does.
    """
    refused: Refused | None = None
    for uri in candidates:
        try:
            return fetch(uri)
        except Absent:
            continue
        except Refused as error:
            refused = refused or error
    if refused is not None:
        raise refused
    raise UserError(f"none of these exists: {', '.join(shown(uri) for uri in candidates)}; correct the location")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """A file's sha256 in hexadecimal; of a file in the cache folder, the one that its node remembers."""
    path = Path(path)
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


def _full_disk(folder: Path, needed: int | None) -> RunError:
    """What to say where `folder` has no room for `needed` more bytes."""
    asked = f"{needed / 1e6:,.1f} MB are needed and " if needed is not None else ""
    return RunError(
        f"{folder}: the disk is full: {asked}{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free; free some space, "
        "or set DIFFSMOOTH_CACHE to a folder on a larger disk"
    )


@contextmanager
def node_lock(path: Path) -> Iterator[None]:
    """Keep this node's other processes from making the same entry of the cache.

    Raises: RunError where the cache folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process on this node to fetch %s", path.name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise RunError(
            f"{path.parent}: the cache folder cannot be used: {getattr(error, 'strerror', None) or error}; set "
            "DIFFSMOOTH_CACHE to a folder that can be written"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _entry(uri: str) -> Path:
    """Where a URI's file stands in the cache; its ending is kept, since loaders look at it."""
    if uri.startswith("s3://"):
        name = uri
    else:
        try:
            name = urlsplit(uri).path
        except ValueError as error:
            raise UserError(f"{shown(uri)}: not a valid URI ({error}); correct it") from None
    base = re.sub(r"[^A-Za-z0-9._-]", "_", name.rstrip("/").rpartition("/")[2])[-100:]
    return cache_folder() / f"{hashlib.blake2b(uri.encode(), digest_size=8).hexdigest()}-{base}"


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    sidecar = _beside(path, ".sha256.json") if path.parent == cache_folder() else None
    if sidecar is not None:
        remembered = _read_json(sidecar)
        if (remembered.get("size"), remembered.get("mtime_ns")) == (size, mtime_ns):
            return str(remembered["sha256"])
    found = _hash(path)
    if sidecar is not None:
        _remember(path, found)
    return found


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember(path: Path, sha256: str) -> None:
    status = path.stat()
    with suppress(OSError):  # it only saves time
        _write_json(
            _beside(path, ".sha256.json"), {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        )


def _checked(path: Path, uri: str, expected: str | None, remedy: str) -> Path:
    if expected is not None and (found := file_sha256(path)) != expected:
        raise UserError(f"{shown(uri)}: sha256 is {found}, expected {expected}: correct sha256, or {remedy}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = _beside(path, f".{os.getpid()}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _download(uri: str, path: Path, sha256: str | None) -> None:
    """Bring the URI's file to `path`, whole or not at all, building on what an interrupted download left."""
    part, state = _beside(path, ".part"), _beside(path, ".part.json")
    tries = furthest = 0
    while True:
        try:
            _transfer(uri, part, state)
            break
        except Broken as error:
            size = part.stat().st_size if part.exists() else 0
            tries = 1 if size > furthest else tries + 1
            furthest = max(furthest, size)
            if error.restart:
                part.unlink(missing_ok=True)
            if tries >= _TRIES:
                raise RunError(
                    f"{shown(uri)}: the download failed {tries} times in a row, the last time with: {error}; check the "
                    "network and run the same command again: it goes on where this one stopped"
                ) from None
            pause = _FIRST_PAUSE * 2 ** (tries - 1)
            logger.info("downloading %s: %s; trying again in %.1f s", shown(uri), error, pause)
            time.sleep(pause)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                needed = _read_json(state).get("total")
                part.unlink(missing_ok=True)
                raise _full_disk(path.parent, needed) from error
            raise RunError(
                f"{path.parent}: cannot write to the cache folder: {error.strerror or error}; set DIFFSMOOTH_CACHE to "
                "another one"
            ) from error
    found = _hash(part)
    if sha256 is not None and found != sha256:
        part.unlink()
        raise UserError(
            f"{shown(uri)}: the downloaded file has sha256 {found}, expected {sha256}, and was removed: correct sha256 "
            "or the location"
        )
    os.replace(part, path)
    state.unlink(missing_ok=True)
    _remember(path, found)


def _transfer(uri: str, part: Path, state: Path) -> None:
    """One connection's worth of a download; returns when `part` is complete.

    Raises: Broken, UserError, OSError of the disk.
    """
    before = _read_json(state)
    etag, total = before.get("etag"), before.get("total")
    start = part.stat().st_size if part.exists() and etag is not None else 0
    if start and start == total:  # killed between the last byte and the renaming
        return
    connect = _from_s3 if uri.startswith("s3://") else _from_http
    with connect(uri, start, etag) as answer:
        if answer.total is not None and answer.total - answer.start > shutil.disk_usage(part.parent).free:
            raise _full_disk(part.parent, answer.total - answer.start)
        if not answer.start:
            part.unlink(missing_ok=True)  # before the state, which would call it a part of another version
            _write_json(state, {"etag": answer.etag, "total": answer.total})
        with part.open("ab") as file:
            for chunk in _with_progress(uri, answer):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if answer.total is not None and size != answer.total:
        raise Broken(f"the connection ended after {size} of {answer.total} bytes", restart=size > answer.total)


def _with_progress(uri: str, answer: _Answer) -> Iterator[bytes]:
    """The answer's chunks, with a line in the log now and then."""
    begun = last = time.monotonic()
    done = answer.start
    size = f"{answer.total / 1e6:,.0f} MB" if answer.total is not None else "an unknown size"
    if done:
        logger.info("downloading %s: going on after %s of %s", shown(uri), f"{done / 1e6:,.0f}", size)
    else:
        logger.info("downloading %s: %s, into %s", shown(uri), size, cache_folder())
    for chunk in answer.chunks:
        yield chunk
        done += len(chunk)
        now = time.monotonic()
        if now - last >= _PROGRESS_EVERY:
            last = now
            share = f"{100 * done // answer.total} %" if answer.total else f"{done / 1e6:,.0f} MB"
            rate = (done - answer.start) / 1e6 / (now - begun)
            logger.info("downloading %s: %s of %s, %.0f MB/s", shown(uri), share, size, rate)


@contextmanager
def _from_http(uri: str, start: int, etag: str | None) -> Iterator[_Answer]:
    headers = {"Accept-Encoding": "identity"}
    if start and etag:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag}
    try:
        with requests.get(uri, headers=headers, stream=True, timeout=_TIMEOUTS) as response:
            check_status(uri, response.status_code)
            length, tag = response.headers.get("Content-Length"), response.headers.get("ETag")
            begin = start if response.status_code == 206 else 0
            if begin and not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                raise Broken("the server sent another range than asked for", restart=True)
            if begin and tag not in (None, etag):  # sent by a server that does not know If-Range
                raise Broken("the file has changed since the download began", restart=True)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                length = tag = None  # both are of the packed bytes
            total = begin + int(length) if length is not None else None
            tag = None if tag is None or tag.startswith("W/") else tag
            yield _Answer(begin, total, tag, response.iter_content(_CHUNK))
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise UserError(f"{shown(uri)}: not a valid URI ({type(error).__name__}); correct it") from None
    except requests.exceptions.TooManyRedirects:
        raise UserError(f"{shown(uri)}: redirected in a circle; correct the location") from None
    except requests.RequestException as error:  # its text would repeat the whole URI
        reason = _root(error)
        if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
            raise UserError(f"{shown(uri)}: unknown host; correct the location, or check the network") from None
        raise Broken(getattr(reason, "strerror", None) or type(reason).__name__) from None


def _root(error: BaseException) -> BaseException:
    """The first cause of what a chain of libraries has wrapped."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


@contextmanager
def _from_s3(uri: str, start: int, etag: str | None) -> Iterator[_Answer]:
    bucket, key = bucket_and_key(uri)
    only = {"Range": f"bytes={start}-", "IfMatch": etag} if start else {}
    with named(uri):
        answer = s3_client().get_object(Bucket=bucket, Key=key, **only)
        begin = start if "ContentRange" in answer else 0
        with closing(answer["Body"]) as body:
            yield _Answer(begin, begin + answer["ContentLength"], answer.get("ETag"), body.iter_chunks(_CHUNK))
