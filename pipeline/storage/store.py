"""A run's storage: put-if-absent, replace, list, read, in a folder or under a prefix of an S3 bucket.

An object appears complete or not at all. The object itself is the record that its work is done, so a crash at any
point leaves either no object or a complete one.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import pyarrow as pa
from pyarrow import fs

from pipeline.errors import RunError, UserError, one_line
from pipeline.locations import is_remote, shown
from pipeline.storage.local import Absent, check_size, is_regular, read_regular, translated
from pipeline.storage.remote import (
    CONNECT_SECONDS,
    READ_SECONDS,
    Broken,
    Changed,
    Conflict,
    call_s3,
    in_parallel,
    list_pages,
    s3_client,
)

T = TypeVar("T")


class Entry(NamedTuple):
    key: str  # path below the run, with slashes
    size: int  # bytes
    modified: float  # seconds since the epoch


class FolderStore:
    """A folder. A name that begins with a dot is a write in progress, never an object.

    All methods raise UserError for a path that cannot hold a run, and RunError for a disk or permissions that fail.
    """

    failures = 0  # calls that failed and were tried again: a folder has none
    readers = 2  # threads that read objects at a time: more only wait for the interpreter
    _DEPTH = 8  # of folders below the run; a circular symbolic link exceeds it

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            uri.encode()
            self._root = Path(uri).absolute()
        except (OSError, ValueError):  # the working folder was deleted, or the name is not UTF-8
            raise UserError(f"{shown(uri)}: not a usable path; give an absolute path in UTF-8") from None
        if not uri or "\0" in uri:
            raise UserError(f"{shown(uri)!r} is not the path of a folder; give a folder or s3://BUCKET/PREFIX")
        self.location = str(self._root)  # where a process with another working folder finds it

    def prepare(self) -> None:
        """Create the folder and test it: putting an object that exists must fail.

        Raises: RunError if the folder is not writable or its file system lacks hard links.
        """
        probe = f"probe-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            if not self.put_if_absent(probe, b"") or self.put_if_absent(probe, b""):
                raise RunError(f"{shown(self.uri)}: the file system overwrites files that exist; use another one")
        finally:
            with suppress(OSError):
                (self._root / probe).unlink()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object unless it exists; returns whether this call stored it. Objects are never changed."""
        path = self._root / key
        try:
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            _sync_folder(path.parent)
        except OSError as error:
            raise translated(error, "write", path) from error
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Store a derived object, atomically replacing an older one."""
        path = self._root / key
        try:
            temporary = self._write_temporary(path, data)
            try:
                os.replace(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise translated(error, "write", path) from error

    def read(self, key: str, limit: int | None = None) -> bytes:
        """An object's bytes, at most `limit`. Raises: FileNotFoundError (a UserError as well)."""
        return read_regular(self._root / key, limit)

    def reader(self) -> Callable[[str], bytes]:
        """`read`, for many objects."""
        return self.read

    def exists(self, key: str) -> bool:
        return is_regular(self._root / key)

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects below a folder of the run, in no particular order."""
        for key, file in self._walk(prefix):
            try:
                status = file.stat()
            except OSError as error:
                raise translated(error, "list", file.path) from error
            yield Entry(key, status.st_size, status.st_mtime)

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `list`, without looking at the files."""
        for key, _ in self._walk(prefix):
            yield key

    def existing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys whose objects exist."""
        return {key for key in keys if self.exists(key)}

    def _walk(self, prefix: str, depth: int = 0) -> "Iterator[tuple[str, os.DirEntry[str]]]":
        folder = self._root / prefix
        if depth > self._DEPTH:
            raise UserError(
                f"{shown(str(folder))}: folders are nested more than {self._DEPTH} deep; remove the circular symbolic "
                "link, or the folder that is not part of the run"
            )
        try:
            with os.scandir(folder) as files:
                # a folder with a suffix is in the place of an object: listed, it is refused when it is read
                entries = [
                    (file, file.is_dir() and "." not in file.name) for file in files if not file.name.startswith(".")
                ]
        except FileNotFoundError:
            return
        except OSError as error:
            raise translated(error, "list", folder) from error
        for file, is_folder in entries:
            if is_folder:
                yield from self._walk(f"{prefix}/{file.name}", depth + 1)
            else:
                key = f"{prefix}/{file.name}"
                # a name that cannot be printed is no object of ours; escaped, it can be reported
                yield key if key.isprintable() else one_line(key), file

    def _write_temporary(self, path: Path, data: bytes) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path.parent}/.{os.urandom(8).hex()}"
        # with the rights that the user's umask leaves: run.json may hold a secret seed
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(temporary)
            raise
        return temporary


class S3Store:
    """A prefix in an S3 bucket, or in any store that has S3's conditional writes (AWS_ENDPOINT_URL names it).

    `PutObject` with If-None-Match: * is atomic. If its response is lost, the retry finds our own object and answers
    412. Each put therefore carries a token in the object's metadata, and after a 412 the stored token is compared.

    Long listings and the reading of many objects use Arrow's client, which needs a fifteenth and a fifth of boto3's
    CPU time per object. If it fails, boto3 is used and says what is wrong.
    """

    readers = 32  # threads that read objects at a time: they mostly wait
    _CONFLICT_TRIES = 8  # of a put that meets another put of the same key (409), with doubling pauses
    _FIRST_PAUSE = 0.1  # seconds
    _SHORT_LISTING = 3  # pages that boto3 lists before Arrow takes over: Arrow never ends if the token is repeated

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.location = self.uri
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        if not bucket or not prefix:
            raise UserError(f"{shown(uri)}: a run needs a bucket and a prefix; write s3://BUCKET/PREFIX")
        self._bucket, self._prefix = bucket, f"{prefix}/"
        self.failures = 0  # calls that failed (lost, throttled, in conflict) and were tried again
        self._client = s3_client(self.uri)
        self._client.meta.events.register("response-received.s3", self._count_failure)

    def _count_failure(self, response_dict: dict[str, Any] | None, exception: Exception | None, **_: Any) -> None:
        status = 0 if response_dict is None else response_dict["status_code"]
        self.failures += exception is not None or status in (409, 429) or status >= 500

    def prepare(self) -> None:
        """Test the store: putting an object that exists must fail.

        Raises: UserError for a missing bucket, missing permissions or a store without conditional writes, RunError.
        """
        probe = f"probe-{os.getpid()}-{os.urandom(8).hex()}"
        if not self.put_if_absent(probe, b"") or self.put_if_absent(probe, b""):
            raise UserError(
                f"{self.uri}: this store ignores If-None-Match, so two workers could overwrite each other's votes; use "
                "a store with conditional writes, such as S3 itself, or a folder"
            )
        self._call(probe, lambda at: self._client.delete_object(**at))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object unless it exists; returns whether this call stored it. Raises: RunError, UserError."""
        token = os.urandom(16).hex()
        for attempt in range(self._CONFLICT_TRIES):
            try:
                self._call(
                    key,
                    lambda at: self._client.put_object(**at, Body=data, IfNoneMatch="*", Metadata={"token": token}),
                )
                return True
            except Changed:
                head = self._call(key, lambda at: self._client.head_object(**at))
                return bool(head["Metadata"].get("token") == token)
            except Conflict:
                time.sleep(self._FIRST_PAUSE * 2**attempt)
        raise RunError(
            f"{shown(self.uri)}/{key}: not written, because of conflicts with other writes of it; run the same command "
            "again"
        )

    def replace(self, key: str, data: bytes) -> None:
        """Store a derived object, atomically replacing an older one."""
        self._call(key, lambda at: self._client.put_object(**at, Body=data))

    def read(self, key: str, limit: int | None = None) -> bytes:
        """An object's bytes, at most `limit`. Raises: FileNotFoundError (a UserError as well)."""

        def read(at: dict[str, str]) -> bytes:
            answer = self._client.get_object(**at)
            check_size(f"{self.uri}/{key}", answer["ContentLength"], limit)
            return bytes(answer["Body"].read())

        return self._call(key, read)

    def reader(self) -> Callable[[str], bytes]:
        """`read`, for many objects."""
        try:
            arrow = self._arrow()
        except _ARROW_FAILURES:
            return self.read
        works = True

        def read(key: str) -> bytes:
            nonlocal works
            if works:
                try:
                    with arrow.open_input_file(f"{self._bucket}/{self._prefix}{key}") as file:
                        data = file.read()
                        if len(data) == file.size():
                            return data
                except FileNotFoundError:
                    pass
                except _ARROW_FAILURES:
                    works = False  # so that not each of many objects waits for a timeout
            return self.read(key)

        return read

    def exists(self, key: str) -> bool:
        try:
            self._call(key, lambda at: self._client.head_object(**at))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects below a folder of the run, in no particular order."""
        pages = self._pages(f"{prefix}/")
        first = tuple(islice(pages, self._SHORT_LISTING))
        found = self._list_by_arrow(prefix) if len(first) == self._SHORT_LISTING else None
        for page in (found,) if found is not None else chain(first, pages):
            yield from page

    def _list_by_arrow(self, prefix: str) -> Sequence[Entry] | None:
        """The objects below a folder of the run; None if Arrow cannot list them."""
        root = f"{self._bucket}/{self._prefix}"
        try:
            found = self._arrow().get_file_info(fs.FileSelector(root + prefix, allow_not_found=True, recursive=True))
        except _ARROW_FAILURES:
            return None
        files = (info for info in found if info.type == fs.FileType.File)
        return [Entry(info.path.removeprefix(root), info.size, info.mtime_ns / 1e9) for info in files]

    def _arrow(self) -> fs.S3FileSystem:
        """Arrow's client, with the endpoint, region and credentials that boto3 finds now."""
        credentials = boto3.Session().get_credentials()
        if credentials is None:
            raise botocore.exceptions.NoCredentialsError
        keys = credentials.get_frozen_credentials()
        endpoint = urlsplit(self._client.meta.endpoint_url)
        return fs.S3FileSystem(
            access_key=keys.access_key,
            secret_key=keys.secret_key,
            session_token=keys.token,
            region=self._client.meta.region_name,
            scheme=endpoint.scheme,
            endpoint_override=endpoint.netloc,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=READ_SECONDS,
        )

    def _pages(self, start: str) -> Iterator[Sequence[Entry]]:
        """The objects whose keys begin with `start`, up to 1,000 at a time."""
        place = f"{self.uri}/{start}"
        try:
            for page in list_pages(self._client, place, Prefix=self._prefix + start):
                yield [
                    Entry(entry["Key"].removeprefix(self._prefix), entry["Size"], entry["LastModified"].timestamp())
                    for entry in page
                ]
        except Broken as error:
            raise RunError(f"{shown(place)}: cannot be listed: {error}; run the same command again") from error

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `list`."""
        for entry in self.list(prefix):
            yield entry.key

    def existing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys whose objects exist.

        Keys that are equal up to their last hyphen (the blocks of a sample and stage) share one listing.
        """
        groups = defaultdict(list)
        for key in keys:
            groups[key.rpartition("-")[0]].append(key)

        def look(group: tuple[str, Sequence[str]]) -> set[str]:
            start, wanted = group
            if len(wanted) == 1:
                return {key for key in wanted if self.exists(key)}
            return {entry.key for page in self._pages(f"{start}-") for entry in page}.intersection(wanted)

        if len(groups) < 2:
            return set().union(*map(look, groups.items()))
        return set().union(*in_parallel(look, groups.items(), min(self.readers, len(groups))))

    def _call(self, key: str, call: Callable[[dict[str, str]], T]) -> T:
        """Call the client about an object, which `call` gets as {Bucket, Key}.

        Raises: Changed and Conflict of a conditional write, FileNotFoundError, UserError, RunError.
        """
        uri, at = f"{self.uri}/{key}", {"Bucket": self._bucket, "Key": self._prefix + key}
        try:
            return call_s3(uri, lambda: call(at))
        except (Changed, Conflict):
            raise
        except Broken as error:
            raise RunError(f"{shown(uri)}: {error}; run the same command again") from error


