"""`diffsmooth bench`: what the driver costs a task, what storage costs a run, and a fleet of spot GPUs simulated."""

import io
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.driver import Cluster, Work
from cluster.scheduler import Scheduler
from cluster.worker import Setup
from pipeline.orders import order_of
from pipeline.run import claim_run, describe_run
from pipeline.smoothing import weights_ids
from pipeline.spec import RunSpec, load_spec
from pipeline.storage.store import open_store

_DRAWS = 10  # per task: one block


def nothing(spec: RunSpec, device: Any) -> Callable[[Any], Any]:
    """A classifier of two classes that votes for the first."""
    import torch

    return lambda x_BCHW: torch.tensor([1.0, 0.0]).expand(len(x_BCHW), 2)


def bench_driver(tasks: int) -> dict[str, Any]:
    """Cast `tasks` one-block tasks of the do-nothing classifier on a local Ray; the driver's own time per task."""
    with tempfile.TemporaryDirectory(prefix="diffsmooth-bench-") as folder:
        data = Path(folder, "image.parquet")
        image = io.BytesIO()
        Image.fromarray(np.zeros((1, 1), np.uint8)).save(image, format="PNG")
        pq.write_table(pa.table({"image": [image.getvalue()], "label": [0]}), data)
        spec = load_spec(
            {
                "name": "bench",
                "data": {"name": "parquet", "path": str(data), "num_classes": 2},
                "classifier": {"arch": "jobs.bench.driver:nothing"},
                "smoothing": {
                    "sigma": 1.0,
                    "n0": _DRAWS,
                    "n": _DRAWS * tasks,
                    "block": {"selection": _DRAWS, "estimation": _DRAWS},
                },
                "compute": {"device": "cpu"},
            }
        )
        run, store = describe_run(spec, weights_ids(spec), 2), open_store(str(Path(folder, "run")))
        claim_run(store, run)
        blocks = list(order_of(spec, [0]).blocks(spec.smoothing.block))
        before = _peak_memory()
        with Cluster(address=None, device="cpu", actors=None) as cluster:
            work = Work(setup=Setup(spec, store.uri, run.votes_id, _DRAWS), blocks=blocks)
            outcome = cluster.cast(work, scheduler=Scheduler(target_seconds=0.0, first_draws=1))
    return {
        "tasks": outcome.tasks,
        "draws": outcome.draws,
        "seconds": outcome.seconds,
        "tasks_per_second": outcome.tasks / outcome.seconds,
        "driver_ms_per_task": 1000 * outcome.driver_seconds / outcome.tasks,
        "driver_mib": _peak_memory(),
        "driver_mib_before": before,  # Python, torch and Ray's code
    }


def _peak_memory() -> float:
    """The most that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def describe_driver(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['tasks']:,} tasks in {figures['seconds']:.1f} s ({figures['tasks_per_second']:,.0f}/s): "
        f"{figures['driver_ms_per_task']:.2f} ms of driver time per task, at most {figures['driver_mib']:,.0f} MiB "
        f"({figures['driver_mib_before']:,.0f} before the first)"
    )
