"""A trained UNet made fast for a few fixed timesteps. Its output changes by rounding alone.

- Time is folded in: a denoiser calls the network at few timesteps, so each residual block's time-dependent scale and
  shift become the affine of its group norm, and the embedding is never computed again:
    (1 + scale) * (w * norm(h) + b) + shift  =  [(1 + scale) w] * norm(h) + [(1 + scale) b + shift].
- Nearest-neighbour doubling is merged into the 3 x 3 convolution after it. Some of the doubled image's pixels under the
  kernel are equal, so each output pixel is a sum over 2 x 2 different ones. A transposed convolution computes it with
  4/9 of the multiplications.
- On a CPU, 3 x 3 convolutions of large images use Winograd's F(6 x 6, 3 x 3) (Lavin & Gray 2015, arXiv 1509.09308),
  which needs 64 multiplications for 36 pixels instead of 324.
- On a CPU, the sums of group norms with few channels per group are matrix products.

Shapes: B batch, C channels, H W image, E time embedding, G groups, D channels of a group, T positions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.pipeline.models.unet import GroupNorm, ResBlock, UNet, Upsample, eps_of

_WINOGRAD_CHANNELS, _WINOGRAD_SIDE = 128, 12  # below, the transforms cost more than the multiplications saved

Affine = tuple[Tensor, Tensor]  # weight_C and bias_C, float32


class FusedUNet(nn.Module):
    """eps_theta(x_t, t) at the timesteps that were folded in.

    It uses the modules of `unet`, which must not be called afterwards. Images are channels-last in memory, except for
    those that Winograd's algorithm processes, which are contiguous.
    """

    @torch.no_grad()
    def __init__(self, unet: UNet, timesteps: Sequence[float], dtype: torch.dtype, *, compiled: bool = False) -> None:
        super().__init__()
        self.settings, self.image_channels, self.dtype = unet.settings, unet.image_channels, dtype
        device = next(unet.parameters()).device
        embeddings = {t: unet.embed(torch.tensor([t], device=device)) for t in timesteps}

        def fuse(module: nn.Module) -> nn.Module:
            if isinstance(module, ResBlock):
                return _FusedResBlock(module, embeddings)
            return merge_doubling(module.conv) if isinstance(module, Upsample) else module

        _replace(unet, fuse)
        use_fast_group_norms(unet)
        self.winograd = (
            (device.type, dtype) == ("cpu", torch.float32)
            and self.settings.model_channels >= _WINOGRAD_CHANNELS
            and not compiled
            and torch.backends.nnpack.is_available()
        )
        if self.winograd:
            _replace(unet, _with_winograd)
        self.input_blocks, self.middle_block, self.output_blocks = (
            unet.input_blocks, unet.middle_block, unet.output_blocks
        )  # fmt: skip
        self.out = unet.out
        self.to(dtype).to(memory_format=torch.contiguous_format if self.winograd else torch.channels_last)

    def forward(self, x_BCHW: Tensor, t: float) -> Tensor:
        """Return eps_BCHW, float32."""
        h_BCHW = F.pixel_unshuffle(x_BCHW, self.settings.patch).to(self.dtype)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h_BCHW = self._lay_out(_run(block, h_BCHW, t))
            skips.append(h_BCHW)
        h_BCHW = _run(self.middle_block, h_BCHW, t)
        for block in self.output_blocks:
            h_BCHW = self._lay_out(_run(block, torch.cat([h_BCHW, skips.pop()], dim=1), t))
        return eps_of(self.out(h_BCHW), self.settings, self.image_channels)

    def _lay_out(self, h_BCHW: Tensor) -> Tensor:
        if not self.winograd:
            return h_BCHW
        layout = torch.contiguous_format if _suits_winograd(h_BCHW) else torch.channels_last
        return h_BCHW.contiguous(memory_format=layout)


def _run(stack: nn.Module, h_BCHW: Tensor, t: float) -> Tensor:
    for layer in stack.children():
        h_BCHW = layer(h_BCHW, t) if isinstance(layer, _FusedResBlock) else layer(h_BCHW)
    return h_BCHW


def _replace(module: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> None:
    """Replace, in place, every module below `module` that `convert` turns into another one."""
    for name, child in list(module.named_children()):
        converted = convert(child)
        if converted is child:
            _replace(child, convert)
        else:
            setattr(module, name, converted)


class _FusedResBlock(nn.Module):
    """A residual block with its time embeddings folded in, `embeddings` being timestep -> emb_1E."""

    def __init__(self, block: ResBlock, embeddings: dict[float, Tensor]) -> None:
        super().__init__()
        self.norm_in, _, conv_in = block.in_layers
        self.norm, _, _, self.conv = block.out_layers
        self.skip_connection, self.resample = block.skip_connection, block.resample
        self.doubles = self.resample.direction == "up"
        self.conv_in = merge_doubling(conv_in) if self.doubles else conv_in
        self.affines = {t: _folded(block, emb_1E) for t, emb_1E in embeddings.items()}

    def forward(self, x_BCHW: Tensor, t: float) -> Tensor:
        h_BCHW = F.silu(self.norm_in(x_BCHW), inplace=True)
        h_BCHW = self.conv_in(h_BCHW if self.doubles else self.resample(h_BCHW))
        h_BCHW = F.silu(self.norm(h_BCHW, self.affines[t]), inplace=True)
        return self.skip_connection(self.resample(x_BCHW)) + self.conv(h_BCHW)


def _folded(block: ResBlock, emb_1E: Tensor) -> Affine:
    """Return the affine of a residual block's second group norm, its time-dependent scale and shift included."""
    scale_1C, shift_1C = block.emb_layers(emb_1E).float().chunk(2, dim=1)
    norm, scale_C = block.out_layers[0], 1 + scale_1C[0]
    return scale_C * norm.weight.float(), scale_C * norm.bias.float() + shift_1C[0]


