"""One Ray for all tests that do not kill it, bound to the loopback address; small runs without a trained network.

pytest-xdist runs the tests in two processes: all that use that Ray in one of them, the others wherever there is time.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # makes Ray use 127.0.0.1 for every address

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.models import png
from tests.s3_servers import free_ports, moto_url, seaweed_url  # noqa: F401  fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that share a Ray in one process."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """Yields the URL of its metrics, as Prometheus reads them."""
    import ray

    (port,) = free_ports(1)
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 1024**2,
        _metrics_export_port=port,
    )
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


def write_images(path: Path) -> Path:
    """Eight 4 x 4 grey images, alternately of class 0 (dark) and 1 (bright), as Parquet."""
    rows = [{"bytes": png(np.full((4, 4), 100 + 55 * (index % 2), np.uint8)), "path": None} for index in range(8)]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, image_type), "label": pa.array([index % 2 for index in range(8)])})
    pq.write_table(table, path, row_group_size=3)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images.parquet")


@pytest.fixture
def raw_spec(images: Path) -> dict[str, Any]:
    """A spec of the half-space classifier on those images: sigma 0.25, blocks of 50 and 100."""
    return {
        "name": "half-space",
        "data": {"name": "parquet", "path": str(images)},
        "classifier": {"arch": "tests.models:half_space"},
        "smoothing": {"sigma": 0.25, "n0": 50, "n": 200, "block": {"selection": 50, "estimation": 100}},
        "compute": {"device": "cpu"},
    }
