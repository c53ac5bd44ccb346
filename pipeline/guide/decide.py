"""Which settings fit what was found. Each decision is a pure function, and says why; `decide` puts them together.

The numbers come from the shipped recipes (benchmarks/README.md says what they give) and from the paper, where there is no other source.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from unicodedata import normalize

from pipeline.guide.findings import Findings, Machine, Ready
from pipeline.selection.ladder import ladder

T = TypeVar("T")

SIZES = (28, 32, 64, 96, 128, 160, 224)
"""Sides of inputs that are chosen from, in pixels."""
CPU_SIZE = 64
"""The largest of them without a GPU: a training step at 128 pixels takes four times as long."""
ELONGATED = 1.5
"""Longer over shorter side from which a center crop loses a third of the image."""
HELD_OUT, HELD_OUT_PER_CLASS, MOST_HELD_OUT = 150, 10, 5_000
"""Images that validation wants, at least, and that it never needs more of."""
LARGEST_SHARE = 1 / 3
"""Of D, that validation may take; a test set takes at most a quarter."""
TESTED, TEST_SHARE = 400, 0.25
"""Images that a test set wants: the standard error of an accuracy is then at most 2.5 points."""
FEW_LABELS = 10
"""Labels of a class that are few."""
FEW_FOR_A_TEACHER = 100
"""Labels of a class from which a network that begins with random weights learns little."""
UNEQUAL = 3
"""The largest class over the smallest, that is much."""
POOL_SHARE = 0.2
"""Share of U's images, divided by the classes, that is taken for each: of those that show a class, the best; others show none."""
PAPER_K = 16_000
"""Section 4.1."""
CPU_WORKERS, CPU_THREADS = 2, 4
"""Of a training on CPUs, at most: the batches that more workers leave each are too small for its statistics."""
DIGITS = frozenset(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
STARTED_PARAMETERS = 10_000_000
"""Of a network that CPUs can train in minutes at 64 pixels."""
STARTED_LABELS = 5_000
"""Of which a network learns more when it begins with weights from other images, than it can from random ones."""
MINIBATCH = 24
"""Images of a step on CPUs, over all workers, near that of the shipped recipes: small, because small sets have few steps."""
GPU_BATCH = 64


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value, and why it is that."""

    value: T
    why: str


@dataclass(frozen=True)
class Network:
    """An architecture that has a name, and its options."""

    architecture: str
    options: Mapping[str, bool | int | float | str]

    @property
    def shown(self) -> str:
        """As people read it."""
        return self.architecture + "".join(f", {name} {value}" for name, value in self.options.items())


@dataclass(frozen=True)
class Kind:
    """How networks of a kind are trained.

    Attributes:
        rate: learning rate of pre-training and of the baseline, per 256 images; None for the usual one.
        swept: those that fine-tuning tries.
        drops: of the rate.
        scale: the smallest share of an image that a random crop keeps.
    """

    rate: float | None
    swept: tuple[float, float, float]
    drops: int
    scale: float


SMALL = Kind(2.0, (0.02, 0.1, 0.5), 2, 0.35)
"""The small ResNets from random weights, which learn at small minibatches and high rates."""
STARTED = Kind(0.05, (0.005, 0.02, 0.08), 2, 0.35)
"""Networks that begin with trained weights."""
LARGE = Kind(None, (0.001, 0.004, 0.016), 3, 0.08)
"""Others, as on ImageNet."""


@dataclass(frozen=True)
class Lengths:
    """Images seen by each training."""

    teacher: int
    pretrain: int
    fine_tune: int
    supervised: int

    def times(self, factor: float) -> "Lengths":
        """All of them shortened alike."""
        return Lengths(
            *(_round(factor * one) for one in (self.teacher, self.pretrain, self.fine_tune, self.supervised))
        )


@dataclass(frozen=True)
class Plan:
    """Everything that a recipe needs to say, with its reasons.

    Attributes:
        size: side of the input.
        fit: how an image becomes a square.
        flip: whether training mirrors images.
        teacher: a network to train, or None where one is given.
        student: the network.
        start: the model whose weights the student and the baseline begin with; None for random ones.
        head: of a teacher that is given; empty where there is none.
        lengths: of the trainings.
        rates: of the sweep.
        selected_classes: P of the selection.
        images_per_class: K, as far as it can be said before a run.
        tries: the values that the run tries for it; empty where it takes the one above.
        balance: whether trainings on D see as many images of each class.
        test_fraction: share of D for the test set; None where one is given.
        validation_fraction: share of the rest for validation.
        machine: that it is for.
        drop_copies: whether copies inside U are left out.
        notes: what was changed to be in time.
    """

    size: Choice[int]
    fit: Choice[str]
    flip: Choice[bool]
    teacher: Choice[Network | None]
    student: Choice[Network]
    start: Ready | None
    head: str
    lengths: Choice[Lengths]
    rates: Choice[tuple[float, ...]]
    selected_classes: Choice[int]
    images_per_class: Choice[int]
    tries: tuple[int, ...]
    balance: bool
    test_fraction: Choice[float] | None
    validation_fraction: Choice[float]
    machine: Machine
    drop_copies: bool
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """Of the student's network, and of the teacher's where one is trained."""
        return kind_of(self.size.value, self.start)

    @property
    def workers(self) -> int:
        """Processes that train together."""
        return self.machine.gpus or min(CPU_WORKERS, self.machine.cores)

    @property
    def threads(self) -> int:
        """Cores of each of them."""
        return 1 if self.machine.gpus else max(1, min(CPU_THREADS, self.machine.cores // self.workers))

    @property
    def batch(self) -> int:
        """Images of a step, on one worker."""
        return GPU_BATCH if self.machine.gpus else MINIBATCH // self.workers


def standard_error(images: int, accuracy: float = 0.5) -> float:
    """Of an accuracy that is measured on so many images, in points."""
    return 100 * math.sqrt(accuracy * (1 - accuracy) / max(1, images))


def kind_of(size: int, start: Ready | None) -> Kind:
    """The kind of network that learns at an input of so many pixels, from the weights of a model or from random ones."""
    if start is not None:
        return STARTED
    return SMALL if size <= CPU_SIZE else LARGE


def input_size(shorter: int, gpus: int, start: Ready | None = None) -> Choice[int]:
    """The side of the input, from the median of the images' shorter sides, or from the network that the student begins as."""
    most = SIZES[-1] if gpus else CPU_SIZE
    if start is not None:
        own = start.model.transform.size
        if not start.resizable:
            return Choice(own, "the student's network takes no other")
        if gpus or own <= most:
            return Choice(own, "that of the model that the student begins as")
        return Choice(most, f"smaller than the {own} pixels that the student's weights were made for, as CPUs are slow")
    fitting = [size for size in SIZES if size <= min(shorter, most)]
    if not fitting:
        return Choice(max(8, shorter), f"half of the images have a side below {SIZES[0]} pixels")
    if fitting[-1] == most and not gpus and shorter > most:
        return Choice(most, f"the images would allow more (their shorter sides have {shorter:,} pixels), CPUs do not")
    return Choice(fitting[-1], f"the shorter sides of the images have {shorter:,} pixels (median)")


def fit(elongation: float) -> Choice[str]:
    """How an image becomes a square."""
    if elongation > ELONGATED:
        return Choice(
            "pad", f"a quarter of the images are over {elongation:.1f} times as long as wide: a crop would cut them off"
        )
    return Choice("crop", "the images are nearly square")


def flip(names: Iterable[str]) -> Choice[bool]:
    """Whether training mirrors images, as far as the names of the classes tell."""
    every = list(names)
    signs = sum(len(name) == 1 or name.lower() in DIGITS for name in every)
    if 2 * signs > len(every):
        return Choice(False, "the classes have names of digits or letters, which must not be mirrored")
    return Choice(True, "false where mirrored images are wrong, as of digits and letters")


def share_for_test(per_class: Sequence[int]) -> Choice[float]:
    """Without a test set: the share of D that becomes one."""
    labeled, classes = sum(per_class), len(per_class)
    return _share(per_class, min(TEST_SHARE, max(TESTED, HELD_OUT_PER_CLASS * classes) / labeled))


def share_for_validation(per_class: Sequence[int]) -> Choice[float]:
    """The share of D, without its test set, that settings are chosen on."""
    labeled, classes = sum(per_class), len(per_class)
    wanted = min(MOST_HELD_OUT, max(HELD_OUT, HELD_OUT_PER_CLASS * classes, labeled // 10))
    return _share(per_class, min(LARGEST_SHARE, wanted / labeled))


def _share(per_class: Sequence[int], share: float) -> Choice[float]:
    share = max(0.0001, float(f"{share:.2g}"))
    count = sum(held_out(per_class, share))
    return Choice(
        share, f"{count:,} images: the standard error of an accuracy is up to {standard_error(count):.1f} points"
    )


def held_out(per_class: Sequence[int], share: float) -> list[int]:
    """Images of each class that `pipeline.data.labeled.hold_out` takes: at least one, and not the last one."""
    return [min(max(1, round(share * count)), count - 1) for count in per_class]


def rates(images: int, kind: Kind) -> Choice[tuple[float, ...]]:
    """The learning rates that fine-tuning tries, per 256 images: as many as the validation set can tell apart."""
    every = kind.swept
    error = f"the standard error on {images:,} validation images is {standard_error(images):.0f} points"
    if images < 25:
        return Choice(every[1:2], f"{error}: too much to choose on")
    if images < 75:
        return Choice((every[0], every[2]), f"{error}: only what differs much can be told apart")
    return Choice(every, error)


def networks(size: int, classes: int, labeled: int, gpus: int) -> tuple[Choice[Network], Choice[Network]]:
    """The teacher's and the student's."""
    if not gpus:
        width = 16 if classes <= 50 else 32
        why = f"small ResNets learn {size} pixels on CPUs in minutes"
        why += "" if classes <= 50 else f"; wide ones, as there are {classes:,} classes"
        return (
            Choice(Network("resnet14", {"width": width}), why),
            Choice(
                Network("resnet8", {"width": width // 2}),
                "a half as wide and deep as the teacher; take the one that you need",
            ),
        )
    if size <= CPU_SIZE:
        why = f"the input has {size} pixels"
        return Choice(Network("resnet56", {"width": 32}), why), Choice(Network("resnet20", {"width": 16}), why)
    if labeled < 20_000:
        why = f"{labeled:,} labels are few for a larger one"
        return Choice(Network("resnet50", {}), why), Choice(Network("resnet18", {}), "smaller than the teacher")
    why = f"{labeled:,} labels, and a GPU"
    return Choice(Network("resnext101_32x4d", {}), why), Choice(Network("resnet50", {}), "the paper's student")


def head_of(teacher: Ready, names: Mapping[str, int]) -> Choice[str]:
    """What of a teacher that exists answers for the classes of D."""
    known = [normalize("NFC", name) for name in teacher.class_names]
    if all(known.count(normalize("NFC", name)) == 1 for name in names):
        return Choice("native", "it knows every class of D by name")
    middle = sorted(names.values())[len(names) // 2]
    if teacher.library == "open_clip" and middle < FEW_LABELS:
        return Choice("zero-shot", f"it reads class names, and half of the classes have {middle:,} labels or fewer")
    return Choice("linear", "a new last layer for the classes of D is fitted on its features")


def starting(found: Findings, trained_on: int, head: str) -> Ready | None:
    """The model whose weights the student begins with: the one that is given for it, or the network that is the teacher, at a smaller input,
    where labels are few and it is small enough."""
    if found.student is not None:
        return found.student
    teacher = found.teacher
    if teacher is None or not teacher.library or head != "linear":
        return None
    if min(found.labeled.shorter, found.unlabeled.shorter) < CPU_SIZE:
        return None  # weights that were made for larger images say little about such small ones
    slow = not found.machine.gpus and (teacher.parameters > STARTED_PARAMETERS or not teacher.resizable)
    return None if slow or trained_on > STARTED_LABELS else teacher


def selected_classes(classes: int) -> Choice[int]:
    """P of the selection: as a share of the classes, about the paper's 10 of 1000."""
    if classes <= 20:
        return Choice(1, f"with {classes} classes, an image's second-best one is mostly a wrong one")
    value = min(10, max(2, round(classes / 50)))
    return Choice(value, f"{classes:,} classes, of which some are hard to tell apart")


def images_per_class(pool: int, classes: int, labels: int) -> Choice[int]:
    """K, from the images of U, the classes, and the labels of a usual class."""
    value = max(1, min(PAPER_K, pool // classes, max(labels, round(POOL_SHARE * pool / classes))))
    if pool < classes:
        return Choice(1, f"U has fewer images ({pool:,}) than there are classes")
    return Choice(value, f"a fifth of U, over {classes:,} classes; with more, images that show none of them come in")


def few_labels(per_class: Mapping[str, int]) -> bool:
    """Whether a usual class of D has so few labels that a network learns little from them alone."""
    return sorted(per_class.values())[len(per_class) // 2] < FEW_FOR_A_TEACHER


def unequal(per_class: Mapping[str, int]) -> bool:
    """Whether the classes of D differ so much that the small ones would be learned less."""
    return max(per_class.values()) > UNEQUAL * min(per_class.values())


def lengths(labeled: int, dhat: int, gpus: int, kind: Kind) -> Choice[Lengths]:
    """Images seen by each training, from those that D trains on and those of D-hat."""
    why = "the baseline sees as many images as the student does in both of its trainings"
    if kind is STARTED:
        pretrain, fine_tune = max(16_000, (10 if gpus else 2) * dhat), max(2_400, 15 * labeled)
        return Choice(Lengths(0, _round(pretrain), _round(fine_tune), _round(pretrain + fine_tune)), why)
    teacher = max(15_000, min(150 * labeled, 60_000), 30 * labeled)
    pretrain = max(60_000, (20 if gpus else 5) * dhat)
    epochs = 40 if kind is SMALL and labeled <= 1_000 else 30
    fine_tune = epochs * labeled
    if kind is LARGE:
        teacher, fine_tune = max(teacher, 90 * labeled), max(8_000, fine_tune)
    # The baseline sees as many images as the student does, so that what is compared is what they are.
    made = Lengths(_round(teacher), _round(pretrain), _round(fine_tune), _round(pretrain + fine_tune))
    return Choice(made, why)


def decide(found: Findings) -> Plan:
    """A plan for what was found, as long as it takes."""
    labeled, classes, gpus = found.labeled.labeled, found.classes, found.machine.gpus
    of_each = [
        max(1, round(count * labeled / sum(found.labeled.per_class.values())))
        for count in found.labeled.per_class.values()
    ]
    test = None if found.test is not None else share_for_test(of_each)
    if test is not None:
        of_each = [count - taken for count, taken in zip(of_each, held_out(of_each, test.value), strict=True)]
    validation = share_for_validation(of_each)
    chosen_on = sum(held_out(of_each, validation.value))
    trained_on = sum(of_each) - chosen_on
    given = found.given_teacher
    head = None if given is None else head_of(given, found.labeled.per_class)
    start = starting(found, trained_on, "" if head is None else head.value)
    size = input_size(min(found.labeled.shorter, found.unlabeled.shorter), gpus, start)
    kind = kind_of(size.value, start)
    network, student = networks(size.value, classes, trained_on, gpus)
    teacher = Choice[Network | None](network.value, network.why)
    if head is not None:
        teacher = Choice(None, head.why)
    if start is not None:
        why = f"begins with trained weights: from random ones, {trained_on:,} labels teach little"
        student = Choice(Network(start.model.architecture, start.model.options), why)
    middle = sorted(found.labeled.per_class.values())[classes // 2]
    pool = max(0, found.unlabeled.images - len(found.copies.pool))
    chosen = images_per_class(pool, classes, middle)
    long = lengths(trained_on, chosen.value * classes, gpus, kind)
    tries = ladder(trained_on, pool, classes, long.value.pretrain)
    return Plan(
        size=size,
        fit=fit(max(found.labeled.elongation, found.unlabeled.elongation)),
        flip=flip(found.labeled.per_class),
        teacher=teacher,
        student=student,
        start=start,
        head="" if head is None else head.value,
        lengths=long,
        rates=rates(chosen_on, kind),
        selected_classes=selected_classes(classes),
        images_per_class=chosen,
        tries=tries if len(tries) > 1 else (),
        balance=unequal(found.labeled.per_class),
        test_fraction=test,
        validation_fraction=validation,
        machine=found.machine,
        drop_copies=found.copies.pool_inside > found.unlabeled.seen / 100,
    )


def trainings_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """The sections of the trainings, as plain data."""
    kind = plan.kind
    usual: dict[str, Any] = {"batch_size": plan.batch, "workers": plan.workers, "drops": kind.drops}
    rate = {} if kind.rate is None else {"learning_rate": kind.rate}
    if plan.threads > 1:
        usual |= {"cpus_per_worker": plan.threads}
    if plan.machine.gpus:
        usual |= {"gpus_per_worker": 1, "precision": "bfloat16"}
    seen = plan.lengths.value
    return {
        "teacher": {"images_seen": seen.teacher, **rate, **usual, **({"weight_decay": 0.002} if kind is SMALL else {})},
        "pretrain": {"images_seen": seen.pretrain, **rate, **usual},
        "fine_tune": {"images_seen": seen.fine_tune, **usual},
        "supervised": {"images_seen": seen.supervised, **rate, **usual},
    }


def transform_of(plan: Plan) -> dict[str, Any]:
    """`transform`, of a network that is trained."""
    size = plan.size.value
    made: dict[str, Any] = {"size": size, "resize": size if size <= CPU_SIZE else round(size * 8 / 7)}
    if plan.fit.value != "crop":
        made["fit"] = plan.fit.value
    if size <= 32:
        return made | {"crop": "pad", "padding": max(1, size // 14), "flip": plan.flip.value}
    return made | {"crop": "random_resized", "scale": [plan.kind.scale, 1.0], "flip": plan.flip.value}


def _round(images: float) -> int:
    """To two digits: more would say more than is known."""
    digits = max(0, len(str(int(images))) - 2)
    return max(1, int(round(images / 10**digits) * 10**digits))


def described(machine: Machine) -> str:
    """A machine, in words."""
    gpus = f", {machine.gpus} x {machine.gpu}" if machine.gpus else ", no GPU"
    return f"{machine.cores} cores, {machine.memory:.0f} GiB{gpus}"
