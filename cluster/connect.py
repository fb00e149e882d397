"""Attach to a Ray cluster or start a local one, and find the nodes on which an actor has a place."""

import logging
import os
import re
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import AuthenticationError, RayTaskError

from diffsmooth.cluster.allocation import address_of_symmetric_run
from diffsmooth.cluster.ray_private import redirect_worker_output
from diffsmooth.pipeline.errors import RunError, UserError, first_line, one_line, without_colours
from diffsmooth.pipeline.models.device import available_device, cores

logger = logging.getLogger(__name__)

_KNOCK_SECONDS = 10.0
_ACCELERATOR = "ray.io/accelerator-type"  # the label that Ray gives a node with GPUs


def check_device(address: str | None, device: str) -> None:
    """Refuse a GPU that this machine lacks before anything is stored, if `Cluster` would use this machine.

    Raises: UserError.
    """
    if device == "cuda" and not ray.is_initialized() and address_of(address) == "local":
        available_device(device)


def address_of(given: str | None) -> str:
    return given or os.environ.get("RAY_ADDRESS") or address_of_symmetric_run() or "local"


def connect(address: str, actors: int | None, verbose: bool) -> None:
    """Attach to a cluster, or start a local one."""
    local: dict[str, Any] = (
        {"num_cpus": max(actors or 0, cores()), "include_dashboard": False} if address == "local" else {}
    )
    if not verbose:
        redirect_worker_output(lambda line: logger.warning("Ray: %s", line))
    level = logging.INFO if verbose else logging.ERROR
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=verbose, logging_level=level, **local)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({first_line(error)}); start one, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it requires a token, or omit --address to start a local Ray"
        ) from error
    except Exception as error:  # Ray raises plain ones if a machine is too slow or too full
        raise RunError(
            f"--address {address}: Ray did not start ({first_line(error)}); free some memory and run the command again"
        ) from error


class Suitable(NamedTuple):
    """The living nodes that may hold an actor, and what an actor asks for so that it is placed there."""

    nodes: list[Any]
    options: dict[str, Any]


def suitable_nodes(address: str, device: str, accelerators: Sequence[str], memory_gb: float | None) -> Suitable:
    """Raises: UserError for names that are no accelerators, and for a local Ray on which no actor has a place."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    options: dict[str, Any] = {}
    present = sorted({node["Labels"][_ACCELERATOR] for node in nodes if _ACCELERATOR in node["Labels"]})
    if accelerators and device == "cpu":
        raise UserError(f"--accelerator {accelerators[0]} needs a GPU, but compute.device = 'cpu'; omit one of them")
    for name in accelerators:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"--accelerator {name}: not the name of a GPU type; use names such as H100, A100 or L4")
    if accelerators:
        options["label_selector"] = {_ACCELERATOR: f"in({','.join(accelerators)})"}
        nodes = [node for node in nodes if node["Labels"].get(_ACCELERATOR) in accelerators]
    lacking = "" if nodes else f"--accelerator {' --accelerator '.join(accelerators)}: no node has such a GPU"
    if memory_gb is not None:
        options["memory"] = int(memory_gb * 1e9)
        most = max((node["Resources"].get("memory", 0) for node in nodes), default=0)
        nodes = [node for node in nodes if node["Resources"].get("memory", 0) >= options["memory"]]
        if not nodes and not lacking:
            lacking = f"--memory {memory_gb:g}: a node has at most {most / 1e9:.1f} GB for actors"
    if lacking and address == "local":
        have = f"this machine has {', '.join(present) or 'none that Ray knows'}"
        raise UserError(f"{lacking} ({have}); omit the option, or use a cluster with --address")
    if lacking:
        logger.warning("%s yet (accelerators at %s: %s); waiting", lacking, address, ", ".join(present) or "none")
    return Suitable(nodes, options)


def _knock(address: str) -> None:
    """Raise OSError at once if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def cause_of(error: RayTaskError) -> Exception:
    """The exception that the actor's own code raised."""
    return error.cause if isinstance(error.cause, Exception) else error


def line_of(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) and error.cause else error
    line = next(iter(without_colours(cause).strip().splitlines()), "")
    return f"{type(cause).__name__}: {one_line(line)}"
