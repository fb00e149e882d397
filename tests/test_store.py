"""Storage: one winner, whole objects, clear failures."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import RunError, UserError
from pipeline.storage.store import FolderStore, open_store


def test_exactly_one_of_many_writers_wins(tmp_path):
    store = FolderStore(str(tmp_path))
    for race in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer: store.put_if_absent(f"k/{race}", str(writer).encode()), range(8)))  # noqa: B023
        assert sum(won) == 1
        assert store.read(f"k/{race}") == str(won.index(True)).encode()
    assert len(list(store.list("k"))) == 20
    assert not [name for name in os.listdir(tmp_path / "k") if name.startswith(".")]


def test_a_write_that_was_killed_is_never_seen(tmp_path, monkeypatch):
    store = FolderStore(str(tmp_path))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put_if_absent("votes/a", b"whole")
    assert list(store.list("votes")) == []
    assert not store.exists("votes/a")


def test_keys_and_what_stands(tmp_path):
    store = FolderStore(str(tmp_path))
    for key in ("votes/e/4-0", "votes/s/4-0", "votes/.begun"):
        store.put_if_absent(key, b"x")
    assert sorted(store.keys("votes")) == ["votes/e/4-0", "votes/s/4-0"]
    assert store.standing(["votes/e/4-0", "votes/e/4-20"]) == {"votes/e/4-0"}


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "writable"), (errno.EACCES, "--out")]
)
def test_full_and_read_only_disks_are_named_and_lose_nothing(tmp_path, monkeypatch, code, remedy):
    store = FolderStore(str(tmp_path))
    store.put_if_absent("votes/a", b"kept")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=remedy):
        store.put_if_absent("votes/b", b"x")
    with pytest.raises(RunError, match=remedy):
        store.replace("votes/a", b"x")
    assert store.read("votes/a") == b"kept"
    assert [entry.key for entry in store.list("votes")] == ["votes/a"]


def test_file_system_that_overwrites_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda source, target: None)
    with pytest.raises(RunError, match="put again"):
        FolderStore(str(tmp_path)).prepare()


def test_unknown_place_is_refused():
    with pytest.raises(UserError, match="ftp://host/run"):
        open_store("ftp://host/run")
