"""What a training trains: the network, its loss on a batch, and what is measured on validation images.

Shapes: M copies, B images, C H W image, K classes, D features.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models import edm
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.classifiers import Logits, Prepared, Start, resolve_classifier
from diffsmooth.pipeline.models.denoisers import (
    Denoiser,
    DiffusionDenoiser,
    OpenAIUNet,
    Shape,
    alphas_cumprod,
    resolve_denoiser,
    timesteps,
)
from diffsmooth.pipeline.models.fused import use_fast_group_norms
from diffsmooth.pipeline.models.weights import RANDOM, build
from diffsmooth.pipeline.training import losses
from diffsmooth.pipeline.training.batches import Batch
from diffsmooth.pipeline.training.randomness import Randomness
from diffsmooth.pipeline.training.settings import ClassifierLoss, DenoiserLoss, TrainingSpec

Sums = dict[str, Tensor]  # of a batch: sums over its images, by the name of the figure


class Task(Protocol):
    network: nn.Module  # whose parameters are trained and saved

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss over a batch."""
        ...

    def measure(self, batch: Batch) -> Sums:
        """Return what is measured on validation images, with the network in evaluation mode."""
        ...


def make_task(spec: TrainingSpec, device: torch.device, shape: Shape, num_classes: int) -> Task:
    """Return the task of a spec for images of a shape. Raises: UserError for networks that do not fit."""
    if spec.task == "classifier":
        return ClassifierTask(spec, device, shape, num_classes)
    return DenoiserTask(spec, device, shape, num_classes)


def _random_weights(spec: TrainingSpec) -> str:
    return f"{RANDOM}{spec.training.seed % 2**63}"


def start_of(spec: TrainingSpec) -> Start:
    """Return how the classifier of a training starts."""
    return Start(seed=spec.training.seed % 2**63, new_last_layer=spec.training.new_last_layer)


def _check_adapter(model: nn.Module, shape: Shape, device: torch.device) -> None:
    """Raise UserError for a layer of the adapter that a network's output does not depend on."""
    model(torch.full((1, *shape), 0.5, device=device)).sum().backward()
    for name, one in model.named_parameters():
        if one.requires_grad and one.grad is None:
            raise UserError(
                f"classifier.adapter.targets: {name} has no effect, because the network uses the weights of that layer "
                "without calling it; set targets to other layers"
            )
        one.grad = None


def noise_of(batch: Batch, purpose: str, device: torch.device, copies: int = 1) -> Tensor:
    """Return standard normal noise for copies of the images, M x B x C x H x W."""
    shape = batch.x_BCHW.shape[1:]
    return torch.stack([batch.randomness.copy(one).normal(purpose, shape) for one in range(copies)]).to(device)


