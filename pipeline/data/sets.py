"""DATASETS: name -> images in [0, 1], float32 CHW, and labels, by index."""

import hashlib

from diffsmooth.pipeline.data import cifar10, files, folders, imagenet, mnist
from diffsmooth.pipeline.data.entry import Dataset, DatasetEntry, Facts
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.locations import require_set
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.storage.hub import on_hub

DATASETS: dict[str, DatasetEntry] = {
    "mnist": mnist.MNIST,
    "fashion": mnist.FASHION,
    "cifar10": cifar10.ENTRY,
    "imagenet": imagenet.ENTRY,
    "imagefolder": folders.ENTRY,
    "parquet": files.PARQUET,
    "npz": files.NPZ,
    "csv": files.CSV,
}


def known_facts(data: Data) -> Facts | None:
    """Return the published size, shape and classes of a data set, or None if it must be opened to know them."""
    return DATASETS[data.name].facts(data) if data.name in DATASETS else None


def open_dataset(data: Data) -> Dataset:
    """Open the data set that a spec names.

    Raises: UserError for an unknown name and for data that cannot be read.
    """
    if data.name not in DATASETS:
        raise UserError(f"data.name = {data.name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if data.path is not None:
        require_set("data.path", data.path)
    try:
        return DATASETS[data.name].open(data)
    except OSError as error:  # such as a path that is too long, or a folder without permission
        shown = (data.path or data.name)[:200]
        raise UserError(f"data.path = {shown!r}: {error.strerror or error}") from error


def hub_location(data: Data) -> str | None:
    """The hf:// location that a data set is read from, if it is."""
    if data.path is not None:
        return data.path if on_hub(data.path) else None
    return DATASETS[data.name].hub() if data.name in DATASETS else None  # images in memory have no entry


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
