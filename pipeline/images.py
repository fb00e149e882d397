"""Encoded images by index: decoded when asked for, resized, cropped, and hashed.

A sample's sha256 covers its stored bytes and its label, so that a block records which image its votes belong to.
"""

import functools
import hashlib
import io
import struct
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UserError

UNLABELLED = -1


class Sample(NamedTuple):
    image_CHW: NDArray[np.float32]
    label: int  # UNLABELLED where the data set has none
    sha256: str


class Source(Protocol):
    """Encoded images and their labels, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int]: ...

    def place(self, index: int) -> str:
        """The file that a sample stands in."""
        ...


class EncodedImages:
    """Images decoded when asked for, resized and cropped as torchvision's Resize and CenterCrop do.

    All are of one shape and mode: grey where sample 0 is grey and nothing else is asked for, else RGB.
    """

    def __init__(
        self,
        source: Source,
        num_classes: int,
        *,
        resize: int | None = None,
        crop: int | None = None,
        always_rgb: bool = False,
    ) -> None:
        self.num_classes = num_classes
        self._source, self._resize, self._crop = source, resize, crop
        self._always_rgb = always_rgb or resize is not None or crop is not None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        stored, label = self._source[index]
        image_CHW = self._decode(index, stored)
        if not UNLABELLED <= label < self.num_classes:
            raise UserError(
                f"{self._source.place(index)}: sample {index} has label {label}, beyond the {self.num_classes} "
                "classes; set data.num_classes, or correct the label"
            )
        if index and self._crop is None and image_CHW.shape != self._shape_CHW:
            (_, height, width), (_, height_0, width_0) = image_CHW.shape, self._shape_CHW
            raise UserError(
                f"{self._source.place(index)}: sample {index} is {width} x {height} pixels, but sample 0 "
                f"({self._source.place(0)}) is {width_0} x {height_0}, and all must be equal: set data.resize and "
                "data.crop"
            )
        return Sample(image_CHW, label, hashlib.sha256(stored + str(label).encode()).hexdigest())

    @functools.cached_property
    def _mode(self) -> str:
        if self._always_rgb:
            return "RGB"
        try:
            return "L" if Image.open(io.BytesIO(self._source[0][0])).mode == "L" else "RGB"
        except _UNDECODABLE as error:
            raise self._damaged(0, error) from error

    @functools.cached_property
    def _shape_CHW(self) -> tuple[int, ...]:
        return self._decode(0, self._source[0][0]).shape

    def _decode(self, index: int, stored: bytes) -> NDArray[np.float32]:
        try:
            image: Image.Image = Image.open(io.BytesIO(stored))
            self._check_mode(index, image.mode)
            image = self._fit(index, image if image.mode == self._mode else image.convert(self._mode))
            pixels = np.asarray(image, dtype=np.float32)
        except UserError:
            raise
        except _UNDECODABLE as error:
            raise self._damaged(index, error) from error
        return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)) / np.float32(255)

    def _check_mode(self, index: int, mode: str) -> None:
        if mode.startswith(("I", "F")):
            raise UserError(
                f"{self._source.place(index)}: the image of sample {index} has more than 8 bits a pixel (mode {mode}): "
                "convert the images to 8 bits"
            )
        if self._mode == "L" and mode != "L":
            raise UserError(
                f"{self._source.place(index)}: the image of sample {index} is of mode {mode}, but sample 0 is grey, "
                "and all must be equal: convert the images to one mode"
            )

    def _fit(self, index: int, image: Image.Image) -> Image.Image:
        if self._resize is None and self._crop is None:
            return image
        from torchvision.transforms import CenterCrop, Resize

        if self._resize is not None:
            image = Resize(self._resize)(image)
        if self._crop is not None:
            if min(image.size) < self._crop:  # torchvision would pad it with black
                raise UserError(
                    f"{self._source.place(index)}: sample {index} is {image.width} x {image.height} pixels, smaller "
                    f"than data.crop = {self._crop}: set data.resize, or a smaller data.crop"
                )
            image = CenterCrop(self._crop)(image)
        return image

    def _damaged(self, index: int, error: Exception) -> UserError:
        return UserError(
            f"{self._source.place(index)}: the image of sample {index} is damaged ({error}); mend or leave out"
        )


# what Pillow raises at one damaged file or another
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
