"""What is behind `cluster.storage`: pyarrow's file systems, S3's client, and what their refusals mean.

Credentials, region and endpoint are boto3's usual ones (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL`, instance roles).
"""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs as pafs

from cluster.errors import MissingError, StorageError

ATTEMPTS = 8
"""Of a request to an object store that answers 500 or 503, cuts the connection or falls silent; pauses between them grow to 20 s."""
TIMEOUT = "TOPHAT_S3_TIMEOUT"
"""Environment variable: seconds of silence in mid-request after which an object store is asked again."""

ABSENT: Final = ("NoSuchKey", "NotFound", "404")
DENIED: Final = ("403", "401", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
"""S3's codes of errors, or the status where an answer has no content."""


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store rather than a local path."""
    return "://" in uri


def absolute(uri: str) -> str:
    """`uri` so that it means the same in every process of this machine."""
    return uri if is_remote(uri) else os.path.abspath(os.path.expanduser(uri))


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path of it inside.

    Raises:
        StorageError: the scheme is not supported or the URI has no bucket.
    """
    scheme, path = split(uri)
    environment = () if scheme == "file" else tuple(sorted(endpoint_environment().items()))
    return _filesystem(scheme, environment), path


def ray_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """`filesystem(uri)` for what Ray Train and Tune store: in an object store, it makes no folders.

    pyarrow marks a folder with an empty object named `folder/`, which some S3-compatible stores refuse and none needs.
    """
    base, path = filesystem(uri)
    return (base if isinstance(base, pafs.LocalFileSystem) else pafs.PyFileSystem(_WithoutFolders(base))), path


class _WithoutFolders(pafs.FileSystemHandler):  # type: ignore[misc]
    """Passes everything on to an object store's filesystem but the making of folders."""

    def __init__(self, base: pafs.FileSystem) -> None:
        self._base = base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _WithoutFolders) and bool(self._base == other._base)

    def __hash__(self) -> int:
        return hash(type(self))

    def __reduce__(self) -> tuple[type["_WithoutFolders"], tuple[pafs.FileSystem]]:
        return type(self), (self._base,)

    def get_type_name(self) -> str:
        return f"{self._base.type_name}+no-folders"

    def normalize_path(self, path: str) -> str:
        return str(self._base.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        return self._base.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        return self._base.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        for info in self._base.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)):
            if info.type == pafs.FileType.File:
                self._base.delete_file(info.path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a bucket is never emptied")

    def delete_file(self, path: str) -> None:
        self._base.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._base.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._base.copy_file(src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self._base.open_input_stream(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._base.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return self._base.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return self._base.open_append_stream(path, metadata=metadata)


def split(uri: str) -> tuple[str, str]:
    """The scheme of `uri` (`file` for a local path), and the rest of it."""
    if not is_remote(uri):
        return "file", absolute(uri)
    scheme, _, path = uri.partition("://")
    if scheme not in ("s3", "gs"):
        raise StorageError("uri", uri, "has a scheme that is not supported", "use a local path, s3:// or gs://")
    if not path.strip("/"):
        raise StorageError("uri", uri, "names no bucket", f"write {scheme}://BUCKET/KEY")
    return scheme, path.strip("/")


def endpoint_environment() -> dict[str, str]:
    names = (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        TIMEOUT,
    )
    return {name: os.environ[name] for name in names if name in os.environ}


@lru_cache(maxsize=8)
def _filesystem(scheme: str, environment: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme == "gs":
        return pafs.GcsFileSystem()
    names = dict(environment)
    endpoint = names.get("AWS_ENDPOINT_URL_S3") or names.get("AWS_ENDPOINT_URL")
    region = names.get("AWS_REGION") or names.get("AWS_DEFAULT_REGION")
    if region is None and endpoint:
        region = "us-east-1"  # spares pyarrow a look-up that only AWS answers
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        request_timeout=_timeout(names),
        connect_timeout=10,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _timeout(environment: dict[str, str]) -> float:
    text = environment.get(TIMEOUT, "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise StorageError(TIMEOUT, text, "must be from 1 to 3600 seconds", "correct it, or unset it for 60")
    return seconds


@lru_cache(maxsize=8)
def _s3_client(environment: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    names = dict(environment)
    region = names.get("AWS_REGION") or names.get("AWS_DEFAULT_REGION")
    endpoint = names.get("AWS_ENDPOINT_URL_S3") or names.get("AWS_ENDPOINT_URL")
    return boto3.Session().client(  # boto3.client() would keep the credentials that it found first
        "s3",
        region_name=region or ("us-east-1" if endpoint else None),
        config=Config(
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=10,
            read_timeout=_timeout(names),
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def s3(path: str) -> tuple[Any, str, str]:
    """boto3's client, and the bucket and key of `BUCKET/KEY`."""
    bucket, _, key = path.partition("/")
    return _s3_client(tuple(sorted(endpoint_environment().items()))), bucket, key


class RangedFile(io.RawIOBase):
    """A readable, seekable file whose content is had in ranges.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._at = 0

    def read_at(self, size: int, offset: int) -> bytes:
        """The bytes from `offset` on, `size` of them, which are there."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        wanted = left if size < 0 else min(size, left)
        content = self.read_at(wanted, self._at) if wanted else b""
        self._at += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class S3Object(RangedFile):
    """An object whose key pyarrow's paths cannot express, as it has slashes in a row: read through boto3's client.

    Args:
        path: `BUCKET/KEY`.

    Attributes:
        etag: as a listing has it.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the store refuses, or is out of reach.
    """

    def __init__(self, path: str) -> None:
        self._client, self._bucket, self._key = s3(path)
        found = self._ask(self._client.head_object)
        super().__init__(found["ContentLength"])
        self.etag: str = found["ETag"].strip('"')

    def read_at(self, size: int, offset: int) -> bytes:
        def request(**key: str) -> bytes:
            content: bytes = self._client.get_object(Range=f"bytes={offset}-{offset + size - 1}", **key)["Body"].read()
            return content

        return bytes(self._ask(request))

    def _ask(self, request: Callable[..., Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return request(Bucket=self._bucket, Key=self._key)
        except ClientError as error:
            if _code(error) in ABSENT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._key) from None
            raise OSError(str(error)) from None
        except BotoCoreError as error:
            raise OSError(str(error)) from None


@contextmanager
def reported(uri: str) -> Iterator[None]:
    """Turns what a store answers into one line for the user."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise _answered(uri, error) from None
    except UnicodeDecodeError as error:
        raise StorageError("uri", uri, f"holds a name that is not UTF-8 ({error.object!r})", "rename it") from None
    except PermissionError as error:
        raise StorageError(
            "uri", uri, f"is not permitted ({error.strerror})", "check the permissions of the path"
        ) from None
    except (OSError, pa.ArrowException) as error:
        if uri.startswith("s3://"):
            _ask_s3(uri)
        if isinstance(error, FileNotFoundError):
            raise missing(uri) from None
        raise refusal(uri, str(error)) from None


def _ask_s3(uri: str) -> None:
    """Raises what is the matter with the object `uri`, of which pyarrow has said it in words alone; nothing, if it is well by now."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, bucket, key = s3(split(uri)[1])
    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if _code(error) == "404":
            raise refusal(uri, "NoSuchBucket") from None
        # Reading objects may be permitted where looking at the bucket is not.
    except BotoCoreError as error:
        raise _answered(uri, error) from None
    try:
        client.head_object(Bucket=bucket, Key=key)
    except (ClientError, BotoCoreError) as error:
        raise _answered(uri, error) from None


def _answered(uri: str, error: Exception) -> StorageError:
    """What an error of boto3's means."""
    from botocore.exceptions import ClientError, NoCredentialsError

    if isinstance(error, ClientError):
        return refusal(uri, _code(error))
    if isinstance(error, NoCredentialsError):
        fix = "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError("uri", uri, "needs credentials and none were found", fix)
    return StorageError("uri", uri, f"could not be reached ({error})", "check AWS_ENDPOINT_URL and the network")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def missing(uri: str) -> MissingError:
    """Nothing is at `uri`."""
    return MissingError("uri", uri, "does not exist", "check the path")


def refusal(uri: str, code: str) -> StorageError:
    """What S3's code of an error means for the user; any other text is shown as it is."""
    if code == "NoSuchBucket":
        return StorageError("uri", uri, "is in a bucket that does not exist", "create the bucket, or correct its name")
    if code in ABSENT:
        return missing(uri)
    if code in DENIED:
        return StorageError(
            "uri", uri, f"was refused by the store ({code})", "check the credentials and their permissions"
        )
    return StorageError("uri", uri, f"could not be used ({code})", "check the path, the endpoint and the store")
