"""Ray's private interfaces, against the installed version; if one has changed, the failure names that version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from diffsmooth.cluster import ray_private

ROOT = Path(__file__).parent.parent


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_without_draining_nodes_reports_none():
    changed = f"ray {ray.__version__} changed _private.state.state.get_draining_nodes"
    assert callable(ray._private.state.state.get_draining_nodes), changed
    assert list(ray._private.state.state.get_draining_nodes()) == [], changed
    assert ray_private.draining_nodes() == set()


def test_draining_nodes_are_reported_by_their_ids(monkeypatch):
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: {"a1": 0, "b2": 17})
    assert ray_private.draining_nodes() == {"a1", "b2"}


def test_without_that_interface_no_node_is_draining(monkeypatch):
    monkeypatch.setattr(ray._private.state, "state", object())
    assert ray_private.draining_nodes() == set()


def test_the_output_of_workers_is_redirected(monkeypatch):
    changed = f"ray {ray.__version__} changed _private.worker.print_to_stdstream"
    assert callable(ray._private.worker.print_to_stdstream), changed
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
    lines: list[str] = []
    ray_private.redirect_worker_output(lines.append)
    ray._private.worker.print_to_stdstream({"lines": ["\n first \n second", "third"]}, ignore_prefix=False)
    assert lines == ["first", "third"]


def test_without_that_interface_ray_is_left_alone(monkeypatch):
    monkeypatch.delattr(ray._private.worker, "print_to_stdstream")
    ray_private.redirect_worker_output(print)
    assert not hasattr(ray._private.worker, "print_to_stdstream")


# Starts a local Ray as certify does; prints what its processes listen to, and what a stranger's call is answered.
LOCAL = """
import os
import grpc, ray, psutil
from diffsmooth.cluster.cast import Cluster

with Cluster(address=None, device="cpu", actors=1) as cluster:
    ray.get(cluster.add_actor().handle.__ray_ready__.remote())
    me, addresses = psutil.Process(), set()
    for process in (me, *me.children(recursive=True)):
        connections = getattr(process, "net_connections", process.connections)(kind="tcp")
        addresses |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    print(*addresses)
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        check = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        for token in ("", "guessed", os.environ["RAY_AUTH_TOKEN"]):
            try:
                check(b"", metadata=[("authorization", "Bearer " + token)], timeout=60)
                print("answered")
            except grpc.RpcError as error:
                print(error.code().name)
assert "RAY_AUTH_MODE" not in os.environ
"""


def test_a_local_ray_listens_to_this_machine_only_and_requires_a_token(tmp_path):
    script = tmp_path / "local.py"
    script.write_text(LOCAL)
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    addresses, *answers = ended.stdout.splitlines()
    assert addresses
    assert set(addresses.split()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert answers == ["UNAUTHENTICATED", "UNAUTHENTICATED", "answered"]
    assert not (tmp_path / ".ray").exists()  # where other users could read the token


def test_a_user_can_switch_the_token_off(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with ray_private.only_for_this_process():
        assert os.environ["RAY_AUTH_MODE"] == "disabled"
        assert "RAY_AUTH_TOKEN" not in os.environ
