"""The UNet of both OpenAI diffusion checkpoints, as published, with their key names.

Sources: improved-diffusion (arXiv 2102.09672) and guided-diffusion (arXiv 2105.05233). `fused.py` makes it fast.

Shapes: B batch, C channels, H W image, E time embedding, T attention positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.pipeline.spec import UNetSettings


class GroupNorm(nn.GroupNorm):
    """Group norm that always computes in float32, as both OpenAI models do."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight_C, bias_C = self.weight.float(), self.bias.float()
        return F.group_norm(x_BCHW.float(), self.num_groups, weight_C, bias_C, self.eps).to(x_BCHW.dtype)


class Resample(nn.Module):
    """Nearest-neighbour doubling, average halving (neither has weights), or the identity."""

    def __init__(self, direction: str | None) -> None:
        super().__init__()
        self.direction = direction

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.direction == "up":
            return F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
        if self.direction == "down":
            return F.avg_pool2d(x_BCHW, 2)
        return x_BCHW


class ResBlock(nn.Module):
    """Residual block whose time embedding scales and shifts the output of the second group norm."""

    def __init__(self, width: int, out_width: int, time_width: int, groups: int, resample: str | None = None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(groups, width), nn.SiLU(inplace=True), _conv3x3(width, out_width))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * out_width))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_width),
            nn.SiLU(inplace=True),
            nn.Identity(),  # replaces the dropout of training, so that the convolution keeps index 3
            _conv3x3(out_width, out_width),
        )
        self.skip_connection = nn.Identity() if width == out_width else nn.Conv2d(width, out_width, 1)
        self.resample = Resample(resample)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        norm_in, silu_in, conv_in = self.in_layers
        h_BCHW = conv_in(self.resample(silu_in(norm_in(x_BCHW))))
        norm, silu, _, conv = self.out_layers
        scale_BC, shift_BC = self.emb_layers(emb_BE).chunk(2, dim=1)
        h_BCHW = norm(h_BCHW) * (1 + scale_BC[:, :, None, None]) + shift_BC[:, :, None, None]
        return self.skip_connection(self.resample(x_BCHW)) + conv(silu(h_BCHW))


