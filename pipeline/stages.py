"""What each stage of the pipeline does, of which `pipeline.run` makes a run: from the stages before it to its own outputs, once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster import storage
from cluster.errors import RecipeError, SourceError, StageError
from cluster.progress import Display, Progress
from cluster.session import Session
from models.config import ModelConfig, Training
from models.training import Fitted, fit
from pipeline import deduplication, gallery, scoring, selection
from pipeline import dhat as dhat_stage
from pipeline import labeled as labeled_stage
from pipeline.evaluation import evaluate
from pipeline.loading import TrainingSet, dhat_training_set
from pipeline.ranges import ledger
from pipeline.recipe import Recipe
from pipeline.sources import ImageSource
from pipeline.store import Finished, RunStore, publish_json, read_json
from tuning.sweep import best, sweep

HISTORY = "history.json"
"""In a trial's folder: the rows of its training; written when its model is complete."""

WORK = "work"
"""Folder of a stage that holds what it needs only while it is under way."""


@dataclass(frozen=True)
class Run:
    """One run under way.

    Attributes:
        sources: what the recipe's sources hold now, by field (`labeled.train`, `unlabeled`, ...).
    """

    recipe: Recipe
    store: RunStore
    session: Session
    display: Display
    sources: Mapping[str, ImageSource]

    def once(
        self,
        name: str,
        sections: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[str], dict[str, Any]],
        version: int = 1,
    ) -> Finished:
        """`RunStore.once`, with Ray running while `work` does."""

        def with_ray(place: str) -> dict[str, Any]:
            self.session.start()
            outputs = work(place)
            storage.delete_tree(storage.join(place, WORK))
            return outputs

        return self.store.once(name, sections, inputs, with_ray, version=version)


@dataclass(frozen=True)
class LabeledData:
    """The labeled sets, ready for training and evaluation."""

    stage: Finished
    class_names: tuple[str, ...]
    train: TrainingSet
    validation: TrainingSet
    test: TrainingSet


def survey_labeled(this: Run) -> LabeledData:
    """D and what is held out: read once, every image checked."""
    recipe, seed = this.recipe, this.recipe.seed
    sets = {"train": recipe.labeled.train, "validation": recipe.labeled.validation, "test": recipe.labeled.test}

    def work(place: str) -> dict[str, Any]:
        sources = {name: this.sources[f"labeled.{name}"] for name, source in sets.items() if source is not None}
        surveys = {}
        with this.display.task("labeled", None) as progress:
            for name, source in sources.items():
                surveys[name] = labeled_stage.survey(source, progress)
        names = labeled_stage.class_names(surveys["train"], recipe.labeled.classes)
        recipe.check_class_count(len(names))
        labels = {
            name: labeled_stage.number_labels(f"labeled.{name}", found, names, complete=name == "train")
            for name, found in surveys.items()
        }
        for name in ("test", "validation"):
            if name in labels and not labeled_stage.count_labels(labels[name], len(names)).any():
                raise SourceError(
                    f"labeled.{name}.uri",
                    sources[name].reader.root,
                    "holds no image that can be used",
                    "look at the files",
                )
        if "validation" not in labels:
            surveys["validation"] = surveys["train"]
            fraction = recipe.labeled.validation_fraction
            labels["train"], labels["validation"] = labeled_stage.hold_out(labels["train"], fraction, seed)
            if not labeled_stage.count_labels(labels["validation"], len(names)).any():
                rule = "can hold out no image, as every class of D has a single one"
                raise RecipeError(
                    "labeled.validation_fraction", fraction, rule, "add images, or name a labeled.validation source"
                )
        counts = {}
        for name, found in surveys.items():
            target = storage.join(place, name)
            counts[name] = labeled_stage.save_labels(target, found.source, labels[name], found.rejects)
        per_class = labeled_stage.count_labels(labels["train"], len(names)).tolist()
        fingerprints = {f"labeled.{name}": source.fingerprint() for name, source in sources.items()}
        return {"class_names": list(names), "per_class": per_class, "sources": fingerprints, **counts}

    stage = this.once("labeled", {"labeled": recipe.labeled, "seed": seed}, {}, work)
    names = tuple(stage.outputs["class_names"])
    recipe.check_class_count(len(names))

    def load(name: str) -> TrainingSet:
        source, labels = labeled_stage.load_labels(storage.join(stage.uri, name))
        return labeled_stage.training_set(source, labels, names)

    return LabeledData(stage, names, load("train"), load("validation"), load("test"))


