"""Run storage in a folder: one writer wins, objects are complete, and failures are one clear line."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.storage.store import FolderStore, open_store


def test_exactly_one_of_many_writers_wins(tmp_path):
    store = FolderStore(str(tmp_path))
    for race in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer: store.put_if_absent(f"k/{race}", str(writer).encode()), range(8)))  # noqa: B023
        assert sum(won) == 1
        assert store.read(f"k/{race}") == str(won.index(True)).encode()
    assert len(list(store.list("k"))) == 20
    assert not [name for name in os.listdir(tmp_path / "k") if name.startswith(".")]


def test_killed_write_is_never_visible(tmp_path, monkeypatch):
    store = FolderStore(str(tmp_path))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put_if_absent("votes/a", b"whole")
    assert list(store.list("votes")) == []
    assert not store.exists("votes/a")


def test_keys_and_existing_objects(tmp_path):
    store = FolderStore(str(tmp_path))
    for key in ("votes/e/4-0", "votes/s/4-0", "votes/.in-progress"):
        store.put_if_absent(key, b"x")
    assert sorted(store.keys("votes")) == ["votes/e/4-0", "votes/s/4-0"]
    assert list(store.keys("orders")) == []
    assert store.existing(["votes/e/4-0", "votes/e/4-20"]) == {"votes/e/4-0"}
    with pytest.raises(FileNotFoundError, match=r"votes/e/4-20: no such file"):
        store.read("votes/e/4-20")


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
    with pytest.raises(RunError, match="overwrites files that exist; use another one"):
        FolderStore(str(tmp_path)).prepare()


def test_failed_replacement_leaves_no_temporary_file(tmp_path):
    (tmp_path / "votes.parquet").mkdir()
    with pytest.raises(UserError, match="cannot write: Is a directory; give the path of a file"):
        FolderStore(str(tmp_path)).replace("votes.parquet", b"x")
    assert os.listdir(tmp_path) == ["votes.parquet"]


@pytest.mark.parametrize("uri", ["ftp://host/run", "ftp://user:secret@host/run?token=secret"])
def test_unknown_kind_of_storage_is_refused_without_secrets(uri):
    with pytest.raises(UserError, match=r"ftp://host/run.* give a folder, s3://BUCKET/PREFIX") as error:
        open_store(uri)
    assert "secret" not in str(error.value)


def folder_is_a_file(root: Path) -> Path:
    (root / "run").write_text("")
    return root / "run"


def part_of_the_path_is_a_file(root: Path) -> Path:
    return folder_is_a_file(root) / "below"


def circular_link(root: Path) -> Path:
    (root / "run").symlink_to(root / "run")
    return root / "run"


def overlong_name(root: Path) -> Path:
    return root / (5000 * "a")


OPERATIONS = {
    "put": lambda store: store.put_if_absent("run.json", b"x"),
    "replace": lambda store: store.replace("run.json", b"x"),
    "prepare": lambda store: store.prepare(),
    "read": lambda store: store.read("run.json"),
    "exists": lambda store: store.exists("run.json"),
    "list": lambda store: list(store.list("votes")),
    "keys": lambda store: list(store.keys("votes")),
    "existing": lambda store: store.existing(["run.json"]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (folder_is_a_file, "part of the path is a file; use another path"),
        (part_of_the_path_is_a_file, "part of the path is a file; use another path"),
        (circular_link, "use another path, or remove the circular symbolic link|part of the path is a file"),
        (overlong_name, "use a shorter path"),
    ],
)
def test_paths_that_cannot_hold_a_run_are_the_users_mistake(tmp_path, make, remedy, operation):
    store = open_store(str(make(tmp_path)))
    with pytest.raises(UserError, match=remedy) as error:
        OPERATIONS[operation](store)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_folder_without_permissions_is_named(tmp_path, operation):
    (tmp_path / "run" / "votes").mkdir(parents=True)
    (tmp_path / "run").chmod(0)
    try:
        with pytest.raises(RunError, match=r"Permission denied; (make the folder writable|check its permissions)"):
            OPERATIONS[operation](open_store(str(tmp_path / "run")))
    finally:
        (tmp_path / "run").chmod(0o755)


@pytest.mark.parametrize("call", ["open", "stat", "scandir"])
def test_permission_denied_is_named(tmp_path, monkeypatch, call):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    operation = {"open": "read", "stat": "exists", "scandir": "list"}[call]
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunError, match=r"cannot (read|list): Permission denied; check its permissions"):
        OPERATIONS[operation](FolderStore(str(tmp_path)))


@pytest.mark.parametrize("uri", ["", "a\0b", "run\udcff"])
def test_unusable_paths_are_refused_when_opened(uri):
    with pytest.raises(UserError, match=r"not (a usable path|the path of a folder)") as error:
        open_store(uri)
    str(error.value).encode()  # it can be printed


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    """Opening a pipe would wait for its writer, and reading /dev/zero would never end."""
    path = tmp_path / "run.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    store = FolderStore(str(tmp_path))
    with pytest.raises(UserError, match=rf"run\.json: a (named )?{kind}, not a regular file"):
        store.read("run.json")
    assert not store.exists("run.json")
    assert not store.put_if_absent("run.json", b"x")


def test_folder_in_place_of_an_object_is_listed_so_that_it_is_refused(tmp_path):
    (tmp_path / "orders" / "001").mkdir(parents=True)
    (tmp_path / "orders" / "002.json").mkdir()
    store = FolderStore(str(tmp_path))
    assert list(store.keys("orders")) == ["orders/002.json"]
    with pytest.raises(UserError, match=r"002\.json: a folder, not a regular file"):
        store.read("orders/002.json")


def test_object_larger_than_its_limit_is_not_read(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RunError, match=r"1,099,511,627,776 bytes, but at most 1,000 are expected"):
        FolderStore(str(tmp_path)).read("run.json", limit=1000)


def test_circular_links_below_the_run_end_the_listing(tmp_path):
    (tmp_path / "votes").mkdir()
    for name in ("a", "b"):
        (tmp_path / "votes" / name).symlink_to("..", target_is_directory=True)
    with pytest.raises(UserError, match=r"nested more than 8 deep; remove the circular symbolic link"):
        list(FolderStore(str(tmp_path)).keys("votes"))


def test_broken_links_and_names_that_are_not_utf8_are_listed_so_that_they_can_be_refused(tmp_path):
    (tmp_path / "votes").mkdir()
    (tmp_path / "votes" / "link").symlink_to("/nowhere/at/all")
    Path(os.fsdecode(bytes(tmp_path / "votes") + b"/\xff\x01")).write_text("")
    store = FolderStore(str(tmp_path))
    assert sorted(store.keys("votes")) == ["votes/\\udcff\\x01", "votes/link"]
    with pytest.raises(UserError, match=r"votes/link: no such file"):
        list(store.list("votes"))


def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    """run.json may hold a secret seed."""
    before = os.umask(0o077)
    try:
        store = open_store(str(tmp_path / "run"))
        store.put_if_absent("run.json", b"{}")
        store.replace("progress.json", b"{}")
    finally:
        os.umask(before)
    for key in ("run.json", "progress.json"):
        assert (tmp_path / "run" / key).stat().st_mode & 0o777 == 0o600
    store.put_if_absent("votes/a", b"")
    assert (tmp_path / "run" / "votes" / "a").stat().st_mode & 0o777 == 0o666 & ~before
