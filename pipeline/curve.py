"""Certificates -> certified-accuracy curve, average certified radius (ACR), envelope, plots.

Certified accuracy at radius r is the fraction of all samples, abstentions included, whose prediction is correct with a
certified radius of at least r (Cohen et al. 2019, section 4). ACR is the mean over all samples of the radius if
correct, and of 0 otherwise (MACER, arXiv 2001.02378, section 5.1).

Three statements about the data set go beyond the plain fraction k / m; none of them implies another:
- over the draws: each certificate errs independently with probability at most alpha, and an error affects one sample at
  every radius, so at most q of them err, with q the 1 - rho quantile of Bin(m, alpha). The true accuracy of g on these
  m images is therefore at least (k - q) / m at all radii at once, with probability 1 - rho. (The form in Cohen's
  published code lacks a factor 2 and fails for large m; it is given for comparison.)
- over the images, at one radius: the Clopper-Pearson interval of k among m, if the images were drawn at random;
- over the images, at all radii: the band of Dvoretzky, Kiefer and Wolfowitz (DKW) with Massart's constant.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaincinv

BAND = "Clopper-Pearson 95 % per radius"
RHO = 0.001  # probability that the bound over the draws fails
_DELTA = 0.05  # probability that a statement over the images fails


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Certified accuracy of the certificates of a run or a log; incomplete samples are excluded and counted apart."""

    name: str
    radii: NDArray[np.float64]  # certified radius of each complete sample, 0 without one
    correct: NDArray[np.bool_]
    abstained: int
    incomplete: int
    post_hoc: bool
    sigma: float | None  # None if a log does not say
    max_radius: float  # the maximum at this n and alpha; for a log, the largest in it
    alpha: float | None = None  # error probability of one certificate; None for a log
    skipped: int = 0  # samples that count as wrong because their selected class is not their label
    tested: NDArray[np.float64] | None = None  # the radii of grid mode
    scales: tuple[float, ...] = ()  # the sigmas of a cascade, which is drawn beside the curves of every sigma

    @property
    def num_samples(self) -> int:
        return len(self.radii)

    @property
    def acr(self) -> float:
        """Average certified radius; NaN in grid mode, whose mean radius is not comparable with an ACR."""
        return float(np.mean(self.radii * self.correct)) if self.num_samples and self.tested is None else float("nan")

    @property
    def abstention_rate(self) -> float:
        """Fraction of abstentions among the samples that were not skipped."""
        judged = self.num_samples - self.skipped
        return self.abstained / judged if judged else float("nan")

    def at(self, radii: ArrayLike) -> NDArray[np.float64]:
        """Certified accuracy at each radius, between 0 and 1."""
        return self._counts(radii) / max(self.num_samples, 1)

    def draws_lower(self, radii: ArrayLike, rho: float = RHO) -> NDArray[np.float64]:
        """A lower bound of g's true accuracy on these images, at all radii at once, with probability 1 - rho.

        NaN if alpha is unknown.
        """
        if self.alpha is None or not self.num_samples:
            return np.full(np.shape(radii), np.nan)
        return np.maximum(self._counts(radii) - self.most_errors(rho), 0) / self.num_samples

    def most_errors(self, rho: float = RHO) -> int:
        """The largest number of certificates that err, with probability 1 - rho. Raises: ValueError without alpha."""
        if self.alpha is None:
            raise ValueError("the number of wrong certificates cannot be bounded without alpha")
        return next(q for q in range(self.num_samples + 1) if bdtr(q, self.num_samples, self.alpha) >= 1 - rho)

    def cohen_lower(self, radii: ArrayLike, rho: float = RHO) -> NDArray[np.float64]:
        """The same bound as in Cohen's published code; not valid for large m. NaN if alpha is unknown."""
        if self.alpha is None or not self.num_samples:
            return np.full(np.shape(radii), np.nan)
        alpha, m, logarithm = self.alpha, self.num_samples, math.log(1 / rho)
        return self.at(radii) - alpha - math.sqrt(alpha * (1 - alpha) * logarithm / m) - logarithm / (3 * m)

    def table(self, radii: ArrayLike) -> pd.DataFrame:
        """Columns radius, certified_accuracy, lower, upper, num_samples, band, draws_lower, cohen_lower, dkw_*.

        `lower` and `upper` are the 95 % interval over the images at each radius, `dkw_*` the 95 % band over all radii;
        `draws_lower` and `cohen_lower` are statements about these images.
        """
        radii, m = np.asarray(radii, dtype=float), self.num_samples
        count, share = self._counts(radii), self.at(radii)
        half_width = math.sqrt(math.log(2 / _DELTA) / (2 * max(m, 1)))
        return pd.DataFrame(
            {
                "radius": radii,
                "certified_accuracy": share,
                "lower": np.where(count > 0, betaincinv(np.maximum(count, 1), m - count + 1, 0.025), 0.0),
                "upper": np.where(count < m, betaincinv(count + 1, np.maximum(m - count, 1), 0.975), 1.0),
                "num_samples": m,
                "band": BAND,
                "draws_lower": self.draws_lower(radii),
                "cohen_lower": self.cohen_lower(radii),
                "dkw_lower": np.maximum(share - half_width, 0.0),
                "dkw_upper": np.minimum(share + half_width, 1.0),
            }
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw the curve with its bands on matplotlib axes, by default on new ones of pyplot, and return the axes."""
        if axes is None:
            from matplotlib import pyplot

            _, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        draw(axes, [self])
        return axes

    def _counts(self, radii: ArrayLike) -> NDArray[np.int64]:
        right = np.sort(self.radii[self.correct])
        return len(right) - np.searchsorted(right, np.asarray(radii, dtype=float), side="left")


def curve_of(
    name: str,
    certificates: pd.DataFrame,
    sigma: float | None,
    max_radius: float,
    alpha: float | None = None,
    tested: Sequence[float] | None = None,
) -> Curve:
    """The curve of a table of certificates, without the samples that are exempt."""
    certificates = certificates[certificates["status"] != "exempt"]
    complete = certificates[certificates["status"] != "incomplete"]
    return Curve(
        name=name,
        radii=complete["radius"].to_numpy(dtype=float),
        correct=complete["correct"].to_numpy(dtype=bool),
        abstained=int((complete["status"] == "abstained").sum()),
        incomplete=len(certificates) - len(complete),
        post_hoc=bool(certificates["post_hoc"].any()),
        sigma=sigma,
        max_radius=max_radius,
        alpha=alpha,
        skipped=int((complete["status"] == "skipped").sum()),
        tested=None if tested is None else np.array(tested),
    )


class Envelope(NamedTuple):
    """The best of several curves at each radius, as papers report over several sigmas.

    It is chosen after looking, and is not the certificate of one classifier: each value belongs to its `best` curve.
    """

    certified_accuracy: NDArray[np.float64]
    best: list[Curve]


def envelope_of(curves: Sequence[Curve], radii: ArrayLike) -> Envelope:
    """The highest certified accuracy at each radius, and the first curve that attains it."""
    accuracies = np.array([curve.at(radii) for curve in curves])
    return Envelope(accuracies.max(axis=0), [curves[index] for index in accuracies.argmax(axis=0)])


def grid(step: float, stop: float) -> NDArray[np.float64]:
    """Decimal radii 0, step, 2 step, ... up to the first one at or above `stop`."""
    return np.array([round(index * step, 10) for index in range(math.ceil(stop / step - 1e-9) + 1)])


def table_radii(curves: Sequence[Curve]) -> NDArray[np.float64]:
    """The radii of a printed table: those of grid mode, or round steps up to the largest radius, at most a dozen."""
    if all(curve.tested is not None for curve in curves):
        return np.unique(np.concatenate([curve.tested for curve in curves if curve.tested is not None]))
    reach = max(curve.max_radius for curve in curves)
    step = next(step for step in (0.25, 0.5, 1.0, 2.0, 5.0, math.inf) if reach / step <= 12)
    return np.array([0.0]) if math.isinf(step) else grid(step, math.floor(reach / step) * step)


def plot(
    curves: Sequence[Curve], path: str | Path | BinaryIO, title: str | None = None, *, envelope: bool = False
) -> None:
    """Draw the curves with their bands into one picture, a panel per sigma, and one for logs without a sigma.

    A cascade and the envelope are drawn in every panel.

    The extension of a path selects PNG, PDF or SVG; a file object gets PNG.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs, cascades = [one for one in curves if not one.scales], [one for one in curves if one.scales]
    sigmas = sorted({curve.sigma for curve in runs}, key=lambda sigma: math.inf if sigma is None else sigma) or [None]
    figure = Figure(figsize=(max(6.4, 4.6 * len(sigmas)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for index, sigma in enumerate(sigmas):
        axes = figure.add_subplot(1, len(sigmas), index + 1)
        scales = ", ".join(f"{scale:g}" for one in cascades for scale in one.scales)
        unnamed = "published logs" if runs else f"cascade over $\\sigma$ = {scales}"
        axes.set_title(unnamed if sigma is None else f"$\\sigma$ = {sigma:g}", fontsize=10)
        shown = [*cascades, *(curve for curve in runs if curve.sigma == sigma)]
        draw(axes, shown, envelope_over=runs if envelope else ())
    if title:
        figure.suptitle(title, fontsize=11)
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):  # keep text as text, as publishers require
        figure.savefig(path, dpi=160)


# The colours of Okabe and Ito, distinguishable with any colour vision; line styles distinguish them in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def draw(axes: Any, curves: Sequence[Curve], *, envelope_over: Sequence[Curve] = ()) -> None:
    """Draw the curves on matplotlib axes, over the envelope of `envelope_over` if it is given."""
    reach = max(curve.max_radius for curve in curves) or 1.0
    radii = np.linspace(0, reach * 1.02, 1000)
    if envelope_over:
        best = envelope_of(envelope_over, radii).certified_accuracy
        label = f"envelope of {len(envelope_over)} curves, post hoc, not a classifier"
        axes.plot(radii, best, color="black", linewidth=3.2, label=label)
    for index, curve in enumerate(curves):
        turn = index // len(COLOURS)  # when colours repeat, the line style changes
        colour, style = COLOURS[index % len(COLOURS)], _LINES[(index + turn) % len(_LINES)]
        table = curve.table(radii)
        mean = f"ACR {curve.acr:.3f}" if curve.tested is None else "certified at the marked radii only"
        label = f"{curve.name} ({mean}{', post hoc' if curve.post_hoc else ''})".replace("$", r"\$")
        if curve.tested is not None:
            axes.plot(curve.tested, curve.at(curve.tested), color=colour, linestyle="", marker="o", markersize=4)
        axes.plot(radii, table["certified_accuracy"], color=colour, linestyle=style, label=label)
        axes.fill_between(radii, table["lower"], table["upper"], color=colour, alpha=0.12, linewidth=0)
        if len(curves) == 1 and curve.alpha is not None:
            label = f"lower bound over the draws ({100 * (1 - RHO):g} %, all radii)"
            axes.plot(radii, table["draws_lower"], color="black", linestyle=":", linewidth=1, label=label)
            axes.plot(radii, table["dkw_lower"], color=colour, alpha=0.5, linewidth=0.6, label="DKW 95 %, all radii")
            axes.plot(radii, table["dkw_upper"], color=colour, alpha=0.5, linewidth=0.6)
    axes.set(xlabel="l2 radius", ylabel="certified accuracy", xlim=(0, reach * 1.02), ylim=(0, 1.01))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, title=f"band: {BAND}", title_fontsize=7)
