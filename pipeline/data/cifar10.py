"""CIFAR-10: Parquet on the Hugging Face Hub, or its archive."""

import logging
from contextlib import suppress
from pathlib import Path

import numpy as np

from diffsmooth.pipeline.data.entry import Dataset, DatasetEntry, Facts, RawImages
from diffsmooth.pipeline.data.files import parquet_files
from diffsmooth.pipeline.data.images import EncodedImages
from diffsmooth.pipeline.data.sources import ParquetRows
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.locations import is_remote
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.storage.fetch import cache_folder, fetch, node_lock
from diffsmooth.pipeline.storage.hub import on_hub

logger = logging.getLogger(__name__)

_CIFAR10_SIZES = {"test": 10_000, "train": 50_000}
_CIFAR10_ON_HUB = "hf://datasets/uoft-cs/cifar10/plain_text"
_CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def _cifar10(data: Data) -> Dataset:
    if data.split not in _CIFAR10_SIZES:
        raise UserError(f"data.split = {data.split!r}: cifar10 has {' and '.join(_CIFAR10_SIZES)}; choose one of them")
    if data.resize is not None or data.crop is not None:
        raise UserError("data.resize and data.crop are for images of different sizes, but cifar10's are all 32 x 32")
    if data.path is None and not (cache_folder() / "cifar10").is_dir():
        try:
            return _cifar10_on_hub(_CIFAR10_ON_HUB, data.split)
        except (UserError, RunError) as error:
            logger.warning("cannot read cifar10 from the Hugging Face Hub: %s; downloading its archive", error)
    if data.path is not None and on_hub(data.path):
        return _cifar10_on_hub(data.path, data.split)
    from torchvision.datasets import CIFAR10

    given = Path(data.path) if data.path is not None and not is_remote(data.path) else None
    if given is None or not (given / CIFAR10.base_folder).is_dir():
        given = _unpacked_cifar10(data)
    try:
        images = CIFAR10(given, train=data.split == "train")
    except RuntimeError:
        raise UserError(
            f"{given / CIFAR10.base_folder}: a file is missing or damaged (torchvision's md5 sums differ); delete the "
            f"folder and unpack {CIFAR10.filename} again"
        ) from None
    return RawImages(images.data, images.targets, 10)


def _cifar10_on_hub(path: str, split: str) -> Dataset:
    """Open CIFAR-10 as Parquet. Its samples have the same sha256 as those of the archive: it covers the pixels.

    Raises: UserError for other classes, another number of images, and images that are not 32 x 32 in colour.
    """
    rows = ParquetRows(parquet_files(path, split))
    if rows.class_names != _CIFAR10_CLASSES:
        raise UserError(
            f"{path}: its classes are {rows.class_names}, not those of CIFAR-10 in their order, so labels could "
            "be wrong; use another source of cifar10"
        )
    images = EncodedImages(rows, 10, always_rgb=True)
    pixels_NHWC, labels = np.empty((len(rows), 32, 32, 3), np.uint8), []
    for index in range(len(rows)):
        image_CHW, label, _ = images[index]
        if image_CHW.shape != (3, 32, 32):
            raise UserError(f"{path}: image {index} is not 32 x 32 pixels; use another source of cifar10")
        pixels_NHWC[index] = np.rint(image_CHW * 255).transpose(1, 2, 0)
        labels.append(label)
    return RawImages(pixels_NHWC, labels, 10)


def _unpacked_cifar10(data: Data) -> Path:
    """Return the cache folder that holds cifar-10-batches-py, unpacked from a local or a downloaded archive."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    root = cache_folder() / "cifar10"
    if data.path is not None and not is_remote(data.path):
        archive = Path(data.path)
        if archive.is_dir():
            archive /= CIFAR10.filename
        if not archive.is_file():
            raise UserError(
                f"data.path = {data.path!r}: contains neither {CIFAR10.base_folder} nor {CIFAR10.filename}; give the "
                "folder of one of them, or remove data.path to download it"
            )
    with node_lock(root):
        with suppress(RuntimeError):  # raised unless an earlier process has unpacked it completely
            CIFAR10(root, train=False)
            return root
        if data.path is None or is_remote(data.path):
            logger.info("cifar10 is not on this node; downloading %s (170 MB)", CIFAR10.filename)
            try:
                archive = fetch(data.path or CIFAR10.url)
            except (UserError, RunError) as error:
                raise UserError(
                    f"cannot download cifar10: {error}; or get {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}) elsewhere, "
                    "and set data.path to its folder"
                ) from error
        if not check_integrity(archive, CIFAR10.tgz_md5):
            raise UserError(
                f"{archive}: differs from the published {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}); use the "
                "published file"
            )
        try:
            extract_archive(archive, root)
        except OSError as error:
            raise RunError(
                f"{root}: cannot unpack {archive} ({error.strerror or error}); make 180 MB of space, or set "
                "DIFFSMOOTH_CACHE to another folder"
            ) from error
    return root


def _facts(data: Data) -> Facts | None:
    return Facts(_CIFAR10_SIZES[data.split], (3, 32, 32), 10) if data.split in _CIFAR10_SIZES else None


def _hub() -> str | None:
    return None if (cache_folder() / "cifar10").is_dir() else _CIFAR10_ON_HUB


ENTRY = DatasetEntry(open=_cifar10, facts=_facts, hub=_hub, benchmark="uoft-cs/cifar10", one_shape=True)
