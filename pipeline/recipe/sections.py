"""The sections of a recipe: everything that decides a run's result, in one validated, immutable object. Imports nothing heavy."""

from pathlib import PurePosixPath
from typing import Annotated, Literal, Self
from unicodedata import normalize

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from cluster.config import Cluster
from cluster.errors import RecipeError
from cluster.section import FREE, Section
from models.config import CPU_BATCH, GPU_BATCH, ModelConfig, Training, Views
from pipeline.recipe.document import dump
from tuning.config import Sweep


def _one_spelling(uri: str) -> str:
    scheme, slashes, path = uri.partition("://")
    if slashes:
        return f"{scheme}://{path.rstrip('/')}"  # what else has two slashes in an object store is another key
    plain = str(PurePosixPath(uri))
    if plain != uri and plain in (SIDECAR, RESNET18, TEACHER):
        return f"./{plain}"  # a path that is spelled so that it is none of these words
    return plain[1:] if plain.startswith("//") else plain


SIDECAR = "sidecar"
"""The tags that a source of images has itself, beside them."""
RESNET18, TEACHER = "resnet18", "teacher"
"""Models that `deduplicate.model` knows by name."""
Uri = Annotated[
    str, StringConstraints(min_length=1, max_length=2000, strip_whitespace=True), AfterValidator(_one_spelling)
]
"""A location, in one of its spellings: `a//b/`, `./a/b` and `a/b` are the same local path."""


class Source(Section):
    """Images in an object store or on a disk."""

    uri: Uri
    """The root: a local path, `s3://bucket/prefix` or `gs://bucket/prefix`."""
    layout: Literal["auto", "webdataset", "parquet", "folder"] = "auto"
    """`webdataset`: tar shards; `parquet`: files with a column of encoded images; `folder`: image files, one folder per class when labeled; `auto`: by what is found."""
    image_column: str | None = Field(default=None, min_length=1, max_length=200)
    """Parquet: the column of image bytes, or of structs with a `bytes` field; by default `image` where there is one, else the only column of encoded images."""
    label_column: str = Field(default="label", min_length=1, max_length=200)
    """Parquet: the column of class numbers or names."""


class Labeled(Section):
    """The labeled set D, and the sets that models are chosen and measured on."""

    train: Source
    """D. Teacher, fine-tuning and the supervised baseline train on it."""
    validation: Source | None = None
    """Labeled images to choose the fine-tuning learning rate on."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Without `validation`: the share of D that is held out for it (a fixed draw from `seed`)."""
    test: Source
    """Labeled images that every result is measured on; nothing is chosen on them."""
    classes: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """Class names in the order of the network's outputs; by default what D itself says, else sorted."""

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        numbers: dict[str, int] = {}
        for number, name in enumerate(classes or ()):
            first = numbers.setdefault(normalize("NFC", name), number)
            if first != number:
                raise ValueError(f"must be distinct names: those at {first} and {number} are the same text")
        return classes


class Weak(Section):
    """Weakly labeled images W, which the teacher is pre-trained on before D (section 3.3)."""

    images: Source
    """W. It may be U."""
    tags: Uri = SIDECAR
    """Words of each image: `sidecar` for those that the source itself has beside its images; else Parquet files with the columns `shard`, `index` and `tags`. A tag counts for a class when it is the words of the class's name, original or stemmed, in any order, joined (supplement 4.1)."""
    training: Training
    """How the network is pre-trained on W."""


class SelfTraining(Section):
    """The teacher taught by itself before it teaches the student (supplement 3): a first teacher of the same network selects for it."""

    pretrain: Training
    """Of the network on what the first teacher selected."""
    fine_tune: "FineTune"
    """Of the pre-trained network on D."""


NETWORK, READY = "(a network)", "(a model directory)"
"""Tags of the two forms of `Teacher.model`, which stand in pydantic's places of errors and in no message of ours."""


def _form_of_model(value: object) -> str:
    return READY if isinstance(value, str) else NETWORK


