"""Files of this node: only regular files are read, and the operating system's errors are translated in one place.

Also what all kinds of storage say of an object that exists, and of one that does not.
"""

import errno
import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

from diffsmooth.pipeline.errors import RunError, UserError, one_line
from diffsmooth.pipeline.locations import shown


class Absent(FileNotFoundError, UserError):
    """There is no such file or object."""


class Entry(NamedTuple):
    """An object of a listing."""

    key: str  # path below the run, with slashes
    size: int  # bytes
    modified: float  # seconds since the epoch


# What the user can do about an error that a path of another kind would not have
_WRONG_PATHS = {
    errno.ENOTDIR: "part of the path is a file; use another path",
    errno.EEXIST: "part of the path is a file; use another path",
    errno.EISDIR: "give the path of a file",
    errno.ELOOP: "use another path, or remove the circular symbolic link",
    errno.ENAMETOOLONG: "use a shorter path",
}
_FAILURES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EPERM: "the file system may lack hard links; use another one",
    errno.ENOTSUP: "the file system lacks hard links; use another one",
}


def translated(error: OSError | ValueError, action: str, path: str | os.PathLike[str]) -> UserError | RunError:
    """The operating system's error as ours; `action` is the verb that failed: read, write or list."""
    place = f"{shown(os.fspath(path))}: cannot {action}"
    if isinstance(error, UserError):
        return error
    if not isinstance(error, OSError):  # a NUL byte, or characters that no file name can hold
        return UserError(f"{place}: {one_line(error)}")
    code, reason = error.errno or 0, error.strerror or one_line(error)
    if code == errno.ENOENT and action != "write":
        return Absent(f"{shown(os.fspath(path))}: no such file; give the path of an existing file")
    if remedy := _WRONG_PATHS.get(code):
        return UserError(f"{place}: {reason}; {remedy}")
    usual = "make the folder writable, or choose another with --out" if action == "write" else "check its permissions"
    remedy = _FAILURES.get(code, usual)
    return RunError(f"{place}: {reason}; {remedy}")


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading; a pipe or a device is refused without waiting for it.

    Raises: Absent, UserError for a path that cannot be one of a file, RunError for a disk or permissions that fail.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise translated(error, "read", path) from error
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise UserError(f"{shown(os.fspath(path))}: {_kind(mode)}, not a regular file; give the path of a file")


def read_regular(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The bytes of a regular file, of which there may be at most `limit`.

    Raises: as `open_regular`, and RunError for a larger file.
    """
    with open_regular(path) as file:
        try:
            check_size(path, os.fstat(file.fileno()).st_size, limit)
            return file.read()
        except OSError as error:
            raise translated(error, "read", path) from error


def check_size(place: str | os.PathLike[str], size: int, limit: int | None) -> None:
    """Raise RunError if an object of `size` bytes is larger than `limit`."""
    if limit is not None and size > limit:
        raise RunError(f"{shown(os.fspath(place))}: {size:,} bytes, but at most {limit:,} are expected")


def is_regular(path: Path) -> bool:
    """Whether there is a regular file. Raises: UserError, RunError for a path that cannot be looked at."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise translated(error, "read", path) from error


def _kind(mode: int) -> str:
    return {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}.get(stat.S_IFMT(mode), "a device")
