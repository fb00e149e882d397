"""Errors of S3 and HTTPS: each becomes one line that names the object and the remedy, and nothing hangs."""

import itertools
import os
import threading
from collections.abc import Iterator

import boto3
import pytest

from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.storage import fetch as fetching
from diffsmooth.pipeline.storage import remote
from diffsmooth.pipeline.storage.fetch import fetch
from diffsmooth.pipeline.storage.remote import Broken, ObjectFile, list_objects, paced
from diffsmooth.pipeline.storage.store import BucketStore, open_store
from tests.s3_servers import FixedAnswer, credentials, fixed_server

AWS = [name for name in os.environ if name.startswith("AWS_")]


@pytest.fixture(scope="module")
def shared() -> Iterator[FixedAnswer]:
    with fixed_server() as answer:
        yield answer


@pytest.fixture
def server(shared, monkeypatch) -> FixedAnswer:
    """The server, which is also S3's endpoint, with its answer reset."""
    shared.status, shared.headers, shared.body, shared.seconds = 200, {}, b"", 0.0
    shared.requests.clear()
    for name in AWS:
        monkeypatch.delenv(name)
    credentials(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", shared.url)
    return shared


@pytest.fixture(autouse=True)
def fast(monkeypatch, tmp_path):
    """Two tries without pauses."""
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_CLIENT_TRIES", 1)
    for module in (remote, fetching):
        monkeypatch.setattr(module, "_TRIES", 2)
        monkeypatch.setattr(module, "_FIRST_PAUSE", 0.0)


def error_xml(code: str, message: str = "the server's reason") -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def write(location: str) -> None:
    BucketStore(location).put_if_absent("run.json", b"{}")


def read(location: str) -> None:
    BucketStore(location).read("run.json")


def list_run(location: str) -> None:
    list(BucketStore(location).list("votes"))


EVERY = (write, read, list_run, fetch, list_objects, ObjectFile)
NOT_A_HEAD = (write, read, list_run, fetch, list_objects)  # whose errors have a body
READERS = (read, fetch)
LISTERS = (list_run, list_objects)

S3_ANSWERS = {
    # name: status, headers, body, operations, the kind of the error, words of its message
    "redirect without a region": (301, {}, b"", EVERY, UserError, "another region .*set AWS_DEFAULT_REGION"),
    "redirect to a region": (
        301, {"x-amz-bucket-region": "eu-west-1"}, error_xml("PermanentRedirect"), EVERY, UserError,
        "another region .*set AWS_DEFAULT_REGION",
    ),
    "temporary redirect": (
        307, {"Location": "http://[::1"}, error_xml("TemporaryRedirect"), EVERY, UserError, "AWS_ENDPOINT_URL",
    ),
    "wrong region": (
        400, {}, error_xml("IllegalLocationConstraintException"), NOT_A_HEAD,
        UserError,        "another region .*set AWS_DEFAULT_REGION",
    ),
    "wrong region without a code": (400, {}, b"", (ObjectFile,), UserError,
        r"rejected \(400\); check .*AWS_DEFAULT_REGION"),
    "bad request": (400, {}, error_xml("InvalidRequest"), (write, read, list_run, fetch), UserError, r"rejected \(400"),
    "expired token": (400, {}, error_xml("ExpiredToken"), READERS, RunError, "ExpiredToken.*renew the credentials"),
    "skewed clock": (403, {}, error_xml("RequestTimeTooSkewed"), READERS, RunError, "correct the clock"),
    "unknown key id": (403, {}, error_xml("InvalidAccessKeyId"), EVERY, UserError, r"access denied \(403"),
    "denied": (403, {}, error_xml("AccessDenied"), EVERY, UserError, r"access denied .*credentials and permissions"),
    "no bucket": (
        404, {}, error_xml("NoSuchBucket"), NOT_A_HEAD, UserError,
        "there is no bucket bucket; create it",
    ),
    "no key": (404, {}, error_xml("NoSuchKey"), READERS, UserError, r"there is no such file \(404 NoSuchKey"),
    "conflict": (409, {}, error_xml("ConditionalRequestConflict"), (write,), RunError, "another process kept writing"),
    "changed": (412, {}, error_xml("PreconditionFailed"), (ObjectFile, fetch), RunError, "the file has changed"),
    "not implemented": (501, {}, error_xml("NotImplemented"), (write,), UserError, "conditional writes"),
    "too many requests": (429, {}, error_xml("TooManyRequests"), EVERY, RunError, r"\(429.*run the same command again"),
    "slow down": (503, {}, error_xml("SlowDown"), EVERY, RunError, r"\(503.*run the same command again"),
    "teapot": (418, {}, b"", EVERY, UserError, "418"),
    "garbage instead of an error": (404, {}, b"<<<not xml", READERS, UserError, "AWS_ENDPOINT_URL|no such file"),
    "garbage instead of a listing": (200, {}, b"<<<not xml", LISTERS, UserError, "not one of an S3 server"),
    "a web page instead of a listing": (200, {}, b"<html></html>", LISTERS, UserError, "not one of an S3 server"),
    "an object without an ETag": (200, {}, b"abc", (ObjectFile,), UserError, "not one of an S3 server"),
    "an invalid length": (200, {"Content-Length": "abc"}, b"", (read, fetch), RunError, "the connection failed; check"),
    "an invalid length of a head": (200, {"Content-Length": "abc"}, b"", (ObjectFile,), UserError, "abc.*; check"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "operation"),
    [pytest.param(name, operation, id=f"{name}-{operation.__name__}")
     for name, case in S3_ANSWERS.items() for operation in case[3]],
)  # fmt: skip
def test_every_answer_of_an_s3_server_gives_one_line(server, monkeypatch, name, operation):
    monkeypatch.setattr(BucketStore, "_FIRST_PAUSE", 0.0)
    server.status, server.headers, server.body, _, kind, words = S3_ANSWERS[name]
    with pytest.raises(kind, match=words) as error:
        operation("s3://bucket/run")
    line = str(error.value)
    assert line.startswith("s3://bucket/run")
    assert "\n" not in line
    assert len(server.requests) <= 20


@pytest.mark.parametrize("operation", [write, list_run, fetch, list_objects, ObjectFile])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"AWS_ENDPOINT_URL": "nonsense"}, "nonsense.*correct the location or the AWS settings"),
        ({"AWS_ENDPOINT_URL": "http://[::1"}, "correct the location or the AWS settings"),
        ({"AWS_PROFILE": "unknown-profile"}, "unknown-profile.*correct the location or the AWS settings"),
        ({"AWS_DEFAULT_REGION": "bad region!"}, "bad region!.*correct the location or the AWS settings"),
        ({"AWS_CONFIG_FILE": __file__}, "correct the location or the AWS settings"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_invalid_aws_settings_are_the_users_mistake(server, monkeypatch, operation, settings, words):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as error:
        operation("s3://bucket/run")
    assert "\n" not in str(error.value)
    assert server.requests == []


@pytest.mark.parametrize("operation", EVERY)
def test_missing_credentials_are_the_users_mistake_everywhere(server, monkeypatch, operation):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(UserError, match=r"s3://bucket/run.*: no complete AWS credentials found; set AWS_PROFILE"):
        operation("s3://bucket/run")


@pytest.mark.parametrize("operation", EVERY)
def test_unreachable_endpoint_is_named(server, monkeypatch, operation):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"s3://bucket/run.*127\.0\.0\.1:9.*check AWS_ENDPOINT_URL"):
        operation("s3://bucket/run")


