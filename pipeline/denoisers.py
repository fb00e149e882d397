"""DENOISERS: one-shot denoising, x_BCHW in [0, 1] plus noise -> x0_BCHW in [0, 1].

A diffusion model lives on [-1, 1], so noise of std sigma on [0, 1] is noise of std 2 sigma for it; the factor 2 stands
here and nowhere else. With abar_t the schedule's cumulative product of 1 - beta (DDPM, arXiv 2006.11239):

    t   = the first timestep with sqrt(1 - abar_t) / sqrt(abar_t) >= 2 sigma
    x_t = sqrt(abar_t) (2 x - 1)
    x0  = clamp((x_t - sqrt(1 - abar_t) eps(x_t, t)) / sqrt(abar_t), -1, 1), back to [0, 1]

(Carlini et al. 2023, arXiv 2206.10550, Algorithm 1; Zhang et al. 2023, arXiv 2308.14333, section 3.) Shapes: B C H W.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.spec import RunSpec, UNetSettings, UserError
from pipeline.unet import UNet
from pipeline.weights import load_into, load_weights, own_function


class Denoiser(Protocol):
    """What f asks of a denoiser; `sigma` is in [0, 1] pixel units."""

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor: ...


def alphas_cumprod(schedule: str, steps: int) -> NDArray[np.float64]:
    """abar_t for t = 0 .. steps - 1, float64: "linear" (DDPM) or "cosine" (arXiv 2102.09672, equation 17)."""
    if schedule == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 1e-4, scale * 0.02, steps)
    else:
        t = np.arange(steps + 1) / steps
        abar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    return np.cumprod(1 - betas, dtype=np.float64)


def timestep(settings: UNetSettings, sigma: float) -> int:
    """The first timestep whose noise is at least that of `sigma`.

    Raises: UserError past the end of the schedule, naming the largest sigma.
    """
    abar = alphas_cumprod(settings.schedule, settings.steps)
    ratio = np.sqrt(1 - abar) / np.sqrt(abar)
    if 2 * sigma > ratio[-1]:
        raise UserError(
            f"sigma = {sigma} is beyond the denoiser's {settings.schedule} schedule of {settings.steps} steps: "
            f"it reaches {math.floor(ratio[-1] / 2 * 1000) / 1000} at most"
        )
    return int(np.argmax(ratio >= 2 * sigma))


class OneShotDenoiser:
    """x0 from one pass of a diffusion UNet at the timestep of sigma."""

    def __init__(self, unet: UNet) -> None:
        self._unet = unet
        self._sigma: float | None = None
        self._abar = 1.0

    def timestep(self, sigma: float) -> int:
        return timestep(self._unet.settings, sigma)

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        if sigma != self._sigma:
            settings, t = self._unet.settings, self.timestep(sigma)
            self._abar = float(alphas_cumprod(settings.schedule, settings.steps)[t])
            self._unet.fold_timestep(t)
            self._sigma = sigma
        signal, noise = math.sqrt(self._abar), math.sqrt(1 - self._abar)
        x_t_BCHW = signal * (2 * x_BCHW - 1)
        eps_BCHW = self._unet(x_t_BCHW)
        x0_BCHW = ((x_t_BCHW - noise * eps_BCHW) / signal).clamp(-1, 1)
        return (x0_BCHW + 1) / 2


def _unet(spec: RunSpec, device: torch.device, dtype: torch.dtype, channels: int) -> OneShotDenoiser:
    assert spec.denoiser.unet is not None
    if spec.denoiser.checkpoint is None:
        raise UserError("[denoiser] checkpoint is missing: arch = 'unet' needs a file of weights")
    with torch.device("meta"):
        unet = UNet(spec.denoiser.unet, channels)
    load_into(unet, load_weights(spec.denoiser.checkpoint), spec.denoiser.checkpoint)
    unet = unet.to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return OneShotDenoiser(unet)


# name -> build(spec, device, dtype, image channels)
DENOISERS: dict[str, Callable[[RunSpec, torch.device, torch.dtype, int], Denoiser]] = {"unet": _unet}


def build_denoiser(spec: RunSpec, device: torch.device, dtype: torch.dtype, channels: int) -> Denoiser | None:
    """The spec's denoiser with its weights, for images of `channels` channels; None for arch = "none".

    Raises: UserError for weights that do not load.
    """
    arch = spec.denoiser.arch
    if arch == "none":
        return None
    return own_function(arch)(spec, device) if ":" in arch else DENOISERS[arch](spec, device, dtype, channels)


def check_denoiser(spec: RunSpec) -> None:
    """Raises: UserError for an architecture that is not known or a sigma beyond its schedule."""
    arch = spec.denoiser.arch
    if ":" in arch:
        own_function(arch)
    elif arch not in ("none", *DENOISERS):
        raise UserError(
            f"denoiser.arch = {arch!r} is unknown: choose one of none, {', '.join(DENOISERS)}, or name your own as "
            "package.module:function"
        )
    if spec.denoiser.unet is not None:
        timestep(spec.denoiser.unet, spec.smoothing.sigma)
