"""What f is made of besides our code: a checkpoint by location, opened, checked by sha256, loaded strictly into a
network; and an own function by name.

A location is a path or `embedded:FILE` (shipped with the package); `#PREFIX` after it picks the keys of one network
out of a file that holds several.
"""

import functools
import hashlib
import importlib
import inspect
import pickle
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.spec import UserError

State = dict[str, Tensor]


def _split(location: str) -> tuple[Path, str]:
    """The local file and the key prefix that a location names.

    Raises: UserError where there is no such file.
    """
    name, _, prefix = location.partition("#")
    if name.startswith("embedded:"):
        path = Path(str(resources.files("pipeline.embedded") / name.removeprefix("embedded:")))
    elif "://" in name:
        raise UserError(f"checkpoint {location}: only local paths and embedded: names can be read; download it first")
    else:
        path = Path(name)
    if not path.is_file():
        raise UserError(f"checkpoint {location}: no such file; give the path of an existing checkpoint")
    return path, prefix


@functools.cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_id(location: str, expected_sha256: str | None = None) -> str:
    """What the weights at `location` are called in votes_id: the file's sha256, and the prefix where there is one.

    Raises: UserError for a missing file or another sha256 than the spec expects.
    """
    path, prefix = _split(location)
    found = _sha256(path)
    if expected_sha256 is not None and found != expected_sha256:
        raise UserError(
            f"checkpoint {location}: its sha256 is {found}, the spec expects {expected_sha256}: "
            "get the right file or correct sha256"
        )
    return f"{found}#{prefix}" if prefix else found


def load_weights(location: str) -> State:
    """Read a state dict (safetensors, or a torch file without code), its prefix removed.

    Raises: UserError for a missing, damaged or foreign file.
    """
    path, prefix = _split(location)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"checkpoint {location}: damaged, or not a file of weights ({reason}); get the file again"
        ) from error
    if prefix:
        state = {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}
        if not state:
            raise UserError(f"checkpoint {location}: the file has no keys that begin with '{prefix}.'")
    return state


def load_into(network: nn.Module, state: State, location: str) -> None:
    """Give a network (built on the meta device) the tensors of `state`, strictly.

    Raises: UserError that names a missing, a superfluous or a misshapen tensor, as expected and as found.
    """
    expected = network.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            raise UserError(f"checkpoint {location}: {key} {tuple(tensor.shape)} is missing: another architecture?")
        if state[key].shape != tensor.shape:
            raise UserError(
                f"checkpoint {location}: {key} has shape {tuple(state[key].shape)}, the architecture expects "
                f"{tuple(tensor.shape)}: another architecture or other hyper-parameters?"
            )
    superfluous = next((key for key in state if key not in expected), None)
    if superfluous is not None:
        raise UserError(
            f"checkpoint {location}: {superfluous} {tuple(state[superfluous].shape)} has no place in the "
            "architecture: another architecture or other hyper-parameters?"
        )
    network.load_state_dict(state, assign=True)


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
    return _sha256(Path(source))
