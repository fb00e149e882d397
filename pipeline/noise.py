"""The only randomness: noise of (seed, stream, sample, draw), the same on every device, batch, worker and retry.

Draw j of sample i in stream s is float32(sigma * z), with z from NumPy's
Generator(Philox(key = blake2b-128(seed, purpose), counter = [0, j, i, s])).standard_normal in float64. The low counter
word counts positions within a draw, so no two draws share a value (Salmon et al., SC 2011: a counter-based generator).
NumPy does not promise `standard_normal`'s stream for ever: `check_known_answers` refuses another one.

Shapes: N draws, M local copies, C H W image.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.block import Stage
from pipeline.errors import RunError

STREAMS: dict[Stage, int] = {"selection": 0, "estimation": 1}

Floats = NDArray[np.float32]

_KNOWN_ANSWERS = (
    # seed, stream, sample, draw, the first, second, 784th and 785th value of z, as exact hexadecimal float64
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
    """128-bit Philox key of a seed of any size and a purpose."""
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class _Rows:
    """Standard normal z of single counter rows under one key."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._philox = np.random.Philox(key=_key(seed, purpose))
        self._generator = np.random.Generator(self._philox)
        self._start = self._philox.state  # a fresh state; putting it back is ten times faster than a new generator

    def fill(self, z: NDArray[np.float64], stream: int, sample: int, draw: int) -> NDArray[np.float64]:
        self._start["state"]["counter"][:] = (0, draw, sample, stream)
        self._philox.state = self._start
        return self._generator.standard_normal(out=z)


def draw_noise(
    out_NCHW: Floats,
    *,
    seed: int,
    stage: Stage,
    sample: int,
    draws: Iterable[int],
    sigma: float,
    grid: int | None = None,
) -> None:
    """Write the noise of the given draws of one sample into `out_NCHW` (float32, C-contiguous, one row a draw).

    With `grid` it is whole numbers of steps of 1 / grid instead (255: of an 8-bit image). Image and noise then add up
    without rounding, so that x + noise tells nothing of x beyond what the law of the noise allows, and the certificate
    holds in floating-point arithmetic too, for all images of that grid (Voracek and Hein, ICLR 2023).
    """
    rows, stream = _Rows(seed, "smoothing"), STREAMS[stage]
    z = np.empty(out_NCHW[0].size)
    for out, draw in zip(out_NCHW.reshape(len(out_NCHW), -1), draws, strict=True):
        rows.fill(z, stream, sample, draw)
        if grid is not None:
            np.rint(np.multiply(z, sigma * grid, out=z), out=z)
        np.multiply(z, 1.0 if grid else sigma, out=out, casting="same_kind")


def local_noise(*, local_seed: int, m: int, shape: tuple[int, ...], local_sigma: float) -> Floats:
    """The m fixed tensors of local smoothing, float32, M x C x H x W; part of f, under a key of their own."""
    rows, out_MCHW = _Rows(local_seed, "local"), np.empty((m, *shape), dtype=np.float32)
    z = np.empty(out_MCHW[0].size)
    for copy, out in enumerate(out_MCHW.reshape(m, -1)):
        np.multiply(rows.fill(z, 0, 0, copy), local_sigma, out=out, casting="same_kind")
    return out_MCHW


def check_known_answers() -> None:
    """Refuse to work with a NumPy whose normal stream is not the one that runs are made of.

    Raises: RunError, naming the version of NumPy.
    """
    for seed, stream, sample, draw, *expected in _KNOWN_ANSWERS:
        z = _Rows(seed, "smoothing").fill(np.empty(785), stream, sample, draw)
        found = [float(z[position]).hex() for position in (0, 1, 783, 784)]
        if found != expected:
            raise RunError(
                f"NumPy {np.__version__} gives another noise stream than this version of diffsmooth is made of "
                f"(draw {draw} of sample {sample}: {found[0]}, expected {expected[0]}): install another NumPy; "
                "votes of the two must not be mixed"
            )
