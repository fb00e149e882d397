"""Actors that wait for a device make Ray's autoscaler add simulated nodes, and idle nodes are removed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from diffsmooth.pipeline.spec import load_spec
from tests.models import to_toml
from tests.processes import descendants, starting_ray

ROOT = Path(__file__).parent.parent
NODE = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0}


def autoscaling(port: int) -> dict:
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
             "rsync_filter")  # fmt: skip
    return {
        **{name: [] for name in lists},
        "cluster_name": "simulated",
        "max_workers": 2,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 0.1,
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}"},
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": {**NODE, "max_workers": 0}, "gpu": {**NODE, "max_workers": 2}},
    }


@pytest.fixture
def head(tmp_path):
    """The address of a Ray head with one logical GPU whose autoscaler may add two nodes of one each."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    (tmp_path / "autoscaling.yaml").write_text(yaml.safe_dump(autoscaling(port)))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
               f"--autoscaling-config={tmp_path / 'autoscaling.yaml'}", "--num-cpus=1", "--num-gpus=1",
               "--include-dashboard=false", "--dashboard-agent-listen-port=0", "--node-ip-address=127.0.0.1",
               f"--object-store-memory={80 * 1024**2}"]  # fmt: skip
    environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with starting_ray(), (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < limit and b"--block" not in Path(log.name).read_bytes():
            time.sleep(0.2)
    try:
        assert b"--block" in (tmp_path / "head.log").read_bytes(), (tmp_path / "head.log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


@contextmanager
def node_counts(address: str) -> Iterator[Iterator[int]]:
    """How many nodes are alive, counted twice a second by a process of its own: a process knows one Ray at a time."""
    code = f"""
import ray, time
ray.init("{address}", log_to_driver=False)
while True:
    print(sum(node["Alive"] for node in ray.nodes()), flush=True)
    time.sleep(0.5)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield map(int, process.stdout)
    finally:
        process.kill()
        process.communicate()


def test_waiting_actors_add_nodes_and_idle_nodes_are_removed(head, raw_spec, tmp_path):
    raw_spec["classifier"]["arch"] = "tests.models:slow_half_space"
    raw_spec["compute"]["device"] = "auto"  # logical GPUs to Ray, the CPU to torch
    (tmp_path / "spec.toml").write_text(to_toml(load_spec(raw_spec, ["smoothing.n=2500"])))
    command = [sys.executable, "-m", "diffsmooth.jobs.cli", "certify", str(tmp_path / "spec.toml"), "--address", head,
               "--actors", "3", "--batch-size", "16", "--out", str(tmp_path / "run"), "--json"]  # fmt: skip
    with node_counts(head) as counts:
        assert next(counts) == 1
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        most, limit = 1, time.monotonic() + 400
        while driver.poll() is None and time.monotonic() < limit:
            most = max(most, next(counts))
        result, errors = driver.communicate(timeout=60)
        assert driver.returncode == 0, errors
        assert json.loads(result)[0]["complete"]
        assert most > 1  # the third node may come too late for such a short run
        while next(counts) > 1:
            assert time.monotonic() < limit, "the idle nodes were not removed"
