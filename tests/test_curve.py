"""Curves: certified accuracy and ACR over all samples, bands, pictures."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from diffsmooth.pipeline.certify.curve import GROWN, curve_of, envelope_of, grid, plot, table_radii


def certificates(*rows):
    table = pd.DataFrame(rows, columns=["status", "radius", "correct"])
    return table.assign(post_hoc=False)


CURVE = curve_of(
    "run",
    certificates(
        ("certified", 0.5, True),
        ("certified", 0.25, True),
        ("certified", 0.9, False),
        ("abstained", 0.0, False),
        ("incomplete", 0.0, False),
    ),
    sigma=0.5,
    max_radius=1.2,
)


def test_every_complete_sample_counts_and_the_radius_itself_is_certified():
    assert CURVE.num_samples == 4
    assert CURVE.incomplete == 1
    assert CURVE.at([0, 0.25, 0.2500001, 0.5, 0.51]).tolist() == [0.5, 0.5, 0.25, 0.25, 0]
    assert CURVE.acr == pytest.approx(0.75 / 4)
    assert CURVE.abstention_rate == 0.25


def test_radius_zero_is_certified_only_where_correct():
    curve = curve_of("run", certificates(("certified", 0.0, True), ("abstained", 0.0, False)), 0.5, 1.0)
    assert curve.at([0.0]).tolist() == [0.5]


def test_band_covers():
    """The interval at each count holds exactly the accuracies that do not make the count a 2.5 % event."""
    band = CURVE.table([0, 0.5, 0.6])
    for count, lower, upper in zip([2, 1, 0], band["lower"], band["upper"], strict=True):
        assert binom.sf(count - 1, 4, lower) == pytest.approx(0.025 if count else 1)
        assert binom.cdf(count, 4, upper) == pytest.approx(0.025)
    assert (band["band"] == "Clopper-Pearson 95 % per radius, of the certified share").all()


def test_radii_are_exact_decimals():
    assert grid(0.005, 0.35)[-1] == 0.35
    assert len(grid(0.25, 1.0)) == 5
    wide = replace(CURVE, max_radius=9.0)
    assert table_radii([CURVE]).tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert len(table_radii([wide])) <= 13


def test_the_envelope_is_the_highest_curve_and_the_first_in_a_tie():
    flat = replace(CURVE, name="flat", radii=CURVE.radii * 0 + 0.3)
    best = envelope_of([CURVE, flat], [0, 0.25, 0.3, 0.5, 2.0])
    assert best.certified_accuracy.tolist() == [0.5, 0.5, 0.5, 0.25, 0]
    assert [curve.name for curve in best.best] == ["run", "run", "flat", "run", "run"]


def test_a_panel_for_logs_without_sigma_and_the_envelope_in_all(monkeypatch):
    """The black line of every panel is the best of all the curves, those of other panels too."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    log = replace(CURVE, name="log", sigma=None, radii=CURVE.radii + 0.4, max_radius=0.0)
    plot([log, *[CURVE] * 7, replace(CURVE, sigma=0.25)], "unused.png", envelope=True)
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["$\\sigma$ = 0.25", "$\\sigma$ = 0.5", "published logs"]
    for axes in panels:
        black = axes.get_lines()[0]
        assert black.get_color() == "black"
        assert black.get_ydata() == pytest.approx(log.at(black.get_xdata()))
    looks = {(line.get_color(), str(line.get_linestyle())) for line in panels[1].get_lines()[1:]}
    assert len(looks) == 7


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_pictures(tmp_path, ending):
    plot([*[CURVE] * 6, replace(CURVE, sigma=1.0)], tmp_path / f"a.{ending}")
    head = (tmp_path / f"a.{ending}").read_bytes()[:5]
    assert head == {"png": b"\x89PNG\r", "pdf": b"%PDF-", "svg": b"<?xml"}[ending]


def test_plot_draws_the_curve_on_own_axes_or_on_given_ones():
    from matplotlib.figure import Figure

    given = Figure().add_subplot()
    for axes in (CURVE.plot(given), CURVE.plot()):
        (line,) = [line for line in axes.get_lines() if str(line.get_label()).startswith("run (ACR")]
        assert line.get_ydata() == pytest.approx(CURVE.at(line.get_xdata()))
    assert given.get_lines()


def test_text_stays_text_in_vector_pictures(tmp_path):
    plot([CURVE], tmp_path / "a.svg")
    assert ">certified accuracy</text>" in (tmp_path / "a.svg").read_text()


def with_counts(correct, m, alpha=0.001):
    table = certificates(*[("certified", 1.0, True)] * correct, *[("abstained", 0.0, False)] * (m - correct))
    return curve_of("run", table, 0.5, 2.0, alpha)


@pytest.mark.parametrize(
    ("k", "exact", "published"), [(229, 0.45, 0.448679767), (186, 0.364, 0.362679767), (110, 0.212, 0.210679767)]
)
def test_bound_over_the_draws_golden(k, exact, published):
    """ImageNet's 500 samples at sigma 0.5, alpha = rho = 0.001."""
    curve = with_counts(k, 500)
    assert curve.draws_lower([1.0])[0] == pytest.approx(exact, abs=1e-12)
    assert curve.cohen_lower([1.0])[0] == pytest.approx(published, abs=1e-9)


