"""Worker: one device with f loaded once. It casts the votes of a task's blocks, and commits each block as it finishes.

It does not know Ray.
"""

import functools
import itertools
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import NamedTuple, Self

import numpy as np
import torch

from diffsmooth.cluster import compiled
from diffsmooth.pipeline.attack.record import Attack
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.casting import CastBlock, CastOptions, cast_votes
from diffsmooth.pipeline.data.entry import Dataset
from diffsmooth.pipeline.data.images import UNLABELLED, Sample
from diffsmooth.pipeline.data.sets import hub_location, sample_indices
from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.models.device import device_facts, device_of, torch_settings
from diffsmooth.pipeline.noise import Noise, check_known_answers
from diffsmooth.pipeline.smoothing import BaseClassifier, check_spec
from diffsmooth.pipeline.spec import RunSpec
from diffsmooth.pipeline.storage.hub import cached_commits, on_hub
from diffsmooth.pipeline.storage.store import Store, open_store
from diffsmooth.pipeline.votes.blocks import BlockMetadata, Votes, block_key, encode_block, read_blocks
from diffsmooth.pipeline.votes.run import read_run

logger = logging.getLogger(__name__)

_CPU_BATCH = 64
_LARGEST_BATCH = 2048  # on a GPU; larger batches are no faster, and waste more on padding a task's last batch
_CLEAN_SAMPLES = 64


class Setup(NamedTuple):
    """What a worker needs to know about its run."""

    spec: RunSpec  # its seed is a number
    run_uri: str
    votes_id: str
    batch_size: int | None = None  # None: chosen for the device
    threads: int = 1  # for the networks on a CPU, and for the noise everywhere
    attack: Attack | None = None  # samples are attacked instead of casting the votes of blocks


class Receipt(NamedTuple):
    """What a task reports to the driver: small, whatever the size of the task."""

    votes: list[Votes]  # of each block of the task, as stored
    stored: int  # draws that this attempt computed and stored
    duplicates: list[Block]  # computed here although another attempt had stored them; dropped
    left: list[Block]  # of the task, to other drivers
    met: bool  # whether another attempt had stored blocks of the task
    seconds: float
    draws: int
    device: str = ""
    store_failures: int = 0  # writes to the store that lost their answer or met another one


class Progress(NamedTuple):
    """How far an attempt at a task is."""

    attempt: str
    draws: int = 0  # of the task's blocks that are committed, by any attempt
    stored: int = 0  # draws that this attempt computed and stored


class CleanAccuracy(NamedTuple):
    """How many of some labelled samples the classifier alone gets right, without noise and denoiser."""

    right: int
    samples: int
    num_classes: int


