"""Locations: how a path or a URI is written in a spec or on the command line, and how a message shows it.

A location is a path, `embedded:FILE` (shipped with the package), or a URI (s3://BUCKET/KEY, https://...). `${NAME}`
stands for an environment variable. A relative path counts from the folder of the spec that names it.
"""

import os
import re
from importlib import resources
from pathlib import Path

from pipeline.errors import UserError

EMBEDDED = "embedded:"
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def resolve(location: str, folder: Path) -> str:
    """A location with environment variables and `~` expanded and, if it is a relative path, joined to `folder`.

    Variables that are not set stay as they are: `require_set` refuses them once the location is needed.
    """
    expanded = os.path.expanduser(_VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), location))
    return str(folder / expanded) if is_relative(expanded) else expanded


def require_set(key: str, location: str) -> str:
    """The location, if all environment variables in it were set when the spec was read.

    Raises: UserError naming the variable and the spec's key.
    """
    unset = _VARIABLE.search(location)
    if unset:
        raise UserError(
            f"{key} = {location!r}: the environment variable {unset[1]} is not set; set it, or use --set {key}=PATH"
        )
    return location


def is_remote(location: str) -> bool:
    return "://" in location


def is_relative(location: str) -> bool:
    """Whether the location is a path that depends on a folder."""
    return not is_remote(location) and not location.startswith((EMBEDDED, "${", "~")) and not os.path.isabs(location)


def embedded_path(location: str) -> Path:
    """The file that `embedded:FILE` names. Raises: UserError unless it is a file that ships with the package."""
    name = location.removeprefix(EMBEDDED)
    folder = Path(str(resources.files("pipeline.embedded")))
    shipped = sorted(path.name for path in folder.iterdir() if path.suffix in (".parquet", ".safetensors"))
    if name not in shipped:
        raise UserError(
            f"{location[:200]}: no such embedded file; use one of {', '.join(EMBEDDED + one for one in shipped)}"
        )
    return folder / name


def shown(location: str) -> str:
    """A location as a message may show it: without user, password, and query, which may hold a signature."""
    if not is_remote(location) or location.startswith("s3://"):
        return location
    scheme, _, rest = location.partition("://")
    place, query, _ = rest.partition("?")
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?...' if query else ''}"
