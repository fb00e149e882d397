"""rRCM: a vision transformer that classifies the noisy image in one pass and is told how noisy it is.

    z = 2 x - 1, with noise of s = 2 sigma      tokens = [cls, time(250 ln s'), patches(c_in z)] + positions
    logits = head(norm(blocks(tokens)[cls]))    c_in = 1 / sqrt(s'^2 + 0.25)

(Lei et al. 2025, arXiv 2501.13094.) s' is the level nearest to s among the 81 Karras levels of its training, rounded as
in the published code. The networks for ImageNet apply the last norm, those for CIFAR-10 do not: `options.layernorm`.
Width, depth, patch size and positions follow from the file, and heads have 64 channels.

Shapes: B batch, C channels, H W image, K classes, T tokens, E width.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.locations import require_set
from diffsmooth.pipeline.models.files import weights_id
from diffsmooth.pipeline.models.options import Options, parse_options
from diffsmooth.pipeline.models.weights import RANDOM, State, build, build_from, load_weights
from diffsmooth.pipeline.spec import RunSpec

_LEVELS, _RHO, _SMALLEST, _LARGEST = 81, 7, 0.002, 80.0
_SIGMA_DATA = 0.5


class RRCMOptions(Options):
    """The keys of classifier.options for arch = "rrcm"."""

    layernorm: bool = False  # apply the last norm, as the networks for ImageNet do


def nearest_level(sigma: float) -> float:
    """Return s': the Karras level nearest to 2 sigma, the noise on [-1, 1]."""
    first, last = _LARGEST ** (1 / _RHO), _SMALLEST ** (1 / _RHO)
    levels = [(first + index / (_LEVELS - 1) * (last - first)) ** _RHO for index in range(_LEVELS)]
    return min(levels, key=lambda level: abs(level - 2 * sigma))


class _Attention(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        B, T, E = x_BTE.shape
        q, k, v = self.qkv(x_BTE).view(B, T, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, E))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BTE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BTE)))


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = _Attention(width, bias), _MLP(width, hidden)

    def forward(self, x_BTE: Tensor) -> Tensor:
        x_BTE = x_BTE + self.attn(self.norm1(x_BTE))
        return x_BTE + self.mlp(self.norm2(x_BTE))


@dataclass(frozen=True, kw_only=True)
class RRCMSettings:
    """Hyper-parameters of a network, which follow from its file."""

    channels: int
    patch: int
    width: int
    hidden: int
    depth: int
    patches: int
    num_classes: int
    qkv_bias: bool = False


# rRCM-S and rRCM-B for ImageNet, rRCM-B for CIFAR-10
PRESETS = {
    "rrcm-s16": RRCMSettings(channels=3, patch=16, width=512, hidden=2048, depth=6, patches=196, num_classes=1000),
    "rrcm-b16": RRCMSettings(channels=3, patch=16, width=768, hidden=3072, depth=12, patches=196, num_classes=1000),
    "rrcm-b4": RRCMSettings(channels=3, patch=4, width=768, hidden=3072, depth=12, patches=64, num_classes=10),
}


class _Base(nn.Module):
    """The transformer without its head."""

    def __init__(self, settings: RRCMSettings) -> None:
        super().__init__()
        width = settings.width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(settings.channels, width, settings.patch, settings.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + settings.patches, width))
        self.blocks = nn.ModuleList([_Block(width, settings.hidden, settings.qkv_bias) for _ in range(settings.depth)])
        self.norm = nn.LayerNorm(width)