@pytest.mark.parametrize(("m", "alpha", "rho"), [(500, 0.001, 0.001), (2000, 0.01, 0.05), (50, 0.02, 0.01)])
def test_the_bound_over_the_draws_fails_with_probability_at_most_rho(m, alpha, rho):
    """The worst case: every certificate errs with probability alpha, and each error is one sample counted too many."""
    curve = with_counts(m, m, alpha)
    errors = round(m - m * curve.draws_lower([0.5], rho)[0])
    assert binom.sf(errors, m, alpha) <= rho
    assert errors == 0 or binom.sf(errors - 1, m, alpha) > rho  # and no more is given away than needed


def test_a_log_without_alpha_has_no_bound_over_the_draws():
    table = with_counts(3, 5, None).table([0.5])
    assert table[["draws_lower", "cohen_lower"]].isna().all(axis=None)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_population_lower_covers_if_half_of_the_images_are_at_the_boundary(alpha):
    """The worst case: half of the images have a true radius just below r and are certified with probability alpha.

    4,000 data sets of 10,000 images. `lower` bounds the certified share only, and misses the true accuracy of 0.5.
    """
    generator, m, truth = np.random.Generator(np.random.Philox(key=7)), 10_000, 0.5
    right = generator.binomial(m, truth, 4000)
    certified = right + generator.binomial(m - right, alpha)
    counts, repeats = np.unique(certified, return_counts=True)
    bounds = pd.concat([with_counts(count, m, alpha).table([0.5]) for count in counts])
    missed = {name: np.average(bounds[name] > truth, weights=repeats) for name in ("lower", "population_lower")}
    assert 0.01 <= missed["population_lower"] <= 0.03  # 0.025, and a standard error of 0.0025
    assert missed["lower"] >= {0.01: 0.13, 0.05: 0.99}[alpha]


def test_population_lower_by_hand():
    """(0.0249 - 0.01) / 0.99 for 5 of 100 images would be below 0 for 1 of 100."""
    table = with_counts(5, 100, 0.01).table([0.5, 1.5])
    assert table["population_lower"][0] == pytest.approx((table["lower"][0] - 0.01) / 0.99)
    assert table["population_lower"][1] == 0
    assert with_counts(5, 100, None).table([0.5])["population_lower"].isna().all()


def radii_of(generator, m, scenario):
    """Radii, 0 if wrong, and their true mean."""
    chance, size = generator.random(m), generator.random(m)
    if scenario == "typical":
        return np.where(chance < 0.25, 0, 1.2 * np.sqrt(size)), 0.75 * 1.2 * 2 / 3
    if scenario == "saturated":  # two of five images have the largest possible radius
        return np.where(chance < 0.4, 0, np.where(chance < 0.8, 1.2, 1.2 * size)), 0.6
    return np.where(chance < 0.9, 0, size), 0.05  # few are certified


@pytest.mark.parametrize(
    ("m", "scenario", "least"),
    [(100, "typical", 0.94), (100, "saturated", 0.94), (100, "few", 0.94), (1000, "typical", 0.94), (30, "few", 0.90)],
)
def test_coverage_of_the_interval_of_the_acr(m, scenario, least):
    """4,000 data sets; the standard error of a coverage of 95 % is 0.35 %."""
    generator, covered, judged = np.random.Generator(np.random.Philox(key=8)), 0, 0
    for _ in range(4000):
        radii, truth = radii_of(generator, m, scenario)
        lower, upper = replace(CURVE, radii=radii, correct=radii > 0).acr_interval
        judged += not np.isnan(lower)
        covered += lower <= truth <= upper
    assert least <= covered / judged <= 0.96
    assert judged >= 3800


def test_the_interval_of_the_acr_needs_30_samples_that_differ():
    def interval(radii, **changes):
        curve = replace(CURVE, radii=np.array(radii), correct=np.ones(len(radii), bool), **changes)
        return curve.acr_interval

    assert np.isnan(interval([0.1] * 28 + [0.2])).all()
    assert np.isnan(interval([0.1] * 100)).all()
    assert np.isnan(interval([0.1, 0.2] * 50, tested=np.array([0.1, 0.2]))).all()
    lower, upper = interval([0.1] * 29 + [0.2])
    assert lower < 0.1 + 0.1 / 30 < upper


def test_a_grown_sample_set_is_marked_in_table_and_picture():
    from matplotlib.figure import Figure

    grown = replace(CURVE, grown=True)
    assert GROWN in grown.table([0.0])["band"][0]
    legend = grown.plot(Figure().add_subplot()).get_legend()
    assert GROWN in legend.get_title().get_text()
    assert any(", grown" in text.get_text() for text in legend.get_texts())


def test_a_picture_names_the_number_of_incomplete_samples():
    from matplotlib.figure import Figure

    legend = replace(CURVE, incomplete=3).plot(Figure().add_subplot()).get_legend()
    assert any(", 3 incomplete" in text.get_text() for text in legend.get_texts())


def test_dkw_band_covers_the_whole_curve():
    """1,000 data sets of 60 radii from a known law: the band misses the true curve anywhere in at most 5 % of them."""
    rng, grid_ = np.random.default_rng(3), np.linspace(0, 1, 101)
    missed = 0
    for _ in range(1000):
        rows = [("certified", radius, True) for radius in rng.random(60)]
        band = curve_of("run", certificates(*rows), 0.5, 1.0, 0.001).table(grid_)
        missed += bool(((1 - grid_ < band["dkw_lower"]) | (1 - grid_ > band["dkw_upper"])).any())
    assert 5 <= missed <= 50
