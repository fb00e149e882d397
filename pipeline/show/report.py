"""Curves, certificates, facts and pictures of runs -> one self-contained HTML file.

It opens no run and casts no votes: the commands `report` and `publish` collect what is shown here.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from diffsmooth.pipeline.attack.gap import Gap
from diffsmooth.pipeline.certify.curve import BAND, COLOURS, GROWN, RHO, Curve, grid, shown_acr
from diffsmooth.pipeline.certify.orders import Order, stored_hash
from diffsmooth.pipeline.results.stored import StoredResult
from diffsmooth.pipeline.show.tables import render
from diffsmooth.pipeline.votes.blocks import StoredBlock
from diffsmooth.pipeline.votes.run import SECRET_SEED, run_sha256

_BINS = 30  # of the histogram
_DASHES = ("solid", "dash", "dashdot", "dot", "longdash")


class Picture(NamedTuple):
    caption: str
    encoded: bytes
    media_type: str = "image/png"

    @property
    def uri(self) -> str:
        return f"data:{self.media_type};base64,{base64.b64encode(self.encoded).decode()}"


class Exhibit(NamedTuple):
    """A sample of the gallery, with pictures of one of its draws at each step of f."""

    kind: str  # why it is shown: best, worst, wrong, abstained
    sample: int
    label: int
    verdict: str
    votes: list[tuple[int, int]]  # class, votes: the classes with the most votes, descending
    draws: int  # all draws that were counted
    pictures: list[Picture]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that a report shows about one order of a run."""

    curve: Curve
    certificates: pd.DataFrame
    order: Order
    noise_grid: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    spec: str = ""  # as in run.json
    exhibits: Sequence[Exhibit] = ()
    no_exhibits: str = ""  # why there are none
    shape_CHW: tuple[int, ...] | None = None  # of the images; None: not known
    gap: Gap | None = None  # None: the run was not attacked


def report_of(one: StoredResult, place: str | None = None) -> RunReport:
    """What the stored result alone says, without pictures; `place` is where the reader finds the run."""
    result = one.result
    return RunReport(
        curve=result.curve,
        certificates=result.certificates,
        order=result.order,
        noise_grid=result.run.spec.smoothing.noise_grid,
        facts=facts_of(one, place),
        spec=json.dumps(result.run.spec.model_dump(mode="json"), indent=2, sort_keys=True),
        gap=one.gap,
    )


def render_report(runs: Sequence[RunReport]) -> str:
    """The report as HTML: curves and table, and for each run its guarantees, radii, classes, gallery and facts."""
    curves = [run.curve for run in runs]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    histograms = [_embedded(_histogram(run), f"radii-{index}") for index, run in enumerate(runs)]
    panels = [_embedded(figure, f"curves-{index}") for index, figure in enumerate(_panels(curves))]
    script = get_plotlyjs()
    return environment.get_template("report.html").render(
        policy=_content_security_policy([script, *(one for part in histograms + panels for one in _scripts(part))]),
        title=", ".join(curve.name for curve in curves) if len(curves) <= 3 else f"{len(curves)} runs",
        runs=[
            {
                "report": run,
                "guarantee": guarantee(run),
                "histogram": histogram,
                "classes": class_table(run.certificates).to_dict("records"),
                "kinds": list(dict.fromkeys(one.kind for one in run.exhibits)),
            }
            for run, histogram in zip(runs, histograms, strict=True)
        ],
        table=Markup(render(curves, "html")),
        panels=panels,
        about_bands=_about_bands(curves),
        plotly=Markup(script),
    )


def _content_security_policy(scripts: Sequence[str]) -> str:
    """A policy under which a browser runs these scripts only, and loads nothing.

    plotly writes style attributes, and makes blobs of pictures to download.
    """
    texts = [script.replace("\r\n", "\n").replace("\r", "\n") for script in scripts]  # as an HTML parser reads them
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts}
    allowed = " ".join(f"'sha256-{one}'" for one in sorted(hashes))
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def _scripts(part: str) -> list[str]:
    """The contents of the script elements of an embedded figure."""
    return re.findall(r"<script[^>]*>(.*?)</script>", part, re.DOTALL)


