"""Locations: one URI string for a local path, `s3://bucket/key` or `gs://bucket/key`.

Reading goes through `pyarrow.fs`. Writing is atomic: a published object is whole or absent. On a local disk that is a temporary name, fsync
and rename; on S3 a single PUT or a completed multipart upload through boto3, because pyarrow's S3 stream completes its upload when it is
closed after an error, which would publish half an object.

Credentials, region and endpoint are boto3's usual ones (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL`, instance roles).
"""

import errno
import mimetypes
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from cluster.errors import MissingError, StorageError

ATTEMPTS = 8
"""Of a request to an object store that answers 500 or 503, cuts the connection or falls silent; pauses between them grow to 20 s."""
TIMEOUT = "TOPHAT_S3_TIMEOUT"
"""Environment variable: seconds of silence in mid-request after which an object store is asked again."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One object under a folder: `path` relative to it, `size` in bytes, `etag` that changes when its content does."""

    path: str
    size: int
    etag: str


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended, separated by single slashes."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts if part)])


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
    scheme, path = _split(uri)
    environment = () if scheme == "file" else tuple(sorted(_endpoint_environment().items()))
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


def _split(uri: str) -> tuple[str, str]:
    if not is_remote(uri):
        return "file", absolute(uri)
    scheme, _, path = uri.partition("://")
    if scheme not in ("s3", "gs"):
        raise StorageError("uri", uri, "has a scheme that is not supported", "use a local path, s3:// or gs://")
    if not path.strip("/"):
        raise StorageError("uri", uri, "names no bucket", f"write {scheme}://BUCKET/KEY")
    return scheme, path.strip("/")


def _endpoint_environment() -> dict[str, str]:
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


def _s3(path: str) -> tuple[Any, str, str]:
    bucket, _, key = path.partition("/")
    return _s3_client(tuple(sorted(_endpoint_environment().items()))), bucket, key


@contextmanager
def _reported(uri: str) -> Iterator[None]:
    """Turns what a store answers into one line for the user."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError:
        raise StorageError(
            "uri",
            uri,
            "needs credentials and none were found",
            "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ) from None
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        raise _refusal(uri, code) from None
    except BotoCoreError as error:
        raise StorageError(
            "uri", uri, f"could not be reached ({error})", "check AWS_ENDPOINT_URL and the network"
        ) from None
    except FileNotFoundError:
        raise MissingError("uri", uri, "does not exist", "check the path") from None
    except PermissionError as error:
        raise StorageError(
            "uri", uri, f"is not permitted ({error.strerror})", "check the permissions of the path"
        ) from None
    except UnicodeDecodeError as error:
        raise StorageError("uri", uri, f"holds a name that is not UTF-8 ({error.object!r})", "rename it") from None
    except (OSError, pa.ArrowException) as error:
        known = next(
            (name for name in ("ACCESS_DENIED", "NoSuchBucket", "InvalidAccessKeyId") if name in str(error)), None
        )
        raise _refusal(uri, known or f"{error}") from None


def _refusal(uri: str, code: str) -> StorageError:
    if code in ("NoSuchBucket",):
        return StorageError("uri", uri, "is in a bucket that does not exist", "create the bucket, or correct its name")
    if code in ("NoSuchKey", "404"):
        return MissingError("uri", uri, "does not exist", "check the path")
    denied = (
        "403",
        "401",
        "AccessDenied",
        "ACCESS_DENIED",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
    )
    if code in denied:
        return StorageError(
            "uri", uri, f"was refused by the store ({code})", "check the credentials and their permissions"
        )
    return StorageError("uri", uri, f"could not be used ({code})", "check the path, the endpoint and the store")


def is_outage(error: OSError) -> bool:
    """Whether an error of pyarrow's speaks of the store or the way to it, rather than of the content of a file."""
    return any(name in str(error) for name in ("AWS Error", "google::cloud", "curlCode"))


