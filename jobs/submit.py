"""`diffsmooth submit`: a certification as a Ray job, what is sent to the cluster, and how the job ended.

The driver runs on the head of the cluster, so that it outlives this machine. Only specs and the modules of own
functions `package.module:function` are sent. The nodes fetch weights and data, and votes go to the run's storage.
"""

import asyncio
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import ray
import requests
import tomli_w
from pydantic import BaseModel
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from diffsmooth.jobs.costs import warn_of_cost
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.errors import RunError, UserError, one_line, redacted
from diffsmooth.pipeline.locations import in_store, is_relative, is_remote, shown
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.own import imported_names
from diffsmooth.pipeline.spec import LOCATIONS, RunSpec, locations_in

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 1.0
_UNREACHABLE_SECONDS = 300.0  # how long the cluster may be unreachable while a job is waited for
_STOP_SECONDS = 60  # from `ray job stop` to SIGKILL; Ray's own 3 s would cost the blocks in flight
_LIMIT = 50_000_000  # bytes that are sent
_STOPPED = 143
_SECRET_NAMES = ("SECRET", "TOKEN", "PASSW", "CREDENTIAL", "PRIVATE", "API_KEY", "APIKEY", "ACCESS_KEY")
_INSTALLED = "diffsmooth"  # on the cluster; a copy from here must not shadow it
_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
_DASHBOARD = "give the address of the dashboard, by default port 8265 of the head"


class SpecFile(NamedTuple):
    """A spec as it was named, its file, and whether it ships with the package and therefore need not be sent."""

    name: str
    file: Path
    shipped: bool


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request to certify on a cluster; `options` are flags of `diffsmooth certify` that are passed on unchanged."""

    specs: Sequence[SpecFile]
    out: str | None
    shared: bool = False  # whether `out` is a folder that all nodes share
    overrides: Sequence[str] = ()
    options: Sequence[str] = ()
    env: Sequence[str] = ()


class Submitted(NamedTuple):
    submission_id: str
    status: str


class _Versions(BaseModel):
    rayVersion: str | None = None
    pythonVersion: str | None = None


class _Metadata(BaseModel):
    data: _Versions = _Versions()


class _Node(BaseModel):
    hostname: str | None = None


class _NodeList(BaseModel):
    summary: list[_Node] = []


class _Nodes(BaseModel):
    data: _NodeList = _NodeList()


_Answer = TypeVar("_Answer", bound=BaseModel)


class JobServer:
    """The job server of a cluster that runs our versions of Ray and Python.

    Raises: UserError if there is no such server at the address.
    """

    def __init__(self, address: str | None) -> None:
        self._url = _normalise(address)
        self.address = shown(self._url)
        metadata = self._ask("/api/v0/cluster_metadata", _Metadata).data
        for name, here, there in (
            ("Ray", ray.__version__, metadata.rayVersion),
            ("Python", ".".join(map(str, sys.version_info[:3])), metadata.pythonVersion),
        ):
            if there is None:
                raise UserError(
                    f"--address {self.address}: not a Ray dashboard (no {name} version reported); {_DASHBOARD}"
                )
            if there.split(".")[:2] != here.split(".")[:2]:
                raise UserError(
                    f"the cluster at {self.address} runs {name} {one_line(there, 40)}, this machine {name} {here}; "
                    "submit from an environment with the cluster's versions, such as the image of its nodes"
                )
        # the client prefers RAY_ADDRESS to its argument, and this variable to both
        with _environment("RAY_API_SERVER_ADDRESS", self._url), self._errors():
            self.client = JobSubmissionClient(self._url)

    def is_here(self) -> bool:
        """Whether the cluster is this machine alone; a loopback address may also be a tunnel to another one."""
        if urlsplit(self._url).hostname not in ("127.0.0.1", "localhost", "::1"):
            return False
        nodes = self._ask("/nodes?view=summary", _Nodes).data.summary
        return bool(nodes) and all(node.hostname == socket.gethostname() for node in nodes)

    def submit(self, submission_id: str, command: Sequence[str], runtime_env: Mapping[str, Any]) -> None:
        with self._errors():
            self.client.submit_job(
                entrypoint=shlex.join(command), runtime_env=dict(runtime_env), submission_id=submission_id
            )

    def details(self, submission_id: str) -> JobDetails:
        with self._errors():
            return self.client.get_job_info(submission_id)

    def _ask(self, path: str, model: type[_Answer]) -> _Answer:
        try:
            answer = requests.get(self._url + path, headers=_token_headers(), timeout=_ANSWER_SECONDS)
        except (requests.RequestException, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"--address {self.address}: no Ray job server answers ({type(error).__name__}); {_DASHBOARD}"
            ) from error
        if answer.status_code in (401, 403):
            raise UserError(f"--address {self.address}: the cluster requires a token; {_TOKEN}")
        try:
            if answer.status_code == 200:
                return model.model_validate_json(answer.content)
        except ValueError:
            pass
        raise UserError(
            f"--address {self.address}: the server is not Ray's job server (HTTP status {answer.status_code}); "
            f"{_DASHBOARD}"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate the errors of Ray's client."""
        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"--address {self.address}: the cluster requires a token; {_TOKEN}") from error
        except (OSError, RuntimeError) as error:  # the exceptions of requests are OSErrors
            raise RunError(f"the job server at {self.address} failed: {one_line(error)}; try again") from error


