"""Diffusion models that know sigma itself: the UNets of EDM, its preconditioning, and consistency models.

On [-1, 1], with noise of standard deviation s and data of standard deviation s_d = 0.5, the denoised image is

    D(x, s) = c_skip x + c_out F(c_in x, c_noise)

    EDM           c_skip = s_d^2 / (s^2 + s_d^2)         c_out = s s_d / sqrt(s^2 + s_d^2)          c_noise = ln(s) / 4
    consistency   c_skip = s_d^2 / ((s - e)^2 + s_d^2)   c_out = (s - e) s_d / sqrt(s^2 + s_d^2)    c_noise = 250 ln(s)

with c_in = 1 / sqrt(s^2 + s_d^2) and e = 0.002 (Karras et al. 2022, arXiv 2206.00364, table 1; Song et al. 2023, arXiv
2303.01469, appendix C). There is no grid of timesteps. F is EDM's DDPM++ or NCSN++ ("song") or ADM ("dhariwal") network
with NVIDIA's key names.

Everything that depends on s and the class alone is computed once: `EDMUNet.condition`.

Shapes: B batch, C channels, H W image, E embedding, K classes, T attention positions.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.locations import require_set
from diffsmooth.pipeline.models.fused import FastGroupNorm
from diffsmooth.pipeline.models.weights import RANDOM, State, build, build_from, load_weights

SIGMA_DATA = 0.5
SMALLEST, LARGEST = 0.002, 80.0  # noise on [-1, 1] that the published networks were trained for

Condition = tuple[Tensor, ...]  # for each residual block in order, params_BC or params_B2C


@dataclass(frozen=True, kw_only=True)
class EDMSettings:
    """Hyper-parameters of an EDM network; a file of weights implies all of them."""

    family: Literal["song", "dhariwal"]
    channels: int  # of the images
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attention_levels: tuple[int, ...]  # levels with self-attention; 0 is the full resolution
    resolution: int  # side of the images
    num_classes: int = 0  # 0: unconditional
    fourier: bool = False  # NCSN++: Fourier embedding, residual encoder and the filter [1, 3, 3, 1]


# The networks of the published files; an unconditional file has num_classes = 0.
PRESETS = {
    "edm-cifar10": EDMSettings(
        family="song", channels=3, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attention_levels=(1,),
        resolution=32,
    ),
    "edm-imagenet64": EDMSettings(
        family="dhariwal", channels=3, model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attention_levels=(1, 2, 3), resolution=64, num_classes=1000,
    ),
}  # fmt: skip


Level = TypeVar("Level", float, Tensor)  # one noise level, or one of each row


class Scalings(NamedTuple, Generic[Level]):
    """c_skip, c_out, c_in and c_noise."""

    skip: Level
    out: Level
    inner: Level
    noise: Level


def edm_scalings(sigma: Level) -> Scalings[Level]:
    """Return EDM's scalings for noise of standard deviation sigma on [-1, 1]."""
    total = (sigma**2 + SIGMA_DATA**2) ** 0.5
    logarithm = sigma.log() if isinstance(sigma, Tensor) else math.log(sigma)
    return Scalings((SIGMA_DATA / total) ** 2, sigma * SIGMA_DATA / total, 1 / total, logarithm / 4)


def consistency_scalings(sigma: float) -> Scalings[float]:
    """Return the scalings of consistency models, with which D(x, 0.002) = x."""
    above, total = sigma - SMALLEST, math.hypot(sigma, SIGMA_DATA)
    skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
    return Scalings(skip, above * SIGMA_DATA / total, 1 / total, 250 * math.log(sigma))


