"""The work of `submit`: a certification as a Ray job, and what is sent to the cluster.

The driver runs on the head of the cluster, so that it outlives this machine. Only specs and the modules of own
functions `package.module:function` are sent. The nodes fetch weights and data, and votes go to the run's storage.
"""

import json
import logging
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from diffsmooth.jobs.costs import warn_of_cost
from diffsmooth.jobs.job_server import JobServer, Submitted
from diffsmooth.pipeline.errors import UserError, one_line, redacted
from diffsmooth.pipeline.locations import in_store, is_relative, is_remote, shown
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.own import imported_names
from diffsmooth.pipeline.spec import LOCATIONS, RunSpec, locations_in

logger = logging.getLogger(__name__)

_STOP_SECONDS = 60  # from `ray job stop` to SIGKILL; Ray's own 3 s would cost the blocks in flight
_LIMIT = 50_000_000  # bytes that are sent
_SECRET_NAMES = ("SECRET", "TOKEN", "PASSW", "CREDENTIAL", "PRIVATE", "API_KEY", "APIKEY", "ACCESS_KEY")
_INSTALLED = "diffsmooth"  # on the cluster; a copy from here must not shadow it


class NamedSpec(NamedTuple):
    """A spec as it was named, and its file; one that ships with the package has none, and is not sent."""

    name: str
    file: Path | None
    spec: RunSpec


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request to certify on a cluster; `options` are flags of `diffsmooth certify` that are passed on unchanged."""

    specs: Sequence[NamedSpec]
    out: str | None
    shared: bool = False  # whether `out` is a folder that all nodes share
    overrides: Sequence[str] = ()
    options: Sequence[str] = ()
    env: Sequence[str] = ()


def submit(
    address: str | None, submission: Submission, confirm: Callable[[str], None] = logger.warning
) -> tuple[JobServer, Submitted]:
    """Check everything that can be checked from here, then submit the job.

    `confirm` is called with a warning if many GPU-hours are needed.

    Raises: UserError, RunError.
    """
    specs = [one.spec for one in submission.specs]
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
            one.name if one.file is None else _ship_spec(one.file, spec.name, folder, here)
            for one, spec in zip(submission.specs, specs, strict=True)
        ]
        _ship_own_functions(specs, folder)
        runtime_env: dict[str, Any] = {"env_vars": env_vars}
        if _check_size(folder):
            runtime_env["working_dir"] = str(folder)
        command = ["diffsmooth", "certify", *sent, "--out", out, *submission.options]
        command += [part for override in overrides for part in ("--set", override)]
        return server, server.submit(submission_id, command, runtime_env)


def _refuse_secrets(submission: Submission) -> None:
    """Raise UserError for a location with a password or a signature: Ray stores commands and files of jobs unencrypted,
    and shows them to everyone who may read its dashboard."""
    sent = [("--set", override) for override in submission.overrides]
    sent += [("--out", submission.out or "")]
    for file in (one.file for one in submission.specs if one.file):
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
        sent += [(name, table[key]) for name, table, key in locations_in(raw)]
    for name, text in sent:
        if redacted(text) != text:
            raise UserError(
                f"{name} {text}: all users of the cluster could read the password or the signature in this location; "
                "set it in the environment of the nodes, and write the location with ${NAME}"
            )


def _environment_of(requested: Sequence[str]) -> dict[str, str]:
    """The job's environment variables: ours, and the requested NAME (with its value here) or NAME=VALUE."""
    found = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), "PYTHONUNBUFFERED": "1"}
    for one in requested:
        name, equals, value = one.partition("=")
        if not name.isidentifier():
            raise UserError(f"--env {one_line(name)!r} is not the name of a variable; write NAME or NAME=VALUE")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name}: the variable is not set here; write {name}=VALUE")
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
