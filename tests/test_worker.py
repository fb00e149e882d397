"""A worker: it commits while it computes, and reduces its batch size when memory runs out."""

import threading

import pytest
import torch

from diffsmooth.cluster.worker import Progress, Setup, Worker, hub_locations
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.smoothing import weights_ids
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import FolderStore, open_store
from diffsmooth.pipeline.votes.blocks import read_blocks
from diffsmooth.pipeline.votes.run import claim_run, describe_run, read_run

BLOCKS = [Block(sample, "estimation", start, start + 100) for sample in (0, 1) for start in (0, 100)]


@pytest.fixture
def make(raw_spec, tmp_path):
    """Returns a function that makes a worker and its store; each name is another run."""

    def make(name="run", batch_size=None, **changes):
        spec = load_spec({**raw_spec, **changes})
        run, store = describe_run(spec, weights_ids(spec), 2), open_store(str(tmp_path / name))
        claim_run(store, run)
        return Worker.load(Setup(spec, store.uri, run.votes_id, batch_size)), store

    return make


def stored(store):
    return read_blocks(store, read_run(store))


def votes(store):
    return {one.block: one.votes().counts for one in stored(store)}


def out_of_memory_above(worker, draws, after=0):
    """Make f run out of memory for batches above `draws`, after it was called `after` times."""
    inner, calls = worker._f._mean_softmax, []

    def scores(x_BCHW, identity):
        calls.append(len(x_BCHW))
        if len(x_BCHW) > draws and len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(x_BCHW, identity)

    worker._f._mean_softmax = scores
    return calls


@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_task_continues_with_smaller_batches_when_memory_runs_out(make, after):
    worker, store = make(batch_size=64)
    calls = out_of_memory_above(worker, 20, after)
    receipt = worker.run(BLOCKS, "one")
    assert [block for block, _, _ in receipt.votes] == BLOCKS
    assert set(calls) == {64, 32, 16}
    assert {one.metadata.batch_size for one in stored(store)} == ({16} if after < 2 else {64, 16})
    plain, other = make("plain", batch_size=16)
    plain.run(BLOCKS, "two")
    assert votes(store) == votes(other)


def test_one_draw_that_does_not_fit_is_an_error(make):
    worker, _ = make()
    out_of_memory_above(worker, 0)
    with pytest.raises(UserError, match="one draw does not fit in the memory of cpu"):
        worker.run(BLOCKS, "one")


def test_warm_up_finds_the_largest_batch_that_fits(make):
    worker, _ = make(batch_size=2048)
    calls = out_of_memory_above(worker, 300)
    worker._warm_up()
    assert calls == [2048, 1024, 512, 256]
    assert worker.batch_size == 256


def test_compilation_is_requested_and_recorded(make, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    worker, store = make(compute={"device": "cpu", "compile": True})
    worker.run(BLOCKS, "one")
    assert compiled == [{"dynamic": False, "mode": "default"}]
    assert {one.metadata.compiled for one in stored(store)} == {True}
    plain, other = make("plain")  # claims the same votes_id
    plain.run(BLOCKS, "two")
    assert votes(store) == votes(other)


def test_a_block_is_committed_while_the_next_is_computed(make, monkeypatch):
    """The first commit returns only after f has seen draws of the second block."""
    worker, store = make(batch_size=100)
    calls, reached = out_of_memory_above(worker, 1000), threading.Event()
    inner_scores, put = worker._f._mean_softmax, FolderStore.put_if_absent

    def scores(x_BCHW, identity):
        if len(calls) == 1:
            reached.set()
        return inner_scores(x_BCHW, identity)

    def slow(self, key, data):
        assert reached.wait(30)
        return put(self, key, data)

    worker._f._mean_softmax = scores
    monkeypatch.setattr(FolderStore, "put_if_absent", slow)
    receipt = worker.run(BLOCKS, "one")
    assert [block for block, _, _ in receipt.votes] == BLOCKS
    assert len(votes(store)) == len(BLOCKS)


def test_progress_counts_each_block_as_it_is_committed(make, monkeypatch):
    worker, _ = make(batch_size=100)
    put, seen = FolderStore.put_if_absent, []

    def watched(self, key, data):
        seen.append(worker.progress)
        return put(self, key, data)

    monkeypatch.setattr(FolderStore, "put_if_absent", watched)
    worker.run(BLOCKS, "one")
    assert seen == [Progress("one", draws, draws) for draws in (0, 100, 200, 300)]
    assert worker.progress == Progress("one", 400, 400)
    worker.run(BLOCKS, "two")  # all blocks are found
    assert worker.progress == Progress("two", 400, 0)


@pytest.mark.parametrize("broken", range(len(BLOCKS)))
def test_a_failed_commit_ends_the_task_and_loses_nothing_else(make, monkeypatch, broken):
    worker, store = make(batch_size=100)
    put, commits = FolderStore.put_if_absent, []

    def fails_once(self, key, data):
        commits.append(key)
        if len(commits) == broken + 1:
            raise RunError("the disk is full")
        return put(self, key, data)

    monkeypatch.setattr(FolderStore, "put_if_absent", fails_once)
    with pytest.raises(RunError, match="the disk is full"):
        worker.run(BLOCKS, "one")
    assert len(commits) == broken + 1
    assert set(votes(store)) == set(BLOCKS[:broken])
    worker.run(BLOCKS, "two")
    assert set(votes(store)) == set(BLOCKS)


def test_blocks_before_a_bad_block_are_committed(make):
    worker, store = make(batch_size=100, classifier={"arch": "tests.models:not_a_number"})
    with pytest.raises(UserError, match="not finite"):
        worker.run(BLOCKS, "one")
    assert len(votes(store)) < len(BLOCKS)


def test_the_commits_of_all_files_on_the_hub_are_recorded(raw_spec):
    """Also that of an adapter, which is part of f."""
    raw_spec["data"] = {"name": "cifar10", "path": "hf://datasets/a/images"}
    raw_spec["denoiser"] = {"arch": "openai-cifar10", "checkpoint": "hf://a/denoiser/x.pt"}
    raw_spec["classifier"] = {
        "arch": "timm:vit_tiny_patch16_224",
        "checkpoint": "hf://a/classifier/model.safetensors",
        "adapter": {"kind": "lora", "rank": 4, "checkpoint": "hf://a/adapter/model.safetensors"},
    }
    places = [place.split("/")[-2] for place in hub_locations(load_spec(raw_spec))]
    assert places == ["denoiser", "classifier", "adapter", "a"]
