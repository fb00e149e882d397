"""A run's storage: put-if-absent, replace, list, read, in a folder or under a prefix of an object store.

An object appears complete or not at all. The object itself is the record that its work is done, so a crash at any
point leaves either no object or a complete one.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import obstore

from diffsmooth.pipeline.errors import RunError, UserError, one_line
from diffsmooth.pipeline.locations import in_store, is_remote, shown, split_object
from diffsmooth.pipeline.records import MOST_BYTES, Model, intact, parse_record
from diffsmooth.pipeline.storage.folder import Absent, Entry, check_size, is_regular, read_regular, translated
from diffsmooth.pipeline.storage.hub import on_hub
from diffsmooth.pipeline.storage.published import INDEX, PublishedStore
from diffsmooth.pipeline.storage.remote import Broken, Changed, Conflict, call_store, connect, in_parallel, list_pages

T = TypeVar("T")


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


class BucketStore:
    """A prefix in a bucket of S3, of Google Cloud Storage, of Azure, or of a store that speaks as one of them.

    A conditional put is atomic. If its response is lost, the client tries again, finds our own object and reports that
    it exists. It reports the same for a write that is in conflict with another one, when nothing is stored yet. Each
    put therefore carries a token in the object's metadata, and what is stored is compared with it.
    """

    readers = 32  # threads that read objects at a time: they mostly wait
    _CONFLICT_TRIES = 8  # of a put that meets another put of the same key, with doubling pauses
    _FIRST_PAUSE = 0.1  # seconds

    def __init__(self, uri: str) -> None:
        scheme, bucket, prefix = split_object(uri, "PREFIX")
        self._prefix = prefix.strip("/")  # the client removes a slash before it
        self.uri = self.location = f"{scheme}://{bucket}/{self._prefix}"
        self.failures = 0  # puts whose response was lost, or that met another put
        self._client = connect(self.uri)

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
        self._call(probe, lambda path: obstore.delete(self._client, path))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store an object unless it exists; returns whether this call stored it. Raises: RunError, UserError."""
        token = os.urandom(16).hex()

        def put(path: str) -> None:
            obstore.put(self._client, path, data, mode="create", attributes={"token": token}, use_multipart=False)

        def stored(path: str) -> bool:
            return obstore.get(self._client, path, options={"head": True}).attributes.get("token") == token

        for attempt in range(self._CONFLICT_TRIES):
            try:
                self._call(key, put)
                return True
            except (Conflict, Changed):
                with suppress(Absent, Conflict):  # a conflict, although nothing is stored
                    ours = self._call(key, stored)
                    self.failures += ours
                    return ours
            self.failures += 1
            time.sleep(self._FIRST_PAUSE * 2**attempt)
        raise RunError(f"{shown(self.uri)}/{key}: another process kept writing it; run the same command again")

    def replace(self, key: str, data: bytes) -> None:
        """Store a derived object, atomically replacing an older one."""
        self._call(key, lambda path: obstore.put(self._client, path, data, use_multipart=False))

    def read(self, key: str, limit: int | None = None) -> bytes:
        """An object's bytes, at most `limit`. Raises: FileNotFoundError (a UserError as well)."""

        def read(path: str) -> bytes:
            answer = obstore.get(self._client, path)
            check_size(f"{self.uri}/{key}", answer.meta["size"], limit)
            return answer.bytes().to_bytes()

        return self._call(key, read)

    def exists(self, key: str) -> bool:
        try:
            self._call(key, lambda path: obstore.head(self._client, path))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects below a folder of the run, in no particular order."""
        start = len(self._prefix) + 1
        for page in list_pages(f"{self.uri}/{prefix}", self._client, f"{self._prefix}/{prefix}"):
            for entry in page:
                yield Entry(entry["path"][start:], entry["size"], entry["last_modified"].timestamp())

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `list`."""
        for entry in self.list(prefix):
            yield entry.key

    def existing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys whose objects exist."""
        wanted = list(keys)
        found = in_parallel(self.exists, wanted, min(self.readers, len(wanted)))
        return {key for key, exists in zip(wanted, found, strict=True) if exists}

    def _call(self, key: str, call: Callable[[str], T]) -> T:
        """Call the client about an object, whose path in the bucket `call` gets.

        Raises: Changed and Conflict of a conditional write, FileNotFoundError, UserError, RunError.
        """
        uri = f"{self.uri}/{key}"
        try:
            return call_store(uri, lambda: call(f"{self._prefix}/{key}"))
        except (Changed, Conflict):
            raise
        except Broken as error:
            raise RunError(f"{shown(uri)}: {error}; run the same command again") from error


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

    def exists(self, key: str) -> bool:
        return key in self._objects

    def list(self, prefix: str) -> Iterator[Entry]:
        for key in self.keys(prefix):
            yield Entry(key, len(self._objects[key]), 0.0)

    def keys(self, prefix: str) -> Iterator[str]:
        yield from [key for key in self._objects if key.startswith(f"{prefix}/")]

    def existing(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if key in self._objects}


Store = FolderStore | BucketStore | MemoryStore | PublishedStore


def read_record(store: Store, key: str, model: type[Model]) -> Model:
    """A stored record. Raises: FileNotFoundError (a UserError as well) if there is none, RunError for a damaged one."""
    data = store.read(key, limit=MOST_BYTES)
    with intact(f"{shown(store.uri)}/{key}"):
        return parse_record(model, data)


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The storage at `uri`; nothing is written yet. Raises: UserError for an unknown kind of storage.

    hf:// and https:// locations, and folders with an index, are published runs, which are read-only.
    """
    text = os.fspath(uri)
    if in_store(text):
        return BucketStore(text)
    if on_hub(text) or text.startswith(("https://", "http://")):
        return PublishedStore(text)
    if is_remote(text):
        raise UserError(
            f"{shown(text)}: not a kind of storage that can hold a run; give a folder, s3://BUCKET/PREFIX, "
            "gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, or the hf:// or https:// location of a published run"
        )
    store = FolderStore(text)
    with suppress(UserError, RunError):  # a path that cannot be read is refused when it is used
        if store.exists(INDEX):
            return PublishedStore(text)
    return store


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
