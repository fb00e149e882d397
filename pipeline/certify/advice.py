"""Advice about settings that are allowed but probably a mistake."""

import logging

from diffsmooth.pipeline.certify.certificates import least_certifying_n
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.spec import RunSpec

logger = logging.getLogger(__name__)


def warn_of_settings(spec: RunSpec, order: Order) -> None:
    """Warn about settings that are allowed but probably a mistake."""
    smoothing = spec.smoothing
    n, share = max(order.looks.items())
    least = least_certifying_n(share, order.certificate)
    if n < least:
        logger.warning(
            "n = %d is too small to %s even a unanimous vote at alpha = %g; use n >= %d",
            n, "predict" if order.certificate == "predict" else "certify", share, least,
        )  # fmt: skip
    if smoothing.m > 1 and smoothing.local_sigma >= 2 * smoothing.sigma:
        logger.warning(
            "smoothing.local_sigma = %g is far above smoothing.sigma = %g; check that they are not swapped (sigma is "
            "the noise of the draws, local_sigma that of the m copies)",
            smoothing.local_sigma, smoothing.sigma,
        )  # fmt: skip
