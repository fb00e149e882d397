"""`diffsmooth bench --storage`: what a run's storage costs: writing, listing, resuming, reading."""

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from jobs.bench.driver import _peak_memory
from pipeline.orders import Order
from pipeline.run import claim_run, describe_run
from pipeline.sampling import Sampler
from pipeline.spec import load_spec
from pipeline.storage.store import open_store
from pipeline.votes import BlockMetadata, block_key, encode_block, list_blocks, read_blocks, write_table

_WRITERS = 16


def bench_storage(uri: str, blocks: int) -> dict[str, Any]:
    """Write that many tiny blocks under a fresh prefix of `uri`, and time what a resumed run does with them.

    The blocks are left there. `seconds_to_resume` is all that a resumed run does between looking at its storage and
    handing out its first task.
    """
    spec = load_spec(
        {"name": "bench", "data": {"name": "none"}, "classifier": {"arch": "none"}, "smoothing": {"sigma": 1.0}}
    )
    run, lengths = describe_run(spec, {}, 1000), spec.smoothing.block
    order = Order(samples=list(range(-(-blocks // 11))), n0=100, n=10_000, alpha=0.001)
    wanted = list(order.blocks(lengths))
    metadata = BlockMetadata(
        votes_id=run.votes_id, sample_sha256="0" * 64, attempt=f"{0:016x}-1", device="none", versions={}, batch_size=1,
        threads=1, precision="fp32", seconds=0.0,
    )  # fmt: skip
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
        missing = Sampler(order, lengths, 1.0, committed=standing, read=lambda blocks: ()).start()
    with timed("seconds_to_read"):
        stored = read_blocks(store, run, standing)
    with timed("seconds_to_write_table"):
        write_table(store, run, stored)
    resume = seconds["seconds_to_list"] + seconds["seconds_to_find_missing"]
    return {
        "run": store.uri,
        "blocks": len(standing),
        "missing": len(missing),
        **seconds,
        "seconds_to_resume": resume,
        "mib": _peak_memory(),
    }


def describe_storage(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['run']}: {figures['blocks']:,} blocks written in {figures['seconds_to_write']:.1f} s, listed in "
        f"{figures['seconds_to_list']:.2f} s; a resumed run begins after {figures['seconds_to_resume']:.2f} s; "
        f"read in {figures['seconds_to_read']:.1f} s, votes.parquet in {figures['seconds_to_write_table']:.1f} s; "
        f"at most {figures['mib']:,.0f} MiB of memory"
    )
