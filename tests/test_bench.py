"""The benchmarks that need no Ray: they measure what they say they do."""

import json
from pathlib import Path

from click.testing import CliRunner

from jobs.cli import main
from pipeline.votes import read_votes


def test_storage_is_measured_on_a_run_that_reads(tmp_path):
    answer = CliRunner().invoke(main, ["bench", "--storage", str(tmp_path), "--blocks", "30", "--json"])
    assert answer.exit_code == 0, answer.output
    figures = json.loads(answer.output)
    assert (figures["blocks"], figures["missing"]) == (30, 3)
    assert read_votes(figures["run"]).votes.sum() == 3 * 100 + 27 * 1000
    assert Path(figures["run"], "votes.parquet").exists()


def test_two_benchmarks_at_once_are_refused(tmp_path):
    answer = CliRunner().invoke(main, ["bench", "--simulate", "--storage", str(tmp_path)])
    assert answer.exit_code == 2
    assert "choose one" in answer.output
