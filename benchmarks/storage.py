"""`python -m benchmarks storage`: the cost of a run's storage: writing, listing, resuming, reading."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.certify.sampling import Sampler
from diffsmooth.pipeline.cost.speed import peak_memory
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import (
    BlockMetadata,
    block_key,
    encode_block,
    list_blocks,
    read_blocks,
    write_tables,
)
from diffsmooth.pipeline.votes.run import claim_run, describe_run

_WRITERS = 16
_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class StorageCost:
    """The times of a run's storage."""

    run: str
    blocks: int
    missing: int  # blocks of the order that were not written
    seconds_to_write: float
    seconds_to_list: float
    seconds_to_find_missing: float
    seconds_to_read: float
    seconds_to_write_tables: float  # reading included
    seconds_to_extend_tables: float  # by one block per hundred
    seconds_to_resume: float  # from opening the storage to the first task: listing and finding what is missing
    cpu_ms_to_write: float  # of this process per block, with its encoding
    cpu_ms_to_list: float
    cpu_ms_to_read: float  # with its decoding and checks
    mib: float  # peak memory

    def describe(self) -> str:
        return (
            f"{self.run}: {self.blocks:,} blocks written in {self.seconds_to_write:.1f} s, listed in "
            f"{self.seconds_to_list:.2f} s; a resumed run starts after {self.seconds_to_resume:.2f} s; read in "
            f"{self.seconds_to_read:.1f} s, with the tables written in {self.seconds_to_write_tables:.1f} s, which are "
            f"extended by 1 % in {self.seconds_to_extend_tables:.1f} s; CPU per block: {self.cpu_ms_to_write:.2f} ms "
            f"to write, {self.cpu_ms_to_list:.3f} ms to list, {self.cpu_ms_to_read:.2f} ms to read; peak memory "
            f"{self.mib:,.0f} MiB"
        )


def bench_storage(uri: str, blocks: int) -> StorageCost:
    """Write `blocks` small blocks below a new prefix of `uri`, and time what a resumed run does with them.

    The blocks are not deleted.
    """
    spec = load_spec(
        {"name": "bench", "data": {"name": "none"}, "classifier": {"arch": "none"}, "smoothing": {"sigma": 1.0}}
    )
    run, lengths = describe_run(spec, {}, _CLASSES), spec.smoothing.block
    order = Order(samples=list(range(-(-blocks // 10))), n0=100, n=10_000, alpha=0.001)
    wanted = list(order.blocks(lengths))
    metadata = BlockMetadata(
        votes_id=run.votes_id, sample_sha256="0" * 64, attempt=f"{0:016x}-1", device="none", versions={}, batch_size=1,
        threads=1, precision="fp32", seconds=0.0,
    )  # fmt: skip
    store = open_store(f"{uri.rstrip('/')}/bench-{os.urandom(4).hex()}")
    claim_run(store, run)
    seconds: dict[str, float] = {}
    cpu_ms: dict[str, float] = {}  # per block

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        seconds[name] = time.perf_counter() - start
        cpu_ms[name] = 1000 * (time.process_time() - cpu) / blocks

    def put(block: Block) -> None:
        label, counts_K = block.sample % _CLASSES, np.zeros(_CLASSES, np.int64)
        counts_K[[label, _CLASSES - 1 - label]] = block.draws - 10, 10
        store.put_if_absent(block_key(block), encode_block(block, label, counts_K, metadata))

    with timed("seconds_to_write"), ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(put, wanted[:blocks]))
    with timed("seconds_to_list"):
        committed = list_blocks(store, lengths)
    with timed("seconds_to_find_missing"):
        missing = Sampler(order, lengths, 1.0, committed=committed, read=lambda blocks: ()).start()
    with timed("seconds_to_read"):
        read_blocks(store, run, committed)
    with timed("seconds_to_write_tables"):
        sealed = write_tables(store, run).sha256()
    for block in wanted[blocks : blocks + blocks // 100]:
        put(block)
    with timed("seconds_to_extend_tables"):
        write_tables(store, run, sealed)
    return StorageCost(
        run=store.uri,
        blocks=len(committed),
        missing=len(missing),
        **seconds,
        seconds_to_resume=seconds["seconds_to_list"] + seconds["seconds_to_find_missing"],
        cpu_ms_to_write=cpu_ms["seconds_to_write"],
        cpu_ms_to_list=cpu_ms["seconds_to_list"],
        cpu_ms_to_read=cpu_ms["seconds_to_read"],
        mib=peak_memory() / 2**20,
    )
