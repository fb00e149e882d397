"""Published logs: every variant that is about reads right or is refused by name; radii never grow on the way out."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from diffsmooth.pipeline.certify.curve import curve_of
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.show.logs import read_log, write_log

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
ROWS = "0\t3\t3\t0.486\t1\t0:02:31.238689\n20\t7\t5\t0.413\t0\t17.2\n40\t4\t-1\t0.0\t0\t17.5\n"


@pytest.fixture
def log(tmp_path):
    def write(text: str):
        path = tmp_path / "sigma_0.50"
        path.write_bytes(text.encode())
        return path

    return write


def columns(table, *names):
    return [tuple(row) for row in table[list(names)].itertuples(index=False)]


def test_cohens_layout(log, caplog):
    table = read_log(log(HEADER + ROWS))
    assert columns(table, "sample", "label", "prediction", "radius", "status", "correct") == [
        (0, 3, 3, 0.486, "certified", True),
        (20, 7, 5, 0.413, "certified", False),
        (40, 4, -1, 0.0, "abstained", False),
    ]
    assert not table["post_hoc"].any()
    assert not caplog.text


@pytest.mark.parametrize(
    "text",
    [
        (HEADER + ROWS).replace("\n", "\r\n"),
        HEADER + ROWS + "\n\n  \n",
        HEADER + ROWS.removesuffix("\n"),
        "\ufeff" + HEADER + ROWS,
        # a running total, as DDS writes it; True and False; nonsense: `correct` is not believed
        HEADER + ROWS.replace("\t0\t", "\t1\t"),
        HEADER + ROWS.replace("\t1\t", "\tTrue\t").replace("\t0\t17", "\tFalse\t17"),
        HEADER + ROWS.replace("\t1\t", "\t\t"),
        # cut in the time, which nobody reads
        HEADER + ROWS.removesuffix("17.5\n"),
        # a paper's own columns behind the layout
        HEADER.replace("\n", "\tpA\n") + ROWS.replace("\n", "\t0.9\n"),
    ],
)
def test_variants_of_the_layout_are_equal(log, caplog, text):
    read = read_log(log(text))
    pd.testing.assert_frame_equal(read, read_log(log(HEADER + ROWS)))
    assert not caplog.text


def test_radii_as_printed(log):
    table = read_log(log(HEADER + "0\t1\t1\t7.11e-05\t1\t1.0\n1\t1\t1\t0.0\t1\t1.0\n2\t1\t-1\t0.3\t0\t1.0\n"))
    assert table["radius"].tolist() == [7.11e-05, 0.0, 0.0]
    assert table["status"].tolist() == ["certified", "certified", "abstained"]
    curve = curve_of("log", table, None, 1.0)
    assert curve.at([0, 7e-5, 8e-5]).tolist() == [2 / 3, 1 / 3, 0]


def test_an_abstention_on_an_unlabelled_sample_is_not_correct(log):
    assert not read_log(log(HEADER + "0\t-1\t-1\t0.0\t0\t1.0\n"))["correct"].any()


def test_predict_logs_count_at_radius_zero(log, caplog):
    table = read_log(log("idx\tlabel\tpredict\tcorrect\ttime\n0\t3\t3\t1\t1.0\n1\t3\t-1\t0\t1.0\n"))
    assert curve_of("log", table, None, 1.0).at([0, 1e-9]).tolist() == [0.5, 0]
    assert "has no radii" in caplog.text


def test_samples_that_were_not_sampled_are_excluded_with_a_warning(log, caplog):
    table = read_log(log(HEADER + ROWS + "60\t1\t-2\tnan\t0\t0.0\n"))
    curve = curve_of("log", table, None, 1.0)
    assert (curve.num_samples, curve.incomplete, curve.abstained) == (3, 1, 1)
    assert "1 of 4 samples were not sampled (predict -2)" in caplog.text


@pytest.mark.parametrize("end", ["60", "60\t1\t1\t7.11e-0", "60\t1\t1\t0.5\t"])
def test_a_truncated_last_line_is_skipped_with_a_warning(log, caplog, end):
    assert read_log(log(HEADER + ROWS + end))["sample"].tolist() == [0, 20, 40]
    assert "line 5: the last line is truncated" in caplog.text


def test_a_header_alone_has_no_samples(log):
    assert curve_of("log", read_log(log(HEADER)), None, 0.0).num_samples == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            HEADER + "0\t3\t3\n" + ROWS,
            ["line 2", "3 fields", r"'0\t3\t3'", "a line must have 6", "idx label predict radius"],
        ),
        (HEADER + ROWS + "20\t7\t7\t0.1\t1\t1.0\n", ["lines 3 and 5", "idx 20"]),
        (HEADER + "0\t3\t3\tnan\t1\t1.0\n", ["line 2", "radius = 'nan'", "must be a number between 0 and 1e+06"]),
        (HEADER + "0\t3\t3\tinf\t1\t1.0\n", ["radius = 'inf'"]),
        (HEADER + "0\t3\t3\t-0.1\t1\t1.0\n", ["radius = '-0.1'"]),
        (HEADER + "0\t3\t3\ttensor(1)\t1\t1.0\n", ["radius = 'tensor(1)'"]),
        (HEADER + "0\t3\tcat\t0.1\t1\t1.0\n", ["line 2", "predict = 'cat'", "whole number"]),
        (HEADER + "0\t3\t-3\t0.1\t1\t1.0\n", ["predict = -3", "-2 (not sampled)"]),
        (HEADER + ROWS + HEADER + ROWS, ["line 5", "idx = 'idx'"]),
        ("", ["line 1", "'' is not the header of a log"]),
        ("{}\n", ["'{}' is not the header of a log", "separated by tabs", "idx label predict radius correct time"]),
        (ROWS, ["is not the header of a log", "0.486"]),
        (HEADER.replace("\t", " ") + ROWS, ["is not the header of a log"]),
    ],
)
def test_mistakes_are_named(log, text, words):
    path = log(text)
    with pytest.raises(UserError) as refusal:
        read_log(path)
    for word in [str(path), *words]:
        assert word in str(refusal.value)


def test_what_is_not_a_text_file_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(UserError, match="not a log: it is not UTF-8 text"):
        read_log(tmp_path / "a")
    with pytest.raises(UserError, match="b: no such file"):
        read_log(tmp_path / "b")
    with pytest.raises(UserError, match="not a regular file"):
        read_log(tmp_path)


def certificates(radii, status="certified"):
    return pd.DataFrame(
        {
            "sample": np.arange(len(radii), dtype=np.int32),
            "label": np.int32(3),
            "status": status,
            "prediction": np.int32(3),
            "radius": radii,
            "correct": True,
            "post_hoc": False,
        }
    )


def test_radii_are_written_rounded_down(log):
    rng = np.random.default_rng(5)
    radii = np.concatenate(
        [rng.uniform(0, 4, 5000), 10 ** rng.uniform(-9, 1, 5000), np.round(rng.uniform(0, 4, 5000), 6), [0, 0.25, 3.81]]
    )
    text = write_log(certificates(radii))
    for line, radius in zip(text.splitlines()[1:], radii, strict=True):
        assert 0 <= Decimal(float(radius)) - Decimal(line.split("\t")[3]) < Decimal("1e-6")
    read = read_log(log(text))["radius"].to_numpy()
    assert (read <= radii).all()
    assert (radii - read < 1e-6 + 1e-15).all()


def test_round_trip(log, caplog):
    table = certificates(
        [0.5, 0.0, 0.0, 1.123456, 0.0], ["certified", "abstained", "incomplete", "certified", "skipped"]
    )
    table["prediction"] = np.array([3, -1, -2, 1, -2], np.int32)
    table["correct"] = [True, False, False, False, False]
    text = write_log(table)
    assert text.splitlines() == [
        HEADER.strip(),
        "0\t3\t3\t0.500000\t1\t0:00:00",
        "1\t3\t-1\t0.000000\t0\t0:00:00",
        "3\t3\t1\t1.123456\t0\t0:00:00",
        "4\t3\t-1\t0.000000\t0\t0:00:00",
    ]
    assert "1 of 5 samples are incomplete and excluded from the log: 2" in caplog.text
    read = read_log(log(text))
    assert write_log(read) == text
    marked = write_log(table.assign(post_hoc=True))
    assert marked.splitlines()[0].endswith("time\tpost_hoc")
    assert read_log(log(marked))["post_hoc"].all()
    assert columns(read, "radius", "correct") == columns(table.drop(index=2), "radius", "correct")
