"""A certification as a Ray job: what travels to the cluster, what is checked before, and how the job ended.

The driver runs on the cluster's head, so that it outlives this machine. Only specs and the modules of an own
`package.module:function` travel; weights and data are fetched by the nodes, votes go to the run's storage.
"""

import ast
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
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.certify import warn_of_cost
from pipeline.errors import RunError, UserError
from pipeline.spec import RunSpec, load_spec

logger = logging.getLogger(__name__)

_KNOCK_SECONDS = 5.0
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 300.0  # how long the cluster may be out of reach while a job is waited for
_STOP_SECONDS = 60  # from `ray job stop` to SIGKILL; Ray's own 3 s would cost the blocks in flight
_LIMIT = 50_000_000  # bytes of the working folder
_STOPPED = 143
_OURS = ("pipeline", "cluster", "jobs")  # installed on the cluster; never shadowed by copies from here
_LOCATIONS = (("data", "path"), ("denoiser", "checkpoint"), ("classifier", "checkpoint"))
_TOKEN = "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) with the cluster's token"


class Order(NamedTuple):
    """What is asked for; `options` are flags of `diffsmooth certify`, passed on as they are."""

    specs: list[tuple[str, Path, bool]]  # as it was named, its file, whether it ships with the package
    out: str | None
    shared: bool  # --out is a folder that every node sees
    overrides: tuple[str, ...]
    options: list[str]
    env: tuple[str, ...]


class Submitted(NamedTuple):
    submission_id: str
    status: str


class Cluster:
    """A cluster's job server, found to be there and to run our Ray and Python.

    Raises: UserError.
    """

    def __init__(self, address: str | None) -> None:
        self.address = _normalise(address)
        metadata = self._ask("/api/v0/cluster_metadata").get("data", {})
        ours = {"Ray": ray.__version__, "Python": ".".join(map(str, sys.version_info[:3]))}
        theirs = {"Ray": metadata.get("rayVersion"), "Python": metadata.get("pythonVersion")}
        for name, version in ours.items():
            other = theirs[name]
            if other is None:
                raise UserError(
                    f"--address {self.address}: no Ray that tells its {name} version answers there; give the "
                    "dashboard's, by default port 8265 of the head"
                )
            if other.split(".")[:2] != version.split(".")[:2]:
                raise UserError(
                    f"the cluster at {self.address} runs {name} {other}, this machine {name} {version}: submit from "
                    f"an environment with the cluster's, say the image that its nodes run"
                )
        with _environment("RAY_API_SERVER_ADDRESS", self.address), self._named():  # it outranks RAY_ADDRESS
            self.client = JobSubmissionClient(self.address)

    def is_here(self) -> bool:
        """Whether the cluster is this machine alone; a loopback address may be a tunnel to another."""
        if urlsplit(self.address).hostname not in ("127.0.0.1", "localhost", "::1"):
            return False
        nodes = self._ask("/nodes?view=summary").get("data", {}).get("summary", [])
        return bool(nodes) and all(node.get("hostname") == socket.gethostname() for node in nodes)

    def submit(self, **job: Any) -> None:
        with self._named():
            self.client.submit_job(**job)

    def details(self, submission_id: str) -> JobDetails:
        with self._named():
            return self.client.get_job_info(submission_id)

    def _ask(self, path: str) -> dict[str, Any]:
        try:
            answer = requests.get(self.address + path, headers=_token_headers(), timeout=_KNOCK_SECONDS)
        except requests.RequestException as error:
            raise UserError(
                f"--address {self.address}: no Ray job server answers there ({type(error).__name__}); give the "
                "dashboard's, by default port 8265 of the head"
            ) from error
        if answer.status_code in (401, 403):
            raise UserError(f"--address {self.address}: the cluster wants a token: {_TOKEN}")
        try:
            found = answer.json()
        except ValueError:
            found = None
        if answer.status_code != 200 or not isinstance(found, dict):
            raise UserError(
                f"--address {self.address}: something else than Ray's job server answers there (HTTP status "
                f"{answer.status_code}); give the dashboard's, by default port 8265 of the head"
            )
        return found

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn failures of Ray's client into one line each."""
        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"--address {self.address}: the cluster wants a token: {_TOKEN}") from error
        except (OSError, RuntimeError) as error:  # requests' exceptions are OSErrors
            raise RunError(
                f"the job server at {self.address} failed: {str(error).strip().splitlines()[0]}; try again"
            ) from error


