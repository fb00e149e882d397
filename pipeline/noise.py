"""The only source of randomness: noise that depends on seed, stage, sample and draw alone.

Draw j of sample i in stage s is float32(sigma * z), where z comes from NumPy's
Generator(Philox(key = blake2b-128(seed, purpose), counter = [0, j, i, s])).standard_normal in float64. The low counter
word counts positions within a draw, so no two draws share a value (Salmon et al., SC 2011: counter-based generators).
The noise is therefore identical on every device and worker, for every batch size and at every retry. NumPy does not
guarantee the stream of `standard_normal` across versions: `check_known_answers` detects a different stream.

Shapes: N draws, M local copies, C H W image.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from diffsmooth.pipeline.block import Stage
from diffsmooth.pipeline.errors import RunError
from diffsmooth.pipeline.spec import SmoothingIdentity

STREAMS: dict[Stage, int] = {"selection": 0, "estimation": 1}

Floats = NDArray[np.float32]

_KNOWN_ANSWERS = (
    # seed, stream, sample, draw, then the values of z at positions 0, 1, 783 and 784 as exact hexadecimal float64
    (0, 0, 0, 0, "0x1.66ce4f3f3b4ffp-3", "0x1.0fe9f17d6ca6ap+0", "0x1.921c2629605e8p+0", "0x1.0335b8b1458dep-2"),
    (0, 1, 499, 99999, "-0x1.5842d53e1923ap-1", "0x1.1556342f679cbp-1", "0x1.9742389a517e4p-1", "0x1.0ed4af5f99d03p-2"),
    (
        18446744073709551617,
        1,
        7,
        12345,
        "0x1.55b94240a14eep-2",
        "-0x1.506a766b8b0d1p-1",
        "-0x1.8d9c8f0577e70p-2",
        "0x1.44b263cb7e6d0p-4",
    ),
)


def _key(seed: int, purpose: str) -> NDArray[np.uint64]:
    """Return the 128-bit Philox key of a seed of any size and a purpose."""
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class _NormalStream:
    """Standard normal values under one key, addressed by stream, sample and draw."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._philox = np.random.Philox(key=_key(seed, purpose))
        self._generator = np.random.Generator(self._philox)
        self._initial_state = self._philox.state  # restoring it is ten times faster than creating a generator

    def fill(self, z: NDArray[np.float64], stream: int, sample: int, draw: int) -> NDArray[np.float64]:
        self._initial_state["state"]["counter"][:] = (0, draw, sample, stream)
        self._philox.state = self._initial_state
        return self._generator.standard_normal(out=z)


@dataclass(frozen=True)
class Noise:
    """The noise of a run: normal with standard deviation `sigma`, in [0, 1] pixel units.

    With `grid`, the noise is rounded to whole multiples of 1 / grid (255 for 8-bit images). Image and noise, both
    counted in steps of 1 / grid, then add up without rounding. The sum reveals nothing about the image beyond what the
    distribution of the noise allows, so the certificate also holds in floating-point arithmetic, for all images on that
    grid (Voracek and Hein, ICLR 2023).
    """

    seed: int
    sigma: float
    grid: int | None = None
    purpose: str = "smoothing"  # draws of two purposes are independent

    @classmethod
    def of(cls, smoothing: SmoothingIdentity) -> Self:
        """Return the noise of a spec's [smoothing] table, whose seed must be a number."""
        assert isinstance(smoothing.seed, int), "the driver replaces the seed 'random' with a number"
        return cls(smoothing.seed, smoothing.sigma, smoothing.noise_grid)

    @property
    def unit(self) -> float:
        """The size, in [0, 1] pixel units, of 1.0 in the values that `fill` writes."""
        return 1.0 if self.grid is None else 1 / self.grid

    def fill(self, out_NCHW: Floats, stage: Stage, sample: int, draws: Iterable[int]) -> None:
        """Write the noise of the given draws of one sample, one draw per row, in multiples of `unit`.

        `out_NCHW` is float32 and C-contiguous.
        """
        stream = _NormalStream(self.seed, self.purpose)
        z = np.empty(out_NCHW[0].size)
        for out, draw in zip(out_NCHW.reshape(len(out_NCHW), -1), draws, strict=True):
            stream.fill(z, STREAMS[stage], sample, draw)
            if self.grid is not None:
                np.rint(np.multiply(z, self.sigma * self.grid, out=z), out=z)
            np.multiply(z, 1.0 if self.grid else self.sigma, out=out, casting="same_kind")


