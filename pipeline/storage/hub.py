"""Files of the Hugging Face Hub: hf://ORG/REPO[@REVISION]/FILE, and hf://datasets/ORG/NAME[@REVISION]/FILE.

huggingface_hub keeps them in a cache that other tools share (HF_HOME), and resumes and verifies downloads. It obeys
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. A file of another revision is another file of that cache.
"""

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.locations import shown
from diffsmooth.pipeline.storage.folder import Absent
from diffsmooth.pipeline.storage.remote import Refused

logger = logging.getLogger(__name__)

T = TypeVar("T")

_URI = re.compile(
    r"""hf://(?:(?P<kind>datasets|models)/)?(?P<repo>[\w.-]+/[\w.-]+)
        (?:@(?P<revision>refs/(?:convert|pr)/\w+|[^/@]+))?(?:/(?P<file>[^\0]*))?""",
    re.VERBOSE,
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a repository, in the order of preference


class _Place(NamedTuple):
    repo: dict[str, str | None]  # the keywords by which huggingface_hub names a repository and its revision
    file: str

    @property
    def repository(self) -> str:
        """Its path on the Hub, as in hf:// locations."""
        kind = "datasets/" if self.repo["repo_type"] == "dataset" else ""
        return f"{kind}{self.repo['repo_id']}"

    @property
    def name(self) -> str:
        return f"{self.repo['repo_id']}@{self.repo['revision'] or 'main'}"


def on_hub(location: str) -> bool:
    """Whether the location is one of the Hugging Face Hub."""
    return location.startswith("hf://")


def hub_file(uri: str) -> Path:
    """The local file of an hf:// URI, downloaded unless the Hub's cache has it; without a FILE, the model's weights.

    Raises: UserError for a repository, a revision or a file that does not exist or may not be read, RunError for a
    Hub that cannot be reached.
    """
    place = _place(uri)
    download = _library(uri).hf_hub_download
    if not place.file:
        for name in _WEIGHTS:
            try:
                return hub_file(f"{uri.rstrip('/')}/{name}")
            except Absent:
                continue
        raise Absent(f"{shown(uri)}: contains neither {' nor '.join(_WEIGHTS)}; write hf://ORG/REPO/FILE")
    path = Path(_call(uri, lambda: download(filename=place.file, endpoint=_endpoint(), **place.repo)))
    logger.info("%s is in commit %s", shown(uri), _commit(place, path))
    return path


def pinned(uri: str, path: Path) -> str:
    """The hf:// URI of a FILE in the commit that `path`, which `hub_file` returned for it, belongs to."""
    place = _place(uri)
    return f"hf://{place.repository}@{_commit(place, path)}/{place.file}"


def _commit(place: _Place, path: Path) -> str:
    """The commit in whose folder of the cache a file is."""
    return path.parts[-1 - len(Path(place.file).parts)]


def cached_commits(uris: Iterable[str]) -> dict[str, str]:
    """The commit that this node's cache has of each hf:// URI, without asking the Hub; those it lacks are left out."""
    found = {}
    for uri in filter(on_hub, uris):
        place, cache = _place(uri), Path(_library(uri).constants.HF_HUB_CACHE)
        revision = place.repo["revision"] or "main"
        name_of = importlib.import_module("huggingface_hub.file_download").repo_folder_name
        folder = cache / name_of(repo_id=place.repo["repo_id"], repo_type=place.repo["repo_type"])
        if (folder / "snapshots" / revision).is_dir():
            found[uri] = revision
        elif (named := folder / "refs" / revision).is_file():
            found[uri] = named.read_text().strip()
    return found


def hub_files(uri: str) -> list[str]:
    """The URIs of the files of a repository below a folder, sorted. Offline, those in the Hub's cache.

    Raises: as `hub_file` does.
    """
    place, library = _place(uri), _library(uri)
    if library.constants.HF_HUB_OFFLINE:
        root = _call(uri, lambda: library.snapshot_download(local_files_only=True, **place.repo))
        found = [str(one.relative_to(root)) for one in Path(root).rglob("*") if one.is_file()]
    else:
        found = _call(uri, lambda: library.HfApi(endpoint=_endpoint()).list_repo_files(**place.repo))
    start = f"{place.file}/" if place.file else ""
    base = uri.rstrip("/").removesuffix(f"/{place.file}") if place.file else uri.rstrip("/")
    return sorted(f"{base}/{name}" for name in found if name.startswith(start))


def check_repository(uri: str, *, of_data: bool) -> None:
    """Raise UserError unless an hf:// URI names a repository of the given kind, and perhaps a folder in it."""
    if (_place(uri).repo["repo_type"] == "dataset") != of_data:
        kind, written = ("data set", "hf://datasets/ORG/NAME") if of_data else ("model", "hf://ORG/NAME")
        raise UserError(f"{shown(uri)}: not the repository of a {kind}; write {written}")


def page_of(uri: str) -> str:
    """The web page of a repository."""
    return f"https://huggingface.co/{_place(uri).repository}"


def commit_files(uri: str, files: Mapping[str, Path], message: str, *, as_pull_request: bool) -> str:
    """Add files to a repository, below the folder that `uri` names; returns the page of the pull request or commit.

    `files` are their names in the repository. Raises: UserError for a repository that does not exist or may not be
    written, RunError for a Hub that cannot be reached.
    """
    place, library = _place(uri), _library(uri)
    start = f"{place.file}/" if place.file else ""
    added = [library.CommitOperationAdd(f"{start}{name}", str(path)) for name, path in files.items()]
    repo_id, repo_type, revision = (place.repo[key] for key in ("repo_id", "repo_type", "revision"))

    def commit() -> str:
        try:
            done = library.HfApi(endpoint=_endpoint()).create_commit(
                repo_id, added, commit_message=message, repo_type=repo_type, revision=revision,
                create_pr=as_pull_request,
            )  # fmt: skip
        except importlib.import_module("huggingface_hub.errors").RepositoryNotFoundError as error:
            raise Refused(
                f"{shown(uri)}: there is no {repo_type} {repo_id}, or the token does not see it; create it (hf repos "
                f"create {repo_id} --type {repo_type}), and set HF_TOKEN to a token that may write"
            ) from error
        return str(done.pr_url or done.commit_url)

    return _call(uri, commit, "written")


def in_hub_cache(uri: str) -> bool:
    """Whether `hub_file` would have nothing to download."""
    place, library = _place(uri), _library(uri)
    names = [place.file] if place.file else _WEIGHTS
    return any(isinstance(library.try_to_load_from_cache(filename=name, **place.repo), str) for name in names)


def _place(uri: str) -> _Place:
    found = _URI.fullmatch(uri)
    if found is None:
        raise UserError(
            f"{shown(uri)}: not a place on the Hub; write hf://ORG/REPO/FILE, hf://ORG/REPO@REVISION/FILE or "
            "hf://datasets/ORG/NAME/FILE"
        )
    kind = "dataset" if found["kind"] == "datasets" else "model"
    repo = {"repo_id": found["repo"], "repo_type": kind, "revision": found["revision"]}
    return _Place(repo, (found["file"] or "").strip("/"))


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now: huggingface_hub reads it when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _library(uri: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(
            f"{shown(uri)}: needs the package huggingface_hub; run: pip install 'diffsmooth[models]'"
        ) from None


def _call(uri: str, call: Callable[[], T], done: str = "downloaded") -> T:
    with _hub_errors(uri, done):
        return call()


@contextmanager
def _hub_errors(uri: str, done: str) -> Iterator[None]:
    """Translate the errors of huggingface_hub. Raises: Absent, Refused, UserError, RunError."""
    place, errors = shown(uri), importlib.import_module("huggingface_hub.errors")
    name, token = _place(uri).name, "set HF_TOKEN, or run: hf auth login"
    try:
        yield
    except (UserError, RunError):
        raise
    except errors.GatedRepoError as error:
        raise Refused(f"{place}: {name} is gated; accept its conditions on its page, and {token}") from error
    except errors.RepositoryNotFoundError as error:
        raise Refused(f"{place}: there is no {name}, or it is private; if it is private, {token}") from error
    except errors.RevisionNotFoundError as error:
        raise Refused(f"{place}: there is no revision {name}") from error
    except errors.LocalEntryNotFoundError as error:
        if _library(uri).constants.HF_HUB_OFFLINE:
            raise Absent(f"{place}: not in the Hub's cache; unset HF_HUB_OFFLINE to download it") from error
        raise RunError(
            f"{place}: cannot reach the Hub; check the network and HF_ENDPOINT, and run the same command again"
        ) from error
    except errors.EntryNotFoundError as error:
        raise Absent(f"{place}: there is no such file in {name}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{place}: {first_line(error)}") from error
    except Exception as error:  # of the HTTP library, of Xet, of the disk: huggingface_hub does not document them
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise Refused(f"{place}: access denied ({status}); {token}") from error
        reason = f"the Hub answered {status}" if status else f"{type(error).__name__}: {first_line(error)}"
        raise RunError(
            f"{place}: cannot be {done} ({reason}); check the network, HF_ENDPOINT and the disk, and run the same "
            "command again"
        ) from error
