"""Ray's private interfaces, against the installed version; if one has changed, the failure names that version."""

import pytest
import ray

from cluster import ray_private


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