@dataclass(frozen=True)
class Draws:
    """Which draw each row of a batch is. A network with inner randomness derives it from this identity alone.

    Its votes are then the same for every batch size and worker, at every retry, and in an audit. The certificate holds
    for the probability over the smoothing noise and the inner randomness together, which have different keys. `copy` is
    the number of the local copy, and `samples` the index of the clean image.
    """

    seed: int
    streams: NDArray[np.int64]
    samples: NDArray[np.int64]
    draws: NDArray[np.int64]
    copies: NDArray[np.int64]

    @classmethod
    def unknown(cls, rows: int) -> Self:
        """Return the identity of rows that are no draws of a run, such as those of a measurement."""
        zeros = np.zeros(rows, dtype=np.int64)
        return cls(0, zeros, zeros, np.arange(rows), zeros)

    def __len__(self) -> int:
        return len(self.draws)

    def repeated(self, m: int) -> Self:
        """Return the identity of m local copies of each row, the copies of a row next to each other."""
        streams, samples, draws = (np.repeat(one, m) for one in (self.streams, self.samples, self.draws))
        return type(self)(self.seed, streams, samples, draws, np.tile(np.arange(m), len(self)))

    def noise(self, shape: tuple[int, ...], purpose: str = "") -> Floats:
        """Return standard normal noise for each row, B x shape, float32; another purpose gives independent noise."""
        stream, out = _NormalStream(self.seed, f"own:{purpose}"), np.empty((len(self), *shape), dtype=np.float32)
        z = np.empty(out[0].size if len(self) else 0)
        identities = zip(self.streams + len(STREAMS) * self.copies, self.samples, self.draws, strict=True)
        for row, (number, sample, draw) in zip(out.reshape(len(self), -1), identities, strict=True):
            row[:] = stream.fill(z, int(number), int(sample), int(draw))
        return out


def local_noise(*, local_seed: int, m: int, shape: tuple[int, ...], local_sigma: float) -> Floats:
    """Return the m fixed noise tensors of local smoothing, M x C x H x W, float32.

    They are part of the base classifier and have a key of their own.
    """
    stream, out_MCHW = _NormalStream(local_seed, "local"), np.empty((m, *shape), dtype=np.float32)
    z = np.empty(out_MCHW[0].size)
    for copy, out in enumerate(out_MCHW.reshape(m, -1)):
        np.multiply(stream.fill(z, 0, 0, copy), local_sigma, out=out, casting="same_kind")
    return out_MCHW


def fixed_noise(purpose: str, seed: int, shape: tuple[int, ...]) -> Floats:
    """Return standard normal noise that is part of a network, N x C x H x W, float32, under a key of its own."""
    stream, out_NCHW = _NormalStream(seed, purpose), np.empty(shape, dtype=np.float32)
    z = np.empty(out_NCHW[0].size)
    for index, out in enumerate(out_NCHW.reshape(shape[0], -1)):
        out[:] = stream.fill(z, 0, 0, index)
    return out_NCHW


def check_known_answers() -> None:
    """Check that the installed NumPy generates the noise stream that all runs use.

    Raises: RunError, naming the version of NumPy.
    """
    for seed, stream, sample, draw, *expected in _KNOWN_ANSWERS:
        z = _NormalStream(seed, "smoothing").fill(np.empty(785), stream, sample, draw)
        found = [float(z[position]).hex() for position in (0, 1, 783, 784)]
        if found != expected:
            raise RunError(
                f"NumPy {np.__version__} generates a different noise stream than diffsmooth requires (draw {draw} of "
                f"sample {sample} starts with {found[0]}, expected {expected[0]}); install another version of NumPy, "
                "because votes of the two streams must not be mixed"
            )