class Teacher(Section):
    """Stage (1): a network trained on D, or a model that exists; before that pre-trained on weak labels, after that taught by itself, if wanted."""

    model: Annotated[Annotated[ModelConfig, Tag(NETWORK)] | Annotated[Uri, Tag(READY)], Discriminator(_form_of_model)]
    """A network to train, or the URI of a model directory that is ready."""
    training: Training | None = None
    """How it is trained on D; a ready model without it is used as it is."""
    head: Literal["native", "fresh"] = "native"
    """Of a ready model: `native` keeps its outputs for the classes of D, found by name; `fresh` trains a new last layer on D."""
    weak: Weak | None = None
    """Weakly labeled images to pre-train on (section 3.3)."""
    self_training: SelfTraining | None = None
    """Whether it is first taught by itself (supplement 3)."""

    @property
    def ready(self) -> str | None:
        """The URI of the model directory; None where a network is trained from random weights."""
        return self.model if isinstance(self.model, str) else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.training is None:
            if self.ready is None:
                raise ValueError("training must be given: the network has random weights")
            if self.head == "fresh":
                raise ValueError("head = fresh needs training: the new last layer has random weights")
            if self.weak is not None:
                raise ValueError("weak needs training: after weak labels, the teacher is fine-tuned on D (section 3.3)")
        if self.head == "fresh" and self.ready is None:
            raise ValueError("head = fresh is for a model that exists; a network to train has a new last layer anyway")
        return self


class Student(Section):
    """The network whose size is fixed by where it will be used."""

    model: ModelConfig
    """The network."""


class Score(Section):
    """Stage (2), first half: the teacher on every image of U."""

    table: Uri | None = None
    """A score table of U that exists, in place of a teacher and a scoring: the `--out` of a `tophat score`, or a run's `scores`. Its classes must be those of D, in their order. What else decides scores is left out, or is what the table was made with."""
    classes_per_image: int = Field(default=10, ge=1, le=1000)
    """P: the classes with the highest scores that are kept for each image. Any smaller P can be selected later."""
    views: Views = "center"
    """Crops of an image that are scored, and their scores averaged: the center, also mirrored, or the center and four corners of a square of `resize`, also mirrored. 2, 5 and 10 times the work."""
    logits: bool = False
    """Whether images are ranked by what enters the softmax and not by what leaves it; the paper found that worse (section 3.2)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the forward pass. The others are faster on GPUs (bfloat16 four times, ResNet-50 on an H200), and move scores in the third digit; float16 needs a GPU."""
    compile: Annotated[bool, FREE] = False
    """Whether `torch.compile` makes the kernels: half a minute or more at the start of each actor, and a C++ compiler on each node. Forward passes are 1.1 to 1.2 times as fast on CPUs, and 1.6 to 2 times on GPUs (bfloat16, ResNet-50 on an H200)."""
    batch_size: Annotated[int | None, FREE] = Field(default=None, ge=1, le=8192)
    """Images per forward pass; by default 32 on CPUs and 256 on GPUs."""
    actors: Annotated[int | None, FREE] = Field(default=None, ge=1, le=4096)
    """Processes that hold the teacher; by default one for each GPU, or as many as find room on the cluster's CPUs beside a reader each."""
    cpus_per_actor: Annotated[float, FREE] = Field(default=0.75, gt=0.0, le=1024.0)
    """CPUs reserved for each of them; rounded down, at least 1, the threads of a forward pass. With the default, an actor and a reader share a core and each takes what the other leaves."""
    gpus_per_actor: Annotated[float, FREE] = Field(default=0.0, ge=0.0, le=1.0)
    """GPUs of each of them; a fraction shares one."""
    readers: Annotated[int | None, FREE] = Field(default=None, ge=1, le=100_000)
    """Tasks that read and decode at once; by default what the actors leave of the CPUs."""
    cpus_per_reader: Annotated[float | None, FREE] = Field(default=None, gt=0.0, le=64.0)
    """CPUs reserved for each of them; by default 0.25 beside actors on CPUs and 1 beside actors on GPUs."""
    range_mib: Annotated[int | None, FREE] = Field(default=None, ge=1, le=4096)
    """Decoded images of a row range, in MiB, rounded down to whole batches but at least one; by default 8 on CPUs and 128 on GPUs. A range travels together and has one file. A larger shard is scored in several ranges; smaller shards share one with those that follow."""
    decode_seconds: Annotated[float, FREE] = Field(default=10.0, ge=0.1, le=3600.0)
    """CPU time that decoding one image may take; one that takes more is a reject."""
    max_reject_fraction: Annotated[float, FREE] = Field(default=1.0, ge=0.0, le=1.0)
    """The run stops when a larger share of U could not be scored."""
    embedding: bool = False
    """Whether each image's pooled features, the input of the teacher's last linear layer, are kept beside its scores (float16); of several views, the center's."""

    @property
    def reader_cpus(self) -> float:
        """CPUs reserved for each reading task."""
        return self.cpus_per_reader or (1.0 if self.gpus_per_actor else 0.25)

    @property
    def range_bytes(self) -> int:
        """Decoded images that travel together, in bytes."""
        return (self.range_mib or (128 if self.gpus_per_actor else 8)) * 2**20

    @property
    def batch(self) -> int:
        """Images of a forward pass."""
        return self.batch_size or (GPU_BATCH if self.gpus_per_actor else CPU_BATCH)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "float16" and not self.gpus_per_actor:
            raise ValueError("precision = float16 needs gpus_per_actor above 0; on CPUs use float32")
        return self