def facts_of(one: StoredResult, place: str | None = None) -> dict[str, str]:
    """What a reader needs to check the claim, or to repeat it; `place` is where the reader finds the run."""
    result, summary, blocks = one.result, one.result.summary(), one.blocks
    run, order, smoothing = result.run, result.order, result.run.spec.smoothing
    used, all_of_n = summary.draws_used, summary.draws_at_n
    return {
        "run": place or result.run_uri,
        "order": f"{result.name}: {order.certificate}, {order.mode}, n0 = {order.n0:,}, n = {order.n:,}, "
        f"alpha = {order.total_alpha:g}",
        "votes_id": run.votes_id,
        "sha256 of run.json": run_sha256(one.stored.store),
        "commitment (sha256 of the first order)": stored_hash(one.stored.store, next(iter(one.stored.orders))),
        "sigma, m, local_sigma": f"{smoothing.sigma:g}, {smoothing.m}, {smoothing.local_sigma:g}",
        "seed of the noise, of the local copies": f"{smoothing.seed}, {smoothing.local_seed}",
        "assumption about the seed": "drawn at random for this run"
        if int(run.seed) >= SECRET_SEED
        else "fixed: f and the images must have been chosen without looking at runs with this seed",
        "precision": smoothing.precision,
        "weights": ", ".join(f"{name} {sha256}" for name, sha256 in run.spec.weights.items()) or "none",
        **_commits(blocks),
        "samples": f"{len(result.certificates):,} in the order, {result.curve.incomplete:,} of them incomplete",
        "draws behind these certificates": f"{used:,}; n0 + n draws of each sample would be {all_of_n:,}"
        + (f", {1 - used / all_of_n:.0%} saved" if used < all_of_n else ""),
        "blocks stored": f"{len(blocks):,}",
        "device hours": _hours(blocks),
        "versions": _versions(blocks),
        **_attack_facts(one),
    }


def _attack_facts(one: StoredResult) -> dict[str, str]:
    """The settings of each attack, and what it took."""
    if one.attacks is None:
        return {}
    return {
        f"attack {attack_id}": f"{len(one.attacks.samples[attack_id]):,} samples, eps "
        f"{', '.join(f'{eps:g}' for eps in attack.eps)}, {attack.steps} steps of {attack.draws} draws, n0 = "
        f"{attack.n0:,}, n = {attack.n:,}, alpha = {attack.alpha:g}, seed {attack.seed}, "
        f"{np.mean([sample.metadata.seconds for sample in one.attacks.samples[attack_id]]):.3g} s per sample"
        for attack_id, attack in one.attacks.settings.items()
    }


def _commits(blocks: Sequence[StoredBlock]) -> dict[str, str]:
    """The commits of the Hugging Face Hub that weights and data were read from."""
    found = sorted({pair for one in blocks for pair in one.metadata.commits.items()})
    return {"commits on the Hub": ", ".join(f"{place} {commit}" for place, commit in found)} if found else {}


def _hours(blocks: Sequence[StoredBlock]) -> str:
    seconds: Counter[str] = Counter()
    for one in blocks:
        seconds[one.metadata.device] += one.metadata.seconds  # type: ignore[assignment]  # a Counter of floats
    return ", ".join(f"{device}: {total / 3600:.3g}" for device, total in sorted(seconds.items()))


def _versions(blocks: Sequence[StoredBlock]) -> str:
    """Each package with every version that cast a block."""
    found: dict[str, set[str]] = {}
    for one in blocks:
        for package, version in one.metadata.versions.items():
            found.setdefault(package, set()).add(version)
    return ", ".join(f"{package} {' and '.join(sorted(versions))}" for package, versions in sorted(found.items()))


