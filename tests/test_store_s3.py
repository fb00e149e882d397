"""Run storage in S3 (moto and a real server), Google Cloud Storage and Azure (emulators).

One writer wins; lost responses, conflicts, unsuitable stores.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import boto3
import duckdb
import numpy as np
import obstore
import pandas as pd
import pyarrow.dataset
import pytest
import requests
from fsspec.implementations.arrow import ArrowFSWrapper

from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.locations import split_object
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage import remote
from diffsmooth.pipeline.storage.store import BucketStore
from diffsmooth.pipeline.votes.blocks import block_key, read_votes
from diffsmooth.pipeline.votes.run import claim_run
from tests.attacking import attack_alone
from tests.cloud_servers import StoreServer
from tests.models import make_run
from tests.s3_servers import Fault, faulty
from tests.test_votes import FIRST, RUN, put, totals

S3 = ("moto", "seaweed")
ON_S3 = pytest.mark.parametrize("server", S3, indirect=True)


@pytest.fixture(scope="module", params=[*S3, "gcs", "azure"])
def server(request) -> StoreServer:
    """A server with a bucket `bucket`."""
    if request.param in S3:
        return StoreServer(scheme="s3", url=request.getfixturevalue(f"{request.param}_url"))
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture
def store(server, monkeypatch, request) -> BucketStore:
    server.use(monkeypatch)
    monkeypatch.setattr(BucketStore, "_FIRST_PAUSE", 0.01)
    return BucketStore(f"{server.scheme}://bucket/{request.node.originalname}-{os.urandom(4).hex()}")


@pytest.fixture
def behind_faults(store, server, monkeypatch) -> Iterator[Callable[[Fault], BucketStore]]:
    """Makes the same storage behind a proxy that injects faults."""
    with ExitStack() as stack:

        def make(fault: Fault) -> BucketStore:
            server.use(monkeypatch, stack.enter_context(faulty(server.url, fault)))
            return BucketStore(store.uri)

        yield make


def test_round_trip_and_listing_of_several_pages(store):
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
    assert {entry.key for entry in entries} == set(store.keys("many")) == {f"many/{index}" for index in range(1100)}
    assert {entry.size for entry in entries} == {1}
    assert max(abs(entry.modified - time.time()) for entry in entries) < 600
    assert list(store.keys("nothing")) == []
    assert [entry.key for entry in store.list("votes")] == ["votes/a"]


def test_exactly_one_of_many_writers_wins(store):
    for race in range(5):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer: store.put_if_absent(f"k/{race}", str(writer).encode()), range(8)))  # noqa: B023
        assert sum(won) == 1
        assert store.read(f"k/{race}") == str(won.index(True)).encode()


def test_put_whose_response_was_lost_counts_as_our_own(behind_faults):
    """The proxy drops the first response to each put; the client's retry then finds our own object."""
    dropped = set()

    def drop_first(method, path, number):
        if method == "PUT" and path not in dropped:
            dropped.add(path)
            return "drop"
        return None

    store = behind_faults(drop_first)
    assert store.put_if_absent("a", b"ours")
    assert len(dropped) == store.failures == 1
    assert not store.put_if_absent("a", b"second")
    assert store.read("a") == b"ours"


