"""Own functions, `package.module:function`, as denoisers and classifiers. Imports no torch.

An own function is called as function(spec, device). It returns a callable: a denoiser (x_BCHW, sigma) -> x0_BCHW or a
classifier x_BCHW -> logits_BK. The sha256 of the function's source file identifies its votes.
"""

import ast
import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.locations import is_remote, require_set
from diffsmooth.pipeline.models.files import local_file, weights_id
from diffsmooth.pipeline.spec import Classifier, Denoiser, RunSpec
from diffsmooth.pipeline.storage.fetch import file_sha256

# what the network of an own function is called with, by position
_CALLED_WITH = {"denoiser": ("x_BCHW", "sigma"), "classifier": ("x_BCHW",)}


class OwnFunctionError(UserError):
    """An own function failed, or it returned something that cannot be called."""


def own_function(arch: str, key: str = "arch", called_with: str = "(spec, device)") -> Callable[..., Any]:
    """Import the function that `package.module:function`, the value of `key`, names.

    Raises: UserError if it cannot be imported or is not a function defined in Python.
    """
    module_name, _, name = arch.partition(":")
    package = module_name.partition(".")[0]
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise UserError(f"{key} = {arch!r} does not consist of Python names; use the form package.module:function")
    if package == "__main__":
        raise UserError(
            f"{key} = {arch!r}: other processes cannot import functions of a notebook or script; move it to a .py file "
            "and use the form package.module:function"
        )
    if package in sys.stdlib_module_names:
        raise UserError(f"{key} = {arch!r} belongs to Python's standard library; use a function of your own")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key} = {arch!r}: {first_line(error)}; name a function that Python can import") from error
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise OwnFunctionError(
            f"{key} = {arch!r}: importing {module_name} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not (inspect.isfunction(function) or inspect.ismethod(function) or inspect.isclass(function)):
        raise UserError(
            f"{key} = {arch!r} is a {type(function).__name__}, not a Python function; name a function that is called "
            f"with {called_with}"
        )
    return function


def function_id(arch: str, key: str = "arch") -> str:
    """Return the sha256 of the source file that defines an own function.

    Raises: UserError if there is no such file, since nothing else could identify the function's votes.
    """
    try:
        source = inspect.getsourcefile(own_function(arch, key))
        if source is not None and Path(source).is_file():
            return file_sha256(Path(source))
    except (TypeError, OSError) as error:
        raise _without_source(arch, key) from error
    raise _without_source(arch, key)


def imports_id(arch: str) -> str | None:
    """Return the sha256 of the user's own modules that the function's module imports; None if it imports none.

    These are the modules outside of Python's library, installed packages and this package. Imports are parsed, not run.
    """
    start = own_function(arch).__module__
    waiting, found = [start], dict[str, str]()
    while waiting:
        name = waiting.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in found or file is None or not _is_users(name, Path(file)):
            continue
        found[name] = file_sha256(Path(file))
        is_package = hasattr(sys.modules[name], "__path__")
        waiting += imported_names(Path(file), package=name if is_package else name.rpartition(".")[0])
    found.pop(start, None)  # its own hash is beside this one
    text = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(found.items()))
    return hashlib.sha256(text.encode()).hexdigest() if found else None


def _is_users(name: str, file: Path) -> bool:
    """Return whether a module is the user's own."""
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    ours = name.partition(".")[0] == "diffsmooth"
    return file.suffix == ".py" and not ours and not installed & set(file.resolve().parents)


def imported_names(source: Path, package: str) -> Iterator[str]:
    """Return the names that a source file of a package imports: modules, and names in them that may be modules.

    Raises: UserError for a file that is not valid Python.
    """
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError) as error:  # ValueError for a NUL byte
        raise UserError(f"{source}: not valid Python ({first_line(error)})") from error
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


def _without_source(arch: str, key: str) -> UserError:
    return UserError(f"{key} = {arch!r} has no source file to identify it by; define the function in a .py file")


