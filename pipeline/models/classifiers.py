"""CLASSIFIERS: networks that turn x_BCHW in [0, 1] into logits_BK, including resizing and normalisation.

Shapes: B batch, C channels, H W image, K classes.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.locations import require_set
from diffsmooth.pipeline.models.adapters import add_adapter, last_layer_keys, load_adapter, merge, on_meta
from diffsmooth.pipeline.models.arch import TIMM, TORCHVISION, is_own
from diffsmooth.pipeline.models.diffusion_classifier import resolve_diffusion
from diffsmooth.pipeline.models.files import (
    Config,
    as_folder,
    first_file,
    library,
    library_errors,
    load_json,
    parse_config,
    weights_id,
)
from diffsmooth.pipeline.models.own import OwnNetwork
from diffsmooth.pipeline.models.rrcm import PRESETS as RRCM_PRESETS
from diffsmooth.pipeline.models.rrcm import resolve_rrcm
from diffsmooth.pipeline.models.weights import RANDOM, State, build, build_from, load_weights
from diffsmooth.pipeline.spec import Adapter, Normalize, RunSpec
from diffsmooth.pipeline.spec import Classifier as Section

logger = logging.getLogger(__name__)

# name -> mean and standard deviation per channel, in [0, 1] pixel units
_NORMALIZATIONS = {
    "cifar10": Normalize(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010]),
    "imagenet": Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    "center-imagenet": Normalize(mean=[0.485, 0.456, 0.406], std=[1.0, 1.0, 1.0]),  # SmoothAdv: mean only
    "half": Normalize(mean=[0.5], std=[0.5]),
    "none": Normalize(mean=[0.0], std=[1.0]),
}
_IDENTITY = _NORMALIZATIONS["none"]

Logits = Callable[[Tensor], Tensor]  # x_BCHW in [0, 1] -> logits_BK


class Input(NamedTuple):
    """The input that a network expects, according to the metadata of its weights."""

    normalize: Normalize
    size: int | None = None  # side in pixels; images of another size are resized to it
    interpolation: str = "bicubic"  # of the resizing, which antialiases: bicubic or bilinear


class Architecture(NamedTuple):
    make: Callable[[int], nn.Module]  # number of classes -> network
    input: Input | None = None  # None: the files do not contain it, so the spec must
    published: Callable[[], str | None] = lambda: None  # location of the published weights
    configs: tuple[tuple[str, str], ...] = ()  # what votes_id calls each configuration file, and its location
    load: Callable[[str, torch.device], nn.Module] | None = None  # weights, device -> network; None: `weights.build`
    others: tuple[Callable[[int], nn.Module], ...] = ()  # variants, of which the keys of the file select one
    convert: Callable[[State], State] = lambda state: state  # renames the keys of other layouts


class MnistCNN(nn.Module):
    """The classifier of the embedded defaults, for 1 x 28 x 28 images.

    Three convolutions and a linear layer: 17,000 parameters with the widths for MNIST, 104,000 with those for
    Fashion-MNIST.
    """

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int] = (16, 32, 32)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(1, first, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(first), nn.BatchNorm2d(second), nn.BatchNorm2d(third)
        self.fc = nn.Linear(third * 3 * 3, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)), inplace=True)
        x_BCHW = F.relu(self.norm2(self.conv2(x_BCHW)), inplace=True)
        x_BCHW = F.max_pool2d(F.relu(self.norm3(self.conv3(x_BCHW)), inplace=True), 2)
        return self.fc(x_BCHW.flatten(1))


class _PaddedShortcut(nn.Module):
    """Every second pixel, with zeros for the new channels, half of them before and half after the others."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        added = x_BCHW.shape[1] // 2
        return F.pad(x_BCHW[:, :, ::2, ::2], (0, 0, 0, 0, added, added))


