"""A file by path, in an object store or on the web, fetched onto this node once, however many processes ask for it.

The cache folder (DIFFSMOOTH_CACHE, else $XDG_CACHE_HOME/diffsmooth, else ~/.cache/diffsmooth) holds for each URI

    <hash of the URI>-<base name>     the complete file
    ...part, ...part.json             what an interrupted download left, and the version of the object it belongs to
    ...sha256.json                    the file's hash, valid while its size and modification time are unchanged
    ...lock                           held by the process that downloads

A cached file is not compared with its source again; give sha256 to make sure that it is the right one. With a sha256,
the file is hashed at each use, and the stored hash does not count. The folder is private: it is refused if other users
can write to it.
"""

import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import obstore
import requests
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from diffsmooth.pipeline.errors import RunError, UserError, one_line
from diffsmooth.pipeline.locations import in_store, is_remote, shown, split_object
from diffsmooth.pipeline.storage.folder import Absent, check_size, is_regular, open_regular, read_regular
from diffsmooth.pipeline.storage.hub import hub_file, in_hub_cache, on_hub
from diffsmooth.pipeline.storage.remote import (
    CALL_SECONDS,
    CONNECT_SECONDS,
    READ_SECONDS,
    Broken,
    Refused,
    check_status,
    check_version,
    connect,
    http_errors,
    paced,
    store_errors,
)

logger = logging.getLogger(__name__)

_CHUNK = 2**18  # bytes; a chunk that takes longer than READ_SECONDS is given up: at least 4 kB/s
_TRIES = 5  # consecutive ones without a new chunk
_FIRST_PAUSE = 0.5  # seconds, doubled at each try
_PROGRESS_EVERY = 5.0  # seconds
_SIDECAR_LIMIT = 10_000  # bytes


class WrongHash(UserError):
    """A file has another sha256 than the expected one."""


class _Sidecar(BaseModel):
    """A small JSON file beside a cached one. One that is damaged or missing is ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


class _Partial(_Sidecar):
    """Which version of an object a partial download belongs to."""

    etag: str | None = None  # None if the download cannot be resumed
    total: int | None = Field(default=None, ge=0)  # bytes


class _Hashed(_Sidecar):
    """The hash of a cached file of this size and modification time."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int
    mtime_ns: int


_AnySidecar = TypeVar("_AnySidecar", bound=_Sidecar)


class _Answer(NamedTuple):
    """A server's answer; the file's bytes follow."""

    start: int  # position of the first byte: the requested one, or 0 if the server sends everything
    total: int | None  # bytes of the complete file, if known
    etag: str | None  # names this version of the file; None if the download cannot be resumed


_Download = Generator[_Answer | bytes]  # one answer, then the bytes