@pytest.mark.parametrize("uri", ["s3://Not_A_Bucket!/run", "s3://bucket/run\udcff"])
def test_names_that_no_bucket_or_key_can_have(server, uri):
    for operation in (write, fetch):
        with pytest.raises(UserError, match=r"no bucket can have the name|correct the location"):
            operation(uri)


def listing(token: str) -> bytes:
    return (
        f"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
        "<Contents><Key>run/votes/a</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        "</ListBucketResult>"
    ).encode()


@pytest.mark.parametrize("operation", LISTERS)
def test_listing_that_repeats_its_token_ends(server, operation):
    server.body = listing("again")
    with pytest.raises(UserError, match=r"not one of an S3 server .*repeats itself.*check AWS_ENDPOINT_URL"):
        operation("s3://bucket/run")
    assert len(server.requests) <= remote._PAGE + 2


CLOUD_ANSWERS = {
    # name: status, headers, body, operations, the kind of the error, words of its message
    "no container": (
        404,
        {},
        error_xml("ContainerNotFound"),
        NOT_A_HEAD,
        UserError,
        "no (bucket|container) bucket; cre",
    ),
    "denied": (
        403,
        {},
        error_xml("AuthorizationFailure"),
        EVERY,
        UserError,
        r"access denied .*credentials and permiss",
    ),
    "unknown token": (401, {}, b"", EVERY, UserError, r"access denied \(401"),
    "bad request": (400, {}, error_xml("InvalidUri"), EVERY, UserError, r"rejected \(400.*(AZURE_STORAGE|GOOGLE_)"),
    "redirect": (301, {}, b"", EVERY, UserError, "not one of (Azure|Google).*check (AZURE_STORAGE|GOOGLE_)"),
    "conflict": (409, {}, error_xml("OperationAborted"), (write,), RunError, "another process kept writing"),
    "busy": (503, {}, error_xml("ServerBusy"), EVERY, RunError, r"failed 1 times \(503.*run the same command again"),
    "garbage instead of a listing": (200, {}, b"<<<not xml", LISTERS, UserError, "not one of (Azure|Google)"),
    "a web page instead of a listing": (200, {}, b"<html></html>", LISTERS, UserError, "not one of (Azure|Google)"),
    "an object without an ETag": (200, {}, b"abc", (ObjectFile,), UserError, "not one of (Azure|Google)"),
}


