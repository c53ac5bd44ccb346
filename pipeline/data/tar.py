"""Tars of images, as WebDataset writes them and as others do.

Files that follow each other in a tar, in one folder, with the same name up to the first dot, are one sample; a name that comes again begins
the next one. Its images, each a row:

- those named `KEY.png`, where there are any: all other files of the sample are parts of it (`KEY.cls`, `KEY.json`, `KEY.mask.png`);
- else those with more dots in their names (`clip.000001.png`, `clip.000002.png`, ... are images of their own);
- else the files without any suffix.

A label (`.cls`) or words (`.txt`, `.json`) belong to the image of the same name, with or without its suffix, else to all of the sample. A sample
without an image is a row too, and so are a hidden file, and a label that comes after images it was for were given: they are told
as rejects (`no_image`).
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline.data import kinds
from pipeline.data.shards import NO_IMAGE, Label, Row
from pipeline.data.words import MAX_SIDECAR_BYTES, sidecar_words

MAX_IMAGE_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_LABEL_BYTES = 2**20
MAX_XZ_MEMORY = 256 * 2**20
"""Bytes; `xz -9` needs 65 MiB."""
HELD, HELD_BYTES = 1024, 128 * 2**20
"""Images of one sample, and their bytes, that are held until it is known which of them are parts; where there are more, they are images of
their own."""
UNPACKED_BYTES = 2**36
"""Where a member of a packed tar must end."""
DAMAGE = (tarfile.TarError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError)
"""What is raised for a tar whose content is damaged; and an OSError without a number, by gzip and bz2."""
_LONG_HEADERS = (b"g", b"x", b"X", b"L", b"K")


class _Member(tarfile.TarInfo):
    """A tar header that is not let go by: tarfile takes a damaged or missing one for the end of the archive, reads whatever a header says is
    the next one's name, of any size, into memory, and goes on to wherever a member is said to end.

    Attributes:
        most: bytes of the archive.
    """

    most = UNPACKED_BYTES

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _LONG_HEADERS and member.size > MAX_HEADER_BYTES:
            raise tarfile.InvalidHeaderError(f"a header of {member.size} bytes")  # type: ignore[attr-defined]
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                tarfile_.is_ended = True  # type: ignore[attr-defined]
                raise
            if isinstance(error, tarfile.EmptyHeaderError) and getattr(tarfile_, "is_ended", False):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"no valid header at byte {tarfile_.offset} ({error})") from None
        tarfile_.is_ended = False  # type: ignore[attr-defined]
        if tarfile_.offset >= cls.most + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a member that ends at byte {tarfile_.offset} of {cls.most}")
        return member


class _Xz(io.RawIOBase):
    """What xz streams hold, one after the other, unpacked in limited memory, which `lzma.LZMAFile` does not offer."""

    def __init__(self, packed: Any) -> None:
        self._packed = packed
        self._stream: lzma.LZMADecompressor | None = None
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream is None or self._stream.eof:
                rest = self._stream.unused_data if self._stream else b""
                rest = (rest or self._packed.read(io.DEFAULT_BUFFER_SIZE)).lstrip(b"\0")  # padding between streams
                if not rest:
                    return 0
                self._stream, self._rest = lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY), rest
            if self._stream.needs_input and not self._rest:
                self._rest = self._packed.read(io.DEFAULT_BUFFER_SIZE)
                if not self._rest:
                    raise EOFError("the compressed file ends too early")
            content = self._stream.decompress(self._rest, len(buffer))
            self._rest = b""
            if content:
                buffer[: len(content)] = content
                return len(content)


@dataclass(slots=True)
class _Image:
    """An image of a sample.

    Attributes:
        rank: 0 where its name has one dot, 1 where it has more, 2 where it has no suffix.
        base: its name.
        stem: its name up to the suffix.
        data: its bytes; empty where nobody wants them.
        problem: why there are none.
        offset: the byte where its row begins.
    """

    rank: int
    base: str
    stem: str
    data: bytes
    problem: str | None
    offset: int


@dataclass(slots=True)
class _Sample:
    """What is known of a sample so far.

    Attributes:
        key: the folder, and the name up to the first dot.
        first: name of its first file.
        offset: the byte where it begins.
        tar: the name of the tar.
        names: of all its files.
        images: those that are no rows yet.
        size: of these images, in bytes.
        rank: the best rank of all its images.
        rows: how many images are rows already.
        labels: by the name of a file up to `.cls`.
        words: by the name of a file up to its suffix.
        matched: names of files up to their suffixes that were an image's.
        others: what else is told as a row.
    """

    key: tuple[str, str]
    first: str
    offset: int
    tar: str
    names: set[str] = field(default_factory=set)
    images: list[_Image] = field(default_factory=list)
    size: int = 0
    rank: int = 3
    rows: int = 0
    labels: dict[str, Label] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)

    def take(self, first: int, *, end: bool) -> Iterator[Row]:
        """The rows of the images so far, from the number `first` on; `end`: of all the sample."""
        index = first
        self.matched |= {name for image in self.images for name in (image.base, image.stem)}
        whole = {label for name, label in self.labels.items() if end and name not in self.matched | {self.key[1]}}
        label_of_all = self.labels.get(self.key[1], next(iter(whole)) if len(whole) == 1 else None)
        words_of_all = self.words.get(self.key[1], ())
        for image in self.images:
            if image.rank == self.rank:
                label = self.labels.get(image.base, self.labels.get(image.stem, label_of_all))
                words = self.words.get(image.base, self.words.get(image.stem, words_of_all))
                offset = image.offset if self.rows else self.offset
                file = self._named(f"{self.key[0]}/{image.base}".lstrip("/"))
                yield Row(index, image.data, label, image.problem, offset=offset, words=words, file=file)
                index += 1
                self.rows += 1
        if end and not self.rows and self.first:
            detail = f"a sample without an image: {self.first}"
            yield _no_image(index, detail, self.offset, self._named(self.first))
            index += 1
        for detail in self.others:
            yield _no_image(index, detail, self.offset)
            index += 1
        for image in self.images:
            if image.stem != self.key[1]:
                self.words.pop(image.stem, None)
        self.images, self.size, self.others = [], 0, []

    def _named(self, member: str) -> str:
        """The name of a file of the tar, as text: tars hold bytes."""
        return f"{self.tar}/{member.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')}"

    def add(
        self,
        archive: tarfile.TarFile,
        member: tarfile.TarInfo,
        labels: dict[str, Label],
        *,
        tags: bool,
        is_wanted: bool,
    ) -> None:
        """Takes in a file.

        Args:
            archive: at `member`.
            member: one of the files of this sample.
            labels: of the tar so far, by member: `tar` makes links of equal files.
            tags: whether words are wanted.
            is_wanted: whether the data of an image are.
        """
        base = member.name.rpartition("/")[2]
        self.names.add(base)
        if (rank := _rank(base)) is not None:
            data, problem = _image(archive, member) if is_wanted and rank <= self.rank else (b"", None)
            stem = (kinds.split_image(base) or (kinds.stem(base),))[0]
            self.images.append(_Image(rank, base, stem, data, problem, member.offset))
            self.size += member.size
            self.rank = min(self.rank, rank)
        elif (member.isfile() or member.islnk()) and base.lower().endswith((".cls", ".cls.txt")):
            # Labels are read whatever is wanted: the image that one belongs to may come later.
            stem = base[: base.lower().rindex(".cls")]
            if self.rows and (stem == self.key[1] or stem in self.matched):
                self.others.append(f"a label after the images that it is for: {member.name}")
            elif member.islnk():
                self.labels[stem] = labels.get(member.linkname)
            elif member.size < MAX_LABEL_BYTES:
                labels[member.name] = self.labels[stem] = label_of(_content(archive, member))
        elif tags and member.isfile() and base.lower().endswith((".txt", ".json")):
            stem, _, suffix = base.rpartition(".")
            words = sidecar_words(suffix.lower(), _content(archive, member, MAX_SIDECAR_BYTES))
            self.words[stem] = self.words.get(stem, ()) + words


def _no_image(index: int, detail: str, offset: int, file: str | None = None) -> Row:
    return Row(index, b"", None, detail, NO_IMAGE, offset=offset, file=file)


def read_tar(name: str, size: int, packed: Any, wanted: frozenset[int] | None, tags: bool) -> Iterator[Row]:
    """The rows of a tar, in order.

    Args:
        name: of the tar, whose suffix says how it is packed.
        size: of the file, in bytes.
        packed: the file, opened.
        wanted: indices of the rows that are yielded; None for all.
        tags: whether `Row.words` is filled.

    Raises:
        DAMAGE, OSError: the tar is damaged, or breaks off; rows that came before are good.
    """
    content = _unpacked(name, packed)

    class Member(_Member):
        most = size if content is packed else UNPACKED_BYTES

    with tarfile.open(fileobj=content, mode="r|", tarinfo=Member, ignore_zeros=True) as archive:
        index = 0
        labels: dict[str, Label] = {}
        sample: _Sample | None = None
        unlabeled = False  # samples here have no labels

        def rows(end: bool) -> Iterator[Row]:
            nonlocal index, unlabeled
            for row in sample.take(index, end=end) if sample is not None else ():
                index = row.index + 1
                if wanted is None or row.index in wanted:
                    unlabeled = unlabeled or (row.label is None and row.reason != NO_IMAGE)
                    yield row

        try:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                if member.isdir():
                    continue
                if _is_hidden(folder, base):
                    sample = sample or _Sample(("", ""), "", member.offset, name)
                    sample.others.append(f"a hidden file: {member.name}")
                    if len(sample.others) >= HELD:
                        yield from rows(end=False)
                    continue
                key = folder, base.partition(".")[0]
                if sample is None or sample.key != key or not sample.first or base in sample.names:
                    yield from rows(end=True)
                    sample = _Sample(key, member.name, member.offset, name)
                if _rank(base) is not None and (len(sample.images) >= HELD or sample.size >= HELD_BYTES):
                    yield from rows(end=False)
                is_wanted = wanted is None or not wanted.isdisjoint(range(index, index + len(sample.images) + 1))
                sample.add(archive, member, labels, tags=tags, is_wanted=is_wanted)
        except (*DAMAGE, OSError):
            # Nothing of this sample is lost; what a compressed file gives just before damage may be damaged too.
            is_ended = getattr(archive, "is_ended", False)
            if sample is not None and content is packed and (is_ended or _is_whole(sample, unlabeled)):
                yield from rows(end=True)
            raise
        yield from rows(end=True)


def _unpacked(name: str, packed: Any) -> Any:
    lower = name.lower()
    if lower.endswith(".tar"):
        return packed
    if lower.endswith(("bz2", "tbz")):
        return bz2.BZ2File(packed)
    return io.BufferedReader(_Xz(packed)) if lower.endswith("xz") else gzip.GzipFile(fileobj=packed)


def _is_hidden(folder: str, base: str) -> bool:
    return (
        base.startswith(".") or not base or any(p.startswith(".") and p not in (".", "..") for p in folder.split("/"))
    )


def _rank(base: str) -> int | None:
    """Of an image, by its name (see `_Image`); None for another file."""
    if (found := kinds.split_image(base)) is not None:
        return int("." in found[0])
    return 2 if kinds.is_bare(base) else None


def _is_whole(sample: _Sample, unlabeled: bool) -> bool:
    """Whether all is known of a sample after which the tar is damaged."""
    if not sample.images or sample.images[-1].problem is not None or not sample.images[-1].data:
        return False
    return (sample.rank == 0 or len(sample.images) > 1) and (unlabeled or bool(sample.labels))


def _image(archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[bytes, str | None]:
    if not member.isfile():
        return b"", "a link" if member.islnk() or member.issym() else "a device or a pipe"
    if member.size > MAX_IMAGE_BYTES:
        return b"", f"a file of {member.size} bytes"
    return _content(archive, member), None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, size: int = -1) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read(size)


def label_of(content: bytes) -> Label:
    """The label in a `.cls` file: a number, where it is one in the usual form; a text, without the end of its line; None where it is empty."""
    text = content.decode("utf-8-sig", "backslashreplace").rstrip("\r\n")
    number = number_of(text.strip())
    return number if number is not None else text if text.strip() else None


def number_of(text: str) -> int | None:
    """The number that a text is, in the usual form; None of other texts, such as `007`."""
    return int(text) if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text, re.ASCII) else None
