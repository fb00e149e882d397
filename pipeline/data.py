"""DATASETS: name -> images in [0, 1] float32 CHW and labels, by index.

A sample's sha256 covers its stored bytes and its label, so that a block says of which image it holds votes.
"""

import hashlib
import io
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.spec import Data, UserError

UNLABELLED = -1


class Sample(NamedTuple):
    image_CHW: NDArray[np.float32]
    label: int  # UNLABELLED where the data set has none
    sha256: str


class Dataset(Protocol):
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class ParquetImages:
    """Rows of {image: {bytes} or bytes, label: int} (Hugging Face's layout; the column may be called `img`).

    Read by row group: a sample costs one row group, of which the last one read is kept.
    """

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise UserError(f"data.path = {str(path)!r}: no such file; give the path of a Parquet file") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"data.path = {str(path)!r}: damaged, or not a Parquet file ({error})") from error
        self._path = path
        names = self._file.schema_arrow.names
        image = next((name for name in ("image", "img") if name in names), None)
        if image is None:
            raise UserError(f"data.path = {str(path)!r}: no column 'image' or 'img' among {', '.join(names)}")
        self._image = image
        rows = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._labels = self._read_labels("label" in names)
        self.num_classes = num_classes or int(self._labels.max(initial=UNLABELLED)) + 1
        if self.num_classes < 2:
            raise UserError(f"data.path = {str(path)!r}: no labels to count classes by; set data.num_classes")
        self._cached: tuple[int, list[bytes]] = (-1, [])

    def _read_labels(self, has_labels: bool) -> NDArray[np.int64]:
        if not has_labels:
            return np.full(len(self), UNLABELLED, dtype=np.int64)
        column = self._file.read(columns=["label"]).column("label")
        if not pa.types.is_integer(column.type):
            raise UserError(f"data.path = {str(self._path)!r}: column 'label' is {column.type}; it must hold integers")
        return pc.fill_null(column, UNLABELLED).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        stored, label = self._stored(index), int(self._labels[index])
        try:
            image = Image.open(io.BytesIO(stored))
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"), dtype=np.float32)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(
                f"{self._path}: the image of sample {index} is damaged ({error}); mend or leave out"
            ) from error
        if not UNLABELLED <= label < self.num_classes:
            raise UserError(f"{self._path}: sample {index} has label {label}, beyond the {self.num_classes} classes")
        image_CHW = (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)) / np.float32(255)
        return Sample(image_CHW, label, hashlib.sha256(stored + str(label).encode()).hexdigest())

    def _stored(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._cached[0] != group:
            column = self._file.read_row_group(group, columns=[self._image]).column(0).to_pylist()
            self._cached = (group, [cell["bytes"] if isinstance(cell, dict) else cell for cell in column])
        return self._cached[1][index - int(self._starts[group])]


def _mnist(data: Data) -> Dataset:
    if data.split != "heldout":
        raise UserError(
            f"data.split = {data.split!r}: the embedded mnist has the split 'heldout' only "
            "(1,000 images held out from training, not the MNIST test set)"
        )
    embedded = resources.files("pipeline.embedded") / "mnist.parquet"
    return ParquetImages(Path(data.path) if data.path else Path(str(embedded)), num_classes=10)


def _parquet(data: Data) -> Dataset:
    if data.path is None:
        raise UserError("data.path is missing: data.name = 'parquet' needs the path of a Parquet file")
    return ParquetImages(Path(data.path), data.num_classes)


DATASETS: dict[str, Callable[[Data], Dataset]] = {"mnist": _mnist, "parquet": _parquet}


def open_dataset(data: Data) -> Dataset:
    """The data set that a spec names.

    Raises: UserError for an unknown name and for what cannot be read.
    """
    if data.name not in DATASETS:
        raise UserError(f"data.name = {data.name!r} is unknown: choose one of {', '.join(DATASETS)}")
    return DATASETS[data.name](data)


def sample_indices(samples: str, size: int) -> range:
    """The indices that `samples` = "start:stop:step" names in a data set of `size` samples; each part may be empty.

    Raises: UserError for what is not of this form, is empty, or lies outside the data set.
    """
    parts: list[Any] = samples.split(":")
    try:
        start, stop, step = [int(part) if part.strip() else None for part in (*parts, "", "")[:3]]
        if not 2 <= len(parts) <= 3:
            raise ValueError
    except ValueError:
        raise UserError(
            f"data.samples = {samples!r} is not start:stop:step: write, say, '0:100' or '0:10000:20'"
        ) from None
    start, stop, step = start or 0, size if stop is None else stop, 1 if step is None else step
    if step < 1 or start < 0 or stop > size:
        raise UserError(
            f"data.samples = {samples!r} lies outside the data set: it holds samples 0 to {size - 1}, "
            f"so 0 <= start < stop <= {size} and step >= 1"
        )
    if start >= stop:
        raise UserError(f"data.samples = {samples!r} names no sample: start must lie below stop")
    return range(start, stop, step)