def guarantee(run: RunReport) -> list[str]:
    """What is claimed about a run, one paragraph per statement."""
    order, curve, kind = run.order, run.curve, run.order.kind
    alpha = f"{order.total_alpha:g}"
    said = [
        f"For each certified sample on its own: with probability at least 1 - {alpha} over the draws, "
        f"{kind.sample_claim} (pixels in [0, 1]). g is the smoothed classifier: the most frequent class of f under "
        f"Gaussian noise of sigma = {curve.sigma:g}. The guarantee is about g, not about f, and not about a prediction "
        "of g from a few draws."
    ]
    if isinstance(order.alpha, dict):
        looks = ", ".join(f"{share:g} at n = {look:,}" for look, share in order.alpha.items())
        said.append(f"Alpha was split in advance over several looks ({looks}); the largest of their radii counts.")
    if order.mode == "planned":
        said.append(
            "The number of draws of each sample was planned from its selection draws, which do not enter the bound."
        )
    if order.radii is not None:
        radii = ", ".join(f"{radius:g}" for radius in order.radii)
        said.append(
            f"Each sample was certified at the radii {radii} only, by group-sequential tests that stop early. The "
            "radius of a sample is the largest certified one, so the mean radius is not comparable with an average "
            "certified radius."
        )
    if curve.skipped:
        said.append(
            f"{curve.skipped:,} samples whose selected class is not their label were skipped: they count as not "
            "certified at every radius, and not as abstentions."
        )
    if curve.alpha is not None and curve.num_samples:
        said.append(
            f"For these {curve.num_samples:,} samples together: with probability at least {1 - RHO:g}, at most "
            f"{curve.most_errors()} of the certificates are wrong. The true {kind.set_share} is "
            "therefore at least the value shown minus that many samples, at all radii at once."
        )
    said += _about_population(curve)
    said.append(_conversions(run.shape_CHW))
    if run.noise_grid is None:
        said.append(
            "The proof is for real numbers, but f and the noise are computed in floating point. smoothing.noise_grid = "
            "255 closes that gap for 8-bit images."
        )
    if run.gap is not None:
        said += _about_attacks(run.gap)
    if curve.post_hoc:
        said.append(
            "POST HOC: an earlier order covers these samples with other settings. Each certificate holds on its own; "
            "a choice between the two after looking does not."
        )
    if curve.incomplete:
        said.append(f"INCOMPLETE: {curve.incomplete:,} samples lack draws and are excluded from every figure.")
    return said


def _about_attacks(gap: Gap) -> list[str]:
    """What attacks have proven, and contradictions."""
    attacked = gap.table[gap.table["attacked"]]
    proven = attacked[np.isfinite(attacked["upper"])]
    said = [
        f"Attacks: {len(attacked):,} samples were attacked, and for {len(proven):,} of them an image was found at "
        "which g is proven to be wrong, by fresh votes. Its distance is an upper bound of the sample's true radius; "
        f"together with the certificate it fails with probability at most {gap.alpha:g} per sample. A sample without "
        "such an image is not proven to be robust: a better attack may find one. The area between the solid and the "
        "dashed curve is what neither certificate nor attack has decided."
    ]
    warning = gap.warning()
    return [*said, warning] if warning else said


def _about_population(curve: Curve) -> list[str]:
    """What is claimed about the images that were not certified."""
    said = [
        f"For the population of images: if these images were drawn from it at random, the shaded band is the 95 % "
        f"interval at one radius ({BAND.split(' 95')[0]}) of the share of images that this procedure certifies; a "
        "statement about all radii at once needs the wider 95 % band of Dvoretzky, Kiefer and Wolfowitz."
    ]
    if curve.alpha is not None and curve.num_samples:
        lower = math.floor(1000 * curve.table([0.0])["population_lower"][0]) / 10
        said.append(
            f"The true {curve.kind.population_share} is at least {lower:.1f} % at r = 0, with probability 97.5 %. "
            "The dashed line is this bound at each radius separately; it accounts for certificates that are wrong."
        )
    if curve.grown:
        said.append(f"GROWN: {GROWN}. An earlier order of this run has other samples.")
    return said


