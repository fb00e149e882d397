"""The published algorithm, implemented literally: what `python -m benchmarks speed` compares the pipeline with.

It is Cohen et al.'s certify with DiffSmooth's base classifier (Zhang et al. 2023, arXiv 2308.14333, Algorithm 1) on
OpenAI's p_sample, in float32. Samples are processed one at a time. For each batch the timestep is embedded again, and
the learned variance and the full posterior (mean, variance, sample) are computed, although only x0 is used. The m
copies are classified one after another, and each batch's votes are copied to the host and counted there. The networks
are used as they were trained: nothing is folded, and images are contiguous (NCHW). This code is independent of the
pipeline on purpose: it shares only the weights and the layout of the networks.

Shapes: B batch, C channels, H W image, E time embedding, T attention positions, K classes, M local copies.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.pipeline.models.classifiers import resolve_classifier
from diffsmooth.pipeline.models.denoisers import OpenAIUNet, resolve_denoiser
from diffsmooth.pipeline.models.unet import Attention, ResBlock, UNet
from diffsmooth.pipeline.noise import local_noise
from diffsmooth.pipeline.spec import RunSpec, UNetSettings


class Literal:
    """The published program for one spec, on one device."""

    def __init__(self, spec: RunSpec, device: torch.device, shape: tuple[int, int, int], num_classes: int) -> None:
        smoothing = spec.smoothing
        source = resolve_denoiser(spec)
        self._diffusion = _Diffusion(source, device, shape) if isinstance(source, OpenAIUNet) else None
        self._classifier = resolve_classifier(spec).load(device, shape[0], num_classes)
        local_MCHW = local_noise(
            local_seed=smoothing.local_seed, m=smoothing.m, shape=shape, local_sigma=smoothing.local_sigma
        )
        self._local_noise = list(torch.from_numpy(local_MCHW).to(device))
        self._sigma, self._num_classes = smoothing.sigma, num_classes
        self._generator = torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def scores(self, x_BCHW: Tensor) -> Tensor:
        """Return scores_BK, the sum of the softmax over the local copies, for noisy images."""
        x0_BCHW = x_BCHW if self._diffusion is None else self._diffusion.denoise(x_BCHW, self._generator)
        scores_BK = torch.zeros(len(x_BCHW), self._num_classes, device=x_BCHW.device)
        for local_CHW in self._local_noise:
            scores_BK += self._classifier(x0_BCHW + local_CHW).softmax(dim=1)
        return scores_BK

    @torch.no_grad()
    def count(self, x_CHW: Tensor, draws: int, batch_size: int) -> NDArray[np.int64]:
        """Return counts_K, the votes of one sample's draws; the noise is generated on the device."""
        counts_K = np.zeros(self._num_classes, dtype=np.int64)
        for _ in range(math.ceil(draws / batch_size)):
            this_batch_size = min(batch_size, draws)
            draws -= this_batch_size
            x_BCHW = x_CHW.repeat((this_batch_size, 1, 1, 1))
            noise_BCHW = self._sigma * torch.randn(x_BCHW.shape, generator=self._generator, device=x_BCHW.device)
            for k in self.scores(x_BCHW + noise_BCHW).argmax(dim=1).cpu().numpy():
                counts_K[k] += 1
        return counts_K


class _PSample(NamedTuple):
    sample_BCHW: Tensor
    x0_BCHW: Tensor


