"""Object stores and HTTPS: clients, time limits, and the one place where their errors are translated.

Everything that can be tried again is `Broken`; the caller decides how often. All other errors are final and become a
UserError or a RunError of one line.
"""

import io
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import obstore
import obstore.exceptions
import requests
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import AzureStore, GCSStore, S3Store

from diffsmooth.pipeline.errors import RunError, UserError, one_line
from diffsmooth.pipeline.locations import shown, split_object
from diffsmooth.pipeline.storage.folder import Absent

if TYPE_CHECKING:
    from obstore import ObjectMeta

T = TypeVar("T")
A = TypeVar("A")

CALL_SECONDS = 900.0  # for one call of a store's client
CONNECT_SECONDS, READ_SECONDS = 10, 60  # to connect, and between two reads from a connection

_TRIES = 5
_FIRST_PAUSE = 0.5  # seconds, doubled at each try
_CLIENT_TRIES = 8
_PAGE = 100  # entries of a listing that are handed over at a time
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_client_lock = threading.Lock()  # boto3's default session is not safe to share between threads

Client = S3Store | GCSStore | AzureStore


class _Cloud(NamedTuple):
    """How messages name the settings of a kind of store."""

    store: str
    bucket: str
    settings: str  # environment variables that say where the store is
    credentials: str  # what to do if there are none


_CLOUDS = {
    "s3": _Cloud(
        "an S3 server",
        "bucket",
        "AWS_ENDPOINT_URL, AWS_DEFAULT_REGION",
        "set AWS_PROFILE, or give the node an instance profile",
    ),
    "gs": _Cloud(
        "Google Cloud Storage",
        "bucket",
        "GOOGLE_BASE_URL",
        "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
    ),
    "az": _Cloud(
        "Azure Blob Storage",
        "container",
        "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT",
        "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or give the node a managed identity",
    ),
}


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


def connect(uri: str) -> Client:
    """A client of the bucket or container of an s3://, gs:// or az:// URI.

    Raises: UserError for settings that no client can be made from, and for missing credentials of AWS.
    """
    scheme, bucket, _ = split_object(uri)
    tries: Any = {
        "max_retries": _CLIENT_TRIES - 1,  # of throttling, server errors and lost connections
        "backoff": {
            "init_backoff": timedelta(seconds=_FIRST_PAUSE / 2),
            "max_backoff": timedelta(seconds=15),
            "base": 2,
        },
    }
    with store_errors(uri):
        if scheme == "s3":
            return _s3_client(uri, bucket, tries)
        endpoint = os.environ.get("GOOGLE_BASE_URL") if scheme == "gs" else os.environ.get("AZURE_STORAGE_ENDPOINT")
        kind = GCSStore if scheme == "gs" else AzureStore
        return kind(bucket, client_options=_client_options(endpoint), retry_config=tries)


def _s3_client(uri: str, bucket: str, tries: Any) -> S3Store:
    """A client with the endpoint, the region and the credentials that boto3 finds."""
    try:
        with _client_lock:
            settings = boto3.client("s3").meta
            credentials = boto3.DEFAULT_SESSION.get_credentials()
            if credentials is None:
                raise botocore.exceptions.NoCredentialsError
            region = _bucket_region(settings.endpoint_url, bucket)
            if region not in (None, settings.region_name):
                settings = boto3.client("s3", region_name=region).meta
            # the client renews credentials five minutes before they expire, boto3 ten
            provider = Boto3CredentialProvider(boto3.DEFAULT_SESSION, ttl=timedelta(minutes=10))
            provider()
        express = bucket.endswith("--x-s3")
        place = {"s3_express": True} if express else {"endpoint": settings.endpoint_url}
        region = "us-east-1" if settings.region_name in (None, "aws-global") else settings.region_name
        options = _client_options(settings.endpoint_url)
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise UserError(f"{shown(uri)}: no complete AWS credentials found; {_CLOUDS['s3'].credentials}") from error
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, ValueError) as error:
        raise UserError(f"{shown(uri)}: {one_line(error)}; correct the location or the AWS settings") from error
    return S3Store(
        bucket, **place, region=region, credential_provider=provider, client_options=options, retry_config=tries
    )


def _bucket_region(endpoint: str, bucket: str) -> str | None:
    """The region that AWS states for a bucket, without credentials; None for other stores, or if it does not say."""
    if not (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return None
    with suppress(requests.RequestException):
        answer = requests.head(f"{endpoint}/{bucket}", timeout=CONNECT_SECONDS, allow_redirects=False)
        return answer.headers.get("x-amz-bucket-region")
    return None


def _client_options(endpoint: str | None) -> Any:
    """Time limits, and the certificates of AWS_CA_BUNDLE. Only an http:// endpoint may be used without encryption.

    Raises: ValueError for an endpoint that is not a URL.
    """
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=CALL_SECONDS),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=READ_SECONDS),
    }
    if endpoint:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the endpoint {shown(endpoint)} is not a URL")
        options["allow_http"] = parts.scheme == "http"
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["root_certificate"] = Path(bundle).read_bytes()
    return options