def exists(uri: str) -> bool:
    """Whether an object (or, on a local disk, a file or folder) is at `uri`."""
    scheme, path = _split(uri)
    with _reported(uri):
        if scheme == "s3":
            from botocore.exceptions import ClientError

            client, bucket, key = _s3(path)
            try:
                client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
            return True
        fs, inside = filesystem(uri)
        return bool(fs.get_file_info(inside).type != pafs.FileType.NotFound)


def etag(uri: str, file: pa.NativeFile | None = None) -> str:
    """The etag that a listing would have for the object at `uri` now.

    Args:
        uri: of an object.
        file: it, opened, which spares an object store a request: then the etag is of what was opened.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: as pyarrow raises it; see `is_outage`.
    """
    fs, path = filesystem(uri)
    if uri.startswith("s3://"):
        if file is None:
            with fs.open_input_file(path) as opened:
                return etag(uri, opened)
        return str(file.metadata()["ETag"], "utf-8").strip('"')
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return f"{info.size}-{info.mtime_ns}"


def open_input(uri: str) -> pa.NativeFile:
    """A readable, seekable file; use it in a `with` block."""
    fs, path = filesystem(uri)
    with _reported(uri):
        return fs.open_input_file(path)


def read_bytes(uri: str) -> bytes:
    """The whole object at `uri`."""
    with _reported(uri), open_input(uri) as file:
        return bytes(file.read())


def publish(uri: str, data: bytes | Path) -> None:
    """Writes `data` (or the content of a local file) to `uri`: whole or not at all; parents are made.

    Raises:
        StorageError: the store refuses.
    """
    scheme, path = _split(uri)
    with _reported(uri):
        if scheme == "s3":
            client, bucket, key = _s3(path)
            kind = mimetypes.guess_type(key)[0] or "application/octet-stream"  # so that a browser shows a report
            if isinstance(data, Path):
                client.upload_file(str(data), bucket, key, ExtraArgs={"ContentType": kind})
            else:
                client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=kind)
        elif scheme == "file":
            _publish_local(Path(path), data)
        else:
            fs, inside = filesystem(uri)
            content = data.read_bytes() if isinstance(data, Path) else data
            with fs.open_output_stream(inside) as stream:  # one write of the whole content: nothing can fail in between
                stream.write(content)


def create(uri: str, data: bytes) -> bool:
    """Publishes `data` at `uri` where nothing is yet; False, and nothing changes, where something is.

    Of those who create the same object at the same moment, exactly one gets True, if the store honors conditions; see `conditional`.

    Raises:
        StorageError: the store refuses.
    """
    if exists(uri):  # all there is to go by in a store that does not honor conditions
        return False
    created = _create(uri, data)
    if created is None:
        publish(uri, data)
    return created is not False


def conditional(uri: str) -> bool:
    """Whether `create` is exact in the store of the folder `uri`: found out by writing a hidden object twice.

    Raises:
        StorageError: the store refuses.
    """
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        return _create(probe, b"1") is True and _create(probe, b"2") is False
    finally:
        delete_file(probe)


def _create(uri: str, data: bytes) -> bool | None:
    """`create`, by the store's own condition alone; None, and nothing is written, where it has none."""
    scheme, path = _split(uri)
    with _reported(uri):
        if scheme == "s3":
            return _create_s3(path, data)
        if scheme == "file":
            return _create_local(Path(path), data)
        return None  # pyarrow has no conditional write


def _create_s3(path: str, data: bytes) -> bool | None:
    from botocore.exceptions import ClientError

    client, bucket, key = _s3(path)
    writer = uuid.uuid4().hex
    try:
        client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"writer": writer})
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NotImplemented":
            return None
        if code == "PreconditionFailed":  # perhaps by our own first attempt, whose answer was lost on the way
            return writer in client.head_object(Bucket=bucket, Key=key)["Metadata"].values()
        if code == "ConditionalRequestConflict":  # another one writes it at this moment
            return False
        raise
    return True


