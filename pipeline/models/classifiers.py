"""CLASSIFIERS: networks that turn x_BCHW in [0, 1] into logits_BK, resizing and normalisation inside.

Shapes: B batch, C channels, H W image, K classes.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.locations import require_set
from pipeline.models.weights import as_folder, build, function_id, library, load_json, own_function, weights_id
from pipeline.spec import Normalize, RunSpec
from pipeline.storage.fetch import fetch_first

logger = logging.getLogger(__name__)

# name -> mean and std per channel, in [0, 1] pixel units
_NORMALIZATIONS = {
    "cifar10": Normalize(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010]),
    "imagenet": Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    "center-imagenet": Normalize(mean=[0.485, 0.456, 0.406], std=[1.0, 1.0, 1.0]),  # SmoothAdv: mean only
    "half": Normalize(mean=[0.5], std=[0.5]),
    "none": Normalize(mean=[0.0], std=[1.0]),
}
_AS_IS = _NORMALIZATIONS["none"]


class Input(NamedTuple):
    """What a network wants of its input, as the metadata that travel with its weights say."""

    normalize: Normalize
    size: int | None = None  # side in pixels; images of another size are resized to it
    interpolation: str = "bicubic"  # how, antialiased: bicubic or bilinear


class Architecture(NamedTuple):
    make: Callable[[int], nn.Module]  # number of classes -> network
    input: Input | None = None  # None: its files do not say, so the spec must
    weights: Callable[[], str | None] = lambda: None  # where the published weights lie
    beside: tuple[tuple[str, str], ...] = ()  # what votes_id calls a file that stands beside the weights, its location
    load: Callable[[str, torch.device], nn.Module] | None = None  # weights, device -> network; None: `weights.build`


class MnistCNN(nn.Module):
    """The embedded default's classifier: three convolutions of widths 16, 32, 32 and a linear layer, 17,000
    parameters; 1 x 28 x 28 in."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(16), nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 3 * 3, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)), inplace=True)
        x_BCHW = F.relu(self.norm2(self.conv2(x_BCHW)), inplace=True)
        x_BCHW = F.max_pool2d(F.relu(self.norm3(self.conv3(x_BCHW)), inplace=True), 2)
        return self.fc(x_BCHW.flatten(1))


