"""The sections of a recipe: everything that decides a run's result, in one validated, immutable object. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from cluster.config import Cluster
from cluster.errors import RecipeError
from cluster.section import FREE, USUAL, Section, Unit
from models.config import CPU_BATCH, GPU_BATCH, ModelConfig, Training, Transform, Views
from models.usual import usual_fine_tuning, usual_training
from pipeline.recipe.deduplicate import Deduplicate
from pipeline.recipe.document import dump
from pipeline.recipe.images import Labeled, Source
from pipeline.recipe.select import Select
from pipeline.recipe.uris import RESNET18, SIDECAR, TEACHER, Uri
from tuning.config import Sweep

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""What a run can be called."""


class Weak(Section):
    """Weakly labeled images W, which the teacher is pre-trained on before D (section 3.3)."""

    images: Source
    """W. It may be U."""
    tags: Uri = SIDECAR
    """Words of each image: `sidecar` for those that the source itself has beside its images; else Parquet files with the columns `shard`, `index` and `tags`. A tag counts for a class when it is the words of the class's name, original or stemmed, in any order, joined (supplement 4.1)."""
    training: Training = Field(default=USUAL)
    """How the network is pre-trained on W."""


class FineTune(Section):
    """Stage (4): the pre-trained student on D."""

    training: Training = Field(default=USUAL)
    """How; its learning rate is what the sweep replaces."""
    sweep: Sweep = Field(default=USUAL)
    """Which initial learning rates are tried."""


class SelfTraining(Section):
    """The teacher taught by itself before it teaches the student (supplement 3): a first teacher of the same network selects for it."""

    pretrain: Training = Field(default=USUAL)
    """Of the network on what the first teacher selected."""
    fine_tune: FineTune = Field(default=USUAL)
    """Of the pre-trained network on D."""


NETWORK, READY = "(a network)", "(a model directory)"
"""Tags of the two forms of `Teacher.model`, which stand in pydantic's places of errors and in no message of ours."""


def _form_of_model(value: object) -> str:
    return READY if isinstance(value, str) else NETWORK