def _conversions(shape_CHW: tuple[int, ...] | None) -> str:
    """How radii convert to other units."""
    shape = "C H W" if shape_CHW is None else " x ".join(map(str, shape_CHW))
    root = f"sqrt({shape})" + ("" if shape_CHW is None else f" = r / {math.sqrt(math.prod(shape_CHW)):.4g}")
    return (
        "Conversions: all radii are l2 norms of pixels in [0, 1]. A radius r is 255 r for pixels from 0 to 255, at "
        "least r / s for pixels divided by a standard deviation of at most s, and an l-infinity radius of at least "
        f"r / {root}."
    )


def class_table(certificates: pd.DataFrame) -> pd.DataFrame:
    """One row per label: samples, certified (fraction correct at radius 0), acr, abstained, confused (the class that is
    most often predicted or selected instead; -1 if there is none)."""
    complete = certificates[~certificates["status"].isin(["incomplete", "exempt"])]
    rows = []
    for label, of_label in complete.groupby("label"):
        wrong = of_label.loc[of_label["top_class"] != label, "top_class"].to_numpy()
        classes, counts = np.unique(wrong, return_counts=True)
        rows.append(
            {
                "label": label,
                "samples": len(of_label),
                "certified": of_label["correct"].mean(),
                "acr": (of_label["radius"] * of_label["correct"]).mean(),
                "abstained": (of_label["status"] == "abstained").mean(),
                "confused": int(classes[counts.argmax()]) if len(classes) else -1,
            }
        )
    return pd.DataFrame(rows, columns=["label", "samples", "certified", "acr", "abstained", "confused"])


def _about_bands(curves: Sequence[Curve]) -> str:
    lines = (
        " Dotted: lower bound over the draws at all radii at once. Dashed: lower bound of g's accuracy in the "
        "population, 97.5 % per radius. Thin: 95 % band over all radii (DKW)."
    )
    grown = f" Runs marked as grown: {GROWN}." if any(curve.grown for curve in curves) else ""
    return f"Shaded: {BAND}.{lines if len(curves) == 1 and curves[0].alpha is not None else ''}{grown}"


def _panels(curves: Sequence[Curve]) -> list[go.Figure]:
    """Certified accuracy over the radius, one figure per sigma."""
    figures = []
    for sigma in sorted({curve.sigma for curve in curves}, key=lambda sigma: math.inf if sigma is None else sigma):
        of_sigma = [curve for curve in curves if curve.sigma == sigma]
        figure = _figure(f"sigma = {sigma:g}", "l2 radius", "certified accuracy")
        for index, curve in enumerate(of_sigma):
            _add_curve(figure, curve, index, alone=len(curves) == 1)
        figure.update_yaxes(range=[0, 1.01], tickformat=".0%")
        figure.update_xaxes(range=[0, 1.02 * max(curve.max_radius for curve in of_sigma)])
        figure.update_layout(hovermode="x unified")
        figures.append(figure)
    return figures