@pytest.mark.parametrize(
    ("answer", "counted"),
    [((409, "ConditionalRequestConflict"), 2), ((503, "SlowDown"), 0), ((500, "InternalError"), 0)],
)
def test_conflicts_and_throttling_are_retried(behind_faults, monkeypatch, answer, counted):
    """The client itself retries throttling, and does not count it. A 409 does not mean that an object is stored."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    refusals = []

    def refuse_twice(method, path, number):
        if method == "PUT" and len(refusals) < 2:
            refusals.append(path)
            return answer
        return None

    store = behind_faults(refuse_twice)
    assert store.put_if_absent("a", b"x")
    assert len(refusals) == 2
    assert store.failures == counted
    assert store.read("a") == b"x"
    assert not store.put_if_absent("a", b"y")
    assert store.failures == counted


def test_endless_conflict_is_an_error(behind_faults, monkeypatch):
    store = behind_faults(lambda *_: (409, "ConditionalRequestConflict"))
    monkeypatch.setattr(BucketStore, "_FIRST_PAUSE", 0.0)
    with pytest.raises(RunError, match="/a: another process kept writing it; run"):
        store.put_if_absent("a", b"x")


def test_store_without_conditional_writes_is_refused(store, monkeypatch):
    """A store that ignores If-None-Match answers 200 to the second put as well."""
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda *arguments, mode, **others: put(*arguments, **others))
    with pytest.raises(UserError, match=r"ignores If-None-Match.*use a store with conditional writes"):
        store.prepare()


def test_missing_bucket_and_wrong_credentials_are_named(store, server, monkeypatch):
    is_seaweed = server.scheme == "s3" and store.put_if_absent("a", b"") and "Seaweed" in _server_name(server)
    if not is_seaweed:  # it creates a missing bucket
        for operation in (lambda lost: lost.prepare(), lambda lost: list(lost.keys("votes"))):
            with pytest.raises(UserError, match=r"there is no (bucket|container) nobucket; create it"):
                operation(BucketStore(f"{server.scheme}://nobucket/run"))
    with monkeypatch.context() as environment:
        if is_seaweed:
            environment.setattr(boto3, "DEFAULT_SESSION", None)
            environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        elif server.scheme == "az":
            environment.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
        else:  # the others do not check credentials
            return
        with pytest.raises(UserError, match=r"access denied .*check .*your credentials"):
            BucketStore(store.uri).prepare()


def _server_name(server: StoreServer) -> str:
    return requests.get(server.url, timeout=10).headers.get("Server", "")


def test_slashes_around_the_prefix_do_not_matter(store):
    """With one before it, keys of a listing lost their first letter, and placing an order never ended."""
    other = BucketStore(f"{store.uri.replace('bucket/', 'bucket//')}/")
    assert other.put_if_absent("votes/a", b"1")
    assert list(other.keys("votes")) == list(store.keys("votes")) == ["votes/a"]
    assert other.uri == store.uri


def test_a_run_needs_a_bucket_and_a_prefix(store):
    for rest in ("bucket", "bucket/", "", "/run"):
        with pytest.raises(UserError, match=r"write (s3|gs|az)://(BUCKET|CONTAINER)/PREFIX"):
            BucketStore(f"{store.uri.partition('://')[0]}://{rest}")


@ON_S3
def test_votes_are_readable_with_other_tools(store, server):
    """pandas, pyarrow and DuckDB read the votes directly from the bucket."""
    claim_run(store, RUN)
    put(store, FIRST, [0, 15, 5])
    put(store, Block(4, "selection", 0, 10), [10, 0, 0])
    votes = read_votes(store.uri)
    assert votes.votes.sum() == 30
    assert sorted(pd.read_parquet(f"{store.uri}/votes").votes) == sorted(votes.votes)
    files = pyarrow.fs.S3FileSystem(endpoint_override=server.url.removeprefix("http://"), scheme="http")
    table = pyarrow.dataset.dataset(store.uri.removeprefix("s3://") + "/votes", filesystem=files).to_table()
    assert totals(table.to_pandas()) == totals(votes) == totals(pd.read_parquet(f"{store.uri}/votes"))
    with duckdb.connect() as connection:
        connection.register_filesystem(ArrowFSWrapper(files))  # DuckDB would download its own S3 client
        rows = connection.sql(f"SELECT * FROM read_parquet('{store.uri}/votes/*/*.parquet')").df()
    assert totals(rows) == totals(votes)


def test_existing_objects_are_found(store):
    for key in ("votes/e/4-0", "votes/e/4-20", "votes/e/44-0", "votes/e/5-0"):
        store.put_if_absent(key, b"x")
    wanted = [f"votes/e/4-{start}" for start in range(0, 200, 20)]
    assert store.existing(wanted) == {"votes/e/4-0", "votes/e/4-20"}
    assert store.existing([*wanted, "votes/e/5-0", "votes/s/4-0"]) == {*wanted[:2], "votes/e/5-0"}
    assert store.existing([]) == set()


@ON_S3
def test_votes_that_boto3_stored_are_resumed(store, server):
    """Objects of an earlier version, which stored through boto3, are the same run, and their token is compared."""
    home = store.uri
    claim_run(store, RUN)
    put(store, FIRST, [0, 15, 5])
    client, (_, bucket, prefix) = boto3.client("s3", endpoint_url=server.url), split_object(f"{store.uri}-before")
    for entry in store.list("votes"):
        client.put_object(
            Bucket=bucket, Key=f"{prefix}/{entry.key}", Body=store.read(entry.key), IfNoneMatch="*",
            Metadata={"token": "0123"},
        )  # fmt: skip
    client.put_object(Bucket=bucket, Key=f"{prefix}/run.json", Body=store.read("run.json"), IfNoneMatch="*")
    before = BucketStore(f"{store.uri}-before")
    claim_run(before, RUN)
    assert not before.put_if_absent(block_key(FIRST), b"another attempt's")
    pd.testing.assert_frame_equal(read_votes(before.uri), read_votes(home))


def test_attacks_in_a_bucket_equal_those_in_a_folder_and_are_not_repeated(store, raw_spec, tmp_path):
    spec = load_spec(raw_spec)
    there, here = (make_run(spec, home, samples=2) for home in (store.uri, tmp_path / "run"))
    attack, remote = attack_alone(spec, there, range(2))
    _, local = attack_alone(spec, here, range(2))
    for one, two in zip(remote, local, strict=True):
        assert one.upper(attack.alpha) == two.upper(attack.alpha) < math.inf
        for first, second in zip(one.rungs, two.rungs, strict=True):
            assert np.array_equal(first.image_CHW, second.image_CHW)
            assert np.array_equal(first.selection_K, second.selection_K)
    _, again = attack_alone(spec, there, range(2))
    assert [one.metadata.attempt for one in again] == [one.metadata.attempt for one in remote]