def submit(
    address: str | None, submission: Submission, confirm: Callable[[str], None] = logger.warning
) -> tuple[JobServer, Submitted]:
    """Check everything that can be checked from here, then submit the job.

    `confirm` is called with a warning if many GPU-hours are needed.

    Raises: UserError, RunError.
    """
    specs = [load_named(str(one.file), submission.overrides) for one in submission.specs]
    _refuse_secrets(submission)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"several specs would share a run, their names are {', '.join(names)}; rename the specs")
    warn_of_cost([(spec, None) for spec in specs], confirm)
    env_vars = _environment_of(submission.env)
    server = JobServer(address)
    here = server.is_here()
    out = _reachable_out(submission, names, server.address, here=here)
    overrides = [_anchored(override, here) for override in submission.overrides]
    submission_id = f"diffsmooth-{names[0]}-{os.urandom(4).hex()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sent = [
            one.name if one.shipped else _ship_spec(one.file, spec.name, folder, here)
            for one, spec in zip(submission.specs, specs, strict=True)
        ]
        _ship_own_functions(specs, folder)
        runtime_env: dict[str, Any] = {"env_vars": env_vars}
        if _check_size(folder):
            runtime_env["working_dir"] = str(folder)
        logging.getLogger("ray").setLevel(logging.WARNING)  # Ray logs every package and websocket
        command = ["diffsmooth", "certify", *sent, "--out", out, *submission.options]
        command += [part for override in overrides for part in ("--set", override)]
        server.submit(submission_id, command, runtime_env)
    return server, Submitted(submission_id, JobStatus.PENDING.value)  # asking could fail and hide the id


def _refuse_secrets(submission: Submission) -> None:
    """Raise UserError for a location with a password or a signature: Ray stores commands and files of jobs unencrypted,
    and shows them to everyone who may read its dashboard."""
    sent = [("--set", override) for override in submission.overrides]
    sent += [("--out", submission.out or "")]
    for one in submission.specs:
        raw = tomllib.loads(one.file.read_text(encoding="utf-8"))
        sent += [(name, table[key]) for name, table, key in locations_in(raw)]
    for name, text in sent:
        if redacted(text) != text:
            raise UserError(
                f"{name} {text}: all users of the cluster could read the password or the signature in this location; "
                "set it in the environment of the nodes, and write the location with ${NAME}"
            )


def how_to(server: JobServer, submission_id: str) -> list[str]:
    """What a user can do with a submitted job."""
    at = f"--address {server.address}"
    return [
        f"{submission_id}: submitted to {server.address}",
        f"  logs    ray job logs {at} --follow {submission_id}",
        f"  stop    ray job stop {at} {submission_id}",
        "  resume  submit it again with the same --out; blocks that exist are not computed again",
    ]


def follow(server: JobServer, submission_id: str, write: Callable[[str], None]) -> None:
    """Pass the driver's log to `write` as it grows, until the job ends or the stream is lost."""

    async def tail() -> None:
        async for lines in server.client.tail_job_logs(submission_id):
            write(lines)

    try:
        asyncio.run(tail())
    except (OSError, RuntimeError) as error:
        logger.warning("log stream lost (%s); still waiting for the job", type(error).__name__)


def wait(server: JobServer, submission_id: str) -> tuple[Submitted, int]:
    """Wait for the end of a job; returns its status and the exit status of its driver.

    Raises: RunError if the cluster stays unreachable.
    """
    reached = time.monotonic()
    while True:
        try:
            details = server.details(submission_id)
        except RunError:
            if time.monotonic() - reached > _UNREACHABLE_SECONDS:
                raise
        else:
            reached = time.monotonic()
            if details.status.is_terminal():
                return Submitted(submission_id, details.status.value), _exit_status(details)
        time.sleep(_POLL_SECONDS)


def _exit_status(details: JobDetails) -> int:
    """The exit status of the driver. A stopped job has none, and counts as stopped by SIGTERM."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return _STOPPED
    code = details.driver_exit_code
    last = one_line((details.message or "no message").strip().splitlines()[-1])
    if code is None:
        raise RunError(f"the job did not run: {last}; see the cluster's log, and submit again")
    logger.error("the job ended with exit status %d: %s", code, last.removeprefix("diffsmooth: "))
    return code if code > 0 else 128 - code


def _normalise(address: str | None) -> str:
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("--address is missing; give the cluster's dashboard, such as --address http://HEAD:8265")
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"--address {shown(address)}: not the address of a dashboard; use the form http://HEAD:8265")
    return address.rstrip("/")


def _token_headers() -> dict[str, str]:
    """The cluster's token, if RAY_AUTH_MODE is token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token:
        try:
            token = path.read_text().strip()
        except (OSError, ValueError) as error:
            raise UserError(f"RAY_AUTH_MODE is token, but {shown(str(path))} cannot be read; {_TOKEN}") from error
    return {"Authorization": f"Bearer {token}"}


