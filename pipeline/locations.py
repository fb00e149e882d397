"""Locations: how a path or a URI is written in a spec or on the command line, and how a message shows it.

A location is a path, `embedded:FILE` (a file that ships with the package), or a URI (s3://BUCKET/KEY, gs://BUCKET/KEY,
az://CONTAINER/KEY, https://...). `${NAME}` is replaced by an environment variable. A relative path starts at the folder
of the spec that names it.
"""

import os
import re
from importlib import resources
from pathlib import Path

from diffsmooth.pipeline.errors import UserError, one_line

EMBEDDED = "embedded:"
_STORES = ("s3", "gs", "az")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def resolve(location: str, folder: Path) -> str:
    """Expand environment variables and `~` in a location, and join a relative path to `folder`.

    Variables that are not set are left in place; `require_set` refuses them when the location is needed.
    """
    expanded = os.path.expanduser(_VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), location))
    return str(folder / expanded) if is_relative(expanded) else expanded


def require_set(key: str, location: str) -> str:
    """Return the location if all its environment variables were set when the spec was read.

    Raises: UserError that names the variable and the spec's key.
    """
    unset = _VARIABLE.search(location)
    if unset:
        raise UserError(
            f"{key} = {shown(location)!r}: the environment variable {unset[1]} is not set; "
            f"set it, or use --set {key}=PATH"
        )
    return location


def is_remote(location: str) -> bool:
    return "://" in location


def in_store(location: str) -> bool:
    """Whether the location is one in an object store."""
    return location.partition("://")[0] in _STORES and is_remote(location)


def split_object(uri: str, wanted: str = "") -> tuple[str, str, str]:
    """The scheme, the bucket and the key of an s3://, gs:// or az:// URI.

    `wanted` names the key in the message for a URI without one; if it is empty, there need not be a key.
    Raises: UserError for a missing key and for a name that no bucket can have.
    """
    scheme, _, place = uri.partition("://")
    bucket, _, key = place.partition("/")
    written = f"{scheme}://{'CONTAINER' if scheme == 'az' else 'BUCKET'}/{wanted or 'KEY'}"
    if not bucket or (wanted and not key.strip("/")):
        raise UserError(f"{shown(uri)}: a bucket or a key is missing; write {written}")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"{shown(uri)}: no bucket can have the name {bucket!r}; write {written}")
    return scheme, bucket, key


def is_relative(location: str) -> bool:
    """Whether the location is a path that depends on a folder."""
    return not is_remote(location) and not location.startswith((EMBEDDED, "${", "~")) and not os.path.isabs(location)


def embedded_path(location: str) -> Path:
    """The file that `embedded:FILE` names. Raises: UserError unless it is a file that ships with the package."""
    name = location.removeprefix(EMBEDDED)
    folder = Path(str(resources.files("diffsmooth.pipeline.embedded")))
    shipped = sorted(path.name for path in folder.iterdir() if path.suffix in (".parquet", ".safetensors"))
    if name not in shipped:
        raise UserError(
            f"{shown(location)}: no such embedded file; use one of {', '.join(EMBEDDED + one for one in shipped)}"
        )
    return folder / name


def shown(location: str) -> str:
    """A location as a message may show it: on one line, without user, password and query.

    A query is hidden because it may hold a signature or a token.
    """
    if not is_remote(location):
        return one_line(location)
    scheme, _, rest = location.partition("://")
    place, query, _ = rest.partition("?")
    host, slash, path = place.partition("/")
    return one_line(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?...' if query else ''}")
