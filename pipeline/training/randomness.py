"""All randomness of a training: order of the images, augmentation and noise, from Philox keyed by (seed, purpose).

Every value is addressed by the position of an image in the training (step times batch plus row) and the number of its
copy. It is therefore the same after a resume, for every number of workers, and on every device.

Shapes: B images.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def _philox(seed: int, purpose: str) -> np.random.Philox:
    digest = hashlib.blake2b(f"training:{purpose}:{seed}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of `size` images in an epoch."""
    philox = _philox(seed, "order")
    return np.random.Generator(philox.advance(epoch << 128)).permutation(size)


class Randomness:
    """The random values of a batch of images at known positions."""

    def __init__(self, seed: int, positions: Sequence[int], copy: int = 0, purpose: str = "") -> None:
        self._seed, self._positions, self._copy, self._purpose = seed, positions, copy, purpose

    def copy(self, number: int) -> "Randomness":
        """The values of another noisy copy of the same images."""
        return Randomness(self._seed, self._positions, number, self._purpose)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal values, B x shape, float32."""
        out = np.empty((len(self._positions), *shape), dtype=np.float32)
        for row, source in zip(out, self._sources(purpose), strict=True):
            source.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(out)

    def uniform(self, purpose: str, count: int = 1) -> Tensor:
        """Return values in [0, 1), B x count, float32."""
        rows = [source.random(count, dtype=np.float32) for source in self._sources(purpose)]
        return torch.from_numpy(np.stack(rows))

    def _sources(self, purpose: str) -> Iterator[np.random.Generator]:
        """Yield a generator at the start of each row's values; the low counter word counts the values of a row."""
        philox = _philox(self._seed, f"{self._purpose}:{purpose}")
        generator, state = np.random.Generator(philox), philox.state
        for position in self._positions:
            state["state"]["counter"][:] = (0, position, self._copy, 0)
            philox.state = state  # ten times faster than another Philox
            yield generator