class RRCM(nn.Module):
    """x_BCHW on [0, 1] -> logits_BK, at the noise level s'; the keys are those of the published files."""

    def __init__(self, settings: RRCMSettings, level: float, layernorm: bool) -> None:
        super().__init__()
        self.level, self.layernorm = level, layernorm
        self.base_model, self.linear_head = _Base(settings), nn.Linear(settings.width, settings.num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        base, c_in = self.base_model, 1 / math.hypot(self.level, _SIGMA_DATA)
        weight = self.linear_head.weight
        patches_BTE = base.patch_embed["proj"]((c_in * (2 * x_BCHW - 1)).to(weight.dtype)).flatten(2).transpose(1, 2)
        if patches_BTE.shape[1] + 2 != base.pos_embed.shape[1]:
            raise UserError(
                f"images of {x_BCHW.shape[2]} x {x_BCHW.shape[3]} have {patches_BTE.shape[1]} patches, but the rRCM "
                f"was trained with {base.pos_embed.shape[1] - 2}; set data.resize and data.crop to its image size"
            )
        time_BTE = self._time(weight.device, weight.dtype).expand(len(x_BCHW), 1, -1)
        tokens_BTE = torch.cat([base.cls_token.expand(len(x_BCHW), 1, -1), time_BTE, patches_BTE], dim=1)
        tokens_BTE = tokens_BTE + base.pos_embed
        for block in base.blocks:
            tokens_BTE = block(tokens_BTE)
        cls_BE = tokens_BTE[:, 0]
        return self.linear_head(base.norm(cls_BE) if self.layernorm else cls_BE).float()

    def _time(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the time token: sinusoids of 250 ln(s'), cosines first."""
        width = self.linear_head.in_features
        half = width // 2
        frequency_F = torch.exp(-math.log(10_000) * torch.arange(half, device=device, dtype=torch.float32) / half)
        angle_F = 250 * math.log(self.level) * frequency_F
        return F.pad(torch.cat([angle_F.cos(), angle_F.sin()]), (0, width % 2)).to(dtype)


def settings_in(state: Mapping[str, Tensor]) -> RRCMSettings | None:
    """Return the hyper-parameters that a state dict implies; None for another network's."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight")
    if not {*(f"base_model.{key}" for key in needed), "linear_head.weight"} <= state.keys():
        return None
    projection, positions = state["base_model.patch_embed.proj.weight"], state["base_model.pos_embed"]
    if projection.ndim != 4 or positions.ndim != 3:
        return None
    return RRCMSettings(
        channels=projection.shape[1],
        patch=projection.shape[2],
        width=projection.shape[0],
        hidden=state["base_model.blocks.0.mlp.fc1.weight"].shape[0],
        depth=len({key.split(".")[2] for key in state if key.startswith("base_model.blocks.")}),
        patches=positions.shape[1] - 2,
        num_classes=state["linear_head.weight"].shape[0],
        qkv_bias="base_model.blocks.0.attn.qkv.bias" in state,
    )


@dataclass(frozen=True)
class RRCMClassifier:
    """A spec's rRCM, checked but not loaded."""

    arch: str
    checkpoint: str | None
    sha256: str | None
    options: RRCMOptions
    level: float

    def ids(self) -> dict[str, str]:
        return {
            "classifier": weights_id(self._location(), self.sha256),
            "classifier.input": json.dumps({"level": self.level}),
        }

    def _location(self) -> str:
        if self.checkpoint is None:
            raise UserError(f"classifier.checkpoint is missing, but arch = {self.arch!r} needs weights")
        return require_set("classifier.checkpoint", self.checkpoint)

    def load(self, device: torch.device, channels: int, num_classes: int) -> RRCM:
        if device.type == "meta" and self.arch in PRESETS:
            with device:
                return RRCM(PRESETS[self.arch], self.level, self.options.layernorm).eval().requires_grad_(False)
        location = self._location()
        if location.startswith(RANDOM) and self.arch in PRESETS:
            self._check(location, PRESETS[self.arch], channels, num_classes)
            network = build(partial(RRCM, PRESETS[self.arch], self.level, self.options.layernorm), location, device)
            assert isinstance(network, RRCM)
            return network
        state = _without_projector(load_weights(location, ["base_model.cls_token"]))
        settings = settings_in(state)
        if settings is None:
            raise UserError(
                f"checkpoint {location}: holds no rRCM (base_model.pos_embed, linear_head.weight, ...); use a file of "
                "its fine-tuning"
            )
        self._check(location, settings, channels, num_classes)
        network = build_from(partial(RRCM, settings, self.level, self.options.layernorm), state, location, device)
        assert isinstance(network, RRCM)
        return network

    def _check(self, location: str, settings: RRCMSettings, channels: int, num_classes: int) -> None:
        if (settings.channels, settings.num_classes) != (channels, num_classes):
            where = f"classifier.arch = {self.arch!r}" if location.startswith(RANDOM) else f"checkpoint {location}"
            raise UserError(
                f"{where}: the rRCM has {settings.channels} channels and {settings.num_classes} classes, "
                f"but the data set has {channels} and {num_classes}; use a classifier of this data set"
            )

    def build(self, device: torch.device, dtype: torch.dtype, channels: int, num_classes: int) -> RRCM:
        return self.load(device, channels, num_classes).to(dtype)


def _without_projector(state: State) -> State:
    """Return the state dict without the projection head of the pre-training."""
    return {key: value for key, value in state.items() if not key.startswith("base_model.projection_head.")}


def resolve_rrcm(spec: RunSpec) -> RRCMClassifier:
    """Check a spec's rRCM. Raises: UserError for unknown options and for a normalisation, which is part of it."""
    section = spec.classifier
    if section.normalize is not None:
        raise UserError(f"classifier.normalize = {section.normalize!r} is given, but rRCM scales its input itself")
    options = parse_options(RRCMOptions, section)
    level = nearest_level(spec.smoothing.sigma)
    return RRCMClassifier(section.arch, section.checkpoint, section.sha256, options, level)