@pytest.mark.parametrize("scheme", ["gs", "az"])
@pytest.mark.parametrize(
    ("name", "operation"),
    [pytest.param(name, operation, id=f"{name}-{operation.__name__}")
     for name, case in CLOUD_ANSWERS.items() for operation in case[3]],
)  # fmt: skip
def test_every_answer_of_another_cloud_gives_one_line_without_secrets(server, monkeypatch, name, operation, scheme):
    monkeypatch.setattr(BucketStore, "_FIRST_PAUSE", 0.0)
    monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "planted-secret")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{server.url}/account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2021&sig=planted-secret")
    server.status, server.headers, server.body, _, kind, words = CLOUD_ANSWERS[name]
    with pytest.raises(kind, match=words) as error:
        operation(f"{scheme}://bucket/run")
    line = str(error.value)
    assert line.startswith(f"{scheme}://bucket/run")
    assert "\n" not in line
    assert "planted-secret" not in line


@pytest.mark.parametrize("operation", [write, fetch, list_objects, ObjectFile])
@pytest.mark.parametrize(
    ("scheme", "settings", "words"),
    [
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": ""}, "AZURE_STORAGE_ACCOUNT_NAME"),
        ("az", {"AZURE_STORAGE_ENDPOINT": "nonsense"}, "the endpoint nonsense is not a URL; correct"),
        ("gs", {"GOOGLE_BASE_URL": "http://[::1"}, "correct the location or the settings"),
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/key.json"}, "/nowhere/key.json.*; correct"),
        ("gs", {"GOOGLE_BASE_URL": "http://127.0.0.1:9", "GOOGLE_BEARER_TOKEN": "t"}, "cannot connect to 127.0.0.1:9"),
    ],
)
def test_invalid_settings_of_another_cloud_are_named(server, monkeypatch, operation, scheme, settings, words):
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises((UserError, RunError), match=words) as error:
        operation(f"{scheme}://bucket/run")
    assert "\n" not in str(error.value)


