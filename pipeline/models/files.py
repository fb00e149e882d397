"""The files that networks are made of: found, identified by sha256, and parsed. Imports no torch.

A location is a path, an s3:// or https:// URI (see `storage.fetch`), or `embedded:FILE` (shipped with the package).
`#NAME` after a location selects one of several networks in a file.
"""

import contextlib
import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.locations import EMBEDDED, embedded_path
from diffsmooth.pipeline.storage.fetch import fetch, fetch_first, file_sha256, remedy

_SHOWN = 200  # characters of a location or a reason in a message


class Config(BaseModel):
    """The keys of a library's JSON file that we use; other keys are allowed and ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


ConfigT = TypeVar("ConfigT", bound=Config)


def local_file(location: str) -> tuple[Path, str]:
    """Return the local file at a location and the name of the network after '#'.

    Raises: UserError if there is no such file, or if it is not a regular file.
    """
    name, _, network = location.partition("#")
    if name.startswith(EMBEDDED):
        return embedded_path(name), network
    try:
        return fetch(name), network
    except UserError as error:
        raise UserError(f"checkpoint {error}") from error
    except OSError as error:
        raise unreadable(name, error) from error


def again(location: str) -> str:
    """The end of a message about a file that is damaged or not the right one: how to download it again."""
    name = location.partition("#")[0]
    return "" if name.startswith(EMBEDDED) else remedy(name)


def unreadable(location: str, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(f"checkpoint {location[:_SHOWN]}: cannot be read ({reason})")


def first_file(candidates: Sequence[str]) -> str:
    """Return the local path of the first of several locations that exists.

    Raises: UserError if none exists.
    """
    try:
        return str(fetch_first(candidates))
    except OSError as error:
        raise unreadable(candidates[0], error) from error


def weights_id(location: str, expected_sha256: str | None = None) -> str:
    """Return what votes_id calls the file at `location`: its sha256, followed by `#NAME` if one is given.

    Raises: UserError for a missing file or a sha256 that differs from the expected one.
    """
    path, network = local_file(location)
    try:
        found = file_sha256(path, trust_stored=expected_sha256 is None)
    except OSError as error:
        raise unreadable(location, error) from error
    if expected_sha256 is not None and found != expected_sha256:
        raise UserError(
            f"checkpoint {location}: its sha256 is {found}, but the spec expects {expected_sha256}{again(location)}"
        )
    return f"{found}#{network}" if network else found


def load_json(location: str) -> dict[str, Any]:
    """Return the JSON object in a library's configuration file.

    Raises: UserError if it is missing, damaged, or not an object.
    """
    path, _ = local_file(location)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(location, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {location}: not valid JSON ({first_line(error)}){again(location)}") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {location}: holds a JSON {type(content).__name__}, not an object{again(location)}")
    return content


def parse_config(model: type[ConfigT], content: Mapping[str, Any], location: str) -> ConfigT:
    """Validate the keys of a configuration that we use. Raises: UserError, naming the first wrong key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        finding = error.errors()[0]
        key = ".".join(map(str, finding["loc"])) or "content"
        raise UserError(f"checkpoint {location}: {key}: {finding['msg']}") from error


@contextlib.contextmanager
def as_folder(files: Mapping[str, str]) -> Iterator[Path]:
    """Provide a temporary folder of links to files; `files` maps each name in the folder to a location."""
    with tempfile.TemporaryDirectory() as folder:
        for name, location in files.items():
            (Path(folder) / name).symlink_to(local_file(location)[0].resolve())
        yield Path(folder)


def library(package: str, name: str) -> Any:
    """Return an attribute of a package that only some models need. Raises: UserError if it is not installed."""
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError:
        raise UserError(f"the models of this spec need {package}; run: pip install 'diffsmooth[models]'") from None


@contextlib.contextmanager
def library_errors(location: str) -> Iterator[None]:
    """Turn whatever a library raises about a file, such as a TypeError for a strange value, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries do not document what they raise for damaged files
        raise UserError(
            f"checkpoint {location}: cannot be used ({type(error).__name__}: {first_line(error)}){again(location)}"
        ) from error
