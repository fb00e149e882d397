"""The base classifier f, and the spec that it is built from, checked.

    f(x) = mean over the m local copies of softmax(classify(denoise(x) + local noise)); a vote is argmax f(x + noise)

(DiffSmooth, Zhang et al. 2023, arXiv 2308.14333, Algorithm 1). With m = 1 and local_sigma = 0 it is diffusion denoised
smoothing (Carlini et al. 2023); if there is no denoiser either, it is Cohen's smoothing.

Shapes: B batch, C channels, H W image, K classes, M local copies.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from diffsmooth.pipeline.data.entry import Dataset
from diffsmooth.pipeline.data.sets import open_dataset, sample_indices
from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.models.classifiers import ClassifierSource, resolve_classifier
from diffsmooth.pipeline.models.denoisers import Denoiser, DenoiserSource, resolve_denoiser
from diffsmooth.pipeline.models.device import torch_settings
from diffsmooth.pipeline.models.own import signature_of
from diffsmooth.pipeline.noise import Draws, local_noise
from diffsmooth.pipeline.spec import RunSpec, votes_id

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BaseClassifier:
    """f: x_BCHW float32 -> scores_BK float32, the mean softmax of the m local copies.

    Images are in [0, 1]. `denoise`, `classify` and `local_noise_MCHW` are the parts of f; `denoiser` and `classifier`
    are the networks.
    """

    def __init__(
        self,
        *,
        denoiser: Denoiser | None,
        classifier: Callable[[Tensor], Tensor],
        local_noise_MCHW: Tensor,
        sigma: float,
        num_classes: int,
    ) -> None:
        self.denoiser = denoiser
        self.classifier = classifier
        self._sigma = sigma
        self.local_noise_MCHW = local_noise_MCHW
        self.num_classes = num_classes
        self.device = local_noise_MCHW.device
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._denoiser_takes_draws, self._classifier_takes_draws = _takes_draws(denoiser), _takes_draws(classifier)
        self.takes_draws = self._denoiser_takes_draws or self._classifier_takes_draws

    @torch.inference_mode()
    def denoise(self, x_BCHW: Tensor) -> Tensor:
        """Return x0_BCHW in [0, 1], or the input itself if there is no denoiser."""
        return self._denoise(x_BCHW, None)

    @torch.inference_mode()
    def classify(self, x_BCHW: Tensor) -> Tensor:
        """Return logits_BK, float32."""
        return self.logits(x_BCHW).float()

    def __call__(self, x_BCHW: Tensor, draws: Draws | None = None) -> Tensor:
        """Return the scores; `draws` says which draw each row is, for networks with inner randomness."""
        if self._compiled is None:
            with torch.inference_mode():
                return self._mean_softmax(x_BCHW, draws)
        with torch.no_grad():  # in inference mode the compiler cannot create views of weights
            return self._compiled(x_BCHW)

    def compile(self, *, cuda_graphs: bool = True) -> None:
        """Use torch.compile for f, on a GPU with CUDA graphs.

        Compilation takes minutes at the first call with each shape. `denoise` and `classify` are not compiled.
        Raises: UserError for networks with inner randomness.
        """
        if self.takes_draws:
            raise UserError(
                "compute.compile = true does not suit a function that takes draws, because its noise is made outside "
                "of torch"
            )
        mode = "reduce-overhead" if cuda_graphs and self.device.type == "cuda" else "default"
        self._compiled = torch.compile(self._mean_softmax, dynamic=False, mode=mode)

    def _denoise(self, x_BCHW: Tensor, draws: Draws | None) -> Tensor:
        if self.denoiser is None:
            return x_BCHW
        inner = {"draws": draws or Draws.unknown(len(x_BCHW))} if self._denoiser_takes_draws else {}
        return self.denoiser(x_BCHW, self._sigma, **inner)

    def logits(self, x_BCHW: Tensor, draws: Draws | None = None, copies: int = 1) -> Tensor:
        """Return what the classifier returns for the copies of images, `copies` of each next to each other."""
        inner = {}
        if self._classifier_takes_draws:
            inner["draws"] = (draws or Draws.unknown(len(x_BCHW) // copies)).repeated(copies)
        return self.classifier(x_BCHW, **inner)

    def _mean_softmax(self, x_BCHW: Tensor, draws: Draws | None = None) -> Tensor:
        B, M = len(x_BCHW), len(self.local_noise_MCHW)
        logits = self._logits_of_copies(self._denoise(x_BCHW, draws), draws).float()
        return logits.softmax(dim=1).reshape(B, M, -1).mean(dim=1)

    def _logits_of_copies(self, x0_BCHW: Tensor, draws: Draws | None = None) -> Tensor:
        copies_BMCHW = x0_BCHW[:, None] + self.local_noise_MCHW
        return self.logits(copies_BMCHW.flatten(0, 1), draws, len(self.local_noise_MCHW))

    def differentiable_denoise(self, x_BCHW: Tensor) -> Tensor:
        """`denoise`, with gradients."""
        with torch.enable_grad():
            return self._denoise(x_BCHW, None)

    def differentiable_log_scores(self, x0_BCHW: Tensor) -> Tensor:
        """Return the logarithms of scores_BK of denoised images, float64, with gradients; never compiled.

        They keep a gradient where f is so confident that the scores themselves are 0 or 1.
        """
        B, M = len(x0_BCHW), len(self.local_noise_MCHW)
        with torch.enable_grad():
            logits = self._logits_of_copies(x0_BCHW).double()
            return logits.log_softmax(dim=1).reshape(B, M, -1).logsumexp(dim=1) - math.log(M)


def _takes_draws(network: Callable[..., Any] | None) -> bool:
    """Return whether a network has a parameter `draws`."""
    if network is None:
        return False
    signature = signature_of(network)
    return signature is not None and "draws" in signature.parameters


class Networks(NamedTuple):
    """The networks of a spec, checked but not loaded."""

    denoiser: DenoiserSource
    classifier: ClassifierSource

    def ids(self) -> dict[str, str]:
        """Return what votes_id must know of f besides the spec: the hashes of its files and functions.

        Raises: UserError for a missing file or a sha256 that differs from the spec's.
        """
        return {**self.denoiser.ids(), **self.classifier.ids()}


def resolve_networks(spec: RunSpec) -> Networks:
    """Check the networks of a spec without loading them.

    Raises: UserError, for example for an unknown architecture or a sigma beyond the denoiser's schedule.
    """
    return Networks(resolve_denoiser(spec), resolve_classifier(spec))


@dataclass(frozen=True, kw_only=True)
class CheckedSpec:
    """A spec whose networks are resolved and whose files are hashed; its data set is opened once.

    A process makes one of a spec, with `check_spec`, and passes it on; an actor makes its own.
    """

    spec: RunSpec
    networks: Networks
    weights_ids: Mapping[str, str]
    opened: Dataset | None = None  # the data set of the spec, if it is open already

    @property
    def votes_id(self) -> str:
        return votes_id(self.spec, self.weights_ids)

    @cached_property
    def data(self) -> Dataset:
        """The data set. Raises: UserError for one that cannot be read."""
        return open_dataset(self.spec.data) if self.opened is None else self.opened

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """C, H, W of the images: that of the first sample."""
        first = sample_indices(self.spec.data.samples, len(self.data))[0]
        return self.data[first].image_CHW.shape

    def build(self, device: str | torch.device) -> BaseClassifier:
        """Return f on a device, with its weights. Raises: UserError for networks that do not load, or do not fit."""
        device = torch.device(device)
        precision = self.spec.smoothing.precision
        with torch_settings(precision):
            f = base_classifier(self.spec, device, self.shape, self.data.num_classes, self.networks)
            check_networks(f, torch.full((1, *self.shape), 0.5, device=device))
            check_function(f, self.shape, precision)
        return f

    def __getstate__(self) -> NoReturn:
        raise TypeError("a CheckedSpec holds open files: each process makes its own")


def check_spec(spec: RunSpec, data: Dataset | None = None) -> CheckedSpec:
    """Resolve the networks of a spec and hash its files; `data` is its data set, if it is open already.

    Raises: UserError for networks that cannot be used, and for files that are missing.
    """
    networks = resolve_networks(spec)
    return CheckedSpec(spec=spec, networks=networks, weights_ids=networks.ids(), opened=data)


def weights_ids(spec: RunSpec) -> dict[str, str]:
    """Return the hashes of a spec's files and functions. Raises: UserError, as `check_spec` does."""
    return resolve_networks(spec).ids()


