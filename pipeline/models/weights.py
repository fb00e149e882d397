"""What f is made of besides our code: a checkpoint by location, checked by sha256 and loaded strictly into a network;
and an own function by name.

A location is a path, an s3:// or https:// address (see `fetch`), or `embedded:FILE` (shipped with the package). The
file's network is found by its keys: under any prefix (`module.`, `1.`, `1.module.`, ...) and in any entry of the file
(`state_dict`, `net`, ...). `#NAME` after the location picks an entry or a prefix where there are several.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.errors import UserError
from pipeline.locations import EMBEDDED, embedded_path
from pipeline.storage.fetch import fetch, file_sha256

State = dict[str, Tensor]

RANDOM = "random:"

# What training scripts leave beside the tensors, by the names that files know it by; unpickling it runs no code.
_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
]


def _split(location: str) -> tuple[Path, str]:
    """The local file and the name of the network within it that a location names.

    Raises: UserError where there is no such file.
    """
    name, _, network = location.partition("#")
    if name.startswith(EMBEDDED):
        return embedded_path(name), network
    try:
        return fetch(name), network
    except UserError as error:
        raise UserError(f"checkpoint {error}") from error


def weights_id(location: str, expected_sha256: str | None = None) -> str:
    """What the file at `location` is called in votes_id: its sha256, and the `#NAME` where there is one.

    Raises: UserError for a missing file or another sha256 than the spec expects.
    """
    path, network = _split(location)
    found = file_sha256(path)
    if expected_sha256 is not None and found != expected_sha256:
        raise UserError(
            f"checkpoint {location}: its sha256 is {found}, the spec expects {expected_sha256}: "
            "get the right file or correct sha256"
        )
    return f"{found}#{network}" if network else found


def build(
    make: Callable[[], nn.Module],
    location: str,
    device: torch.device,
    *,
    convert: Callable[[State], State] = lambda state: state,
    explain: Callable[[State], str] = lambda state: "",
) -> nn.Module:
    """The network that `make` makes, for inference on a device, with the weights at `location`.

    Its own initial weights are never computed, and a file that can be is mapped, not read, so that processes share it.
    On the meta device it has no weights, at `random:SEED` those that it begins its training with (for measurements; no
    spec can name them). `convert` renames a layout's keys; `explain` tells of a state dict that does not fit what would
    make it fit. Raises: UserError.
    """
    if device.type == "meta":
        with device:
            return make().eval().requires_grad_(False)
    if location.startswith(RANDOM):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(location.removeprefix(RANDOM)))
            return make().to(device).eval().requires_grad_(False)
    with _Uninitialised():
        network = make()
    state = convert(load_weights(location, network.state_dict().keys()))
    load_into(network, state, location, explain)
    return network.to(device).eval().requires_grad_(False)


class _Uninitialised(TorchFunctionMode):
    """Parameters keep the memory that they are given: every function that changes one in place is skipped."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        changed = args[0] if args else kwargs.get("tensor")  # nn.init names its argument
        if isinstance(changed, nn.Parameter) and name.endswith("_") and not name.startswith("_"):
            return changed
        return func(*args, **kwargs)


def load_weights(location: str, wanted: Collection[str] = ()) -> State:
    """The state dict of the network whose keys are `wanted`: a safetensors file, or a torch file without code.

    Raises: UserError for a missing, damaged or foreign file, for one with code in it, and for one that holds several
    networks of which none is named.
    """
    path, name = _split(location)
    contents: Any
    try:
        contents = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise UserError(f"checkpoint {location}: not a file of weights; get the right file") from error
        raise UserError(
            f"checkpoint {location}: holds Python objects besides tensors, which are never run ({_reason(error)}); "
            "load it where you trust it and save its state_dict alone with torch.save"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"checkpoint {location}: damaged, or not a file of weights ({_reason(error)}); get the file again"
        ) from error
    if isinstance(contents, Mapping) and isinstance(contents.get(name), Mapping):
        contents, name = contents[name], ""
    networks = {"": contents} if _is_state(contents) else {}
    if isinstance(contents, Mapping) and not networks:
        networks = {key: value for key, value in contents.items() if _is_state(value)}
    if not networks:
        raise UserError(
            f"checkpoint {location}: no state dict in it; give a file that holds a network's tensors by name"
        )
    if len(networks) > 1:
        raise UserError(
            f"checkpoint {location}: holds {', '.join(networks)}; choose one, say '#{next(iter(networks))}'"
        )
    state = dict(next(iter(networks.values())))
    prefix = f"{name}." if name else _prefix(state, wanted)
    if name and not any(key.startswith(prefix) for key in state):
        raise UserError(
            f"checkpoint {location}: the file has no keys that begin with '{prefix}': correct the name behind '#'"
        )
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _torch_load(path: Path) -> Any:
    with torch.serialization.safe_globals(_HARMLESS):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(one, Tensor) for one in value.values())


