"""Advice about settings and classifiers that are allowed but probably a mistake."""

import logging

from scipy.special import bdtrc

from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.spec import RunSpec

logger = logging.getLogger(__name__)

_TOO_FEW = 1e-3  # samples say nothing about a classifier if chance gets all of them right with more probability
_CHANCE = 0.01  # a clean accuracy counts as no better than chance if chance reaches it with more probability


def warn_of_settings(spec: RunSpec, order: Order) -> None:
    """Warn about settings that are allowed but probably a mistake."""
    smoothing = spec.smoothing
    n, share = max(order.looks.items())
    least = order.kind.least_n(share)
    if n < least:
        logger.warning(
            "n = %d is too small to %s even a unanimous vote at alpha = %g; use n >= %d",
            n, order.kind.verb, share, least,
        )  # fmt: skip
    if smoothing.m > 1 and smoothing.local_sigma >= 2 * smoothing.sigma:
        logger.warning(
            "smoothing.local_sigma = %g is far above smoothing.sigma = %g; check that they are not swapped (sigma is "
            "the noise of the draws, local_sigma that of the m copies)",
            smoothing.local_sigma, smoothing.sigma,
        )  # fmt: skip


def better_than_chance(right: int, samples: int, num_classes: int) -> bool | None:
    """Whether a classifier that gets so many samples right is better than chance; None if they cannot show it."""
    chance = 1 / num_classes
    if float(bdtrc(samples - 1, samples, chance)) > _TOO_FEW:
        return None
    return float(bdtrc(right - 1, samples, chance)) <= _CHANCE
