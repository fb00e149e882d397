"""DENOISERS: networks that turn x_BCHW in [0, 1] plus noise into x0_BCHW in [0, 1].

Diffusion models work on [-1, 1], so noise of standard deviation sigma on [0, 1] is noise of 2 sigma for them. That
factor 2 occurs in this module only. With abar_t the cumulative product of 1 - beta (DDPM, arXiv 2006.11239):

    t   = the first timestep with sqrt(1 - abar_t) / sqrt(abar_t) >= 2 sigma
    x_t = sqrt(abar_t) (2 x - 1)
    x0  = clamp((x_t - sqrt(1 - abar_t) eps(x_t, t)) / sqrt(abar_t), -1, 1), mapped back to [0, 1]

(Carlini et al. 2023, arXiv 2206.10550, Algorithm 1; Zhang et al. 2023, arXiv 2308.14333, section 3.) With more than one
step, x0 is noised deterministically to the next lower timestep and predicted again (DDIM with eta = 0, arXiv
2010.02502, equation 12; DensePure, arXiv 2211.00322, uses several steps). Shapes: B C H W.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.locations import require_set
from diffsmooth.pipeline.models import edm
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.files import (
    Config,
    first_file,
    library,
    library_errors,
    load_json,
    parse_config,
    weights_id,
)
from diffsmooth.pipeline.models.fused import FusedUNet
from diffsmooth.pipeline.models.own import OwnNetwork
from diffsmooth.pipeline.models.restoration import DNCNN, FFDNET, RestorationDenoiser, resolve_restoration
from diffsmooth.pipeline.models.unet import UNet, settings_in
from diffsmooth.pipeline.models.weights import State, build
from diffsmooth.pipeline.spec import RunSpec, UNetSettings

# The hyper-parameters of the public checkpoints: improved-diffusion's CIFAR-10 and guided-diffusion's ImageNet 256.
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
    """A loaded denoiser; `sigma` is in [0, 1] pixel units."""

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor: ...


class DenoiserSource(Protocol):
    """A spec's denoiser, checked but not loaded."""

    def ids(self) -> dict[str, str]:
        """Return what votes_id must know besides the spec: the hash of each file, or of an own function's source.

        Raises: UserError for a missing file or a sha256 that differs from the spec's.
        """
        ...

    def build(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser | None:
        """Return the denoiser for images of a shape, with its weights; on the meta device, without them.

        Raises: UserError for weights that do not load and for images that do not fit.
        """
        ...


def alphas_cumprod(schedule: str, steps: int) -> NDArray[np.float64]:
    """Return abar_t for t = 0 .. steps - 1: "linear" (DDPM) or "cosine" (arXiv 2102.09672, equation 17)."""
    if schedule == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 1e-4, scale * 0.02, steps)
    else:
        t = np.arange(steps + 1) / steps
        abar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    return np.cumprod(1 - betas, dtype=np.float64)


def timestep(abar: NDArray[np.float64], sigma: float) -> int:
    """Return the first timestep of a schedule whose noise is at least that of `sigma`.

    Raises: UserError for a sigma beyond the schedule, naming the largest one.
    """
    ratio = np.sqrt(1 - abar) / np.sqrt(abar)
    if not 2 * sigma <= ratio[-1]:
        raise UserError(
            f"sigma = {sigma} is beyond the denoiser's schedule of {len(abar)} steps; use at most "
            f"{math.floor(ratio[-1] / 2 * 1000) / 1000}, or another denoiser"
        )
    return int(np.argmax(ratio >= 2 * sigma))


def timesteps(abar: NDArray[np.float64], sigma: float, steps: int) -> list[int]:
    """Return the timesteps at which a denoiser predicts: that of `sigma`, then evenly spaced ones towards 0.

    Raises: UserError for a sigma beyond the schedule, and for more steps than there are timesteps.
    """
    first = timestep(abar, sigma)
    if steps > max(first, 1):
        raise UserError(
            f"denoiser.steps = {steps}, but sigma = {sigma} corresponds to timestep {first}; use at most "
            f"{max(first, 1)} steps"
        )
    return [round(first * (steps - index) / steps) for index in range(steps)]


