"""A run's storage: put-if-absent, replace, list, read; a folder.

An object appears whole or not at all, and the object itself is the record that its work is done: a crash at any point
leaves either no object or a complete one.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.spec import RunError, UserError


class Entry(NamedTuple):
    key: str  # path below the run, with slashes
    size: int  # bytes
    modified: float  # seconds since the epoch


class FolderStore:
    """A folder; a name that begins with a dot is a write in progress, never an object."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._root = Path(uri)

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

    def exists(self, key: str) -> bool:
        return (self._root / key).is_file()

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects below a folder of the run, in no particular order."""
        for folder, _, names in os.walk(self._root / prefix):
            for name in names:
                if name.startswith("."):
                    continue
                path = Path(folder, name)
                status = path.stat()
                yield Entry(path.relative_to(self._root).as_posix(), status.st_size, status.st_mtime)

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


Store = FolderStore


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The storage at `uri`; nothing is written yet. Raises: UserError for a kind of place that is not known."""
    text = os.fspath(uri)
    if "://" in text:
        raise UserError(f"{text}: only a folder can hold a run; give a path")
    return FolderStore(text)


def _sync_folder(folder: Path) -> None:
    """Make a new name last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