def _create_local(target: Path, data: bytes) -> bool | None:
    with _temporary(target, data) as temporary:
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # a mounted file system without hard links
                return None
            raise
    return True


def _publish_local(target: Path, data: bytes | Path) -> None:
    with _temporary(target, data) as temporary:
        temporary.replace(target)


@contextmanager
def _temporary(target: Path, data: bytes | Path) -> Iterator[Path]:
    """A file beside `target` with the content, on the disk for good; its parents are made. It is removed at the end, if it is still there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def list_files(uri: str, suffix: str = "") -> list[FileEntry]:
    """Every object under `uri` whose path ends in `suffix`, recursively, sorted by the bytes of the path.

    Hidden files (a name that starts with a dot, temporary names among them) are left out. A folder that does not exist is empty.
    """
    scheme, path = _split(uri)
    with _reported(uri):
        found = _list_s3(path) if scheme == "s3" else _list_arrow(uri)
        return sorted(
            (f for f in found if f.path.endswith(suffix) and not any(p.startswith(".") for p in f.path.split("/"))),
            key=lambda f: f.path.encode(),
        )


def _list_s3(path: str) -> Iterator[FileEntry]:
    client, bucket, key = _s3(path)
    prefix = f"{key}/" if key else ""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            relative = item["Key"][len(prefix) :]
            if relative and not relative.endswith("/"):
                yield FileEntry(relative, item["Size"], item["ETag"].strip('"'))


def _list_arrow(uri: str) -> Iterator[FileEntry]:
    fs, path = filesystem(uri)
    for info in fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)):
        if info.type == pafs.FileType.File:
            yield FileEntry(info.path[len(path) :].lstrip("/"), info.size, f"{info.size}-{info.mtime_ns}")


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in a local folder, hidden ones left out; an object store has none but those of its objects."""
    if is_remote(uri):
        return []
    with _reported(uri), os.scandir(absolute(uri)) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def delete_file(uri: str) -> None:
    """Removes the object at `uri`; nothing there is no error."""
    scheme, path = _split(uri)
    with _reported(uri):
        if scheme == "s3":
            client, bucket, key = _s3(path)
            client.delete_object(Bucket=bucket, Key=key)
        else:
            fs, inside = filesystem(uri)
            if fs.get_file_info(inside).type == pafs.FileType.File:
                fs.delete_file(inside)


def delete_tree(uri: str) -> None:
    """Removes everything under `uri`, and `uri` itself; nothing there is no error."""
    scheme, path = _split(uri)
    with _reported(uri):
        if scheme == "s3":
            client, bucket, key = _s3(path)
            keys = [item.path for item in _list_s3(path)]
            for start in range(0, len(keys), 1000):
                batch = [{"Key": f"{key}/{name}" if key else name} for name in keys[start : start + 1000]]
                answer = client.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
                if failed := answer.get("Errors"):
                    raise _refusal(uri, str(failed[0].get("Code", "unknown")))
        else:
            fs, inside = filesystem(uri)
            if fs.get_file_info(inside).type == pafs.FileType.Directory:
                fs.delete_dir(inside)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local file with the content of `uri`: the file itself on a local disk, else a temporary copy."""
    scheme, path = _split(uri)
    if scheme == "file":
        if not Path(path).is_file():
            raise StorageError("uri", uri, "does not exist", "check the path")
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="tophat-") as folder:
        target = Path(folder, path.rpartition("/")[2])
        with _reported(uri), open_input(uri) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
        yield target


def check_writable(field: str, uri: str) -> None:
    """Proves that objects can be written under `uri`, before hours of work depend on it.

    Raises:
        StorageError: naming `field`, when they cannot.
    """
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        publish(probe, b"")
        delete_file(probe)
    except StorageError as error:
        raise StorageError(field, uri, error.rule, error.fix) from None
