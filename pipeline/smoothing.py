"""The base classifier f and its votes.

    f(x) = mean over the m local copies of softmax(classify(denoise(x) + local noise)); a vote is argmax f(x + noise)

(DiffSmooth, Zhang et al. 2023, arXiv 2308.14333, Algorithm 1). With m = 1 and local_sigma = 0 it is diffusion denoised
smoothing (Carlini et al. 2023); if there is no denoiser either, it is Cohen's smoothing.

Shapes: B batch, C channels, H W image, K classes, M local copies, N draws, T blocks of a task, U images of a task.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsmooth.pipeline.block import Block, Stage
from diffsmooth.pipeline.data.entry import Dataset
from diffsmooth.pipeline.data.images import Sample
from diffsmooth.pipeline.data.sets import open_dataset, sample_indices
from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.models.classifiers import ClassifierSource, resolve_classifier
from diffsmooth.pipeline.models.denoisers import Denoiser, DenoiserSource, resolve_denoiser
from diffsmooth.pipeline.models.own import signature_of
from diffsmooth.pipeline.noise import STREAMS, Draws, Noise, local_noise
from diffsmooth.pipeline.spec import RunSpec

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
                "of torch; set it to false"
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


class Sources(NamedTuple):
    """The networks of a spec, checked but not loaded."""

    denoiser: DenoiserSource
    classifier: ClassifierSource

    def ids(self) -> dict[str, str]:
        return {**self.denoiser.ids(), **self.classifier.ids()}


def resolve(spec: RunSpec) -> Sources:
    """Check the networks of a spec without loading them.

    Raises: UserError, for example for an unknown architecture or a sigma beyond the denoiser's schedule.
    """
    return Sources(resolve_denoiser(spec), resolve_classifier(spec))


def check_base_classifier(spec: RunSpec) -> None:
    """Check, before anything is launched, that f can be built. Raises: UserError, as `resolve` does."""
    resolve(spec)


def weights_ids(spec: RunSpec) -> dict[str, str]:
    """Return what votes_id must know of f besides the spec: the hashes of its files and functions.

    Raises: UserError for a missing file, a sha256 that differs from the spec's, and as `resolve` does.
    """
    return resolve(spec).ids()


def build_base_classifier(spec: RunSpec, device: str | torch.device, data: Dataset | None = None) -> BaseClassifier:
    """Return f of a spec on a device, with its weights; `data` is the spec's data set, if it is already open.

    The first sample determines the shape of the images. Raises: UserError for networks that do not load, or that fit
    neither each other nor the images.
    """
    data = open_dataset(spec.data) if data is None else data
    shape = data[sample_indices(spec.data.samples, len(data))[0]].image_CHW.shape
    f = base_classifier(spec, torch.device(device), shape, data.num_classes)
    check_networks(f, torch.full((1, *shape), 0.5, device=device))
    check_function(f, shape, spec.smoothing.precision)
    return f


def base_classifier(spec: RunSpec, device: torch.device, shape: tuple[int, ...], num_classes: int) -> BaseClassifier:
    """Return f of a spec for images of shape C, H, W; on the meta device it has no weights and can only be counted.

    Raises: UserError for networks that do not load or do not fit the images.
    """
    smoothing, dtype, (channels, height, width) = spec.smoothing, DTYPES[spec.smoothing.precision], shape
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = smoothing.precision == "tf32"
    local_MCHW = local_noise(
        local_seed=smoothing.local_seed, m=smoothing.m, shape=shape, local_sigma=smoothing.local_sigma
    )
    sources = resolve(spec)
    return BaseClassifier(
        denoiser=sources.denoiser.build(device, dtype, (channels, height, width)),
        classifier=sources.classifier.build(device, dtype, channels, num_classes),
        local_noise_MCHW=torch.from_numpy(local_MCHW).to(device),
        sigma=smoothing.sigma,
        num_classes=num_classes,
    )


@dataclass(frozen=True)
class CastOptions:
    """How votes are cast. Results are bit-identical for equal options on the same device."""

    batch_size: int
    threads: int = 1  # background threads that generate noise


class CastBlock(NamedTuple):
    """The votes of one block, per class."""

    block: Block
    counts_K: NDArray[np.int64]


class _Batch(NamedTuple):
    noise_BCHW: Tensor
    image_B: Tensor  # index of the image that each row adds its noise to
    block_B: Tensor  # index of the block that each row votes in; the number of blocks for padding rows
    finished: int  # number of blocks that are complete after this batch
    draws: Draws  # which draw each row is


class _Rows(NamedTuple):
    """Consecutive rows of a batch that hold draws of one block."""

    block: int  # index of the block
    first_row: int
    draws: range


def cast_votes(
    f: BaseClassifier,
    blocks: Sequence[Block],
    samples: Mapping[int, Sample],
    noise: Noise,
    options: CastOptions,
) -> Iterator[CastBlock]:
    """Yield the votes of a task's blocks, in order, each as soon as all of its draws are counted.

    The draws of all blocks share batches, and the last batch is padded, so that all have `batch_size` rows. A draw's
    vote therefore does not depend on how the work is split. Background threads generate the noise ahead of its use.

    Raises: UserError if the scores of f are not finite, or if an image is not on the noise's grid.
    """
    images = {sample: row for row, sample in enumerate(dict.fromkeys(block.sample for block in blocks))}
    images_UCHW = torch.from_numpy(np.stack([samples[sample].image_CHW for sample in images])).to(f.device)
    images_UCHW = in_units(images_UCHW, noise, list(images))
    counts_TK = torch.zeros(len(blocks) + 1, f.num_classes, dtype=torch.int64, device=f.device)
    finite = torch.ones((), dtype=torch.bool, device=f.device)
    finished = 0

    def make(parts: Sequence[_Rows]) -> _Batch:
        return _make_batch(parts, blocks, images, images_UCHW, noise, options.batch_size)

    for batch in _made_ahead(make, _split(blocks, options.batch_size), options.threads):
        scores_BK = f(in_pixels(images_UCHW[batch.image_B] + batch.noise_BCHW, noise), batch.draws)
        finite &= scores_BK.isfinite().all()
        votes_B = scores_BK.argmax(dim=1)
        counts_TK.view(-1).scatter_add_(0, batch.block_B * f.num_classes + votes_B, torch.ones_like(votes_B))
        if batch.finished > finished:
            if not finite:
                raise UserError(
                    f"the base classifier's scores are not finite for {blocks[finished]}, because of NaN or overflow "
                    "in its networks; check the weights, classifier.normalize and smoothing.precision"
                )
            for index, counts_K in enumerate(counts_TK[finished : batch.finished].cpu().numpy(), start=finished):
                yield CastBlock(blocks[index], counts_K)
            finished = batch.finished


def noisy_images(image_CHW: NDArray[np.float32], noise: Noise, stage: Stage, sample: int, draws: range) -> Tensor:
    """Return x_NCHW on the CPU: the inputs of f for some draws of one sample, exactly as `cast_votes` makes them.

    Raises: UserError if the image is not on the noise's grid.
    """
    noise_NCHW = np.empty((len(draws), *image_CHW.shape), np.float32)
    noise.fill(noise_NCHW, stage, sample, draws)
    image_1CHW = in_units(torch.from_numpy(image_CHW)[None], noise, [sample])
    return in_pixels(image_1CHW + torch.from_numpy(noise_NCHW), noise)


def in_units(images_UCHW: Tensor, noise: Noise, samples: Sequence[int]) -> Tensor:
    """Return images in multiples of the noise's unit; `samples` are their indices in the data set.

    Raises: UserError for an image that is not on the noise's grid.
    """
    if noise.grid is None:
        return images_UCHW
    steps_UCHW = (images_UCHW * noise.grid).round()
    off_U = (images_UCHW * noise.grid - steps_UCHW).abs().flatten(1).amax(dim=1) > 1e-3
    if off_U.any():
        sample = samples[int(off_U.nonzero()[0])]
        raise UserError(
            f"smoothing.noise_grid = {noise.grid}, but sample {sample} has values that are not multiples of "
            f"1/{noise.grid}; use the grid of the images (255 if they have 8 bits), or remove noise_grid"
        )
    return steps_UCHW


def in_pixels(x_BCHW: Tensor, noise: Noise) -> Tensor:
    """Return [0, 1] pixel values from multiples of the noise's unit; `x_BCHW` may be overwritten."""
    return x_BCHW if noise.grid is None else x_BCHW.div_(noise.grid)


