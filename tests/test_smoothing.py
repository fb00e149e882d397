"""The base classifier and its votes, which do not depend on how the work is split."""

import pickle
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from diffsmooth.cluster.worker import Setup, Worker
from diffsmooth.jobs.casting import Options, certify_all
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.casting import CastOptions, cast_votes, noisy_images
from diffsmooth.pipeline.data.sets import DATASETS, open_dataset
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.noise import Draws, Noise, local_noise
from diffsmooth.pipeline.smoothing import build_base_classifier, check_spec, weights_ids
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.run import read_run
from tests.models import INNER_STD, THRESHOLD


@pytest.fixture(scope="module")
def mnist():
    spec = load_named("mnist")
    return spec, build_base_classifier(spec, "cpu"), open_dataset(spec.data)


def counts(f, data, blocks, *, sigma=0.5, seed=0, batch_size=64, threads=1):
    samples = {block.sample: data[block.sample] for block in blocks}
    cast = cast_votes(f, blocks, samples, Noise(seed, sigma), CastOptions(batch_size, threads))
    return {block: tuple(counts_K) for block, counts_K in cast}


BLOCKS = [Block(sample, "estimation", start, start + 50) for sample in (8, 3) for start in (0, 50)] + [
    Block(3, "selection", 0, 20)
]


def test_votes_do_not_depend_on_tasks_batches_and_threads(mnist):
    _, f, data = mnist
    whole = counts(f, data, BLOCKS)
    assert list(whole) == BLOCKS
    assert [sum(k) for k in whole.values()] == [50, 50, 50, 50, 20]
    for split in ([BLOCKS[:1], BLOCKS[1:4], BLOCKS[4:]], [BLOCKS[::-1]], [[block] for block in BLOCKS]):
        again: dict[Any, Any] = {}
        for task in split:
            again |= counts(f, data, task, threads=2)
        assert again == whole
    for batch_size in (7, 256):
        other = counts(f, data, BLOCKS, batch_size=batch_size)
        moved = sum(abs(np.subtract(other[block], whole[block])).sum() // 2 for block in BLOCKS)
        assert moved == 0  # 220 draws; a tie occurs about once in 100,000


def test_votes_equal_the_published_algorithm(mnist):
    """The literal method: one draw at a time, the copies one after another, no batching."""
    spec, f, data = mnist
    local = local_noise(local_seed=0, m=5, shape=(1, 28, 28), local_sigma=0.25)
    literal = np.zeros(10, dtype=int)
    for draw in range(50):
        e = np.empty((1, 1, 28, 28), np.float32)
        Noise.of(spec.smoothing).fill(e, "estimation", 8, [draw])
        x0 = f.denoise(torch.from_numpy(data[8].image_CHW[None] + e))
        score = sum(f.classify(x0 + torch.from_numpy(copy)).softmax(1) for copy in local)
        literal[int(score.argmax())] += 1
    assert counts(f, data, BLOCKS[:1])[BLOCKS[0]] == tuple(literal)


def test_scores_are_probabilities_and_denoised_images_are_in_range(mnist):
    _, f, data = mnist
    x = torch.from_numpy(np.stack([data[i].image_CHW for i in range(4)]))
    assert f.local_noise_MCHW.shape == (5, 1, 28, 28)
    scores = f(x)
    assert scores.shape == (4, 10)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.sum(1), torch.ones(4), atol=1e-5)
    x0 = f.denoise(x + 0.5)
    assert x0.min() >= 0
    assert x0.max() <= 1


def test_embedded_models_classify_held_out_images(mnist):
    _, f, data = mnist
    x = torch.from_numpy(np.stack([data[i].image_CHW for i in range(200)]))
    right = f(x).argmax(1) == torch.tensor([data[i].label for i in range(200)])
    assert right.float().mean() > 0.8


def test_cohen_and_dds_are_special_cases():
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    dds = build_base_classifier(load_named("mnist", ["smoothing.m=1", "smoothing.local_sigma=0.0"]), "cpu")
    assert torch.allclose(dds(x), dds.classify(dds.denoise(x)).softmax(1), atol=1e-6)
    cohen = build_base_classifier(load_named("mnist-cohen-0.50"), "cpu")
    assert torch.equal(cohen.denoise(x), x)
    assert torch.allclose(cohen(x), cohen.classify(x).softmax(1), atol=1e-6)


def test_half_space_votes_follow_the_exact_distribution(raw_spec):
    """P(class 1) = Phi(distance / sigma), within 4.5 standard errors at 20,000 draws."""
    from scipy.stats import norm

    spec = load_spec(raw_spec)
    f, data = build_base_classifier(spec, "cpu"), open_dataset(spec.data)
    found = counts(f, data, [Block(1, "estimation", 0, 20_000)], sigma=0.6, batch_size=1000)
    p = norm.cdf(4 * (155 / 255 - 0.5) / 0.6)
    (votes,) = found.values()
    assert abs(votes[1] / 20_000 - p) < 4.5 * np.sqrt(p * (1 - p) / 20_000)