class Deduplicate(Section):
    """What of U is left out before selection: near-duplicates of evaluation images (supplement 5) and copies inside U. Off by default."""

    nearest: int | None = Field(default=None, ge=1, le=10**6)
    """So many images of U, the nearest to any validation or test image, are left out; 5000 in the paper."""
    within: float | None = Field(default=None, ge=0.0, le=2.0)
    """Images of U at most so far from a validation or test image are left out: Euclidean, between L2-normalized features."""
    copies: bool = False
    """Of images of U with the same bytes only the first, by shard and index, stays."""
    model: Uri = RESNET18
    """Whose features are compared: `resnet18`, torchvision's, trained on ImageNet, downloaded once, which takes a second pass over U; `teacher`, whose features `score.embedding` keeps; or a model directory."""
    pairs: int = Field(default=10_000, ge=1, le=10**6)
    """Nearest pairs that are ranked and shown for review: at least as many as are left out."""
    index: Literal["exact", "ivf", "hnsw"] = "exact"
    """How the nearest evaluation image is searched (Faiss): by brute force, or approximately in inverted lists or a graph, for large evaluation sets."""
    probes: int = Field(default=32, ge=1, le=65_536)
    """Of `ivf`, the lists that are searched; of `hnsw`, the breadth of the search. More finds more and takes longer."""
    decisions: Uri | None = None
    """The decision file of a review, which overrides `nearest` and `within` for the pairs that it names."""

    @property
    def near(self) -> bool:
        """Whether near-duplicates are looked for."""
        return self.nearest is not None or self.within is not None

    @property
    def second_pass(self) -> bool:
        """Whether U goes through another model than the teacher."""
        return self.near and self.model != TEACHER

    @property
    def on(self) -> bool:
        """Whether anything is left out."""
        return self.near or self.copies

    @field_validator("model", mode="before")
    @classmethod
    def _null_is_the_teacher(cls, model: object) -> object:
        return TEACHER if model is None else model

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nearest is not None and self.nearest > self.pairs:
            raise ValueError(
                f"pairs = {self.pairs} must be at least nearest = {self.nearest}: only ranked pairs can be left out"
            )
        if self.decisions is not None and not self.near:
            raise ValueError("decisions needs nearest or within: the pairs that it was made on are ranked again")
        return self