def build_base_classifier(spec: RunSpec, device: str | torch.device) -> BaseClassifier:
    """Return f of a spec on a device, with its weights. Raises: UserError, as `check_spec` and its `build` do."""
    return check_spec(spec).build(device)


def base_classifier(
    spec: RunSpec,
    device: torch.device,
    shape: tuple[int, ...],
    num_classes: int,
    networks: Networks | None = None,
) -> BaseClassifier:
    """Return f of a spec for images of shape C, H, W; on the meta device it has no weights and can only be counted.

    `networks` are the spec's, if they are resolved already. Raises: UserError for networks that do not load or do not
    fit the images.
    """
    smoothing, dtype, (channels, height, width) = spec.smoothing, DTYPES[spec.smoothing.precision], shape
    local_MCHW = local_noise(
        local_seed=smoothing.local_seed, m=smoothing.m, shape=shape, local_sigma=smoothing.local_sigma
    )
    networks = networks or resolve_networks(spec)
    return BaseClassifier(
        denoiser=networks.denoiser.build(device, dtype, (channels, height, width)),
        classifier=networks.classifier.build(device, dtype, channels, num_classes),
        local_noise_MCHW=torch.from_numpy(local_MCHW).to(device),
        sigma=smoothing.sigma,
        num_classes=num_classes,
    )


