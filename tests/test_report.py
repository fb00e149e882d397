"""Reports: every figure is that of the run, nothing is fetched, and a browser draws it."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffsmooth.jobs.analyze import Request, analyze
from diffsmooth.jobs.reporting import report
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.results.stored import read_result
from diffsmooth.pipeline.show.gallery import choose
from diffsmooth.pipeline.show.report import class_table
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.votes.blocks import read_votes
from tests.models import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._hidden = [], [], False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    @property
    def pictures(self):
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                encoded = base64.b64decode(attributes["src"].partition("base64,")[2])
                found.append((attributes["alt"], np.asarray(Image.open(io.BytesIO(encoded)))))
        return found


@pytest.fixture
def write(tmp_path):
    def write(*sources, **options):
        complete = report(sources, output=str(tmp_path / "report.html"), **options)
        return complete, (tmp_path / "report.html").read_text()

    return write


def plotted(text, name):
    """The traces of a figure, by their names."""
    start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', text).end()
    return {trace.get("name"): trace for trace in json.JSONDecoder().raw_decode(text, start)[0]}


def numbers(values):
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return np.array(values)


def test_the_page_fetches_nothing_and_escapes_names(home, spec, write):
    _, text = write(f"<img src>&%{{y}}={home}", specs=[spec])
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        assert not (tag == "script" and "src" in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/")
    assert "<img src>&%{y}" in page.text
    assert len(page.pictures) == 12  # original and noisy of three best and three worst


def test_curve_and_table_follow_from_the_certificates(home, spec, write):
    complete, text = write(home, specs=[spec])
    assert complete
    stored = read_result(home).result
    traces = plotted(text, "curves-0")
    (drawn,) = [trace for name, trace in traces.items() if name and name.startswith("half-space")]
    radii = numbers(drawn["x"])
    assert numbers(drawn["y"]) == pytest.approx(stored.curve.at(radii))
    assert stored.certificates.radius.max() <= radii[-1]
    bars = plotted(text, "radii-0")
    right = next(trace for name, trace in bars.items() if name.startswith("right"))
    assert numbers(right["y"]).sum() == stored.certificates.correct.sum()
    text = Page(text).text
    assert f"{stored.curve.acr:.3f}" in text
    for fact in (stored.run.votes_id, "0.25, 1, 0", "2,000", "with probability at least 1 - 0.001"):
        assert fact in text


def test_the_pictures_show_the_draw_that_voted(home, spec, write):
    _, text = write(home, specs=[spec])
    certificates = read_result(home).result.certificates
    shown = [(kind, int(row["sample"])) for kind, row in choose(certificates, 3)]
    pictures = Page(text).pictures
    votes, data = read_votes(home), open_dataset(spec.data)
    for (_, sample), original, noisy in zip(shown, pictures[::2], pictures[1::2], strict=True):
        image_CHW = data[sample].image_CHW
        assert np.array_equal(original[1], np.rint(image_CHW[0] * 255))
        noise_1CHW = np.empty((1, *image_CHW.shape), np.float32)
        Noise(0, 0.25).fill(noise_1CHW, "estimation", sample, [0])
        x_HW = (image_CHW + noise_1CHW)[0, 0]
        assert np.array_equal(noisy[1], np.rint(x_HW.clip(0, 1) * 255))
        assert noisy[0].endswith(f"f returns class {int(x_HW.mean() > 0.5)}")
        of_sample = votes[(votes["sample"] == sample) & (votes.stage == "estimation")].groupby("class").votes.sum()
        assert f"{of_sample.max()}" in Page(text).text


def test_which_samples_are_shown():
    rows = [("certified", True, 0.1 * i) for i in range(5)] + [("certified", False, 0.7), ("skipped", False, 0.0)]
    rows += [("abstained", False, 0.0), ("incomplete", False, 0.0)]
    table = pd.DataFrame(rows, columns=["status", "correct", "radius"]).rename_axis("sample").reset_index()
    assert [(kind, int(row["sample"])) for kind, row in choose(table, 2)] == [
        ("best", 4), ("best", 3), ("worst of the right", 1), ("worst of the right", 0), ("wrong", 5), ("wrong", 6),
        ("abstained", 7),
    ]  # fmt: skip


def test_the_class_table_counts_the_samples_of_each_class():
    columns = ["label", "status", "correct", "radius", "top_class"]
    rows = [(3, "certified", True, 1.0, 3), (3, "certified", False, 2.0, 5), (3, "abstained", False, 0.0, 5),
            (3, "incomplete", False, 0.0, 7), (4, "skipped", False, 0.0, 9)]  # fmt: skip
    table = class_table(pd.DataFrame(rows, columns=columns))
    assert table.loc[0].tolist() == [3, 3, pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3), 5]
    assert table.loc[1].tolist() == [4, 1, 0.0, 0.0, 0.0, 9]


def test_post_hoc_orders_are_marked(home, spec, write):
    analyze(home, Request(alpha=0.01), quiet=True)
    _, second = write(home, specs=[spec], order_name="002")
    assert "POST HOC" in second
    assert "1 - 0.01 over the draws" in second
    assert "POST HOC" not in write(home, specs=[spec])[1]
    shutil.rmtree(f"{home}/votes/estimation")
    shutil.copytree(f"{home}/votes/selection", f"{home}/votes/estimation")  # none of these is an estimation block
    with pytest.raises(Exception, match="its name and its contents differ in stage"):
        write(home)


def test_the_report_bounds_the_population_and_converts_radii(home, spec, write):
    curve = read_result(home).result.curve
    lower = np.floor(1000 * curve.table([0.0])["population_lower"][0]) / 10
    _, text = write(home, specs=[spec], pixels="1,4,4")
    page = Page(text).text
    assert f"true accuracy of g in that population is at least {lower:.1f} % at r = 0" in page
    assert "r / sqrt(1 x 4 x 4) = r / 4." in page
    assert "GROWN" not in page
    assert "r / sqrt(C H W)." in Page(write(home, specs=[spec])[1]).text


def test_the_report_marks_a_sample_set_that_grew(spec, tmp_path, write):
    for samples in (4, 8):
        make_run(spec, tmp_path / "grown", samples=samples)
    _, text = write(str(tmp_path / "grown"), specs=[spec], order_name="002")
    assert "GROWN: the sample set grew after looking: population intervals do not hold" in Page(text).text


def test_incomplete_samples_are_reported(home, spec, write):
    Path(home, "votes/estimation/3-100.parquet").unlink()
    complete, text = write(home, specs=[spec])
    assert not complete
    assert "INCOMPLETE: 1 samples lack draws" in text


def test_without_a_spec_there_are_no_pictures_and_a_reason(home, spec, raw_spec, write, tmp_path):
    _, text = write(home)
    assert Page(text).pictures == []
    assert "--spec SPEC" in text
    with pytest.raises(UserError, match="--spec half-space made none of these runs"):
        write(home, specs=[load_spec(raw_spec, ["smoothing.seed=1"])])
    log = tmp_path / "log"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n")
    with pytest.raises(UserError, match="use `diffsmooth curve` for logs"):
        write(str(log))
    with pytest.raises(UserError, match="cannot write"):
        report([home], output=str(tmp_path / "none" / "report.html"))


def policy_of(text):
    (policy,) = [one["content"] for tag, one in Page(text).tags if one.get("http-equiv") == "Content-Security-Policy"]
    return dict(part.split(" ", 1) for part in policy.split("; "))


def test_the_page_allows_its_own_scripts_only(home, spec, write):
    _, text = write(f"<script>alert(1)<script>={home}", specs=[spec])
    policy = policy_of(text)
    assert policy["default-src"] == "'none'"
    assert policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in policy["script-src"]
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    assert len(scripts) == 3  # plotly, the curves and the radii
    assert sorted(policy["script-src"].split()) == sorted(f"'sha256-{one}'" for one in hashes)
    assert not any(name.startswith("on") for _, attributes in Page(text).tags for name in attributes)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_runs_no_other_script(home, spec, write, tmp_path):
    _, text = write(home, specs=[spec])
    evil = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
    for name, page in (("with", text), ("without", re.sub(r"<meta http-equiv.*?>", "", text))):
        (tmp_path / f"{name}.html").write_text(page.replace("<h1>", f"{evil}<h1>", 1))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=3000",
                 f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]  # fmt: skip
        drawn = subprocess.run([CHROMIUM, *flags, f"file://{tmp_path / name}.html"], capture_output=True, timeout=120)
        assert (b"<title>ran</title>" in drawn.stdout) == (name == "without")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_the_report_in_light_and_dark_mode_and_prints_it(home, spec, write, tmp_path):
    write(home, specs=[spec])

    def chromium(*options):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--window-size=1150,1600",
                 "--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
        page = f"file://{tmp_path / 'report.html'}"
        return subprocess.run([CHROMIUM, *flags, *options, page], capture_output=True, check=True, timeout=120).stdout

    drawn = chromium("--dump-dom").decode()
    assert drawn.count('class="main-svg"') >= 2  # the script ran, and made both figures
    assert len(re.findall(r'<path class="js-line"', drawn)) >= 4
    means = {}
    for mode, scheme in (("dark", 0), ("light", 1)):
        chromium(f"--screenshot={tmp_path / mode}.png", f"--blink-settings=preferredColorScheme={scheme}")
        pixels = np.asarray(Image.open(tmp_path / f"{mode}.png").convert("L"), dtype=float)
        means[mode] = pixels.mean()
        assert pixels.std() > 10  # something is drawn
    assert means["dark"] < 80 < 200 < means["light"]
    chromium(f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