def cache_folder() -> Path:
    """Where this node keeps the files that it has fetched."""
    if named := os.environ.get("DIFFSMOOTH_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "diffsmooth"


def private_folder() -> Path:
    """The cache folder, made if need be. Raises: UserError if other users can write to it, RunError."""
    folder = cache_folder()
    _make_private(folder)
    return folder


def fetch(uri: str, sha256: str | None = None) -> Path:
    """The local file of a path, or of an s3://, gs://, az://, hf:// or https:// URI.

    A remote file is downloaded unless the cache folder has it.

    Raises: UserError for a file that does not exist, may not be read, or has another sha256 than the given one;
    RunError for a full disk and for a network that stays broken.
    """
    if not is_remote(uri):
        path = Path(os.path.expanduser(uri))
        try:
            open_regular(path).close()
        except Absent:
            raise Absent(
                f"{shown(uri)}: no such file; give the path of an existing file, s3://BUCKET/KEY or https://..."
            ) from None
        return _checked(path, uri, sha256, "")
    if on_hub(uri):
        return _checked(hub_file(uri), uri, sha256, remedy(uri))
    if not in_store(uri) and not uri.startswith(("https://", "http://")):
        raise UserError(
            f"{shown(uri)}: this kind of URI cannot be read; give a path, s3://BUCKET/KEY, gs://BUCKET/KEY, "
            "az://CONTAINER/KEY, hf://ORG/REPO/FILE or https://..."
        )
    path = _entry(uri)
    _make_private(path.parent)
    if not path.is_file():
        with node_lock(path):
            if not path.is_file():
                _download(uri, path, sha256)
                return path
    return _checked(path, uri, sha256, f"; delete {path} to download it again")


def read_web(uri: str, limit: int) -> bytes:
    """The bytes of a small file at an http(s):// URI, at most `limit`, always from the server.

    Raises: Absent, UserError, RunError.
    """
    for attempt in range(_TRIES):
        try:
            with closing(paced(_from_http(uri, 0, None), CALL_SECONDS, READ_SECONDS)) as items:
                answer, content = next(items), bytearray()
                assert isinstance(answer, _Answer)
                for chunk in items:
                    assert isinstance(chunk, bytes)
                    content += chunk
                    check_size(uri, len(content), limit)
            if answer.total in (None, len(content)):
                return bytes(content)
            reason = Broken(f"the server sent {len(content)} of {answer.total} bytes")
        except Broken as error:
            reason = error
        time.sleep(_FIRST_PAUSE * 2**attempt)
    raise RunError(f"{shown(uri)}: cannot be read: {reason}; check the network and run the same command again")


def remedy(uri: str) -> str:
    """The end of a message about a file that is not what it should be: how to download it again."""
    if on_hub(uri):
        return "; delete it from the Hub's cache (HF_HOME) to download it again"
    return f"; delete {_entry(uri)} to download it again" if is_remote(uri) else ""


def at_hand(uri: str) -> bool:
    """Whether `fetch` would have nothing to download."""
    if on_hub(uri):
        return in_hub_cache(uri)
    return is_regular(_entry(uri) if is_remote(uri) else Path(os.path.expanduser(uri)))


def fetch_first(candidates: Sequence[str]) -> Path:
    """Fetch the first of several paths or URIs that exists.

    Raises: UserError that names all of them if none exists, and as `fetch` does.
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
    raise UserError(f"none of these files exists: {', '.join(map(shown, candidates))}")


def file_sha256(path: str | os.PathLike[str], *, trust_stored: bool = True) -> str:
    """A file's sha256 in hexadecimal. For a file in the cache folder, the stored hash is used while it is valid.

    Without `trust_stored`, the file is read again, even if its size and modification time are unchanged.

    Raises: UserError, RunError for a file that cannot be read.
    """
    path = Path(path)
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
    return _sha256(path, status.st_size, status.st_mtime_ns) if trust_stored else _hash(path)


def _full_disk(folder: Path, needed: int | None) -> RunError:
    asked = f"{needed / 1e6:,.1f} MB are needed and " if needed is not None else ""
    return RunError(
        f"{folder}: the disk is full: {asked}{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free; free some space, "
        "or set DIFFSMOOTH_CACHE to a folder on a larger disk"
    )


@contextmanager
def node_lock(path: Path) -> Iterator[None]:
    """Keep the other processes of this node from making the same entry of the cache.

    Raises: RunError if the cache folder cannot be written.
    """
    _make_private(path.parent)
    try:
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process on this node to fetch %s", path.name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise _unusable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(folder: Path, error: Exception) -> RunError:
    return RunError(
        f"{folder}: the cache folder cannot be used: {getattr(error, 'strerror', None) or error}; set "
        "DIFFSMOOTH_CACHE to a writable folder"
    )


def _make_private(folder: Path) -> None:
    """Create the cache folder for this user only. Raises: UserError if other users can write to it, RunError."""
    try:
        os.makedirs(folder.parent, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise _unusable(folder, error) from error
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
        raise UserError(
            f"{folder}: other users can change the files of this cache folder (mode {stat.S_IMODE(status.st_mode):o}, "
            f"owner {status.st_uid}); run chmod 700 on it, or set DIFFSMOOTH_CACHE to a folder of your own"
        )


def _entry(uri: str) -> Path:
    """The cached file of a URI. Its suffix is kept because loaders look at it."""
    if in_store(uri):
        name = uri
    else:
        try:
            name = urlsplit(uri).path
        except ValueError as error:
            raise UserError(f"{shown(uri)}: not a valid URI ({one_line(error)})") from None
    base = re.sub(r"[^A-Za-z0-9._-]", "_", name.rstrip("/").rpartition("/")[2])[-100:]
    key = hashlib.blake2b(uri.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return cache_folder() / f"{key}-{base}"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    if path.parent != cache_folder():
        return _hash(path)
    stored = _load(_Hashed, _beside(path, ".sha256.json"))
    if stored is not None and (stored.size, stored.mtime_ns) == (size, mtime_ns):
        return stored.sha256
    found = _hash(path)
    _store_hash(path, found)
    return found


def _hash(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _store_hash(path: Path, sha256: str) -> None:
    status = path.stat()
    with suppress(OSError):  # it only saves time
        _save(_Hashed(sha256=sha256, size=status.st_size, mtime_ns=status.st_mtime_ns), _beside(path, ".sha256.json"))


def _checked(path: Path, uri: str, expected: str | None, remedy: str) -> Path:
    if expected is not None and (found := _hash(path)) != expected:  # a stored hash could be a lie
        raise WrongHash(f"{shown(uri)}: the file has sha256 {found}, not the expected {expected}{remedy}")
    return path


def _load(model: type[_AnySidecar], path: Path) -> _AnySidecar | None:
    try:
        return model.model_validate_json(read_regular(path, _SIDECAR_LIMIT))
    except (OSError, ValueError, RunError):  # pydantic's errors are ValueErrors
        return None


def _save(content: _Sidecar, path: Path) -> None:
    temporary = _beside(path, f".{os.getpid()}")
    temporary.write_text(content.model_dump_json())
    os.replace(temporary, path)


def _download(uri: str, path: Path, sha256: str | None) -> None:
    """Bring the URI's complete file to `path`, continuing what an interrupted download left."""
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
                    "network and run the same command again to resume it"
                ) from None
            pause = _FIRST_PAUSE * 2 ** (tries - 1)
            logger.info("downloading %s: %s; next try in %.1f s", shown(uri), error, pause)
            time.sleep(pause)
        except Absent:  # an OSError, but not one of the disk
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                part.unlink(missing_ok=True)
                raise _full_disk(path.parent, (_load(_Partial, state) or _Partial()).total) from error
            raise RunError(
                f"{path.parent}: cannot write to the cache folder: {error.strerror or one_line(error)}; set "
                "DIFFSMOOTH_CACHE to another one"
            ) from error
    if wrong := _wrong_kind(path, part):
        part.unlink()
        raise UserError(
            f"{shown(uri)}: the server sent {wrong} and it was removed; correct the location, or log in and download "
            "the file by hand"
        )
    found = _hash(part)
    if sha256 is not None and found != sha256:
        part.unlink()
        raise WrongHash(
            f"{shown(uri)}: the downloaded file has sha256 {found}, not the expected {sha256}, and was removed"
        )
    os.replace(part, path)
    state.unlink(missing_ok=True)
    _store_hash(path, found)