class Attention(nn.Module):
    """Self-attention over positions.

    Heads are split first, then q, k, v (OpenAI's "legacy" order); with `qkv_first`, the other way round.
    """

    def __init__(self, width: int, heads: int, groups: int, qkv_first: bool = False) -> None:
        super().__init__()
        self.heads, self.qkv_first = heads, qkv_first
        self.norm: nn.Module = GroupNorm(groups, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        # positions before channels: the order of channels-last images in memory, so neither view copies them
        x_BTC = self.norm(x_BCHW).permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = F.linear(x_BTC, self.qkv.weight[:, :, 0], self.qkv.bias)
        if self.qkv_first:
            parts = qkv.view(B, H * W, 3, self.heads, C // self.heads).unbind(2)
        else:
            parts = qkv.view(B, H * W, self.heads, 3, C // self.heads).unbind(3)
        q, k, v = (part.transpose(1, 2) for part in parts)
        # the default scale 1/sqrt(width) equals OpenAI's 1/width^(1/4) on both q and k
        h_BTC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        h_BTC = F.linear(h_BTC, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x_BCHW + h_BTC.view(B, H, W, C).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3x3(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))


class Stack(nn.Sequential):
    """A sequence of layers; only residual blocks receive the time embedding."""

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x_BCHW = layer(x_BCHW, emb_BE) if isinstance(layer, ResBlock) else layer(x_BCHW)
        return x_BCHW


def _conv3x3(width: int, out_width: int) -> nn.Conv2d:
    return nn.Conv2d(width, out_width, 3, padding=1)


class UNet(nn.Module):
    """eps_theta(x_t, t) of a diffusion model, for images whose sides are multiples of `settings.side_multiple`."""

    def __init__(self, settings: UNetSettings, image_channels: int) -> None:
        super().__init__()
        self.settings = settings
        self.image_channels = image_channels
        base, groups = settings.model_channels, settings.num_groups
        time_width = 4 * base
        channels = image_channels * settings.patch**2
        out_channels = channels * (2 if settings.learn_sigma else 1)

        def res(width: int, out_width: int, resample: str | None = None) -> ResBlock:
            return ResBlock(width, out_width, time_width, groups, resample)

        def attention(width: int) -> Attention:
            return Attention(width, settings.heads(width), groups, settings.qkv_first)

        self.time_embed = nn.Sequential(nn.Linear(base, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        width = base * settings.channel_mult[0]
        self.input_blocks = nn.ModuleList([Stack(_conv3x3(channels, width))])
        skip_widths, factor = [width], 1
        for level, mult in enumerate(settings.channel_mult):
            for _ in range(settings.num_res_blocks):
                layers: list[nn.Module] = [res(width, base * mult)]
                width = base * mult
                if factor in settings.attention_factors:
                    layers.append(attention(width))
                self.input_blocks.append(Stack(*layers))
                skip_widths.append(width)
            if level + 1 < len(settings.channel_mult):
                down = res(width, width, "down") if settings.resblock_updown else Downsample(width)
                self.input_blocks.append(Stack(down))
                skip_widths.append(width)
                factor *= 2
        self.middle_block = Stack(res(width, width), attention(width), res(width, width))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(settings.channel_mult))):
            for index in range(settings.num_res_blocks + 1):
                layers = [res(width + skip_widths.pop(), base * mult)]
                width = base * mult
                if factor in settings.attention_factors:
                    layers.append(attention(width))
                if level and index == settings.num_res_blocks:
                    layers.append(res(width, width, "up") if settings.resblock_updown else Upsample(width))
                    factor //= 2
                self.output_blocks.append(Stack(*layers))
        self.out = nn.Sequential(GroupNorm(groups, width), nn.SiLU(inplace=True), _conv3x3(width, out_channels))

    def forward(self, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return eps_BCHW, float32, at timesteps t_B of the schedule."""
        emb_BE = self.embed(t_B)
        h_BCHW = F.pixel_unshuffle(x_BCHW, self.settings.patch).to(emb_BE.dtype)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h_BCHW = block(h_BCHW, emb_BE)
            skips.append(h_BCHW)
        h_BCHW = self.middle_block(h_BCHW, emb_BE)
        for block in self.output_blocks:
            h_BCHW = block(torch.cat([h_BCHW, skips.pop()], dim=1), emb_BE)
        return eps_of(self.out(h_BCHW), self.settings, self.image_channels)

    def embed(self, t_B: Tensor) -> Tensor:
        """Return emb_BE: sinusoids of the timesteps, cosines first, then two linear layers."""
        settings = self.settings
        half = settings.model_channels // 2
        frequency_F = torch.exp(-math.log(10000) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half)
        t = t_B.float() * (1000 / settings.steps) if settings.rescale_timesteps else t_B.float()
        angle_BF = t[:, None] * frequency_F
        embedding = torch.cat([angle_BF.cos(), angle_BF.sin()], dim=1)
        embedding = F.pad(embedding, (0, settings.model_channels % 2))
        return self.time_embed(embedding.to(next(self.parameters()).dtype))


def eps_of(out_BCHW: Tensor, settings: UNetSettings, image_channels: int) -> Tensor:
    """Return eps from a UNet's output, float32 and without patches; the learned variance is dropped."""
    return F.pixel_shuffle(out_BCHW[:, : image_channels * settings.patch**2].float(), settings.patch)


def settings_in(state: Mapping[str, Tensor], image_channels: int) -> dict[str, Any]:
    """Return those `UNetSettings`, as key -> value, that the keys and shapes of an OpenAI-style state dict imply.

    Heads, groups, schedule and timesteps leave no trace in a state dict. Empty for a state dict of another kind.
    """

    def width(key: str) -> int:
        return state[f"{key}.weight"].shape[0] if f"{key}.weight" in state else 0

    blocks_in = len({key.split(".")[1] for key in state if key.startswith("input_blocks.")})
    if not blocks_in or any(key not in state for key in _MARKERS):
        return {}
    # the last block of each level but the highest ends with an upsampling: a convolution or a second residual block
    updown = not any(".op.weight" in key for key in state)
    ups = [key for key in state if key.startswith("output_blocks.") and key.split(".")[2] != "0"]
    marker = ".in_layers.0.weight" if updown else ".conv.weight"
    levels = 1 + sum(key.endswith(marker) for key in ups)
    per_level, remainder = divmod(blocks_in, levels)
    if remainder or any(state[key].ndim != dims for key, dims in _MARKERS.items()):
        return {}
    base = state["time_embed.0.weight"].shape[1]
    channels = state["input_blocks.0.0.weight"].shape[1]
    first = [1 + level * per_level for level in range(levels)]
    return {
        "model_channels": base,
        "channel_mult": [width(f"input_blocks.{index}.0.in_layers.2") // max(base, 1) for index in first],
        "num_res_blocks": per_level - 1,
        "attention_factors": [
            2**level for level, index in enumerate(first) if f"input_blocks.{index}.1.qkv.weight" in state
        ],
        "resblock_updown": updown,
        "learn_sigma": width("out.2") == 2 * channels,
        "patch": math.isqrt(channels // image_channels),
    }


# keys that every OpenAI-style UNet has, and how many dimensions their tensors have
_MARKERS = {"time_embed.0.weight": 2, "input_blocks.0.0.weight": 4, "out.2.weight": 4}
