"""Compiled artefacts of f: kept in a private folder only, and given to actors of the same run, torch and device."""

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError

import diffsmooth.cluster.cast
from diffsmooth.cluster import compiled
from diffsmooth.cluster.cast import Work
from diffsmooth.cluster.scheduler import Scheduler
from diffsmooth.cluster.worker import Setup, Worker
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.errors import RunError
from diffsmooth.pipeline.smoothing import weights_ids
from diffsmooth.pipeline.spec import load_spec, votes_id
from tests.models import make_run

RUN, OTHER = "0" * 32, "1" * 32


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_artefacts_are_read_for_the_same_run_and_torch_only(folder, monkeypatch):
    key = compiled.key_of(RUN, "cuda NVIDIA H100 80GB HBM3")
    compiled.store(key, b"h100")
    compiled.store(compiled.key_of(RUN, "cpu x86_64"), b"cpu")
    compiled.store(compiled.key_of(OTHER, "cpu x86_64"), b"another run")
    assert compiled.read_known(RUN) == {key: b"h100", compiled.key_of(RUN, "cpu x86_64"): b"cpu"}
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert compiled.read_known(RUN) == {}


def test_a_folder_that_others_can_write_is_neither_read_nor_written(folder, caplog):
    key = compiled.key_of(RUN, "cpu")
    compiled.store(key, b"code")
    folder.chmod(0o777)
    assert compiled.read_known(RUN) == {}
    compiled.store(compiled.key_of(RUN, "other"), b"code")
    assert caplog.text.count("other users can change the files of this cache folder") == 2
    folder.chmod(0o700)
    assert list(compiled.read_known(RUN)) == [key]


@pytest.fixture
def torch_cache(monkeypatch):
    """Calls of torch's functions, none of which compiles anything."""
    calls = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: calls.append(data), raising=False)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"saved", None), raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append("compile") or function)
    return calls


def compiling(raw_spec, tmp_path):
    spec = load_spec({**raw_spec, "compute": {"device": "cpu", "compile": True}})
    return Setup(spec, make_run(spec, tmp_path / "run", samples=1).uri, votes_id(spec, weights_ids(spec)), 16)


def test_an_actor_loads_the_artefacts_of_its_device_before_it_compiles(raw_spec, tmp_path, torch_cache):
    setup = compiling(raw_spec, tmp_path)
    torch_cache.clear()
    key = Worker.load(setup).compiled_key
    assert torch_cache == ["compile"]
    Worker.load(setup, {compiled.key_of(setup.votes_id, "cuda H100"): b"h100", key: b"cpu"})
    assert torch_cache == ["compile", b"cpu", "compile"]


def test_damaged_artefacts_are_reported_and_not_used(torch_cache, monkeypatch, caplog):
    def broken(data):
        raise RuntimeError("bad magic")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", broken)
    compiled.load({"key": b"code"}, "key")
    assert "cannot be loaded (bad magic); f is compiled again" in caplog.text


class Handle:
    """A stand-in for Ray's handle of an actor: every call is recorded, and its future is its name."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *arguments: self.calls.append((name, *arguments)) or name)


def test_the_driver_asks_one_actor_and_gives_its_artefacts_to_the_next(
    folder, raw_spec, tmp_path, torch_cache, monkeypatch
):
    setup = compiling(raw_spec, tmp_path)
    results = {}
    ray = SimpleNamespace(get=lambda future: results[future], put=dict)
    monkeypatch.setattr(diffsmooth.cluster.cast, "ray", ray)

    def start():
        work = Work(setup=setup, blocks=[Block(0, "selection", 0, 50)])
        return diffsmooth.cluster.cast._Cast(SimpleNamespace(threads=1, actors={}), work, Scheduler(), [])

    key = compiled.key_of(setup.votes_id, "gpu")
    cast, actors = start(), [diffsmooth.cluster.actor.Actor(f"actor-{index}", Handle()) for index in range(3)]
    results.update(load=diffsmooth.cluster.actor.Loaded("node", key), compiled=b"code", ready=None)
    for actor in actors[:2]:
        cast._started(actor, "ready")
        assert actor.handle.calls == [("load", cast._setup, {})]
        cast._loaded(actor, "load")
    asked = [actor.name for actor in actors[:2] if ("compiled",) in actor.handle.calls]
    assert asked == ["actor-0"]
    cast._collect("compiled")
    cast._started(actors[2], "ready")
    assert actors[2].handle.calls == [("load", cast._setup, {key: b"code"})]
    start()._started(actors[2], "ready")  # the next command on this machine
    assert actors[2].handle.calls[-1] == ("load", cast._setup, {key: b"code"})


def test_an_actor_that_cannot_import_something_says_what(raw_spec, tmp_path, monkeypatch):
    setup = compiling(raw_spec, tmp_path)
    monkeypatch.setattr(diffsmooth.cluster.cast, "ray", SimpleNamespace(put=dict))
    work = Work(setup=setup, blocks=[])
    cast = diffsmooth.cluster.cast._Cast(SimpleNamespace(threads=1, actors={}), work, Scheduler(), [])
    message = (
        "The actor died because of an error raised in its creation task, \x1b[36mray::RemoteWorker.__init__()\x1b[39m\n"
        "  File \"x.py\", line 1\nModuleNotFoundError: No module named \x1b[31m'diffsmooth'\x1b[39m\n"
    )
    error = ActorDiedError()
    monkeypatch.setattr(ActorDiedError, "__str__", lambda error: message)
    with pytest.raises(
        RunError, match=r"^an actor could not start: No module named 'diffsmooth'; install the same"
    ) as e:
        cast._count_failed_start(error)
    assert "\x1b" not in str(e.value)