class ClassifierTask:
    """A classifier of clean, noisy or denoised images."""

    def __init__(self, spec: TrainingSpec, device: torch.device, shape: Shape, num_classes: int) -> None:
        assert spec.classifier is not None
        assert spec.classifier_loss is not None
        self._device, self._losses = device, spec.classifier_loss
        section = spec.classifier
        if not spec.has_start and not is_own(section.arch):
            section = section.model_copy(update={"checkpoint": _random_weights(spec)})
        if section.adapter is not None and section.adapter.checkpoint is None:
            adapter = section.adapter.model_copy(update={"checkpoint": _random_weights(spec)})
            section = section.model_copy(update={"adapter": adapter})
        run = spec.model_copy(update={"classifier": section}).run_spec(spec.smoothing.sigma)
        with torch.random.fork_rng(devices=[]):  # an own function may draw its initial weights
            torch.default_generator.manual_seed(spec.training.seed % 2**63)
            model = resolve_classifier(run, start_of(spec)).load(device, shape[0], num_classes)
        if not isinstance(model, nn.Module):
            raise UserError(f"classifier.arch = {section.arch!r} cannot be trained; it must be a torch.nn.Module")
        self._model = model.to(device)
        if section.adapter is None:
            self._model.requires_grad_(True)
        else:
            _check_adapter(self._model, shape, device)
        self.network = model.network if isinstance(model, Prepared) else model
        self._denoisers = _denoisers(spec, self._losses, device, shape)
        self._features: list[Tensor] = []
        linear = [one for one in self.network.modules() if isinstance(one, nn.Linear)]
        if self._losses.similarity is not None:
            if not linear:
                raise UserError(f"classifier.arch = {section.arch!r} has no linear layer; similarity must have one")
            linear[-1].register_forward_pre_hook(lambda _, inputs: self._features.append(inputs[0]))

    def loss(self, batch: Batch) -> Tensor:
        settings, label_B = self._losses, batch.label_B.to(self._device)
        sigma_B = self._sigmas(batch)  # on the CPU, so that no decision waits for the device
        with torch.no_grad():
            x_MBCHW = self._images(batch, sigma_B)
        M, B = x_MBCHW.shape[:2]
        self._features.clear()
        logits_MBK = self._model(x_MBCHW.flatten(0, 1)).unflatten(0, (M, B))
        if settings.confidence is None:
            total = losses.cross_entropy(logits_MBK, label_B, settings.label_smoothing)
        else:
            total = self._confidence(x_MBCHW, logits_MBK, batch)
        if settings.similarity is not None:
            features_MBD = self._features[0].unflatten(0, (M, B))
            one = settings.similarity
            total = total + losses.similarity(features_MBD, label_B, weight=one.weight, margin=one.margin)
        if settings.consistency is not None:
            pull = settings.consistency
            total = total + losses.consistency(logits_MBK, weight=pull.weight, entropy=pull.entropy)
        if settings.macer is not None:
            hinge = settings.macer
            total = total + losses.macer(
                logits_MBK, label_B, sigma_B.to(self._device), weight=hinge.weight, gamma=hinge.gamma, beta=hinge.beta
            )
        return total

    def _sigmas(self, batch: Batch) -> Tensor:
        """Return the noise level of each image: one of the spec's, or 0."""
        sigmas = torch.tensor(self._losses.sigmas or [0.0])
        choice_B = (batch.randomness.uniform("sigma")[:, 0] * len(sigmas)).long()
        return sigmas[choice_B]

    def _images(self, batch: Batch, sigma_B: Tensor) -> Tensor:
        """Return the copies that the classifier sees, M x B x C x H x W."""
        x_BCHW, settings = batch.x_BCHW.to(self._device), self._losses
        if settings.images == "clean":
            return x_BCHW[None]
        noise_MBCHW = noise_of(batch, "noise", self._device, settings.copies)
        x_MBCHW = x_BCHW + sigma_B.to(self._device)[:, None, None, None] * noise_MBCHW
        if settings.images == "denoised":
            x_MBCHW = self._denoised(x_MBCHW, sigma_B)
        if settings.local_sigma:
            x_MBCHW = x_MBCHW + settings.local_sigma * noise_of(batch, "local", self._device, settings.copies)
        return x_MBCHW

    def _denoised(self, x_MBCHW: Tensor, sigma_B: Tensor) -> Tensor:
        out_MBCHW = torch.empty_like(x_MBCHW)
        for sigma, denoise in self._denoisers.items():
            chosen_N = (sigma_B == torch.tensor(sigma)).nonzero()[:, 0].to(self._device)
            if len(chosen_N):
                noisy_MBCHW = x_MBCHW[:, chosen_N]
                clean_NCHW = denoise(noisy_MBCHW.flatten(0, 1), sigma)
                out_MBCHW[:, chosen_N] = clean_NCHW.unflatten(0, noisy_MBCHW.shape[:2])
        return out_MBCHW

    def _confidence(self, x_MBCHW: Tensor, logits_MBK: Tensor, batch: Batch) -> Tensor:
        settings, label_B = self._losses.confidence, batch.label_B.to(self._device)
        assert settings is not None
        total = losses.confident_cross_entropy(logits_MBK, label_B, keep_least=batch.progress < settings.warmup)
        if settings.weight == 0:
            return total
        M, B = x_MBCHW.shape[:2]
        mean_BK = logits_MBK.softmax(dim=2).mean(dim=0).detach()
        start_MBCHW = noise_of(batch, "attack", self._device, M)
        mode = self._model.training
        self._model.eval()  # the batch norms of the attack use, and do not change, the running statistics
        attacked_NCHW = losses.attack(
            self._model, x_MBCHW.flatten(0, 1), mean_BK.repeat(M, 1), radius=settings.radius, steps=settings.steps,
            start_BCHW=start_MBCHW.flatten(0, 1),
        )  # fmt: skip
        self._model.train(mode)
        attacked_MBK = self._model(attacked_NCHW.detach()).unflatten(0, (M, B))
        return total + settings.weight * losses.masked_adversarial(logits_MBK, attacked_MBK, label_B)

    def measure(self, batch: Batch) -> Sums:
        x_BCHW, label_B = batch.x_BCHW.to(self._device), batch.label_B.to(self._device)
        sums = {"clean_accuracy": _right(self._model(x_BCHW), label_B)}
        for sigma in sorted(set(self._losses.sigmas)):
            noisy_BCHW = x_BCHW + sigma * noise_of(batch, "noise", self._device)[0]
            if self._losses.images == "denoised":
                noisy_BCHW = self._denoisers[sigma](noisy_BCHW, sigma)
                noisy_BCHW = noisy_BCHW + self._losses.local_sigma * noise_of(batch, "local", self._device)[0]
            sums[f"accuracy_at_{sigma:g}"] = _right(self._model(noisy_BCHW), label_B)
        return sums


