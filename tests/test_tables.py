"""Tables of curves: the best of each column marked, names escaped, every format the same figures."""

import io
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diffsmooth.pipeline.certify.curve import Curve
from diffsmooth.pipeline.show.tables import ENVELOPE, FORMATS, render


def curve(name, *radii, sigma=None, post_hoc=False, incomplete=0, total=4):
    """Correct at the radii, abstained on the others of `total` samples."""
    abstained = total - len(radii)
    return Curve(
        name=name,
        radii=np.array([*radii, *[0.0] * abstained]),
        correct=np.array([True] * len(radii) + [False] * abstained),
        abstained=abstained,
        incomplete=incomplete,
        post_hoc=post_hoc,
        sigma=sigma,
        max_radius=1.0,
    )


RADII = np.array([0.0, 0.5, 1.0, 2.0])
LOW = curve("low_0.25", 0.4, 0.4, 0.5, sigma=0.25)
HIGH = curve("high & 50% | x", 0.9, 1.0, sigma=0.5)


def test_markdown_marks_the_best_and_all_ties():
    text = render([LOW, HIGH, curve("third", 1.0, 1.0)], "markdown", radii=RADII)
    assert text.splitlines()[2:] == [
        "| run | ACR | 95 % interval | abstain, % | 0 | 0.5 | 1 | 2 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        r"| low\_0.25 | 0.325 | - | 25.0 | **75.0** | 25.0 | 0.0 | 0.0 |",
        r"| high & 50% \| x | 0.475 | - | 50.0 | 50.0 | **50.0** | 25.0 | 0.0 |",
        "| third | **0.500** | - | 50.0 | 50.0 | **50.0** | **50.0** | 0.0 |",
    ]


def test_the_only_row_is_not_the_best():
    assert "**" not in render([LOW], "markdown")


def test_latex():
    text = render([LOW, HIGH], "latex", radii=RADII, envelope=True)
    assert text.startswith("% needs \\usepackage{booktabs}\n\\begin{tabular}{lrrrrrrr}\n\\toprule\n")
    assert r"low\_0.25 & 0.325 & - & 25.0 & \textbf{75.0} & 25.0 & 0.0 & 0.0 \\" in text
    assert r"high \& 50\% | x & \textbf{0.475} & - & 50.0 & 50.0 & \textbf{50.0} & \textbf{25.0} & 0.0 \\" in text
    assert r"envelope (not a classifier) &  &  &  & 75.0 & 50.0 & 25.0 & 0.0 \\" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") - line.count(r"\&") for line in rows[1:]} == {7}
    assert r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{\}\$\#" in render(
        [curve(r"a\b~c^d{}$#")], "latex"
    )


def test_a_cost_certificate_is_named_and_never_compared_silently(caplog):
    curves = [replace(curve("a [cost]", 0.4), certificate="cost"), HIGH]
    for form in FORMATS:
        text = render(curves, form) + caplog.text
        assert "[cost]" in text.replace("\\", "")
        assert "not comparable with those of the other certificates" in text


def test_csv_reads_back_in_one_call(caplog):
    with caplog.at_level(logging.WARNING):
        table = pd.read_csv(io.StringIO(render([LOW, HIGH], "csv", radii=RADII)))
    assert list(table.columns) == ["run", "radius", "certified_accuracy", "post_hoc", "incomplete"]
    assert table["run"].tolist() == ["low_0.25"] * 4 + ["high & 50% | x"] * 4
    assert table["radius"].tolist() == [*RADII, *RADII]
    assert table["certified_accuracy"].tolist() == [0.75, 0.25, 0, 0, 0.5, 0.5, 0.25, 0]
    assert not caplog.text


def test_envelope_is_the_best_run_at_each_radius(caplog):
    table = pd.read_csv(io.StringIO(render([LOW, HIGH], "csv", radii=RADII[:3], envelope=True)))
    block = table[table["run"] == ENVELOPE]
    assert block["best_run"].tolist() == [LOW.name, HIGH.name, HIGH.name]
    assert block["certified_accuracy"].tolist() == [0.75, 0.5, 0.25]
    assert table["best_run"].isna().sum() == 6
    assert "not the certificate of one classifier" in caplog.text
    text = render([LOW, HIGH], radii=RADII[:3], envelope=True)
    assert "0 from low_0.25 (sigma 0.25); 0.5 to 1 from high & 50% | x (sigma 0.5)" in text
    assert [*ENVELOPE.split(), "75.0", "50.0", "25.0"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_marks_post_hoc_runs(form, caplog):
    text = render([curve("run", 0.5, post_hoc=True, incomplete=2)], form)
    assert "post hoc: an earlier order covers" in text + caplog.text
    if form != "csv":
        assert "* (2 incomplete)" in text


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_marks_a_grown_sample_set(form, caplog):
    text = render([replace(LOW, grown=True)], form)
    assert "the sample set grew after looking: population intervals do not hold" in text + caplog.text
    assert "grew" not in render([LOW], form)


def test_the_interval_of_the_acr_is_printed():
    text = render([curve("run", *[0.5] * 20, total=40)], "markdown")
    lower, upper = curve("run", *[0.5] * 20, total=40).acr_interval
    assert f"| run | 0.250 | [{lower:.3f}, {upper:.3f}] | 50.0 |" in text


def test_text_is_never_truncated_and_accepts_any_name():
    name = "[red]" + "n" * 90 + "_0.50"
    lines = render([curve(name, 0.25)], radii=np.arange(60) / 16).splitlines()
    (row,) = (line.split() for line in lines if name in line)
    assert row == [name, "0.062", "-", "75.0"] + ["25.0"] * 5 + ["0.0"] * 55
    assert "0.0625" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_html_marks_the_best_and_escapes_names():
    text = render([LOW, HIGH, curve("<b>&", 0.5)], "html", radii=RADII)
    rows = [line for line in text.splitlines() if line.startswith("<tr><td>")]
    assert rows[0].startswith(
        "<tr><td>low_0.25</td><td>0.325</td><td>-</td><td>25.0</td><td><b>75.0</b></td><td>25.0</td>"
    )
    assert rows[2].startswith("<tr><td>&lt;b&gt;&amp;</td>")
