"""Parquet files of ours: what they declare is checked before anything is decoded, and their checksums are verified."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

METADATA_KEY = b"diffsmooth"  # of the JSON in a file's metadata
ROW_BYTES = 200  # at most, of a row of numbers and short strings
_OVERHEAD = 100_000  # bytes
_LARGEST_EXPANSION = 1000  # of a file that declares more than this many bytes ...
_FREE_BYTES = 50_000_000  # ... if those are more than these


def open_table(
    data: bytes, most_rows: int, *, least_rows: int = 0, row_bytes: int = ROW_BYTES, schema: pa.Schema | None = None
) -> pq.ParquetFile:
    """A Parquet file, with nothing decoded yet; `schema` has the columns that it must have.

    Raises: ValueError if it declares fewer or more rows, more bytes, or other columns than such a file has; what
    pyarrow raises for a damaged file.
    """
    # not pq.read_table, which takes four times as long: it sets up a data set for each file
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    metadata = file.metadata
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    too_large = size > row_bytes * most_rows + _OVERHEAD or size > max(_FREE_BYTES, _LARGEST_EXPANSION * len(data))
    if not least_rows <= metadata.num_rows <= most_rows or too_large:
        raise ValueError(f"{metadata.num_rows} rows of {size} bytes")
    if schema is not None and _columns(file.schema_arrow) != _columns(schema):
        names = ", ".join(f"{name}: {kind}" for name, kind in _columns(file.schema_arrow))
        raise ValueError(f"columns {names}"[:200])
    return file


def described(file: pq.ParquetFile) -> bytes:
    """The JSON in the metadata of a file, `{}` if there is none."""
    metadata: Mapping[bytes, bytes] = file.schema_arrow.metadata or {}
    return metadata.get(METADATA_KEY, b"{}")


def _columns(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in schema]