class Select(Section):
    """Stage (2), second half: the K best images of each class."""

    selection: Uri | None = None
    """A selection of U that exists, in place of a teacher, scores and the picking: the `--out` of a `tophat select`, or a run's `selection`. Its classes must be those of D, in their order. What else decides a selection is left out, or is what it was made with."""
    images_per_class: int = Field(default=16_000, ge=1, le=10**9)
    """K; with a class distribution, its mean: the total stays K x the number of classes."""
    zipf_exponent: float | None = Field(default=None, ge=0.0, le=10.0)
    """Unbalanced: classes in a seeded order get images in proportion to 1, 1/2^s, 1/3^s, and so on (section 4.4)."""
    class_weights: tuple[Annotated[float, Field(ge=0.0, le=1e12)], ...] | None = None
    """Unbalanced: classes get images in proportion to these, one for each class in the order of the classes."""
    classes_per_image: int | None = Field(default=None, ge=1, le=1000)
    """P to select with, at most the P that was stored; by default that one."""
    min_score: float | None = Field(default=None, ge=-1e6, le=1e6, allow_inf_nan=False)
    """Candidates below it are never selected: from 0 to 1, but with `score.logits`, where scores have no bounds."""
    tags: Uri | None = None
    """Tags of U: `sidecar` for those that U has beside its images; else Parquet files with the columns `shard`, `index`, and `tags` (words, as of `teacher.weak`) or `class_ids` (numbers of classes). Then each class gets images at random among those tagged with it, and not the best-scored (section 4.4, "balanced-with-tags")."""
    exclude: tuple[Uri, ...] = ()
    """Parquet files, or folders of them, with columns `shard` and `index`: images that are never selected."""
    memory_mib: Annotated[int, FREE] = Field(default=2048, ge=64, le=1_000_000)
    """What each scanning task may hold; with more classes x K, the scores are read once for each range of classes that fits."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.zipf_exponent is not None and self.class_weights is not None:
            raise ValueError("zipf_exponent and class_weights exclude each other: both say how large each class is")
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights must have one above 0")
        if self.tags is not None and (self.min_score is not None or self.classes_per_image is not None):
            raise ValueError("tags have no scores: leave out min_score and classes_per_image")
        return self


class Dhat(Section):
    """D-hat's own copies of the selected images."""

    images_per_shard: int = Field(default=4096, ge=1, le=1_000_000)
    """Images in one shard."""


class FineTune(Section):
    """Stage (4): the pre-trained student on D."""

    training: Training
    """How; its learning rate is what the sweep replaces."""
    sweep: Sweep
    """Which initial learning rates are tried."""


Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Seeds(Section):
    """Seeds in place of `seed`, so that one thing can vary and the others stay."""

    data: Seed | None = None
    """Of what is held out, the classes' order in Zipf's law, the choice among tags, and D-hat's order."""
    teacher: Seed | None = None
    """Of the teacher's trainings."""
    student: Seed | None = None
    """Of the student's trainings, the baseline's among them."""


class Report(Section):
    """The report, and the gallery of D-hat's images that it links to."""

    classes: int = Field(default=10, ge=1, le=1000)
    """Classes whose ranked images are in the report itself; the gallery has those of every class."""
    first_ranks: int = Field(default=6, ge=1, le=50)
    """Images per row from the first rank on."""
    strided_ranks: int = Field(default=10, ge=0, le=50)
    """Further images per row, at equal strides down to rank K."""