# what Arrow's client can raise; the same call of boto3 then says what is wrong
_ARROW_FAILURES = (OSError, pa.ArrowException, botocore.exceptions.BotoCoreError)


class MemoryStore:
    """Objects in this process, for a run that is not stored."""

    failures = 0
    readers = 1

    def __init__(self) -> None:
        self.uri = self.location = "memory"
        self._objects: dict[str, bytes] = {}

    def prepare(self) -> None:
        """Nothing to prepare."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object unless it exists; returns whether this call stored it."""
        return self._objects.setdefault(key, data) is data

    def replace(self, key: str, data: bytes) -> None:
        self._objects[key] = data

    def read(self, key: str, limit: int | None = None) -> bytes:
        """An object's bytes, at most `limit`. Raises: FileNotFoundError (a UserError as well)."""
        if key not in self._objects:
            raise Absent(f"{key}: no such object in memory; store it first")
        check_size(key, len(self._objects[key]), limit)
        return self._objects[key]

    def reader(self) -> Callable[[str], bytes]:
        return self.read

    def exists(self, key: str) -> bool:
        return key in self._objects

    def list(self, prefix: str) -> Iterator[Entry]:
        for key in self.keys(prefix):
            yield Entry(key, len(self._objects[key]), 0.0)

    def keys(self, prefix: str) -> Iterator[str]:
        yield from [key for key in self._objects if key.startswith(f"{prefix}/")]

    def existing(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if key in self._objects}


Store = FolderStore | S3Store | MemoryStore


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The storage at `uri`; nothing is written yet. Raises: UserError for an unknown kind of storage."""
    text = os.fspath(uri)
    if text.startswith("s3://"):
        return S3Store(text)
    if is_remote(text):
        raise UserError(
            f"{shown(text)}: not a kind of storage that can hold a run; give a folder or s3://BUCKET/PREFIX"
        )
    return FolderStore(text)


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
