"""Where encoded images are stored: class folders of image files, and Parquet files.

A source returns the stored bytes and the label of a sample by its index.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.locations import is_remote
from diffsmooth.pipeline.records import LARGEST
from diffsmooth.pipeline.spec import MOST_CLASSES
from diffsmooth.pipeline.storage.remote import ObjectFile, in_parallel

UNLABELLED = -1

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision
_MOST_DECODED = 2_000_000_000  # bytes of a row group; a small file can decode to far more than its size
_DECODED_ROWS = 16  # rows that are decoded at a time
_CLASS_IN_NAME = re.compile(r"_n\d{8}(?=\.\w+$)")


class Source(Protocol):
    """Encoded images and their labels, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int]: ...

    def place(self, index: int) -> str:
        """Return the file that contains a sample."""
        ...


class ImageFiles:
    """The image files of class folders, in torchvision's order: classes as given, folders and files by name.

    Raises: UserError for a folder that links to one of its parents, RunError for one that cannot be read.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self._files: list[str] = []
        self._labels: list[int] = []
        for label, name in enumerate(classes):
            for folder, names in sorted(_walk(str(root / name))):
                found = [os.path.join(folder, one) for one in sorted(names) if one.lower().endswith(IMAGE_ENDINGS)]
                self._files += found
                self._labels += [label] * len(found)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path = self._files[index]
        try:
            return _read_file(path), self._labels[index]
        except OSError as error:
            raise RunError(
                f"{path}: cannot read the image of sample {index} ({error.strerror}); check the file and its disk, "
                "then run the same command again"
            ) from error

    def place(self, index: int) -> str:
        return self._files[index]

    def empty_classes(self, classes: Sequence[str]) -> list[str]:
        with_images = set(self._labels)
        return [name for label, name in enumerate(classes) if label not in with_images]


def _walk(root: str) -> list[tuple[str, list[str]]]:
    """Return every folder below `root`, links included, with the names of its files."""

    def refuse(error: OSError) -> None:
        raise RunError(
            f"{error.filename}: cannot read the folder ({error.strerror}); check its permissions, then run the same "
            "command again"
        ) from error

    found, real = [], {}
    for folder, _, names in os.walk(root, followlinks=True, onerror=refuse):
        real[folder] = os.path.realpath(folder)
        parent = folder
        while parent != root:
            parent = os.path.dirname(parent)
            if real[parent] == real[folder]:
                raise UserError(f"{folder}: this link leads to a folder that contains it; remove the link")
        found.append((folder, names))
    return found


def _read_file(path: str) -> bytes:
    """Read a regular file; anything else is refused without waiting for it, as opening a FIFO would."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read()


