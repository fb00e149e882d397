"""Own functions, `package.module:function`, as denoisers and classifiers. Imports no torch.

An own function is called as function(spec, device). It returns a callable: a denoiser (x_BCHW, sigma) -> x0_BCHW or a
classifier x_BCHW -> logits_BK. The sha256 of the function's source file identifies its votes.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError, UserError
from pipeline.locations import require_set
from pipeline.models.files import one_line, weights_id
from pipeline.spec import Classifier, Denoiser, RunSpec
from pipeline.storage.fetch import file_sha256

TORCHVISION, TIMM = "torchvision", "timm"
LIBRARIES = (TORCHVISION, TIMM)  # prefixes of arch that name a library's models, not an own module


class OwnFunctionError(UserError):
    """An own function failed, or it returned something that cannot be called."""


def is_own(arch: str) -> bool:
    """Return whether an architecture is an own function, not one of ours or of a library."""
    return ":" in arch and arch.partition(":")[0] not in LIBRARIES


def own_function(arch: str) -> Callable[..., Any]:
    """Import the function that `package.module:function` names.

    Raises: UserError if it cannot be imported or is not a function defined in Python.
    """
    module_name, _, name = arch.partition(":")
    package = module_name.partition(".")[0]
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise UserError(f"arch = {arch!r} does not consist of Python names; use the form package.module:function")
    if package == "__main__":
        raise UserError(
            f"arch = {arch!r}: other processes cannot import functions of a notebook or script; move it to a .py file "
            "and use the form package.module:function"
        )
    if package in sys.stdlib_module_names:
        raise UserError(f"arch = {arch!r} belongs to Python's standard library; use a function of your own")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"arch = {arch!r}: {one_line(error)}; name a function that Python can import") from error
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise OwnFunctionError(
            f"arch = {arch!r}: importing {module_name} raised {type(error).__name__}: {one_line(error)}; correct the "
            "module"
        ) from error
    if not (inspect.isfunction(function) or inspect.ismethod(function) or inspect.isclass(function)):
        raise UserError(
            f"arch = {arch!r} is a {type(function).__name__}, not a Python function; name a function that is called "
            "with (spec, device)"
        )
    return function


def function_id(arch: str) -> str:
    """Return the sha256 of the source file that defines an own function.

    Raises: UserError if there is no such file, since nothing else could identify the function's votes.
    """
    try:
        source = inspect.getsourcefile(own_function(arch))
        if source is not None and Path(source).is_file():
            return file_sha256(Path(source))
    except (TypeError, OSError) as error:
        raise _without_source(arch) from error
    raise _without_source(arch)


def _without_source(arch: str) -> UserError:
    return UserError(f"arch = {arch!r} has no source file to identify its votes by; define the function in a .py file")


def call_own_function(arch: str, spec: RunSpec, device: Any) -> Callable[..., Any]:
    """Return what an own function makes for a spec on a torch device.

    Raises: OwnFunctionError if it raises an exception or returns something that cannot be called.
    """
    try:
        made = own_function(arch)(spec, device)
    except (UserError, RunError):
        raise
    except (Exception, SystemExit) as error:
        raise OwnFunctionError(
            f"arch = {arch!r} raised {type(error).__name__} when called with (spec, device): {one_line(error)}; "
            "correct the function"
        ) from error
    if not callable(made):
        raise OwnFunctionError(
            f"arch = {arch!r} returned {type(made).__name__}, which cannot be called; return a function or a module"
        )
    return made


@dataclass(frozen=True)
class OwnNetwork:
    """A denoiser or a classifier that an own function makes; `section` is the spec's [`name`] table."""

    name: str
    section: Denoiser | Classifier
    spec: RunSpec

    def __post_init__(self) -> None:
        own_function(self.section.arch)

    def ids(self) -> dict[str, str]:
        """Return the hashes of the checkpoint, if one is given, and of the source file."""
        ids = {f"{self.name}.source": function_id(self.section.arch)}
        if self.section.checkpoint is not None:
            location = require_set(f"{self.name}.checkpoint", self.section.checkpoint)
            ids[self.name] = weights_id(location, self.section.sha256)
        return ids

    def call(self, device: Any) -> Callable[..., Any]:
        return call_own_function(self.section.arch, self.spec, device)