def call_own_function(arch: str, spec: RunSpec, device: Any) -> Callable[..., Any]:
    """Return what an own function makes for a spec on a torch device.

    Raises: OwnFunctionError if it raises an exception or returns something that cannot be called.
    """
    function = own_function(arch)
    if not accepts(function, spec, device):
        kind = "the constructor of a class" if inspect.isclass(function) else "a function"
        raise OwnFunctionError(
            f"arch = {arch!r} is {kind} with the parameters {signature_of(function)}, but it is called with "
            "(spec, device); name a function of (spec, device) that returns the network"
        )
    try:
        made = function(spec, device)
    except (UserError, RunError):
        raise
    except (Exception, SystemExit) as error:
        raise OwnFunctionError(
            f"arch = {arch!r} raised {type(error).__name__} when called with (spec, device): {first_line(error)}"
        ) from error
    if inspect.isclass(made):
        raise OwnFunctionError(
            f"arch = {arch!r} returned the class {made.__name__}, not a network; return an instance, "
            f"{made.__name__}(...)"
        )
    if not callable(made):
        raise OwnFunctionError(
            f"arch = {arch!r} returned {type(made).__name__}, which cannot be called; return a function or a module"
        )
    return made


def accepts(function: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    """Return whether a function can be called with some arguments; True if Python does not know its parameters."""
    signature = signature_of(function)
    try:
        if signature is not None:
            signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the parameters of a function, of a class's constructor or of a torch module; None if Python does not know
    them."""
    called = function if inspect.isclass(function) else getattr(function, "forward", function)
    try:
        return inspect.signature(called)
    except (TypeError, ValueError):  # built-in functions have no signature
        return None


@dataclass(frozen=True)
class OwnNetwork:
    """A denoiser or a classifier that an own function makes; `section` is the spec's [`name`] table."""

    name: str
    section: Denoiser | Classifier
    spec: RunSpec

    def __post_init__(self) -> None:
        own_function(self.section.arch)
        for key in ("normalize", "interpolation", "options", "ignore"):
            if getattr(self.section, key, None):
                raise UserError(
                    f"{self.name}.{key} is not applied to own functions, such as {self.section.arch!r}; do it in the "
                    "function, and remove the key"
                )
        if self.spec.smoothing.precision in ("bf16", "fp16"):
            raise UserError(
                f"smoothing.precision = {self.spec.smoothing.precision!r} is not applied to own functions, such as "
                f"{self.section.arch!r}; use fp32, and cast in the function"
            )

    def ids(self) -> dict[str, str]:
        """Return the hashes of the checkpoint, if one is given, of the source file, and of the own modules it
        imports."""
        ids = {f"{self.name}.source": function_id(self.section.arch)}
        if imports := imports_id(self.section.arch):
            ids[f"{self.name}.imports"] = imports
        if self.section.checkpoint is not None:
            location = require_set(f"{self.name}.checkpoint", self.section.checkpoint)
            ids[self.name] = weights_id(location, self.section.sha256)
        return ids

    def call(self, device: Any) -> Callable[..., Any]:
        """Return what the function makes; a remote checkpoint reaches it as the path of the fetched file."""
        spec, checkpoint = self.spec, self.section.checkpoint
        if checkpoint is not None and is_remote(checkpoint):
            path, network = local_file(checkpoint)
            local = f"{path}#{network}" if network else str(path)
            spec = spec.model_copy(update={self.name: self.section.model_copy(update={"checkpoint": local})})
        made = call_own_function(self.section.arch, spec, device)
        self._check_parameters(made)
        return made

    def _check_parameters(self, made: Callable[..., Any]) -> None:
        """Refuse a network of other arguments, or of swapped ones. Raises: OwnFunctionError."""
        wanted = _CALLED_WITH[self.name]
        signature = signature_of(made)
        if signature is None:
            return
        names = list(signature.parameters)
        problem = f"arch = {self.section.arch!r} returned a network with the parameters {signature}, but a {self.name}"
        if not accepts(made, *wanted, **({"draws": None} if "draws" in names else {})):
            raise OwnFunctionError(
                f"{problem} is called with ({', '.join(wanted)}); return a function of these arguments"
            )
        if names and names[0].startswith("sigma"):
            raise OwnFunctionError(
                f"{problem} gets the images first, as ({', '.join(wanted)}); rename or swap {names[0]}"
            )
