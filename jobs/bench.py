"""`diffsmooth bench`: what the driver costs a task, what storage costs a run, and a fleet of spot GPUs simulated."""

import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.sampling import Order, Sampler, blocks_of, order_of
from pipeline.spec import BlockLengths, RunSpec, load_spec
from pipeline.store import open_store
from pipeline.votes import block_key, claim_run, encode_block, list_blocks, read_blocks, run_of, write_table

_DRAWS = 10  # per task: one block
_WRITERS = 16
_IMAGENET_RATE = 170.0  # draws per second of an H100 at 40 % of its bf16 peak: DiffSmooth takes 2.33 TFLOP a draw


def nothing(spec: RunSpec, device: Any) -> Callable[[Any], Any]:
    """A classifier of two classes that votes for the first."""
    import torch

    return lambda x_BCHW: torch.tensor([1.0, 0.0]).expand(len(x_BCHW), 2)


def bench_driver(tasks: int) -> dict[str, Any]:
    """Cast `tasks` one-block tasks of the do-nothing classifier on a local Ray; the driver's own time per task."""
    from cluster.driver import Cluster
    from cluster.scheduler import Scheduler
    from cluster.worker import Setup
    from pipeline.smoothing import weights_ids

    with tempfile.TemporaryDirectory(prefix="diffsmooth-bench-") as folder:
        data = Path(folder, "image.parquet")
        image = io.BytesIO()
        Image.fromarray(np.zeros((1, 1), np.uint8)).save(image, format="PNG")
        pq.write_table(pa.table({"image": [image.getvalue()], "label": [0]}), data)
        spec = load_spec(
            {
                "name": "bench",
                "data": {"name": "parquet", "path": str(data), "num_classes": 2},
                "classifier": {"arch": "jobs.bench:nothing"},
                "smoothing": {
                    "sigma": 1.0,
                    "n0": _DRAWS,
                    "n": _DRAWS * tasks,
                    "block": {"selection": _DRAWS, "estimation": _DRAWS},
                },
                "compute": {"device": "cpu"},
            }
        )
        described, store = run_of(spec, weights_ids(spec), 2), open_store(str(Path(folder, "run")))
        claim_run(store, described)
        blocks = list(blocks_of(order_of(spec, [0]), spec.smoothing.block))
        before = _peak_memory()
        with Cluster(address=None, device="cpu", actors=None) as cluster:
            outcome = cluster.cast(
                Setup(spec, store.uri, described["votes_id"], _DRAWS),
                blocks,
                scheduler=Scheduler(target_seconds=0.0, first_draws=1),
            )
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


def bench_storage(uri: str, blocks: int) -> dict[str, Any]:
    """Write that many tiny blocks under a fresh prefix of `uri`, and time what a resumed run does with them.

    The blocks are left there. `seconds_to_resume` is all that a resumed run does between looking at its storage and
    handing out its first task.
    """
    lengths = BlockLengths(selection=100, estimation=1000)
    order = Order(samples=list(range(-(-blocks // 11))), n0=100, n=10_000, alpha=0.001)
    wanted = list(blocks_of(order, lengths))
    spec = {"smoothing": {"block": lengths.model_dump()}}
    run = {"votes_id": "0" * 32, "num_classes": 1000, "name": "bench", "spec": spec}
    metadata = {"votes_id": run["votes_id"], "sample_sha256": "0" * 64, "attempt": f"{0:016x}-1", "device": "none"}
    store = open_store(f"{uri.rstrip('/')}/bench-{os.urandom(4).hex()}")
    store.prepare()
    claim_run(store, run)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    def put(block: Any) -> None:
        counts_K = np.zeros(1000, np.int64)
        counts_K[[block.sample % 1000, 999 - block.sample % 1000]] = block.draws - 10, 10
        store.put_if_absent(block_key(block), encode_block(block, block.sample % 1000, counts_K, metadata))

    with timed("seconds_to_write"), ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(put, wanted[:blocks]))
    with timed("seconds_to_list"):
        standing = list_blocks(store, lengths)
    with timed("seconds_to_find_missing"):
        missing = Sampler(store, "001", order, lengths, 1.0, standing, lambda blocks: ()).start()
    with timed("seconds_to_read"):
        stored = read_blocks(store, standing)
    with timed("seconds_to_write_table"):
        write_table(store, stored)
    resume = seconds["seconds_to_list"] + seconds["seconds_to_find_missing"]
    return {
        "run": store.uri,
        "blocks": len(standing),
        "missing": len(missing),
        **seconds,
        "seconds_to_resume": resume,
        "mib": _peak_memory(),
    }


def bench_simulation(seed: int = 0) -> list[dict[str, Any]]:
    """ImageNet's 50,000 images (n0 = 100, n = 10,000) on simulated fleets: see `cluster.simulate`."""
    from cluster.simulate import Fleet, imagenet_blocks, simulate

    blocks = list(imagenet_blocks())
    rows = []
    for gpus in (8, 64, 1024):
        for preemptions, notice in ((0.0, 0.0), (0.05, 0.0), (0.05, 120.0)):
            fleet = Fleet(gpus=gpus, draws_per_second=_IMAGENET_RATE, preemptions_per_hour=preemptions, notice=notice)
            result = simulate(blocks, fleet, seed=seed)
            rows.append(
                {
                    "gpus": gpus,
                    "preemptions_per_gpu_hour": preemptions,
                    "notice_seconds": notice,
                    "hours": result.makespan / 3600,
                    "makespan_over_ideal": result.makespan / result.ideal,
                    "preemptions": result.preemptions,
                    "share_lost": result.lost / result.computed,
                    "share_repeated": result.repeated / result.computed,
                    "copies": result.copies,
                    "blocks_done": result.blocks_done,
                    "tasks": result.tasks,
                    "scheduler_cpu_seconds": result.scheduler_seconds,
                }
            )
    return rows


def describe_driver(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['tasks']:,} tasks in {figures['seconds']:.1f} s ({figures['tasks_per_second']:,.0f}/s): "
        f"{figures['driver_ms_per_task']:.2f} ms of driver time per task, at most {figures['driver_mib']:,.0f} MiB "
        f"({figures['driver_mib_before']:,.0f} before the first)"
    )


def describe_storage(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['run']}: {figures['blocks']:,} blocks written in {figures['seconds_to_write']:.1f} s, listed in "
        f"{figures['seconds_to_list']:.2f} s; a resumed run begins after {figures['seconds_to_resume']:.2f} s; "
        f"read in {figures['seconds_to_read']:.1f} s, votes.parquet in {figures['seconds_to_write_table']:.1f} s; "
        f"at most {figures['mib']:,.0f} MiB of memory"
    )


def describe_simulation(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["GPUs  preempted/h  notice   hours  over ideal  preemptions  work lost   repeated  scheduler CPU"]
    lines += [
        f"{row['gpus']:>4}  {row['preemptions_per_gpu_hour']:>11.0%}  {row['notice_seconds']:>4.0f} s  "
        f"{row['hours']:>6.2f}  {row['makespan_over_ideal'] - 1:>10.3%}  {row['preemptions']:>11}  "
        f"{row['share_lost']:>9.4%}  {row['share_repeated']:>9.4%}  {row['scheduler_cpu_seconds']:>11.1f} s"
        for row in rows
    ]
    return "\n".join(lines)