def test_seed_and_local_seed_change_the_result(mnist):
    _, f, data = mnist
    assert counts(f, data, BLOCKS[:2], seed=1) != counts(f, data, BLOCKS[:2], seed=0)
    other = build_base_classifier(load_named("mnist", ["smoothing.local_seed=1"]), "cpu")
    assert not torch.equal(other.local_noise_MCHW, f.local_noise_MCHW)


@pytest.mark.parametrize("grid", [None, 255])
def test_noisy_images_are_the_inputs_of_cast_votes(mnist, grid):
    _, f, data = mnist
    noise, block = Noise(4, 0.5, grid), Block(8, "estimation", 30, 70)
    (cast,) = cast_votes(f, [block], {8: data[8]}, noise, CastOptions(40))
    x = noisy_images(data[8].image_CHW, noise, "estimation", 8, range(30, 70))
    assert np.bincount(f(x).argmax(dim=1), minlength=10).tolist() == cast.counts_K.tolist()
    if grid:
        assert torch.equal((x * grid).round() / grid, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "tests.models:three_classes"}, r"the classifier has 3 classes, but the data set has 2"),
        ({"arch": "tests.models:missing"}, r"tests\.models:missing.*name a function"),
        ({"arch": "mnist_cnn"}, r"classifier\.checkpoint is missing.* needs weights"),
    ],
)
def test_classifiers_that_do_not_fit(raw_spec, change, message):
    raw_spec["classifier"] = change
    with pytest.raises(UserError, match=message):
        build_base_classifier(load_spec(raw_spec), "cpu")


def test_nan_is_reported_with_its_block(raw_spec):
    raw_spec["classifier"] = {"arch": "tests.models:not_a_number"}
    spec = load_spec(raw_spec)
    with pytest.raises(UserError, match=r"not finite for estimation draws 0 to 99 of sample 1"):
        counts(build_base_classifier(spec, "cpu"), open_dataset(spec.data), [Block(1, "estimation", 0, 100)])


def test_weights_ids_distinguish_networks_in_one_file():
    ids = [weights_ids(load_named(f"mnist-{name}-0.25"))["classifier"] for name in ("dds", "diffsmooth")]
    assert ids[0] != ids[1]


@pytest.mark.parametrize(("name", "words"), [("in_training_mode", "between two batches"), ("with_memory", "two calls")])
def test_networks_in_training_mode_are_refused(raw_spec, name, words):
    raw_spec["classifier"]["arch"] = f"tests.models:{name}"
    with pytest.raises(UserError, match=rf"{words}.*model\.eval\(\)"):
        build_base_classifier(load_spec(raw_spec), "cpu")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("smoothing.precision=bf16", "smoothing.precision = 'bf16' is not applied to own functions"),
        ("classifier.normalize=half", "classifier.normalize is not applied to own functions"),
        ("classifier.interpolation=bilinear", "classifier.interpolation is not applied to own functions"),
    ],
)
def test_settings_that_an_own_function_would_ignore_are_refused(raw_spec, override, message):
    with pytest.raises(UserError, match=message):
        weights_ids(load_spec(raw_spec, [override]))


def test_the_identity_of_an_own_function_covers_the_modules_that_it_imports(raw_spec, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_network.py").write_text(
        "import torch\nfrom own_parts import weight\n\n\ndef f(spec, device): ...\n"
    )
    (tmp_path / "own_parts.py").write_text("weight = 1\n")
    raw_spec["classifier"]["arch"] = "own_network:f"
    before = weights_ids(load_spec(raw_spec))
    (tmp_path / "own_parts.py").write_text("weight = 10\n")
    after = weights_ids(load_spec(raw_spec))
    assert before["classifier.source"] == after["classifier.source"]
    assert before["classifier.imports"] != after["classifier.imports"]
    raw_spec["classifier"]["arch"] = "tests.models:half_space"  # imports only installed packages and this package
    assert set(weights_ids(load_spec(raw_spec))) == {"classifier.source"}


