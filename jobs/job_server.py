"""The job server of a Ray cluster: submit a job, follow it, and how it ended. Only this module of jobs/ imports Ray."""

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
import requests
from pydantic import BaseModel
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from diffsmooth.pipeline.errors import RunError, UserError, one_line
from diffsmooth.pipeline.locations import shown

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 1.0
_UNREACHABLE_SECONDS = 300.0  # how long the cluster may be unreachable while a job is waited for
_STOPPED = 143
_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
_DASHBOARD = "give the address of the dashboard, by default port 8265 of the head"


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted, and its last known status."""

    submission_id: str
    status: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


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

    def submit(self, submission_id: str, command: Sequence[str], runtime_env: Mapping[str, Any]) -> Submitted:
        logging.getLogger("ray").setLevel(logging.WARNING)  # Ray logs every package and websocket
        with self._errors():
            self.client.submit_job(
                entrypoint=shlex.join(command), runtime_env=dict(runtime_env), submission_id=submission_id
            )
        return Submitted(submission_id, JobStatus.PENDING.value)  # asking could fail and hide the id

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
        raise UserError(f"--address {shown(address)}: not the address of a dashboard, such as http://HEAD:8265")
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
