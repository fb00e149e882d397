"""One device with f loaded once: casts the votes of a task's blocks and commits each block as it finishes. No Ray."""

import contextlib
import functools
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import noise
from pipeline.block import Block
from pipeline.data import open_dataset, sample_indices
from pipeline.errors import UserError
from pipeline.images import UNLABELLED, Sample
from pipeline.smoothing import BlockVotes, build_base_classifier, cast_votes, weights_ids
from pipeline.spec import RunSpec, votes_id
from pipeline.storage.store import open_store
from pipeline.votes import Votes, block_key, block_votes, encode_block, read_blocks

logger = logging.getLogger(__name__)

_PACKAGES = ("numpy", "torch", "pillow", "pyarrow", "torchvision")
_MODEL_PACKAGES = ("timm", "diffusers")
_CPU_BATCH = 64
_LARGEST_BATCH = 2048  # of a GPU; larger ones are no faster, and pad a task's last batch the more
_CLEAN_SAMPLES = 64


class Setup(NamedTuple):
    """What a worker needs to know of its run."""

    spec: RunSpec
    run_uri: str
    votes_id: str
    batch_size: int | None = None  # None: a good one for the device
    threads: int = 1  # of the device's networks on a CPU, of the noise everywhere


class Receipt(NamedTuple):
    """What a task tells the driver: small, whatever the task's size."""

    votes: list[Votes]  # of each block of the task, as stored
    stored: int  # draws that this attempt computed and stored
    duplicates: list[Block]  # computed here, though another attempt had stored them: dropped
    seconds: float
    draws: int
    device: str = ""
    store_failures: int = 0  # calls to the store that had to be tried again


class CleanAccuracy(NamedTuple):
    """How many of some labelled samples the classifier alone gets right, without noise or denoiser."""

    right: int
    samples: int
    num_classes: int


