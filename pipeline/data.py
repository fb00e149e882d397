"""DATASETS: name -> images in [0, 1] float32 CHW and labels, by index.

A sample's sha256 covers its stored bytes and its label, so that a block says of which image it holds votes.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import RunError, UserError
from pipeline.images import UNLABELLED, EncodedImages, Sample
from pipeline.locations import is_remote, require_set
from pipeline.spec import Data
from pipeline.storage.fetch import cache_folder, fetch, node_lock
from pipeline.storage.remote import S3File, list_s3

logger = logging.getLogger(__name__)

_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's
# sha256 of the 1000 sorted class names of ILSVRC-2012, a newline between them; sorted order is the order of the classes
_IMAGENET_CLASSES = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


class Facts(NamedTuple):
    """What is known of a data set that has not been opened."""

    size: int
    shape_CHW: tuple[int, int, int]
    num_classes: int


class Dataset(Protocol):
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class RawImages:
    """Images that stand in memory as pixels_NHWC, uint8."""

    def __init__(self, pixels_NHWC: NDArray[np.uint8], labels: Sequence[int], num_classes: int) -> None:
        self.num_classes = num_classes
        self._pixels_NHWC, self._labels = pixels_NHWC, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pixels_HWC, label = np.ascontiguousarray(self._pixels_NHWC[index]), int(self._labels[index])
        image_CHW = pixels_HWC.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        return Sample(image_CHW, label, hashlib.sha256(pixels_HWC.tobytes() + str(label).encode()).hexdigest())


class ParquetRows:
    """Rows of {image: {bytes} or bytes, label: int} (Hugging Face's layout; the column may be called `img`).

    Only the footers are read first; a sample costs one row group, of which the last one read is kept.
    """

    def __init__(self, files: Sequence[str]) -> None:
        with ThreadPoolExecutor(8) as pool:
            self._files = list(pool.map(_open_parquet, files))
        self._names = files
        schemas = [file.schema_arrow for file in self._files]
        for name, schema in zip(files, schemas, strict=True):
            if dict(zip(schema.names, schema.types, strict=True)) != dict(
                zip(schemas[0].names, schemas[0].types, strict=True)
            ):
                raise UserError(
                    f"{name}: its columns ({_columns(schema)}) differ from those of {files[0]} "
                    f"({_columns(schemas[0])}): give files of one data set"
                )
        self._image = _image_column(files[0], schemas[0])
        self._has_labels = "label" in schemas[0].names
        self._groups = [
            (number, group) for number, file in enumerate(self._files) for group in range(file.num_row_groups)
        ]
        rows = [self._files[number].metadata.row_group(group).num_rows for number, group in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._cached: tuple[int, pa.Table] = (-1, None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        place = self._group(index)
        if self._cached[0] != place:
            number, group = self._groups[place]
            columns = [self._image, "label"] if self._has_labels else [self._image]
            self._cached = (place, self._read(number, lambda file: file.read_row_group(group, columns=columns)))
        table, row = self._cached[1], index - int(self._starts[place])
        cell = table.column(self._image)[row].as_py()
        stored = cell["bytes"] if isinstance(cell, dict) else cell
        if stored is None:
            raise UserError(f"{self.place(index)}: sample {index} has no image bytes: store the encoded image itself")
        label = table.column("label")[row].as_py() if self._has_labels else None
        return stored, UNLABELLED if label is None else label

    def place(self, index: int) -> str:
        return self._names[self._groups[self._group(index)][0]]

    def count_classes(self) -> int:
        """As Hugging Face's metadata says, else one more than the greatest label. Raises: UserError for neither."""
        found = _named_classes(self._files[0].schema_arrow)
        if found is None and self._has_labels:
            tables = [
                self._read(number, lambda file: file.read(columns=["label"])) for number in range(len(self._files))
            ]
            greatest = [pc.max(table.column("label")).as_py() for table in tables]
            found = max((label for label in greatest if label is not None), default=UNLABELLED) + 1
        if found is None or found < 2:
            raise UserError(f"data.path = {self._names[0]!r}: no labels to count classes by; set data.num_classes")
        return found

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _read(self, number: int, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        try:
            return read(self._files[number])
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{self._names[number]}: damaged ({error}); get the file again") from error


def _open_parquet(name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(S3File(name) if is_remote(name) else name)
    except FileNotFoundError:
        raise UserError(f"data.path = {name!r}: no such file; give the path of a Parquet file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path = {name!r}: damaged, or not a Parquet file ({error}); get it again") from error


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _image_column(name: str, schema: pa.Schema) -> str:
    """Which column holds the images. Raises: UserError where none does, or the labels are no integers."""
    image = next((column for column in ("image", "img") if column in schema.names), None)
    if image is None:
        raise UserError(f"data.path = {name!r}: no column 'image' or 'img' among {', '.join(schema.names)}; name it so")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"data.path = {name!r}: column {image!r} is {kind}; it must hold encoded images as bytes")
    if "label" in schema.names and not pa.types.is_integer(schema.field("label").type):
        raise UserError(f"data.path = {name!r}: column 'label' is {schema.field('label').type}; it must hold integers")
    return image


def _named_classes(schema: pa.Schema) -> int | None:
    """How many class names Hugging Face's metadata holds for the column `label`."""
    with suppress(ValueError, KeyError, TypeError):
        described = json.loads((schema.metadata or {})[b"huggingface"])
        return len(described["info"]["features"]["label"]["names"])
    return None


class ImageFiles:
    """The files of class folders, in torchvision's order: classes as given, folders and files by name."""

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self._files: list[str] = []
        self._labels: list[int] = []
        for label, name in enumerate(classes):
            for folder, _, names in sorted(os.walk(root / name, followlinks=True)):
                found = [os.path.join(folder, one) for one in sorted(names) if one.lower().endswith(_ENDINGS)]
                self._files += found
                self._labels += [label] * len(found)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            return Path(self._files[index]).read_bytes(), self._labels[index]
        except OSError as error:
            raise RunError(
                f"{self._files[index]}: cannot be read: {error.strerror}; sample {index}; "
                "check its disk, and run the same command again"
            ) from error

    def place(self, index: int) -> str:
        return self._files[index]

    def empty_classes(self, classes: Sequence[str]) -> list[str]:
        filled = set(self._labels)
        return [name for label, name in enumerate(classes) if label not in filled]


def _mnist(data: Data) -> Dataset:
    if data.split != "heldout":
        raise UserError(
            f"data.split = {data.split!r}: the embedded mnist has the split 'heldout' only "
            "(1,000 images held out from training, not the MNIST test set): set it to that"
        )
    embedded = str(resources.files("pipeline.embedded") / "mnist.parquet")
    return EncodedImages(ParquetRows([data.path or embedded]), 10, resize=data.resize, crop=data.crop)


def _cifar10(data: Data) -> Dataset:
    if data.split not in _CIFAR10_SIZES:
        raise UserError(f"data.split = {data.split!r}: cifar10 has {' and '.join(_CIFAR10_SIZES)}: set one of them")
    if data.resize is not None or data.crop is not None:
        raise UserError(
            "data.resize and data.crop are for images of unequal size: cifar10's are all 32 x 32: leave them out"
        )
    from torchvision.datasets import CIFAR10

    given = Path(data.path) if data.path is not None and not is_remote(data.path) else None
    if given is None or not (given / CIFAR10.base_folder).is_dir():
        given = _unpacked_cifar10(data)
    try:
        images = CIFAR10(given, train=data.split == "train")
    except RuntimeError:
        raise UserError(
            f"{given / CIFAR10.base_folder}: a file is missing or damaged (torchvision's md5 sums differ): delete the "
            f"folder and unpack {CIFAR10.filename} again"
        ) from None
    return RawImages(images.data, images.targets, 10)


_CIFAR10_SIZES = {"test": 10_000, "train": 50_000}


def _unpacked_cifar10(data: Data) -> Path:
    """The cache's folder that holds cifar-10-batches-py, unpacked from the archive at data.path or a downloaded one."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    root = cache_folder() / "cifar10"
    if data.path is not None and not is_remote(data.path):
        archive = Path(data.path)
        if archive.is_dir():
            archive /= CIFAR10.filename
        if not archive.is_file():
            raise UserError(
                f"data.path = {data.path!r}: neither {CIFAR10.base_folder} nor {CIFAR10.filename} stands there: name "
                "the folder that holds one of them, or leave data.path out to have it downloaded"
            )
    with node_lock(root):
        with suppress(RuntimeError):
            CIFAR10(root, train=False)
            return root
        if data.path is None or is_remote(data.path):
            logger.info("cifar10 is not on this node: fetching %s (170 MB)", CIFAR10.filename)
            try:
                archive = fetch(data.path or CIFAR10.url)
            except (UserError, RunError) as error:
                raise UserError(
                    f"cifar10 cannot be downloaded: {error}; or get {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}) "
                    "elsewhere, put it into a folder, and name that in data.path"
                ) from error
        if not check_integrity(archive, CIFAR10.tgz_md5):
            raise UserError(
                f"{archive}: not {CIFAR10.filename} as published (md5 {CIFAR10.tgz_md5}): delete it and get it again"
            )
        try:
            extract_archive(archive, root)
        except OSError as error:
            raise RunError(
                f"{root}: cannot unpack {archive}: {error.strerror or error}; 180 MB are needed: free some space, or "
                "set DIFFSMOOTH_CACHE to another folder"
            ) from error
    return root


def _imagenet(data: Data) -> Dataset:
    """ILSVRC-2012's validation (or training) images in class folders."""
    if data.split not in _IMAGENET_FOLDERS:
        raise UserError(
            f"data.split = {data.split!r}: imagenet has the splits test (its validation images, also called val) and "
            "train: set one of them"
        )
    root = _folder(data)
    if (root / _IMAGENET_FOLDERS[data.split]).is_dir():
        root /= _IMAGENET_FOLDERS[data.split]
    classes = [name for name in _class_folders(root) if re.fullmatch(r"n\d{8}", name)]
    if not classes and any(root.glob("ILSVRC2012_*.JPEG")):
        raise UserError(
            f"{root}: the images lie in one folder, which does not tell their classes: sort them into the 1000 class "
            "folders n01440764 ... n15075141 first (ILSVRC2012_validation_ground_truth.txt of the development kit)"
        )
    if len(classes) != 1000:
        example = f", {classes[0]} the first" if classes else ""
        raise UserError(
            f"{root}: found {len(classes)} class folders (n and 8 digits){example}, but ImageNet has 1000: name the "
            "folder that holds all of them, or that holds val/; for a choice of classes use data.name = 'imagefolder'"
        )
    if hashlib.sha256("\n".join(classes).encode()).hexdigest() != _IMAGENET_CLASSES:
        raise UserError(
            f"{root}: its 1000 class folders ({classes[0]} to {classes[-1]}) are not those of ILSVRC-2012 (n01440764 "
            "to n15075141), so that labels would be wrong: use ILSVRC-2012, or data.name = 'imagefolder'"
        )
    files = ImageFiles(root, classes)
    if not len(files):
        raise UserError(f"{root}: its class folders hold no image ({', '.join(_ENDINGS)}): put the images there")
    logger.info("imagenet: classes 0 %s to 999 %s, %s images in %s", classes[0], classes[-1], f"{len(files):,}", root)
    return EncodedImages(files, 1000, resize=data.resize, crop=data.crop, always_rgb=True)


_IMAGENET_FOLDERS = {"test": "val", "val": "val", "train": "train"}


def _imagefolder(data: Data) -> Dataset:
    """A folder per class, the classes numbered in the order of their names, as torchvision's ImageFolder does."""
    root = _folder(data)
    classes = _class_folders(root)
    if not classes:
        raise UserError(f"data.path = {str(root)!r}: no folder in it; it must hold a folder of images per class")
    if set(classes) <= {"train", "val", "validation", "test"}:
        raise UserError(
            f"data.path = {str(root)!r} holds {', '.join(classes)}, which are splits, not classes: name one of them"
        )
    files = ImageFiles(root, classes)
    if empty := files.empty_classes(classes):
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise UserError(
            f"data.path = {str(root)!r}: no image ({', '.join(_ENDINGS)}) in the class folder {', '.join(empty[:3])}"
            f"{more}, which yet counts as a class: remove the folder, or put its images there"
        )
    num_classes = data.num_classes or len(classes)
    if num_classes < 2:
        raise UserError(f"data.path = {str(root)!r}: only the class folder {classes[0]}; set data.num_classes")
    return EncodedImages(files, num_classes, resize=data.resize, crop=data.crop, always_rgb=True)


def _folder(data: Data) -> Path:
    if data.path is None:
        raise UserError(
            f"data.path is missing: data.name = {data.name!r} needs the folder that holds the class folders"
        )
    if is_remote(data.path):
        raise UserError(
            f"data.path = {data.path!r}: {data.name} reads folders of this node only: copy it here, or store the "
            "images as Parquet (data.name = 'parquet' reads s3://)"
        )
    return Path(data.path)


def _class_folders(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise UserError(f"data.path = {str(root)!r}: {error.strerror}; name the folder of class folders") from None


def _parquet(data: Data) -> Dataset:
    if data.path is None:
        raise UserError("data.path is missing: data.name = 'parquet' needs the path of a Parquet file")
    rows = ParquetRows(_parquet_files(data.path, data.split))
    return EncodedImages(rows, data.num_classes or rows.count_classes(), resize=data.resize, crop=data.crop)


def _parquet_files(path: str, split: str) -> list[str]:
    """The file that is meant, or the files of a split in a folder, by name."""
    if path.startswith(("https://", "http://")):
        return [str(fetch(path))]
    if path.startswith("s3://"):
        if path.endswith(".parquet"):
            return [path]
        found = list_s3(path)
    elif Path(path).is_dir():
        found = sorted(str(one) for one in Path(path).iterdir())
    else:
        return [path]
    names = {one: one.rpartition("/")[2] for one in found}
    files = [one for one in found if names[one].endswith(".parquet") and not names[one].startswith(".")]
    if not files:
        raise UserError(f"data.path = {path!r}: no *.parquet in it; name a Parquet file, or the folder of several")
    of_split = [one for one in files if names[one].startswith(split)]
    others = sorted({match[1] for one in files if (match := re.match(r"(.+)-\d{5}-of-\d{5}", names[one]))})
    if not of_split and others:  # the images of another split, taken for those asked for, would go unnoticed
        raise UserError(f"data.split = {split!r}: {path} holds {', '.join(others)}; set data.split to one of them")
    return of_split or files


DATASETS: dict[str, Callable[[Data], Dataset]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagenet": _imagenet,
    "imagefolder": _imagefolder,
    "parquet": _parquet,
}


def known_facts(data: Data) -> Facts | None:
    """Size, shape and classes of a data set as published, without opening it; None where only opening tells."""
    if data.name == "mnist" and data.path is None and data.resize is None and data.crop is None:
        return Facts(1000, (1, 28, 28), 10)
    if data.name == "cifar10" and data.split in _CIFAR10_SIZES:
        return Facts(_CIFAR10_SIZES[data.split], (3, 32, 32), 10)
    if data.name == "imagenet" and data.split in _IMAGENET_FOLDERS and data.crop is not None:
        return Facts(1_281_167 if data.split == "train" else 50_000, (3, data.crop, data.crop), 1000)
    return None


def open_dataset(data: Data) -> Dataset:
    """The data set that a spec names.

    Raises: UserError for an unknown name and for what cannot be read.
    """
    if data.name not in DATASETS:
        raise UserError(f"data.name = {data.name!r} is unknown: choose one of {', '.join(DATASETS)}")
    if data.path is not None:
        require_set("data.path", data.path)
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
            f"so it must be 0 <= start < stop <= {size} and step >= 1"
        )
    if start >= stop:
        raise UserError(f"data.samples = {samples!r} names no sample: start must lie below stop")
    return range(start, stop, step)
