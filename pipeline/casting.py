"""Votes of f: the draws of many blocks share full batches of one shape, so that no vote depends on how work is split.

Shapes: B batch, C channels, H W image, K classes, N draws, T blocks of a task, U images of a task.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsmooth.pipeline.block import Block, Stage
from diffsmooth.pipeline.data.images import Sample
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.noise import STREAMS, Draws, Noise
from diffsmooth.pipeline.smoothing import BaseClassifier


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
