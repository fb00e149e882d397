"""The UNet that serves both OpenAI diffusion checkpoints (improved-diffusion, arXiv 2102.09672; guided-diffusion,
arXiv 2105.05233), with their key names.

Shapes: B batch, C channels, H W image, E time embedding, T attention positions.

A denoiser calls the network at few timesteps only. `fold` then turns each residual block's time-dependent scale and
shift into the affine of its group norm, and the embedding is never computed again:
    (1 + scale) * (w * norm(h) + b) + shift  =  [(1 + scale) w] * norm(h) + [(1 + scale) b + shift].
It also merges nearest doubling into the 3 x 3 convolution that follows. Of the doubled image's pixels under the kernel
some are equal, so each output pixel is a sum of 2 x 2 different ones, which a transposed convolution computes with 4/9
of the multiplications. On a CPU, `lay_out` lets 3 x 3 convolutions of large images take Winograd's F(6 x 6, 3 x 3)
(Lavin & Gray 2015, arXiv 1509.09308), which multiplies 64 times for 36 pixels in the place of 324. All of it changes
the output by rounding alone.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.spec import UNetSettings

_WINOGRAD_CHANNELS, _WINOGRAD_SIDE = 128, 12  # from here on the fewer multiplications outweigh the transforms


def _suits_winograd(x_BCHW: Tensor) -> bool:
    return x_BCHW.shape[1] >= _WINOGRAD_CHANNELS and min(x_BCHW.shape[2:]) >= _WINOGRAD_SIDE


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution with padding 1; by Winograd's algorithm, from NNPACK, where `winograd` is set and it pays."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(width, out_width, 3, padding=1)
        self.winograd = False

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.winograd and self.out_channels >= _WINOGRAD_CHANNELS and _suits_winograd(x_BCHW):
            return torch._nnpack_spatial_convolution(x_BCHW.contiguous(), self.weight, self.bias, padding=1)
        return super().forward(x_BCHW)


class GroupNorm(nn.GroupNorm):
    """Group norm that always computes in float32, as both OpenAI models do."""

    def forward(self, x_BCHW: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`affine` takes the place of weight and bias."""
        weight_C, bias_C = affine or (self.weight.float(), self.bias.float())
        norm = _group_norm_of_few_channels if _has_few_channels(x_BCHW, self.num_groups) else F.group_norm
        return norm(x_BCHW.float(), self.num_groups, weight_C, bias_C, self.eps).to(x_BCHW.dtype)


def _has_few_channels(x_BCHW: Tensor, groups: int) -> bool:
    """Where torch's group norm of channels-last images on a CPU takes twice the time: narrow groups, in the cache."""
    return (
        x_BCHW.device.type == "cpu"
        and not x_BCHW.is_contiguous()
        and x_BCHW.shape[1] <= 8 * groups
        and x_BCHW.numel() <= 2**20
        and not torch.compiler.is_compiling()
    )


def _group_norm_of_few_channels(x_BCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """Group norm whose sums over positions are matrix products, then one multiply-add."""
    B, C, H, W = x_BCHW.shape
    x_BTC = x_BCHW.permute(0, 2, 3, 1).reshape(B, H * W, C)
    share_B1T = x_BCHW.new_full((B, 1, H * W), groups / (C * H * W))
    mean_BG1 = torch.bmm(share_B1T, x_BTC).view(B, groups, -1).sum(dim=2, keepdim=True)
    square_BG1 = torch.bmm(share_B1T, x_BTC * x_BTC).view(B, groups, -1).sum(dim=2, keepdim=True)
    scale_BGD = (square_BG1 - mean_BG1 * mean_BG1).clamp_(min=0).add_(eps).rsqrt_() * weight_C.view(1, groups, -1)
    shift_BGD = bias_C.view(1, groups, -1) - mean_BG1 * scale_BGD
    out_BTC = torch.addcmul(shift_BGD.view(B, 1, C), x_BTC, scale_BGD.view(B, 1, C))
    return out_BTC.view(B, H, W, C).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Nearest doubling, average halving (both without weights), or neither."""

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
    """Residual block with scale-shift norm: time acts on the second group norm's output."""

    def __init__(self, width: int, out_width: int, time_width: int, groups: int, resample: str | None = None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(groups, width), nn.SiLU(inplace=True), Conv3x3(width, out_width))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * out_width))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_width),
            nn.SiLU(inplace=True),
            nn.Identity(),  # the training dropout's place: keeps the convolution at index 3
            Conv3x3(out_width, out_width),
        )
        self.skip_connection = nn.Identity() if width == out_width else nn.Conv2d(width, out_width, 1)
        self.resample = Resample(resample)
        self.folded: dict[int, tuple[Tensor, Tensor]] = {}  # timestep -> affine of the second group norm
        self.doubles = False  # whether the first convolution doubles by itself

    def forward(self, x_BCHW: Tensor, time: int | Tensor) -> Tensor:
        """`time` is a timestep that was folded, or the embedding emb_BE."""
        norm_in, silu_in, conv_in = self.in_layers
        h_BCHW = silu_in(norm_in(x_BCHW))
        h_BCHW = conv_in(h_BCHW if self.doubles else self.resample(h_BCHW))
        norm, silu, _, conv = self.out_layers
        if isinstance(time, int):
            h_BCHW = norm(h_BCHW, self.folded[time])
        else:
            scale_BC, shift_BC = self.emb_layers(time).chunk(2, dim=1)
            h_BCHW = norm(h_BCHW) * (1 + scale_BC[:, :, None, None]) + shift_BC[:, :, None, None]
        return self.skip_connection(self.resample(x_BCHW)) + conv(silu(h_BCHW))

    def fold(self, t: int, emb_1E: Tensor) -> None:
        scale_1C, shift_1C = self.emb_layers(emb_1E).float().chunk(2, dim=1)
        norm = self.out_layers[0]
        scale_C = 1 + scale_1C[0]
        self.folded[t] = (scale_C * norm.weight.float(), scale_C * norm.bias.float() + shift_1C[0])

    def merge_doubling(self) -> None:
        if self.resample.direction == "up" and not self.doubles:
            conv = self.in_layers[2]
            assert isinstance(conv, nn.Conv2d)
            self.in_layers[2], self.doubles = doubling(conv), True


