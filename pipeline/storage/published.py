"""Published runs: the folder that is published, and a read-only store over it on the Hub, the web or a disk.

    index.json    the size and the sha256 of each file below
    run.json ...  objects of the run, each under its own key
    objects.zip   the many small objects (blocks, attacked samples), each under its key

A web server has no listing, and the Hub limits the number of files in a folder and of requests in a minute. Therefore
the index lists what exists, and small objects share one file. `sha256sum --check` works with a seal once objects.zip
is unpacked beside the other files.
"""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from diffsmooth.pipeline.errors import RunError, UserError, first_line, one_line
from diffsmooth.pipeline.locations import is_remote, shown
from diffsmooth.pipeline.storage.fetch import WrongHash, fetch, file_sha256, read_web
from diffsmooth.pipeline.storage.folder import Absent, Entry, check_size, read_regular
from diffsmooth.pipeline.storage.hub import hub_file, on_hub, pinned
from diffsmooth.pipeline.storage.remote import in_parallel

INDEX, ARCHIVE = "index.json", "objects.zip"

_KEY = r"\w[\w.-]*(/\w[\w.-]*)*"  # no part of it can be `..`
_MOST_INDEX_BYTES = 10_000_000
_MOST_BYTES = 1_000_000_000  # of one unpacked object: a small archive can unpack to any size
_FIRST_TIME = 315_532_800.0  # 1980, the first year of a zip file's dates
_CHUNK = 512  # objects that are read before they are written
# what zipfile raises for a damaged or encrypted file
_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

Key = Annotated[str, StringConstraints(pattern=f"^{_KEY}$", max_length=300)]


class _File(BaseModel):
    """A file of a published run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Index(BaseModel):
    """index.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    files: dict[Key, _File] = Field(max_length=100_000)


