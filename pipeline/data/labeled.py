"""The labeled sets: listed, read once, every image checked, and kept as tables of labels.

D is small beside U, so it is read whole before anything depends on it: that finds undecodable images and classes without images at the
start of a run rather than hours into it, and gives training the exact number of usable images of every shard.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from cluster import storage
from cluster.errors import MissingError, SourceError, shown
from cluster.progress import Progress
from cluster.tasks import parallel_map
from models.config import Transform
from pipeline.data.loading import Integers, TrainingSet
from pipeline.data.reader import Reader
from pipeline.data.rejects import Reject, counted, publish_rejects
from pipeline.data.shards import Label, Row, Shard, ShardError, UnfitShardError
from pipeline.data.sources import ImageSource
from pipeline.data.tar import number_of

DIGEST_BYTES = 16
"""Of an image's bytes."""
REJECTED = -1
"""In a table of labels: an image that cannot be used."""
VALIDATION, TEST = 1, 2
"""Draws of what is held out."""
Labels = Sequence[Integers]
"""Labels of a source: per shard, int64 [rows], the output of each row's class, or `REJECTED`."""


@dataclass(frozen=True)
class Survey:
    """What a reading of a labeled source found.

    Attributes:
        source: that source.
        labels: per shard, the label of every row; None where the image is rejected.
        rejects: the images that cannot be used.
        digests: of the others' bytes, by which copies are known.
    """

    source: ImageSource
    labels: tuple[tuple[Label, ...], ...]
    rejects: tuple[Reject, ...]
    digests: tuple[bytes, ...] = ()

    @property
    def images(self) -> int:
        """Rows, rejected ones included."""
        return sum(len(labels) for labels in self.labels)


def survey(field: str, source: ImageSource, progress: Progress) -> Survey:
    """Reads every image of a labeled source, in one Ray task per shard.

    Args:
        field: the recipe's field or the option that names it, for messages.
        source: labeled.
        progress: counts images and rejects.

    Raises:
        SourceError: an image without a label, columns that hold none, or no image that can be used.
    """
    found: dict[int, tuple[tuple[Label, ...], list[Reject], list[bytes]]] = {}
    jobs = [(field, number, source.reader, shard) for number, shard in enumerate(source.shards())]
    for number, labels, rejects, digests in parallel_map(_survey_shard, jobs, num_cpus=1):
        found[number] = (labels, rejects, digests)
        progress.add(len(labels) - len(rejects), len(rejects))
    ordered = [found[number] for number in range(len(jobs))]
    made = Survey(
        source,
        tuple(labels for labels, _, _ in ordered),
        tuple(reject for _, rejects, _ in ordered for reject in rejects),
        tuple(digest for _, _, digests in ordered for digest in digests),
    )
    if made.images == len([one for one in made.rejects if one.index is not None]):
        reasons = Counter(one.reason for one in made.rejects)
        first = f", such as {made.rejects[0].error}" if made.rejects else ""
        rule = f"holds no image that can be used ({made.images:,} images; rejects: {counted(reasons)}{first})"
        raise SourceError(f"{field}.uri", source.reader.root, rule, "look at the files, and at the columns of Parquet")
    return made


def _survey_shard(job: tuple[str, int, Reader, Shard]) -> tuple[int, tuple[Label, ...], list[Reject], list[bytes]]:
    field, number, reader, shard = job
    labels: list[Label] = []
    rejects: list[Reject] = []
    digests: list[bytes] = []
    for row, reject in _checked(reader, shard):
        if reject is not None:
            rejects.append(reject)
        if row is not None:
            labels.append(None if reject is not None else row.label)
            if reject is None and row.label is None:
                where = shown(shard.files[row.index] if shard.files else shard.name)
                rule = f"has no label for {where}" if shard.files else f"has no label for image {row.index} of {where}"
                raise SourceError(f"{field}.uri", reader.root, rule, _LABELS_FIX[reader.layout])
            if reject is None:
                digests.append(blake2b(row.image, digest_size=DIGEST_BYTES).digest())
    return number, tuple(labels), rejects, digests


_LABELS_FIX = {
    "webdataset": "put a .cls file next to every image, with its name",
    "parquet": "set label_column to the column of labels",
    "folder": "put the images into one folder per class, or name a file of labels",
}


