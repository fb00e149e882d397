"""ILSVRC-2012: class folders, or Parquet on the Hugging Face Hub, with the same samples in the same order."""

import hashlib
import logging
import re
from collections.abc import Sequence

from diffsmooth.pipeline.data.entry import Dataset, DatasetEntry, Facts
from diffsmooth.pipeline.data.files import parquet_files
from diffsmooth.pipeline.data.folders import class_folders, local_folder
from diffsmooth.pipeline.data.images import EncodedImages
from diffsmooth.pipeline.data.sources import IMAGE_ENDINGS, ImageFiles, ParquetRows, Reordered
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.storage.hub import on_hub

logger = logging.getLogger(__name__)

# sha256 of the 1000 sorted class names of ILSVRC-2012, joined by newlines; the sorted order is that of the classes
_IMAGENET_CLASSES = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
_IMAGENET_FOLDERS = {"test": "val", "val": "val", "train": "train"}
_IMAGENET_ON_HUB = "hf://datasets/ILSVRC/imagenet-1k"
_IMAGENET_HUB_SPLITS = {"test": "validation", "val": "validation", "train": "train"}
# classes with the same name in WordNet: what they may be called instead of as in torchvision
_AMBIGUOUS_CLASSES = {134: {"crane"}, 517: {"crane2", "crane machine"}, 639: {"maillot"}}


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
    root = local_folder(data)
    if (root / _IMAGENET_FOLDERS[data.split]).is_dir():
        root /= _IMAGENET_FOLDERS[data.split]
    classes = [name for name in class_folders(root) if re.fullmatch(r"n\d{8}", name)]
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
    rows = ParquetRows(parquet_files(path, _IMAGENET_HUB_SPLITS[data.split]))
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


def _facts(data: Data) -> Facts | None:
    if data.split not in _IMAGENET_FOLDERS or data.crop is None:
        return None
    return Facts(1_281_167 if data.split == "train" else 50_000, (3, data.crop, data.crop), 1000)


ENTRY = DatasetEntry(
    open=_imagenet, facts=_facts, hub=lambda: _IMAGENET_ON_HUB, benchmark="ILSVRC/imagenet-1k", one_shape=True
)
