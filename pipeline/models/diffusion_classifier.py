"""A class-conditional diffusion model as a classifier: the class whose denoiser fits the image best.

    logit_y(x) = - sum over i of w_i mean over pixels of |a_i - b_i|^2

with noise levels s_i on [-1, 1] (z = 2 x - 1), the class-conditional EDM denoiser D, and fixed noise e_i:

    dc      a = D(z + s e, s, y)                                   b = z
    apndc   the same, from the level s_t = 2 sigma of the smoothing noise on; z is the denoised image, so f needs a
            denoiser (it is then the ensemble that was certified)
    epndc   z is the noisy image at level s_t. With s+ the level after s, z+ = z + sqrt(s+^2 - s_t^2) e,
            a = [(s+^2 - s^2) D(z+, s+, y) + s^2 z+] / s+^2
            b = [(s+^2 - s^2) z + (s^2 - s_t^2) z+] / (s+^2 - s_t^2)

(Chen et al. 2023, arXiv 2305.15241; Chen et al. 2024, arXiv 2402.02316.) The noise e_i has a key of its own and is
shared by all classes and images, so that f is a function.

Weights: with w(s) = (s^2 + s_d^2) / (s s_d)^2 and p the log-normal density of EDM's training,

    derived     dc, apndc: w(s) p(s) ds, all at one level. epndc: 1 / (2 v), with v the variance of the posterior,
                v = (s+^2 - s^2) (s^2 - s_t^2) / (s+^2 - s_t^2)
    published   as in the authors' code: p is taken one level before w, its exponent multiplies by 1.2^2 where it should
                divide, and epndc has the further factor s+^2 (s+^2 - s_t^2) / (4 (s+ - s)^2 (s^2 - s_t^2)) and leaves
                out the first five levels

Exact elimination: all terms are at least 0, so a class whose running sum exceeds a finished sum cannot win. It is left
out of the later levels and gets the logit minus infinity; the winner is unchanged. It is used if m = 1.

Shapes: B batch, C channels, H W image, K classes, S steps (levels), R rows of one network call.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.locations import require_set
from diffsmooth.pipeline.models.edm import SIGMA_DATA, EDMUNet, edm_scalings, load_edm
from diffsmooth.pipeline.models.files import weights_id
from diffsmooth.pipeline.models.options import Options, parse_options
from diffsmooth.pipeline.noise import fixed_noise
from diffsmooth.pipeline.spec import RunSpec

_LOG_MEAN, _LOG_STD = -1.2, 1.2  # of EDM's training
_CHUNK = 16  # levels between two eliminations


class DiffusionOptions(Options):
    """The keys of classifier.options for arch = "diffusion"."""

    network: str = "edm"  # or a preset of pipeline/models/edm.py
    variant: Literal["dc", "apndc", "epndc"] = "dc"
    weights: Literal["derived", "published"] = "derived"
    points: int = Field(default=126, ge=4, le=10_001)  # of the grid of noise levels
    smallest: float = Field(default=1e-4, gt=0)  # first level of dc, on [-1, 1]
    largest: float = Field(default=3.0, gt=0, le=80)
    noise_seed: int = Field(default=0, ge=0)
    rows: int = Field(default=256, ge=1, le=65_536)  # (draw, class, level) triples in one call of the network


class Steps(NamedTuple):
    """The levels of a grid that are evaluated, and their weights."""

    level_S: Tensor  # s
    upper_S: Tensor  # s+, at which epndc calls the network; equal to s otherwise
    weight_S: Tensor


def steps_of(options: DiffusionOptions, sigma: float) -> Steps:
    """Return the steps of a variant for smoothing noise of standard deviation sigma on [0, 1], float64.

    Raises: UserError if the grid would begin above its end.
    """
    first = options.smallest if options.variant == "dc" else 2 * sigma
    if first >= options.largest:
        raise UserError(
            f"classifier.options.largest = {options.largest:g} is not above the first noise level {first:g}; use a "
            "larger value"
        )
    grid = torch.linspace(first, options.largest, options.points, dtype=torch.float64)
    published = options.weights == "published"
    if options.variant == "epndc":
        return _epndc_steps(grid, published)
    before, level = grid[:-2], grid[1:-1]  # the code of the paper leaves out both ends
    density = _density(before, published) if published else _density(level, published)
    return Steps(level, level, _edm_weight(level) * density * (level - before))


def _epndc_steps(grid: Tensor, published: bool) -> Steps:
    start = 5 if published else 1  # the weight is infinite at the first level
    level, upper, t = grid[start:-2], grid[start + 1 : -1], grid[0]
    if not published:
        variance = (upper**2 - level**2) * (level**2 - t**2) / (upper**2 - t**2)
        return Steps(level, upper, 1 / (2 * variance))
    weight = _edm_weight(level) * _density(level, published) * (upper - level)
    weight = weight * upper**2 * (upper**2 - t**2) / (4 * (upper - level) ** 2 * (level**2 - t**2))
    return Steps(level, upper, weight)


def _edm_weight(level: Tensor) -> Tensor:
    return (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2


def _density(level: Tensor, published: bool) -> Tensor:
    """The log-normal density; the published exponent multiplies by the variance."""
    squared = (level.log() - _LOG_MEAN) ** 2
    exponent = squared / 2 * _LOG_STD**2 if published else squared / (2 * _LOG_STD**2)
    return (-exponent).exp() / (level * _LOG_STD * math.sqrt(2 * math.pi))


class DiffusionClassifier(nn.Module):
    """x_BCHW on [0, 1] -> logits_BK."""

    def __init__(self, network: EDMUNet, steps: Steps, options: DiffusionOptions, sigma: float) -> None:
        super().__init__()
        self.network, self.steps, self.options = network, steps, options
        self.t = 2 * sigma
        self.eliminate = True
        self.evaluations = 0  # rows that the network computed, for measurements
        self._noise_SCHW: Tensor | None = None
        device = network.map_layer0.weight.device
        self.level_S, self.upper_S = steps.level_S.float().to(device), steps.upper_S.float().to(device)
        self.weight_S = steps.weight_S.to(device, _sum_dtype(device))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        z_BCHW, B, K = 2 * x_BCHW - 1, len(x_BCHW), self.network.settings.num_classes
        noise_SCHW = self._noise(z_BCHW)
        sums_BK = torch.zeros(B, K, dtype=_sum_dtype(x_BCHW.device), device=x_BCHW.device)
        steps = len(self.steps.level_S)
        stride = math.ceil(steps / _CHUNK)  # each chunk has levels of all sizes, so that its sum is representative
        chunks = [torch.arange(first, steps, stride, device=x_BCHW.device) for first in range(stride)]
        everything = torch.ones(B, K, dtype=torch.bool, device=x_BCHW.device)
        if not self.eliminate or x_BCHW.is_meta or len(chunks) == 1:
            for chunk_S in chunks:
                sums_BK = sums_BK + self._losses(z_BCHW, everything, chunk_S, noise_SCHW)
            return -sums_BK.float()
        sums_BK = self._losses(z_BCHW, everything, chunks[0], noise_SCHW)
        leaders_BK = torch.zeros_like(everything).scatter_(1, sums_BK.argmin(dim=1, keepdim=True), True)
        for chunk_S in chunks[1:]:  # finish the class that leads
            sums_BK = sums_BK + self._losses(z_BCHW, leaders_BK, chunk_S, noise_SCHW)
        best_B1 = sums_BK[leaders_BK][:, None]
        alive_BK = (sums_BK <= best_B1) & ~leaders_BK
        for chunk_S in chunks[1:]:
            sums_BK = sums_BK + self._losses(z_BCHW, alive_BK, chunk_S, noise_SCHW)
            alive_BK &= sums_BK <= best_B1
        return torch.where(alive_BK | leaders_BK, -sums_BK, -math.inf).float()

    def _losses(self, z_BCHW: Tensor, wanted_BK: Tensor, chunk_S: Tensor, noise_SCHW: Tensor) -> Tensor:
        """The weighted losses of some levels, summed, for the wanted pairs of image and class; 0 for the others."""
        sums_BK = torch.zeros(wanted_BK.shape, dtype=self.weight_S.dtype, device=z_BCHW.device)
        if z_BCHW.is_meta:  # nothing can be selected there
            image_P = label_P = torch.zeros(wanted_BK.numel(), dtype=torch.int64, device=z_BCHW.device)
        else:
            image_P, label_P = wanted_BK.nonzero(as_tuple=True)
        if not len(image_P):
            return sums_BK
        pairs, steps = len(image_P), len(chunk_S)
        image_R, label_R = image_P.repeat_interleave(steps), label_P.repeat_interleave(steps)
        step_R = chunk_S.repeat(pairs)
        size = len(step_R) if z_BCHW.is_meta else self.options.rows
        rows = zip(*(index_R.split(size) for index_R in (image_R, label_R, step_R)), strict=True)
        losses = [self._row_losses(z_BCHW[image], label, step, noise_SCHW[step]) for image, label, step in rows]
        summed_P = torch.cat(losses).view(pairs, steps).sum(dim=1)
        if z_BCHW.is_meta:
            return sums_BK
        return sums_BK.index_put((image_P, label_P), summed_P)

    def _row_losses(self, z_RCHW: Tensor, label_R: Tensor, step_R: Tensor, noise_RCHW: Tensor) -> Tensor:
        """w |a - b|^2 of each row."""
        self.evaluations += len(z_RCHW)
        level, upper = (values_S[step_R][:, None, None, None] for values_S in (self.level_S, self.upper_S))
        if self.options.variant == "epndc":
            above_z = z_RCHW + (upper**2 - self.t**2).sqrt() * noise_RCHW
            denoised = self._denoise(above_z, upper, label_R)
            a = ((upper**2 - level**2) * denoised + level**2 * above_z) / upper**2
            b = ((upper**2 - level**2) * z_RCHW + (level**2 - self.t**2) * above_z) / (upper**2 - self.t**2)
        else:
            a, b = self._denoise(z_RCHW + level * noise_RCHW, level, label_R), z_RCHW
        return self.weight_S[step_R] * (a - b).square().flatten(1).mean(dim=1).to(self.weight_S.dtype)

    def _denoise(self, z_RCHW: Tensor, level_R111: Tensor, label_R: Tensor) -> Tensor:
        """D(z, s, y) of EDM, with a level of its own for each row."""
        scalings = edm_scalings(level_R111)
        condition = self.network.condition(scalings.noise.flatten(), label_R)
        return scalings.skip * z_RCHW + scalings.out * self.network(scalings.inner * z_RCHW, condition)

    def _noise(self, z_BCHW: Tensor) -> Tensor:
        if self._noise_SCHW is None or self._noise_SCHW.shape[1:] != z_BCHW.shape[1:]:
            shape = (len(self.steps.level_S), *z_BCHW.shape[1:])
            if z_BCHW.is_meta:
                return z_BCHW.new_empty(shape)
            noise = fixed_noise("diffusion classifier", self.options.noise_seed, shape)
            self._noise_SCHW = torch.from_numpy(noise).to(z_BCHW.device)
        return self._noise_SCHW


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Sums of hundreds of terms are added in float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class DiffusionSource:
    """A spec's diffusion classifier, checked but not loaded."""

    checkpoint: str | None
    sha256: str | None
    options: DiffusionOptions
    sigma: float
    copies: int  # m; with more than one, the scores of all classes count

    def ids(self) -> dict[str, str]:
        if self.checkpoint is None:
            raise UserError("classifier.checkpoint is missing, but arch = 'diffusion' needs weights")
        return {"classifier": weights_id(require_set("classifier.checkpoint", self.checkpoint), self.sha256)}

    def load(self, device: torch.device, channels: int, num_classes: int) -> DiffusionClassifier:
        network = load_edm(self.options.network, self.checkpoint, device, channels)
        found = network.settings.num_classes
        if found != num_classes:
            kind = f"has {found} classes" if found else "is not class-conditional"
            raise UserError(
                f"checkpoint {self.checkpoint}: the network of EDM {kind}, but the data set has {num_classes}; use a "
                "class-conditional network of this data set"
            )
        classifier = DiffusionClassifier(network, steps_of(self.options, self.sigma), self.options, self.sigma)
        classifier.eliminate = self.copies == 1
        return classifier.eval().requires_grad_(False)

    def build(self, device: torch.device, dtype: torch.dtype, channels: int, num_classes: int) -> DiffusionClassifier:
        classifier = self.load(device, channels, num_classes)
        classifier.network.to(dtype).to(memory_format=torch.channels_last)
        return classifier


def resolve_diffusion(spec: RunSpec) -> DiffusionSource:
    """Check a spec's diffusion classifier.

    Raises: UserError for unknown options, a grid that does not fit sigma, and a variant without its denoiser.
    """
    section, options = spec.classifier, parse_options(DiffusionOptions, spec.classifier)
    if section.normalize is not None:
        raise UserError(
            f"classifier.normalize = {section.normalize!r} is given, but a diffusion classifier scales its input itself"
        )
    if (options.variant == "apndc") != (spec.denoiser.arch != "none") and options.variant != "dc":
        remedy = "set denoiser.arch" if options.variant == "apndc" else "set denoiser.arch = 'none'"
        raise UserError(
            f"classifier.options.variant = {options.variant!r} with denoiser.arch = {spec.denoiser.arch!r} is not the "
            f"published classifier; {remedy}"
        )
    steps_of(options, spec.smoothing.sigma)
    smoothing = spec.smoothing
    return DiffusionSource(section.checkpoint, section.sha256, options, smoothing.sigma, smoothing.m)