def list_unlabeled(this: Run) -> Finished:
    """U, listed once."""

    def work(place: str) -> dict[str, Any]:
        source = this.sources["unlabeled"]
        source.save(storage.join(place, "listing.parquet"))
        return {"shards": len(source.shards()), "bytes": source.bytes, "source": source.fingerprint()}

    return this.store.once("unlabeled", {"unlabeled": this.recipe.unlabeled}, {}, work)


def _unlabeled_source(stage: Finished) -> ImageSource:
    return ImageSource.load(storage.join(stage.uri, "listing.parquet"))


def _fit(
    this: Run,
    place: str,
    stage: str,
    labeled: LabeledData,
    model: ModelConfig,
    training: Training,
    data: TrainingSet,
    initial: Finished | None = None,
) -> dict[str, Any]:
    total = training.steps(data.images) * training.global_batch
    with this.display.task(stage, total) as progress:
        fitted = fit(
            stage,
            model=model,
            class_names=list(labeled.class_names),
            training=training,
            data=data,
            validation=labeled.validation,
            initial=None if initial is None else initial.uri,
            work=storage.join(place, WORK),
            out=place,
            seed=this.recipe.seed,
            provenance=_provenance(this, stage),
            progress=progress,
        )
    return _trained(fitted, model, total)


def _trained(fitted: Fitted, model: ModelConfig, images_seen: int) -> dict[str, Any]:
    from models.card import read_card

    return {
        "images": images_seen,
        "architecture": model.architecture,
        "parameters": read_card(fitted.uri).parameters,
        "metrics": fitted.metrics,
        "history": fitted.history,
    }


def _provenance(this: Run, stage: str) -> dict[str, Any]:
    return {"recipe": this.recipe.name, "stage": stage, "seed": this.recipe.seed, "run": this.store.uri}


def _deciding(training: Training) -> dict[str, Any]:
    """What of a training decides its result: all but how it survives failures."""
    return training.model_dump(mode="json", exclude={"max_failures", "checkpoint_every_images"})


def train_teacher(this: Run, labeled: LabeledData) -> Finished:
    """(1) The teacher, on D."""
    teacher = this.recipe.teacher
    return this.once(
        "teacher",
        {"model": teacher.model, "training": _deciding(teacher.training), "seed": this.recipe.seed},
        {"labeled": labeled.stage.fingerprint},
        lambda place: _fit(this, place, "teacher", labeled, teacher.model, teacher.training, labeled.train),
    )


def score_unlabeled(this: Run, unlabeled: Finished, teacher: Finished) -> Finished:
    """(2) The teacher on every image of U."""
    rejects = this.store.place("rejects")

    def work(place: str) -> dict[str, Any]:
        if not ledger(place):
            storage.delete_tree(rejects)  # of scores that were made from other inputs
        source = _unlabeled_source(unlabeled)
        with this.display.task("scores", None) as progress:
            scored = scoring.score(source, teacher.uri, place, rejects, this.recipe.score, progress)
        return {**asdict(scored), "images": scored.listed}

    return this.once(
        "scores",
        this.recipe.score.deciding,
        {"teacher": teacher.fingerprint, "unlabeled": unlabeled.fingerprint},
        work,
    )


def deduplicate(
    this: Run, labeled: LabeledData, unlabeled: Finished, teacher: Finished, scores: Finished
) -> Iterator[Finished]:
    """What of U is left out (supplement 5): its stages as they are finished, the exclusion list last."""
    from models.card import read_card

    settings = this.recipe.deduplicate
    other = deduplication.features_model("deduplicate.model", settings, this.store)
    model = teacher.uri if other is None else other
    inputs = {
        "unlabeled": unlabeled.fingerprint,
        "labeled": labeled.stage.fingerprint,
        "model": read_card(model).weights.sha256 if settings.near else "",
        "embeddings": scores.fingerprint,
    }
    sets = deduplication.surveyed_sets(labeled.stage.uri, ("validation", "test"))
    embeddings = scores.uri if other is None else None
    subject = deduplication.Subject(_unlabeled_source(unlabeled), sets, model, embeddings, inputs)
    field = "deduplicate.decisions"
    return deduplication.deduplicate(this.once, this.display, subject, settings, this.recipe.score, field)