class Worker:
    """Holds f on one device. Raises UserError at once for what cannot be loaded or is not what the run is made of."""

    def __init__(self, setup: Setup) -> None:
        noise.check_known_answers()
        spec = setup.spec
        found = votes_id(spec, weights_ids(spec))
        if found != setup.votes_id:
            raise UserError(
                f"the weights or own functions on {platform.node()} differ from the driver's (votes_id {found}, not "
                f"{setup.votes_id}): give every node the same files"
            )
        self._setup = setup
        self._device = device_of(spec)
        if self._device.type == "cpu":
            torch.set_num_threads(setup.threads)
        self._data = open_dataset(spec.data)
        self._sample = functools.lru_cache(maxsize=64)(self._load)
        self._f = build_base_classifier(spec, self._device)
        if spec.compute.compile:
            self._f.compile()
        self._batch_size = setup.batch_size or (_CPU_BATCH if self._device.type == "cpu" else _LARGEST_BATCH)
        if spec.compute.compile or (setup.batch_size is None and self._device.type != "cpu"):
            self._warm_up()
        self._store = open_store(setup.run_uri)
        self._facts = _facts(self._device, setup)

    def run(self, blocks: Sequence[Block], attempt: str) -> Receipt:
        """Cast and commit the votes of the blocks that do not stand yet."""
        start = last = time.perf_counter()
        failures = self._store.failures
        # at each attempt, the first as well: another driver may have cast them since ours listed the run
        standing = self._store.existing(map(block_key, blocks))
        found = [block for block in blocks if block_key(block) in standing]
        blocks = [block for block in blocks if block_key(block) not in standing]
        samples = {block.sample: self._sample(block.sample) for block in blocks}
        stored, duplicates = [], []
        # a block is committed while the next one is computed; leaving the pool waits for what has begun
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit") as pool:
            commits: list[tuple[Block, NDArray[np.int64], Future[bool]]] = []
            for block, counts_K in self._cast(blocks, samples):
                sample, now = samples[block.sample], time.perf_counter()
                metadata = {
                    **self._facts,
                    "batch_size": self._batch_size,
                    "sample_sha256": sample.sha256,
                    "attempt": attempt,
                    "seconds": now - last,
                }
                last = now
                if commits:
                    commits[-1][-1].result()  # no more than one at a time, and a store that fails stops the task
                encoded = encode_block(block, sample.label, counts_K, metadata)
                commits.append((block, counts_K, pool.submit(self._store.put_if_absent, block_key(block), encoded)))
        for block, counts_K, commit in commits:
            if commit.result():
                label = samples[block.sample].label
                stored.append((block, label, {int(k): int(counts_K[k]) for k in counts_K.nonzero()[0]}))
            else:
                duplicates.append(block)
        seconds, draws = time.perf_counter() - start, sum(block.draws for block in blocks)
        own = sum(block.draws for block, _, _ in stored)
        if others := found + duplicates:  # what stands counts, whoever cast it
            stored += [block_votes(one) for one in read_blocks(self._store, others)]
        failed = self._store.failures - failures
        return Receipt(stored, own, duplicates, seconds, draws, self._facts["device"], failed)

    def _cast(self, blocks: Sequence[Block], samples: Mapping[int, Sample]) -> Iterator[BlockVotes]:
        """The blocks' votes. Where memory runs out, smaller batches go on with the blocks that are not done."""
        smoothing, done = self._setup.spec.smoothing, 0
        while blocks:
            try:
                for votes in cast_votes(
                    self._f,
                    blocks[done:],
                    samples,
                    sigma=smoothing.sigma,
                    seed=int(smoothing.seed),  # the driver has put a number in the place of "random"
                    batch_size=self._batch_size,
                    threads=self._setup.threads,
                    noise_grid=smoothing.noise_grid,
                ):
                    done += 1
                    yield votes
                return
            except torch.OutOfMemoryError:
                pass  # its traceback holds tensors, so memory is freed after this clause only
            self._halve_batch()

    def _warm_up(self) -> None:
        """Find the largest batch that fits, and compile f for it where the spec says so."""
        start = time.perf_counter()
        shape = self._f.local_noise_MCHW.shape[1:]
        while True:
            try:
                self._f(torch.zeros(self._batch_size, *shape, device=self._device)).cpu()
                break
            except torch.OutOfMemoryError:
                pass
            self._halve_batch()
        logger.info("batches of %d draws; warm-up took %.0f s", self._batch_size, time.perf_counter() - start)

    def _halve_batch(self) -> None:
        if self._batch_size == 1:
            raise UserError(
                f"one draw does not fit the memory of {self._device}: take a device with more, or a lower "
                "smoothing.precision"
            )
        self._batch_size //= 2
        logger.warning("out of memory on %s: batches of %d draws from now on", self._device, self._batch_size)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def clean_accuracy(self) -> CleanAccuracy:
        """The bare classifier's accuracy on samples spread over the spec's: what a wrong normalisation destroys."""
        indices = sample_indices(self._setup.spec.data.samples, len(self._data))
        chosen = indices[:: max(1, len(indices) // _CLEAN_SAMPLES)][:_CLEAN_SAMPLES]
        samples = [sample for sample in map(self._load, chosen) if sample.label != UNLABELLED]
        right = 0
        for start in range(0, len(samples), self._batch_size):
            batch = samples[start : start + self._batch_size]
            x_BCHW = torch.from_numpy(np.stack([sample.image_CHW for sample in batch])).to(self._device)
            predicted_B = self._f.classify(x_BCHW).argmax(dim=1).tolist()
            right += sum(k == sample.label for k, sample in zip(predicted_B, batch, strict=True))
        return CleanAccuracy(right, len(samples), self._f.num_classes)

    def _load(self, index: int) -> Sample:
        return self._data[index]


def device_of(spec: RunSpec) -> torch.device:
    """The device that the spec asks for; a missing GPU is an error, not a reason to be slow."""
    wanted = spec.compute.device
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if wanted == "cuda":
        raise UserError(
            f"compute.device = 'cuda', but torch {torch.__version__} sees no GPU on {platform.node()}: run on a GPU "
            "node, or choose the CPU with --cpu"
        )
    return torch.device("cpu")


def facts_of(device: torch.device) -> dict[str, Any]:
    """What of the surroundings can change a vote."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} {name}",
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _facts(device: torch.device, setup: Setup) -> dict[str, Any]:
    """What is recorded with every block besides its own figures."""
    return {
        **facts_of(device),
        "votes_id": setup.votes_id,
        "threads": setup.threads,
        "precision": setup.spec.smoothing.precision,
        "compiled": setup.spec.compute.compile,
    }


def _versions() -> dict[str, str]:
    """The packages that can change a vote; those that only some models need, where they are installed."""
    versions = {name: version(name) for name in _PACKAGES}
    for name in _MODEL_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