class _Diffusion:
    """The parts of GaussianDiffusion (improved-diffusion and guided-diffusion) that p_sample needs."""

    def __init__(self, source: OpenAIUNet, device: torch.device, shape: tuple[int, int, int]) -> None:
        self._unet = source.load(device, shape)
        self._channels = shape[0]
        self._abar = abar = source.abar
        self._t = source.timesteps[0]
        before = np.append(1.0, abar[:-1])
        self._betas = betas = 1 - abar / before
        self._variance = betas * (1 - before) / (1 - abar)
        self._log_variance = np.log(np.append(self._variance[1], self._variance[1:]))
        self._mean_of_x0 = betas * np.sqrt(before) / (1 - abar)
        self._mean_of_x_t = (1 - before) * np.sqrt(1 - betas) / (1 - abar)

    def denoise(self, x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        t_B = torch.tensor([self._t] * len(x_BCHW), device=x_BCHW.device)
        x_t_BCHW = _extract(np.sqrt(self._abar), t_B, x_BCHW) * (2 * x_BCHW - 1)
        return (self._p_sample(x_t_BCHW, t_B, generator).x0_BCHW + 1) / 2

    def _p_sample(self, x_BCHW: Tensor, t_B: Tensor, generator: torch.Generator) -> _PSample:
        timestep_map = torch.tensor(list(range(len(self._abar))), device=t_B.device)  # of the spaced diffusion
        out_BCHW = literal_unet(self._unet, x_BCHW, timestep_map[t_B])
        eps_BCHW, log_variance_BCHW = out_BCHW[:, : self._channels], _extract(self._log_variance, t_B, x_BCHW)
        if out_BCHW.shape[1] == 2 * self._channels:  # interpolate between the posterior's log variance and log beta
            share_BCHW = (out_BCHW[:, self._channels :] + 1) / 2
            log_beta_BCHW = _extract(np.log(self._betas), t_B, x_BCHW)
            log_variance_BCHW = share_BCHW * log_beta_BCHW + (1 - share_BCHW) * log_variance_BCHW
        x0_BCHW = (
            _extract(np.sqrt(1 / self._abar), t_B, x_BCHW) * x_BCHW
            - _extract(np.sqrt(1 / self._abar - 1), t_B, x_BCHW) * eps_BCHW
        ).clamp(-1, 1)
        mean_BCHW = (
            _extract(self._mean_of_x0, t_B, x_BCHW) * x0_BCHW + _extract(self._mean_of_x_t, t_B, x_BCHW) * x_BCHW
        )
        noise_BCHW = torch.randn(x_BCHW.shape, generator=generator, device=x_BCHW.device)
        std_BCHW = (t_B != 0).float()[:, None, None, None] * torch.exp(0.5 * log_variance_BCHW)
        return _PSample(mean_BCHW + std_BCHW * noise_BCHW, x0_BCHW)


def _extract(table: NDArray[np.float64], t_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """Return the entries of a table at t_B, expanded to the shape of images."""
    values_B = torch.from_numpy(table).to(t_B.device)[t_B].float()
    return values_B[:, None, None, None].expand(like_BCHW.shape)


def literal_unet(unet: UNet, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """Return all output channels of OpenAI's UNet, as its published forward computes them."""
    settings = unet.settings
    emb_BE = unet.time_embed(_embedding(t_B, settings))
    h_BCHW, skips = F.pixel_unshuffle(x_BCHW, settings.patch), []
    for block in unet.input_blocks:
        h_BCHW = _layers(block, h_BCHW, emb_BE)
        skips.append(h_BCHW)
    h_BCHW = _layers(unet.middle_block, h_BCHW, emb_BE)
    for block in unet.output_blocks:
        h_BCHW = _layers(block, torch.cat([h_BCHW, skips.pop()], dim=1), emb_BE)
    norm, _, conv = unet.out
    return F.pixel_shuffle(conv(_silu(_norm(norm, h_BCHW))), settings.patch)


def _embedding(t_B: Tensor, settings: UNetSettings) -> Tensor:
    half = settings.model_channels // 2
    frequency_F = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t_B.device)
    t_B = t_B.float() * (1000 / settings.steps) if settings.rescale_timesteps else t_B.float()
    angle_BF = t_B[:, None] * frequency_F[None]
    emb_BE = torch.cat([torch.cos(angle_BF), torch.sin(angle_BF)], dim=-1)
    return F.pad(emb_BE, (0, settings.model_channels % 2))


def _layers(block: nn.Module, h_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
    for layer in block.children():
        if isinstance(layer, ResBlock):
            h_BCHW = _residual(layer, h_BCHW, emb_BE)
        else:
            h_BCHW = _attention(layer, h_BCHW) if isinstance(layer, Attention) else layer(h_BCHW)
    return h_BCHW


def _residual(block: ResBlock, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
    norm_in, _, conv_in = block.in_layers
    h_BCHW = conv_in(block.resample(_silu(_norm(norm_in, x_BCHW))))
    emb_BC11 = block.emb_layers[1](_silu(emb_BE))[:, :, None, None]
    norm, _, _, conv = block.out_layers
    scale_BC11, shift_BC11 = emb_BC11.chunk(2, dim=1)
    h_BCHW = _norm(norm, h_BCHW) * (1 + scale_BC11) + shift_BC11
    return block.skip_connection(block.resample(x_BCHW)) + conv(_silu(h_BCHW))


def _attention(layer: Attention, x_BCHW: Tensor) -> Tensor:
    B, C, *size = x_BCHW.shape
    x_BCT = x_BCHW.reshape(B, C, -1)
    qkv = layer.qkv(_norm(layer.norm, x_BCT)).reshape(B * layer.heads, -1, x_BCT.shape[2])
    q, k, v = qkv.chunk(3, dim=1)
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    weight_BTT = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale).float(), dim=-1)
    a_BCT = torch.einsum("bts,bcs->bct", weight_BTT, v).reshape(B, C, -1)
    return (x_BCT + layer.proj_out(a_BCT)).reshape(B, C, *size)


def _norm(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    assert isinstance(norm, nn.GroupNorm)
    return F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).type(x.dtype)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)  # as OpenAI implements it