def select_top_k(this: Run, labeled: LabeledData, scores: Finished, excluded: Finished | None = None) -> Finished:
    """(2) For each class the K best-scored images; or, with tags, K at random among those tagged with it; without the excluded."""
    settings, seed = this.recipe.select, this.recipe.seed
    found = () if excluded is None else (excluded.uri,)

    def work(place: str) -> dict[str, Any]:
        with this.display.task("selection", None if settings.tags else scores.outputs["scored"]) as progress:
            selected = selection.select(
                settings.tags or scores.uri,
                place,
                images_per_class=settings.images_per_class,
                classes_per_image=settings.classes_per_image,
                num_classes=len(labeled.class_names),
                zipf_exponent=settings.zipf_exponent,
                class_weights=settings.class_weights,
                min_score=settings.min_score,
                exclude=(*settings.exclude, *found),
                tags=settings.tags is not None,
                seed=seed,
                memory_mib=settings.memory_mib,
                progress=progress,
            )
        if settings.tags is None and selected.images != scores.outputs["scored"]:
            raise StageError(
                f"{scores.outputs['scored']} images are scored, but the selection saw {selected.images}: score again"
            )
        return asdict(selected)

    sections = {"select": settings.model_dump(mode="json", exclude={"memory_mib"}), "seed": seed}
    lists = {uri: selection.listing(uri) for uri in (*settings.exclude, *filter(None, [settings.tags]))}
    if excluded is not None:
        lists["excluded"] = excluded.fingerprint
    return this.once("selection", sections, {"scores": scores.fingerprint, **lists}, work, version=2)


def materialize_dhat(this: Run, labeled: LabeledData, unlabeled: Finished, chosen: Finished) -> Finished:
    """D-hat: the selected images, copied once into shuffled shards."""

    def work(place: str) -> dict[str, Any]:
        with this.display.task("dhat", chosen.outputs["selected"]) as progress:
            made = dhat_stage.materialize(
                chosen.uri,
                _unlabeled_source(unlabeled),
                place,
                images_per_shard=this.recipe.dhat.images_per_shard,
                seed=this.recipe.seed,
                class_names=labeled.class_names,
                progress=progress,
            )
        return asdict(made)

    sections = {"dhat": this.recipe.dhat, "seed": this.recipe.seed}
    return this.once("dhat", sections, {"selection": chosen.fingerprint}, work)


def show_gallery(this: Run, labeled: LabeledData, chosen: Finished, dhat: Finished) -> Finished:
    """The images of D-hat at chosen ranks of every class (Figure 2), as pages to look at before the training and after."""
    settings, names = this.recipe.report, labeled.class_names
    most = min(settings.classes, len(names))

    def work(place: str) -> dict[str, Any]:
        facts = zip(names, dhat.outputs["counts"], chosen.outputs["lowest_scores"], strict=True)
        with this.display.task("gallery", None) as progress:
            made = gallery.write_gallery(
                place,
                dhat.uri,
                [gallery.ClassCount(number, *fact) for number, fact in enumerate(facts)],
                title=this.recipe.name,
                first_ranks=settings.first_ranks,
                strided_ranks=settings.strided_ranks,
                rows_of=gallery.figure_ranks(len(names), 0, most),  # spread over all classes
                progress=progress,
            )
        return asdict(made)

    return this.once("gallery", {"report": settings}, {"dhat": dhat.fingerprint}, work)


def pretrain_student(this: Run, labeled: LabeledData, dhat: Finished) -> Finished:
    """(3) The student, on D-hat alone."""
    recipe = this.recipe

    def work(place: str) -> dict[str, Any]:
        data = dhat_training_set(dhat.uri, len(labeled.class_names))
        return _fit(this, place, "pretrained", labeled, recipe.student.model, recipe.pretrain, data)

    sections = {"model": recipe.student.model, "training": _deciding(recipe.pretrain), "seed": recipe.seed}
    return this.once("pretrained", sections, {"dhat": dhat.fingerprint, "labeled": labeled.stage.fingerprint}, work)


