"""One seed of tests/chaos.py; `make soak` runs five on S3, and one each on Google Cloud Storage and Azure."""

import json
import subprocess
import sys
from pathlib import Path


def test_run_survives_the_failures_of_a_cloud():
    command = [sys.executable, "-m", "tests.chaos", "--seed", "0"]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stderr[-4000:]
    report = json.loads(ended.stdout)
    assert report["complete"]
    assert report["rows_equal"]
    assert report["certified"] == 16
    assert report["objects"] == report["blocks"]
    assert report["drivers killed"] == report["nodes removed"] == report["nodes drained"] == 1
    assert report["actors killed"] >= 1
    assert report["calls failed"] > 0
    assert report["responses dropped"] > 0
