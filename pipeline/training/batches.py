"""The images of a training: read by index, kept in memory if they fit, augmented, and put in an order by the seed.

Shapes: B images, C H W image.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffsmooth.pipeline.data.entry import Dataset
from diffsmooth.pipeline.data.images import UNLABELLED
from diffsmooth.pipeline.data.sets import dataset_id, open_dataset, sample_indices
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.training import randomness
from diffsmooth.pipeline.training.randomness import Randomness
from diffsmooth.pipeline.training.settings import Augmentation, TrainingSpec

_KEPT_BYTES = 2 * 1024**3  # of decoded images in memory, per worker
_READERS = 4  # threads that read and decode images
_LOOKED_AT = 1000  # samples whose labels are checked before a training starts
HELD_OUT = 20  # every 20th image is held out if the spec names no validation images


class Batch(NamedTuple):
    """Images on [0, 1] with their labels, their random values, and how much of the training is done."""

    x_BCHW: Tensor
    label_B: Tensor
    randomness: Randomness
    progress: float  # from 0 to 1


class Images:
    """The samples of a data set that a spec selects."""

    def __init__(self, data: Dataset, indices: Sequence[int]) -> None:
        self._data, self._indices = data, indices
        self.data_id = dataset_id(data)
        self._kept: dict[int, tuple[Tensor, int]] = {}
        self._room = _KEPT_BYTES
        self._readers = ThreadPoolExecutor(_READERS)
        first, _ = self._read(0)
        self.shape = (first.shape[0], first.shape[1], first.shape[2])
        self.num_classes = data.num_classes

    def __len__(self) -> int:
        return len(self._indices)

    def _read(self, number: int) -> tuple[Tensor, int]:
        if number in self._kept:
            return self._kept[number]
        sample = self._data[self._indices[number]]
        image_CHW = torch.from_numpy(np.ascontiguousarray(sample.image_CHW))
        if self._room >= image_CHW.nbytes:
            self._room -= image_CHW.nbytes
            self._kept[number] = (image_CHW, sample.label)
        return image_CHW, sample.label

    def request(self, numbers: Sequence[int]) -> "list[Future[tuple[Tensor, int]]]":
        """Start to read samples in the background."""
        return [self._readers.submit(self._read, number) for number in numbers]

    def check_labels(self) -> None:
        """Raise UserError unless samples from the whole set have labels of two or more classes."""
        spread = range(0, len(self), max(1, len(self) // _LOOKED_AT))
        labels = {label for _, label in map(self._read, spread)}
        if UNLABELLED in labels:
            raise UserError(
                "data.path: a sample has no label, but task = 'classifier' needs labels; use a labelled data set"
            )
        if len(labels) < 2:
            raise UserError(f"data: all samples have label {min(labels)}; use images of at least 2 classes")


def collect(requested: "list[Future[tuple[Tensor, int]]]") -> tuple[Tensor, Tensor]:
    """Return the images and labels that `request` started to read."""
    images, labels = zip(*(one.result() for one in requested), strict=True)
    return torch.stack(images), torch.tensor(labels)


class Split(NamedTuple):
    train: Images
    validation: Images
    held_out: Data  # the validation images as a spec of certify names them


def open_images(spec: TrainingSpec) -> Split:
    """Open the images to train on and those to measure on. Raises: UserError."""

    def opened(data: Data) -> tuple[Dataset, range]:
        dataset = open_dataset(data)
        return dataset, sample_indices(data.samples, len(dataset))

    data, indices = opened(spec.data)
    if spec.validation is None:
        if len(indices) < HELD_OUT:
            raise UserError(
                f"data: {len(indices)} images are too few to hold out every {HELD_OUT}th; use more, or set [validation]"
            )
        chosen = indices[::HELD_OUT]
        train, validation = Images(data, sorted(set(indices) - set(chosen))), Images(data, chosen)
        samples = f"{chosen.start}:{chosen.stop}:{chosen.step}"
        held_out = spec.data.model_copy(update={"samples": samples})
    else:
        train, validation, held_out = Images(data, indices), Images(*opened(spec.validation)), spec.validation
    if train.shape != validation.shape or train.num_classes != validation.num_classes:
        raise UserError(
            f"validation: images of {validation.shape} and {validation.num_classes} classes, but the training images "
            f"have {train.shape} and {train.num_classes}; both must be equal"
        )
    if spec.task == "classifier":
        train.check_labels()
    return Split(train, validation, held_out)


class Order:
    """Which images a step uses: epochs in random orders, one after another, without dropping an image."""

    def __init__(self, seed: int, size: int) -> None:
        self._seed, self._size = seed, size
        self._epochs: dict[int, np.ndarray] = {}

    def numbers(self, positions: Sequence[int]) -> list[int]:
        return [self._number(position) for position in positions]

    def _number(self, position: int) -> int:
        epoch, place = divmod(position, self._size)
        if epoch not in self._epochs:
            self._epochs = {one: kept for one, kept in self._epochs.items() if one >= epoch - 1}
            self._epochs[epoch] = randomness.order(self._seed, epoch, self._size)
        return int(self._epochs[epoch][place])


def shards_of(step: int, batch: int, shards: int) -> list[range]:
    """Return the positions of each shard of a step's batch."""
    start = step * batch
    bounds = [start + batch * shard // shards for shard in range(shards + 1)]
    return [range(low, high) for low, high in pairwise(bounds)]


class TrainingBatches:
    """The shards of the batches that one worker processes, read one step ahead."""

    def __init__(self, spec: TrainingSpec, images: Images, rank: int, workers: int) -> None:
        self._spec, self._images, self._mine = spec, images, slice(rank, None, workers)
        self._order = Order(spec.training.seed, len(images))

    def steps(self, first: int) -> Iterator[list[Batch]]:
        """Yield the worker's shards of each step from `first` to the end."""
        ahead = self._request(first)
        for step in range(first, self._spec.training.steps):
            ready, ahead = ahead, self._request(step + 1)
            yield [self._batch(step, positions, requested) for positions, requested in ready]

    def _request(self, step: int) -> "list[tuple[range, list[Future[tuple[Tensor, int]]]]]":
        training = self._spec.training
        if step >= training.steps:
            return []
        mine = shards_of(step, training.batch, training.shards)[self._mine]
        return [(positions, self._images.request(self._order.numbers(positions))) for positions in mine]

    def _batch(self, step: int, positions: range, requested: "list[Future[tuple[Tensor, int]]]") -> Batch:
        training = self._spec.training
        x_BCHW, label_B = collect(requested)
        random = Randomness(training.seed, positions)
        return Batch(augment(x_BCHW, training.augment, random), label_B, random, step / training.steps)


def validation_batches(images: Images, seed: int, rank: int, workers: int, size: int = 250) -> Iterator[Batch]:
    """Yield the validation images of one worker in order, always with the same noise."""
    for start in list(range(0, len(images), size))[rank::workers]:
        numbers = range(start, min(start + size, len(images)))
        x_BCHW, label_B = collect(images.request(numbers))
        yield Batch(x_BCHW, label_B, Randomness(seed, numbers, purpose="validation"), 1.0)


def augment(x_BCHW: Tensor, names: Sequence[Augmentation], random: Randomness) -> Tensor:
    """Return images that are mirrored, shifted by up to an eighth of the side, or rotated, scaled and sheared."""
    for name in names:
        if name == "flip":
            mirrored_B = random.uniform("flip")[:, 0] < 0.5
            x_BCHW = torch.where(mirrored_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
        elif name == "shift":
            x_BCHW = _shifted(x_BCHW, random.uniform("shift", 2))
        else:
            x_BCHW = _affine(x_BCHW, 2 * random.uniform("affine", 5) - 1)
    return x_BCHW


def _shifted(x_BCHW: Tensor, uniform_B2: Tensor) -> Tensor:
    """Shift each image by a whole number of pixels, and fill with the nearest pixel."""
    _, _, height, width = x_BCHW.shape
    pad = (max(1, height // 8), max(1, width // 8))
    padded_BCHW = F.pad(x_BCHW, (pad[1], pad[1], pad[0], pad[0]), mode="replicate")
    offset_B2 = (uniform_B2 * torch.tensor([2 * pad[0] + 1, 2 * pad[1] + 1])).long()
    rows = zip(padded_BCHW, offset_B2.tolist(), strict=True)
    return torch.stack([image[:, down : down + height, right : right + width] for image, (down, right) in rows])


def _affine(x_BCHW: Tensor, amount_B5: Tensor) -> Tensor:
    """Rotate by up to 0.2 rad, scale and shear by up to a tenth, shift by up to a twentieth of the side."""
    angle_B, scale_B, shear_B = 0.2 * amount_B5[:, 0], 1 + 0.1 * amount_B5[:, 1], 0.1 * amount_B5[:, 2]
    cos_B, sin_B = torch.cos(angle_B) / scale_B, torch.sin(angle_B) / scale_B
    row_0 = torch.stack([cos_B, shear_B - sin_B, 0.1 * amount_B5[:, 3]], dim=1)
    row_1 = torch.stack([sin_B, cos_B, 0.1 * amount_B5[:, 4]], dim=1)
    grid = F.affine_grid(torch.stack([row_0, row_1], dim=1), list(x_BCHW.shape), align_corners=False)
    return F.grid_sample(x_BCHW, grid, padding_mode="border", align_corners=False)