def fine_tune_student(this: Run, labeled: LabeledData, pretrained: Finished) -> Finished:
    """(4) The pre-trained student on D: one trial for each learning rate, the best on held-out labeled images."""
    recipe, model = this.recipe, this.recipe.student.model
    settings = recipe.fine_tune
    total = settings.training.steps(labeled.train.images) * settings.training.global_batch

    def work(place: str) -> dict[str, Any]:
        rates = list(dict.fromkeys(settings.sweep.learning_rates))
        with this.display.task("student", total * len(rates)) as progress:
            tune_one = _FineTuning(this.recipe, labeled, pretrained.uri, place, _provenance(this, "student"), progress)
            trials = sweep(
                "sweep", rates, tune_one, concurrent=settings.sweep.concurrent, work=storage.join(place, WORK)
            )
        chosen = best(trials)
        fitted = tune_one.finished(chosen.learning_rate)
        assert fitted is not None
        copy_model(fitted.uri, place)
        outputs = _trained(fitted, model, total * len(rates))
        return {**outputs, "learning_rate": chosen.learning_rate, "trials": [asdict(trial) for trial in trials]}

    sections = {
        "model": model,
        "training": _deciding(settings.training),
        "learning_rates": settings.sweep.learning_rates,
        "seed": recipe.seed,
    }
    inputs = {"pretrained": pretrained.fingerprint, "labeled": labeled.stage.fingerprint}
    return this.once("student", sections, inputs, work)


@dataclass(frozen=True)
class _FineTuning:
    """One trial of the fine-tuning sweep, run in a process of Tune's. A trial whose model is published is not repeated."""

    recipe: Recipe
    labeled: LabeledData
    initial: str
    place: str
    provenance: dict[str, Any]
    progress: Progress

    def __call__(self, learning_rate: float, on_report: Any) -> Mapping[str, float]:
        fitted = self.finished(learning_rate)
        if fitted is None:
            trial = self._name(learning_rate)
            settings = self.recipe.fine_tune.training
            fitted = fit(
                trial,
                model=self.recipe.student.model,
                class_names=list(self.labeled.class_names),
                training=settings.model_copy(update={"learning_rate": learning_rate}),
                data=self.labeled.train,
                validation=self.labeled.validation,
                initial=self.initial,
                work=storage.join(self.place, WORK),
                out=self._uri(learning_rate),
                seed=self.recipe.seed,
                provenance={**self.provenance, "learning_rate": learning_rate},
                progress=self.progress.part(trial),
                on_report=on_report,
            )
            publish_json(storage.join(fitted.uri, HISTORY), {"history": fitted.history})
        return fitted.metrics

    def finished(self, learning_rate: float) -> Fitted | None:
        """The trial's model, if it is complete."""
        uri = self._uri(learning_rate)
        if not storage.exists(storage.join(uri, HISTORY)):
            return None
        history = read_json(storage.join(uri, HISTORY))["history"]
        return Fitted(uri, history[-1], history)

    def _name(self, learning_rate: float) -> str:
        return f"lr-{learning_rate!r}"

    def _uri(self, learning_rate: float) -> str:
        return storage.join(self.place, "trials", self._name(learning_rate))


def train_supervised(this: Run, labeled: LabeledData) -> Finished:
    """The baseline: the student's network, from scratch, on D alone (Table 2, "Fully Supervised")."""
    recipe = this.recipe
    return this.once(
        "supervised",
        {"model": recipe.student.model, "training": _deciding(recipe.supervised), "seed": recipe.seed},
        {"labeled": labeled.stage.fingerprint},
        lambda place: _fit(this, place, "supervised", labeled, recipe.student.model, recipe.supervised, labeled.train),
    )


def evaluate_models(this: Run, labeled: LabeledData, models: tuple[Finished, ...]) -> Finished:
    """Top-1 and top-5 of every model on the test set, on which nothing was chosen."""

    def work(place: str) -> dict[str, Any]:
        uris = {model.name: model.uri for model in models}
        with this.display.task("evaluation", labeled.test.images * len(uris)) as progress:
            found = evaluate(uris, labeled.test, progress)
        return {"images": labeled.test.images, "models": found}

    return this.once("evaluation", {}, {model.name: model.fingerprint for model in models}, work)


def copy_model(source: str, target: str) -> None:
    """Copies a model directory; the card, which makes it complete, goes last."""
    from models.card import CARD, WEIGHTS

    for file in (WEIGHTS, CARD):
        with storage.local_copy(storage.join(source, file)) as local:
            storage.publish(storage.join(target, file), local)