def _checked(reader: Reader, shard: Shard) -> Iterator[tuple[Row | None, Reject | None]]:
    try:
        for row in reader.read(shard):
            yield row, undecodable(shard, row)
    except UnfitShardError as error:  # the user's mistake, where of U it is one of many shards
        raise error.problem from None
    except ShardError as error:
        yield None, Reject(shard.name, None, error.reason, str(error))


def undecodable(shard: Shard, row: Row) -> Reject | None:
    """Why an image cannot be used; None where it can. A JPEG is decoded at an eighth of its size, which still reads all of its bytes."""
    from models.inputs.image import UndecodableImage, evaluation_image

    try:
        evaluation_image(row.image, Transform(size=8, resize=8))
    except UndecodableImage as error:
        return Reject(shard.name, row.index, error.reason, error.detail, row.file)
    return None


def class_names(train: Survey, given: Sequence[str] | None) -> tuple[str, ...]:
    """The classes, in the order of the network's outputs: as the recipe gives them, else as D names them, else D's labels sorted."""
    if given is not None:
        return tuple(given)
    if train.source.reader.class_names is not None:
        return train.source.reader.class_names
    labels = {label for shard in train.labels for label in shard if label is not None}
    numbers = [str(number) for number in sorted(label for label in labels if isinstance(label, int))]
    texts = sorted(label for label in labels if isinstance(label, str))
    if twice := sorted(set(numbers) & set(texts)):
        rule = f"has labels that are numbers, and the same as texts ({', '.join(twice[:5])})"
        raise SourceError("labeled.train.uri", train.source.reader.root, rule, "write all of them in one way")
    return (*numbers, *texts)


def class_ids(names: Sequence[str], reader: Reader) -> dict[Label, int]:
    """The output for each label of a source: by name, also where a number is the name; where no name is a number, and the source has no
    names of its own, a number is the place in `names`."""
    ids: dict[Label, int] = {name: number for number, name in enumerate(names)}
    if reader.class_names is None:
        numeric: dict[Label, int] = {
            label: number for number, name in enumerate(names) if (label := number_of(name)) is not None
        }
        ids |= numeric or {number: number for number in range(len(names))}
    return ids


def number_labels(field: str, found: Survey, names: Sequence[str], *, complete: bool) -> tuple[Integers, ...]:
    """The labels of a survey as outputs of the network.

    Args:
        field: the recipe's field, for messages.
        found: the survey.
        names: the classes.
        complete: whether every class must have an image.

    Returns:
        Per shard, int64 [rows], `REJECTED` where the image cannot be used.

    Raises:
        SourceError: a label that is no class, or a class without images.
    """
    ids = class_ids(names, found.source.reader)
    few = ", ".join(shown(name, 40) for name in names[:5]) + (", ..." if len(names) > 5 else "")
    numbered = []
    for shard, labels in zip(found.source.shards(), found.labels, strict=True):
        unknown = next((label for label in labels if label is not None and label not in ids), None)
        if unknown is not None:
            where = shard.files[labels.index(unknown)] if shard.files else shard.name
            raise SourceError(
                f"{field}.uri",
                found.source.reader.root,
                f"has the label {shown(unknown)} in {shown(where)}, which is none of the {len(names)} classes ({few})",
                "correct labeled.classes or the labels",
            )
        numbered.append(np.array([REJECTED if label is None else ids[label] for label in labels], np.int64))
    counts = count_labels(numbered, len(names))
    if complete and (empty := np.flatnonzero(counts == 0)).size:
        few = ", ".join(repr(names[i]) for i in empty[:5])
        raise SourceError(
            f"{field}.uri",
            found.source.reader.root,
            f"has no usable images of {len(empty)} of its {len(names)} classes ({few})",
            "add images of them, or leave them out of labeled.classes",
        )
    return tuple(numbered)


def count_labels(labels: Sequence[Integers], classes: int) -> Integers:
    """Images per class: int64 [classes], rejected ones left out."""
    used = np.concatenate([np.empty(0, np.int64), *labels])
    return np.bincount(used[used != REJECTED], minlength=classes)


