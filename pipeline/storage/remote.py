"""Object stores and HTTPS: clients, time limits, and the one place where their errors are translated.

Everything that can be tried again is `Broken`; the caller decides how often. All other errors are final and become a
UserError or a RunError of one line.
"""

import io
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
import botocore.parsers
import requests

from pipeline.errors import RunError, UserError, one_line
from pipeline.locations import shown
from pipeline.storage.local import Absent

T = TypeVar("T")
A = TypeVar("A")

CALL_SECONDS = 900.0  # for one call of the S3 client with all its tries
CONNECT_SECONDS, READ_SECONDS = 10, 60  # to connect, and between two reads from a connection

_TRIES = 5
_FIRST_PAUSE = 0.5  # seconds, doubled at each try
_CLIENT_TRIES = 8
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_NO_CREDENTIALS = (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)
_UNREACHABLE = (
    botocore.exceptions.EndpointConnectionError,
    botocore.exceptions.ConnectTimeoutError,
    botocore.exceptions.ReadTimeoutError,
)
_client_lock = threading.Lock()  # boto3's default session is not safe to share between threads


class Refused(UserError):
    """The server denies access. S3 also says so of a missing object to a client that may not list the bucket."""


class Broken(Exception):
    """The transfer failed and may be tried again, from the start if `restart` is set."""

    def __init__(self, reason: str, *, restart: bool = False) -> None:
        super().__init__(reason)
        self.restart = restart