class _BasicBlock(nn.Module):
    def __init__(self, width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out_width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.downsample: nn.Module = nn.Identity()
        if (stride, width) != (1, out_width):
            convolution = nn.Conv2d(width, out_width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        return F.relu(self.bn2(self.conv2(h_BCHW)).add_(self.downsample(x_BCHW)), inplace=True)


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images of depth 6 n + 2 (He et al. 2016, arXiv 1512.03385, section 4.2), projecting where the
    width doubles, with the key names of Cohen's files."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def layer(width: int, out_width: int, stride: int) -> nn.Sequential:
            first = _BasicBlock(width, out_width, stride)
            rest = (_BasicBlock(out_width, out_width, 1) for _ in range((depth - 2) // 6 - 1))
            return nn.Sequential(first, *rest)

        self.layer1, self.layer2, self.layer3 = layer(16, 16, 1), layer(16, 32, 2), layer(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        h_BCHW = self.layer3(self.layer2(self.layer1(h_BCHW)))
        return self.fc(F.avg_pool2d(h_BCHW, 8).flatten(1))


def _resnet50(num_classes: int) -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=num_classes)


CLASSIFIERS: dict[str, Architecture] = {
    "mnist_cnn": Architecture(MnistCNN, Input(_AS_IS)),
    "cifar_resnet20": Architecture(lambda num_classes: CifarResNet(20, num_classes)),
    "cifar_resnet110": Architecture(lambda num_classes: CifarResNet(110, num_classes)),
    "imagenet32_resnet110": Architecture(lambda num_classes: CifarResNet(110, num_classes)),
    "resnet50": Architecture(_resnet50),
}


def _torchvision(name: str) -> Architecture:
    """A model of torchvision, with the input of its default weights."""
    from torchvision import models

    if name not in models.list_models(module=models) or name in ("googlenet", "inception_v3"):
        # those two change their input in a way of their own, which no metadata tell
        raise UserError(
            f"classifier.arch = 'torchvision:{name}': not a classifier of torchvision that can be used here; take one "
            "of torchvision.models.list_models()"
        )
    weights = models.get_model_weights(name).DEFAULT
    says = weights.transforms()
    return Architecture(
        lambda num_classes: models.get_model(name, weights=None, num_classes=num_classes),
        Input(Normalize(mean=says.mean, std=says.std), says.crop_size[0], says.interpolation.value),
        lambda: weights.url,
    )


def _timm(name: str) -> Architecture:
    """A model of timm, with the input of its pretrained configuration."""
    create, models = library("timm", "create_model"), library("timm", "models")
    says = models.get_pretrained_cfg(name) if models.is_model(name) else None
    if says is None:
        raise UserError(
            f"classifier.arch = 'timm:{name}': the installed timm knows no such model; take one of timm.list_models()"
        )
    home = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return Architecture(
        lambda num_classes: create(name, num_classes=num_classes),
        Input(Normalize(mean=list(says.mean), std=list(says.std)), says.input_size[-1], says.interpolation),
        lambda: f"{home}/{says.hf_hub_id}/resolve/main/model.safetensors" if says.hf_hub_id else says.url or None,
    )


def _transformers(spec: RunSpec) -> Architecture:
    """An image classifier in transformers' layout: config.json, preprocessor_config.json and weights in one folder."""
    folder = require_set("classifier.checkpoint", spec.classifier.checkpoint or "").rstrip("/")
    if not folder:
        raise UserError("classifier.checkpoint is missing: arch = 'transformers' needs the folder of a model")
    auto = library("transformers", "AutoModelForImageClassification")
    files = {name: str(fetch_first([f"{folder}/{name}.json"])) for name in ("config", "preprocessor_config")}
    config, says = load_json(files["config"]), load_json(files["preprocessor_config"])
    size = says.get("size", {}).get("height") if isinstance(says.get("size"), dict) else says.get("size")
    wants = Input(
        Normalize(mean=says["image_mean"], std=says["image_std"]) if says.get("do_normalize", True) else _AS_IS,
        size,
        {2: "bilinear", 3: "bicubic"}.get(says.get("resample", 2), f"resample = {says.get('resample')}"),
    )

    def make(num_classes: int) -> nn.Module:
        configuration = library("transformers", "AutoConfig").for_model(**config)
        if configuration.num_labels != num_classes:
            raise UserError(
                f"{folder}: a classifier of {configuration.num_labels} classes, the data set has {num_classes}: take "
                "one of this data set, or set data.num_classes"
            )
        return _Logits(auto.from_config(configuration))

    def load(weights: str, device: torch.device) -> nn.Module:
        names = {f"{'model' if weights.endswith('.safetensors') else 'pytorch_model'}{Path(weights).suffix}": weights}
        with as_folder({**names, "config.json": files["config"]}) as local:
            try:
                network, found = auto.from_pretrained(local, output_loading_info=True, local_files_only=True)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); get the files again"
                ) from error
        amiss = sorted({*found["missing_keys"], *found["unexpected_keys"]})
        if amiss:
            raise UserError(
                f"{folder}: {amiss[0]} and {len(amiss) - 1} more keys are missing or superfluous; get the files again"
            )
        return _Logits(network).to(device).eval().requires_grad_(False)

    def weights() -> str:
        return str(fetch_first([f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"]))

    return Architecture(make, wants, weights, tuple((f"classifier.{name}", path) for name, path in files.items()), load)


class _Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network(x_BCHW).logits


def _architecture(spec: RunSpec) -> Architecture | None:
    """None for an own function. Raises: UserError for a name that is not known."""
    arch = spec.classifier.arch
    family, colon, name = arch.partition(":")
    if arch == "transformers":
        return _transformers(spec)
    if colon and family in _FAMILIES:
        return _FAMILIES[family](name)
    if colon:
        own_function(arch)
        return None
    if arch not in CLASSIFIERS:
        raise UserError(
            f"classifier.arch = {arch!r} is unknown: choose one of {', '.join(CLASSIFIERS)}, transformers, "
            "torchvision:NAME, timm:NAME, or name your own as package.module:function"
        )
    return CLASSIFIERS[arch]


_FAMILIES: dict[str, Callable[[str], Architecture]] = {"torchvision": _torchvision, "timm": _timm}


def _input(spec: RunSpec, architecture: Architecture) -> Input:
    """What the spec and the metadata together say of the network's input."""
    normalize, interpolation = spec.classifier.normalize, spec.classifier.interpolation
    if isinstance(normalize, str):
        normalize = _NORMALIZATIONS[normalize]
    if architecture.input is not None:
        says = architecture.input
        return Input(normalize or says.normalize, says.size, interpolation or says.interpolation)
    if normalize is None:
        raise UserError(
            f"classifier.normalize is missing, and files of {spec.classifier.arch} do not say it: set it; Cohen's "
            "CIFAR models want 'cifar10', his ImageNet models 'imagenet', SmoothAdv's ImageNet models 'center-imagenet'"
        )
    return Input(normalize)


class Prepared(nn.Module):
    """Resize where the size differs, (x - mean) / std, then the network."""

    mean_1C11: Tensor
    std_1C11: Tensor

    def __init__(self, network: nn.Module, wants: Input) -> None:
        super().__init__()
        self.network = network
        self.wants = wants
        self.as_is = wants.normalize == _AS_IS
        self.register_buffer("mean_1C11", torch.tensor(wants.normalize.mean)[None, :, None, None], persistent=False)
        self.register_buffer("std_1C11", torch.tensor(wants.normalize.std)[None, :, None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        size = self.wants.size
        if size is not None and x_BCHW.shape[2:] != (size, size):
            mode = self.wants.interpolation
            x_BCHW = F.interpolate(x_BCHW, (size, size), mode=mode, antialias=True, align_corners=False)
        if not self.as_is:
            x_BCHW = (x_BCHW - self.mean_1C11) / self.std_1C11
        dtype = next(self.network.parameters()).dtype
        return self.network(x_BCHW.to(dtype)).float()


def load_classifier(spec: RunSpec, device: torch.device, channels: int, num_classes: int) -> Callable[[Tensor], Tensor]:
    """The spec's classifier as it was trained, float32: x_BCHW in [0, 1] -> logits_BK; weightless on the meta device.

    Raises: UserError for weights that do not load and for images that do not fit.
    """
    architecture = _architecture(spec)
    if architecture is None:
        return own_function(spec.classifier.arch)(spec, device)
    wants = _input(spec, architecture)
    if len(wants.normalize.mean) not in (1, channels):
        raise UserError(
            f"the images have {channels} channels, classifier.normalize has {len(wants.normalize.mean)}: take a "
            "classifier of such images, or the normalisation that it was trained with"
        )
    location = "" if device.type == "meta" else _weights(spec, architecture)

    def explain(state: dict[str, Tensor]) -> str:
        return (
            f"the architecture is {spec.classifier.arch} for the data set's {num_classes} classes; take its file, or "
            "another classifier.arch"
        )

    if architecture.load is not None and device.type != "meta":
        network = architecture.load(location, device)
    else:
        network = build(lambda: architecture.make(num_classes), location, device, explain=explain)
    first = next((one for one in network.parameters() if one.ndim == 4), None)
    if first is not None and first.shape[1] != channels:
        raise UserError(
            f"the classifier takes images of {first.shape[1]} channels, the data set's have {channels}: take a "
            "classifier of such images"
        )
    return Prepared(network, wants).to(device)


def build_classifier(
    spec: RunSpec, device: torch.device, dtype: torch.dtype, channels: int, num_classes: int
) -> Callable[[Tensor], Tensor]:
    """The same, made fast and in the precision that f asks for. Raises: UserError, as `load_classifier` does."""
    classifier = load_classifier(spec, device, channels, num_classes)
    if isinstance(classifier, Prepared):
        if device.type != "meta":
            classifier.network = fold_batch_norms(classifier.network)
        classifier.network.to(dtype)
        classifier.to(memory_format=torch.channels_last)
    return classifier


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Each batch norm merged into the convolution before it: the same function but for rounding."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    try:
        return fuse(network)
    except Exception as error:  # a network may do anything that cannot be traced, and is only slower as it is
        logger.info("batch norms stay apart, the network cannot be traced (%s: %s)", type(error).__name__, error)
        return network


def classifier_ids(spec: RunSpec) -> dict[str, str]:
    """What votes_id must know of the classifier besides the spec: the weights' hash, an own function's source hash, the
    input that a library's metadata ask for.

    Raises: UserError for a missing file, another sha256 than the spec's, or a function without a source file.
    """
    architecture, arch = _architecture(spec), spec.classifier.arch
    ids = {}
    if architecture is None:
        ids["classifier.source"] = function_id(arch)
    elif arch not in CLASSIFIERS:
        wants = _input(spec, architecture)
        says = {**wants._asdict(), "normalize": wants.normalize.model_dump()}
        ids["classifier.input"] = json.dumps(says, sort_keys=True)
    if architecture is not None or spec.classifier.checkpoint is not None:
        ids["classifier"] = weights_id(_weights(spec, architecture), spec.classifier.sha256)
    beside = architecture.beside if architecture else ()
    return ids | {name: weights_id(location) for name, location in beside}


def _weights(spec: RunSpec, architecture: Architecture | None) -> str:
    """Where the weights lie: where the spec says, else where a library publishes them."""
    given = None if architecture and architecture.load else spec.classifier.checkpoint  # a folder where it has a loader
    location = given or (architecture.weights() if architecture else None)
    if location is None:
        raise UserError(f"classifier.checkpoint is missing: arch = {spec.classifier.arch!r} needs a file of weights")
    return require_set("classifier.checkpoint", location)


def check_classifier(spec: RunSpec) -> None:
    """Raises: UserError for an architecture that is not known, or whose normalisation or interpolation is not."""
    architecture = _architecture(spec)
    if architecture is None:
        return
    wants = _input(spec, architecture)
    if wants.interpolation not in ("bicubic", "bilinear"):
        raise UserError(
            f"classifier.arch = {spec.classifier.arch!r} resizes by {wants.interpolation!r}; bicubic and bilinear are "
            "known here: name your own as package.module:function"
        )
