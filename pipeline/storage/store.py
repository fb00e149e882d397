"""A run's storage: put-if-absent, replace, list, read; a folder, or a prefix in an S3 bucket.

An object appears whole or not at all, and the object itself is the record that its work is done: a crash at any point
leaves either no object or a complete one.
"""

import errno
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions
from pyarrow import fs

from pipeline.errors import RunError, UserError
from pipeline.storage.remote import s3_client


class Entry(NamedTuple):
    key: str  # path below the run, with slashes
    size: int  # bytes
    modified: float  # seconds since the epoch


class FolderStore:
    """A folder; a name that begins with a dot is a write in progress, never an object."""

    failures = 0  # of calls to the store that were tried again: a folder has none
    readers = 2  # threads that read objects at a time: more only wait for the interpreter

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._root = Path(uri).absolute()
        self.location = str(self._root)  # where a process in another working folder finds it

    def prepare(self) -> None:
        """Make the folder and probe it: an object that exists must not be put twice.

        Raises: RunError where the folder cannot be written or lacks hard links.
        """
        probe = f"probe-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            if not self.put_if_absent(probe, b"") or self.put_if_absent(probe, b""):
                raise RunError(f"{self.uri}: the file system lets an existing file be put again; use another one")
        finally:
            with suppress(OSError):
                (self._root / probe).unlink()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object unless one is there; say whether this call stored it.

        Raises: RunError where nothing can be written; what was stored before is untouched.
        """
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
            raise self._failure(key, error) from error
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Store a derived object in the place of an older one, atomically."""
        path = self._root / key
        try:
            os.replace(self._write_temporary(path, data), path)
        except OSError as error:
            raise self._failure(key, error) from error

    def read(self, key: str) -> bytes:
        """An object's bytes. Raises: FileNotFoundError."""
        return (self._root / key).read_bytes()

    def reader(self) -> Callable[[str], bytes]:
        """`read`, for many objects."""
        return self.read

    def exists(self, key: str) -> bool:
        return (self._root / key).is_file()

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects below a folder of the run, in no particular order."""
        for key, file in self._walk(prefix):
            status = file.stat()
            yield Entry(key, status.st_size, status.st_mtime)

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `list` alone: no file is looked at."""
        for key, _ in self._walk(prefix):
            yield key

    def existing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys under which an object stands."""
        return {key for key in keys if self.exists(key)}

    def _walk(self, prefix: str) -> "Iterator[tuple[str, os.DirEntry[str]]]":
        try:
            with os.scandir(self._root / prefix) as files:
                entries = [file for file in files if not file.name.startswith(".")]
        except FileNotFoundError:
            return
        for file in entries:
            key = f"{prefix}/{file.name}"
            if file.is_dir():
                yield from self._walk(key)
            else:
                yield key, file

    def _write_temporary(self, path: Path, data: bytes) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        except BaseException:
            os.unlink(temporary)
            raise
        return temporary

    def _failure(self, key: str, error: OSError) -> RunError:
        remedy = {
            errno.ENOSPC: "free some space and run the same command again",
            errno.EDQUOT: "free some of your quota and run the same command again",
            errno.EPERM: "the file system may lack hard links: use another one",
            errno.ENOTSUP: "the file system lacks hard links: use another one",
        }.get(error.errno or 0, "make the folder writable, or choose another with --out")
        return RunError(f"{self.uri}: cannot write {key}: {error.strerror or error}; {remedy}")


class S3Store:
    """A prefix in an S3 bucket, or in any store that speaks S3's conditional writes (AWS_ENDPOINT_URL names it).

    `PutObject` with If-None-Match: * is atomic. A lost response makes the retry find our own object and answer 412, so
    each put carries a token in the object's metadata, and a 412 is followed by a look at whose token stands there.

    Listings and the reading of many objects go through Arrow's client, which takes a fifteenth and a fifth of the time
    that boto3 computes on a listed and a read object; where it fails, boto3 tries again and says what is wrong.
    """

    readers = 32  # threads that read objects at a time: a read is mostly waiting
    _CONFLICT_TRIES = 8  # of a put that meets another put of the same key (409), with doubling pauses
    _FIRST_PAUSE = 0.1  # seconds

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.location = self.uri
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        if not bucket or not prefix:
            raise UserError(f"{uri}: a run needs a bucket and a prefix: write s3://BUCKET/PREFIX")
        self._bucket, self._prefix = bucket, f"{prefix}/"
        self.failures = 0  # calls that were lost, throttled or refused for a moment, and tried again
        self._client = s3_client()
        self._client.meta.events.register("response-received.s3", self._count_failure)

    def _count_failure(self, response_dict: dict[str, Any] | None, exception: Exception | None, **_: Any) -> None:
        status = 0 if response_dict is None else response_dict["status_code"]
        self.failures += exception is not None or status in (409, 429) or status >= 500

    def prepare(self) -> None:
        """Probe the store: an object that exists must not be put twice.

        Raises: UserError for a missing bucket or a store without conditional writes, RunError for missing rights.
        """
        probe = f"probe-{os.getpid()}-{os.urandom(8).hex()}"
        if not self.put_if_absent(probe, b"") or self.put_if_absent(probe, b""):
            raise UserError(
                f"{self.uri}: this store ignores If-None-Match, so two workers could overwrite each other's votes: use "
                "a store with conditional writes (S3 itself has them), or a folder"
            )
        with self._named("delete", probe):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + probe)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object unless one is there; say whether this call stored it. Raises: RunError, UserError."""
        token = os.urandom(16).hex()
        for attempt in range(self._CONFLICT_TRIES):
            try:
                with self._named("write", key):
                    self._client.put_object(
                        Bucket=self._bucket,
                        Key=self._prefix + key,
                        Body=data,
                        IfNoneMatch="*",
                        Metadata={"token": token},
                    )
                return True
            except _Precondition:
                with self._named("look at", key):
                    head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
                return head["Metadata"].get("token") == token
            except _Conflict:
                time.sleep(self._FIRST_PAUSE * 2**attempt)
        raise RunError(f"{self.uri}: cannot write {key}: other writes of it never ended; run the same command again")

    def replace(self, key: str, data: bytes) -> None:
        """Store a derived object in the place of an older one, atomically."""
        with self._named("write", key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def read(self, key: str) -> bytes:
        """An object's bytes. Raises: FileNotFoundError."""
        with self._named("read", key):
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read()

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
                except OSError:
                    works = False  # not for each of many objects after as many timeouts
            return self.read(key)

        return read

    def exists(self, key: str) -> bool:
        try:
            with self._named("look at", key):
                self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects below a folder of the run, in no particular order."""
        root = f"{self._bucket}/{self._prefix}"
        try:
            found = self._arrow().get_file_info(fs.FileSelector(root + prefix, allow_not_found=True, recursive=True))
        except _ARROW_FAILURES:
            yield from self._pages(f"{prefix}/")
            return
        for info in found:
            if info.type == fs.FileType.File:
                yield Entry(info.path.removeprefix(root), info.size, info.mtime_ns / 1e9)

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
            connect_timeout=10,
            request_timeout=60,
        )

    def _pages(self, start: str) -> Iterator[Entry]:
        """The objects whose keys begin like this, by listings of up to 1,000."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._named("list", start):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + start):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    yield Entry(key, entry["Size"], entry["LastModified"].timestamp())

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `list` alone."""
        for entry in self.list(prefix):
            yield entry.key

    def existing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys under which an object stands.

        Keys that are alike up to their last hyphen (the blocks of a sample and stage) share one listing.
        """
        alike = defaultdict(list)
        for key in keys:
            alike[key.rpartition("-")[0]].append(key)

        def look(group: tuple[str, list[str]]) -> set[str]:
            start, wanted = group
            if len(wanted) == 1:
                return {key for key in wanted if self.exists(key)}
            return {entry.key for entry in self._pages(f"{start}-")}.intersection(wanted)

        if len(alike) < 2:
            return set().union(*map(look, alike.items()))
        with ThreadPoolExecutor(max_workers=min(self.readers, len(alike))) as pool:
            return set().union(*pool.map(look, alike.items()))

    @contextmanager
    def _named(self, action: str, key: str) -> Iterator[None]:
        """Turn the client's errors into ours, named by what was done to which object."""
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = error.response["Error"]["Code"]
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 412:
                raise _Precondition from error
            if status == 409:
                raise _Conflict from error
            if code == "NoSuchBucket":
                raise UserError(
                    f"{self.uri}: there is no bucket {self._bucket}: create it, or correct the name"
                ) from error
            if status == 404:
                raise FileNotFoundError(f"{self.uri}/{key}") from error
            if code == "NotImplemented":
                raise UserError(
                    f"{self.uri}: this store refuses If-None-Match: use one with conditional writes"
                ) from error
            remedy = "check the credentials and their rights" if status in (401, 403) else "run the same command again"
            raise RunError(
                f"{self.uri}: cannot {action} {key}: {code}: {error.response['Error'].get('Message')}; {remedy}"
            ) from error
        except botocore.exceptions.NoCredentialsError as error:
            raise RunError(f"{self.uri}: no AWS credentials found: set AWS_PROFILE or an instance profile") from error
        except botocore.exceptions.BotoCoreError as error:
            raise RunError(
                f"{self.uri}: cannot {action} {key}: {error}; check AWS_ENDPOINT_URL and the network"
            ) from error


_ARROW_FAILURES = (OSError, botocore.exceptions.BotoCoreError)


class _Precondition(Exception):
    """412: an object stands under the key."""


class _Conflict(Exception):
    """409: another conditional write of the key is under way."""


class MemoryStore:
    """Objects in this process, for a run that nobody stores."""

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
        """An object's bytes. Raises: FileNotFoundError."""
        if key not in self._objects:
            raise FileNotFoundError(key)
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
    """The storage at `uri`; nothing is written yet. Raises: UserError for a kind of place that is not known."""
    text = os.fspath(uri)
    if text.startswith("s3://"):
        return S3Store(text)
    if "://" in text:
        raise UserError(f"{text}: name a folder or s3://BUCKET/PREFIX for the run")
    return FolderStore(text)


def _sync_folder(folder: Path) -> None:
    """Make a new name last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