class Attention(nn.Module):
    """Self-attention over positions; heads first, then q, k, v within a head (OpenAI's "legacy" order)."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        # positions before channels, as channels-last images lie in memory: neither view copies them
        x_BTC = self.norm(x_BCHW).permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = F.linear(x_BTC, self.qkv.weight[:, :, 0], self.qkv.bias).view(B, H * W, self.heads, 3, C // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        # the default scale 1/sqrt(width) equals OpenAI's 1/width^(1/4) on q and on k
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
        self.conv: nn.Module = Conv3x3(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        doubles = isinstance(self.conv, nn.ConvTranspose2d)
        return self.conv(x_BCHW if doubles else F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))

    def merge_doubling(self) -> None:
        if isinstance(self.conv, nn.Conv2d):
            self.conv = doubling(self.conv)


def doubling(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Nearest doubling and a 3 x 3 convolution with padding 1, as one transposed convolution.

    Output row 2 i + a is the sum over k of w[k] x[(2 i + a + k - 1) // 2], so w[k] stands in rows 2 - k and 3 - k of
    the kernel of 4; columns likewise.
    """

    def widen(weight: Tensor, dim: int) -> Tensor:
        first, second, third = weight.unbind(dim)
        return torch.stack([third, second + third, first + second, first], dim)

    merged = nn.ConvTranspose2d(
        conv.in_channels, conv.out_channels, 4, stride=2, padding=1, device="meta", dtype=conv.weight.dtype
    )
    weight_IOUV = widen(widen(conv.weight, 2), 3).transpose(0, 1)
    merged.weight, merged.bias = nn.Parameter(weight_IOUV, requires_grad=False), conv.bias
    return merged.eval()