class Changed(Broken):
    """412 or 416: the object is not the one that the request's condition names."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, restart=True)


class Conflict(Broken):
    """409: another conditional write of the same object is in progress."""


def s3_client(uri: str) -> Any:
    """A client of S3, or of the store that AWS_ENDPOINT_URL names; `uri` is what an error message names.

    Raises: UserError for AWS settings that no client can be made from.
    """
    config = botocore.config.Config(
        # standard mode retries throttling, server errors and lost connections, with jittered backoff
        retries={"mode": "standard", "total_max_attempts": _CLIENT_TRIES},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=32,
    )
    with s3_errors(uri), _client_lock:
        client = boto3.client("s3", config=config)
    # botocore looks for the region of a redirected bucket by HeadBucket, again and again if that is redirected as well
    client.meta.events.register("before-call.s3.HeadBucket", _stop_redirection)
    return client


class _Redirected(Exception):
    pass


def _stop_redirection(**_: Any) -> None:
    raise _Redirected


def call_s3(uri: str, call: Callable[[], T]) -> T:
    """The result of a call of the S3 client, its errors translated, within CALL_SECONDS.

    Raises: Broken (Changed, Conflict), Absent, UserError, RunError.
    """
    with s3_errors(uri):
        return next(paced((one() for one in (call,)), CALL_SECONDS))


def paced(items: Generator[T], first: float, then: float | None = None) -> Generator[T]:
    """The items of a generator, which runs in a thread of its own so that a server that stalls cannot hold the caller.

    The first item must come within `first` seconds and each further one within `then`. The thread also closes the
    generator, because closing a connection waits for a read that is in progress.

    Raises: Broken for an item that is late, and what the generator raises.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(1)
    abandoned = threading.Event()

    def offer(entry: tuple[T] | BaseException | None) -> None:
        while not abandoned.is_set():
            with suppress(queue.Full):
                return ready.put(entry, timeout=0.2)

    def produce() -> None:
        try:
            for item in items:
                offer((item,))
                if abandoned.is_set():
                    return items.close()
            offer(None)
        except BaseException as error:
            offer(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        for seconds in chain([first], repeat(then or first)):
            try:
                entry = ready.get(timeout=seconds)
            except queue.Empty:
                raise Broken(f"the server sent too little in {seconds:.0f} s") from None
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        abandoned.set()


def in_parallel(function: Callable[[A], T], items: Iterable[A], threads: int) -> list[T]:
    """The results of a function for each item, in their order. After an error or Ctrl-C, no thread is waited for."""
    pool = ThreadPoolExecutor(max_workers=max(1, threads))
    try:
        results = list(pool.map(function, items))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return results


def check_status(uri: str, status: int, detail: str = "") -> None:
    """Raise what an HTTP status other than 200 and 206 means. Raises: Absent, Refused, UserError, Broken."""
    place, answer = shown(uri), f"{status} {detail}".strip()
    if status in (200, 206):
        return
    if status in (404, 410):
        raise Absent(f"{place}: there is no such file ({answer}); correct the location")
    if status in (401, 403):
        raise Refused(f"{place}: access denied ({answer}); check the location, and your credentials and permissions")
    if status == 409:
        raise Conflict(f"the server answered {answer}")
    if status in (412, 416):
        raise Changed("the file has changed since the download began")
    if status == 429 or status >= 500:
        raise Broken(f"the server answered {answer}")
    raise UserError(f"{place}: the server answered {answer} instead of the file; correct the location")


@contextmanager
def http_errors(uri: str) -> Iterator[None]:
    """Translate the errors of `requests`. Their own text is never shown: it repeats the URI with its secrets.

    Raises: UserError, Broken.
    """
    place = shown(uri)
    try:
        yield
    except (UserError, Broken):
        raise
    except requests.exceptions.TooManyRedirects:
        raise UserError(f"{place}: redirected in a circle; correct the location") from None
    except requests.RequestException as error:
        reason = _root(error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{place}: the server's certificate is not trusted ({one_line(reason.verify_message)}); correct the "
                "location, or set REQUESTS_CA_BUNDLE"
            ) from None
        if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
            raise UserError(f"{place}: unknown host; correct the location, or check the network") from None
        if isinstance(error, ValueError) and not isinstance(error, requests.exceptions.InvalidHeader):
            raise UserError(f"{place}: not a valid URI ({type(error).__name__}); correct it") from None
        raise Broken(getattr(reason, "strerror", None) or type(reason).__name__) from None
    except ValueError:  # of a redirection's target, which requests does not check
        raise UserError(f"{place}: not a valid URI, or redirected to an invalid one; correct it") from None


def _root(error: BaseException) -> BaseException:
    """The first cause of an error that several libraries have wrapped."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Translate the errors of the S3 client. Raises: Broken (Changed, Conflict), Absent, UserError, RunError."""
    try:
        yield
    except (UserError, RunError, Broken):
        raise
    except botocore.exceptions.ClientError as error:
        _raise_answer(uri, error)
    except _Redirected as error:
        raise _wrong_region(uri, "redirected") from error
    except _NO_CREDENTIALS as error:
        raise UserError(
            f"{shown(uri)}: no complete AWS credentials found; set AWS_PROFILE, or give the node an instance profile"
        ) from error
    except _UNREACHABLE as error:
        raise RunError(
            f"{shown(uri)}: {one_line(error)}; check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the network"
        ) from error
    except botocore.exceptions.FlexibleChecksumError as error:
        raise Broken("the received bytes do not match the object's checksum", restart=True) from error
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.IncompleteReadError) as error:
        if isinstance(getattr(error, "kwargs", {}).get("error"), ValueError):  # the target of a redirection
            raise not_s3(uri, error) from error
        raise Broken(f"the connection failed ({type(error).__name__}); check AWS_ENDPOINT_URL") from error
    except (botocore.parsers.ResponseParserError, botocore.exceptions.PaginationError, KeyError) as error:
        raise not_s3(uri, error) from error
    except (
        botocore.exceptions.BotoCoreError,
        ValueError,
    ) as error:  # a bucket's name, a profile, a region, an endpoint
        raise UserError(f"{shown(uri)}: {one_line(error)}; correct the location or the AWS settings") from error


def not_s3(uri: str, reason: object) -> UserError:
    """The error for an answer that no S3 server gives."""
    return UserError(
        f"{shown(uri)}: the answer is not one of an S3 server ({one_line(reason)}); check AWS_ENDPOINT_URL"
    )