class _Conv(nn.Module):
    """A convolution with an optional halving or doubling of the image before it, or only the halving or doubling.

    The filter is applied at stride 2: [1, 1] averages pairs and repeats pixels, [1, 3, 3, 1] is smoother. With `fused`,
    the convolution comes first.
    """

    kernel: Tensor

    def __init__(
        self, width: int, out_width: int, size: int, resample: str | None = None, *, smooth: bool = False,
        fused: bool = False, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.resample, self.smooth, self.fused = size, resample, smooth, fused
        if size:
            self.weight = nn.Parameter(torch.empty(out_width, width, size, size))
            nn.init.kaiming_uniform_(self.weight, a=1)
            if bias:
                self.bias = nn.Parameter(torch.zeros(out_width))
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if smooth else [1.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / taps.sum() ** 2)[None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.fused:
            x_BCHW = F.conv2d(x_BCHW, self.weight, padding=1 + self.size // 2)
            return self._halve(x_BCHW, padding=0) + self.bias[:, None, None]
        if self.resample == "down":
            x_BCHW = self._halve(x_BCHW, padding=int(self.smooth))
        if self.resample == "up":
            x_BCHW = self._double(x_BCHW)
        return F.conv2d(x_BCHW, self.weight, self.bias, padding=self.size // 2) if self.size else x_BCHW

    def _halve(self, x_BCHW: Tensor, padding: int) -> Tensor:
        if not self.smooth:
            return F.avg_pool2d(x_BCHW, 2)
        channels = x_BCHW.shape[1]
        kernel = self.kernel.to(x_BCHW.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x_BCHW, kernel, groups=channels, stride=2, padding=padding)

    def _double(self, x_BCHW: Tensor) -> Tensor:
        if not self.smooth:
            return F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
        channels = x_BCHW.shape[1]
        kernel = (4 * self.kernel).to(x_BCHW.dtype).expand(channels, 1, 4, 4)
        return F.conv_transpose2d(x_BCHW, kernel, groups=channels, stride=2, padding=1)


def _norm(width: int, eps: float) -> nn.GroupNorm:
    return FastGroupNorm(nn.GroupNorm(min(32, width // 4), width, eps))


class Block(nn.Module):
    """A residual block with an optional resampling and self-attention. Its parameters come from the condition."""

    def __init__(
        self, width: int, out_width: int, emb_width: int, song: bool, resample: str | None = None, *, heads: int = 0,
        smooth: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.song, self.heads = width, song, heads
        eps = 1e-6 if song else 1e-5
        self.scale = math.sqrt(0.5) if song else 1.0  # of each sum with a skip connection
        self.norm0 = _norm(width, eps)
        self.conv0 = _Conv(width, out_width, 3, resample, smooth=smooth)
        self.affine = nn.Linear(emb_width, out_width * (1 if song else 2))
        self.norm1 = _norm(out_width, eps)
        self.conv1 = _Conv(out_width, out_width, 3)
        self.skip: nn.Module = nn.Identity()
        if width != out_width or resample:
            size = 1 if song or width != out_width else 0
            self.skip = _Conv(width, out_width, size, resample, smooth=smooth)
        if heads:
            self.norm2 = _norm(out_width, eps)
            self.qkv = _Conv(out_width, 3 * out_width, 1)
            self.proj = _Conv(out_width, out_width, 1)

    def forward(self, x_BCHW: Tensor, params_BC: Tensor) -> Tensor:
        h_BCHW = self.conv0(F.silu(self.norm0(x_BCHW)))
        params_BC11 = params_BC[:, :, None, None].to(h_BCHW.dtype)
        if self.song:
            h_BCHW = F.silu(self.norm1(h_BCHW + params_BC11))
        else:
            scale_BC11, shift_BC11 = params_BC11.chunk(2, dim=1)
            h_BCHW = F.silu(torch.addcmul(shift_BC11, self.norm1(h_BCHW), scale_BC11 + 1))
        x_BCHW = (self.conv1(h_BCHW) + self.skip(x_BCHW)) * self.scale
        return (self._attend(x_BCHW) + x_BCHW) * self.scale if self.heads else x_BCHW

    def _attend(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        # each head's channels are interleaved: q, k and v of its first channel, then of its second, ...
        qkv = self.qkv(self.norm2(x_BCHW)).reshape(B, self.heads, C // self.heads, 3, H * W)
        q, k, v = qkv.transpose(2, 4).unbind(3)  # B, heads, T, channels of a head
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W))


class EDMUNet(nn.Module):
    """F(c_in x, c_noise), for images of `settings.resolution`; keys are NVIDIA's, without `model.`."""

    def __init__(self, settings: EDMSettings) -> None:
        super().__init__()
        self.settings = settings
        song, base = settings.family == "song", settings.model_channels
        noise_width, emb_width = base * (2 if settings.fourier else 1), 4 * base
        if settings.fourier:
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", torch.zeros(noise_width // 2))
        if settings.num_classes:
            label_width = noise_width if song else emb_width
            self.map_label = nn.Linear(settings.num_classes, label_width, bias=song)
        self.map_layer0 = nn.Linear(noise_width, emb_width)
        self.map_layer1 = nn.Linear(emb_width, emb_width)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._build(song, emb_width)

    def _build(self, song: bool, emb_width: int) -> None:
        """Make the encoder and the decoder."""
        settings, smooth = self.settings, self.settings.fourier
        base, levels = settings.model_channels, len(settings.channel_mult)

        def block(width: int, out_width: int, resample: str | None = None, attention: bool = False) -> Block:
            heads = 0 if not attention else 1 if song else out_width // 64
            return Block(width, out_width, emb_width, song, resample, heads=heads, smooth=smooth)

        width = base if song else base * settings.channel_mult[0]
        self.enc[self._name(0, "conv")] = _Conv(settings.channels, width, 3)
        skips, aux_width = [width], settings.channels
        for level, mult in enumerate(settings.channel_mult):
            if level:
                self.enc[self._name(level, "down")] = block(width, width, "down")
                if settings.fourier:
                    residual = _Conv(aux_width, width, 3, "down", smooth=smooth, fused=True)
                    self.enc[self._name(level, "aux_residual")], aux_width = residual, width
                skips.append(width)
            for index in range(settings.num_blocks):
                attention = level in settings.attention_levels
                self.enc[self._name(level, f"block{index}")] = block(width, base * mult, attention=attention)
                width = base * mult
                skips.append(width)
        for level, mult in reversed(list(enumerate(settings.channel_mult))):
            if level == levels - 1:
                self.dec[self._name(level, "in0")] = block(width, width, attention=True)
                self.dec[self._name(level, "in1")] = block(width, width)
            else:
                self.dec[self._name(level, "up")] = block(width, width, "up")
            for index in range(settings.num_blocks + 1):
                attention = level in settings.attention_levels and (not song or index == settings.num_blocks)
                skipped = skips.pop()
                self.dec[self._name(level, f"block{index}")] = block(width + skipped, base * mult, attention=attention)
                width = base * mult
        if song:
            self.dec[self._name(0, "aux_norm")] = _norm(width, 1e-6)
            self.dec[self._name(0, "aux_conv")] = _Conv(width, settings.channels, 3)
        else:
            self.out_norm, self.out_conv = _norm(width, 1e-5), _Conv(width, settings.channels, 3)

    def _name(self, level: int, part: str) -> str:
        side = self.settings.resolution >> level
        return f"{side}x{side}_{part}"

    def blocks(self) -> list[Block]:
        """The residual blocks, in the order of a `Condition`."""
        return [one for part in (self.enc, self.dec) for one in part.values() if isinstance(one, Block)]

    def condition(self, c_noise_B: Tensor, label_B: Tensor | None = None) -> Condition:
        """Return the parameters of each residual block; without labels, those of the class-free network."""
        emb_BE = self._embed(c_noise_B.float(), label_B)
        return tuple(block.affine(emb_BE.to(block.affine.weight.dtype)) for block in self.blocks())

    def _embed(self, c_noise_B: Tensor, label_B: Tensor | None) -> Tensor:
        settings, song = self.settings, self.settings.family == "song"
        if settings.fourier:
            freqs = self.map_noise.freqs
            assert isinstance(freqs, Tensor)
            frequency_F = 2 * math.pi * freqs.float()
        else:
            half = settings.model_channels // 2
            exponent_F = torch.arange(half, device=c_noise_B.device, dtype=torch.float32) / (half - int(song))
            frequency_F = 10_000**-exponent_F
        angle_BF = c_noise_B[:, None] * frequency_F
        waves = [angle_BF.sin(), angle_BF.cos()] if song else [angle_BF.cos(), angle_BF.sin()]
        emb_BE = torch.cat(waves, dim=1).to(self.map_layer0.weight.dtype)
        label_BE = self._label(label_B) if settings.num_classes else 0
        if song:
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb_BE + label_BE))))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb_BE))) + label_BE)

    def _label(self, label_B: Tensor | None) -> Tensor:
        """Return the class's part of the embedding; of no class, what EDM computes for a label of zeros."""
        layer, song = self.map_label, self.settings.family == "song"
        if label_B is None:
            return layer.bias[None] if song else torch.zeros_like(layer.weight[:1, 0])
        one_hot_BK = F.one_hot(label_B, self.settings.num_classes).to(layer.weight.dtype)
        return layer(one_hot_BK * (math.sqrt(self.settings.num_classes) if song else 1))

    def forward(self, x_BCHW: Tensor, condition: Condition) -> Tensor:
        """Return F_BCHW, float32, from c_in x and the result of `condition`, whose batch may be 1."""
        params = iter(condition)
        h_BCHW = x_BCHW.to(self.map_layer0.weight.dtype)
        aux_BCHW = h_BCHW
        skips: list[Tensor] = []
        for name, part in self.enc.items():
            if "aux" in name:
                h_BCHW = skips[-1] = aux_BCHW = (h_BCHW + part(aux_BCHW)) * math.sqrt(0.5)
                continue
            h_BCHW = part(h_BCHW, next(params)) if isinstance(part, Block) else part(h_BCHW)
            skips.append(h_BCHW)
        for part in self.dec.values():
            if isinstance(part, Block):
                if h_BCHW.shape[1] != part.width:
                    h_BCHW = torch.cat([h_BCHW, skips.pop()], dim=1)
                h_BCHW = part(h_BCHW, next(params))
        if self.settings.family == "song":
            norm, conv = self.dec[self._name(0, "aux_norm")], self.dec[self._name(0, "aux_conv")]
        else:
            norm, conv = self.out_norm, self.out_conv
        return conv(F.silu(norm(h_BCHW))).float()


