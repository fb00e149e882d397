"""Images in files of other programs: Parquet, npz and csv."""

import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffsmooth.pipeline.data.entry import Dataset, DatasetEntry, RawImages
from diffsmooth.pipeline.data.images import UNLABELLED, EncodedImages
from diffsmooth.pipeline.data.sources import ParquetRows
from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.locations import in_store, is_remote
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.storage.fetch import fetch
from diffsmooth.pipeline.storage.hub import hub_files, on_hub
from diffsmooth.pipeline.storage.remote import list_objects


def _parquet(data: Data) -> Dataset:
    if data.path is None:
        raise UserError("data.path is missing, but data.name = 'parquet' needs the path of a Parquet file")
    rows = ParquetRows(parquet_files(data.path, data.split))
    return EncodedImages(rows, data.num_classes or rows.count_classes(), resize=data.resize, crop=data.crop)


def parquet_files(path: str, split: str) -> list[str]:
    """Return the file at `path` or, if it is a folder, the files of a split, sorted by name."""
    if path.startswith(("https://", "http://")) or (on_hub(path) and path.endswith(".parquet")):
        return [str(fetch(path))]
    if on_hub(path):
        found = hub_files(path)
    elif in_store(path):
        if path.endswith(".parquet"):
            return [path]
        found = list_objects(path)
    elif Path(path).is_dir():
        found = sorted(str(one) for one in Path(path).iterdir())
    else:
        return [path]
    names = {one: one.rpartition("/")[2] for one in found}
    files = [one for one in found if names[one].endswith(".parquet") and not names[one].startswith(".")]
    if not files:
        raise UserError(f"data.path = {path!r}: contains no *.parquet; give a Parquet file, or a folder of them")
    of_split = [one for one in files if names[one].startswith(split)]
    others = sorted({match[1] for one in files if (match := re.match(r"(.+)-\d{5}-of-\d{5}", names[one]))})
    if not of_split and others:  # using another split instead would go unnoticed
        raise UserError(f"data.split = {split!r}: {path} contains {', '.join(others)}; set data.split to one of them")
    return [str(fetch(one)) if on_hub(one) else one for one in of_split or files]


def _npz(data: Data) -> Dataset:
    """Open a file of numpy.savez with the images x and their labels y."""
    path = _single_file(data)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds one array")
        with loaded as arrays:
            if not {"x", "y"} <= set(arrays.files):
                found = ", ".join(arrays.files[:10]) or "nothing"
                raise UserError(f"data.path = {data.path!r}: holds {found}; save the arrays x (images) and y (labels)")
            pixels, labels = arrays["x"], arrays["y"]
    except UserError:
        raise
    except (ValueError, zipfile.BadZipFile, EOFError, zlib.error, AttributeError) as error:
        raise UserError(
            f"data.path = {data.path!r}: cannot be read as a file of numpy.savez ({first_line(error)}); save the "
            "arrays x (images) and y (labels) without Python objects"
        ) from error
    return _in_memory(data, _pixels(data, pixels), labels)


def _pixels(data: Data, x: NDArray[Any]) -> NDArray[Any]:
    """Return images N x H x W, N x H x W x C or N x C x H x W as N x H x W x C, uint8 or float32."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise UserError(
            f"data.path = {data.path!r}: x has shape {x.shape}; it must be N x H x W, N x H x W x C or N x C x H x W "
            "with 1 or 3 channels"
        )
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f" or not ((x >= 0) & (x <= 1)).all():
        raise UserError(
            f"data.path = {data.path!r}: x has type {x.dtype} and values from {x.min()} to {x.max()}; it must be "
            "uint8, or float with values in [0, 1]"
        )
    return x.astype(np.float32)


def _csv(data: Data) -> Dataset:
    """Open a CSV file whose rows are a label and the pixels of a square image, from 0 to 255, with or without names.

    The number of pixels is a square (grey), or three times a square (all red pixels first, then green, then blue).
    """
    path = _single_file(data)
    try:
        first = pd.read_csv(path, header=None, nrows=1, dtype=str)
        named = not str(first.iat[0, 0]).strip().lstrip("+-").isdigit()
        table = pd.read_csv(path, header=0 if named else None)
        with np.errstate(invalid="ignore"):  # a missing pixel
            values = table.to_numpy(dtype=np.int64)
        if (fractions := values != table.to_numpy()).any():  # NumPy truncates them
            raise ValueError(f"{table.to_numpy()[fractions][0]} is not a whole number")
    except (ValueError, OverflowError, UnicodeError) as error:  # pandas' errors are ValueErrors
        raise UserError(
            f"data.path = {data.path!r}: cannot be read as rows of a label and pixels ({first_line(error)}); write "
            "whole numbers, separated by commas"
        ) from error
    pixels, count = values[:, 1:], values.shape[1] - 1
    channels = next((one for one in (1, 3) if count and math.isqrt(count // one) ** 2 * one == count), None)
    if not len(values):
        raise UserError(f"data.path = {data.path!r}: contains no row of a label and pixels")
    if channels is None:
        raise UserError(
            f"data.path = {data.path!r}: a row has {count} pixels after its label; it must be a square (grey images) "
            "or three times a square (colour)"
        )
    if pixels.min() < 0 or pixels.max() > 255:
        raise UserError(
            f"data.path = {data.path!r}: pixels have values from {pixels.min()} to {pixels.max()}; they must be 0 to "
            "255"
        )
    side = math.isqrt(count // channels)
    images_NCHW = pixels.astype(np.uint8).reshape(len(pixels), channels, side, side)
    return _in_memory(data, images_NCHW.transpose(0, 2, 3, 1), values[:, 0])


def _single_file(data: Data) -> Path:
    if data.path is None:
        raise UserError(f"data.path is missing, but data.name = {data.name!r} needs the path of a file")
    if data.resize is not None or data.crop is not None:
        raise UserError(
            f"data.resize and data.crop are not applied to data.name = {data.name!r}, whose images all have one size"
        )
    path = fetch(data.path) if is_remote(data.path) else Path(data.path)
    if not path.is_file():
        raise UserError(f"data.path = {data.path!r}: there is no such file")
    return path


def _in_memory(data: Data, pixels_NHWC: NDArray[Any], labels: NDArray[Any]) -> RawImages:
    """Check that the labels suit the images."""
    y = np.asarray(labels)
    if y.shape != (len(pixels_NHWC),) or y.dtype.kind not in "iu" or not len(y):
        raise UserError(
            f"data.path = {data.path!r}: the labels have shape {y.shape} and type {y.dtype}; they must be one whole "
            f"number for each of the {len(pixels_NHWC)} images"
        )
    num_classes = data.num_classes or max(int(y.max()) + 1, 2)
    if y.min() < UNLABELLED or y.max() >= num_classes:
        raise UserError(
            f"data.path = {data.path!r}: labels reach from {y.min()} to {y.max()}; they must be 0 to "
            f"{num_classes - 1}, or -1 for an unlabelled image"
        )
    return RawImages(pixels_NHWC, y.tolist(), num_classes)


PARQUET, NPZ, CSV = DatasetEntry(open=_parquet), DatasetEntry(open=_npz), DatasetEntry(open=_csv)