def call_store(uri: str, call: Callable[[], T]) -> T:
    """The result of a call of a store's client, its errors translated.

    Signals are handled by the main thread, between two of its own instructions. It therefore waits for another thread.

    Raises: Broken (Changed, Conflict), Absent, UserError, RunError.
    """
    with store_errors(uri):
        if threading.current_thread() is not threading.main_thread():
            return call()
        return next(paced((one() for one in (call,)), 2 * CALL_SECONDS))


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
                raise Broken(f"the connection is too slow: nothing arrived in {seconds:.0f} s") from None
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
        raise Absent(f"{place}: there is no such file ({answer})")
    if status in (401, 403):
        raise Refused(f"{place}: access denied ({answer}); check the location, and your credentials and permissions")
    if status == 409:
        raise Conflict(f"the server answered {answer}")
    if status in (412, 416):
        raise Changed("the file has changed since the download began")
    if status == 429 or status >= 500:
        raise Broken(f"the server answered {answer}")
    raise UserError(f"{place}: the server answered {answer} instead of the file")


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
        raise UserError(f"{place}: redirected in a circle") from None
    except requests.RequestException as error:
        reason = _root(error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{place}: the server's certificate is not trusted ({one_line(reason.verify_message)}); correct the "
                "location, or set REQUESTS_CA_BUNDLE"
            ) from None
        if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
            raise UserError(f"{place}: unknown host; check its name and the network") from None
        if isinstance(error, ValueError) and not isinstance(error, requests.exceptions.InvalidHeader):
            raise UserError(f"{place}: not a valid URI ({type(error).__name__})") from None
        raise Broken(getattr(reason, "strerror", None) or type(reason).__name__) from None
    except ValueError:  # of a redirection's target, which requests does not check
        raise UserError(f"{place}: not a valid URI, or redirected to an invalid one") from None


def _root(error: BaseException) -> BaseException:
    """The first cause of an error that several libraries have wrapped."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Translate the errors of a store's client. Raises: Broken (Changed, Conflict), Absent, UserError, RunError.

    The client's own text is never shown as a whole: it may repeat a URL with its signature.
    """
    try:
        yield
    except (UserError, RunError, Broken):
        raise
    except obstore.exceptions.AlreadyExistsError as error:
        raise Conflict("another write of it is in progress") from error
    except obstore.exceptions.PreconditionError as error:
        raise Changed("the file has changed since the download began") from error
    except (obstore.exceptions.BaseError, FileNotFoundError) as error:
        raise _meaning(uri, error) from error
    except ValueError as error:  # a name that no object can have, or an invalid setting
        raise UserError(f"{shown(uri)}: {one_line(error)}; correct the location or the settings") from error


def _meaning(uri: str, error: Exception) -> Exception:
    """What an error of the client means: by the status and the code of the store's answer, if there is one."""
    text, place, cloud = str(error), shown(uri), _CLOUDS[split_object(uri)[0]]
    if "performing token request" in text:
        return UserError(f"{place}: no credentials for {cloud.store} found; {cloud.credentials}")
    if "redirect without LOCATION" in text:
        return _wrong_place(uri, "redirected")
    if status := re.search(r"status code: (\d{3})", text):
        code, message = (re.search(rf"<{tag}>\s*([^<]*)", text) for tag in ("Code", "Message"))
        detail = ": ".join(one_line(found[1], 100) for found in (code, message) if found)
        return _answer_meaning(uri, int(status[1]), code[1].strip() if code else "", detail)
    if "kind: Timeout" in text or "TimedOut" in text:
        return Broken(f"the connection is too slow: no complete answer in {CALL_SECONDS:.0f} s")
    if "kind: Connect" in text:
        host = re.search(r"performing \w+ \w+://([^\s/]*)", text)
        reason = re.search(r'(?:message|error): "([^"]*)"', text)
        return RunError(
            f"{place}: cannot connect to {host[1] if host else cloud.store} "
            f"({reason[1] if reason else 'the certificate may not be trusted'}); check {cloud.settings} and the network"
        )
    if "non-partial response" in text or "Content-Range header not present" in text:
        return Broken("the server sends only complete files", restart=True)
    if "HTTP error" in text:
        return Broken(f"the connection failed; check {cloud.settings}")
    first = one_line(text.partition("\n")[0].partition(" error: ")[2] or text.partition("\n")[0])
    if any(words in text for words in ("missing from response", "invalid list response", "nvalid content ")):
        return not_a_store(uri, first)
    return UserError(f"{place}: {first}; correct the location, or {cloud.settings}")