Predict = Callable[[Tensor, float], Tensor]  # (z_BCHW, s) -> D(z, s), both on [-1, 1]


def levels_of(sigma: float, steps: int) -> list[float]:
    """Return the noise levels on [-1, 1] at which a denoiser predicts: that of sigma, then evenly spaced lower ones.

    Raises: UserError for levels that the published networks were not trained for.
    """
    levels = [2 * sigma * (steps - index) / steps for index in range(steps)]
    if not SMALLEST <= levels[-1] <= levels[0] <= LARGEST:
        raise UserError(
            f"sigma = {sigma:g} with denoiser.steps = {steps} needs noise levels from {levels[-1]:g} to {levels[0]:g} "
            f"on [-1, 1], but such networks are trained for {SMALLEST:g} to {LARGEST:g}; use another sigma or fewer "
            "steps"
        )
    return levels


class SigmaDenoiser:
    """(x_BCHW, sigma) -> x0_BCHW on [0, 1], from a network that predicts x0 at any noise level.

    With more than one level, x0 is noised deterministically to the next lower level and predicted again (Euler's method
    for the probability flow).
    """

    def __init__(self, predict: Predict, levels: list[float]) -> None:
        self._predict, self.levels = predict, levels

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        assert math.isclose(self.levels[0], 2 * sigma), "built for another sigma"
        z_BCHW = 2 * x_BCHW - 1
        x0_BCHW = self._predict(z_BCHW, self.levels[0]).clamp(-1, 1)
        for level, lower in pairwise(self.levels):
            z_BCHW = x0_BCHW + lower / level * (z_BCHW - x0_BCHW)
            x0_BCHW = self._predict(z_BCHW, lower).clamp(-1, 1)
        return (x0_BCHW + 1) / 2


