"""Every use of Ray's private interfaces, in one place, each guarded: if Ray changes one, a run goes on without it.

| call                                        | why there is no public one                   | without it
|
|---------------------------------------------|----------------------------------------------|-----------------------------------|
| _private.state.state.get_draining_nodes     | the state API does not say which nodes drain | actors stay until their
node dies | | _private.worker.print_to_stdstream          | log_to_driver=False does not cover a raylet's death | Ray
prints to stdout       |

tests/test_ray_private.py checks both against the installed Ray and names its version if one has changed.
"""

import logging
from collections.abc import Callable
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