def hold_out(
    labels: Sequence[Integers], fraction: float, seed: int, *, draw: int = VALIDATION
) -> tuple[tuple[Integers, ...], tuple[Integers, ...]]:
    """Splits labels into those to train on and those held out, class by class, by a draw that depends on the seed alone.

    Args:
        labels: per shard, int64 [rows].
        fraction: share of every class that is held out; at least one image, and at least one stays.
        seed: of the draw.
        draw: which of the draws from that seed; what one of them holds out says nothing about another.

    Returns:
        Two tuples like `labels`; in each, the other's images are `REJECTED`. A class with a single image keeps it for training.
    """
    flat = np.concatenate(labels)
    held = np.zeros(len(flat), bool)
    keys = np.random.default_rng([seed, draw]).random(len(flat))
    for number in np.unique(flat[flat != REJECTED]):
        members = np.flatnonzero(flat == number)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held[members[np.argsort(keys[members])[:count]]] = True
    cuts = np.cumsum([len(shard) for shard in labels])[:-1]
    return tuple(np.split(np.where(held, REJECTED, flat), cuts)), tuple(np.split(np.where(held, flat, REJECTED), cuts))


def times(labels: Sequence[Integers], classes: int) -> list[Integers]:
    """How often each image counts where all classes are to count alike: as often as makes its class as large as the largest.

    Returns:
        Per shard, int64 [rows]; where that is no whole number, the first images of a class count once more. 0 of what is rejected.
    """
    flat = np.concatenate(labels)
    often = np.zeros(len(flat), np.int64)
    counts = count_labels(labels, classes)
    for number in np.flatnonzero(counts):
        members = np.flatnonzero(flat == number)
        whole, more = divmod(int(counts.max()), len(members))
        often[members] = whole
        often[members[:more]] += 1
    return np.split(often, np.cumsum([len(shard) for shard in labels])[:-1])


def training_set(
    source: ImageSource, labels: Sequence[Integers], names: Sequence[str], *, balance: bool = False
) -> TrainingSet:
    """The usable images of a source; with `balance`, each as often as `times` says."""
    if balance:
        rows = [np.repeat(np.arange(len(shard)), shard) for shard in times(labels, len(names))]
    else:
        rows = [np.flatnonzero(shard != REJECTED) for shard in labels]
    used = [number for number, indices in enumerate(rows) if len(indices)]
    shards = source.shards()
    ids = class_ids(names, source.reader)
    return TrainingSet(source.reader, tuple(shards[n] for n in used), tuple(rows[n] for n in used), ids)


def save_labels(uri: str, source: ImageSource, labels: Labels, rejects: Sequence[Reject]) -> int:
    """Publishes a labeled set under `uri`: the listing, the labels of every row, the rejects. Returns how many images can be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source.save(storage.join(uri, "listing.parquet"))
    column = pa.array([shard.tolist() for shard in labels], pa.list_(pa.int32()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"shard": [s.name for s in source.shards()], "labels": column}), sink)
    storage.publish(storage.join(uri, "labels.parquet"), sink.getvalue().to_pybytes())
    publish_rejects(storage.join(uri, "rejects.parquet"), rejects)
    return int(sum((shard != REJECTED).sum() for shard in labels))


def save_digests(uri: str, digests: Sequence[bytes]) -> None:
    """Publishes the digests of a labeled set under `uri`."""
    storage.publish(storage.join(uri, "digests"), b"".join(digests))


def count_copies(uri: str, digests: Iterable[bytes]) -> int:
    """How many of the digests are those of an image in the labeled set under `uri`; 0 where it was made without them."""
    try:
        known = storage.read_bytes(storage.join(uri, "digests"))
    except MissingError:
        return 0
    every = {known[start : start + DIGEST_BYTES] for start in range(0, len(known), DIGEST_BYTES)}
    return sum(digest in every for digest in digests)


def load_labels(uri: str) -> tuple[ImageSource, tuple[Integers, ...]]:
    """Reads what `save_labels` wrote."""
    import pyarrow.parquet as pq

    source = ImageSource.load(storage.join(uri, "listing.parquet"))
    with storage.open_input(storage.join(uri, "labels.parquet")) as file:
        column = pq.read_table(file, columns=["labels"])["labels"].to_pylist()
    labels: list[npt.NDArray[np.int64]] = [np.array(shard, np.int64) for shard in column]
    return source, tuple(labels)
