"""One Ray for all tests that do not kill it, bound to the loopback address; small runs without a trained network.

pytest-xdist runs the tests in two processes. All tests on the session's Ray run in one of them.
"""

import os

os.environ.pop("RAY_ADDRESS", None)  # no test may use the cluster of the person who runs the tests
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads anything; the fixture `hub` has a Hub of its own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # makes Ray use 127.0.0.1 for every address

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffsmooth.pipeline.spec import RunSpec, load_spec
from diffsmooth.pipeline.storage.store import Store
from tests.cloud_servers import azure_server, gcs_server  # noqa: F401  fixtures
from tests.hub_server import hub  # noqa: F401  fixture
from tests.processes import starting_ray
from tests.s3_servers import free_ports, moto_url, seaweed_url  # noqa: F401  fixtures

SLOWEST = ("ray", "test_chaos", "test_end_to_end", "test_submit", "test_elasticity", "test_store_s3")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist which tests share a process: those on the session's Ray, and those of one module.

    The slowest groups come first, so that no process is still busy with one of them at the end.
    """
    groups = {item: "ray" if "ray_session" in getattr(item, "fixturenames", ()) else item.path.stem for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    ranks = {group: rank for rank, group in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(groups[item], len(ranks)))


@dataclass(frozen=True, kw_only=True)
class RaySession:
    """The Ray of the test session."""

    address: str
    metrics_url: str  # where Prometheus would read the metrics


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """Start one Ray for all tests of this process. Commands that run in this process reuse their actors."""
    import ray

    import benchmarks.driver
    import diffsmooth.jobs.watch

    (port,) = free_ports(1)
    with starting_ray():
        context = ray.init(
            address="local",
            num_cpus=8,
            num_gpus=4,
            labels={"ray.io/accelerator-type": "H100"},
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 * 1024**2,
            _metrics_export_port=port,
            _system_config={"prestart_worker_first_driver": False, "metrics_report_interval_ms": 2000},
        )
    with pytest.MonkeyPatch.context() as patch:
        for module in (diffsmooth.jobs.watch, benchmarks.driver):
            patch.setattr(module, "Cluster", pooled_cluster())
        yield RaySession(address=context.address_info["address"], metrics_url=f"http://127.0.0.1:{port}/metrics")
    ray.shutdown()


def pooled_cluster() -> type:
    """A Cluster that passes its actors on to the next one, because each new actor imports torch for seconds.

    An actor that is passed on loads the models of the next run, as it does between the specs of one command.
    """
    from diffsmooth.cluster.cast import Cluster

    pool: list[Any] = []

    class PooledCluster(Cluster):
        def __init__(self, *, actors: int | None, **options: Any) -> None:
            super().__init__(actors=actors or 2, **options)

        def add_actor(self) -> Any:
            if not pool or self._options["num_gpus"]:
                return super().add_actor()
            self._created += 1
            actor = pool.pop()
            actor.name, actor.node = f"actor-{self._created}", ""
            self.actors[actor.name] = actor
            return actor

        def release(self, actors: Iterable[Any]) -> None:
            if self._options["num_gpus"]:
                super().release(actors)
                return
            for actor in actors:
                pool.append(self.actors.pop(actor.name))

    return PooledCluster


def write_images(path: Path) -> Path:
    """Eight 4 x 4 grey images, alternately of class 0 (dark) and 1 (bright), as Parquet."""
    from tests.models import png  # imports torch, which the process that only distributes tests does not need

    rows = [{"bytes": png(np.full((4, 4), 100 + 55 * (index % 2), np.uint8)), "path": None} for index in range(8)]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, image_type), "label": pa.array([index % 2 for index in range(8)])})
    pq.write_table(table, path, row_group_size=3)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images.parquet")


@pytest.fixture
def spec(raw_spec: dict[str, Any]) -> RunSpec:
    return load_spec(raw_spec)


@pytest.fixture
def made(spec: RunSpec, tmp_path: Path) -> tuple[RunSpec, Store]:
    """A run of the half-space on 8 images, and its spec."""
    from tests.models import make_run

    return spec, make_run(spec, tmp_path / "run")


@pytest.fixture
def home(made: tuple[RunSpec, Store], tmp_path: Path) -> str:
    """The folder of that run."""
    return str(tmp_path / "run")


@pytest.fixture
def raw_spec(images: Path) -> dict[str, Any]:
    return raw_half_space_spec(images)


def raw_half_space_spec(images: Path) -> dict[str, Any]:
    """A spec of the half-space classifier on those images: sigma 0.25, blocks of 50 and 100."""
    return {
        "name": "half-space",
        "data": {"name": "parquet", "path": str(images)},
        "classifier": {"arch": "tests.models:half_space"},
        "smoothing": {"sigma": 0.25, "n0": 50, "n": 200, "block": {"selection": 50, "estimation": 100}},
        "compute": {"device": "cpu"},
    }


def half_space_spec(images: Path) -> RunSpec:
    return load_spec(raw_half_space_spec(images))