def _environment_of(requested: Sequence[str]) -> dict[str, str]:
    """The job's environment variables: ours, and the requested NAME (with its value here) or NAME=VALUE."""
    found = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
    for one in requested:
        name, equals, value = one.partition("=")
        if not name.isidentifier():
            raise UserError(f"--env {one_line(name)!r} is not the name of a variable; write NAME or NAME=VALUE")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name}: the variable is not set here; set it, or write {name}=VALUE")
            value = os.environ[name]
        if any(word in name.upper() for word in _SECRET_NAMES) or redacted(value) != value:
            logger.warning(
                "%s will be visible to all users of the cluster's dashboard; prefer a role of the nodes", name
            )
        found[name] = value
    return found


def _reachable_out(submission: Submission, names: Sequence[str], address: str, *, here: bool) -> str:
    """Where the cluster writes the run: in an object store, a folder that all nodes share, or one of this machine."""
    out = submission.out
    if out is not None and in_store(out):
        return out
    if out is not None and is_remote(out):
        raise UserError(
            f"--out {shown(out)}: a run is written to an object store; give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or "
            "az://CONTAINER/PREFIX"
        )
    if here:
        return str(Path(out or ("runs" if len(names) > 1 else f"runs/{names[0]}")).absolute())
    if out is None:
        raise UserError(
            f"--out is missing, and the nodes of {address} need one place for the run; give s3://BUCKET/PREFIX"
        )
    if submission.shared and Path(out).is_absolute():
        return out
    raise UserError(
        f"--out {shown(out)}: each node of {address} would write to a folder of its own, and the votes would be lost "
        "with the nodes; give s3://BUCKET/PREFIX, or an absolute path that all nodes share together with --shared"
    )


def _warn_if_not_sent(key: str, location: str, here: bool) -> None:
    if not here:
        logger.warning(
            "WARNING: %s = %s is not sent; copy it to that path on every node, or use s3:// or https://", key, location
        )


def _anchored(override: str, here: bool) -> str:
    """An override. A relative location in it becomes an absolute path of this machine."""
    key, equals, text = override.partition("=")
    if not equals or key.strip() not in LOCATIONS:
        return override
    try:
        location = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        location = text
    if not isinstance(location, str) or not is_relative(location):
        return override
    location = str(Path.cwd() / location)
    _warn_if_not_sent(key.strip(), location, here)
    return f"{key}={json.dumps(location, ensure_ascii=False)}"


def _ship_spec(file: Path, name: str, folder: Path, here: bool) -> str:
    """Copy a spec, its relative locations made absolute paths of this machine; returns the name of the copy."""
    raw = tomllib.loads(file.read_text(encoding="utf-8"))
    for where, table, key in locations_in(raw):
        if is_relative(table[key]):
            table[key] = str(file.resolve().parent / table[key])
            _warn_if_not_sent(where, table[key], here)
    (folder / f"{name}.toml").write_text(tomli_w.dumps(raw), encoding="utf-8")
    return f"{name}.toml"


def _ship_own_functions(specs: Sequence[RunSpec], folder: Path) -> None:
    for arch in {arch for spec in specs for arch in (spec.denoiser.arch, spec.classifier.arch) if is_own(arch)}:
        _ship_module(arch.partition(":")[0], Path.cwd(), folder)


def _ship_module(module: str, root: Path, folder: Path) -> None:
    """Copy a module of the working folder, the packages that contain it, and what it imports from the working folder.

    Imports are parsed, not run. Modules outside the working folder are assumed to be installed on the cluster.
    """
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.split(".")[0] == _INSTALLED:
            continue
        seen.add(name)
        waiting.extend([name.rpartition(".")[0]] if "." in name else [])
        path = root.joinpath(*name.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not source.is_file():
            continue
        target = folder / source.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        waiting.extend(imported_names(source, package=name if path.is_dir() else name.rpartition(".")[0]))


def _check_size(folder: Path) -> int:
    """The number of files to send. Raises: UserError if they are too large."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    size = sum(path.stat().st_size for path in files)
    if size > _LIMIT:
        largest = ", ".join(f"{path.relative_to(folder)} ({_bytes(path.stat().st_size)})" for path in files[:3])
        raise UserError(
            f"the specs and modules to send are {_bytes(size)}, the limit is {_bytes(_LIMIT)}, the largest are "
            f"{largest}; install the modules in the cluster's image"
        )
    logger.info("sending %d files (%s): specs and own modules only", len(files), _bytes(size))
    return len(files)


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the duration of the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
