"""Processes below this one, found in /proc, and the start of Ray's."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def starting_ray() -> Iterator[None]:
    """Let one Ray of the tests start at a time.

    On two cores, Rays that start together take longer than the 30 s for which Ray waits for its own agents.
    """
    with FileLock(Path(tempfile.gettempdir()) / f"diffsmooth-tests-{os.getuid()}.lock"):
        yield


def descendants(pid: int) -> set[int]:
    """The process ids below `pid`."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: set[int] = set()
    added = {pid}
    while added:
        found |= added
        added = {child for child, parent in parents.items() if parent in added} - found
    return found - {pid}


def worker_actors() -> list[int]:
    """Process ids of the actors on a Ray that this process started, found by their titles.

    The titles do not tell busy actors from idle ones: an actor that was asked for its progress has its bare title.
    """
    found = []
    for pid in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::RemoteWorker"):
            found.append(pid)
    return sorted(found)
