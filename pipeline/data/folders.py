"""Folders of class folders."""

import os
from pathlib import Path

from diffsmooth.pipeline.data.entry import Dataset, DatasetEntry
from diffsmooth.pipeline.data.images import EncodedImages
from diffsmooth.pipeline.data.sources import IMAGE_ENDINGS, ImageFiles
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.locations import is_remote
from diffsmooth.pipeline.spec import Data


def _imagefolder(data: Data) -> Dataset:
    """Open a folder of class folders; classes are numbered in the order of their names, as by torchvision."""
    root = local_folder(data)
    classes = class_folders(root)
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


def local_folder(data: Data) -> Path:
    if data.path is None:
        raise UserError(f"data.path is missing, but data.name = {data.name!r} needs the folder of class folders")
    if is_remote(data.path):
        raise UserError(
            f"data.path = {data.path!r}: {data.name} reads only folders of this node; copy it here, or store the "
            "images as Parquet (data.name = 'parquet' reads s3://, gs:// and az://)"
        )
    return Path(data.path)


def class_folders(root: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(root) if os.path.isdir(root / name))
    except OSError as error:
        raise UserError(f"data.path = {str(root)!r}: {error.strerror}; give the folder of class folders") from None


ENTRY = DatasetEntry(open=_imagefolder)