def _split(blocks: Sequence[Block], batch_size: int) -> Iterator[list[_Rows]]:
    """Yield, for each batch, which rows hold which draws of which blocks."""
    parts: list[_Rows] = []
    row = 0
    for index, block in enumerate(blocks):
        draw = block.draw_start
        while draw < block.draw_stop:
            stop = min(block.draw_stop, draw + batch_size - row)
            parts.append(_Rows(index, row, range(draw, stop)))
            row, draw = row + stop - draw, stop
            if row == batch_size:
                yield parts
                parts, row = [], 0
    if parts:
        yield parts


def _make_batch(
    parts: Sequence[_Rows],
    blocks: Sequence[Block],
    images: Mapping[int, int],
    images_UCHW: Tensor,
    noise: Noise,
    batch_size: int,
) -> _Batch:
    """Return the noise of one batch and what its rows are, on the device of `images_UCHW`."""
    device = images_UCHW.device
    noise_BCHW = torch.zeros(batch_size, *images_UCHW.shape[1:], pin_memory=device.type == "cuda")
    image_B = torch.zeros(batch_size, dtype=torch.int64)
    block_B = torch.full((batch_size,), len(blocks), dtype=torch.int64)
    identity = np.zeros((4, batch_size), dtype=np.int64)  # of each row: stream, sample, draw, copy
    for index, first_row, draws in parts:
        block, rows = blocks[index], slice(first_row, first_row + len(draws))
        identity[:2, rows] = [[STREAMS[block.stage]], [block.sample]]
        identity[2, rows] = draws
        noise.fill(noise_BCHW[rows].numpy(), block.stage, block.sample, draws)
        image_B[rows], block_B[rows] = images[block.sample], index
    last = parts[-1]
    finished = last.block + (last.draws.stop == blocks[last.block].draw_stop)
    noise_BCHW, image_B, block_B = (one.to(device, non_blocking=True) for one in (noise_BCHW, image_B, block_B))
    return _Batch(noise_BCHW, image_B, block_B, finished, Draws(noise.seed, *identity))


def _made_ahead(
    make: Callable[[Sequence[_Rows]], _Batch], batches: Iterator[list[_Rows]], threads: int
) -> Iterator[_Batch]:
    """Yield the batches in order; up to threads + 1 of them are made before they are used."""
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="noise") as pool:
        ahead: deque[Future[_Batch]] = deque()
        try:
            while True:
                while len(ahead) < threads + 1 and (parts := next(batches, None)) is not None:
                    ahead.append(pool.submit(make, parts))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


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
