"""What a look at images and at a machine has found: plain data, which decisions are made from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from models.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """An image of a source.

    Attributes:
        shard: its shard.
        index: its 0-based row there.
        shown: its file's name where it is one of its own, else shard and row.
        label: the name of its class; empty where it has none.
    """

    shard: str
    index: int
    shown: str
    label: str = ""


@dataclass(frozen=True)
class Look:
    """What a look at a source has found.

    Attributes:
        images: that the source holds, about; the unusable ones included.
        seen: those whose bytes were read.
        decoded: those of them that were decoded as well.
        unusable: of `decoded`, how many could not be, by reason.
        examples: some of these.
        per_class: usable images of each class, of `seen`.
        shorter: the median of the shorter sides, in pixels.
        elongation: the longer side over the shorter, which a quarter of the images exceed.
        gray: share of the images without colors.
        content: where the images of each content are, by a hash of their bytes.
        some: the bytes of some images that can be decoded.
    """

    images: int
    seen: int
    decoded: int
    unusable: Mapping[str, int]
    examples: tuple[Place, ...]
    per_class: Mapping[str, int]
    shorter: int
    elongation: float
    gray: float
    content: Mapping[bytes, tuple[Place, ...]] = field(repr=False)
    some: tuple[bytes, ...] = field(repr=False)

    @property
    def whole(self) -> bool:
        """Whether every image was read."""
        return self.seen >= self.images

    @property
    def labeled(self) -> int:
        """Usable images that have a label, of all."""
        return round(sum(self.per_class.values()) * self.images / max(1, self.seen))


@dataclass(frozen=True)
class Machine:
    """What computes: cores, GiB of memory, GPUs and the name of the first."""

    cores: int
    memory: float
    gpus: int = 0
    gpu: str = ""


@dataclass(frozen=True)
class Repeats:
    """Images whose bytes are those of another.

    Attributes:
        inside: images of D that are copies of an earlier one.
        contradicting: of these, pairs whose labels differ.
        test: images of the test set that D has, too, each with its copy in D.
        pool: images of U that D or the test set has, each with its copy there.
        pool_test: how many of these are copies of test images.
        pool_inside: images of U that are copies of an earlier one.
    """

    inside: int
    contradicting: tuple[tuple[Place, Place], ...]
    test: tuple[tuple[Place, Place], ...]
    pool: tuple[tuple[Place, Place], ...]
    pool_test: int
    pool_inside: int


def repeats(labeled: Look, test: Look | None, pool: Look) -> Repeats:
    """Which images are copies, of those that were read."""
    ours, tests = labeled.content, {} if test is None else test.content
    contradicting = [
        (places[0], other) for places in ours.values() for other in places[1:] if other.label != places[0].label
    ]
    in_test = [(one, ours[content][0]) for content, places in tests.items() if content in ours for one in places]
    both = {**ours, **tests}
    in_pool = [(one, both[content][0]) for content, places in pool.content.items() if content in both for one in places]
    return Repeats(
        inside=_copies(ours.values()),
        contradicting=tuple(contradicting),
        test=tuple(in_test),
        pool=tuple(sorted(in_pool, key=lambda pair: (pair[0].shard.encode(), pair[0].index))),
        pool_test=sum(len(places) for content, places in pool.content.items() if content in tests),
        pool_inside=_copies(pool.content.values()),
    )


def _copies(groups: Iterable[Sequence[Place]]) -> int:
    return sum(len(places) - 1 for places in groups)


@dataclass(frozen=True)
class Ready:
    """A model that exists.

    Attributes:
        uri: what names it: a model directory, or a SPEC.
        model: its network and input.
        parameters: how many numbers it has.
        library: of a SPEC, what stands before its colon; empty for a model directory.
        class_names: of its outputs; empty where it has none of its own.
        resizable: whether it takes inputs of other sizes, too.
    """

    uri: str
    model: ModelConfig
    parameters: int
    library: str = ""
    class_names: tuple[str, ...] = ()
    resizable: bool = True


@dataclass(frozen=True)
class Findings:
    """All that was found.

    Attributes:
        labeled: D.
        unlabeled: U.
        test: the test set, where one is given.
        machine: this one.
        copies: between and in them.
        teacher: the one that is given.
        student: the model that is given for its weights.
        inside: sets that lie inside U's folder, by option.
    """

    labeled: Look
    unlabeled: Look
    test: Look | None
    machine: Machine
    copies: Repeats
    teacher: Ready | None = None
    student: Ready | None = None
    inside: tuple[str, ...] = ()

    @property
    def given_teacher(self) -> Ready | None:
        """The model that the teacher is made of, where one is given: that of the student where it is the only one."""
        return self.teacher or self.student

    @property
    def classes(self) -> int:
        """Of D."""
        return len(self.labeled.per_class)


def fewest(per_class: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    """The classes with at most so many images, the fewest first."""
    return sorted(
        ((name, count) for name, count in per_class.items() if count <= most), key=lambda one: (one[1], one[0])
    )