def _denoisers(
    spec: TrainingSpec, settings: ClassifierLoss, device: torch.device, shape: Shape
) -> dict[float, Denoiser]:
    """Return the frozen denoiser of each noise level, if images are denoised."""
    if settings.images != "denoised":
        return {}
    built: dict[float, Denoiser] = {}
    for sigma in settings.sigmas:
        denoiser = resolve_denoiser(spec.run_spec(sigma)).build(device, torch.float32, shape)
        assert denoiser is not None
        built[sigma] = denoiser
    return built


def _right(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    return (logits_BK.argmax(dim=1) == label_B).sum()


class DenoiserTask:
    """A diffusion model that predicts noise, or EDM's network."""

    _abar: NDArray[np.float64]  # of a diffusion model: the share of the image at each timestep

    def __init__(self, spec: TrainingSpec, device: torch.device, shape: Shape, num_classes: int) -> None:
        self._device, self._losses = device, spec.denoiser_loss or DenoiserLoss()
        self._sigma = spec.smoothing.sigma  # at which the denoised image is measured
        if spec.denoiser.arch == "edm":
            self.network = _edm_network(spec, self._losses, device, shape)
        else:
            self.network = self._unet(spec, device, shape)
        self.network.requires_grad_(True).to(memory_format=torch.channels_last)
        self._classify: Logits | None = None
        if spec.classifier is not None and spec.classifier.checkpoint is not None:
            self._classify = resolve_classifier(spec.run_spec(self._sigma)).load(device, shape[0], num_classes)

    def _unet(self, spec: TrainingSpec, device: torch.device, shape: Shape) -> nn.Module:
        section, settings = spec.denoiser, spec.denoiser.unet
        assert settings is not None
        if section.checkpoint is None:
            section = section.model_copy(update={"checkpoint": _random_weights(spec)})
        network = OpenAIUNet.of(spec.model_copy(update={"denoiser": section}).run_spec(self._sigma)).load(device, shape)
        use_fast_group_norms(network)
        if spec.denoiser.checkpoint is None:
            last = network.out[2]
            assert isinstance(last, nn.Conv2d)
            nn.init.zeros_(last.weight)
        self._abar = alphas_cumprod(settings.schedule, settings.steps)
        return network

    def loss(self, batch: Batch) -> Tensor:
        x_BCHW = 2 * batch.x_BCHW.to(self._device) - 1
        eps_BCHW = noise_of(batch, "noise", self._device)[0]
        if isinstance(self.network, edm.EDMUNet):
            normal_B = batch.randomness.normal("level", (1,))[:, 0]
            level_B = torch.exp(self._losses.log_mean + self._losses.log_std * normal_B).to(self._device)
            return losses.edm_loss(self._predict_edm, x_BCHW, level_B, eps_BCHW)
        t_B = self._timesteps(batch.randomness).to(self._device)
        abar_T = torch.from_numpy(self._abar).float().to(self._device)
        return losses.eps_loss(self.network, x_BCHW, t_B, eps_BCHW, abar_T)

    def _predict_edm(self, scaled_BCHW: Tensor, c_noise_B: Tensor) -> Tensor:
        assert isinstance(self.network, edm.EDMUNet)
        return self.network(scaled_BCHW, self.network.condition(c_noise_B))

    def _timesteps(self, random: Randomness) -> Tensor:
        """Return timesteps: log-uniform in sigma for a share of the images, uniform for the others."""
        settings, ratio_T = self._losses, torch.from_numpy((1 / self._abar - 1) ** 0.5).float()
        which_B, place_B = random.uniform("timestep", 2).unbind(1)
        sigma_B = settings.low * (settings.high / settings.low) ** place_B
        focused_B = torch.searchsorted(ratio_T, 2 * sigma_B).clamp(max=len(ratio_T) - 1)
        return torch.where(which_B < settings.focus, focused_B, (place_B * len(ratio_T)).long())

    def _denoiser(self) -> Callable[[Tensor, float], Tensor]:
        if isinstance(self.network, edm.EDMUNet):
            levels = edm.levels_of(self._sigma, 1)
            return edm.SigmaDenoiser(edm.edm_predict(self.network, levels), levels)
        network = self.network

        def predict(x_t_BCHW: Tensor, t: int) -> Tensor:
            return network(x_t_BCHW, torch.full((len(x_t_BCHW),), t, device=x_t_BCHW.device))

        return DiffusionDenoiser(predict, self._abar, timesteps(self._abar, self._sigma, 1))

    def measure(self, batch: Batch) -> Sums:
        x_BCHW, label_B = batch.x_BCHW.to(self._device), batch.label_B.to(self._device)
        noisy_BCHW = x_BCHW + self._sigma * noise_of(batch, "denoise", self._device)[0]
        denoised_BCHW = self._denoiser()(noisy_BCHW, self._sigma)
        error_B = F.mse_loss(denoised_BCHW, x_BCHW, reduction="none").flatten(1).mean(dim=1)
        sums = {
            "validation_loss": self.loss(batch) * len(x_BCHW),
            f"squared_error_at_{self._sigma:g}": error_B.sum(),
        }
        if self._classify is not None:
            sums["clean_accuracy"] = _right(self._classify(x_BCHW), label_B)
            sums[f"accuracy_at_{self._sigma:g}"] = _right(self._classify(denoised_BCHW), label_B)
        return sums


def _edm_network(spec: TrainingSpec, settings: DenoiserLoss, device: torch.device, shape: Shape) -> nn.Module:
    """Return EDM's network: from a checkpoint, or from scratch with the hyper-parameters in [denoiser_loss.edm]."""
    if spec.denoiser.checkpoint is not None:
        return edm.load_edm("edm", spec.denoiser.checkpoint, device, shape[0])
    chosen = settings.edm
    if chosen is None:
        raise UserError(
            "denoiser_loss.edm is missing, but arch = 'edm' without a checkpoint needs hyper-parameters; add the table"
        )
    made = edm.EDMSettings(
        family=chosen.family, channels=shape[0], model_channels=chosen.model_channels,
        channel_mult=tuple(chosen.channel_mult), num_blocks=chosen.num_blocks,
        attention_levels=tuple(chosen.attention_levels), resolution=shape[1],
    )  # fmt: skip
    return build(partial(edm.EDMUNet, made), _random_weights(spec), device)