class DiffusionDenoiser:
    """x0 from passes of a diffusion model at fixed timesteps.

    `predict_eps(x_t_BCHW, t)` is the model on [-1, 1], `abar` its schedule, and `timesteps` comes from `timesteps()`.
    """

    def __init__(
        self, predict_eps: Callable[[Tensor, int], Tensor], abar: NDArray[np.float64], timesteps: list[int]
    ) -> None:
        self.predict_eps = predict_eps
        self.timesteps = timesteps
        # Python floats: torch.compile treats them as constants, but not NumPy's
        self._signal_and_noise = {t: (math.sqrt(abar[t]), math.sqrt(1 - abar[t])) for t in timesteps}
        ratio, first = np.append(0.0, np.sqrt(1 - abar) / np.sqrt(abar)), timesteps[0]
        self._ratios = (float(ratio[first]), float(ratio[first + 1]))  # of the timestep before the first, of the first

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        assert self._ratios[0] < 2 * sigma <= self._ratios[1], "built for another sigma"
        x_t_BCHW = self._signal_and_noise[self.timesteps[0]][0] * (2 * x_BCHW - 1)
        x0_BCHW = self._predict_x0(x_t_BCHW, self.timesteps[0])
        for t, lower in zip(self.timesteps, self.timesteps[1:], strict=False):
            signal, noise = self._signal_and_noise[t]
            eps_BCHW = (x_t_BCHW - signal * x0_BCHW) / noise  # consistent with the clamped x0
            signal, noise = self._signal_and_noise[lower]
            x_t_BCHW = signal * x0_BCHW + noise * eps_BCHW
            x0_BCHW = self._predict_x0(x_t_BCHW, lower)
        return (x0_BCHW + 1) / 2

    def _predict_x0(self, x_t_BCHW: Tensor, t: int) -> Tensor:
        signal, noise = self._signal_and_noise[t]
        return ((x_t_BCHW - noise * self.predict_eps(x_t_BCHW, t)) / signal).clamp(-1, 1)