def _add_curve(figure: go.Figure, curve: Curve, index: int, *, alone: bool) -> None:
    radii = grid(0.01, curve.max_radius) if curve.tested is None else curve.tested
    table, colour = curve.table(radii), COLOURS[index % len(COLOURS)]
    # between two steps the value is that of the next larger radius: first up, then right
    line: dict[str, Any] = {"shape": "vh", "color": colour}
    hidden: dict[str, Any] = {"legendgroup": curve.name, "showlegend": False, "hoverinfo": "skip", "mode": "lines"}
    figure.add_scatter(x=radii, y=table["upper"], line={**line, "width": 0}, **hidden)
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    shade = f"rgba({red},{green},{blue},0.15)"
    figure.add_scatter(x=radii, y=table["lower"], line={**line, "width": 0}, fill="tonexty", fillcolor=shade, **hidden)
    if alone and curve.alpha is not None:
        for bound in ("dkw_lower", "dkw_upper"):
            figure.add_scatter(x=radii, y=table[bound], line={**line, "width": 0.6}, **hidden)
        for bound, dash in (("draws_lower", "dot"), ("population_lower", "dash")):
            figure.add_scatter(x=radii, y=table[bound], line={**line, "width": 1, "dash": dash}, **hidden)
    if curve.uppers is not None:
        figure.add_scatter(
            x=radii,
            y=curve.resisted(radii),
            name=f"{_plain(curve.name)}: not proven wrong by an attack",
            mode="lines",
            line={"shape": "hv", "color": colour, "width": 1, "dash": "dash"},
            hovertemplate=f"{_plain(curve.name)}, not proven wrong: %{{y:.1%}}<extra></extra>",
        )
    mean = shown_acr(curve) or "at the marked radii only"
    marks = (", post hoc" if curve.post_hoc else "") + (", grown" if curve.grown else "")
    figure.add_scatter(
        x=radii,
        y=table["certified_accuracy"],
        name=f"{_plain(curve.name)} ({mean}{marks})",
        legendgroup=curve.name,
        mode="lines" if curve.tested is None else "lines+markers",
        line={**line, "width": 2.2, "dash": _DASHES[index // len(COLOURS) % len(_DASHES)]},
        customdata=table[["lower", "upper", "draws_lower", "population_lower"]],
        hovertemplate=f"{_plain(curve.name)}: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]"
        + (
            ", lower bound over the draws %{customdata[2]:.1%}, of g's population accuracy %{customdata[3]:.1%}"
            if curve.alpha is not None
            else ""
        )
        + "<extra></extra>",
    )


def _histogram(run: RunReport) -> go.Figure:
    """A histogram of the radii; samples without a certificate are shown apart."""
    table, reach = run.certificates, run.curve.max_radius or 1.0
    figure = _figure("", "certified radius", "samples")
    right = table.loc[(table["status"] == "certified") & table["correct"], "radius"]
    wrong = table.loc[(table["status"] == "certified") & ~table["correct"], "radius"]
    edges = np.linspace(0, reach, _BINS + 1)
    centres, width = (edges[:-1] + edges[1:]) / 2, 0.92 * reach / _BINS
    for name, radii, colour in (("right", right, COLOURS[0]), ("wrong", wrong, COLOURS[1])):
        counts, _ = np.histogram(np.minimum(radii, reach), edges)
        label = f"{name} ({len(radii):,})"
        figure.add_bar(x=centres, y=counts, width=width, name=label, marker_color=colour,
                       hovertemplate=f"%{{y}} {name} near %{{x:.2f}}<extra></extra>")  # fmt: skip
    for place, (name, colour) in enumerate((("abstained", COLOURS[3]), ("skipped", COLOURS[4])), start=1):
        count = int((table["status"] == name).sum())
        if count:
            figure.add_bar(x=[-0.06 * reach * place], y=[count], width=0.05 * reach, name=f"{name} ({count:,})",
                           marker_color=colour, hovertemplate=f"%{{y}} {name}<extra></extra>")  # fmt: skip
    figure.update_layout(barmode="stack")
    return figure


def _figure(title: str, x: str, y: str) -> go.Figure:
    """An empty figure; the style sheet of the page sets its colours for light and dark mode."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        title={"text": title, "font": {"size": 14}},
        margin={"l": 60, "r": 15, "t": 40 if title else 15, "b": 50},
        height=400,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a9098", "activecolor": COLOURS[0]},
        legend={"orientation": "h", "y": -0.22},
        font={"family": "system-ui, sans-serif"},
    )
    for axis, label in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        axis(title=label, showgrid=True, zeroline=False, rangemode="tozero")
    return figure


def _embedded(figure: go.Figure, name: str) -> Markup:
    config = {"responsive": True, "displaylogo": False, "toImageButtonOptions": {"format": "svg", "filename": name}}
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))


def _plain(name: str) -> str:
    """A name in which plotly recognises no markup."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace("%", "&#37;")
