"""The base classifier f and its votes.

    f(x) = mean over the m local copies of softmax(classify(denoise(x) + local noise)); a vote is argmax f(x + noise)

(DiffSmooth, Zhang et al. 2023, arXiv 2308.14333, Algorithm 1). Without a denoiser, with m = 1 and local_sigma = 0 it is
Cohen's smoothing; with a denoiser it is diffusion denoised smoothing (Carlini et al. 2023).

Shapes: B batch, C channels, H W image, K classes, M local copies, D draws of a task.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import noise
from pipeline.block import Block
from pipeline.data import open_dataset, sample_indices
from pipeline.errors import UserError
from pipeline.images import Sample
from pipeline.models.classifiers import build_classifier, check_classifier, classifier_ids
from pipeline.models.denoisers import Denoiser, build_denoiser, check_denoiser, denoiser_ids
from pipeline.spec import RunSpec

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BaseClassifier:
    """f: x_BCHW float32 -> scores_BK float32, the mean softmax of the m local copies.

    `denoise`, `classify` and `local_noise_MCHW` are its parts, `denoiser` and `classifier` the networks behind them;
    images are in [0, 1].
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

    @torch.inference_mode()
    def denoise(self, x_BCHW: Tensor) -> Tensor:
        """x0_BCHW in [0, 1]; the input itself where the spec names no denoiser."""
        return self._denoise(x_BCHW)

    @torch.inference_mode()
    def classify(self, x_BCHW: Tensor) -> Tensor:
        """logits_BK, float32."""
        return self.classifier(x_BCHW).float()

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        if self._compiled is None:
            with torch.inference_mode():
                return self._mean_softmax(x_BCHW)
        with torch.no_grad():  # the compiler cannot cut a weight into views in inference mode
            return self._compiled(x_BCHW)

    def compile(self) -> None:
        """Let torch compile f, with CUDA graphs on a GPU, at its first call with each shape: minutes.

        `denoise` and `classify` by themselves stay as they are.
        """
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self._compiled = torch.compile(self._mean_softmax, dynamic=False, mode=mode)

    def _denoise(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW if self.denoiser is None else self.denoiser(x_BCHW, self._sigma)

    def _mean_softmax(self, x_BCHW: Tensor) -> Tensor:
        B, M = len(x_BCHW), len(self.local_noise_MCHW)
        copies_BMCHW = self._denoise(x_BCHW)[:, None] + self.local_noise_MCHW
        logits = self.classifier(copies_BMCHW.flatten(0, 1)).float()
        return logits.softmax(dim=1).reshape(B, M, -1).mean(dim=1)


def build_base_classifier(spec: RunSpec, device: str | torch.device) -> BaseClassifier:
    """f of a spec, its weights loaded, on a device; the image shape is that of the data set's first sample.

    Raises: UserError for what cannot be loaded or does not fit together.
    """
    data = open_dataset(spec.data)
    shape = data[sample_indices(spec.data.samples, len(data))[0]].image_CHW.shape
    f = base_classifier(spec, torch.device(device), shape, data.num_classes)
    _check_scores(f, torch.full((1, *shape), 0.5, device=device))
    return f


def base_classifier(spec: RunSpec, device: torch.device, shape: tuple[int, ...], num_classes: int) -> BaseClassifier:
    """f of a spec for images of a shape C, H, W; on the meta device without weights or votes, to be counted only.

    Raises: UserError for what cannot be loaded or does not fit together.
    """
    smoothing, dtype, (channels, height, width) = spec.smoothing, DTYPES[spec.smoothing.precision], shape
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = smoothing.precision == "tf32"
    local_MCHW = noise.local_noise(
        local_seed=smoothing.local_seed, m=smoothing.m, shape=shape, local_sigma=smoothing.local_sigma
    )
    return BaseClassifier(
        denoiser=build_denoiser(spec, device, dtype, (channels, height, width)),
        classifier=build_classifier(spec, device, dtype, channels, num_classes),
        local_noise_MCHW=torch.from_numpy(local_MCHW).to(device),
        sigma=smoothing.sigma,
        num_classes=num_classes,
    )


def weights_ids(spec: RunSpec) -> dict[str, str]:
    """What votes_id must know of f besides the spec: the hashes of the files and functions that it is made of.

    Raises: UserError for a missing file, another sha256 than the spec's, or a function that cannot be imported.
    """
    return {**denoiser_ids(spec), **classifier_ids(spec)}


def check_base_classifier(spec: RunSpec) -> None:
    """Refuse, before anything is launched, an unknown architecture and a sigma beyond the denoiser's schedule."""
    check_denoiser(spec)
    check_classifier(spec)


class BlockVotes(NamedTuple):
    block: Block
    counts_K: NDArray[np.int64]


class _Batch(NamedTuple):
    noise_BCHW: Tensor
    image_B: Tensor  # which of the task's images each row adds its noise to
    block_B: Tensor  # which of the task's blocks each row votes in; their number for rows that only pad
    finished: int  # blocks that are complete after this batch


def cast_votes(
    f: BaseClassifier,
    blocks: Sequence[Block],
    samples: Mapping[int, Sample],
    *,
    sigma: float,
    seed: int,
    batch_size: int,
    threads: int = 1,
    noise_grid: int | None = None,
) -> Iterator[BlockVotes]:
    """The votes of a task's blocks, in their order, each as soon as its draws are counted.

    Draws of all blocks share batches, and every batch has `batch_size` rows, the last one padded: at equal batch size,
    thread count and device a draw's vote does not depend on how the work is cut. Noise is made ahead by `threads`
    background threads. Raises: UserError where f's scores are not finite, or an image is off the noise's grid.
    """
    images = {sample: row for row, sample in enumerate(dict.fromkeys(block.sample for block in blocks))}
    images_UCHW = torch.from_numpy(np.stack([samples[sample].image_CHW for sample in images])).to(f.device)
    if noise_grid is not None:
        images_UCHW = _in_steps(images_UCHW, noise_grid, list(images))
    counts_TK = torch.zeros(len(blocks) + 1, f.num_classes, dtype=torch.int64, device=f.device)
    finite = torch.ones((), dtype=torch.bool, device=f.device)
    done = 0
    for batch in _batches(
        blocks, images, images_UCHW.shape[1:], sigma, seed, batch_size, threads, noise_grid, f.device
    ):
        x_BCHW = images_UCHW[batch.image_B] + batch.noise_BCHW
        if noise_grid is not None:
            x_BCHW /= noise_grid
        scores_BK = f(x_BCHW)
        finite &= scores_BK.isfinite().all()
        votes_B = scores_BK.argmax(dim=1)
        counts_TK.view(-1).scatter_add_(0, batch.block_B * f.num_classes + votes_B, torch.ones_like(votes_B))
        if batch.finished > done:
            if not finite:
                raise UserError(
                    f"the base classifier's scores are not finite for {blocks[done]}: NaN or overflow in its networks; "
                    "check weights, normalisation and precision"
                )
            for index, counts_K in enumerate(counts_TK[done : batch.finished].cpu().numpy(), start=done):
                yield BlockVotes(blocks[index], counts_K)
            done = batch.finished


def _batches(
    blocks: Sequence[Block],
    images: Mapping[int, int],
    shape: torch.Size,
    sigma: float,
    seed: int,
    batch_size: int,
    threads: int,
    noise_grid: int | None,
    device: torch.device,
) -> Iterator[_Batch]:
    """The draws of all blocks in order, cut into batches of one shape, made ahead of their use."""

    def make(first: int) -> _Batch:
        noise_BCHW = torch.zeros(batch_size, *shape, pin_memory=device.type == "cuda")
        image_B = torch.zeros(batch_size, dtype=torch.int64)
        block_B = torch.full((batch_size,), len(blocks), dtype=torch.int64)
        last = min(first + batch_size, int(ends[-1]))
        index = int(np.searchsorted(ends, first, side="right"))
        position = first
        while position < last:
            block, stop = blocks[index], min(last, int(ends[index]))
            rows = slice(position - first, stop - first)
            draw = block.draw_stop - (int(ends[index]) - position)
            noise.draw_noise(
                noise_BCHW[rows].numpy(),
                seed=seed,
                stage=block.stage,
                sample=block.sample,
                draws=range(draw, draw + stop - position),
                sigma=sigma,
                grid=noise_grid,
            )
            image_B[rows], block_B[rows] = images[block.sample], index
            position, index = stop, index + 1
        noise_BCHW, image_B, block_B = (one.to(device, non_blocking=True) for one in (noise_BCHW, image_B, block_B))
        return _Batch(noise_BCHW, image_B, block_B, finished=int(np.searchsorted(ends, last, side="right")))

    ends = np.cumsum([block.draws for block in blocks])
    starts = iter(range(0, int(ends[-1]), batch_size))
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="noise") as pool:
        ahead: deque[Future[_Batch]] = deque()
        try:
            while True:
                while len(ahead) < threads + 1 and (first := next(starts, None)) is not None:
                    ahead.append(pool.submit(make, first))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _in_steps(images_UCHW: Tensor, grid: int, indices: Sequence[int]) -> Tensor:
    """Images as whole numbers of steps of 1 / grid."""
    steps_UCHW = (images_UCHW * grid).round()
    off_U = (images_UCHW * grid - steps_UCHW).abs().flatten(1).amax(dim=1) > 1e-3
    if off_U.any():
        index = indices[int(off_U.nonzero()[0])]
        raise UserError(
            f"smoothing.noise_grid = {grid}, but sample {index} has values that are no multiples of 1/{grid}: take the "
            "grid of the images, 255 for those of 8 bits, or leave it out"
        )
    return steps_UCHW


def _check_scores(f: BaseClassifier, x_BCHW: Tensor) -> None:
    """Refuse networks whose input or output does not fit the data set, or whose output is not finite."""
    shape, part = tuple(x_BCHW.shape[1:]), "denoiser"
    try:
        x0_BCHW = f.denoise(x_BCHW)
        part = "classifier"
        f.classify(x0_BCHW)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the {part} cannot take images of shape {shape} ({reason}): take a {part} of such images, or set "
            "data.resize and data.crop"
        ) from error
    if x0_BCHW.shape != x_BCHW.shape:
        raise UserError(f"the denoiser turns {tuple(x_BCHW.shape)} into {tuple(x0_BCHW.shape)}: it must keep the shape")
    scores_BK = f(x_BCHW)
    if scores_BK.shape[1] != f.num_classes:
        raise UserError(
            f"the classifier has {scores_BK.shape[1]} classes, the data set {f.num_classes}: take a classifier of this "
            "data set, or set data.num_classes"
        )
    if not scores_BK.isfinite().all():
        raise UserError(
            "the base classifier's scores are not finite on a grey image: NaN or overflow in its networks; check "
            "weights, normalisation and precision"
        )
