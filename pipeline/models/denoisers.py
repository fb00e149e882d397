"""DENOISERS: x_BCHW in [0, 1] plus noise -> x0_BCHW in [0, 1], by a diffusion model.

A diffusion model lives on [-1, 1], so noise of std sigma on [0, 1] is noise of std 2 sigma for it; the factor 2 stands
here and nowhere else. With abar_t the schedule's cumulative product of 1 - beta (DDPM, arXiv 2006.11239):

    t   = the first timestep with sqrt(1 - abar_t) / sqrt(abar_t) >= 2 sigma
    x_t = sqrt(abar_t) (2 x - 1)
    x0  = clamp((x_t - sqrt(1 - abar_t) eps(x_t, t)) / sqrt(abar_t), -1, 1), back to [0, 1]

(Carlini et al. 2023, arXiv 2206.10550, Algorithm 1; Zhang et al. 2023, arXiv 2308.14333, section 3.) With more than one
step, x0 is noised again, deterministically, to the next lower timestep, and predicted anew (DDIM with eta = 0, arXiv
2010.02502, equation 12; DensePure, arXiv 2211.00322, uses several steps). Shapes: B C H W.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UserError
from pipeline.locations import require_set
from pipeline.models.unet import UNet, settings_in
from pipeline.models.weights import State, build, function_id, library, load_json, own_function, weights_id
from pipeline.spec import RunSpec, UNetSettings
from pipeline.storage.fetch import fetch_first

# The public checkpoints' hyper-parameters (improved-diffusion's CIFAR-10, guided-diffusion's ImageNet 256).
PRESETS = {
    "openai-cifar10": UNetSettings(
        model_channels=128,
        channel_mult=[1, 2, 2, 2],
        num_res_blocks=3,
        attention_factors=[2, 4],
        num_heads=4,
        learn_sigma=True,
        schedule="cosine",
        steps=4000,
        rescale_timesteps=True,
    ),
    "openai-imagenet256": UNetSettings(
        model_channels=256,
        channel_mult=[1, 1, 2, 2, 4, 4],
        num_res_blocks=2,
        attention_factors=[8, 16, 32],
        num_head_channels=64,
        resblock_updown=True,
        learn_sigma=True,
        schedule="linear",
        steps=1000,
    ),
}

Shape = tuple[int, int, int]  # C, H, W


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


def timestep(abar: NDArray[np.float64], sigma: float) -> int:
    """The first timestep of a schedule whose noise is at least that of `sigma`.

    Raises: UserError past the end of the schedule, naming the largest sigma.
    """
    ratio = np.sqrt(1 - abar) / np.sqrt(abar)
    if 2 * sigma > ratio[-1]:
        raise UserError(
            f"sigma = {sigma} is beyond the denoiser's schedule of {len(abar)} steps: "
            f"it reaches {math.floor(ratio[-1] / 2 * 1000) / 1000} at most: take a lower sigma, or another denoiser"
        )
    return int(np.argmax(ratio >= 2 * sigma))


def timesteps(abar: NDArray[np.float64], sigma: float, steps: int) -> list[int]:
    """The timesteps at which a denoiser predicts: that of `sigma`, then evenly down towards 0.

    Raises: UserError for a sigma beyond the schedule, or for more steps than there are timesteps.
    """
    first = timestep(abar, sigma)
    if steps > max(first, 1):
        raise UserError(
            f"denoiser.steps = {steps}, but sigma = {sigma} is reached at timestep {first}: take {max(first, 1)} steps "
            "at most"
        )
    return [round(first * (steps - index) / steps) for index in range(steps)]


class DiffusionDenoiser:
    """x0 from passes of a diffusion model at fixed timesteps.

    `predict_eps(x_t_BCHW, t)` is the model on [-1, 1]; `abar` its schedule; `timesteps` what `timesteps` gives.
    """

    def __init__(
        self, predict_eps: Callable[[Tensor, int], Tensor], abar: NDArray[np.float64], timesteps: list[int]
    ) -> None:
        self.predict_eps = predict_eps
        self.timesteps = timesteps
        # plain numbers: torch.compile makes constants of them, but nothing good of NumPy's
        self._signal_and_noise = {t: (math.sqrt(abar[t]), math.sqrt(1 - abar[t])) for t in timesteps}
        ratio, first = np.append(0.0, np.sqrt(1 - abar) / np.sqrt(abar)), timesteps[0]
        self._ratios = (float(ratio[first]), float(ratio[first + 1]))  # of the timestep before and of the first

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        assert self._ratios[0] < 2 * sigma <= self._ratios[1], "built for another sigma"
        x_t_BCHW = self._signal_and_noise[self.timesteps[0]][0] * (2 * x_BCHW - 1)
        x0_BCHW = self._predict_x0(x_t_BCHW, self.timesteps[0])
        for t, lower in zip(self.timesteps, self.timesteps[1:], strict=False):
            signal, noise = self._signal_and_noise[t]
            eps_BCHW = (x_t_BCHW - signal * x0_BCHW) / noise  # of the clamped x0
            signal, noise = self._signal_and_noise[lower]
            x_t_BCHW = signal * x0_BCHW + noise * eps_BCHW
            x0_BCHW = self._predict_x0(x_t_BCHW, lower)
        return (x0_BCHW + 1) / 2

    def _predict_x0(self, x_t_BCHW: Tensor, t: int) -> Tensor:
        signal, noise = self._signal_and_noise[t]
        return ((x_t_BCHW - noise * self.predict_eps(x_t_BCHW, t)) / signal).clamp(-1, 1)


def load_unet(spec: RunSpec, device: torch.device, shape: Shape) -> UNet:
    """The spec's OpenAI-style UNet as it was trained, float32, nothing folded, for images of a shape.

    Raises: UserError for weights that do not load and for images that do not fit.
    """
    settings, (channels, height, width) = _unet_settings(spec), shape
    multiple = settings.patch * 2 ** (len(settings.channel_mult) - 1)
    if height % multiple or width % multiple:
        raise UserError(
            f"images of {height} x {width} pixels do not fit the denoiser, whose levels shrink them to 1/{multiple}: "
            f"both sides must be multiples of {multiple}; set data.resize and data.crop"
        )

    def explain(state: State) -> str:
        given = settings.model_dump()
        told = {key: value for key, value in settings_in(state, channels).items() if given[key] != value}
        differing = (f"{key} = {value} where the architecture has {given[key]}" for key, value in told.items())
        return f"the file is a UNet of {', '.join(differing)}" if told else ""

    unet = build(lambda: UNet(settings, channels), _weights(spec, device), device, explain=explain)
    assert isinstance(unet, UNet)
    return unet


def _unet(spec: RunSpec, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser:
    """An OpenAI-style UNet, all that depends on its timesteps alone precomputed in float32."""
    abar, unet = schedule(spec), load_unet(spec, device, shape)
    at = timesteps(abar, spec.smoothing.sigma, spec.denoiser.steps)
    unet.fold(at)
    return DiffusionDenoiser(unet.to(dtype).lay_out(compiled=spec.compute.compile), abar, at)


def _weights(spec: RunSpec, device: torch.device) -> str:
    """Where the weights lie; the meta device needs none."""
    return "" if device.type == "meta" else _file(spec, "denoiser")


def _diffusers(spec: RunSpec, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser:
    """A UNet2DModel in diffusers' layout: config.json and weights in one folder, the scheduler's config beside them."""
    UNet2DModel, file = library("diffusers", "UNet2DModel"), _file(spec, "denoiser.config")
    config, kind = load_json(file), _scheduler(spec).get("prediction_type", "epsilon")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f"{file}: a {config['_class_name']}, and only a UNet2DModel denoises images: take one")
    if config["in_channels"] != shape[0]:
        raise UserError(
            f"{file}: a denoiser of {config['in_channels']} channels, the images have {shape[0]}: "
            "take a denoiser of such images"
        )
    if kind not in _EPS:
        raise UserError(
            f"{_file(spec, 'denoiser.scheduler')}: prediction_type = {kind!r} must be one of {', '.join(_EPS)}"
        )
    abar = schedule(spec)
    network = build(lambda: UNet2DModel.from_config(config), _weights(spec, device), device, convert=_of_today).to(
        dtype
    )

    def predict_eps(x_t_BCHW: Tensor, t: int) -> Tensor:
        out_BCHW = network(x_t_BCHW.to(dtype), t, return_dict=False)[0].float()[:, : shape[0]]
        return _EPS[kind](out_BCHW, x_t_BCHW, math.sqrt(abar[t]), math.sqrt(1 - abar[t]))

    return DiffusionDenoiser(predict_eps, abar, timesteps(abar, spec.smoothing.sigma, spec.denoiser.steps))


# prediction_type -> eps from (the network's output, x_t, sqrt(abar_t), sqrt(1 - abar_t))
_EPS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda out, x_t, signal, noise: out,
    "v_prediction": lambda out, x_t, signal, noise: signal * out + noise * x_t,
    "sample": lambda out, x_t, signal, noise: (x_t - signal * out) / noise,
}


def _of_today(state: State) -> State:
    """Give the attention layers of diffusers' early files today's key names."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        parent, _, last = layer.rpartition(".")
        renamed[f"{parent}.{names[last]}.{kind}" if last in names else key] = value
    return renamed


