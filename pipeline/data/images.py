"""Encoded images by index: decoded on access, resized, cropped, and hashed.

A sample's sha256 covers its stored bytes and its label, so that a block records which image its votes belong to.
"""

import functools
import hashlib
import io
import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffsmooth.pipeline.data.sources import UNLABELLED, Source
from diffsmooth.pipeline.errors import UserError, first_line

logger = logging.getLogger(__name__)

# Those of sources.IMAGE_ENDINGS. Pillow knows some 40 more, of which EPS starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
_MOST_PIXELS = 100_000_000
_SAME_PIXELS = ("RGB", "L", "1")  # modes whose conversion to RGB changes no pixel


class Sample(NamedTuple):
    """One test image in [0, 1], its label, and the sha256 of what is stored of both."""

    image_CHW: NDArray[np.float32]
    label: int  # UNLABELLED if the data set has no labels
    sha256: str


class EncodedImages:
    """Images that are decoded on access, and resized and cropped like torchvision's Resize and CenterCrop.

    All have one shape and one mode: RGB, or greyscale if sample 0 is and neither resizing nor RGB is requested. Other
    modes (RGBA, CMYK, palettes) are converted to RGB as by torchvision, which drops transparency; a message says so.
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
        self._converted: set[str] = set()  # modes that a message has stated

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        stored, label = self._source[index]
        image_CHW = self._decode(index, stored)
        if not UNLABELLED <= label < self.num_classes:
            raise UserError(
                f"{self._source.place(index)}: sample {index} has label {label}, but classes are 0 to "
                f"{self.num_classes - 1}; correct the label, or set data.num_classes"
            )
        if index and self._crop is None and image_CHW.shape != self._shape_CHW:
            (_, height, width), (_, height_0, width_0) = image_CHW.shape, self._shape_CHW
            raise UserError(
                f"{self._source.place(index)}: sample {index} is {width} x {height} pixels, but sample 0 "
                f"({self._source.place(0)}) is {width_0} x {height_0}, and all must be equal; set data.resize and "
                "data.crop"
            )
        return Sample(image_CHW, label, hashlib.sha256(stored + str(label).encode()).hexdigest())

    @functools.cached_property
    def _mode(self) -> str:
        return "L" if not self._always_rgb and self._open(0, self._source[0][0]).mode == "L" else "RGB"

    @functools.cached_property
    def _shape_CHW(self) -> tuple[int, ...]:
        return self._decode(0, self._source[0][0]).shape

    def _open(self, index: int, stored: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(stored), formats=_FORMATS)
        except Exception as error:  # Pillow's decoders can raise anything for a damaged file
            raise self._damaged(index, error) from error
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise UserError(
                f"{self._source.place(index)}: the image of sample {index} is animated, or has {frames} pages; store "
                "one of them"
            )
        if image.width * image.height > _MOST_PIXELS:
            raise UserError(
                f"{self._source.place(index)}: the image of sample {index} has {image.width} x {image.height} pixels, "
                f"the limit is {_MOST_PIXELS:,}; replace or exclude it"
            )
        return image

    def _decode(self, index: int, stored: bytes) -> NDArray[np.float32]:
        image = self._open(index, stored)
        self._check_mode(index, image.mode)
        try:
            image = image.convert(self._mode) if image.mode != self._mode else image
            image.load()
        except Exception as error:  # see above
            raise self._damaged(index, error) from error
        pixels = np.asarray(self._fit(index, image), dtype=np.float32)
        return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)) / np.float32(255)

    def _check_mode(self, index: int, mode: str) -> None:
        if mode.startswith(("I", "F")):
            raise UserError(
                f"{self._source.place(index)}: the image of sample {index} has more than 8 bits per channel (mode "
                f"{mode}); convert the images to 8 bits"
            )
        if self._mode == "L" and mode != "L":
            raise UserError(
                f"{self._source.place(index)}: the image of sample {index} has mode {mode}, but sample 0 is greyscale, "
                "and all must be equal; convert the images to one mode"
            )
        if mode not in (*_SAME_PIXELS, *self._converted):
            self._converted.add(mode)
            logger.warning(
                "%s: the image of sample %d has mode %s; it is converted to RGB, as others of this mode",
                self._source.place(index), index, mode,
            )  # fmt: skip

    def _fit(self, index: int, image: Image.Image) -> Image.Image:
        if self._resize is None and self._crop is None:
            return image
        from torchvision.transforms import CenterCrop, Resize

        if self._resize is not None:
            try:
                image = Resize(self._resize)(image)
            except (MemoryError, ValueError) as error:  # of a very long and narrow image
                raise self._damaged(index, error) from error
        if self._crop is not None:
            if min(image.size) < self._crop:  # torchvision would pad it with black
                raise UserError(
                    f"{self._source.place(index)}: sample {index} is {image.width} x {image.height} pixels, smaller "
                    f"than data.crop = {self._crop}; set data.resize, or a smaller data.crop"
                )
            image = CenterCrop(self._crop)(image)
        return image

    def _damaged(self, index: int, error: Exception) -> UserError:
        unknown = isinstance(error, UnidentifiedImageError)  # whose message names a Python object
        reason = f"not one of {', '.join(_FORMATS)}" if unknown else first_line(error)
        return UserError(f"{self._source.place(index)}: cannot decode sample {index} ({reason}); replace or exclude it")
