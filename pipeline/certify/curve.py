"""Certificates -> certified-accuracy curve, average certified radius (ACR), envelope, plots.

Certified accuracy at radius r is the fraction of all samples, abstentions included, whose prediction is correct with a
certified radius of at least r (Cohen et al. 2019, section 4). ACR is the mean over all samples of the radius if
correct, and of 0 otherwise (MACER, arXiv 2001.02378, section 5.1).

Four statements about the data set go beyond the plain fraction k / m; none of them implies another:
- over the draws: each certificate errs independently with probability at most alpha, and an error affects one sample at
  every radius, so at most q of them err, with q the 1 - rho quantile of Bin(m, alpha). The true accuracy of g on these
  m images is therefore at least (k - q) / m at all radii at once, with probability 1 - rho. (The form in Cohen's
  published code lacks a factor 2 and fails for large m; it is given for comparison.)
- over the images, at one radius: the Clopper-Pearson interval of k among m, if the images were drawn at random. It
  bounds q, the share of the population that this procedure certifies;
- over both, at one radius: a certificate that errs with probability at most alpha gives q <= A + (1 - A) alpha, with A
  the true accuracy of g in the population. Therefore A >= (q_lower - alpha) / (1 - alpha);
- over the images, at all radii: the band of Dvoretzky, Kiefer and Wolfowitz (DKW) with Massart's constant, also for q.

Statements over the images assume that the number of images was fixed before the first look at them. They do not hold
for an order that adds samples to a run (`grown`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaincinv, ndtri

from diffsmooth.pipeline.certify.kinds import KINDS, TOP, CertificateKind

BAND = "Clopper-Pearson 95 % per radius, of the certified share"
GROWN = "the sample set grew after looking: population intervals do not hold"
CONFIDENCE = 0.95  # of the interval of the ACR
RHO = 0.001  # probability that the bound over the draws fails
_DELTA = 0.05  # probability that a statement over the images fails
_LEAST_FOR_ACR = 30  # samples; the interval of the ACR was simulated with no fewer


class Interval(NamedTuple):
    """A confidence interval; NaN if there is none."""

    lower: float
    upper: float


NO_INTERVAL = Interval(math.nan, math.nan)


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
    certificate: str = TOP  # its kind in certify/kinds.py; published logs hold this one
    grown: bool = False  # an earlier order of the run has other samples, so m was not fixed before the first look
    unit: str = "l2 radius"  # what the radii are; see certify/units.py
    # the proven upper bound of each complete sample's radius, infinite if there is none; None: no attack on the run
    uppers: NDArray[np.float64] | None = None

    @property
    def kind(self) -> CertificateKind:
        return KINDS[self.certificate]

    @property
    def band(self) -> str:
        """What the shaded band is."""
        return f"{BAND}; {GROWN}" if self.grown else BAND

    @property
    def num_samples(self) -> int:
        return len(self.radii)

    @property
    def acr(self) -> float:
        """Average certified radius; NaN in grid mode, whose mean radius is not comparable with an ACR."""
        return float(np.mean(self.radii * self.correct)) if self.num_samples and self.tested is None else float("nan")

    @property
    def acr_interval(self) -> Interval:
        """The 95 % interval of the ACR over images from the same population.

        NaN in grid mode, for fewer than 30 samples, and if all radii are equal.
        """
        if self.tested is not None or self.num_samples < _LEAST_FOR_ACR:
            return NO_INTERVAL
        return mean_interval(self.radii * self.correct, CONFIDENCE)

    @property
    def abstention_rate(self) -> float:
        """Fraction of abstentions among the samples that were not skipped."""
        judged = self.num_samples - self.skipped
        return self.abstained / judged if judged else float("nan")

    def at(self, radii: ArrayLike) -> NDArray[np.float64]:
        """Certified accuracy at each radius, between 0 and 1."""
        return self._counts(radii) / max(self.num_samples, 1)

    def resisted(self, radii: ArrayLike) -> NDArray[np.float64]:
        """The share of all samples that no attack has proven wrong within each radius; NaN without an attack.

        It bounds the true accuracy under perturbations of that norm from above, as certified accuracy does from below.
        """
        if self.uppers is None or not self.num_samples:
            return np.full(np.shape(radii), np.nan)
        proven = np.sort(self.uppers)
        reached = np.searchsorted(proven, np.asarray(radii, dtype=float), side="right")
        return (self.num_samples - reached) / self.num_samples

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
        """Columns radius, certified_accuracy, lower, upper, num_samples, band, draws_lower, cohen_lower, dkw_*,
        population_lower.

        `lower` and `upper` bound the share of the population that is certified, at each radius with 95 %; `dkw_*` bound
        it at all radii at once. `population_lower` bounds the true accuracy of g in the population from below, at each
        radius with 97.5 %; NaN if alpha is unknown. `draws_lower` and `cohen_lower` are statements about these images.
        """
        radii, m = np.asarray(radii, dtype=float), self.num_samples
        count, share = self._counts(radii), self.at(radii)
        certified = clopper_pearson(count, np.full_like(count, m), _DELTA)
        alpha = math.nan if self.alpha is None else self.alpha
        half_width = math.sqrt(math.log(2 / _DELTA) / (2 * max(m, 1)))
        return pd.DataFrame(
            {
                "radius": radii,
                "certified_accuracy": share,
                "lower": certified.lower,
                "upper": certified.upper,
                "num_samples": m,
                "band": self.band,
                "draws_lower": self.draws_lower(radii),
                "cohen_lower": self.cohen_lower(radii),
                "dkw_lower": np.maximum(share - half_width, 0.0),
                "dkw_upper": np.minimum(share + half_width, 1.0),
                "population_lower": np.maximum((certified.lower - alpha) / (1 - alpha), 0.0),
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


class Bounds(NamedTuple):
    """Lower and upper confidence bounds, over arrays."""

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def clopper_pearson(count: NDArray[np.int64], total: NDArray[np.int64], delta: float) -> Bounds:
    """The two-sided Clopper-Pearson interval of a probability at confidence 1 - delta, from 0 to 1 if total is 0."""
    missed = total - count
    return Bounds(
        np.where(count > 0, betaincinv(np.maximum(count, 1), missed + 1.0, delta / 2), 0.0),
        np.where(missed > 0, betaincinv(count + 1.0, np.maximum(missed, 1), 1 - delta / 2), 1.0),
    )


def mean_interval(values_M: NDArray[np.float64], confidence: float) -> Interval:
    """The ABC interval of a mean (DiCiccio and Efron 1992): the BCa bootstrap interval in closed form, to second order.

    For a mean, bias and curvature vanish. With a = sum d^3 / (6 (sum d^2)^1.5), d the deviations from the mean, and
    w = a + z, an end is mean + s w / (1 - a w)^2. NaN if all values are equal.
    """
    mean = float(values_M.mean()) if len(values_M) else math.nan
    d = values_M - mean
    squares = float((d**2).sum())
    if not squares > 1e-18 * max(1.0, mean**2):
        return NO_INTERVAL
    a = float((d**3).sum()) / (6 * squares**1.5)
    ends = []
    for level in ((1 - confidence) / 2, (1 + confidence) / 2):
        w = a + float(ndtri(level))
        ends.append(mean + math.sqrt(squares) / len(values_M) * w / (1 - a * w) ** 2)
    return Interval(*ends)


def curve_of(
    name: str,
    certificates: pd.DataFrame,
    sigma: float | None,
    max_radius: float,
    alpha: float | None = None,
    tested: Sequence[float] | None = None,
    certificate: str = TOP,
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
        certificate=certificate,
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
    if not 0 < reach < math.inf:
        return np.array([0.0])
    scale = 0.1 if curves[0].unit == Curve.unit else 10.0 ** (math.floor(math.log10(reach)) - 1)
    step = next(scale * step for step in (2.5, 5, 10, 20, 50, math.inf) if reach / (scale * step) <= 12)
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
        mean = shown_acr(curve) or "certified at the marked radii only"
        marks = (", post hoc" if curve.post_hoc else "") + (", grown" if curve.grown else "")
        marks += f", {curve.incomplete} incomplete" if curve.incomplete else ""
        label = f"{curve.name} ({mean}{marks})".replace("$", r"\$")
        if curve.tested is not None:
            axes.plot(curve.tested, curve.at(curve.tested), color=colour, linestyle="", marker="o", markersize=4)
        axes.plot(radii, table["certified_accuracy"], color=colour, linestyle=style, label=label)
        if curve.uppers is not None:
            resisted, label = curve.resisted(radii), f"{curve.name}: not proven wrong by an attack".replace("$", r"\$")
            axes.plot(radii, resisted, color=colour, linestyle=style, linewidth=0.9, label=label)
            axes.fill_between(
                radii, table["certified_accuracy"], resisted, color=colour, alpha=0.25, linewidth=0, hatch="//"
            )
        axes.fill_between(radii, table["lower"], table["upper"], color=colour, alpha=0.12, linewidth=0)
        if len(curves) == 1 and curve.alpha is not None:
            label = f"lower bound over the draws ({100 * (1 - RHO):g} %, all radii)"
            axes.plot(radii, table["draws_lower"], color="black", linestyle=":", linewidth=1, label=label)
            label = "lower bound of g's population accuracy (97.5 % per radius)"
            axes.plot(radii, table["population_lower"], color="black", linestyle="--", linewidth=0.8, label=label)
            axes.plot(radii, table["dkw_lower"], color=colour, alpha=0.5, linewidth=0.6, label="DKW 95 %, all radii")
            axes.plot(radii, table["dkw_upper"], color=colour, alpha=0.5, linewidth=0.6)
    axes.set(xlabel=curves[0].unit, ylabel="certified accuracy", xlim=(0, reach * 1.02), ylim=(0, 1.01))
    axes.grid(alpha=0.25)
    title = f"band: {BAND}" + (f"\n{GROWN}" if any(curve.grown for curve in curves) else "")
    axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=7)


NO_ACR = "-"


def acr_figures(curve: Curve) -> tuple[str, str]:
    """The ACR and its 95 % interval as printed; "-" if there is none."""
    if curve.tested is not None:
        return NO_ACR, NO_ACR
    (lower, upper), form = curve.acr_interval, ".3f" if curve.unit == Curve.unit else ".3g"
    return f"{curve.acr:{form}}", NO_ACR if math.isnan(lower) else f"[{lower:{form}}, {upper:{form}}]"


def shown_acr(curve: Curve) -> str:
    """Such as ACR 0.513 [0.472, 0.550]; empty in grid mode."""
    acr, interval = acr_figures(curve)
    return "" if acr == NO_ACR else f"ACR {acr}{'' if interval == NO_ACR else f' {interval}'}"