class Worker:
    """Casts and commits the votes of f on one device."""

    def __init__(self, setup: Setup, f: BaseClassifier, data: Dataset, store: Store) -> None:
        check_known_answers()
        self._setup, self._f, self._data, self._store = setup, f, data, store
        self._device = f.device
        self._sample = functools.lru_cache(maxsize=64)(data.__getitem__)
        self._noise = Noise.of(setup.spec.smoothing)
        # reduced when memory runs out
        self.batch_size = setup.batch_size or (_CPU_BATCH if self._device.type == "cpu" else _LARGEST_BATCH)
        with self._settings():
            if setup.spec.compute.compile or (setup.batch_size is None and self._device.type != "cpu"):
                self._warm_up()
            self._facts = device_facts(self._device)
        self._commits = cached_commits(hub_locations(setup.spec))
        self.progress = Progress("")  # of the latest attempt; another thread may read it at any time

    @classmethod
    def load(cls, setup: Setup, known: Mapping[str, bytes] = MappingProxyType({})) -> Self:
        """A worker with the f, the data and the storage that the spec names; `known` are artefacts of compilations.

        Raises: UserError if something cannot be loaded, or is not what the run was made with.
        """
        spec = setup.spec
        checked = check_spec(spec)
        if checked.votes_id != setup.votes_id:
            raise UserError(
                f"the weights or own functions on {platform.node()} differ from the driver's (votes_id "
                f"{checked.votes_id}, not "
                f"{setup.votes_id}); give every node the same files"
            )
        device = device_of(spec)
        try:
            with torch_settings(spec.smoothing.precision, setup.threads):
                f = checked.build(device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the networks do not fit in the memory of {device} on {platform.node()} ({first_line(error)}); free "
                "it, use a device with more memory, or a lower smoothing.precision"
            ) from error
        if spec.compute.compile:
            compiled.load(known, compiled.key_of(setup.votes_id, device_facts(device).device))
            f.compile()
        return cls(setup, f, checked.data, open_store(setup.run_uri))

    @property
    def compiled_key(self) -> str | None:
        """The key of the artefacts of f's compilation; None if f is not compiled."""
        setup = self._setup
        return compiled.key_of(setup.votes_id, self._facts.device) if setup.spec.compute.compile else None

    def _settings(self) -> AbstractContextManager[None]:
        """torch's settings while f runs: they are part of how votes are cast, whatever this process did before."""
        return torch_settings(self._setup.spec.smoothing.precision, self._setup.threads)

    def run(self, blocks: Sequence[Block], attempt: str, share: bool = False) -> Receipt:
        """Cast and commit the votes of the blocks that are not committed yet.

        With `share`, stop at the first block that another attempt has committed: another driver is at work there.
        """
        with self._settings():
            return self._run(blocks, attempt, share)

    def _run(self, blocks: Sequence[Block], attempt: str, share: bool) -> Receipt:
        start, failures = time.perf_counter(), self._store.failures
        # checked at every attempt, also the first: another driver may have cast them since ours listed the run
        existing = self._store.existing(map(block_key, blocks))
        found = [block for block in blocks if block_key(block) in existing]
        self.progress = Progress(attempt, sum(block.draws for block in found))
        wanted = to_compute(blocks, set(found), share)
        stored, duplicates = self._cast_and_commit(wanted, attempt, share)
        seconds, own = time.perf_counter() - start, sum(votes.block.draws for votes in stored)
        done = {*found, *duplicates, *(votes.block for votes in stored)}
        if others := found + duplicates:  # what is committed counts, also of others
            run = read_run(self._store)
            stored = stored + [one.votes() for one in read_blocks(self._store, run, others)]
        return Receipt(
            votes=stored,
            stored=own,
            duplicates=duplicates,
            left=[block for block in blocks if block not in done],
            met=bool(others),
            seconds=seconds,
            draws=own + sum(block.draws for block in duplicates),
            device=self._facts.device,
            store_failures=self._store.failures - failures,
        )

    def _cast_and_commit(self, blocks: Sequence[Block], attempt: str, share: bool) -> tuple[list[Votes], list[Block]]:
        """The votes that this attempt stored, and the blocks that another attempt had stored before it.

        With `share`, nothing more is cast after such a block.
        """
        last = time.perf_counter()
        samples = {block.sample: self._sample(block.sample) for block in blocks}
        # a block is committed while the next one is computed; leaving the pool waits for started commits
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit") as pool:
            commits: list[tuple[CastBlock, Future[bool]]] = []
            for cast in self._cast(blocks, samples):
                sample, now = samples[cast.block.sample], time.perf_counter()
                metadata = self._metadata(sample, attempt, now - last)
                last = now
                # one commit at a time, and a store that fails stops the task
                met = bool(commits) and not commits[-1][1].result()
                encoded = encode_block(cast.block, sample.label, cast.counts_K, metadata)
                commits.append((cast, pool.submit(self._commit, cast.block, encoded)))
                if met and share:
                    break
        stored, duplicates = [], []
        for (block, counts_K), commit in commits:
            if commit.result():
                counts = {int(k): int(counts_K[k]) for k in counts_K.nonzero()[0]}
                stored.append(Votes(block, samples[block.sample].label, counts))
            else:
                duplicates.append(block)
        return stored, duplicates

    def _commit(self, block: Block, encoded: bytes) -> bool:
        """Store a block unless another attempt has stored it; returns whether it was stored."""
        stored = self._store.put_if_absent(block_key(block), encoded)
        self._count_committed(block.draws, block.draws if stored else 0)
        return stored

    def _count_committed(self, draws: int, stored: int) -> None:
        attempt, draws_before, stored_before = self.progress
        self.progress = Progress(attempt, draws_before + draws, stored_before + stored)

    def _metadata(self, sample: Sample, attempt: str, seconds: float) -> BlockMetadata:
        setup = self._setup
        return BlockMetadata(
            **self._facts.model_dump(),
            votes_id=setup.votes_id,
            threads=setup.threads,
            precision=setup.spec.smoothing.precision,
            compiled=setup.spec.compute.compile,
            batch_size=self.batch_size,
            commits=self._commits,
            sample_sha256=sample.sha256,
            attempt=attempt,
            seconds=seconds,
        )

    def _cast(self, blocks: Sequence[Block], samples: Mapping[int, Sample]) -> Iterator[CastBlock]:
        """The blocks' votes. If memory runs out, smaller batches continue with the blocks that are not finished."""
        done = 0
        while blocks:
            try:
                options = CastOptions(self.batch_size, self._setup.threads)
                for cast in cast_votes(self._f, blocks[done:], samples, self._noise, options):
                    done += 1
                    yield cast
                return
            except torch.OutOfMemoryError:
                pass  # its traceback holds tensors, so memory is freed only after this clause
            self._halve_batch()

    def _warm_up(self) -> None:
        """Find the largest batch that fits, and compile f for it if the spec says so."""
        start = time.perf_counter()
        shape = self._f.local_noise_MCHW.shape[1:]
        while True:
            try:
                self._f(torch.zeros(self.batch_size, *shape, device=self._device)).cpu()
                break
            except torch.OutOfMemoryError:
                pass
            self._halve_batch()
        logger.info("batch size %d; warm-up took %.0f s", self.batch_size, time.perf_counter() - start)

    def _halve_batch(self) -> None:
        if self.batch_size == 1:
            raise UserError(
                f"one draw does not fit in the memory of {self._device}; use a device with more memory, or a lower "
                "smoothing.precision"
            )
        self.batch_size //= 2
        logger.warning("out of memory on %s; continuing with batch size %d", self._device, self.batch_size)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def clean_accuracy(self) -> CleanAccuracy:
        """The bare classifier's accuracy on samples spread over the spec's: a wrong normalisation destroys it."""
        indices = sample_indices(self._setup.spec.data.samples, len(self._data))
        chosen = indices[:: max(1, len(indices) // _CLEAN_SAMPLES)][:_CLEAN_SAMPLES]
        samples = [sample for index in chosen if (sample := self._data[index]).label != UNLABELLED]
        right = 0
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            x_BCHW = torch.from_numpy(np.stack([sample.image_CHW for sample in batch])).to(self._device)
            with self._settings():
                predicted_B = self._f.classify(x_BCHW).argmax(dim=1).tolist()
            right += sum(k == sample.label for k, sample in zip(predicted_B, batch, strict=True))
        return CleanAccuracy(right, len(samples), self._f.num_classes)


def hub_locations(spec: RunSpec) -> list[str]:
    """The locations of weights and data that are on the Hugging Face Hub."""
    adapter = spec.classifier.adapter
    weights = (spec.denoiser.checkpoint, spec.classifier.checkpoint, None if adapter is None else adapter.checkpoint)
    return [one for one in (*weights, hub_location(spec.data)) if one is not None and on_hub(one)]


def to_compute(blocks: Sequence[Block], found: Set[Block], share: bool) -> list[Block]:
    """The blocks of a task to compute if `found` are committed: with `share`, those before the first of these."""
    if share:
        return list(itertools.takewhile(lambda block: block not in found, blocks))
    return [block for block in blocks if block not in found]