class ParquetRows:
    """Rows of {image: {bytes} or bytes, label: int}, in Hugging Face's layout; the column may be called `img`.

    Opening reads the footers only. A sample costs one row group, and the last row group is cached.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._files = in_parallel(_open_parquet, files, 8)
        self._names = files
        schemas = [file.schema_arrow for file in self._files]
        for name, schema in zip(files, schemas, strict=True):
            _check_columns(name, schema)
            if set(zip(schema.names, schema.types, strict=True)) != set(
                zip(schemas[0].names, schemas[0].types, strict=True)
            ):
                raise UserError(
                    f"{name}: its columns ({_columns(schema)}) differ from those of {files[0]} "
                    f"({_columns(schemas[0])}); use files of one data set"
                )
        self._image = "image" if "image" in schemas[0].names else "img"
        self._has_labels = "label" in schemas[0].names
        self._groups = [
            (number, group) for number, file in enumerate(self._files) for group in range(file.num_row_groups)
        ]
        self._rows = [self._files[number].metadata.row_group(group).num_rows for number, group in self._groups]
        if min(self._rows, default=0) < 0 or sum(self._rows) > LARGEST:
            raise UserError(f"{files[0]}: damaged (its metadata give {sum(self._rows)} rows)")
        self._starts = np.concatenate([[0], np.cumsum(self._rows)]).astype(np.int64)
        self._cached: tuple[int, pa.Table] = (-1, None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        place = self._group(index)
        if self._cached[0] != place:
            number, group = self._groups[place]
            columns = [self._image, "label"] if self._has_labels else [self._image]
            table = self._read(number, lambda file: self._decode_group(number, file, group, columns))
            if len(table) != self._rows[place]:
                raise UserError(f"{self._names[number]}: damaged (row group {group} lacks rows)")
            self._cached = (place, table)
        table, row = self._cached[1], index - int(self._starts[place])
        cell = table.column(self._image)[row].as_py()
        stored = cell["bytes"] if isinstance(cell, dict) else cell
        if stored is None:
            raise UserError(f"{self.place(index)}: sample {index} has no image bytes; store the encoded image itself")
        label = table.column("label")[row].as_py() if self._has_labels else None
        return stored, UNLABELLED if label is None else label

    def _decode_group(self, number: int, file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        """A row group, of which no more than _MOST_DECODED bytes are decoded. Raises: UserError for more."""
        batches: list[pa.RecordBatch] = []
        declared, size = file.metadata.row_group(group).total_byte_size, 0
        if declared <= _MOST_DECODED:
            for batch in file.iter_batches(_DECODED_ROWS, row_groups=[group], columns=columns):
                batches.append(batch)
                size += batch.nbytes
                if size > _MOST_DECODED:
                    break
        if max(declared, size) > _MOST_DECODED:
            raise UserError(
                f"{self._names[number]}: row group {group} holds more than {_MOST_DECODED:,} bytes; write smaller row "
                "groups"
            )
        return pa.Table.from_batches(batches)

    def place(self, index: int) -> str:
        return self._names[self._groups[self._group(index)][0]]

    def order_of_folders(self) -> list[int] | None:
        """The rows by class, then by the file names of the images, as in class folders; None without labels or names.

        The copy on the Hub appends the class to a name (ILSVRC2012_val_00000293_n01440764.JPEG).
        """
        schema = self._files[0].schema_arrow
        cell = schema.field(self._image).type
        if not (self._has_labels and pa.types.is_struct(cell) and cell.get_field_index("path") >= 0):
            return None
        columns = [f"{self._image}.path", "label"]
        tables = [self._read(number, lambda file: file.read(columns=columns)) for number in range(len(self._files))]
        table = pa.concat_tables(tables)
        labels, cells = table.column("label").to_pylist(), table.column(self._image).to_pylist()
        names = [None if cell is None or cell["path"] is None else str(cell["path"]) for cell in cells]
        if len(table) != len(self) or None in labels or None in names:
            return None
        files = [_CLASS_IN_NAME.sub("", str(name).rpartition("/")[2]) for name in names]
        return sorted(range(len(table)), key=lambda row: (labels[row], files[row]))

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes in Hugging Face's metadata, if any."""
        return _named_classes(self._files[0].schema_arrow)

    def count_classes(self) -> int:
        """Return the number of classes in Hugging Face's metadata, or else the greatest label plus one.

        Raises: UserError if neither exists.
        """
        found = None if self.class_names is None else len(self.class_names)
        if found is None and self._has_labels:
            tables = [
                self._read(number, lambda file: file.read(columns=["label"])) for number in range(len(self._files))
            ]
            greatest = [pc.max(table.column("label")).as_py() for table in tables]
            found = max((label for label in greatest if label is not None), default=UNLABELLED) + 1
        if found is None or found < 2:
            reason = "the only class is 0" if found == 1 else "there are no labels"
            raise UserError(
                f"data.path = {self._names[0]!r}: {reason}, so the classes cannot be counted; set data.num_classes"
            )
        if found > MOST_CLASSES:
            raise UserError(
                f"data.path = {self._names[0]!r}: label {found - 1} exceeds the limit of {MOST_CLASSES:,} classes; "
                "correct the labels, or set data.num_classes"
            )
        return found

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _read(self, number: int, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        with _parquet_errors(self._names[number]):
            return read(self._files[number])


class Reordered:
    """A source with its samples in another order."""

    def __init__(self, source: Source, order: Sequence[int]) -> None:
        self._source, self._order = source, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self._source[self._order[index]]

    def place(self, index: int) -> str:
        return self._source.place(self._order[index])


def _open_parquet(name: str) -> pq.ParquetFile:
    with _parquet_errors(name):
        if not is_remote(name) and not stat.S_ISREG(os.stat(name).st_mode):
            raise UserError(f"data.path = {name!r}: not a regular file; give the path of a Parquet file")
        file = pq.ParquetFile(ObjectFile(name) if is_remote(name) else name)
        assert file.schema_arrow is not None  # reads the schema, which can be damaged too
        return file


@contextmanager
def _parquet_errors(name: str) -> Iterator[None]:
    """Turn whatever pyarrow raises for a damaged file into a UserError."""
    try:
        yield
    except (UserError, RunError):
        raise
    except FileNotFoundError:
        raise UserError(f"data.path = {name!r}: no such file") from None
    except Exception as error:  # ArrowException, OSError, UnicodeDecodeError, ...
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"data.path = {name[:200]!r}: damaged, or not a Parquet file ({reason})") from error


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _check_columns(name: str, schema: pa.Schema) -> None:
    """Raises: UserError unless one column holds encoded images and `label`, if it exists, holds integers."""
    repeated = next((column for column in ("image", "img", "label") if schema.names.count(column) > 1), None)
    if repeated is not None:
        raise UserError(f"data.path = {name!r}: there are several columns {repeated!r}; remove all but one")
    image = next((column for column in ("image", "img") if column in schema.names), None)
    if image is None:
        raise UserError(
            f"data.path = {name!r}: no column 'image' or 'img' among {', '.join(schema.names)}; rename the column of "
            "images, or use another file"
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"data.path = {name!r}: column {image!r} is {kind}; it must hold encoded images as bytes")
    if "label" in schema.names and not pa.types.is_integer(schema.field("label").type):
        raise UserError(f"data.path = {name!r}: column 'label' is {schema.field('label').type}; it must hold integers")


def _named_classes(schema: pa.Schema) -> list[str] | None:
    """Return the class names that Hugging Face's metadata contain for the column `label`, if any."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):  # these metadata are optional
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"]["label"]["names"]
        return names if isinstance(names, list) else None
    return None