def edm_predict(network: EDMUNet, levels: Sequence[float]) -> Predict:
    """Return D(x, s) of an EDM network, without a class, at some noise levels."""
    scalings = {level: edm_scalings(level) for level in levels}
    device = network.map_layer0.weight.device
    conditions = {level: network.condition(torch.tensor([one.noise], device=device)) for level, one in scalings.items()}

    def predict(z_BCHW: Tensor, level: float) -> Tensor:
        one = scalings[level]
        return one.skip * z_BCHW + one.out * network(one.inner * z_BCHW, conditions[level])

    return predict


def consistency_predict(network: Callable[[Tensor, float], Tensor], levels: Sequence[float]) -> Predict:
    """Return D(x, s) of a consistency model; `network` maps (c_in x, c_noise) to F."""
    scalings = {level: consistency_scalings(level) for level in levels}

    def predict(z_BCHW: Tensor, level: float) -> Tensor:
        one = scalings[level]
        return one.skip * z_BCHW + one.out * network(one.inner * z_BCHW, one.noise)

    return predict


def renamed(state: State) -> State:
    """Return the state dict without what inference does not use: filters, and the embedding of augmentations."""
    unused = re.compile(r"(^|\.)(map_augment\.|.*resample_filter$)")
    return {key: value for key, value in state.items() if not unused.search(key)}