def _answer_meaning(uri: str, status: int, code: str, detail: str) -> Exception:
    place, cloud, answer = shown(uri), _CLOUDS[split_object(uri)[0]], f"{status} {detail}".strip()
    if code in _NO_BUCKET:
        return UserError(
            f"{place}: there is no {cloud.bucket} {split_object(uri)[1]}; create it, or correct the location"
        )
    if 300 <= status < 400 or code == "IllegalLocationConstraintException":
        return _wrong_place(uri, answer)
    if code in _EXPIRED:
        return RunError(
            f"{place}: access denied ({answer}); renew the credentials or correct the clock, and run the same command "
            "again"
        )
    if code == "NotImplemented" or status == 501:
        return UserError(
            f"{place}: this store does not support the request ({answer}); use a store with conditional writes "
            "(If-None-Match)"
        )
    if status == 429 or status >= 500:  # the client has tried often enough
        return RunError(
            f"{place}: the server failed {_CLIENT_TRIES} times ({answer}); check {cloud.settings}, or run the same "
            "command again later"
        )
    if status == 400:
        return UserError(
            f"{place}: the request was rejected ({answer}); check the location, {cloud.settings} and the credentials"
        )
    try:
        check_status(uri, status, detail)
    except (UserError, Broken) as translated:
        return translated
    return not_a_store(uri, answer)


def not_a_store(uri: str, reason: object) -> UserError:
    """The error for an answer that no server of this kind gives."""
    cloud = _CLOUDS[split_object(uri)[0]]
    return UserError(
        f"{shown(uri)}: the answer is not one of {cloud.store} ({one_line(reason)}); check {cloud.settings}"
    )


def _wrong_place(uri: str, answer: str) -> UserError:
    if not uri.startswith("s3:"):
        return not_a_store(uri, answer)
    return UserError(
        f"{shown(uri)}: the bucket is in another region or at another endpoint ({answer}); set AWS_DEFAULT_REGION to "
        "the bucket's region, or correct AWS_ENDPOINT_URL"
    )


class ObjectFile(io.RawIOBase):
    """One version of an object in a store. Any position can be read without fetching the rest.

    Raises: as `fetch` does; RunError if the object changes while it is being read.
    """

    def __init__(self, uri: str) -> None:
        self._uri, self._key = uri, split_object(uri, "KEY")[2]
        self._client = connect(uri)
        self._position = 0
        head = self._retried(lambda: obstore.head(self._client, self._key))
        if head["e_tag"] is None:
            raise not_a_store(uri, "no ETag")
        self._size, self._etag = head["size"], head["e_tag"]

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
        span = (self._position, self._position + wanted)

        def read() -> obstore.Bytes:
            answer = obstore.get(self._client, self._key, options={"range": span, "if_match": self._etag})
            check_version(self._etag, answer.meta["e_tag"])
            content = answer.bytes()
            if len(content) != wanted:
                raise Broken(f"the server sent {len(content)} bytes instead of {wanted}", restart=True)
            return content

        buffer[:wanted] = memoryview(self._retried(read))
        self._position += wanted
        return wanted

    def _retried(self, call: Callable[[], T]) -> T:
        for attempt in range(_TRIES):
            try:
                return call_store(self._uri, call)
            except Broken as error:
                reason = error
                if error.restart:  # it is now another object
                    break
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise RunError(f"{shown(self._uri)}: cannot be read: {reason}; run the same command again")


def check_version(expected: str, found: str | None) -> None:
    """Raise Changed if a store that ignores If-Match has sent a part of another version of an object."""
    if found != expected:
        raise Changed("the file has changed since the download began")


def list_pages(uri: str, client: Client, prefix: str) -> "Iterator[Sequence[ObjectMeta]]":
    """The objects below a prefix, some at a time. Raises: UserError, RunError.

    Without these checks, a store that repeats a page would be listed for ever, and a server that answers every request
    with a web page would look like an empty store. Such a server claims to have an object with a random name.
    """
    found: set[str] = set()

    def pages() -> "Generator[Sequence[ObjectMeta]]":
        for page in obstore.list(client, prefix, chunk_size=_PAGE):
            before = len(found)
            found.update(entry["path"] for entry in page)
            if len(found) < before + len(page):
                raise not_a_store(uri, "its listing repeats itself")
            yield page
        if not found:
            with suppress(FileNotFoundError):
                obstore.head(client, f"{prefix}/{os.urandom(16).hex()}")
                raise not_a_store(uri, "no listing")

    try:
        with store_errors(uri):
            yield from paced(pages(), CALL_SECONDS)
    except Broken as error:
        raise RunError(f"{shown(uri)}: cannot be listed: {error}; run the same command again") from error


def list_objects(folder: str) -> list[str]:
    """The URIs of the objects directly below a prefix, sorted.

    Raises: UserError for a missing bucket or permission, RunError for a store that fails.
    """
    scheme, bucket, prefix = split_object(folder)
    prefix = prefix.rstrip("/")
    start = len(prefix) + 1 if prefix else 0
    keys = (entry["path"] for page in list_pages(folder, connect(folder), prefix) for entry in page)
    return sorted(f"{scheme}://{bucket}/{key}" for key in keys if "/" not in key[start:])
