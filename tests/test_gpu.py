"""Votes on a GPU: equal to those of the CPU, whatever the batch, the memory and the errors of the device.

`make gpu` runs these tests on a machine with a GPU. Elsewhere, those that need none run with fewer draws on the CPU.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from diffsmooth.cluster.worker import Setup, Worker
from diffsmooth.jobs.casting import Options, certify_all
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.audit.redraw import Effort, audit
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.casting import CastOptions, cast_votes
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.smoothing import check_spec, weights_ids
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import read_blocks, read_votes
from diffsmooth.pipeline.votes.run import claim_run, describe_run, read_run

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DRAWS = 10_000 if ON_GPU else 30
NAMES = ("fashion-diffsmooth-0.50", "mnist-diffsmooth-0.50") if ON_GPU else ("fashion-diffsmooth-0.50",)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU")


def named(name=NAMES[0], *changes):
    return load_named(name, [f"compute.device={DEVICE}", *changes])


def votes_of(spec, device, batch_size):
    """The votes of single draws of three samples, in blocks of one draw."""
    data, noise = open_dataset(spec.data), Noise.of(spec.smoothing)
    f = check_spec(spec, data).build(device)
    samples = {sample: data[sample] for sample in (0, 1, 2)}
    blocks = [Block(sample, "estimation", draw, draw + 1) for sample in samples for draw in range(DRAWS // 3)]
    cast = cast_votes(f, blocks, samples, noise, CastOptions(batch_size))
    return np.array([counts_K.argmax() for _, counts_K in cast])


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_votes_in_fp32_equal_those_of_the_cpu(name):
    spec = named(name)
    equal = votes_of(spec, "cuda", 256) == votes_of(spec, "cpu", 64)
    assert equal.mean() >= 0.9999


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_votes_do_not_change_from_one_run_to_the_next(precision):
    spec = named(NAMES[0], f"smoothing.precision={precision}")
    np.testing.assert_array_equal(votes_of(spec, DEVICE, 64), votes_of(spec, DEVICE, 64))


def test_votes_hardly_depend_on_the_batch_size():
    spec = named()
    equal = votes_of(spec, DEVICE, 64) == votes_of(spec, DEVICE, 1000 if ON_GPU else 7)
    assert equal.mean() >= 0.9999


@needs_gpu
def test_a_batch_that_exceeds_the_memory_is_halved_and_the_votes_stay(tmp_path):
    spec = named()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(1e9 / total)
        stored = [cast_and_read(spec, tmp_path / str(size), size) for size in (65_536, 256)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (small, small_sizes), (usual, usual_sizes) = stored
    assert max(small_sizes) < 65_536
    assert usual_sizes == {256}
    assert sum(abs(small[block] - usual[block]).sum() for block in usual) <= 2  # one vote of 2,000


def cast_and_read(spec, home, batch_size):
    """The votes of blocks as one worker stores them, and the sizes of its batches."""
    run, store = describe_run(spec, weights_ids(spec), 10), open_store(str(home))
    store.prepare()
    claim_run(store, run)
    worker = Worker.load(Setup(spec, store.uri, run.votes_id, batch_size))
    worker.run([Block(sample, "estimation", 0, 1000) for sample in (0, 1)], "0")
    stored = [(one.votes(), one.metadata.batch_size) for one in read_blocks(store, read_run(store))]
    counts = {votes.block: np.array([votes.counts.get(k, 0) for k in range(10)]) for votes, _ in stored}
    return counts, {size for _, size in stored}


@needs_gpu
def test_a_compiled_f_certifies_on_ray(tmp_path):
    """With CUDA graphs, which belong to the thread that recorded them."""
    eager = certify(named(), tmp_path / "eager")
    compiled = certify(named(NAMES[0], "compute.compile=true"), tmp_path / "compiled")
    keys = ["sample", "stage", "draw_start", "class"]
    both = pd.concat([eager.set_index(keys).votes, compiled.set_index(keys).votes], axis=1).fillna(0)
    assert (both.iloc[:, 0] - both.iloc[:, 1]).abs().sum() <= 2e-3 * eager.votes.sum()


@needs_gpu
def test_an_error_of_cuda_in_a_task_loses_nothing(raw_spec, tmp_path):
    raw_spec["compute"] = {"device": "cuda"}
    raw_spec["classifier"] = {"arch": "tests.models:half_space"}
    whole = certify(load_spec(raw_spec), tmp_path / "whole")
    raw_spec["classifier"] = {"arch": "tests.models:asserts_on_the_gpu"}
    broken = certify(load_spec(raw_spec), tmp_path / "broken")
    assert (tmp_path / "asserted").exists()
    pd.testing.assert_frame_equal(whole, broken)


@needs_gpu
def test_the_audit_on_the_cpu_accepts_a_run_of_the_gpu(tmp_path):
    certify(named(), tmp_path / "run")
    audited = audit(str(tmp_path / "run"), spec=named(NAMES[0], "compute.device=cpu"), effort=Effort(blocks=8))
    assert audited.findings == []
    assert audited.redrawn.elsewhere == audited.redrawn.blocks == 8
    assert audited.redrawn.agreement_elsewhere >= 0.99


def certify(spec, home) -> pd.DataFrame:
    """The votes of a run on one actor of a local Ray."""
    short = spec.model_copy(update={"data": spec.data.model_copy(update={"samples": "0:4"})})
    (certified,) = certify_all([(short, str(home))], Options(actors=1, quiet=True))
    assert certified.to_json()["complete"]
    return read_votes(str(home))
