"""`python -m benchmarks driver`: the driver's own time per task, with a classifier that does nothing on a local Ray."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffsmooth.cluster.cast import Cluster, Work
from diffsmooth.cluster.scheduler import Scheduler
from diffsmooth.cluster.worker import Setup
from diffsmooth.pipeline.certify.orders import order_of
from diffsmooth.pipeline.cost.speed import peak_memory
from diffsmooth.pipeline.smoothing import weights_ids
from diffsmooth.pipeline.spec import RunSpec, load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.run import claim_run, describe_run

_DRAWS = 10  # per task: one block
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class DriverCost:
    """What the driver's work cost."""

    tasks: int
    draws: int
    seconds: float
    tasks_per_second: float
    driver_ms_per_task: float
    driver_mib: float  # peak memory
    driver_mib_before: float  # peak memory before the first task: Python, torch and Ray

    def describe(self) -> str:
        return (
            f"{self.tasks:,} tasks in {self.seconds:.1f} s ({self.tasks_per_second:,.0f}/s): "
            f"{self.driver_ms_per_task:.2f} ms of driver time per task, peak memory {self.driver_mib:,.0f} MiB "
            f"({self.driver_mib_before:,.0f} MiB before the first task)"
        )


def nothing(spec: RunSpec, device: Any) -> Callable[[Any], Any]:
    """A classifier of two classes that always votes for the first."""
    return lambda x_BCHW: torch.tensor([1.0, 0.0]).expand(len(x_BCHW), 2)


def bench_driver(tasks: int) -> DriverCost:
    """Run `tasks` tasks of one block each, with a classifier that does nothing."""
    with tempfile.TemporaryDirectory(prefix="diffsmooth-bench-") as folder:
        spec = _make_spec(Path(folder), tasks)
        run, store = describe_run(spec, weights_ids(spec), 2), open_store(str(Path(folder, "run")))
        claim_run(store, run)
        blocks = list(order_of(spec, [0]).blocks(spec.smoothing.block))
        before = peak_memory()
        with Cluster(address=None, device="cpu", actors=None) as cluster:
            work = Work(setup=Setup(spec, store.uri, run.votes_id, _DRAWS), blocks=blocks)
            outcome = cluster.cast(work, scheduler=Scheduler(target_seconds=0.0, first_draws=1))
    return DriverCost(
        tasks=outcome.tasks,
        draws=outcome.draws,
        seconds=outcome.seconds,
        tasks_per_second=outcome.tasks / outcome.seconds,
        driver_ms_per_task=1000 * outcome.driver_seconds / outcome.tasks,
        driver_mib=peak_memory() / _MIB,
        driver_mib_before=before / _MIB,
    )


def _make_spec(folder: Path, tasks: int) -> RunSpec:
    """A spec of one image of one pixel, whose blocks of `_DRAWS` draws make `tasks` tasks of estimation."""
    data, image = folder / "image.parquet", io.BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(image, format="PNG")
    pq.write_table(pa.table({"image": [image.getvalue()], "label": [0]}), data)
    lengths = {"selection": _DRAWS, "estimation": _DRAWS}
    return load_spec(
        {
            "name": "bench",
            "data": {"name": "parquet", "path": str(data), "num_classes": 2},
            "classifier": {"arch": "benchmarks.driver:nothing"},
            "smoothing": {"sigma": 1.0, "n0": _DRAWS, "n": _DRAWS * tasks, "block": lengths},
            "compute": {"device": "cpu"},
        }
    )