def merge_doubling(conv: nn.Module) -> nn.ConvTranspose2d:
    """Return nearest-neighbour doubling and a 3 x 3 convolution with padding 1 as one transposed convolution.

    Output row 2 i + a is the sum over k of w[k] x[(2 i + a + k - 1) // 2], so w[k] is part of rows 2 - k and 3 - k of
    the kernel of size 4; the same holds for columns.
    """

    assert isinstance(conv, nn.Conv2d)

    def widen(weight: Tensor, dim: int) -> Tensor:
        first, second, third = weight.unbind(dim)
        return torch.stack([third, second + third, first + second, first], dim)

    merged = nn.ConvTranspose2d(
        conv.in_channels, conv.out_channels, 4, stride=2, padding=1, device="meta", dtype=conv.weight.dtype
    )
    weight_IOUV = widen(widen(conv.weight, 2), 3).transpose(0, 1)
    merged.weight, merged.bias = nn.Parameter(weight_IOUV, requires_grad=False), conv.bias
    return merged.eval()


class _WinogradConv(nn.Module):
    """A 3 x 3 convolution with padding 1, computed by NNPACK's Winograd algorithm if the image is large enough."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if _suits_winograd(x_BCHW):
            return torch._nnpack_spatial_convolution(x_BCHW.contiguous(), self.conv.weight, self.conv.bias, padding=1)
        return self.conv(x_BCHW)


def _with_winograd(module: nn.Module) -> nn.Module:
    suits = (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride) == ((3, 3), (1, 1))
        and module.out_channels >= _WINOGRAD_CHANNELS
    )
    return _WinogradConv(module) if suits and isinstance(module, nn.Conv2d) else module


def _suits_winograd(x_BCHW: Tensor) -> bool:
    return x_BCHW.shape[1] >= _WINOGRAD_CHANNELS and min(x_BCHW.shape[2:]) >= _WINOGRAD_SIDE


def use_fast_group_norms(network: nn.Module) -> None:
    """Replace, in place, every `GroupNorm` below a network by one that is fast in every layout; keys are unchanged."""
    _replace(network, lambda module: FastGroupNorm(module) if isinstance(module, GroupNorm) else module)


class FastGroupNorm(nn.GroupNorm):
    """The same group norm in float32, with another algorithm for groups of few channels on a CPU."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x_BCHW: Tensor, affine: Affine | None = None) -> Tensor:
        """Return the normalised images; `affine` is used instead of weight and bias."""
        weight_C, bias_C = affine or (self.weight.float(), self.bias.float())
        norm = _group_norm_of_few_channels if _has_few_channels(x_BCHW, self.num_groups) else F.group_norm
        return norm(x_BCHW.float(), self.num_groups, weight_C, bias_C, self.eps).to(x_BCHW.dtype)


def _has_few_channels(x_BCHW: Tensor, groups: int) -> bool:
    """Return whether torch's own group norm would take twice the time: on a CPU, for channels-last images that fit the
    cache and have few channels per group."""
    return (
        x_BCHW.device.type == "cpu"
        and not x_BCHW.is_contiguous()
        and x_BCHW.shape[1] <= 8 * groups
        and x_BCHW.numel() <= 2**20
        and not torch.compiler.is_compiling()
    )


def _group_norm_of_few_channels(x_BCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """Group norm that sums over positions with matrix products, followed by one multiply-add."""
    B, C, H, W = x_BCHW.shape
    x_BTC = x_BCHW.permute(0, 2, 3, 1).reshape(B, H * W, C)
    share_B1T = x_BCHW.new_full((B, 1, H * W), groups / (C * H * W))
    mean_BG1 = torch.bmm(share_B1T, x_BTC).view(B, groups, -1).sum(dim=2, keepdim=True)
    square_BG1 = torch.bmm(share_B1T, x_BTC * x_BTC).view(B, groups, -1).sum(dim=2, keepdim=True)
    scale_BGD = (square_BG1 - mean_BG1 * mean_BG1).clamp_(min=0).add_(eps).rsqrt_() * weight_C.view(1, groups, -1)
    shift_BGD = bias_C.view(1, groups, -1) - mean_BG1 * scale_BGD
    out_BTC = torch.addcmul(shift_BGD.view(B, 1, C), x_BTC, scale_BGD.view(B, 1, C))
    return out_BTC.view(B, H, W, C).permute(0, 3, 1, 2)
