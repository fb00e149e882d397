"""Adapters: few trained weights in a frozen classifier, in a file of their own together with the last layer.

    lora         y = W x + b + alpha / rank B A x, with peft      Hu et al. 2021, arXiv 2106.09685, section 4.1
    bottleneck   y' = y + U relu(D y + c) + e, y = W x + b        Houlsby et al. 2019, arXiv 1902.00751, section 2.1

B, U and e start as zero, so that a new adapter changes no output. A trained lora is merged into W. W may also be a
convolution: then A is one of the same size, and B, D and U are convolutions of one pixel.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.files import library
from diffsmooth.pipeline.models.weights import State, load_into, load_weights
from diffsmooth.pipeline.spec import Adapter

_TARGETS = {"lora": ["*"], "bottleneck": ["*.proj", "*.fc2"]}  # the default ones, of linear layers


class Bottleneck(nn.Module):
    """A linear layer or a convolution whose output passes, pixel by pixel, through a residual bottleneck."""

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(base_layer, nn.Conv2d):
            self.down, self.up = (
                nn.Conv2d(base_layer.out_channels, rank, 1),
                nn.Conv2d(rank, base_layer.out_channels, 1),
            )
        else:
            self.down, self.up = nn.Linear(base_layer.out_features, rank), nn.Linear(rank, base_layer.out_features)
        for one in (self.up.weight, self.up.bias):
            assert one is not None
            nn.init.zeros_(one)
        self.to(base_layer.weight.device)

    @property
    def weight(self) -> Tensor:  # some networks look at the weights of their layers
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y + self.up(F.relu(self.down(y)))


def on_meta(make: Callable[[], nn.Module]) -> State:
    """Return the state dict of a network without its values."""
    with torch.device("meta"):
        return dict(make().state_dict())


def last_layer_keys(make: Callable[[int], nn.Module], num_classes: int) -> set[str]:
    """Return the keys of the layers whose shape depends on the number of classes."""
    one, other = on_meta(partial(make, num_classes)), on_meta(partial(make, num_classes + 1))
    return {key for key, tensor in one.items() if tensor.shape != other[key].shape}


def add_adapter(network: nn.Module, adapter: Adapter, last: set[str], arch: str) -> set[str]:
    """Add new weights to a network whose last layer has the keys `last`; return the keys of all that is trained.

    Raises: UserError if the targets match no layer.
    """
    names = _targets(network, adapter, last, arch)
    frozen = len(network.state_dict())
    if adapter.kind == "lora":
        lora, inject = library("peft", "LoraConfig"), library("peft", "inject_adapter_in_model")
        pattern = "|".join(map(re.escape, names))
        inject(lora(r=adapter.rank, lora_alpha=adapter.alpha or adapter.rank, target_modules=pattern), network)
        added = {key for key in network.state_dict() if ".lora_" in key}
    else:
        for name in names:
            parent, _, child = name.rpartition(".")
            layer = network.get_submodule(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            setattr(network.get_submodule(parent), child, Bottleneck(layer, adapter.rank))
        added = {f"{name}.{part}" for name in names for part in ("down.weight", "down.bias", "up.weight", "up.bias")}
    assert len(network.state_dict()) == frozen + len(added)
    return added | last


def _targets(network: nn.Module, adapter: Adapter, last: set[str], arch: str) -> list[str]:
    """Return the names of the layers that an adapter changes."""
    modules = dict(network.named_modules())
    uncalled = [name for name, one in modules.items() if isinstance(one, nn.MultiheadAttention)]
    layers = [
        name
        for name, one in modules.items()
        if isinstance(one, nn.Linear | nn.Conv2d)
        and f"{name}.weight" not in last
        and name.rpartition(".")[0] not in uncalled
        and (adapter.kind != "lora" or getattr(one, "groups", 1) == 1)  # peft merges no grouped convolution
    ]
    if adapter.targets:
        for pattern in adapter.targets:
            if not any(fnmatch(name, pattern) for name in layers):
                raise _no_match([pattern], arch, layers)
        return [name for name in layers if any(fnmatch(name, pattern) for pattern in adapter.targets)]
    linear, patterns = [name for name in layers if isinstance(modules[name], nn.Linear)], _TARGETS[adapter.kind]
    if not linear:
        shown = f"set targets to convolutions, {_some(layers)}" if layers else "use another arch"
        raise UserError(
            f"classifier.adapter.targets is missing, but arch = {arch!r} has no linear layer besides the last; {shown}"
        )
    found = [name for name in linear if any(fnmatch(name, pattern) for pattern in patterns)]
    if not found:
        raise _no_match(patterns, arch, linear)
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _no_match(patterns: list[str], arch: str, layers: list[str]) -> UserError:
    return UserError(
        f"classifier.adapter.targets = {patterns} match no layer of arch = {arch!r}; choose from {_some(layers)}"
    )


def load_adapter(network: nn.Module, adapter: Adapter, location: str, trained: set[str]) -> None:
    """Give the keys `trained` of a network the tensors of an adapter's file.

    Raises: UserError for a file that does not hold exactly these keys in these shapes.
    """
    state = load_weights(location, trained)
    frozen = {key: tensor for key, tensor in network.state_dict().items() if key not in trained}

    def explain(_: State) -> str:
        return (
            f"it must be an adapter of kind = {adapter.kind!r} with rank = {adapter.rank} and these targets, for this "
            "classifier and these classes; correct [classifier.adapter], or use another file"
        )

    if whole := state.keys() & frozen.keys():
        raise UserError(f"checkpoint {location}: {min(whole)} is not part of the adapter; {explain(state)}")
    load_into(network, frozen | state, location, explain)


def merge(network: nn.Module, adapter: Adapter) -> None:
    """Merge the weights of lora into the linear layers that they change; leave a bottleneck as it is."""
    if adapter.kind != "lora":
        return
    lora = library("peft", "tuners").lora.LoraLayer
    for name, layer in list(network.named_modules()):
        if isinstance(layer, lora):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
