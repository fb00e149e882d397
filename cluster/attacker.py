"""Attacker: a worker that attacks samples instead of casting the votes of blocks. It does not know Ray.

Its blocks stand for whole samples; their draws are the forward passes of f that an attack takes at most.
"""

import time
from collections.abc import Mapping, Sequence

import torch

from diffsmooth.cluster.worker import Progress, Receipt, Setup, Worker, to_compute
from diffsmooth.pipeline.attack.foreign import search_of
from diffsmooth.pipeline.attack.record import (
    Attack,
    AttackedSample,
    AttackMetadata,
    Rung,
    encode_sample,
    read_samples,
    rival,
)
from diffsmooth.pipeline.attack.search import attack_sample
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.casting import CastOptions
from diffsmooth.pipeline.data.images import UNLABELLED, Sample
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.votes.blocks import Votes
from diffsmooth.pipeline.votes.run import read_run


def load_worker(setup: Setup, known: Mapping[str, bytes]) -> Worker:
    """The worker that a run needs; `known` are artefacts of compilations. Raises: UserError as `Worker.load`."""
    return Worker.load(setup, known) if setup.attack is None else Attacker.load(setup, known)


def block_of(sample: int, attack: Attack) -> Block:
    """The block that represents an attacked sample in the scheduler."""
    return Block(sample, "estimation", 0, attack.passes)


class Attacker(Worker):
    """Attacks samples and commits the results on one device."""

    def _run(self, blocks: Sequence[Block], attempt: str, share: bool) -> Receipt:
        """Attack and commit the samples that are not committed yet; `share` as in `Worker.run`."""
        start, failures, attack = time.perf_counter(), self._store.failures, self._attack
        keys = {attack.sample_key(block.sample): block for block in blocks}
        found, duplicates = [keys[key] for key in self._store.existing(keys)], []
        votes: list[Votes] = []
        self.progress = Progress(attempt, sum(block.draws for block in found))
        for block in to_compute(blocks, set(found), share):
            one = self._attack_sample(block.sample, attempt)
            encoded = encode_sample(one.sample, one.label, one.rungs, one.metadata)
            stored_here = self._store.put_if_absent(attack.sample_key(block.sample), encoded)
            self._count_committed(block.draws, block.draws if stored_here else 0)
            if stored_here:
                votes.append(_votes(one, attack))
                continue
            duplicates.append(block)
            if share:
                break
        stored = len(votes) * attack.passes
        done = {*found, *duplicates, *(one.block for one in votes)}
        if others := found + duplicates:
            read = read_samples(self._store, read_run(self._store), attack, [block.sample for block in others])
            votes += [_votes(one, attack) for one in read]
        return Receipt(
            votes=votes,
            stored=stored,
            duplicates=duplicates,
            left=[block for block in blocks if block not in done],
            met=bool(others),
            seconds=time.perf_counter() - start,
            draws=stored + sum(block.draws for block in duplicates),
            device=self._facts.device,
            store_failures=self._store.failures - failures,
        )

    @property
    def _attack(self) -> Attack:
        assert self._setup.attack is not None
        return self._setup.attack

    def _attack_sample(self, index: int, attempt: str) -> AttackedSample:
        start, sample = time.perf_counter(), self._sample(index)
        if sample.label == UNLABELLED:
            raise UserError(f"sample {index} has no label; attack labelled samples, chosen with --samples")
        rungs = self._search(index, sample)
        metadata = AttackMetadata(
            attack=self._attack.id,
            votes_id=self._setup.votes_id,
            sample_sha256=sample.sha256,
            shape=sample.image_CHW.shape,
            attempt=attempt,
            device=self._facts.device,
            versions=self._facts.versions,
            batch_size=self._options.batch_size,
            threads=self._setup.threads,
            seconds=time.perf_counter() - start,
            compiled=self._setup.spec.compute.compile,
        )
        return AttackedSample(sample=index, label=sample.label, rungs=rungs, metadata=metadata)

    @property
    def _options(self) -> CastOptions:
        """Batches no larger than the votes at one image, so that little is padded."""
        return CastOptions(min(self.batch_size, max(self._attack.n0, self._attack.n)), self._setup.threads)

    def _search(self, index: int, sample: Sample) -> list[Rung]:
        """Attack a sample; if memory runs out, again with smaller batches."""
        search = search_of(self._attack)
        while True:
            try:
                return attack_sample(self._f, sample, index, self._attack, self._noise, self._options, search)
            except torch.OutOfMemoryError:
                pass  # its traceback holds tensors, so memory is freed only after this clause
            self._halve_batch()


def _votes(one: AttackedSample, attack: Attack) -> Votes:
    """The votes at the nearest image that is proven, or else those at the clean image."""
    nearest = one.nearest(attack.alpha)
    counts_K = one.rungs[0].selection_K if nearest is None or nearest.judging_K is None else nearest.judging_K
    target = one.label if nearest is None else rival(nearest.selection_K, one.label)
    return Votes(block_of(one.sample, attack), one.label, {target: int(counts_K[target])})