class PublishedStore:
    """A published run: hf://datasets/ORG/NAME[@REVISION][/FOLDER], https://HOST/PATH, or a folder. All writes fail.

    Every file is compared with the index when it is read. On the Hub, all are read from the commit that was the newest
    when the index was read.
    """

    failures = 0
    readers = 2  # threads that read objects at a time: more only wait for the interpreter

    def __init__(self, uri: str) -> None:
        """Raises: UserError for a URL that holds a secret, which reports and messages would show."""
        self.uri = self.location = uri.rstrip("/")
        if is_remote(uri) and not on_hub(uri):
            try:
                parts = urlsplit(uri)
            except ValueError as error:
                raise UserError(f"{shown(uri)}: not a valid URL ({first_line(error)})") from None
            if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
                raise UserError(
                    f"{shown(uri)}: the URL of a published run must have no user, password, query or fragment"
                )

    def prepare(self) -> None:
        """Refuse to write. Raises: UserError."""
        raise self._read_only()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Refuse to write. Raises: UserError."""
        raise self._read_only()

    def replace(self, key: str, data: bytes) -> None:
        """Refuse to write. Raises: UserError."""
        raise self._read_only()

    def read(self, key: str, limit: int | None = None) -> bytes:
        """An object's bytes, at most `limit`. Raises: FileNotFoundError (a UserError as well), RunError."""
        if key in self._files:
            file = self._files[key]
            check_size(f"{self.uri}/{key}", file.size, limit)
            data = self._read_file(key, file.size)
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise self._changed(key)
            return data
        if key not in self._packed:
            raise Absent(f"{shown(self.uri)}/{key}: no such object in the published run")
        assert self._archive is not None
        check_size(f"{self.uri}/{key}", self._packed[key].size, limit or _MOST_BYTES)
        try:
            return self._archive.read(key)
        except _DAMAGE as error:
            raise self._damaged(f"{ARCHIVE}: {key}", first_line(error)) from error

    def exists(self, key: str) -> bool:
        return key in self._files or key in self._packed

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects below a folder of the run. The index has no times, the archive has them."""
        for key, file in self._files.items():
            if key.startswith(f"{prefix}/"):
                yield Entry(key, file.size, 0.0)
        yield from (entry for key, entry in self._packed.items() if key.startswith(f"{prefix}/"))

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `list`."""
        for entry in self.list(prefix):
            yield entry.key

    def existing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys whose objects exist."""
        return {key for key in keys if self.exists(key)}

    def _read_only(self) -> UserError:
        return UserError(
            f"{shown(self.uri)}: a published run is read-only; use the folder or the prefix that certify wrote"
        )

    def _changed(self, key: str) -> RunError:
        return RunError(
            f"{shown(self.uri)}/{key}: its size or sha256 is not the one in {INDEX}; publish the run again, or ask its "
            "author"
        )

    def _damaged(self, key: str, reason: str) -> RunError:
        return RunError(f"{shown(self.uri)}/{key} is damaged ({reason}); ask its author for another copy")

    def _missing(self, key: str) -> RunError:
        return RunError(
            f"{shown(self.uri)}/{key}: listed in {INDEX}, but missing; publish the run again, or ask its author"
        )

    @cached_property
    def _base(self) -> str:
        """Where the files are; on the Hub, in a commit that does not change."""
        if not on_hub(self.uri):
            return self.uri
        uri = f"{self.uri}/{INDEX}"
        return pinned(uri, hub_file(uri)).removesuffix(f"/{INDEX}")

    @cached_property
    def _files(self) -> dict[str, _File]:
        """The files of the index. Raises: UserError if there is none, RunError if it is damaged."""
        try:
            data = self._read_any(INDEX, _MOST_INDEX_BYTES)
        except Absent:
            raise UserError(
                f"{shown(self.uri)}: no published run here (no {INDEX}); give the place that diffsmooth publish wrote"
            ) from None
        try:
            return dict(_Index.model_validate_json(data).files)
        except ValidationError as error:
            finding = error.errors(include_url=False)[0]
            reason = one_line(f"{'.'.join(str(part) for part in finding['loc'])}: {finding['msg']}")
            raise self._damaged(INDEX, reason) from None

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        """objects.zip, verified as a whole; None if there is none."""
        if ARCHIVE not in self._files:
            return None
        path = self._archive_path()
        try:
            if file_sha256(path, trust_stored=False) != self._files[ARCHIVE].sha256:
                raise self._changed(ARCHIVE)
        except Absent as error:
            raise self._missing(ARCHIVE) from error
        try:
            return zipfile.ZipFile(path)
        except _DAMAGE as error:
            raise self._damaged(ARCHIVE, first_line(error)) from error

    @cached_property
    def _packed(self) -> dict[str, Entry]:
        """The objects in the archive. Raises: RunError for names that are no keys, or that occur twice."""
        found: dict[str, Entry] = {}
        for one in () if self._archive is None else self._archive.infolist():
            key = one.filename
            if not re.fullmatch(_KEY, key) or key in found or key in self._files:
                raise RunError(
                    f"{shown(self.uri)}/{ARCHIVE} is damaged: {one_line(key, 80)!r} is not a valid key, or occurs "
                    "twice; ask its author for another copy"
                )
            try:
                modified = datetime(*one.date_time, tzinfo=UTC).timestamp()
            except ValueError:  # day 0 of month 0
                modified = 0.0
            found[key] = Entry(key, one.file_size, modified)
        return found

    def _read_file(self, key: str, limit: int) -> bytes:
        """The bytes of a file of the index. Raises: UserError, RunError."""
        try:
            return self._read_any(key, limit)
        except Absent as error:
            raise self._missing(key) from error

    def _read_any(self, key: str, limit: int) -> bytes:
        """The bytes of a file. Raises: Absent, UserError, RunError."""
        if on_hub(self.uri):
            return read_regular(hub_file(f"{self._base}/{key}"), limit)
        return read_web(f"{self.uri}/{key}", limit) if is_remote(self.uri) else read_regular(Path(self.uri, key), limit)

    def _archive_path(self) -> Path:
        """The local file of the archive, fetched if it is not here. Raises: UserError, RunError."""
        try:
            if on_hub(self.uri):
                return hub_file(f"{self._base}/{ARCHIVE}")
            if not is_remote(self.uri):
                return Path(self.uri, ARCHIVE)
            # the fragment is not sent; with it, another version of the file is another entry of the cache
            sha256 = self._files[ARCHIVE].sha256
            return fetch(f"{self.uri}/{ARCHIVE}#{sha256}", sha256)
        except Absent as error:
            raise self._missing(ARCHIVE) from error
        except WrongHash as error:
            raise self._changed(ARCHIVE) from error


def write_published(
    folder: Path, read: Callable[[str], bytes], files: Iterable[str], packed: Sequence[Entry], threads: int
) -> None:
    """Write a run as it is published: `files` are keys of objects, `packed` are the objects of the archive.

    The same objects make the same bytes. Raises: what `read` raises.
    """
    written = {}
    for key in files:
        path, data = folder / key, read(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        written[key] = _File(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    path = folder / ARCHIVE
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for start in range(0, len(packed), _CHUNK):
            some = packed[start : start + _CHUNK]
            for entry, data in zip(some, in_parallel(lambda one: read(one.key), some, threads), strict=True):
                archive.writestr(_described(entry), data, zipfile.ZIP_DEFLATED)
    written[ARCHIVE] = _File(size=path.stat().st_size, sha256=file_sha256(path))
    (folder / INDEX).write_text(_Index(files=written).model_dump_json(indent=1) + "\n")


def _described(entry: Entry) -> zipfile.ZipInfo:
    when = datetime.fromtimestamp(max(entry.modified, _FIRST_TIME), UTC)
    one = zipfile.ZipInfo(entry.key, when.timetuple()[:6])
    one.create_system, one.external_attr = 3, 0o644 << 16  # as on Unix, whatever the system
    return one
