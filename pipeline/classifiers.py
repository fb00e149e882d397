"""CLASSIFIERS: networks that turn x_BCHW in [0, 1] into logits_BK, normalisation inside.

Shapes: B batch, C channels, H W image, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.spec import Normalize, RunSpec, UserError
from pipeline.weights import load_into, load_weights, own_function

# name -> (mean, std) per channel, in [0, 1] pixel units
_NORMALIZATIONS: dict[str, tuple[list[float], list[float]]] = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "center-imagenet": ([0.485, 0.456, 0.406], [1.0, 1.0, 1.0]),  # SmoothAdv's ImageNet models: mean only
    "half": ([0.5], [0.5]),
    "none": ([0.0], [1.0]),
}


class Normalized(nn.Module):
    """(x - mean) / std, then the network."""

    mean_1C11: Tensor
    std_1C11: Tensor

    def __init__(self, network: nn.Module, normalize: str | Normalize) -> None:
        super().__init__()
        mean, std = (normalize.mean, normalize.std) if isinstance(normalize, Normalize) else _NORMALIZATIONS[normalize]
        self.network = network
        self.identity = normalize == "none"
        self.register_buffer("mean_1C11", torch.tensor(mean)[None, :, None, None], persistent=False)
        self.register_buffer("std_1C11", torch.tensor(std)[None, :, None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.identity:
            x_BCHW = (x_BCHW - self.mean_1C11) / self.std_1C11
        dtype = next(self.network.parameters()).dtype
        return self.network(x_BCHW.to(dtype)).float()


class MnistCNN(nn.Module):
    """The embedded default's classifier: three convolutions of widths 16, 32, 32 and a linear layer, 17,000
    parameters; 1 x 28 x 28 in, 10 logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(16), nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 3 * 3, 10)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        x_BCHW = F.relu(self.norm2(self.conv2(x_BCHW)))
        x_BCHW = F.max_pool2d(F.relu(self.norm3(self.conv3(x_BCHW))), 2)
        return self.fc(x_BCHW.flatten(1))


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {"mnist_cnn": MnistCNN}


def build_classifier(spec: RunSpec, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The spec's classifier with its weights: x_BCHW in [0, 1] -> logits_BK.

    Raises: UserError for weights that do not load.
    """
    section = spec.classifier
    if ":" in section.arch:
        return own_function(section.arch)(spec, device)
    if section.checkpoint is None:
        raise UserError(f"classifier.checkpoint is missing: arch = {section.arch!r} needs a file of weights")
    with torch.device("meta"):
        network = CLASSIFIERS[section.arch]()
    load_into(network, load_weights(section.checkpoint), section.checkpoint)
    network = network.to(dtype=dtype).eval().requires_grad_(False)
    return Normalized(network, section.normalize).to(device).to(memory_format=torch.channels_last)


def check_classifier(spec: RunSpec) -> None:
    """Raises: UserError for an architecture that is not known."""
    arch = spec.classifier.arch
    if ":" in arch:
        own_function(arch)
    elif arch not in CLASSIFIERS:
        raise UserError(
            f"classifier.arch = {arch!r} is unknown: choose one of {', '.join(CLASSIFIERS)}, or name your own as "
            "package.module:function"
        )