class Recipe(Section):
    """One run of the paper's pipeline (section 3.2)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Letters, digits, dots, dashes. A run directory belongs to one name."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """What random draws begin with: which images are held out, the initial weights, the order of images, their crops."""
    seeds: Seeds = Seeds()
    """Other seeds for some of that."""
    rounds: int = Field(default=1, ge=1, le=20)
    """How often a teacher teaches a student: the student of one round is the teacher of the next (section 4.2)."""
    cluster: Annotated[Cluster, FREE] = Cluster()
    """Where Ray runs."""
    labeled: Labeled
    """D, and what is held out."""
    unlabeled: Source
    """U."""
    teacher: Teacher | None = None
    """Stage (1); not needed, and not made, where `score.table` or `select.selection` names what it is for."""
    score: Score = Score()
    """Stage (2): ranking."""
    deduplicate: Deduplicate = Deduplicate()
    """What of U is left out before selection."""
    select: Select = Select()
    """Stage (2): picking."""
    dhat: Dhat = Dhat()
    """Stage (2): D-hat."""
    student: Student
    """The student's network, in stages (3), (4) and the baseline."""
    pretrain: Training
    """Stage (3): the student on D-hat."""
    fine_tune: FineTune
    """Stage (4)."""
    supervised: Training
    """The baseline: the same student on D alone (Table 2, "Fully Supervised")."""
    report: Annotated[Report, FREE] = Report()
    """The report."""

    @property
    def given(self) -> str | None:
        """The field that names what a teacher is for, and that exists; None where the run makes a teacher."""
        named = {"select.selection": self.select.selection, "score.table": self.score.table}
        return next((field for field, uri in named.items() if uri is not None), None)

    @property
    def taught(self) -> Teacher | None:
        """The teacher that the run makes, if it makes one."""
        return self.teacher if self.given is None else None

    @model_validator(mode="after")
    def _from_what_exists(self) -> Self:
        if self.given is None:
            if self.teacher is None:
                raise ValueError("teacher must be given, or score.table, or select.selection")
            return self
        if self.score.table is not None and self.select.selection is not None:
            raise ValueError("score.table and select.selection exclude each other: a selection needs no scores")
        if self.rounds > 1:
            raise ValueError(f"rounds = {self.rounds} must be 1 with {self.given}, which is of one round")
        if self.select.selection is not None and self.deduplicate.on:
            raise ValueError("deduplicate must be off with select.selection: images are left out before one is made")
        if self.deduplicate.near and self.deduplicate.model == TEACHER:
            raise ValueError(
                f"deduplicate.model = {TEACHER} is not known with score.table: name its model directory, or {RESNET18}"
            )
        return self

    @model_validator(mode="after")
    def _selectable(self) -> Self:
        if self.given is not None:
            return self  # what exists has settings of its own
        wanted, stored = self.select.classes_per_image, self.score.classes_per_image
        if wanted is not None and wanted > stored:
            raise ValueError(
                f"select.classes_per_image = {wanted} must be at most score.classes_per_image = {stored}: "
                "only the stored classes can be selected"
            )
        least = self.select.min_score
        if least is not None and not self.score.logits and not 0.0 <= least <= 1.0:
            raise ValueError(
                f"select.min_score = {least:g} must be from 0 to 1, as softmax scores are (score.logits = false)"
            )
        if self.deduplicate.near and self.deduplicate.model == TEACHER and not self.score.embedding:
            raise ValueError(
                "deduplicate.model = teacher compares features that score.embedding = false does not keep: "
                f"set it to true, or the model to {RESNET18} or a model directory"
            )
        return self

    def seed_of(self, what: Literal["data", "teacher", "student"]) -> int:
        """The seed of one of `seeds`."""
        own: int | None = getattr(self.seeds, what)
        return self.seed if own is None else own

    def check_class_count(self, classes: int) -> None:
        """Holds P and the classes' weights against the number of classes, once D has told it.

        Raises:
            RecipeError: P is above the class count, or there are not as many weights.
        """
        if self.given is None and self.score.classes_per_image > classes:
            raise RecipeError(
                "score.classes_per_image",
                self.score.classes_per_image,
                f"must be at most {classes}, the number of classes of D",
                f"set it to {classes} or less",
            )
        weights = self.select.class_weights
        if weights is not None and len(weights) != classes:
            rule = f"has {len(weights)} weights for the {classes} classes of D"
            raise RecipeError(
                "select.class_weights", list(weights), rule, "give one for each, in the order of the classes"
            )

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included."""
        return dump(self.model_dump(mode="json"))