class _NoDenoiser:
    """arch = "none": Cohen's smoothing."""

    def ids(self) -> dict[str, str]:
        return {}

    def build(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
        return None


class _OwnDenoiser(OwnNetwork):
    def build(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser:
        return self.call(device)


@dataclass(frozen=True)
class UNetFile:
    """A UNet in OpenAI's layout: one file of weights, hyper-parameters from a preset or from [denoiser.unet]."""

    spec: RunSpec
    settings: UNetSettings

    def ids(self) -> dict[str, str]:
        return {"denoiser": weights_id(_checkpoint(self.spec), self.spec.denoiser.sha256)}

    def load(self, device: torch.device, shape: Shape) -> UNet:
        """Return the network as it was trained, float32, for images of a shape. Raises: UserError, as `build` does."""
        settings, (channels, height, width) = self.settings, shape
        multiple = settings.side_multiple
        if height % multiple or width % multiple:
            raise UserError(
                f"images of {height} x {width} pixels do not fit the denoiser, whose lowest level has 1/{multiple} of "
                f"their size; use images whose sides are multiples of {multiple}, or set data.resize and data.crop"
            )

        def explain(state: State) -> str:
            given = settings.model_dump()
            found = {key: value for key, value in settings_in(state, channels).items() if given[key] != value}
            if not found:
                return ""
            differences = (f"{key} = {value} instead of {given[key]}" for key, value in found.items())
            return f"the file holds a UNet with {', '.join(differences)}; correct these settings or use another file"

        location = "" if device.type == "meta" else _checkpoint(self.spec)
        unet = build(lambda: UNet(settings, channels), location, device, convert=self.convert, explain=explain)
        assert isinstance(unet, UNet)
        return unet

    def convert(self, state: State) -> State:
        """Return the state dict with the keys of `UNet`."""
        return state


@dataclass(frozen=True)
class OpenAIUNet(UNetFile):
    """A diffusion model that predicts noise at the timesteps of a schedule."""

    abar: NDArray[np.float64]
    timesteps: list[int]

    @classmethod
    def of(cls, spec: RunSpec) -> "OpenAIUNet":
        settings = PRESETS.get(spec.denoiser.arch, spec.denoiser.unet)
        assert settings is not None, "the spec checks that arch = 'unet' has its settings"
        abar = alphas_cumprod(settings.schedule, settings.steps)
        return cls(spec, settings, abar, timesteps(abar, spec.smoothing.sigma, spec.denoiser.steps))

    def build(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser:
        unet = FusedUNet(self.load(device, shape), self.timesteps, dtype, compiled=self.spec.compute.compile)
        return DiffusionDenoiser(unet, self.abar, self.timesteps)


def _checkpoint(spec: RunSpec) -> str:
    arch, checkpoint = spec.denoiser.arch, spec.denoiser.checkpoint
    if checkpoint is None:
        raise UserError(f"denoiser.checkpoint is missing, but arch = {arch!r} needs weights")
    return require_set("denoiser.checkpoint", checkpoint)


@dataclass(frozen=True)
class EDMDenoiser:
    """A network of EDM: one file of weights, whose hyper-parameters follow from a preset or from the file."""

    spec: RunSpec
    levels: list[float]

    @classmethod
    def of(cls, spec: RunSpec) -> "EDMDenoiser":
        return cls(spec, edm.levels_of(spec.smoothing.sigma, spec.denoiser.steps))

    def ids(self) -> dict[str, str]:
        return {"denoiser": weights_id(_checkpoint(self.spec), self.spec.denoiser.sha256)}

    def build(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser:
        network = edm.load_edm(self.spec.denoiser.arch, self.spec.denoiser.checkpoint, device, shape[0])
        multiple = 2 ** (len(network.settings.channel_mult) - 1)
        if shape[1] % multiple or shape[2] % multiple:
            raise UserError(
                f"images of {shape[1]} x {shape[2]} pixels do not fit the network of EDM; use images whose sides are "
                f"multiples of {multiple}, or set data.resize and data.crop"
            )
        network = network.to(dtype).to(memory_format=torch.channels_last)
        return edm.SigmaDenoiser(edm.edm_predict(network, self.levels), self.levels)


# The hyper-parameters of OpenAI's consistency models, whose files are laid out like guided-diffusion's.
CONSISTENCY_PRESETS = {
    "consistency-imagenet64": UNetSettings(
        model_channels=192,
        channel_mult=[1, 2, 3, 4],
        num_res_blocks=3,
        attention_factors=[2, 4, 8],
        num_head_channels=64,
        qkv_first=True,
        resblock_updown=True,
    ),
    "consistency-lsun256": PRESETS["openai-imagenet256"].model_copy(update={"learn_sigma": False, "qkv_first": True}),
}


@dataclass(frozen=True)
class ConsistencyUNet(UNetFile):
    """A consistency model in OpenAI's layout; the embedding of the class, if there is one, is not used."""

    levels: list[float]  # of noise, on [-1, 1]

    @classmethod
    def of(cls, spec: RunSpec) -> "ConsistencyUNet":
        settings = CONSISTENCY_PRESETS.get(spec.denoiser.arch, spec.denoiser.unet)
        if settings is None:
            raise UserError(
                f"denoiser.arch = {spec.denoiser.arch!r} needs the hyper-parameters of its network; set "
                f"[denoiser.unet], or choose one of {', '.join(CONSISTENCY_PRESETS)}"
            )
        return cls(spec, settings, edm.levels_of(spec.smoothing.sigma, spec.denoiser.steps))

    def convert(self, state: State) -> State:
        unlabelled = {key: value for key, value in state.items() if not key.startswith("label_emb.")}
        return {
            # attention layers are 1 x 1 convolutions of images there, and of sequences here
            key: value.flatten(2) if key.endswith((".qkv.weight", ".proj_out.weight")) and value.ndim == 4 else value
            for key, value in unlabelled.items()
        }

    def build(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser:
        times = [edm.consistency_scalings(level).noise for level in self.levels]
        unet = FusedUNet(self.load(device, shape), times, dtype, compiled=self.spec.compute.compile)
        return edm.SigmaDenoiser(edm.consistency_predict(unet, self.levels), self.levels)


def _restoration(spec: RunSpec) -> RestorationDenoiser:
    section = spec.denoiser
    return resolve_restoration(section.arch, _checkpoint(spec), section.sha256, spec.smoothing.sigma)


class _DiffusersConfig(Config):
    class_name: str = Field(default="UNet2DModel", alias="_class_name")
    in_channels: int


class _SchedulerConfig(Config):
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    num_train_timesteps: int = Field(default=1000, ge=1, le=100_000)


class DiffusersUNet:
    """A UNet2DModel in diffusers' layout: a folder that holds its config.json, its weights and its scheduler's
    configuration."""

    # what votes_id calls a file -> its possible names, and its subfolder in the folder of a whole pipeline
    _FILES: ClassVar = {
        "denoiser": (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"], "unet/"),
        "denoiser.config": (["config.json"], "unet/"),
        "denoiser.scheduler": (["scheduler_config.json"], "scheduler/"),
    }

    def __init__(self, spec: RunSpec) -> None:
        self._folder, self._sha256 = _checkpoint(spec).rstrip("/"), spec.denoiser.sha256
        self._config_file, scheduler_file = self._file("denoiser.config"), self._file("denoiser.scheduler")
        self._config, scheduler = load_json(self._config_file), load_json(scheduler_file)
        self._input = parse_config(_DiffusersConfig, self._config, self._config_file)
        self._kind = parse_config(_SchedulerConfig, scheduler, scheduler_file).prediction_type
        if self._input.class_name != "UNet2DModel":
            raise UserError(
                f"{self._config_file}: holds a {self._input.class_name}, which cannot denoise images; use a UNet2DModel"
            )
        with library_errors(scheduler_file):
            betas = library("diffusers", "DDPMScheduler").from_config(scheduler).betas.double().numpy()
        if not ((betas >= 0) & (betas <= 1)).all():
            raise UserError(f"{scheduler_file}: its betas must lie between 0 and 1")
        self.abar = np.cumprod(1 - betas)
        self.timesteps = timesteps(self.abar, spec.smoothing.sigma, spec.denoiser.steps)

    def _file(self, name: str) -> str:
        names, inner = self._FILES[name]
        return first_file([f"{self._folder}/{folder}{file}" for file in names for folder in ("", inner)])

    def ids(self) -> dict[str, str]:
        expected = {"denoiser": self._sha256}
        return {name: weights_id(self._file(name), expected.get(name)) for name in self._FILES}

    def build(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> Denoiser:
        channels, make = self._input.in_channels, library("diffusers", "UNet2DModel").from_config
        if channels != shape[0]:
            raise UserError(
                f"{self._config_file}: the denoiser processes {channels} channels, but the images have {shape[0]}; use "
                "a denoiser for such images"
            )

        def made() -> nn.Module:
            with library_errors(self._config_file):
                return make(self._config)

        location = "" if device.type == "meta" else self._file("denoiser")
        network, eps_from = build(made, location, device, convert=_with_current_names), _EPS[self._kind]
        network, abar = network.to(dtype), self.abar

        def predict_eps(x_t_BCHW: Tensor, t: int) -> Tensor:
            out_BCHW = network(x_t_BCHW.to(dtype), t, return_dict=False)[0].float()[:, :channels]
            return eps_from(out_BCHW, x_t_BCHW, math.sqrt(abar[t]), math.sqrt(1 - abar[t]))

        return DiffusionDenoiser(predict_eps, abar, self.timesteps)


# prediction_type -> eps from (the network's output, x_t, sqrt(abar_t), sqrt(1 - abar_t))
_EPS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda out, x_t, signal, noise: out,
    "v_prediction": lambda out, x_t, signal, noise: signal * out + noise * x_t,
    "sample": lambda out, x_t, signal, noise: (x_t - signal * out) / noise,
}


def _with_current_names(state: State) -> State:
    """Rename the attention layers of diffusers' early files to the current key names."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        parent, _, last = layer.rpartition(".")
        renamed[f"{parent}.{names[last]}.{kind}" if last in names else key] = value
    return renamed


# arch -> the denoiser of a spec, checked
DENOISERS: dict[str, Callable[[RunSpec], DenoiserSource]] = {
    "unet": OpenAIUNet.of,
    **dict.fromkeys(PRESETS, OpenAIUNet.of),
    "diffusers": DiffusersUNet,
    "edm": EDMDenoiser.of,
    **dict.fromkeys(edm.PRESETS, EDMDenoiser.of),
    "consistency": ConsistencyUNet.of,
    **dict.fromkeys(CONSISTENCY_PRESETS, ConsistencyUNet.of),
    FFDNET: _restoration,
    DNCNN: _restoration,
}


def resolve_denoiser(spec: RunSpec) -> DenoiserSource:
    """Check a spec's denoiser without loading its weights.

    Raises: UserError for an unknown architecture, a sigma beyond its schedule, and a damaged configuration file.
    """
    arch = spec.denoiser.arch
    if arch == "none":
        return _NoDenoiser()
    if is_own(arch):
        return _OwnDenoiser("denoiser", spec.denoiser, spec)
    if arch not in DENOISERS:
        raise UserError(
            f"denoiser.arch = {arch!r} is unknown; choose one of none, {', '.join(DENOISERS)}, or name your own as "
            "package.module:function"
        )
    return DENOISERS[arch](spec)
