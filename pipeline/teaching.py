"""The stages of a run that make models: the teacher in all its forms, the student and the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

from cluster import storage
from cluster.errors import LastingError, StageError
from cluster.progress import Progress
from cluster.resources import Bundle, Demand
from cluster.store import WORK, Key, Made, Outside, RunStore, Watched
from models.card import read_card
from models.config import ModelConfig, Training
from models.training.job import TrainingJob
from models.training.launch import fit
from pipeline.context import Run
from pipeline.data.loading import TrainingSet
from pipeline.evaluation import Trained
from pipeline.ready import Existing, class_outputs, copy_model
from pipeline.recipe.sections import FineTune, Weak
from pipeline.scoring.score import Scored
from pipeline.selection.select import Selected
from pipeline.selection.tags import Matched
from pipeline.selection.weak import weak_training_set
from pipeline.stages import TABLE, DhatImages, LabeledData, Tagged, images_of, match_tags
from tuning.sweep import Trial, best, sweep


@dataclass(frozen=True)
class Network:
    """What is to be trained.

    Attributes:
        model: the network and its input; None for that of `start`.
        seed: of the initial weights, and of the order and the crops of the images.
        start: the model directory whose weights it begins with; random ones when None.
        start_fingerprint: what those weights depend on.
        transform: what of its input is other than the directory `start` says; None where `model` says all of it.
        fresh_head: whether its last layer begins with random weights all the same.
        afresh: whether all of it does, so that of `start`, nothing but the network is taken.
    """

    model: ModelConfig | None
    seed: int
    start: str | None = None
    start_fingerprint: str | Outside = ""
    transform: Mapping[str, Any] | None = None
    fresh_head: bool = False
    afresh: bool = False

    @classmethod
    def of(
        cls,
        model: Existing,
        seed: int,
        *,
        config: ModelConfig | None = None,
        transform: Mapping[str, Any] | None = None,
        fresh_head: bool,
    ) -> "Network":
        """One that begins as a model that exists.

        Args:
            model: that model.
            seed: of everything random.
            config: the network and its input, where it is not what the model says.
            transform: what of its input is other than the model says.
            fresh_head: whether its last layer begins with random weights.

        Raises:
            ModelError: it is no model directory.
        """
        own = model.config(transform) if model.given else None
        return cls(config or own, seed, model.uri, model.fingerprint, None if model.given else transform, fresh_head)

    @property
    def config(self) -> ModelConfig:
        """The network and its input, where a stage works."""
        if self.model is not None:
            return self.model
        assert self.start is not None
        return read_card(self.start).model.with_input(self.transform or {})

    def starting_from(self, made: Made[Trained]) -> "Network":
        """The same, with the weights of a stage."""
        return replace(self, start=made.uri, start_fingerprint=made.fingerprint, fresh_head=False, afresh=False)

    @property
    def sections(self) -> dict[str, Any]:
        """What of a recipe decides it."""
        afresh = {"afresh": True} if self.afresh and self.model is None else {}
        changed = {} if self.transform is None else {"transform": self.transform}
        return {"model": self.model, "seed": self.seed, "fresh_head": self.fresh_head, **changed, **afresh}


class Examples(Protocol):
    """Labeled images to train on."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of what they depend on."""
        ...

    @property
    def watched(self) -> tuple[Watched, ...]:
        """What is read of them outside of the store."""
        ...

    def load(self) -> TrainingSet:
        """The images."""
        ...


@dataclass(frozen=True)
class Round:
    """One teacher-to-student pass: steps (2) to (4); without scores where it began with a selection."""

    scores: Made[Scored] | None
    selection: Made[Selected]
    dhat: DhatImages
    pretrained: Made[Trained]
    student: Made[Trained]