def _raise_answer(uri: str, error: botocore.exceptions.ClientError) -> None:
    """Raise what an S3 server's error answer means."""
    place, found = shown(uri), error.response.get("Error", {})
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    code = str(found.get("Code", ""))
    detail = one_line("" if code == str(status) else f"{code}: {found.get('Message', '')}".strip(": "))
    answer = f"{status} {detail}".strip()
    if code == "NoSuchBucket":
        raise UserError(f"{place}: there is no bucket {bucket_of(uri)}; create it, or correct the location") from error
    if 300 <= status < 400:
        raise _wrong_region(uri, answer) from error
    if code in _EXPIRED:
        raise RunError(
            f"{place}: {error.operation_name} failed ({answer}); renew the credentials or correct the clock, and run "
            "the same command again"
        ) from error
    if code == "NotImplemented" or status == 501:
        raise UserError(
            f"{place}: this store does not support {error.operation_name} as it was called ({answer}); use a store "
            "with conditional writes (If-None-Match)"
        ) from error
    if status == 429 or status >= 500:  # the client has tried often enough
        raise RunError(
            f"{place}: {error.operation_name} failed {_CLIENT_TRIES} times ({answer}); check AWS_ENDPOINT_URL, or run "
            "the same command again later"
        ) from error
    if status == 400:
        raise UserError(
            f"{place}: {error.operation_name} was rejected ({answer}); check the location, AWS_DEFAULT_REGION, "
            "AWS_ENDPOINT_URL and the credentials"
        ) from error
    try:
        check_status(uri, status, detail)
    except (UserError, Broken) as translated:
        raise translated from error
    raise not_s3(uri, answer) from error


def _wrong_region(uri: str, answer: str) -> UserError:
    return UserError(
        f"{shown(uri)}: the bucket is in another region or at another endpoint ({answer}); set AWS_DEFAULT_REGION to "
        "the bucket's region, or correct AWS_ENDPOINT_URL"
    )


def bucket_of(uri: str) -> str:
    return uri.removeprefix("s3://").partition("/")[0]


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise UserError(f"{shown(uri)}: a bucket or a key is missing; write s3://BUCKET/KEY")
    return bucket, key


class S3File(io.RawIOBase):
    """One version of an S3 object. Any position can be read without fetching the rest.

    Raises: as `fetch` does; RunError if the object changes while it is being read.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._bucket, self._key = bucket_and_key(uri)
        self._client = s3_client(uri)
        self._position = 0
        head = self._retried(lambda: self._client.head_object(Bucket=self._bucket, Key=self._key))
        if "ETag" not in head:
            raise not_s3(uri, "no ETag")
        self._size, self._etag = int(head["ContentLength"]), str(head["ETag"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        span = f"bytes={self._position}-{self._position + wanted - 1}"

        def read() -> bytes:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key, Range=span, IfMatch=self._etag)
            if (length := answer["ContentLength"]) != wanted:
                answer["Body"].close()
                raise Broken(f"the server sent {length} bytes instead of {wanted}", restart=True)
            return bytes(answer["Body"].read())

        buffer[:wanted] = self._retried(read)
        self._position += wanted
        return wanted

    def _retried(self, call: Callable[[], T]) -> T:
        for attempt in range(_TRIES):
            try:
                return call_s3(self._uri, call)
            except Broken as error:
                reason = error
                if error.restart:  # it is now another object
                    break
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise RunError(f"{shown(self._uri)}: cannot be read: {reason}; run the same command again")


def list_pages(client: Any, uri: str, **request: str) -> Iterator[Sequence[dict[str, Any]]]:
    """The entries of a listing, a sequence of up to 1,000 for each page. Raises: as `call_s3` does.

    botocore refuses a page that repeats the token of the one before, which would go on for ever.
    """

    def pages() -> Generator[Sequence[dict[str, Any]]]:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket_of(uri), **request):
            if "IsTruncated" not in page:
                raise not_s3(uri, "no listing")
            yield page.get("Contents", ())

    with s3_errors(uri):
        yield from paced(pages(), CALL_SECONDS)


def list_s3(folder: str) -> list[str]:
    """The s3:// URIs of the objects directly below a prefix, sorted.

    Raises: UserError for a missing bucket or permission, RunError for a store that fails.
    """
    bucket, _, prefix = folder.removeprefix("s3://").rstrip("/").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    try:
        pages: Iterable[Sequence[dict[str, Any]]] = list_pages(s3_client(folder), folder, Prefix=prefix, Delimiter="/")
        return sorted(f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page)
    except Broken as error:
        raise RunError(f"{shown(folder)}: cannot be listed: {error}; run the same command again") from error
