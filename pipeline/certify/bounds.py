"""Counts of votes -> bounds of probabilities, and l2 radii (Cohen et al. 2019, arXiv 1902.02918).

    p_A lower bound  = inf{p : P(Bin(n, p) >= n_A) > alpha}    one-sided Clopper-Pearson
    certified radius = sigma * Phi^-1(p_A lower bound)         (equation 3 with p_B = 1 - p_A)

Both are computed from the upper tail q = 1 - p_A, which keeps its digits when p_A is close to 1.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, betainccinv, ndtri

_ROUNDING = 1e-15  # relative, times n: above SciPy's error, so that rounding never raises a bound or a radius


def upper_tail(n_A: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """q = 1 - p_A lower bound: the 1 - alpha quantile of Beta(n - n_A + 1, n_A), and 1 for n_A = 0."""
    count, total = np.broadcast_arrays(np.asarray(n_A), np.asarray(n))
    for name, values in (("n_A", count), ("n", total)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be whole numbers, got {values.dtype}")
    if (total < 1).any() or (count < 0).any() or (count > total).any():
        raise ValueError("n_A and n must satisfy 0 <= n_A <= n and n >= 1")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} must be between 0 and 1")
    q = betainccinv(total - count + 1.0, np.maximum(count, 1).astype(float), alpha) * (1 + _ROUNDING * total)
    q = np.where(count == total, -np.expm1(np.log(alpha) / total), q)
    return np.where(count == 0, 1.0, np.minimum(q, 1.0))


def lower_confidence_bound(n_A: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """One-sided Clopper-Pearson lower bound at confidence 1 - alpha, over arrays of whole numbers.

    It is 0 for n_A = 0, and alpha^(1/n) for n_A = n.
    Raises: ValueError unless 0 <= n_A <= n, n >= 1 and 0 < alpha < 1.
    """
    return 1 - upper_tail(n_A, n, alpha)


def certified_radius(n_A: ArrayLike, n: ArrayLike, alpha: float, sigma: float) -> NDArray[np.float64]:
    """l2 radius in [0, 1] pixel units, over arrays; 0 if the bound is below 1/2 (abstain).

    Raises: ValueError as `lower_confidence_bound`, and unless sigma > 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma = {sigma} must be above 0")
    q = upper_tail(n_A, n, alpha)
    return np.where(q <= 0.5, -sigma * ndtri(np.minimum(q, 0.5)), 0.0) + 0.0


def upper_confidence_bound(n_B: ArrayLike, n: ArrayLike, level: ArrayLike) -> NDArray[np.float64]:
    """One-sided Clopper-Pearson upper bound at confidence 1 - level, over arrays; 1 for n_B = n."""
    count, total = np.broadcast_arrays(np.asarray(n_B), np.asarray(n))
    p_B = betainccinv(count + 1.0, np.maximum(total - count, 1).astype(float), level)
    return np.minimum(1.0, np.where(count == total, 1.0, p_B) * (1 + _ROUNDING * total))


def prediction_p_value(n_A: ArrayLike, n_B: ArrayLike) -> NDArray[np.float64]:
    """Two-sided p-value of n_A against n_B <= n_A votes under equal probabilities, over arrays of whole numbers.

    Raises: ValueError unless 0 <= n_B <= n_A.
    """
    first, second = np.broadcast_arrays(np.asarray(n_A), np.asarray(n_B))
    if (second < 0).any() or (second > first).any():
        raise ValueError("n_A and n_B must satisfy 0 <= n_B <= n_A")
    return np.minimum(1.0, 2 * bdtrc(first - 1.0, first + second, 0.5))