def test_votes_of_a_random_f_do_not_depend_on_the_split_and_have_the_exact_probability(raw_spec):
    """Inner noise of standard deviation s in each pixel acts like smoothing noise of sqrt(sigma^2 + s^2)."""
    raw_spec["classifier"]["arch"] = "tests.models:random_half_space"
    spec = load_spec(raw_spec)
    f, data = build_base_classifier(spec, "cpu"), open_dataset(spec.data)
    assert f.takes_draws
    blocks = [Block(sample, "estimation", start, start + 500) for sample in (0, 1) for start in (0, 500)]
    whole = counts(f, data, blocks)
    again = {}
    for block in blocks:
        again |= counts(f, data, [block], batch_size=33, threads=2)
    assert again == whole
    assert counts(f, data, blocks, seed=1) != whole
    for sample in (0, 1):
        margin = (float(data[sample].image_CHW.mean()) - THRESHOLD) * 4  # of an image of 16 pixels
        p = norm.cdf(margin / np.hypot(0.5, INNER_STD))
        votes = sum(counts_K[1] for block, counts_K in whole.items() if block.sample == sample)
        assert binomtest(int(votes), 1000, p).pvalue > 1e-3


def test_inner_noise_depends_on_every_part_of_a_draws_identity():
    parts = {"streams": 0, "samples": 4, "draws": 7, "copies": 0}

    def noise(seed=3, purpose="", **changes):
        rows = {key: np.array([value]) for key, value in (parts | changes).items()}
        return Draws(seed, **rows).noise((3,), purpose)[0]

    others = [noise(seed=4), noise(purpose="x"), *(noise(**{key: parts[key] + 1}) for key in parts)]
    assert len({tuple(one) for one in [noise(), *others]}) == 7
    smoothing = np.empty((1, 3), np.float32)
    Noise(3, 1.0).fill(smoothing, "selection", 4, [7])
    assert not np.allclose(smoothing[0], noise())
    copies = Draws(3, *(np.array([value]) for value in parts.values())).repeated(2)
    assert np.array_equal(copies.noise((3,))[0], noise())
    assert np.array_equal(copies.noise((3,))[1], noise(copies=1))


def test_a_compiled_f_is_one_graph(monkeypatch):
    """CUDA graphs and fusion end at each break; the compiler here only traces, and refuses breaks."""
    spec = load_named("fashion-diffsmooth-0.50", ["compute.compile=true"])
    f, x_BCHW = build_base_classifier(spec, "cpu"), torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before, traced = f(x_BCHW), torch.compile
    monkeypatch.setattr(torch, "compile", lambda one, **_: traced(one, backend="eager", fullgraph=True, dynamic=False))
    f.compile()
    assert torch.allclose(f(x_BCHW), before, atol=1e-6)


def test_a_random_f_is_not_compiled(raw_spec):
    raw_spec["classifier"]["arch"] = "tests.models:random_half_space"
    with pytest.raises(UserError, match=r"compute\.compile = true does not suit a function that takes draws"):
        build_base_classifier(load_spec(raw_spec), "cpu").compile()


def test_an_own_function_gets_the_fetched_file_of_a_remote_checkpoint(raw_spec, tmp_path, monkeypatch):
    from diffsmooth.pipeline.models import own

    monkeypatch.setattr(own, "local_file", lambda location: (tmp_path / "net.pt", "ema"))
    seen = []
    monkeypatch.setattr(own, "call_own_function", lambda arch, spec, device: seen.append(spec.classifier.checkpoint))
    section = {"arch": "tests.models:half_space", "checkpoint": "https://example.org/net.pt#ema"}
    spec = load_spec({**raw_spec, "classifier": section})
    own.OwnNetwork("classifier", spec.classifier, spec).call("cpu")
    assert seen == [f"{tmp_path / 'net.pt'}#ema"]


def test_a_checked_spec_is_resolved_hashed_and_opened_once(raw_spec, home, monkeypatch):
    """One call of certify on a complete run, and one worker: networks, files and data are looked at once each."""
    counted: Counter[str] = Counter()

    def counting(name, function):
        def called(*arguments, **options):
            counted[name] += 1
            return function(*arguments, **options)

        return called

    smoothing = sys.modules["diffsmooth.pipeline.smoothing"]
    for name in ("resolve_denoiser", "resolve_classifier"):
        monkeypatch.setattr(smoothing, name, counting(name, getattr(smoothing, name)))
    entry = DATASETS["parquet"]
    monkeypatch.setitem(DATASETS, "parquet", replace(entry, open=counting("open", entry.open)))
    once = {"resolve_denoiser": 1, "resolve_classifier": 1, "open": 1}
    spec = load_spec(raw_spec)
    (done,) = certify_all([(spec, home)], Options(quiet=True))
    assert done.complete
    assert counted == once
    counted.clear()
    Worker.load(Setup(spec, home, read_run(open_store(home)).votes_id, 16))
    assert counted == once


def test_a_checked_spec_stays_in_its_process(raw_spec):
    with pytest.raises(TypeError, match="each process makes its own"):
        pickle.dumps(check_spec(load_spec(raw_spec)))