def train(
    this: Run, name: str, network: Network, training: Training, examples: Examples, data: LabeledData
) -> Made[Trained]:
    """A network on labeled images, by synchronous SGD (section 4.1).

    Args:
        this: the run.
        name: of the stage.
        network: what is trained.
        training: how.
        examples: what on.
        data: has the classes, and held-out images that the training is watched on.
    """

    def work(place: str) -> Trained:
        _check_head(network, data)
        images = examples.load()
        total = training.steps(images.images) * training.global_batch
        with this.display.task(this.named_as(name), total) as progress:
            job = _job(this, name, network, training, images, data, progress)
            return _fit(replace(job, out=place), storage.join(place, WORK))

    return this.once(_key(name, network, training, examples, data), Trained, work, demand=_demand(this, name, training))


def _key(name: str, network: Network, training: Training, examples: Examples, data: LabeledData) -> Key:
    begins = network.start is not None and not (network.afresh and network.model is not None)
    start = {"start": network.start_fingerprint} if begins else {}
    return Key(
        name,
        {**network.sections, "training": training},
        {**start, **examples.inputs, **data.validation.inputs},
        watched=(*examples.watched, *data.validation.watched),
    )


def _job(
    this: Run,
    name: str,
    network: Network,
    training: Training,
    images: TrainingSet,
    data: LabeledData,
    progress: Progress,
) -> TrainingJob:
    return TrainingJob(
        name=name,
        model=network.config,
        class_names=list(data.class_names),
        training=training,
        data=images,
        validation=data.validation.load(),
        initial=None if network.afresh else network.start,
        fresh_head=network.fresh_head,
        out="",
        seed=network.seed,
        provenance={"recipe": this.name, "stage": this.named_as(name), "seed": network.seed, "run": this.store.uri},
        progress=progress,
    )


def _fit(job: TrainingJob, work: str, on_report: Any = None) -> Trained:
    fitted = fit(job, work, on_report)
    total = job.training.steps(job.data.images) * job.training.global_batch
    card = read_card(fitted.uri)
    return Trained(total, job.model.architecture, card.parameters, dict(fitted.metrics), fitted.history)


_FIELDS = {
    "teacher": "teacher.training",
    "weak-pretrained": "teacher.weak.training",
    "pretrained": "pretrain",
    "student": "fine_tune.training",
    "supervised": "supervised",
}
"""Where a recipe says how a stage trains."""


def _demand(this: Run, name: str, training: Training, trials: int = 1) -> Demand:
    field = _FIELDS[name]
    if this.named_as(name).startswith("self-training/") and name in ("pretrained", "student"):
        field = f"teacher.self_training.{field}"
    workers = training.workers * trials
    said = (
        f"{field}.workers" if trials == 1 else f"{field.removesuffix('.training')}.sweep.concurrent x {field}.workers"
    )
    return Demand(said, workers, (Bundle(workers, training.cpus_per_worker, training.gpus_per_worker),))


def fine_tune(
    this: Run, network: Network, settings: FineTune, data: LabeledData, *, start: Made[Trained]
) -> Made[Trained]:
    """(4) The pre-trained student on D: one trial for each learning rate, the best on held-out labeled images.

    Trials are stages of their own, so that a wider sweep repeats none.
    """
    name, network = "student", network.starting_from(start)
    rates = list(dict.fromkeys(settings.sweep.learning_rates))
    trainings = {rate: settings.training.model_copy(update={"learning_rate": rate}) for rate in rates}
    keys = {rate: _key("trial", network, each, data.train, data) for rate, each in trainings.items()}

    def work(place: str) -> Trained:
        images = data.train.load()
        total = settings.training.steps(images.images) * settings.training.global_batch * len(rates)
        with this.display.task(this.named_as(name), total) as progress:
            jobs = {
                rate: (keys[rate], _job(this, _trial(rate), network, each, images, data, progress.part(_trial(rate))))
                for rate, each in trainings.items()
            }
            tried = sweep(
                "sweep",
                rates,
                _FineTuning(this.store, jobs),
                concurrent=settings.sweep.concurrent,
                work=storage.join(place, WORK),
            )
        tried = [_as_made(trial, this.store.find(keys[trial.learning_rate], Trained)) for trial in tried]
        _check_trials(tried)
        chosen = best(tried)
        made = this.store.find(keys[chosen.learning_rate], Trained)
        copy_model(made.uri, place)
        return replace(made.outputs, images=total, learning_rate=chosen.learning_rate, trials=tuple(tried))

    def name_trials() -> None:
        for rate, key in keys.items():
            this.call(f"trials/{_trial(rate)}", this.store.find(key, Trained))

    name_trials()
    trials = min(settings.sweep.concurrent, len(rates))
    inputs = {_trial(rate): key.fingerprint for rate, key in keys.items()}
    student = this.once(Key(name, {}, inputs), Trained, work, demand=_demand(this, name, settings.training, trials))
    name_trials()
    return student


