"""The noise generator: known answers, its distribution, and independence of the draws."""

import numpy as np
import pytest

from diffsmooth.pipeline import noise
from diffsmooth.pipeline.errors import RunError
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.spec import Smoothing


def drawn(draws, *, sample=0, stage="estimation", seed=0, size=1000, sigma=1.0, grid=None):
    out = np.empty((len(draws), size), np.float32)
    Noise(seed, sigma, grid).fill(out, stage, sample, draws)
    return out


def test_philox_matches_random123():
    """Random123's known answer of philox4x64-10 for counter 0 and key 0."""
    philox = np.random.Philox(key=0, counter=2**256 - 1)  # NumPy increments the counter before its first block
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox.random_raw(4).tolist() == expected


def test_known_answers_hold_and_another_stream_is_refused(monkeypatch):
    noise.check_known_answers()
    monkeypatch.setattr(noise, "_KNOWN_ANSWERS", [(0, 0, 0, 0, "0x0p+0", "0x0p+0", "0x0p+0", "0x0p+0")])
    with pytest.raises(RunError, match=r"NumPy .* a different noise stream.*; install another version of NumPy"):
        noise.check_known_answers()


def test_stream_matches_its_documentation():
    key = noise._key(5, "smoothing")
    z = np.random.Generator(np.random.Philox(key=key, counter=[0, 42, 7, 1])).standard_normal(30)
    assert (drawn([42], sample=7, seed=5, size=30, sigma=0.3)[0] == (0.3 * z).astype(np.float32)).all()
    rounded = np.rint(0.3 * 255 * z).astype(np.float32)
    assert (drawn([42], sample=7, seed=5, size=30, sigma=0.3, grid=255)[0] == rounded).all()


def test_noise_of_a_spec_has_its_seed_sigma_and_grid():
    assert Noise.of(Smoothing(sigma=0.5, seed=7, noise_grid=255)) == Noise(7, 0.5, 255)
    assert Noise.of(Smoothing(sigma=0.5)) == Noise(0, 0.5)
    assert (Noise(0, 0.5, 255).unit, Noise(0, 0.5).unit) == (1 / 255, 1.0)


def test_moments_of_a_million_values():
    z = drawn(range(1000)).astype(np.float64).ravel()
    N = z.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 4.5 * np.sqrt(variance / N)
    assert abs(np.mean(z[1:] * z[:-1])) < 4.5 / np.sqrt(N)
    neighbours = drawn(range(2000))
    assert abs(np.mean(neighbours[1:] * neighbours[:-1])) < 4.5 / np.sqrt(N)


def test_no_two_draws_share_a_part_of_their_stream():
    """Pairs of adjacent values of many draws, stages, samples and seeds: an equal pair reveals a shifted stream."""
    parts = [
        drawn(range(50), sample=sample, stage=stage, seed=seed, size=64)
        for sample in (0, 1, 50_000)
        for stage in ("selection", "estimation")
        for seed in (0, 1, 2**32, 2**64)
    ]
    pairs = np.concatenate([np.stack([part[:, :-1], part[:, 1:]], axis=-1).reshape(-1, 2) for part in parts])
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_local_noise_is_independent_of_the_noise_of_draws():
    local = noise.local_noise(local_seed=0, m=3, shape=(1, 4, 4), local_sigma=1.0)
    assert local.shape == (3, 1, 4, 4)
    assert not np.isin(local.ravel(), drawn(range(3), stage="selection", size=16).ravel()).any()
    assert (noise.local_noise(local_seed=0, m=1, shape=(1, 4, 4), local_sigma=1.0) == local[:1]).all()


def test_noise_does_not_depend_on_how_draws_are_split():
    whole = drawn(range(20))
    assert (np.concatenate([drawn(range(7)), drawn(range(7, 20))]) == whole).all()
    assert (drawn(range(20)) == whole).all()


def test_the_global_generator_is_not_used():
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    drawn(range(3))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
