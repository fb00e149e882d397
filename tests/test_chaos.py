"""One seed of tests/chaos.py on each kind of store; `make soak` runs five."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cloud_servers import find_azurite, find_gcs


@pytest.mark.parametrize("store", ["s3", "gs", "az"])
def test_run_survives_the_failures_of_a_cloud(store):
    if not {"s3": True, "gs": find_gcs(), "az": find_azurite()}[store]:
        pytest.skip("the server of this store is not installed")
    command = [sys.executable, "-m", "tests.chaos", "--seed", "0", "--store", store]
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