class Stack(nn.Sequential):
    """Layers in a row, of which only residual blocks take the time embedding."""

    def forward(self, x_BCHW: Tensor, time: int | Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x_BCHW = layer(x_BCHW, time) if isinstance(layer, ResBlock) else layer(x_BCHW)
        return x_BCHW


class UNet(nn.Module):
    """eps_theta(x_t, t) of a diffusion model on images of any size that the downsampling divides."""

    def __init__(self, settings: UNetSettings, image_channels: int) -> None:
        super().__init__()
        self.settings = settings
        self.image_channels = image_channels
        self.winograd = False
        base, groups = settings.model_channels, settings.num_groups
        time_width = 4 * base
        channels = image_channels * settings.patch**2
        out_channels = channels * (2 if settings.learn_sigma else 1)

        def res(width: int, out_width: int, resample: str | None = None) -> ResBlock:
            return ResBlock(width, out_width, time_width, groups, resample)

        def attention(width: int) -> Attention:
            heads = width // settings.num_head_channels if settings.num_head_channels else settings.num_heads
            return Attention(width, heads, groups)

        self.time_embed = nn.Sequential(nn.Linear(base, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        width = base * settings.channel_mult[0]
        self.input_blocks = nn.ModuleList([Stack(Conv3x3(channels, width))])
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
                self.input_blocks.append(
                    Stack(res(width, width, "down") if settings.resblock_updown else Downsample(width))
                )
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
        self.out = nn.Sequential(GroupNorm(groups, width), nn.SiLU(inplace=True), Conv3x3(width, out_channels))

    def forward(self, x_BCHW: Tensor, t: int | Tensor) -> Tensor:
        """eps, float32, B x C x H x W, at a timestep that was folded, or at timesteps t_B of the schedule."""
        settings = self.settings
        time = t if isinstance(t, int) else self._embed(t)
        h_BCHW = F.pixel_unshuffle(x_BCHW, settings.patch).to(self.dtype)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h_BCHW = self._laid_out(block(h_BCHW, time))
            skips.append(h_BCHW)
        h_BCHW = self.middle_block(h_BCHW, time)
        for block in self.output_blocks:
            h_BCHW = self._laid_out(block(torch.cat([h_BCHW, skips.pop()], dim=1), time))
        out = self.out(h_BCHW)[:, : self.image_channels * settings.patch**2]  # eps only, not the learned variance
        return F.pixel_shuffle(out.float(), settings.patch)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @torch.no_grad()
    def fold(self, timesteps: Iterable[int]) -> None:
        """Precompute, in the weights' precision of now, all that depends on these timesteps alone; merge doublings."""
        for t in timesteps:
            emb_1E = self._embed(torch.tensor([t], device=next(self.parameters()).device))
            for module in self.modules():
                if isinstance(module, ResBlock):
                    module.fold(t, emb_1E)
        for module in self.modules():
            if isinstance(module, ResBlock | Upsample):
                module.merge_doubling()

    def lay_out(self, *, compiled: bool) -> "UNet":
        """Arrange weights, and images on their way, as the device and the precision of now work fastest; last of all.

        Images are channels-last, but for those that Winograd's algorithm takes, which lie in rows.
        """
        weight = next(self.parameters())
        self.winograd = (
            (weight.device.type, weight.dtype) == ("cpu", torch.float32)
            and self.settings.model_channels >= _WINOGRAD_CHANNELS
            and not compiled
            and torch.backends.nnpack.is_available()
        )
        for module in self.modules():
            if isinstance(module, Conv3x3):
                module.winograd = self.winograd
        return self.to(memory_format=torch.contiguous_format if self.winograd else torch.channels_last)

    def _laid_out(self, h_BCHW: Tensor) -> Tensor:
        if not self.winograd:
            return h_BCHW
        layout = torch.contiguous_format if _suits_winograd(h_BCHW) else torch.channels_last
        return h_BCHW.contiguous(memory_format=layout)

    def _embed(self, t_B: Tensor) -> Tensor:
        """Sinusoids, cosines first, then two linear layers; timesteps rescaled to 0..1000 where the model wants it."""
        settings = self.settings
        half = settings.model_channels // 2
        frequency_F = torch.exp(-math.log(10000) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half)
        t = t_B.float() * (1000 / settings.steps) if settings.rescale_timesteps else t_B.float()
        angle_BF = t[:, None] * frequency_F
        embedding = torch.cat([angle_BF.cos(), angle_BF.sin()], dim=1)
        embedding = F.pad(embedding, (0, settings.model_channels % 2))
        return self.time_embed(embedding.to(self.dtype))


def settings_in(state: Mapping[str, Tensor], image_channels: int) -> dict[str, Any]:
    """What the keys and shapes of an OpenAI-style state dict tell of its `UNetSettings`, as key -> value.

    Heads, groups, schedule and timesteps leave no trace in them. Empty for a state dict of another kind.
    """

    def width(key: str) -> int:
        return state[f"{key}.weight"].shape[0] if f"{key}.weight" in state else 0

    blocks_in = len({key.split(".")[1] for key in state if key.startswith("input_blocks.")})
    if not blocks_in or "time_embed.0.weight" not in state or "out.2.weight" not in state:
        return {}
    # the last block of each level but the highest ends in an upsampling: a convolution, or a second residual block
    updown = not any(".op.weight" in key for key in state)
    ups = [key for key in state if key.startswith("output_blocks.") and key.split(".")[2] != "0"]
    marker = ".in_layers.0.weight" if updown else ".conv.weight"
    levels = 1 + sum(key.endswith(marker) for key in ups)
    per_level, uneven = divmod(blocks_in, levels)
    if uneven:
        return {}
    base = state["time_embed.0.weight"].shape[1]
    channels = state["input_blocks.0.0.weight"].shape[1]
    first = [1 + level * per_level for level in range(levels)]
    return {
        "model_channels": base,
        "channel_mult": [width(f"input_blocks.{index}.0.in_layers.2") // base for index in first],
        "num_res_blocks": per_level - 1,
        "attention_factors": [
            2**level for level, index in enumerate(first) if f"input_blocks.{index}.1.qkv.weight" in state
        ],
        "resblock_updown": updown,
        "learn_sigma": width("out.2") == 2 * channels,
        "patch": math.isqrt(channels // image_channels),
    }
