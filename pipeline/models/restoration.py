"""Denoisers that need no diffusion model: FFDNet and DnCNN, chains of 3 x 3 convolutions.

    DnCNN    x0 = x - net(x), trained for one sigma, or blind (Zhang et al. 2017, arXiv 1608.03981)
    FDnCNN   x0 = net([x, sigma])
    FFDNet   x0 = up(net([down(x), sigma])) (Zhang et al. 2018, arXiv 1710.04026)

`down` folds 2 x 2 pixels into channels, and `up` unfolds them. The map sigma has the value of sigma everywhere. x0 is
clamped to [0, 1]. Depth, width and batch norms are read from the file, whatever its keys are called. Shapes: B C H W.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.files import weights_id
from diffsmooth.pipeline.models.weights import load_into, load_weights

FFDNET, DNCNN = "ffdnet", "dncnn"
LARGEST_SIGMA = 75 / 255  # of FFDNet and FDnCNN, in [0, 1] pixel units

_IRCNN_DEPTH = 7  # its convolutions are dilated, which leaves no trace in a file
# image channels -> depth and width of the published FFDNets, used to count FLOPs without a file
_PUBLISHED = {1: (15, 64), 3: (12, 96)}
_DNCNN = (17, 64)


@dataclass(frozen=True)
class RestorationDenoiser:
    """A spec's FFDNet or DnCNN, checked but not loaded."""

    arch: str
    checkpoint: str
    sha256: str | None

    def ids(self) -> dict[str, str]:
        return {"denoiser": weights_id(self.checkpoint, self.sha256)}

    def build(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> "Restorer":
        """Return the denoiser. Raises: UserError for a file that is no such network, or one for other images."""
        channels = shape[0]
        if device.type == "meta":
            depth, width = _PUBLISHED.get(channels, _DNCNN) if self.arch == FFDNET else _DNCNN
            outside = 4 * channels if self.arch == FFDNET else channels
            inside = outside + 1 if self.arch == FFDNET else outside
            with device:
                chain = _chain([inside, *[width] * (depth - 1), outside])
        else:
            chain = self._load(device)
        restorer = Restorer(chain, self.arch, channels)
        restorer.check(self.checkpoint)
        return restorer.to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def _load(self, device: torch.device) -> nn.Sequential:
        state, layers = load_weights(self.checkpoint), dict[int, dict[str, Tensor]]()
        for key, tensor in state.items():
            match = re.fullmatch(r"(?:.*\.)?(\d+)\.(\w+)", key)
            if match is None:
                raise UserError(
                    f"checkpoint {self.checkpoint}: {key} is not a layer of a chain of convolutions; use a file of "
                    f"{self.arch}, or another denoiser.arch"
                )
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        return _chain_of([layers[index] for index in sorted(layers)], self.checkpoint)


class Restorer(nn.Module):
    """The denoiser (x_BCHW, sigma) -> x0_BCHW, both in [0, 1]."""

    def __init__(self, chain: nn.Sequential, arch: str, channels: int) -> None:
        super().__init__()
        self.chain, self.arch, self.channels = chain, arch, channels
        first, last = chain[0], chain[-1]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        self.ends = (first.in_channels, last.out_channels)
        self.takes_sigma = self.ends[0] == self.ends[1] + 1

    def check(self, checkpoint: str) -> None:
        """Refuse a network of another kind or for images with other channels."""
        factor = 4 if self.arch == FFDNET else 1
        expected = [(factor * self.channels + 1, factor * self.channels)]
        if self.arch == DNCNN:
            expected.append((self.channels, self.channels))
        if self.ends not in expected:
            raise UserError(
                f"checkpoint {checkpoint}: the network has {self.ends[0]} input and {self.ends[1]} output channels, "
                f"but {self.arch} for images with {self.channels} channels has {expected[0][0]} and {expected[0][1]}; "
                "use a file for such images, or another denoiser.arch"
            )

    def forward(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        height, width = x_BCHW.shape[2:]
        h_BCHW = x_BCHW
        if self.arch == FFDNET:
            h_BCHW = F.pixel_unshuffle(F.pad(h_BCHW, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        if self.takes_sigma:
            h_BCHW = torch.cat([h_BCHW, torch.full_like(h_BCHW[:, :1], sigma)], dim=1)
        weight = self.chain[0].weight
        assert isinstance(weight, Tensor)
        h_BCHW = self.chain(h_BCHW.to(weight.dtype)).float()
        if self.arch == FFDNET:
            h_BCHW = F.pixel_shuffle(h_BCHW, 2)[:, :, :height, :width]
        return (h_BCHW if self.takes_sigma else x_BCHW - h_BCHW).clamp(0, 1)


def resolve_restoration(arch: str, checkpoint: str, sha256: str | None, sigma: float) -> RestorationDenoiser:
    """Check an FFDNet or a DnCNN of a spec. Raises: UserError for a sigma beyond FFDNet's."""
    if arch == FFDNET and sigma > LARGEST_SIGMA:
        raise UserError(
            f"sigma = {sigma:g} is beyond FFDNet's training, which ends at 75/255 = {LARGEST_SIGMA:.3f}; use a smaller "
            "sigma, or another denoiser"
        )
    return RestorationDenoiser(arch, checkpoint, sha256)


def _chain(widths: list[int]) -> nn.Sequential:
    """Return 3 x 3 convolutions between layers of the given widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for width, out_width in pairwise(widths):
        layers += [nn.Conv2d(width, out_width, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def _chain_of(layers: list[dict[str, Tensor]], checkpoint: str) -> nn.Sequential:
    """Return the chain whose layers, in order, have these tensors; batch norms are merged into the convolutions."""
    convolutions: list[nn.Conv2d] = []
    for tensors in layers:
        weight = tensors.get("weight")
        if "running_mean" in tensors and convolutions:
            norm = nn.BatchNorm2d(convolutions[-1].out_channels)
            load_into(norm, dict(tensors), checkpoint)
            convolutions[-1] = fuse_conv_bn_eval(convolutions[-1].eval(), norm.eval())
            continue
        if weight is None or weight.ndim != 4 or weight.shape[2:] != (3, 3):
            raise _no_chain(tensors, checkpoint)
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias="bias" in tensors)
        load_into(convolution, dict(tensors), checkpoint)
        convolutions.append(convolution)
    if len(convolutions) in (0, 1, _IRCNN_DEPTH):
        reason = ", which is IRCNN's number; its convolutions are dilated" if len(convolutions) > 1 else ""
        raise UserError(
            f"checkpoint {checkpoint}: holds {len(convolutions)} convolutions{reason}; use a file of FFDNet or DnCNN"
        )
    chain: list[nn.Module] = []
    for convolution in convolutions:
        chain += [convolution, nn.ReLU(inplace=True)]
    return nn.Sequential(*chain[:-1])


def _no_chain(tensors: Mapping[str, Tensor], checkpoint: str) -> UserError:
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return UserError(
        f"checkpoint {checkpoint}: a layer with {shapes} is neither a 3 x 3 convolution nor a batch norm; use a file "
        "of FFDNet or DnCNN"
    )
