"""Every use of Ray's private interfaces, in one place, each guarded: if Ray changes one, a run goes on without it.

| what                                      | why there is no public one                 | without it               |
|-------------------------------------------|--------------------------------------------|--------------------------|
| _private.state.state.get_draining_nodes   | the state API does not say which drain     | actors stay on the node  |
| _private.worker.print_to_stdstream        | log_to_driver=False omits a raylet's death | Ray prints to stdout     |
| _private.ray_constants.ENABLE_RAY_CLUSTER | ray.init replaces 127.0.0.1 as an address  | all interfaces are open  |
| _raylet.Config, AuthenticationTokenLoader | mode and token are read at import          | Ray's own default        |

tests/test_ray_private.py checks all against the installed Ray and names its version if one has changed.
"""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

logger = logging.getLogger(__name__)


def draining_nodes() -> set[str]:
    """The ids of the nodes that are being drained, for example before a spot instance is reclaimed."""
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except (AttributeError, TypeError) as error:
        logger.debug("Ray %s does not report draining nodes (%s)", ray.__version__, error)
        return set()


def redirect_worker_output(write: Callable[[str], None]) -> None:
    """Pass the first line of what Ray would print to the driver's stdout to `write` instead."""

    def print_to(data: dict[str, Any], *_: Any, **__: Any) -> None:
        for text in data["lines"]:
            write(next(iter(text.strip().splitlines()), "").strip()[:300])

    if callable(getattr(getattr(ray._private, "worker", None), "print_to_stdstream", None)):
        ray._private.worker.print_to_stdstream = print_to
    else:
        logger.debug("Ray %s has no print_to_stdstream; its messages go to stdout", ray.__version__)


@contextmanager
def only_for_this_process() -> Iterator[None]:
    """Let a Ray that is started inside listen on the loopback interface only, and require a secret token.

    The token is new and never written to a file; Ray's own would be readable by other users of the machine. A user who
    sets RAY_AUTH_MODE=disabled gets no token.
    """
    names = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ.get(name) for name in names}
    constants: Any = getattr(ray._private, "ray_constants", None)
    across_nodes = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if across_nodes is None:
        logger.warning("Ray %s listens on all interfaces of this machine; a token is required", ray.__version__)
    else:
        constants.ENABLE_RAY_CLUSTER = False  # read from the environment at import; the processes of Ray read it again
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _reload_authentication()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if across_nodes is not None:
            constants.ENABLE_RAY_CLUSTER = across_nodes
        _reload_authentication()


def _reload_authentication() -> None:
    """Make Ray read RAY_AUTH_MODE and the token again."""
    raylet: Any = ray._raylet
    try:
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    except AttributeError as error:
        logger.debug("Ray %s reads its token at import only (%s)", ray.__version__, error)