def check_networks(f: BaseClassifier, x_BCHW: Tensor) -> None:
    """Check on one grey image that each network processes the data set's images, and that its output has the right
    type, shape and finite values.

    Raises: UserError.
    """
    x0_BCHW = _output("denoiser", f.denoise, x_BCHW)
    if x0_BCHW.shape != x_BCHW.shape:
        raise UserError(
            f"the denoiser returned shape {tuple(x0_BCHW.shape)} for images of shape {tuple(x_BCHW.shape)}; use a "
            "denoiser that keeps the shape"
        )
    logits = _output("classifier", f.logits, x0_BCHW)
    are_classes = not logits.is_floating_point() and logits.numel() == len(x_BCHW)
    if logits.ndim != 2 or len(logits) != len(x_BCHW) or are_classes:
        hint = ", not the classes; remove the argmax" if are_classes else ""
        raise UserError(
            f"the classifier returned shape {tuple(logits.shape)} for a batch of {len(x_BCHW)} images; it must return "
            f"logits of shape (batch, classes){hint}"
        )
    if logits.shape[1] != f.num_classes:
        raise UserError(
            f"the classifier has {logits.shape[1]} classes, but the data set has {f.num_classes}; use a classifier of "
            "this data set, or set data.num_classes"
        )
    if not f(x_BCHW).isfinite().all():
        raise UserError(
            "the base classifier's scores are not finite for a grey image, because of NaN or overflow in its networks; "
            "check the weights, classifier.normalize and smoothing.precision"
        )


# by how much scores may differ between two batches because of rounding
_ROUNDING = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}


def check_function(f: BaseClassifier, shape: Sequence[int], precision: str) -> None:
    """Check that f is a function: the scores of an image depend neither on its batch nor on earlier calls.

    Raises: UserError, for example for a network in training mode.
    """
    random = np.random.Generator(np.random.Philox(0))
    x_BCHW = torch.from_numpy(random.random((4, *shape), dtype=np.float32)).to(f.device)
    alone = f(x_BCHW[:1])
    for other, where in ((f(x_BCHW[:1]), "two calls"), (f(x_BCHW)[:1], "two batches")):
        difference = float((other - alone).abs().max())
        if difference > _ROUNDING[precision]:
            raise UserError(
                f"the base classifier's scores of one image differ by {difference:.2g} between {where}; call "
                "model.eval(), and let the scores depend on nothing but the image"
            )


def _output(part: str, network: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Return the output of one network for some images. Raises: UserError if it fails or returns no tensor."""
    shape = tuple(x_BCHW.shape[1:])
    try:
        with torch.inference_mode():
            found = network(x_BCHW)
    except (torch.OutOfMemoryError, UserError, RunError):
        raise
    except Exception as error:  # an own function or a library's network can raise anything
        raise UserError(
            f"the {part} cannot process images of shape {shape} ({type(error).__name__}: {first_line(error)}); use a "
            f"{part} for such images, or resize them (data.resize, data.crop)"
        ) from error
    if not isinstance(found, Tensor):
        hint = ", such as its logits" if hasattr(found, "logits") else ""
        raise UserError(f"the {part} returned a {type(found).__name__}; it must return a tensor{hint}")
    return found