class _BasicBlock(nn.Module):
    def __init__(self, width: int, out_width: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out_width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.downsample: nn.Module = nn.Identity()
        if (stride, width) != (1, out_width) and padded:
            self.downsample = _PaddedShortcut()
        elif (stride, width) != (1, out_width):
            convolution = nn.Conv2d(width, out_width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        return F.relu(self.bn2(self.conv2(h_BCHW)).add_(self.downsample(x_BCHW)), inplace=True)


class CifarResNet(nn.Module):
    """ResNet of depth 6 n + 2 for 32 x 32 images (He et al. 2016, arXiv 1512.03385, section 4.2).

    Where the width doubles, the shortcut is a projection (option B, as in Cohen's files, whose key names are used), or
    `padded` with zeros (option A, which has no weights).
    """

    def __init__(self, depth: int, num_classes: int, padded: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def layer(width: int, out_width: int, stride: int) -> nn.Sequential:
            first = _BasicBlock(width, out_width, stride, padded)
            rest = (_BasicBlock(out_width, out_width, 1, padded) for _ in range((depth - 2) // 6 - 1))
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


def _cifar_resnet(depth: int) -> Architecture:
    """Return the ResNet in all public layouts: either shortcut, and two names each for the shortcut and last layer."""

    def convert(state: State) -> State:
        renamed = {re.sub(r"\.shortcut\.(?=[01]\.)", ".downsample.", key): value for key, value in state.items()}
        return {re.sub(r"^linear\.", "fc.", key): value for key, value in renamed.items()}

    return Architecture(
        lambda num_classes: CifarResNet(depth, num_classes),
        others=(lambda num_classes: CifarResNet(depth, num_classes, padded=True),),
        convert=convert,
    )


CLASSIFIERS: dict[str, Architecture] = {
    "mnist_cnn": Architecture(MnistCNN, Input(_IDENTITY)),
    "fashion_cnn": Architecture(partial(MnistCNN, widths=(32, 64, 128)), Input(_IDENTITY)),
    **{f"cifar_resnet{depth}": _cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)},
    "imagenet32_resnet110": _cifar_resnet(110),
    "resnet50": Architecture(_resnet50),
}


def _torchvision(name: str) -> Architecture:
    """Return a torchvision model with the input of its default weights."""
    from torchvision import models

    # these two transform their input in a way that their metadata do not describe
    if name not in models.list_models(module=models) or name in ("googlenet", "inception_v3"):
        raise UserError(
            f"classifier.arch = 'torchvision:{name}' is not a torchvision classifier that can be used here; choose one "
            "of torchvision.models.list_models()"
        )
    weights = models.get_model_weights(name).DEFAULT
    metadata = weights.transforms()
    return Architecture(
        lambda num_classes: models.get_model(name, weights=None, num_classes=num_classes),
        Input(Normalize(mean=metadata.mean, std=metadata.std), metadata.crop_size[0], metadata.interpolation.value),
        lambda: weights.url,
    )


def _timm(name: str, options: Mapping[str, str | bool | int | float]) -> Architecture:
    """Return a timm model with the input of its pretrained configuration; `options` go to `timm.create_model`."""
    create, models = library("timm", "create_model"), library("timm", "models")
    metadata = models.get_pretrained_cfg(name) if models.is_model(name) else None
    if metadata is None:
        raise UserError(
            f"classifier.arch = 'timm:{name}' is not a model of the installed timm; choose one of timm.list_models()"
        )
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    on_hub = f"{hub}/{metadata.hf_hub_id}/resolve/main/model.safetensors"
    size = options.get("img_size", metadata.input_size[-1])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"classifier.options.img_size = {size!r} must be a number of pixels, such as 224")

    def make(num_classes: int) -> nn.Module:
        try:
            return create(name, num_classes=num_classes, **options)
        except Exception as error:  # models of timm raise anything for options that they do not know
            raise UserError(
                f"classifier.options = {dict(options)} does not suit timm:{name} ({type(error).__name__}: "
                f"{first_line(error)}); use arguments of timm.create_model"
            ) from error

    return Architecture(
        make,
        Input(Normalize(mean=list(metadata.mean), std=list(metadata.std)), size, metadata.interpolation),
        lambda: on_hub if metadata.hf_hub_id else metadata.url or None,
    )


class _Size(Config):
    height: int | None = Field(default=None, ge=1, le=10_000)


class _Preprocessor(Config):
    """The keys of transformers' preprocessor_config.json that we use."""

    do_normalize: bool | None = True
    image_mean: list[float] = Field(default=[])
    image_std: list[float] = Field(default=[])
    size: Annotated[int, Field(ge=1, le=10_000)] | _Size | None = None
    resample: int | None = 2  # Pillow's number of the interpolation

    @model_validator(mode="after")
    def _check_normalisation(self) -> Self:
        suits = len(self.image_mean) == len(self.image_std) > 0 and all(std > 0 for std in self.image_std)
        if self.do_normalize and not suits:
            raise ValueError(f"image_mean = {self.image_mean} and image_std = {self.image_std} are no normalisation")
        return self

    def input(self) -> Input:
        normalize = Normalize(mean=self.image_mean, std=self.image_std) if self.do_normalize else _IDENTITY
        size = self.size.height if isinstance(self.size, _Size) else self.size
        interpolations = {2: "bilinear", 3: "bicubic"}
        return Input(normalize, size, interpolations.get(self.resample or 0, f"resample = {self.resample}"))


def _transformers(section: Section) -> Architecture:
    """Return an image classifier in transformers' layout.

    Its folder holds config.json, preprocessor_config.json and the weights.
    """
    folder = require_set("classifier.checkpoint", section.checkpoint or "").rstrip("/")
    if not folder:
        raise UserError("classifier.checkpoint is missing, but arch = 'transformers' needs the folder of a model")
    auto = library("transformers", "AutoModelForImageClassification")
    files = {name: first_file([f"{folder}/{name}.json"]) for name in ("config", "preprocessor_config")}
    config, processor = files["config"], files["preprocessor_config"]
    content = load_json(config)
    expected = parse_config(_Preprocessor, load_json(processor), processor).input()

    def make(num_classes: int) -> nn.Module:
        with library_errors(config):
            configuration = library("transformers", "AutoConfig").for_model(**content)
            if configuration.num_labels != num_classes:
                raise UserError(
                    f"{folder}: the classifier has {configuration.num_labels} classes, but the data set has "
                    f"{num_classes}; use a classifier of this data set, or set data.num_classes"
                )
            return _OnlyLogits(auto.from_config(configuration))

    def load(weights: str, device: torch.device) -> nn.Module:
        names = {f"{'model' if weights.endswith('.safetensors') else 'pytorch_model'}{Path(weights).suffix}": weights}
        with as_folder({**names, "config.json": config}) as local, library_errors(folder):
            network, found = auto.from_pretrained(local, output_loading_info=True, local_files_only=True)
        wrong = sorted({*found["missing_keys"], *found["unexpected_keys"]})
        if wrong:
            raise UserError(f"{folder}: {wrong[0]} and {len(wrong) - 1} more keys are missing or unexpected")
        return _OnlyLogits(network).to(device).eval().requires_grad_(False)

    def weights() -> str:
        return first_file([f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"])

    configs = tuple((f"classifier.{name}", path) for name, path in files.items())
    return Architecture(make, expected, weights, configs, load)


class _OnlyLogits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network(x_BCHW).logits


class Prepared(nn.Module):
    """A network preceded by its preprocessing: resizing if the size differs, then (x - mean) / std."""

    mean_1C11: Tensor
    std_1C11: Tensor

    def __init__(self, network: nn.Module, expected: Input) -> None:
        super().__init__()
        self.network = network
        self.expected = expected
        self.is_identity = expected.normalize == _IDENTITY
        self.register_buffer("mean_1C11", torch.tensor(expected.normalize.mean)[None, :, None, None], persistent=False)
        self.register_buffer("std_1C11", torch.tensor(expected.normalize.std)[None, :, None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        size = self.expected.size
        if size is not None and x_BCHW.shape[2:] != (size, size):
            mode = self.expected.interpolation
            x_BCHW = F.interpolate(x_BCHW, (size, size), mode=mode, antialias=True, align_corners=False)
        if not self.is_identity:
            x_BCHW = (x_BCHW - self.mean_1C11) / self.std_1C11
        dtype = next(self.network.parameters()).dtype
        return self.network(x_BCHW.to(dtype)).float()


class ClassifierSource(Protocol):
    """A spec's classifier, checked but not loaded."""

    def ids(self) -> dict[str, str]:
        """Return what votes_id must know besides the spec.

        These are the hashes of the files or of an own function's source, and the input that a library's metadata
        describe. Raises: UserError for a missing file or a sha256 that differs from the spec's.
        """
        ...

    def load(self, device: torch.device, channels: int, num_classes: int) -> Logits:
        """Return the classifier as it was trained, float32; on the meta device, without its weights.

        Raises: UserError for weights that do not load and for images that do not fit.
        """
        ...

    def build(self, device: torch.device, dtype: torch.dtype, channels: int, num_classes: int) -> Logits:
        """Return the classifier made fast and in a precision. Raises: UserError, as `load` does."""
        ...


class _OwnClassifier(OwnNetwork):
    def load(self, device: torch.device, channels: int, num_classes: int) -> Logits:
        return self.call(device)

    def build(self, device: torch.device, dtype: torch.dtype, channels: int, num_classes: int) -> Logits:
        return self.call(device)


@dataclass(frozen=True, kw_only=True)
class Start:
    """That a classifier is loaded to be trained, and what it starts with."""

    seed: int  # of new weights
    new_last_layer: bool = False  # whatever the checkpoint holds, which may have another number of classes


@dataclass(frozen=True)
class _KnownClassifier:
    """A classifier of CLASSIFIERS or of a library."""

    section: Section
    architecture: Architecture
    expected: Input
    start: Start | None

    def ids(self) -> dict[str, str]:
        ids = {}
        if self.section.arch not in CLASSIFIERS:
            metadata = {**self.expected._asdict(), "normalize": self.expected.normalize.model_dump()}
            ids["classifier.input"] = json.dumps(metadata, sort_keys=True)
        ids["classifier"] = weights_id(self._location(), self.section.sha256)
        if (adapter := self.section.adapter) is not None and (adapter.checkpoint is not None or self.start is None):
            ids["classifier.adapter"] = weights_id(_location_of(adapter), adapter.sha256)
        return ids | {name: weights_id(location) for name, location in self.architecture.configs}

    def _location(self) -> str:
        """Return the location of the weights: the spec's, or else where a library publishes them."""
        given = None if self.architecture.load else self.section.checkpoint  # a loader's checkpoint is a folder
        location = given or self.architecture.published()
        if location is None:
            raise UserError(f"classifier.checkpoint is missing, but arch = {self.section.arch!r} needs weights")
        return require_set("classifier.checkpoint", location)

    def load(self, device: torch.device, channels: int, num_classes: int) -> Prepared:
        given = len(self.expected.normalize.mean)
        if given not in (1, channels):
            raise UserError(
                f"the images have {channels} channels, but classifier.normalize has {given}; use a classifier for such "
                "images, or the normalisation that it was trained with"
            )
        network = self._network(device, num_classes)
        if self.section.adapter is not None:
            self._adapt(network, self.section.adapter, num_classes)
        first = next((one for one in network.parameters() if one.ndim == 4), None)
        if first is not None and first.shape[1] != channels:
            raise UserError(
                f"the classifier processes images with {first.shape[1]} channels, but the data set's have {channels}; "
                "use a classifier for such images"
            )
        return Prepared(network, self.expected).to(device)

    def _network(self, device: torch.device, num_classes: int) -> nn.Module:
        """Return the network with the weights of the checkpoint, without an adapter."""
        location = "" if device.type == "meta" else self._location()
        adapter = self.section.adapter
        replaced = self.start is not None and self.start.new_last_layer
        replaced |= adapter is not None and not (adapter.checkpoint or RANDOM).startswith(RANDOM)
        if replaced and location and not location.startswith(RANDOM):
            return self._with_new_last_layer(location, device, num_classes)

        def explain(state: State) -> str:
            new = "" if self.start is None else ", or set training.new_last_layer = true for other classes"
            return (
                f"the architecture is {self.section.arch} with the data set's {num_classes} classes; use its file or "
                f"another classifier.arch{new}"
            )

        if self.architecture.load is not None and device.type != "meta":
            return self.architecture.load(location, device)
        return build(
            lambda: self.architecture.make(num_classes),
            location,
            device,
            convert=self._convert,
            others=[partial(make, num_classes) for make in self.architecture.others],
            explain=explain,
        )

    def _with_new_last_layer(self, location: str, device: torch.device, num_classes: int) -> nn.Module:
        """Return the network with the weights of a checkpoint but for its last layer.

        That one has random weights for a start; otherwise it is zero, because the adapter's file holds it.
        """
        makes = [partial(make, num_classes) for make in (self.architecture.make, *self.architecture.others)]
        state = self._convert(load_weights(location, on_meta(makes[0]).keys()))
        make = min(makes, key=lambda one: len(on_meta(one).keys() ^ state.keys()))
        last = last_layer_keys(make.func, num_classes)
        if self.start is None:
            new = {key: torch.zeros(tensor.shape) for key, tensor in on_meta(make).items() if key in last}
        else:
            initial = build(make, f"{RANDOM}{self.start.seed}", torch.device("cpu")).state_dict()
            new = {key: initial[key] for key in last}
        kept = {key: tensor for key, tensor in state.items() if key not in last}
        return build_from(make, kept | new, location, device)

    def _adapt(self, network: nn.Module, adapter: Adapter, num_classes: int) -> None:
        """Add the adapter, whose weights are merged if they can be, and otherwise frozen; or trainable for a start."""
        last = last_layer_keys(self.architecture.make, num_classes)
        location = "" if next(network.parameters()).is_meta else _location_of(adapter)
        is_random = location.startswith(RANDOM)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(location.removeprefix(RANDOM)) if is_random else 0)
            trained = add_adapter(network, adapter, last, self.section.arch)
        if location and not is_random:
            load_adapter(network, adapter, location, trained)
        if self.start is None:
            merge(network, adapter)
        network.requires_grad_(False)
        for key in trained if self.start is not None else ():
            network.get_parameter(key).requires_grad_(True)

    def _convert(self, state: State) -> State:
        """Rename the keys of other layouts, and leave out those that the spec ignores."""
        kept = {
            key: value
            for key, value in state.items()
            if not any(fnmatch(key, pattern) for pattern in self.section.ignore)
        }
        return self.architecture.convert(kept)

    def build(self, device: torch.device, dtype: torch.dtype, channels: int, num_classes: int) -> Prepared:
        classifier = self.load(device, channels, num_classes)
        if device.type != "meta":
            classifier.network = fold_batch_norms(classifier.network)
        classifier.network.to(dtype)
        return classifier.to(memory_format=torch.channels_last)


def _location_of(adapter: Adapter) -> str:
    if adapter.checkpoint is None:
        raise UserError("classifier.adapter.checkpoint is missing; set it to the file that diffsmooth train wrote")
    return require_set("classifier.adapter.checkpoint", adapter.checkpoint)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Merge each batch norm into the convolution before it, which changes the output by rounding alone."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    try:
        return fuse(network)
    except Exception as error:  # tracing can fail in any way; without it the network is only slower
        logger.info("batch norms are not merged: tracing failed with %s: %s", type(error).__name__, first_line(error))
        return network


def resolve_classifier(spec: RunSpec, start: Start | None = None) -> ClassifierSource:
    """Check a spec's classifier without loading its weights; with `start`, it will be loaded to be trained.

    Raises: UserError for an unknown architecture, a missing normalisation and an unknown interpolation.
    """
    section = spec.classifier
    arch = section.arch
    is_rrcm = arch == "rrcm" or arch in RRCM_PRESETS
    if is_own(arch) or is_rrcm or arch in ("diffusion", "transformers"):
        changes = [("classifier.adapter", section.adapter is not None)]
        changes += [("training.new_last_layer", start is not None and start.new_last_layer)]
        for key, given in changes:
            if given:
                raise UserError(
                    f"{key} is given, but it is not applied to arch = {arch!r}; remove it, or use timm:NAME, "
                    "torchvision:NAME or a built-in architecture"
                )
    if is_own(arch):
        return _OwnClassifier("classifier", section, spec)
    if section.ignore and (is_rrcm or arch in ("diffusion", "transformers")):
        raise UserError(
            f"classifier.ignore = {section.ignore} is given, but it is not applied to arch = {arch!r}; remove it, and "
            "remove such keys from the file"
        )
    if arch == "diffusion":
        return resolve_diffusion(spec)
    if is_rrcm:
        return resolve_rrcm(spec)
    family, _, name = arch.partition(":")
    if section.options and family != TIMM:
        raise UserError(f"classifier.options = {section.options} is given, but arch = {arch!r} has no options")
    if arch == "transformers":
        architecture = _transformers(section)
    elif name and family == TIMM:
        architecture = _timm(name, section.options)
    elif name and family == TORCHVISION:
        architecture = _torchvision(name)
    elif arch in CLASSIFIERS:
        architecture = CLASSIFIERS[arch]
    else:
        raise UserError(
            f"classifier.arch = {arch!r} is unknown; choose one of {', '.join((*CLASSIFIERS, *RRCM_PRESETS))}, rrcm, "
            "diffusion, transformers, torchvision:NAME, timm:NAME, or name your own as package.module:function"
        )
    expected = _expected_input(section, architecture)
    if expected.interpolation not in ("bicubic", "bilinear"):
        raise UserError(
            f"classifier.arch = {arch!r} resizes with {expected.interpolation!r}, but only bicubic and bilinear are "
            "supported; set classifier.interpolation, or name your own as package.module:function"
        )
    return _KnownClassifier(section, architecture, expected, start)


def _expected_input(section: Section, architecture: Architecture) -> Input:
    """Combine the spec and the metadata; the spec has precedence."""
    normalize = section.normalize
    if isinstance(normalize, str):
        normalize = _NORMALIZATIONS[normalize]
    if architecture.input is not None:
        metadata = architecture.input
        return Input(normalize or metadata.normalize, metadata.size, section.interpolation or metadata.interpolation)
    if normalize is None:
        raise UserError(
            f"classifier.normalize is missing, and files of {section.arch} do not contain it; set it: Cohen's CIFAR "
            "models need 'cifar10', his ImageNet models 'imagenet', SmoothAdv's ImageNet models 'center-imagenet'"
        )
    return Input(normalize)