# name -> build(spec, device, dtype, image shape)
DENOISERS: dict[str, Callable[[RunSpec, torch.device, torch.dtype, Shape], Denoiser]] = {
    "unet": _unet,
    **dict.fromkeys(PRESETS, _unet),
    "diffusers": _diffusers,
}


def build_denoiser(spec: RunSpec, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser | None:
    """The spec's denoiser with its weights (without, on the meta device), for images of a shape; None for arch "none".

    Raises: UserError for weights that do not load and for images that do not fit.
    """
    arch = spec.denoiser.arch
    if arch == "none":
        return None
    return own_function(arch)(spec, device) if ":" in arch else DENOISERS[arch](spec, device, dtype, shape)


def check_denoiser(spec: RunSpec) -> None:
    """Raises: UserError for an architecture that is not known or a sigma beyond its schedule."""
    arch = spec.denoiser.arch
    if arch == "none":
        return
    if ":" in arch:
        own_function(arch)
        return
    if arch not in DENOISERS:
        raise UserError(
            f"denoiser.arch = {arch!r} is unknown: choose one of none, {', '.join(DENOISERS)}, or name your own as "
            "package.module:function"
        )
    if arch == "diffusers":
        _file(spec, "denoiser.config")
    timesteps(schedule(spec), spec.smoothing.sigma, spec.denoiser.steps)


def denoiser_ids(spec: RunSpec) -> dict[str, str]:
    """What votes_id must know of the denoiser besides the spec: its files' hashes, an own function's source hash.

    Raises: UserError for a missing file, another sha256 than the spec's, or a function without a source file.
    """
    arch, section = spec.denoiser.arch, spec.denoiser
    if arch == "none":
        return {}
    if ":" in arch:
        ids = {} if section.checkpoint is None else {"denoiser": weights_id(section.checkpoint, section.sha256)}
        return {**ids, "denoiser.source": function_id(arch)}
    names = _DIFFUSERS_FILES if arch == "diffusers" else ["denoiser"]
    expected = {"denoiser": section.sha256}
    return {name: weights_id(_file(spec, name), expected.get(name)) for name in names}


def _file(spec: RunSpec, name: str) -> str:
    """The location of one of the files that the denoiser is made of, by what votes_id calls it; no other is fetched."""
    arch, checkpoint = spec.denoiser.arch, spec.denoiser.checkpoint
    if checkpoint is None:
        raise UserError(f"denoiser.checkpoint is missing: arch = {arch!r} needs a file of weights")
    require_set("denoiser.checkpoint", checkpoint)
    if arch != "diffusers":
        return checkpoint
    folder, (names, inner) = checkpoint.rstrip("/"), _DIFFUSERS_FILES[name]
    return str(fetch_first([f"{folder}/{place}{file}" for file in names for place in ("", inner)]))


# what votes_id calls it -> file names, and the subfolder where a whole pipeline was saved
_DIFFUSERS_FILES = {
    "denoiser": (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"], "unet/"),
    "denoiser.config": (["config.json"], "unet/"),
    "denoiser.scheduler": (["scheduler_config.json"], "scheduler/"),
}


def _unet_settings(spec: RunSpec) -> UNetSettings:
    settings = PRESETS.get(spec.denoiser.arch, spec.denoiser.unet)
    assert settings is not None
    return settings


def schedule(spec: RunSpec) -> NDArray[np.float64]:
    """abar_t of the spec's diffusion model."""
    if spec.denoiser.arch != "diffusers":
        settings = _unet_settings(spec)
        return alphas_cumprod(settings.schedule, settings.steps)
    scheduler = library("diffusers", "DDPMScheduler").from_config(_scheduler(spec))
    return np.cumprod(1 - scheduler.betas.double().numpy())


def _scheduler(spec: RunSpec) -> dict[str, Any]:
    return load_json(_file(spec, "denoiser.scheduler"))