def submit(
    address: str | None, order: Order, confirm: Callable[[str], None] = logger.warning
) -> tuple[Cluster, Submitted]:
    """Check everything that can be checked from here, then hand the job to the cluster.

    `confirm` is told of an order of many GPU-hours, as `certify_all`'s is.

    Raises: UserError, RunError.
    """
    specs = [load_spec(file, order.overrides) for _, file, _ in order.specs]
    if len({spec.name for spec in specs}) < len(specs):
        raise UserError("several specs of one name would share a run: give each a name of its own")
    warn_of_cost([(spec, None) for spec in specs], confirm)
    env_vars = _environment_of(order.env)
    cluster = Cluster(address)
    here = cluster.is_here()
    out = _reachable_out(order.out, here=here, shared=order.shared, address=cluster.address, specs=specs)
    overrides = [_anchored(override, here) for override in order.overrides]
    submission_id = f"diffsmooth-{specs[0].name}-{os.urandom(4).hex()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [
            given if shipped else _ship_spec(file, spec.name, folder, here)
            for (given, file, shipped), spec in zip(order.specs, specs, strict=True)
        ]
        for arch in {arch for spec in specs for arch in (spec.denoiser.arch, spec.classifier.arch) if _is_own(arch)}:
            _ship_module(arch.partition(":")[0], Path.cwd(), folder)
        files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
        size = sum(path.stat().st_size for path in files)
        if size > _LIMIT:
            largest = ", ".join(f"{path.relative_to(folder)} ({_bytes(path.stat().st_size)})" for path in files[:3])
            raise UserError(
                f"the specs and modules to send have {_bytes(size)}, the limit is {_bytes(_LIMIT)}; the largest: "
                f"{largest}; install the modules in the cluster's image instead"
            )
        logger.info("sending %d file(s), %s: specs and own modules only", len(files), _bytes(size))
        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every package and websocket
        command = ["diffsmooth", "certify", *names, "--out", out, *order.options]
        command += [part for override in overrides for part in ("--set", override)]
        runtime_env: dict[str, Any] = {"env_vars": env_vars}
        if files:
            runtime_env["working_dir"] = str(folder)
        cluster.submit(entrypoint=shlex.join(command), runtime_env=runtime_env, submission_id=submission_id)
    return cluster, Submitted(submission_id, JobStatus.PENDING.value)  # no question that could fail and hide the id


def how_to(cluster: Cluster, submission_id: str) -> list[str]:
    """What a user can do with a job that was accepted."""
    at = f"--address {cluster.address}"
    return [
        f"{submission_id}: accepted by {cluster.address}",
        f"  logs    ray job logs {at} --follow {submission_id}",
        f"  stop    ray job stop {at} {submission_id}",
        "  resume  submit it again with the same --out: blocks that stand are not computed again",
    ]


def follow(cluster: Cluster, submission_id: str, write: Callable[[str], None]) -> None:
    """Hand the driver's log to `write` as it comes, until the job has ended or the stream breaks."""

    async def tail() -> None:
        async for lines in cluster.client.tail_job_logs(submission_id):
            write(lines)

    try:
        asyncio.run(tail())
    except (OSError, RuntimeError) as error:
        logger.warning("the log broke off (%s); the job goes on and is waited for", type(error).__name__)


def wait(cluster: Cluster, submission_id: str) -> tuple[Submitted, int]:
    """Wait for the job's end; returns how it ended and the exit status of its driver.

    Raises: RunError where the cluster stays out of reach.
    """
    reached = time.monotonic()
    while True:
        try:
            details = cluster.details(submission_id)
        except RunError:
            if time.monotonic() - reached > _PATIENCE_SECONDS:
                raise
        else:
            reached = time.monotonic()
            if details.status.is_terminal():
                return Submitted(submission_id, details.status.value), _exit_status(details)
        time.sleep(_POLL_SECONDS)


def _exit_status(details: JobDetails) -> int:
    """The driver's own; a stopped job has none, and counts as stopped by SIGTERM."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return _STOPPED
    code = details.driver_exit_code
    last = (details.message or "no message").strip().splitlines()[-1]
    if code is None:
        raise RunError(f"the job never ran: {last}; look into the cluster's log, and submit again")
    logger.error("the job ended with exit status %d: %s", code, last.removeprefix("diffsmooth: "))
    return code if code > 0 else 128 - code


def _normalise(address: str | None) -> str:
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("--address is missing: give the cluster's dashboard, say --address http://HEAD:8265")
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    try:
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        wrong = True
    if wrong:
        raise UserError(f"--address {address}: not the address of a dashboard; write, say, http://HEAD:8265")
    return address.rstrip("/")


def _token_headers() -> dict[str, str]:
    """The cluster's token, where RAY_AUTH_MODE=token says that there is one."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token:
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise UserError(f"RAY_AUTH_MODE is token, but {path} cannot be read: {_TOKEN}") from error
    return {"Authorization": f"Bearer {token}"}