_MAGIC = {".parquet": b"PAR1", ".gz": b"\x1f\x8b", ".zip": b"PK"}


def _wrong_kind(path: Path, part: Path) -> str:
    """What a download is instead of the file that its name promises; empty if it may be that file.

    A server that wants a log-in answers with a web page and status 200.
    """
    with part.open("rb") as file:
        head = file.read(1024)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if path.suffix not in (".html", ".xml") and text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page instead of the file,"
    if path.suffix == ".safetensors" and head[8:9] != b"{":
        return "no safetensors file,"
    if path.suffix in _MAGIC and not head.startswith(_MAGIC[path.suffix]):
        return f"no {path.suffix} file,"
    return ""


def _transfer(uri: str, part: Path, state: Path) -> None:
    """Download over one connection; returns when `part` is complete.

    Raises: Broken, UserError, RunError, OSError of the disk.
    """
    before = _load(_Partial, state) or _Partial()
    start = part.stat().st_size if part.exists() and before.etag is not None else 0
    if start and before.total is not None and start >= before.total:
        start = before.total - 1  # complete or damaged: requesting the last byte again shows which
        os.truncate(part, max(0, start))
    download = _from_store if in_store(uri) else _from_http
    with closing(paced(download(uri, max(0, start), before.etag), CALL_SECONDS, READ_SECONDS)) as items:
        answer = next(items)
        assert isinstance(answer, _Answer)
        if answer.total is not None and answer.total - answer.start > shutil.disk_usage(part.parent).free:
            raise _full_disk(part.parent, answer.total - answer.start)
        if not answer.start:
            part.unlink(missing_ok=True)  # before the state, which would call it a part of another version
            _save(_Partial(etag=answer.etag, total=answer.total), state)
        with part.open("ab") as file:
            for chunk in _with_progress(uri, answer, items):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if answer.total is not None and size != answer.total:
        raise Broken(f"the connection ended after {size} of {answer.total} bytes", restart=size > answer.total)


