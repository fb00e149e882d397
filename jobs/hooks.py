"""Hooks: objects of other packages that are told about progress and results, such as loggers of experiments.

A package registers an object under the entry-point group `diffsmooth.hooks`. It has one or both of the methods of Hook.
A hook that raises is reported and not called again: a logger that fails must not end a certification.
"""

import functools
import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Protocol

from diffsmooth.pipeline.errors import first_line
from diffsmooth.pipeline.locations import shown
from diffsmooth.pipeline.results.stored import OrderResult, Progress, Summary

logger = logging.getLogger(__name__)

GROUP = "diffsmooth.hooks"


class Hook(Protocol):
    """What a hook may have. `run` is the location of the run."""

    def on_progress(self, run: str, progress: Progress) -> None:
        """Called by the driver as often as it writes progress.json."""
        ...

    def on_result(self, run: str, summary: Summary) -> None:
        """Called once for each order that certify or predict finishes; `summary` is what `--json` prints."""
        ...


def tell_progress(run: str, progress: Progress) -> None:
    _tell("on_progress", shown(run), progress)


def tell_result(result: OrderResult) -> None:
    _tell("on_result", shown(result.run_uri), result.summary())


@functools.cache
def _hooks() -> dict[str, Any]:
    """The installed hooks by the names of their entry points; those that cannot be loaded are reported."""
    found = {}
    for entry in entry_points(group=GROUP):
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # whatever the other package raises
            _report(entry.name, "cannot be loaded", error)
    return found


def _tell(event: str, *facts: Any) -> None:
    for name, hook in list(_hooks().items()):
        method: Callable[..., None] | None = getattr(hook, event, None)
        if method is None:
            continue
        try:
            method(*facts)
        except Exception as error:  # whatever the other package raises
            del _hooks()[name]
            _report(name, f"failed in {event} and is not called again", error)


def _report(name: str, what: str, error: Exception) -> None:
    logger.warning(
        "the hook %r of %s %s (%s: %s); correct or uninstall its package", name, GROUP, what, type(error).__name__,
        first_line(error),
    )  # fmt: skip
