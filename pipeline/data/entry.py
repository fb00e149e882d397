"""DatasetEntry: what is known about a data set that a spec can name; and images that are in memory."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from diffsmooth.pipeline.data.images import Sample
from diffsmooth.pipeline.spec import Data


class Facts(NamedTuple):
    """What is known about a data set without opening it."""

    size: int
    shape_CHW: tuple[int, int, int]
    num_classes: int


class Dataset(Protocol):
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class RawImages:
    """Images in memory as pixels_NHWC: uint8, or float32 in [0, 1]."""

    def __init__(
        self, pixels_NHWC: NDArray[np.uint8] | NDArray[np.float32], labels: Sequence[int], num_classes: int
    ) -> None:
        self.num_classes = num_classes
        self._pixels_NHWC, self._labels = pixels_NHWC, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pixels_HWC, label = np.ascontiguousarray(self._pixels_NHWC[index]), int(self._labels[index])
        image_CHW = pixels_HWC.transpose(2, 0, 1).astype(np.float32)
        if pixels_HWC.dtype == np.uint8:
            image_CHW /= np.float32(255)
        return Sample(image_CHW, label, hashlib.sha256(pixels_HWC.tobytes() + str(label).encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """A data set that `data.name` can name."""

    open: Callable[[Data], Dataset]
    facts: Callable[[Data], Facts | None] = lambda data: None  # what is published of it; None: open it
    hub: Callable[[], str | None] = lambda: None  # the hf:// location that it is read from without data.path
    benchmark: str | None = None  # its id in the Hub's results of models
    embedded: bool = False  # some of its images are part of the package
    one_shape: bool = False  # all copies of it have images of the shape in its facts