def _prefix(state: State, wanted: Collection[str]) -> str:
    """The prefix under which the most wanted keys are found, the shortest where several are equal."""
    first = next(iter(wanted), None)
    if first is None or all(key in state for key in wanted):
        return ""
    prefixes = {key.removesuffix(first) for key in state if key.endswith(f".{first}")} | {""}
    return min(prefixes, key=lambda prefix: (-sum(f"{prefix}{key}" in state for key in wanted), len(prefix)))


def _reason(error: Exception) -> str:
    """The one line of what torch says of a file that tells something of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def as_folder(files: Mapping[str, str]) -> Iterator[Path]:
    """A folder, for as long as it is needed, in which files stand under given names: name -> location."""
    with tempfile.TemporaryDirectory() as folder:
        for name, location in files.items():
            (Path(folder) / name).symlink_to(_split(location)[0].resolve())
        yield Path(folder)


def load_json(location: str) -> dict[str, Any]:
    """A configuration that stands beside weights. Raises: UserError where it is missing or damaged."""
    path, _ = _split(location)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"checkpoint {location}: not valid JSON ({error}); get the file again") from error


def load_into(
    network: nn.Module, state: State, location: str, explain: Callable[[State], str] = lambda state: ""
) -> None:
    """Give a network the tensors of `state`, strictly. Buffers that are computed and not stored may stand in either.

    Raises: UserError that names a missing, a superfluous or a misshapen tensor, as expected and as found.
    """

    def refuse(what: str) -> UserError:
        told = explain(state) or "give a file of this architecture and its hyper-parameters"
        return UserError(f"checkpoint {location}: {what}: {told}")

    expected, computed = network.state_dict(), dict(network.named_buffers())
    for key, tensor in expected.items():
        if key not in state:
            if key.endswith("num_batches_tracked"):  # unknown to torch before 0.4.1, and of no use here
                state[key] = torch.zeros((), dtype=torch.int64)
                continue
            raise refuse(f"{key} {tuple(tensor.shape)} is missing")
        if state[key].shape != tensor.shape:
            raise refuse(f"{key} has shape {tuple(state[key].shape)}, the architecture expects {tuple(tensor.shape)}")
    superfluous = next((key for key in state if key not in expected and key not in computed), None)
    if superfluous is not None:
        raise refuse(f"{superfluous} {tuple(state[superfluous].shape)} has no place in the architecture")
    network.load_state_dict({key: state[key] for key in expected}, assign=True)


def library(package: str, name: str) -> Any:
    """An attribute of a package that only some models need. Raises: UserError where it is not installed."""
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError:
        raise UserError(f"this spec's models need {package}: pip install 'diffsmooth[models]'") from None


def own_function(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; it is called as function(spec, device).

    Raises: UserError where it cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"arch = {name!r}: {error}; name a function that Python can import from here") from error
    if not callable(function):
        raise UserError(f"arch = {name!r} is no function: name one that is called with (spec, device)")
    return function


def function_id(name: str) -> str:
    """The sha256 of the source file that an own function stands in.

    Raises: UserError where the function has no source file: its votes could not be told from another's.
    """
    source = inspect.getsourcefile(own_function(name))
    if source is None:
        raise UserError(f"arch = {name!r} has no source file to identify its votes by: define it in a .py file")
    return file_sha256(Path(source))