def _with_progress(uri: str, answer: _Answer, items: Iterator[_Answer | bytes]) -> Iterator[bytes]:
    """The chunks of a download, with its progress in the log."""
    started = last = time.monotonic()
    done = answer.start
    size = f"{answer.total / 1e6:,.0f} MB" if answer.total is not None else "unknown size"
    if done:
        logger.info("downloading %s: resuming after %s of %s", shown(uri), f"{done / 1e6:,.0f}", size)
    else:
        logger.info("downloading %s: %s, into %s", shown(uri), size, cache_folder())
    for chunk in items:
        assert isinstance(chunk, bytes)
        yield chunk
        done += len(chunk)
        now = time.monotonic()
        if now - last >= _PROGRESS_EVERY:
            last = now
            share = f"{100 * done // answer.total} %" if answer.total else f"{done / 1e6:,.0f} MB"
            rate = (done - answer.start) / 1e6 / (now - started)
            logger.info("downloading %s: %s of %s, %.0f MB/s", shown(uri), share, size, rate)


class _Session(requests.Session):
    """Follows redirections, but never from https:// to http://."""

    def get_redirect_target(self, response: requests.Response) -> str | None:
        target: str | None = super().get_redirect_target(response)
        if target is not None and response.url.startswith("https:") and target.lower().startswith("http:"):
            raise UserError(f"{shown(response.url)}: redirected to {shown(target)}, which is not encrypted")
        return target


def _from_http(uri: str, start: int, etag: str | None) -> _Download:
    headers = {"Accept-Encoding": "identity"}
    if start and etag:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag}
    with (
        http_errors(uri),
        _Session() as session,
        session.get(uri, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response,
    ):
        check_status(uri, response.status_code, response.reason or "")
        length, tag = response.headers.get("Content-Length"), response.headers.get("ETag")
        if length is not None and not (length.isascii() and length.isdigit()):
            raise RunError(
                f"{shown(uri)}: the server sent the invalid Content-Length {one_line(length, 40)!r}; correct the "
                "location, or try again later"
            )
        partial = response.status_code == 206
        if partial and not start:
            raise _unrequested_part(uri)
        if partial and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise Broken("the server sent another range than the requested one", restart=True)
        if partial and tag not in (None, etag):  # sent by a server that does not know If-Range
            raise Broken("the file has changed since the download began", restart=True)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            length = tag = None  # both describe the compressed bytes
        begin = start if partial else 0
        total = begin + int(length) if length is not None else None
        yield _Answer(begin, total, None if tag is None or tag.startswith("W/") else tag)
        yield from response.iter_content(_CHUNK)


def _from_store(uri: str, start: int, etag: str | None) -> _Download:
    key = split_object(uri, "KEY")[2]
    with store_errors(uri):
        answer = obstore.get(
            connect(uri), key, options={"range": {"offset": start}, "if_match": etag} if start else None
        )
        begin, _ = answer.range
        if begin and etag:
            check_version(etag, answer.meta["e_tag"])
        yield _Answer(begin, answer.meta["size"], answer.meta["e_tag"])
        for chunk in answer.stream(_CHUNK):
            yield bytes(chunk)


def _unrequested_part(uri: str) -> RunError:
    return RunError(
        f"{shown(uri)}: the server sent a part of the file (206) although all of it was requested; correct the "
        "location, or try again later"
    )