def _trial(rate: float) -> str:
    return f"lr-{rate!r}"


def _as_made(trial: Trial, made: Made[Trained]) -> Trial:
    """What is known of a trial: its record has the last word, and one that has none did not end well."""
    if made.record is None:
        return trial if trial.error else replace(trial, metrics={}, error="ended without a model")
    metrics = {name: value for name, value in made.outputs.metrics.items() if value is not None and isfinite(value)}
    return Trial(trial.learning_rate, metrics)


def _check_trials(tried: Sequence[Trial]) -> None:
    """Makes sure that of each trial there is a result, before one is chosen.

    Raises:
        StageError: one failed that may go well another time, or none did.
    """
    failed = [trial for trial in tried if trial.error and not trial.lasting]
    why = "; ".join(f"{_trial(trial.learning_rate)}: {trial.error}" for trial in failed or tried)
    if failed:
        raise StageError(
            f"{len(failed)} of {len(tried)} trials failed: run the same command to try them again; the others are kept ({why})"
        )
    if all(trial.error for trial in tried):
        raise LastingError(f"every trial failed, and would again ({why})")


@dataclass(frozen=True)
class _FineTuning:
    """One trial of the fine-tuning sweep, run in a process of Tune's."""

    store: RunStore
    trials: Mapping[float, tuple[Key, TrainingJob]]

    def __call__(self, learning_rate: float, on_report: Any) -> Mapping[str, float | None]:
        key, job = self.trials[learning_rate]

        def work(place: str) -> Trained:
            made = _fit(replace(job, out=place), storage.join(place, WORK), on_report)
            return replace(made, learning_rate=learning_rate)

        return self.store.once(key, Trained, work).outputs.metrics


# Teachers


def _check_head(network: Network, data: LabeledData) -> None:
    """A model that begins a training with its own last layer knows every class."""
    if network.start is not None and not (network.fresh_head or network.afresh):
        class_outputs(network.start, read_card(network.start).class_names, data.class_names)


@dataclass(frozen=True)
class _WeakImages:
    """W, to train on."""

    made: Made[Matched]
    classes: LabeledData
    watched: tuple[Watched, ...] = ()  # W may be as large as U, which nobody lists twice

    @property
    def inputs(self) -> Mapping[str, str]:
        return {"tags": self.made.fingerprint}

    def load(self) -> TrainingSet:
        table = storage.join(self.made.uri, TABLE)
        return weak_training_set(table, images_of(self.made), len(self.classes.class_names))


def pretrain_on_weak_labels(this: Run, weak: Weak, network: Network, data: LabeledData) -> Network:
    """The network, pre-trained on weakly labeled images W (section 3.3)."""
    field = "teacher.weak.images"
    tagged = Tagged("teacher.weak.tags", weak.tags, weak.images, lambda: this.sources[field], {})
    images = _WeakImages(match_tags(this, "weak-tags", tagged, data), data)
    return network.starting_from(train(this, "weak-pretrained", network, weak.training, images, data))