class Teacher(Section):
    """Stage (1): a network trained on D, or a model that exists; before that pre-trained on weak labels, after that taught by itself, if wanted."""

    model: Annotated[
        Annotated[ModelConfig, Tag(NETWORK)] | Annotated[Uri, Tag(READY)], Discriminator(_form_of_model)
    ] = ModelConfig()
    """A network to train; or a model that exists: the URI of a model directory, or a name that `tophat teacher` knows, such as `timm:resnet50` or `package.module:factory`."""
    training: Training | None = None
    """How it is trained on D; by default as is usual, and a model that exists is used as it is."""
    head: Literal["native", "linear", "zero-shot", "fresh"] = "native"
    """Of a model that exists, its last layer. `native`: its own outputs for the classes of D, found by name; `linear`: logistic regression on its features of D, with the L2 that is best on held-out images; `zero-shot`: the classes' names, as `open_clip` reads them; `fresh`: a random one, which `training` trains."""
    class_map: Uri | None = None
    """Of `native`: a CSV file of two columns, a class of the model and the class of D that it stands for. The probabilities of several that stand for one add up."""
    templates: (
        Annotated[tuple[Annotated[str, Field(min_length=2, max_length=500)], ...], Field(min_length=1)] | None
    ) = None
    """Of `zero-shot`: sentences with {} for the class's name, whose meanings are averaged; by default `a photo of a {}.`"""
    weak: Weak | None = None
    """Weakly labeled images to pre-train on (section 3.3)."""
    self_training: SelfTraining | None = None
    """Whether it is first taught by itself (supplement 3)."""

    @field_validator("training", mode="before")
    @classmethod
    def _usual_training(cls, given: Any, info: ValidationInfo) -> Any:
        ready = isinstance(info.data.get("model"), str)
        return given if ready and given is None else usual_training(given, _trained_network(info), trained=ready)

    @field_validator("self_training", mode="before")
    @classmethod
    def _usual_course(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, Mapping):
            return given
        network = _trained_network(info)
        usual = {
            "pretrain": usual_training(given.get("pretrain"), network),
            "fine_tune": usual_fine_tuning(given.get("fine_tune"), network),
        }
        return {**given, **usual}

    @field_validator("weak", mode="before")
    @classmethod
    def _usual_weak_training(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {**given, "training": usual_training(given.get("training"), _trained_network(info))}

    @property
    def ready(self) -> str | None:
        """The model that exists; None where a network is trained from random weights."""
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
        if self.head != "native" and self.ready is None:
            raise ValueError(f"head = {self.head} is for a model that exists; a network to train has a new last layer")
        if self.head == "zero-shot" and not str(self.model).startswith("open_clip:"):
            raise ValueError("head = zero-shot needs a model that knows words: model: open_clip:NAME/WEIGHTS")
        if self.class_map is not None and (self.head != "native" or self.ready is None):
            raise ValueError("class_map is for the own classes of a model that exists (head = native)")
        if self.templates is not None and self.head != "zero-shot":
            raise ValueError("templates are for head = zero-shot")
        if any("{}" not in template for template in self.templates or ()):
            raise ValueError("templates must have {} where the class's name goes")
        return self


def _trained_network(info: ValidationInfo) -> ModelConfig | None:
    """The teacher's network; None where a model is ready, whose directory tells what it is, or where it is not valid."""
    model = info.data.get("model")
    return model if isinstance(model, ModelConfig) else None


class Student(Section):
    """The network whose size is fixed by where it will be used."""

    model: ModelConfig | None = None
    """The network; by default that of `start`, or else as by default everywhere."""
    start: Uri | None = None
    """A model that exists, as of `teacher.model`: the student and the baseline both begin with its weights, and a new last layer; by default with random weights."""
    transform: Transform | None = None
    """What of the input is other than in `start`, such as a smaller `size`: the fields that are not given are as there."""

    @field_validator("transform")
    @classmethod
    def _of_start(cls, given: Transform | None, info: ValidationInfo) -> Transform | None:
        if given is not None and (info.data.get("model") is not None or info.data.get("start") is None):
            raise ValueError("changes the input of student.start alone; a student.model has a transform of its own")
        return given

    @field_serializer("transform")
    def _as_given(self, transform: Transform | None) -> dict[str, Any] | None:
        return None if transform is None else transform.model_dump(mode="json", exclude_unset=True)

    @property
    def changed_input(self) -> dict[str, Any] | None:
        """The fields of `transform` that are given."""
        return None if self.transform is None else self.transform.model_dump(exclude_unset=True)

    @model_validator(mode="before")
    @classmethod
    def _some_network(cls, given: Any) -> Any:
        nothing = isinstance(given, Mapping) and given.get("model") is None and given.get("start") is None
        return {**given, "model": {}} if nothing else given


USUAL_P = 10
"""P where a recipe does not say (section 4.1), and there are as many classes."""


class Score(Section):
    """Stage (2), first half: the teacher on every image of U."""

    table: Uri | None = None
    """A score table of U that exists, in place of a teacher and a scoring: the `--out` of a `tophat score`, or a run's `scores`. Its classes must be those of D, in their order. What else decides scores is left out, or is what the table was made with."""
    classes_per_image: int | None = Field(default=None, ge=1, le=1000)
    """P: the classes with the highest scores that are kept for each image; by default 10, or every class where there are fewer. Any smaller P can be selected later."""
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
    range_mib: Annotated[int | None, FREE, Unit("in MiB")] = Field(default=None, ge=1, le=4096)
    """Decoded images of a row range, in MiB, rounded down to whole batches but at least one; by default 8 on CPUs and 128 on GPUs. A range travels together and has one file. A larger shard is scored in several ranges; smaller shards share one with those that follow."""
    decode_seconds: Annotated[float, FREE, Unit("in seconds")] = Field(default=10.0, ge=0.1, le=3600.0)
    """CPU time that decoding one image may take; one that takes more is a reject."""
    max_reject_fraction: Annotated[float, FREE] = Field(default=1.0, ge=0.0, le=1.0)
    """The run stops when a larger share of U could not be scored."""
    embedding: bool = False
    """Whether each image's pooled features, the input of the teacher's last linear layer, are kept beside its scores (float16); of several views, the center's."""

    def deciding(self) -> dict[str, Any]:
        """The default of P is what it comes to, which the number of classes says, and that is decided elsewhere."""
        return {
            name: value for name, value in super().deciding().items() if (name, value) != ("classes_per_image", USUAL_P)
        }

    def kept_of(self, classes: int) -> int:
        """P, where there are so many classes."""
        return self.classes_per_image or min(USUAL_P, classes)

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


class Dhat(Section):
    """D-hat's own copies of the selected images."""

    images_per_shard: int = Field(default=4096, ge=1, le=1_000_000)
    """Images in one shard."""


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

    name: str = Field(default="recipe", pattern=NAME)
    """Of the run: letters, digits, dots, dashes; by default the name of the recipe's file. A run directory belongs to one name."""
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
    """U, the images without labels."""
    teacher: Teacher = Field(default_factory=Teacher)
    """Stage (1): the teacher; not made where `score.table` or `select.selection` names what it is for."""
    score: Score = Score()
    """Stage (2): ranking."""
    deduplicate: Deduplicate = Deduplicate()
    """What of U is left out before selection."""
    select: Select = Select()
    """Stage (2): picking."""
    dhat: Dhat = Dhat()
    """Stage (2): D-hat, the copies of what was picked."""
    student: Student = Student()
    """The student's network, in stages (3), (4) and the baseline."""
    pretrain: Training = Field(default=USUAL)
    """Stage (3): the student on D-hat."""
    fine_tune: FineTune = Field(default=USUAL)
    """Stage (4): the student on D."""
    baseline: bool = True
    """Whether the baseline is trained: the same student on D alone, which tells the gain of the method."""
    supervised: Training = Field(default=USUAL)
    """How the baseline is trained (Table 2, "Fully Supervised")."""
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
            return self
        if self.score.table is not None and self.select.selection is not None:
            raise ValueError("score.table and select.selection exclude each other: a selection needs no scores")
        if self.rounds > 1:
            raise ValueError(f"rounds = {self.rounds} must be 1 with {self.given}, which is of one round")
        if self.select.selection is not None and self.deduplicate.on:
            raise ValueError("deduplicate must be off with select.selection: images are left out before one is made")
        return self

    @field_validator("pretrain", "supervised", mode="before")
    @classmethod
    def _usual_training(cls, given: Any, info: ValidationInfo) -> Any:
        student: Student | None = info.data.get("student")
        started = student is not None and student.start is not None
        return usual_training(given, _network_of(info), trained=started)

    @field_validator("fine_tune", mode="before")
    @classmethod
    def _usual_fine_tuning(cls, given: Any, info: ValidationInfo) -> Any:
        return usual_fine_tuning(given, _network_of(info))

    # Rules between sections stand at the later one, so that mistakes elsewhere do not hide them.

    @field_validator("deduplicate")
    @classmethod
    def _comparable(cls, deduplicate: Deduplicate, info: ValidationInfo) -> Deduplicate:
        score: Score | None = info.data.get("score")
        if score is None or not deduplicate.near or deduplicate.model != TEACHER:
            return deduplicate
        if score.table is not None:
            raise ValueError(
                f"deduplicate.model = {TEACHER} is not known with score.table: name its model directory, or {RESNET18}"
            )
        if not score.embedding:
            raise ValueError(
                "deduplicate.model = teacher compares features that score.embedding = false does not keep: "
                f"set it to true, or the model to {RESNET18} or a model directory"
            )
        return deduplicate

    @field_validator("select")
    @classmethod
    def _selectable(cls, select: Select, info: ValidationInfo) -> Select:
        score: Score | None = info.data.get("score")
        if score is None or score.table is not None or select.selection is not None:
            return select  # what exists has settings of its own
        wanted, stored = select.classes_per_image, score.kept_of(USUAL_P)
        if wanted is not None and wanted > stored:
            raise ValueError(
                f"select.classes_per_image = {wanted} must be at most score.classes_per_image = {stored}: "
                "only the stored classes can be selected"
            )
        least = select.min_score
        if least is not None and not score.logits and not 0.0 <= least <= 1.0:
            raise ValueError(
                f"select.min_score = {least:g} must be from 0 to 1, as softmax scores are (score.logits = false)"
            )
        return select

    def seed_of(self, what: Literal["data", "teacher", "student"]) -> int:
        """The seed of one of `seeds`."""
        own: int | None = getattr(self.seeds, what)
        return self.seed if own is None else own

    def check_class_count(self, classes: int) -> None:
        """Holds P and the classes' weights against the number of classes, once D has told it.

        Raises:
            RecipeError: P is above the class count, or there are not as many weights.
        """
        for section in ("score", "select"):
            wanted = getattr(self, section).classes_per_image
            if self.given is None and wanted is not None and wanted > classes:
                rule = f"must be at most {classes}, the number of classes of D"
                raise RecipeError(f"{section}.classes_per_image", wanted, rule, f"set it to {classes} or less")
        weights = self.select.class_weights
        if weights is not None and len(weights) != classes:
            rule = f"has {len(weights)} weights for the {classes} classes of D"
            raise RecipeError(
                "select.class_weights", list(weights), rule, "give one for each, in the order of the classes"
            )

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included."""
        return dump(self.model_dump(mode="json"))


def _network_of(info: ValidationInfo) -> ModelConfig | None:
    """The student's network, as far as it is valid."""
    student: Student | None = info.data.get("student")
    return None if student is None else student.model