HTTP_ANSWERS = {
    "invalid length": (200, {"Content-Length": "abc"}, b"", RunError, "invalid Content-Length 'abc'"),
    "negative length": (200, {"Content-Length": "-5"}, b"", RunError, "invalid Content-Length '-5'"),
    "two lengths": (200, {"Content-Length": "1, 2"}, b"", RunError, "Content-Length|failed 2 times"),
    "unrequested part": (206, {"Content-Range": "bytes 0-2/9"}, b"abc", RunError, "a part of the file .206."),
    "invalid redirect": (
        302,
        {"Location": "http://[::1"},
        b"",
        UserError,
        "redirected to an invalid one|not a valid URI",
    ),
    "redirect to a file": (302, {"Location": "file:///etc/passwd"}, b"", UserError, "not a valid URI"),
    "redirect to itself": (302, {"Location": "/run"}, b"", UserError, "redirected in a circle"),
    "redirect without a target": (301, {}, b"", UserError, "answered 301 .* instead of the file"),
    "bad request": (400, {}, b"", UserError, "answered 400 "),
    "denied": (403, {}, b"", UserError, r"access denied \(403"),
    "absent": (404, {}, b"", UserError, r"there is no such file \(404"),
    "gone": (410, {}, b"", UserError, r"there is no such file \(410"),
    "conflict": (409, {}, b"", RunError, "failed 2 times in a row, the last time with: the server answered 409"),
    "range": (416, {}, b"", RunError, "the file has changed"),
    "too many requests": (429, {}, b"", RunError, "the server answered 429"),
    "unavailable": (503, {}, b"", RunError, "the server answered 503"),
    "bad compression": (200, {"Content-Encoding": "gzip"}, b"not gzip", RunError, "failed 2 times in a row"),
}


@pytest.mark.parametrize("name", HTTP_ANSWERS)
def test_every_answer_of_an_http_server_gives_one_line_without_secrets(server, name):
    server.status, server.headers, server.body, kind, words = HTTP_ANSWERS[name]
    with pytest.raises(kind, match=words) as error:
        fetch(f"{server.url.replace('//', '//user:secret@')}/run?signature=secret")
    line = str(error.value)
    assert line.startswith(f"{server.url}/run?...: ")
    assert "\n" not in line
    assert "secret" not in line


@pytest.mark.parametrize("uri", ["http://[::1", "https://", "http://" + 70 * "a" + ".invalid/x", "http://a:port/x"])
def test_invalid_uris_are_the_users_mistake(uri):
    with pytest.raises(UserError):
        fetch(uri)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_slow_server_is_given_up(server, monkeypatch, scheme):
    """A byte now and then keeps the connection's own timeout from expiring."""
    monkeypatch.setattr(fetching, "READ_SECONDS", 0.2)
    server.body, server.seconds = bytes(1000), 0.05
    with pytest.raises(
        RunError,
        match=r"failed 2 times in a row, the last time with: the connection is too slow: nothing arrived in 0 s",
    ):
        fetch("s3://bucket/run" if scheme == "s3" else f"{server.url}/run")


def test_slow_server_does_not_hold_a_call_of_the_client(server, monkeypatch):
    monkeypatch.setattr(remote, "CALL_SECONDS", 0.3)
    server.body, server.seconds = bytes(1000), 0.05
    with pytest.raises(RunError, match="connection is too slow: no complete answer in 0 s; run the same command again"):
        read("s3://bucket/run")


def test_silent_server_is_given_up(server, monkeypatch):
    """The client's own timeouts end a call to a server that accepts a connection and sends nothing."""
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    server.body, server.seconds = b"abc", 1.0
    server.headers = {"Content-Length": "3"}
    with pytest.raises(RunError, match="s3://bucket/run"):
        read("s3://bucket/run")


def test_object_larger_than_its_limit_is_not_read(server):
    server.body, server.headers = bytes(1000), {"ETag": '"a"'}
    with pytest.raises(RunError, match=r"s3://bucket/run/run\.json: 1,000 bytes, but at most 999 are expected"):
        open_store("s3://bucket/run").read("run.json", limit=999)
    assert open_store("s3://bucket/run").read("run.json", limit=1000) == bytes(1000)


def test_paced_items_arrive_in_order_and_the_generator_is_closed_in_its_thread():
    closed = threading.Event()

    def numbers():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = paced(numbers(), 5.0)
    assert list(itertools.islice(items, 100)) == list(range(100))
    assert not closed.is_set()
    items.close()
    assert closed.wait(5)


def test_paced_passes_errors_on_and_gives_late_items_up():
    def failing():
        yield 1
        raise RunError("the disk is full")

    items = paced(failing(), 5.0)
    assert next(items) == 1
    with pytest.raises(RunError, match="the disk is full"):
        next(items)

    release = threading.Event()

    def late():
        yield 1
        release.wait(10)
        yield 2

    items = paced(late(), 5.0, 0.05)
    assert next(items) == 1
    with pytest.raises(Broken, match="too slow"):
        next(items)
    release.set()