def _environment_of(asked: Sequence[str]) -> dict[str, str]:
    """Variables of the job: ours, and those asked for as NAME (its value here) or NAME=VALUE."""
    found = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
    for one in asked:
        name, equals, value = one.partition("=")
        if not name.isidentifier():
            raise UserError(f"--env {one!r} names no variable: write NAME, or NAME=VALUE")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name}: it is not set here; set it, or write {name}=VALUE")
            value = os.environ[name]
        if any(word in name.upper() for word in ("SECRET", "TOKEN", "PASSWORD")):
            logger.warning("%s can be read by all who see the cluster's dashboard; a role of the nodes is safer", name)
        found[name] = value
    return found


def _reachable_out(out: str | None, *, here: bool, shared: bool, address: str, specs: Sequence[RunSpec]) -> str:
    """Where the cluster writes the run: S3, a folder that all nodes share, or a folder of this very machine."""
    if out is not None and "://" in out:
        return out
    if here:
        return str(Path(out or ("runs" if len(specs) > 1 else f"runs/{specs[0].name}")).absolute())
    if out is None:
        raise UserError(f"--out is missing: the nodes of {address} need one place for the run; give s3://BUCKET/PREFIX")
    if shared and Path(out).is_absolute():
        return out
    raise UserError(
        f"--out {out}: every node of {address} would write to a folder of its own, and the votes would be lost with "
        "the nodes; give s3://BUCKET/PREFIX, or an absolute path that all nodes share together with --shared"
    )


def _is_own(arch: str) -> bool:
    module, colon, _ = arch.partition(":")
    return bool(colon) and module not in ("torchvision", "timm") and all(map(str.isidentifier, module.split(".")))


def _is_relative(location: object) -> bool:
    return (
        isinstance(location, str)
        and "://" not in location
        and not location.startswith(("embedded:", "${", "~"))
        and not Path(location).is_absolute()
    )


def _travels_not(key: str, location: str, here: bool) -> None:
    if not here:
        logger.warning(
            "WARNING: %s = %s does not travel: put it at that path on every node, or give s3:// or https://",
            key, location,
        )  # fmt: skip


def _anchored(override: str, here: bool) -> str:
    """An override whose location, if it is a relative one, is made absolute as it is seen from here."""
    key, equals, text = override.partition("=")
    if equals and tuple(key.strip().split(".")) in _LOCATIONS:
        try:
            location = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            location = text
        if _is_relative(location):
            location = str(Path.cwd() / location)
            _travels_not(key.strip(), location, here)
            return f"{key}={json.dumps(location, ensure_ascii=False)}"
    return override


def _ship_spec(file: Path, name: str, folder: Path, here: bool) -> str:
    """Copy a spec, its relative locations made absolute as they are seen from here; returns its name there."""
    raw = tomllib.loads(file.read_text(encoding="utf-8"))
    for section, key in _LOCATIONS:
        location = raw.get(section, {}).get(key)
        if _is_relative(location):
            raw[section][key] = str(file.resolve().parent / location)
            _travels_not(f"{section}.{key}", raw[section][key], here)
    text = "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in raw.items())
    (folder / f"{name}.toml").write_text(text + "\n", encoding="utf-8")
    return f"{name}.toml"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _ship_module(module: str, root: Path, folder: Path) -> None:
    """Copy a module of the working folder, and what it imports from there, with the packages they stand in.

    Imports are read, not run. What is not in the working folder is taken to be installed on the cluster.
    """
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.split(".")[0] in _OURS:
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
        package = name if path.is_dir() else name.rpartition(".")[0]
        waiting.extend(_imported(source, package))


def _imported(source: Path, package: str) -> Iterator[str]:
    """Names that a source file imports: modules, and what may be modules in them."""
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{source}: not valid Python: {error.msg} in line {error.lineno}; mend it") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level and package else []
            kept = parts[: len(parts) - (node.level - 1)] if node.level else []
            base = ".".join([*kept, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names if alias.name != "*")


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