def settings_in(state: Mapping[str, Tensor]) -> EDMSettings | None:
    """Return the hyper-parameters that the keys and shapes of a state dict imply; None for another network's."""
    sides = sorted({int(match[1]) for key in state if (match := re.match(r"enc\.(\d+)x\1_", key))}, reverse=True)
    first = f"enc.{sides[0]}x{sides[0]}_conv.weight" if sides else ""
    if not {first, "map_layer0.weight", "map_layer1.weight"} <= state.keys():
        return None
    widths, attended = [], []
    for level, side in enumerate(sides):
        key = f"enc.{side}x{side}_block0.conv1.weight"
        if key not in state:
            return None
        widths.append(state[key].shape[0])
        if f"enc.{side}x{side}_block0.qkv.weight" in state:
            attended.append(level)
    fourier = "map_noise.freqs" in state
    base = state["map_layer1.weight"].shape[0] // 4
    return EDMSettings(
        family="dhariwal" if "out_conv.weight" in state else "song",
        channels=state[first].shape[1],
        model_channels=base,
        channel_mult=tuple(width // max(base, 1) for width in widths),
        num_blocks=len({key.split(".")[1] for key in state if key.startswith(f"enc.{sides[0]}x{sides[0]}_block")}),
        attention_levels=tuple(attended),
        resolution=sides[0],
        num_classes=state["map_label.weight"].shape[1] if "map_label.weight" in state else 0,
        fourier=fourier,
    )


def load_edm(arch: str, checkpoint: str | None, device: torch.device, channels: int) -> EDMUNet:
    """Return the network of a preset, or the one in a file if `arch` is no preset.

    On the meta device a preset needs no file. Raises: UserError for a missing or unsuitable file, and for images with
    other channels.
    """
    settings = PRESETS.get(arch)
    location = "" if checkpoint is None else require_set("checkpoint", checkpoint)
    if settings is not None and (device.type == "meta" or location.startswith(RANDOM)):
        network = build(partial(EDMUNet, settings), location, device)
    else:
        network = _from_file(arch, settings, location, device)
    assert isinstance(network, EDMUNet)
    if channels != network.settings.channels:
        raise UserError(
            f"the network of EDM processes {network.settings.channels} channels, but the images have {channels}; use a "
            "network for such images"
        )
    return network


def _from_file(arch: str, expected: EDMSettings | None, location: str, device: torch.device) -> nn.Module:
    """Return the network in a file, whose hyper-parameters follow from it. Raises: UserError, as `load_edm` does."""
    if not location:
        raise UserError(f"the checkpoint of arch = {arch!r} is missing, but it needs weights")
    state = renamed(load_weights(location, ["map_layer0.weight"]))
    found = settings_in(state)
    if found is None:
        raise UserError(
            f"checkpoint {location}: holds no network of EDM (enc.32x32_conv.weight, map_layer0.weight, ...); use a "
            "state dict with NVIDIA's key names"
        )
    if expected is not None and replace(found, num_classes=0) != replace(expected, num_classes=0):
        raise UserError(
            f"checkpoint {location}: its network is {found}, not {arch}; use arch = 'edm', or {arch}'s file"
        )
    if device.type == "meta":
        return build(partial(EDMUNet, found), location, device)
    return build_from(partial(EDMUNet, found), state, location, device)
