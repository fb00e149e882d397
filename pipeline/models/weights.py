"""Weights: loaded from a checkpoint, strictly, into a network.

The tensors of a network are found by their keys: under any prefix (`module.`, `1.`, `1.module.`, ...) and in any entry
of the file (`state_dict`, `net`, ...). `#NAME` after the location selects an entry or a prefix if there are several.
"""

import argparse
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.models.files import again, local_file

State = dict[str, Tensor]

RANDOM = "random:"

# What training scripts save beside the tensors, under the names that files use. Unpickling it runs no code.
_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
]


def build(
    make: Callable[[], nn.Module],
    location: str,
    device: torch.device,
    *,
    convert: Callable[[State], State] = lambda state: state,
    others: Sequence[Callable[[], nn.Module]] = (),
    explain: Callable[[State], str] = lambda state: "",
) -> nn.Module:
    """Return the network that `make` makes, for inference on a device, with the weights at `location`.

    The initial weights are never computed. A file that can be memory-mapped is, so that processes share it. On the
    meta device the network has no weights. At `random:SEED` it has random initial weights, for measurements; no spec
    can name that location. `convert` renames the keys of another layout. `others` make variants of the network; the
    keys of the file decide which one is used. `explain` returns what would make a state dict fit that does not, or "".
    Raises: UserError.
    """
    if device.type == "meta":
        with device:
            return make().eval().requires_grad_(False)
    if location.startswith(RANDOM):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(location.removeprefix(RANDOM)))
            return make().to(device).eval().requires_grad_(False)
    try:
        with _Uninitialised():
            networks = [make() for make in (make, *others)]
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {location}: its network cannot be allocated ({first_line(error)}); use a smaller network"
        ) from error
    state = convert(load_weights(location, networks[0].state_dict().keys()))
    network = min(networks, key=lambda one: len(one.state_dict().keys() ^ state.keys()))
    load_into(network, state, location, explain)
    return network.to(device).eval().requires_grad_(False)


def build_from(make: Callable[[], nn.Module], state: State, location: str, device: torch.device) -> nn.Module:
    """Return the network that `make` makes with the tensors of a state dict that was read from `location`.

    Raises: UserError, as `load_into` does.
    """
    with _Uninitialised():
        network = make()
    load_into(network, state, location)
    return network.to(device).eval().requires_grad_(False)


class _Uninitialised(TorchFunctionMode):
    """Skips every function that changes a parameter in place, so that parameters stay uninitialised."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        changed = args[0] if args else kwargs.get("tensor")  # nn.init passes it by name
        if isinstance(changed, nn.Parameter) and name.endswith("_") and not name.startswith("_"):
            return changed
        return func(*args, **kwargs)


def load_weights(location: str, wanted: Collection[str] = ()) -> State:
    """Return the state dict of the network whose keys are `wanted`, from a safetensors file or a torch file.

    Raises: UserError for a missing or damaged file, one that holds code, and one that holds several networks if the
    location selects none of them.
    """
    if location.startswith(RANDOM):
        raise UserError(
            f"checkpoint {location}: the sizes of this network follow from its file, so it cannot have random weights; "
            "download the file, and give its path"
        )
    path, name = local_file(location)
    contents: Any
    try:
        contents = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise UserError(f"checkpoint {location}: not a file of weights{again(location)}") from error
        raise UserError(
            f"checkpoint {location}: holds Python objects besides tensors, which are never executed "
            f"({_reason(error)}); load it where you trust it and save its state_dict alone with torch.save"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"checkpoint {location}: damaged, or not a file of weights ({_reason(error)}){again(location)}"
        ) from error
    if isinstance(contents, Mapping) and isinstance(contents.get(name), Mapping):
        contents, name = contents[name], ""
    networks = {"": contents} if _is_state(contents) else {}
    if isinstance(contents, Mapping) and not networks:
        networks = {str(key): value for key, value in contents.items() if _is_state(value)}
    if not networks:
        raise UserError(
            f"checkpoint {location}: holds no state dict; use a file that holds a network's tensors by name"
        )
    if len(networks) > 1:
        raise UserError(
            f"checkpoint {location}: holds {', '.join(networks)}; choose one, for example '#{next(iter(networks))}'"
        )
    state = dict(next(iter(networks.values())))
    prefix = f"{name}." if name else _prefix(state, wanted)
    if name and not any(key.startswith(prefix) for key in state):
        raise UserError(f"checkpoint {location}: the file has no keys that begin with '{prefix}', the name after '#'")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _check_archive(path: Path) -> None:
    """Raise ValueError for a zip file with a compressed or a damaged entry: torch would map wrong bytes as weights."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed; torch.save stores entries uncompressed")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} differs")


def _torch_load(path: Path) -> Any:
    _check_archive(path)
    with torch.serialization.safe_globals(_HARMLESS):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format of torch before 1.6


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and isinstance(one, Tensor) for key, one in value.items())


def _prefix(state: State, wanted: Collection[str]) -> str:
    """Return the prefix under which the most wanted keys are found, the shortest of several equally good ones."""
    first = next(iter(wanted), None)
    if first is None or all(key in state for key in wanted):
        return ""
    prefixes = {key.removesuffix(first) for key in state if key.endswith(f".{first}")} | {""}
    return min(prefixes, key=lambda prefix: (-sum(f"{prefix}{key}" in state for key in wanted), len(prefix)))


def _reason(error: Exception) -> str:
    """Return the one informative line of what torch says about a file."""
    lines = (line.strip() for line in str(error).splitlines() if "GLOBAL" in line)
    return next(lines, first_line(error))[:200]


def load_into(
    network: nn.Module, state: State, location: str, explain: Callable[[State], str] = lambda state: ""
) -> None:
    """Give a network the tensors of `state`, strictly. Buffers that are computed, not stored, may be in either.

    Raises: UserError, naming a missing, unexpected or unsuitable tensor, both as expected and as found.
    """

    def refuse(what: str) -> UserError:
        remedy = explain(state) or "use a file of this architecture and its hyper-parameters"
        return UserError(f"checkpoint {location}: {what}; {remedy}")

    expected, computed = network.state_dict(), dict(network.named_buffers())
    for key, tensor in expected.items():
        if key not in state:
            if key.endswith("num_batches_tracked"):  # torch before 0.4.1 did not save it, and inference ignores it
                state[key] = torch.zeros((), dtype=torch.int64)
                continue
            raise refuse(f"{key} {tuple(tensor.shape)} is missing")
        found = state[key]
        if found.shape != tensor.shape:
            raise refuse(f"{key} has shape {tuple(found.shape)}, the architecture expects {tuple(tensor.shape)}")
        plain = found.layout == torch.strided and found.device.type == "cpu" and not found.is_quantized
        if not plain or (tensor.is_floating_point() and not found.is_floating_point()):
            raise refuse(f"{key} is a tensor of {found.dtype}, {found.layout}, the architecture expects {tensor.dtype}")
    unexpected = next((key for key in state if key not in expected and key not in computed), None)
    if unexpected is not None:
        raise refuse(f"{unexpected} {tuple(state[unexpected].shape)} is not part of the architecture")
    network.load_state_dict({key: state[key] for key in expected}, assign=True)
