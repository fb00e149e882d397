"""The generator: known answers, its law, and that no two draws share anything."""

import numpy as np
import pytest

from pipeline import noise
from pipeline.errors import RunError


def drawn(draws, *, sample=0, stage="estimation", seed=0, size=1000, sigma=1.0):
    out = np.empty((len(draws), size), np.float32)
    noise.draw_noise(out, seed=seed, stage=stage, sample=sample, draws=draws, sigma=sigma)
    return out


def test_philox_is_the_published_one():
    """Random123's known answer of philox4x64-10 for counter 0 and key 0."""
    philox = np.random.Philox(key=0, counter=2**256 - 1)  # NumPy counts up before its first block
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox.random_raw(4).tolist() == expected


def test_known_answers_and_refusal(monkeypatch):
    noise.check_known_answers()
    monkeypatch.setattr(noise, "_KNOWN_ANSWERS", [(0, 0, 0, 0, "0x0p+0", "0x0p+0", "0x0p+0", "0x0p+0")])
    with pytest.raises(RunError, match=r"NumPy .* another noise stream"):
        noise.check_known_answers()


def test_stream_is_the_documented_one():
    key = noise._key(5, "smoothing")
    z = np.random.Generator(np.random.Philox(key=key, counter=[0, 42, 7, 1])).standard_normal(30)
    assert (drawn([42], sample=7, seed=5, size=30, sigma=0.3)[0] == (0.3 * z).astype(np.float32)).all()


def test_moments_of_a_million_values():
    z = drawn(range(1000)).astype(np.float64).ravel()
    N = z.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 4.5 * np.sqrt(variance / N)
    assert abs(np.mean(z[1:] * z[:-1])) < 4.5 / np.sqrt(N)
    neighbours = drawn(range(2000))
    assert abs(np.mean(neighbours[1:] * neighbours[:-1])) < 4.5 / np.sqrt(N)


def test_no_value_is_shared_even_at_a_shift():
    """Neighbouring values of many draws, streams, samples and seeds: an equal pair would betray a shifted stream."""
    parts = [
        drawn(range(50), sample=sample, stage=stage, seed=seed, size=64)
        for sample in (0, 1, 50_000)
        for stage in ("selection", "estimation")
        for seed in (0, 1, 2**32, 2**64)
    ]
    pairs = np.concatenate([np.stack([part[:, :-1], part[:, 1:]], axis=-1).reshape(-1, 2) for part in parts])
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_local_noise_has_a_purpose_of_its_own_and_the_cut_changes_nothing():
    local = noise.local_noise(local_seed=0, m=3, shape=(1, 4, 4), local_sigma=1.0)
    assert local.shape == (3, 1, 4, 4)
    assert not np.isin(local.ravel(), drawn(range(3), stage="selection", size=16).ravel()).any()
    assert (noise.local_noise(local_seed=0, m=1, shape=(1, 4, 4), local_sigma=1.0) == local[:1]).all()
    whole = drawn(range(20))
    assert (np.concatenate([drawn(range(7)), drawn(range(7, 20))]) == whole).all()
    assert (drawn(range(20)) == whole).all()


def test_no_global_generator_is_touched():
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    drawn(range(3))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
