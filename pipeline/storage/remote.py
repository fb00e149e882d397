"""Object stores and HTTPS: clients, and their errors translated in one place."""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

from pipeline.errors import RunError, UserError
from pipeline.locations import shown

_TRIES = 5
_FIRST_PAUSE = 0.5  # seconds, doubled at each try


class Absent(UserError):
    """The server answers and has no such file."""


class Refused(UserError):
    """The server does not let us read it; S3 says so of missing objects too, to those who may not list."""


class Broken(Exception):
    """The transfer failed and may be tried again; `restart` where what stands cannot be built upon."""

    def __init__(self, reason: str, *, restart: bool = False) -> None:
        super().__init__(reason)
        self.restart = restart


def s3_client() -> Any:
    """A client of S3, or of the store that AWS_ENDPOINT_URL names."""
    # standard mode retries throttling, server errors and lost connections, with jittered backoff
    retries = {"mode": "standard", "total_max_attempts": 8}
    return boto3.client("s3", config=botocore.config.Config(retries=retries, max_pool_connections=32))


def check_status(uri: str, status: int) -> None:
    if status in (404, 410):
        raise Absent(f"{shown(uri)}: there is no such file ({status}); correct the location")
    if status in (401, 403):
        raise Refused(f"{shown(uri)}: the server refuses to send it ({status}); check the link and your rights to it")
    if status in (412, 416):
        raise Broken("the file has changed since the download began", restart=True)
    if status == 429 or status >= 500:
        raise Broken(f"the server answers {status}")
    if status not in (200, 206):
        raise UserError(f"{shown(uri)}: the server answers {status} instead of a file; correct the location")


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise UserError(f"{uri}: write s3://BUCKET/KEY, both a bucket and a key")
    return bucket, key


@contextmanager
def named(uri: str) -> Iterator[None]:
    """Turn the S3 client's errors into ours."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchBucket":
            raise UserError(f"{uri}: there is no bucket {bucket_and_key(uri)[0]}; correct the location") from error
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
        if status == 429 or status >= 500:  # the client has tried often enough
            raise RunError(f"{uri}: the store answers {status}; run the same command again") from error
        check_status(uri, status)
        raise
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise UserError(
            f"{uri}: no complete AWS credentials found: set AWS_PROFILE, or give the node an instance profile"
        ) from error
    except (botocore.exceptions.EndpointConnectionError, botocore.exceptions.ConnectTimeoutError) as error:
        raise RunError(f"{uri}: {error}; check AWS_ENDPOINT_URL and the network") from error
    except botocore.exceptions.FlexibleChecksumError as error:
        raise Broken("the bytes that came do not have the object's checksum", restart=True) from error
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.IncompleteReadError) as error:
        raise Broken(f"{type(error).__name__}; is AWS_ENDPOINT_URL right?") from error
    except (botocore.exceptions.BotoCoreError, ValueError) as error:  # a bucket's name, a profile, an endpoint
        if isinstance(error, UserError):
            raise
        raise UserError(f"{uri}: {str(error).splitlines()[0]}; correct the location or the AWS settings") from error


class S3File(io.RawIOBase):
    """One version of an S3 object, read at any position without fetching the rest.

    Raises: as `fetch` does; RunError where the object changes while it is being read.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._bucket, self._key = bucket_and_key(uri)
        self._client = s3_client()
        self._position = 0
        head = self._retried(lambda: self._client.head_object(Bucket=self._bucket, Key=self._key))
        self._size, self._etag = int(head["ContentLength"]), head["ETag"]

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
        found = self._retried(
            lambda: self._client.get_object(Bucket=self._bucket, Key=self._key, Range=span, IfMatch=self._etag)[
                "Body"
            ].read()
        )
        buffer[:wanted] = found
        self._position += wanted
        return wanted

    def _retried(self, call: Callable[[], Any]) -> Any:
        for attempt in range(_TRIES):
            try:
                with named(self._uri):
                    return call()
            except Broken as error:
                reason = error
                if error.restart:  # another object now stands there
                    break
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise RunError(f"{self._uri}: cannot be read: {reason}; run the same command again")


def list_s3(folder: str) -> list[str]:
    """The s3:// URIs of the objects directly below a prefix, sorted.

    Raises: UserError for a missing bucket or rights.
    """
    bucket, _, prefix = folder.removeprefix("s3://").rstrip("/").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    with named(folder):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        return sorted(f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", ()))
