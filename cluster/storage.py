"""Locations: one URI string for a local path, `s3://bucket/key` or `gs://bucket/key`.

Reading goes through `pyarrow.fs`. Writing is atomic: a published object is whole or absent. On a local disk that is a temporary name, fsync
and rename; on S3 a single PUT or a completed multipart upload through boto3, because pyarrow's S3 stream completes its upload when it is
closed after an error, which would publish half an object.
"""

import errno
import mimetypes
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from cluster.errors import StorageError
from cluster.filesystems import (
    ABSENT,
    TIMEOUT,
    S3Object,
    absolute,
    filesystem,
    is_remote,
    missing,
    ray_filesystem,
    refusal,
    reported,
    s3,
    split,
)
from cluster.listing import FileEntry, Skipped, is_hidden, walk

__all__ = [
    "TIMEOUT",
    "FileEntry",
    "Skipped",
    "absolute",
    "check_writable",
    "conditional",
    "create",
    "delete_file",
    "delete_tree",
    "etag",
    "exists",
    "filesystem",
    "inside",
    "is_hidden",
    "is_remote",
    "join",
    "list_files",
    "list_folders",
    "local_copy",
    "open_input",
    "open_object",
    "publish",
    "ray_filesystem",
    "read_bytes",
    "read_end",
    "walk",
]


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended, separated by single slashes."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts if part)])


def inside(uri: str, path: str) -> str:
    """The URI of what a listing of `uri` calls `path`: keys of an object store may have slashes in a row, or begin with one."""
    return f"{uri.rstrip('/')}/{path}"


def exists(uri: str) -> bool:
    """Whether an object (or, on a local disk, a file or folder) is at `uri`."""
    scheme, path = split(uri)
    with reported(uri):
        if scheme == "s3":
            from botocore.exceptions import ClientError

            client, bucket, key = s3(path)
            try:
                client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error.response["Error"]["Code"] in ABSENT:
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
        OSError: as pyarrow raises it; one without a number speaks of the store or the way to it.
    """
    fs, path = filesystem(uri)
    if uri.startswith("s3://"):
        if file is None:
            with open_object(uri) as opened:
                return etag(uri, opened)
        return S3Object(path).etag if "//" in path else str(file.metadata()["ETag"], "utf-8").strip('"')
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    return f"{info.size}-{info.mtime_ns}"


def open_object(uri: str) -> pa.NativeFile:
    """A readable, seekable file; use it in a `with` block.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: as pyarrow raises it; one without a number speaks of the store or the way to it.
    """
    fs, path = filesystem(uri)
    if uri.startswith("s3://") and "//" in path:
        return pa.PythonFile(S3Object(path), mode="r")
    return fs.open_input_file(path)


def open_input(uri: str) -> pa.NativeFile:
    """`open_object`, whose errors are one line for the user.

    Raises:
        MissingError: nothing is there.
        StorageError: the store refuses.
    """
    with reported(uri):
        return open_object(uri)


def read_bytes(uri: str) -> bytes:
    """The whole object at `uri`.

    Raises:
        MissingError: nothing is there.
        StorageError: the store refuses.
    """
    with reported(uri), open_input(uri) as file:
        return bytes(file.read())


def read_end(uri: str, size: int) -> bytes:
    """The last `size` bytes of the object at `uri`, or all where it has fewer.

    Raises:
        MissingError: nothing is there.
        StorageError: the store refuses.
    """
    with reported(uri), open_input(uri) as file:
        size = min(size, file.size())
        return bytes(file.read_at(size, file.size() - size))


def publish(uri: str, data: bytes | Path) -> None:
    """Writes `data` (or the content of a local file) to `uri`: whole or not at all; parents are made.

    Raises:
        StorageError: the store refuses.
    """
    scheme, path = split(uri)
    with reported(uri):
        if scheme == "s3":
            client, bucket, key = s3(path)
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
    scheme, path = split(uri)
    with reported(uri):
        if scheme == "s3":
            return _create_s3(path, data)
        if scheme == "file":
            return _create_local(Path(path), data)
        return None  # pyarrow has no conditional write


def _create_s3(path: str, data: bytes) -> bool | None:
    from botocore.exceptions import ClientError

    client, bucket, key = s3(path)
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
    return [file for file in walk(uri)[0] if file.path.endswith(suffix) and not is_hidden(file.path)]


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in a local folder, hidden ones left out; an object store has none but those of its objects."""
    if is_remote(uri):
        return []
    with reported(uri), os.scandir(absolute(uri)) as entries:
        return sorted(e.name for e in entries if os.path.isdir(e.path) and not e.name.startswith("."))


def delete_file(uri: str) -> None:
    """Removes the object at `uri`; nothing there is no error."""
    scheme, path = split(uri)
    with reported(uri):
        if scheme == "s3":
            client, bucket, key = s3(path)
            client.delete_object(Bucket=bucket, Key=key)
        else:
            fs, inside = filesystem(uri)
            if fs.get_file_info(inside).type == pafs.FileType.File:
                fs.delete_file(inside)


def delete_tree(uri: str) -> None:
    """Removes everything under `uri`, and `uri` itself; nothing there is no error."""
    scheme, path = split(uri)
    with reported(uri):
        if scheme == "s3":
            client, bucket, key = s3(path)
            keys = [item.path for listed in walk(uri) for item in listed]
            for start in range(0, len(keys), 1000):
                batch = [{"Key": f"{key}/{name}" if key else name} for name in keys[start : start + 1000]]
                answer = client.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
                if failed := answer.get("Errors"):
                    raise refusal(uri, str(failed[0].get("Code", "unknown")))
        else:
            fs, inside = filesystem(uri)
            if fs.get_file_info(inside).type == pafs.FileType.Directory:
                fs.delete_dir(inside)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local file with the content of `uri`: the file itself on a local disk, else a temporary copy."""
    scheme, path = split(uri)
    if scheme == "file":
        if not Path(path).is_file():
            raise missing(uri)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="tophat-") as folder:
        target = Path(folder, path.rpartition("/")[2])
        with reported(uri), open_input(uri) as source, target.open("wb") as file:
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
