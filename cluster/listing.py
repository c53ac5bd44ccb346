"""What lies under a location: every object, and each one that cannot be an object of ours with the reason."""

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.fs as pafs

from cluster.filesystems import absolute, filesystem, reported, s3, split

MARKER = "markers of folders"
SLASH = "objects whose names end with a slash"
LINK = "links to nothing"
AGAIN = "links to folders that are listed by another name"
SPECIAL = "devices, sockets and pipes"
NAME = "names that are not UTF-8"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One object under a folder: `path` relative to it, `size` in bytes, `etag` that changes when its content does."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """What is under a folder and cannot be an object of ours: `path` relative to it, printable, why, as a plural noun, and its bytes."""

    path: str
    reason: str
    size: int = 0


def walk(uri: str) -> tuple[list[FileEntry], list[Skipped]]:
    """Everything under `uri`, recursively, each sorted by the bytes of the path. A folder that does not exist is empty.

    On a local disk, links to files and folders are followed. A folder is listed once, by its own name where it has one under `uri`: so links
    in a circle end, and those that lead to what is listed already are `Skipped`.

    Raises:
        StorageError: the store refuses.
    """
    scheme, path = split(uri)
    with reported(uri):
        listed = _s3(path) if scheme == "s3" else _local(absolute(uri)) if scheme == "file" else _arrow(uri)
        files: list[FileEntry] = []
        skipped: list[Skipped] = []
        for item in listed:
            if isinstance(item, FileEntry):
                files.append(item)
            else:
                skipped.append(item)
    return sorted(files, key=lambda f: f.path.encode()), sorted(skipped, key=lambda f: f.path.encode())


def is_hidden(path: str) -> bool:
    """Whether a part of a relative path starts with a dot."""
    return path.startswith(".") or "/." in path


def _s3(path: str) -> Iterator[FileEntry | Skipped]:
    client, bucket, key = s3(path)
    prefix = f"{key}/" if key else ""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            relative = item["Key"][len(prefix) :]
            if relative.endswith("/"):
                yield Skipped(relative, SLASH if item["Size"] else MARKER, item["Size"])
            elif relative:
                yield FileEntry(relative, item["Size"], item["ETag"].strip('"'))


def _arrow(uri: str) -> Iterator[FileEntry | Skipped]:
    fs, path = filesystem(uri)
    for info in fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)):
        if info.type == pafs.FileType.File:
            yield FileEntry(info.path[len(path) :].lstrip("/"), info.size, f"{info.size}-{info.mtime_ns}")


def _local(root: str) -> Iterator[FileEntry | Skipped]:
    seen: set[tuple[int, int]] = set()
    folders, links = deque([""]), deque[str]()
    while folders or links:
        is_link = not folders
        folder = links.popleft() if is_link else folders.popleft()
        try:
            found = os.stat(os.path.join(root, folder))
            if (found.st_dev, found.st_ino) in seen:
                if is_link:
                    yield Skipped(folder, AGAIN)
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(os.path.join(root, folder)) as content:
                entries = sorted(content, key=lambda entry: os.fsencode(entry.name))
        except FileNotFoundError:
            continue  # it has just been removed
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            printable = os.fsencode(path).decode("utf-8", "backslashreplace")
            try:
                info = entry.stat()
            except FileNotFoundError:
                if entry.is_symlink():
                    yield Skipped(printable, LINK)
                continue
            except PermissionError:
                raise
            except OSError:  # a link in a circle of links
                yield Skipped(printable, LINK)
                continue
            if printable != path:
                yield Skipped(printable, NAME)
            elif stat.S_ISDIR(info.st_mode):
                (links if entry.is_symlink() else folders).append(path)
            elif stat.S_ISREG(info.st_mode):
                yield FileEntry(path, info.st_size, f"{info.st_size}-{info.st_mtime_ns}")
            else:
                yield Skipped(printable, SPECIAL)
