"""K where the recipe leaves it open (`select.images_per_class: auto`): a few values are tried over the same scores.

Each value's D-hat is the first ranks of the largest one, which is copied once. The student's network is pre-trained on each for a short
while, and judged on D, which it has never seen. (The teacher has seen the labels of D, but for all values alike.) The better half is tried
again for longer, and so on; of the last rung, the greatest value within a standard error of the best is taken. All trials together see
fewer images than two pre-trainings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, sqrt

from cluster import storage
from cluster.progress import Progress
from cluster.resources import Bundle, Demand
from cluster.store import WORK, Key, Made, Outside
from models.card import CARD
from models.config import Training
from models.training.job import TrainingJob
from models.training.launch import fit_all
from pipeline.context import Run
from pipeline.data.loading import dhat_training_set
from pipeline.duplicates.exclude import Excluded
from pipeline.evaluation import Candidate, Measured, measured
from pipeline.recipe.sections import Recipe, Score
from pipeline.recipe.select import AUTO
from pipeline.scoring.judging import judge
from pipeline.scoring.score import Scored
from pipeline.selection import dhat as dhat_stage
from pipeline.selection.ladder import ladder, sizes
from pipeline.selection.pick import lists, pick
from pipeline.selection.quotas import quotas
from pipeline.stages import LabeledData, Listed, images_of, score_table
from pipeline.teaching import Network
from tuning.halving import rungs


@dataclass(frozen=True)
class Tried:
    """One value of K in one rung.

    Attributes:
        images_per_class: K.
        dhat: images of its D-hat.
        images_seen: in its short pre-training.
        top1: on the images of D, in [0, 1].
        loss: mean cross-entropy on them, in nats.
        judged: how many these are.
    """

    images_per_class: int
    dhat: int
    images_seen: int
    top1: float
    loss: float
    judged: int

    @property
    def error(self) -> float:
        """The standard error of `top1`."""
        return sqrt(self.top1 * (1 - self.top1) / self.judged)


@dataclass(frozen=True)
class ChosenK:
    """The K that is taken, and why.

    Attributes:
        images_per_class: K.
        images: seen in all trials.
        rungs: the trials, of each rung in the order of K; none where there was one value alone.
    """

    images_per_class: int
    images: int
    rungs: tuple[tuple[Tried, ...], ...]

    def by_value(self) -> list[tuple[Tried, list[Tried | None]]]:
        """Each value of K as it was first tried, ascending, and what it came to in every rung; None in those that it did not enter."""
        each = [{one.images_per_class: one for one in tried} for tried in self.rungs]
        return [(one, [found.get(one.images_per_class) for found in each]) for one in (self.rungs or ((),))[0]]

    @property
    def judged(self) -> int:
        """Images of D that the trials were judged on."""
        return self.rungs[0][0].judged if self.rungs else 0

    @property
    def close(self) -> tuple[int, ...]:
        """The values of the last rung that are within a standard error of its best, ascending; the greatest of them is taken."""
        return close(self.rungs[-1]) if self.rungs else (self.images_per_class,)


def close(tried: Sequence[Tried]) -> tuple[int, ...]:
    """The values of K within a standard error of the best, ascending.

    The greatest of them is to be taken: short trainings favor few and clean images, as they end before more images tell. (With one seed of
    the demo, 200 of a class lead 350 at a quarter of the length, and are behind at its end.)
    """
    best = min(tried, key=order)
    return tuple(sorted(one.images_per_class for one in tried if one.top1 >= best.top1 - best.error))


def settle_k(
    this: Run,
    recipe: Recipe,
    network: Network,
    scores: Made[Scored],
    excluded: Made[Excluded] | None,
    data: LabeledData,
    pool: Made[Listed],
) -> Recipe:
    """The recipe with a number for K; as it is where it has one, or where the choice is still to be made in a plan."""
    settings, seed = recipe.select, recipe.seed_of("data")
    if settings.images_per_class != AUTO:
        return recipe

    def work(place: str) -> ChosenK:
        values = settings.tries or _ladder(recipe, scores, data)
        folder = storage.join(place, WORK)
        chosen, dhat = storage.join(folder, "selection"), storage.join(folder, "dhat")
        with this.display.task(this.named_as("chosen-k: selection"), scores.outputs.scored) as progress:
            largest = with_k(recipe, max(values)).select
            picked = pick(largest, score_table(scores, excluded, data), seed, chosen, progress)
        options = _options(recipe, picked.counts, values)
        if len(options) == 1:
            return ChosenK(options[0].images_per_class, 0, ())
        with this.display.task(this.named_as("chosen-k: dhat"), picked.selected) as progress:
            dhat_stage.materialize(
                chosen,
                images_of(pool),
                dhat,
                images_per_shard=recipe.dhat.images_per_shard,
                seed=seed,
                progress=progress,
            )
        trials = _Trials(this, network, recipe.pretrain, data, _judging(recipe.score), dhat, folder)
        return trials.run(options)

    inputs: dict[str, str | Outside] = {
        **data.train.inputs,
        **data.validation.inputs,
        **lists(settings),
        "scores": scores.fingerprint,
    }
    if excluded is not None:
        inputs["excluded"] = excluded.fingerprint
    if network.start is not None:
        inputs["start"] = network.start_fingerprint
    sections = {
        **network.sections,
        "select": settings,
        "dhat": recipe.dhat,
        "training": recipe.pretrain,
        "data_seed": seed,
    }
    key = Key("chosen-k", sections, inputs, watched=(*data.train.watched, *data.validation.watched))
    training = recipe.pretrain
    workers = Bundle(training.workers, training.cpus_per_worker, training.gpus_per_worker)
    field = "teacher.self_training.pretrain" if this.named_as("").startswith("self-training/") else "pretrain"
    made = this.once(key, ChosenK, work, demand=Demand(f"{field}.workers", training.workers, (workers,)))
    return recipe if made.record is None else with_k(recipe, made.outputs.images_per_class)


def with_k(recipe: Recipe, images_per_class: int) -> Recipe:
    """The recipe with this K: as one in which nothing was ever left open, so that both share what they make."""
    settings = recipe.select.model_copy(update={"images_per_class": images_per_class, "tries": None})
    return recipe.model_copy(update={"select": settings})


def _ladder(recipe: Recipe, scores: Made[Scored], data: LabeledData) -> tuple[int, ...]:
    classes, scored = len(data.class_names), scores.outputs.scored
    return ladder(data.train.made.outputs.images, scored, classes, recipe.pretrain.total_images(scored))


@dataclass(frozen=True)
class _Option:
    """A value of K: the ranks that each class may have at most [C], and how many images that comes to."""

    images_per_class: int
    quotas: tuple[int, ...]
    dhat: int


def _options(recipe: Recipe, counts: Sequence[int], values: Sequence[int]) -> list[_Option]:
    """The values of K, ascending, without those that select nothing more than a smaller one."""
    settings, seed = recipe.select, recipe.seed_of("data")
    zipf, weights = settings.zipf_exponent, settings.class_weights
    each = {
        k: quotas(k, len(counts), zipf_exponent=zipf, class_weights=weights, seed=seed).tolist()
        for k in sorted(set(values))
    }
    found: list[_Option] = []
    for (k, quota), dhat in zip(each.items(), sizes(counts, list(each.values())), strict=True):
        if not found or dhat > found[-1].dhat:
            found.append(_Option(k, tuple(quota), dhat))
    return found


def _judging(settings: Score) -> Score:
    """Every model sees the center of an image, as in the evaluation."""
    return settings.model_copy(update={"views": "center", "compile": False})


@dataclass(frozen=True)
class _Trials:
    """What the trials have in common.

    Attributes:
        score: how images pass through them to be judged.
        dhat: the largest D-hat.
        folder: of the work; what of it is there is kept.
    """

    this: Run
    network: Network
    training: Training
    data: LabeledData
    score: Score
    dhat: str
    folder: str

    def run(self, options: Sequence[_Option]) -> ChosenK:
        """All rungs: of each, the better half enters the next."""
        steps = rungs(len(options))
        total = sum(rung.share * self.training.total_images(options[-1].dhat) * rung.settings for rung in steps)
        tried: list[tuple[Tried, ...]] = []
        with self.this.display.task(self.this.named_as("chosen-k"), round(total)) as progress:
            for number, rung in enumerate(steps, 1):
                options = options if not tried else survivors(options, tried[-1], rung.settings)
                tried.append(self._rung(f"rung-{number}", rung.share, options, progress))
        return ChosenK(close(tried[-1])[-1], sum(one.images_seen for each in tried for one in each), tuple(tried))

    def _rung(self, name: str, share: float, options: Sequence[_Option], progress: Progress) -> tuple[Tried, ...]:
        """One trial of each value, all on one group of workers."""
        jobs = [self._job(f"{name}-k-{option.images_per_class}", share, option, progress) for option in options]
        if not storage.exists(storage.join(jobs[-1].out, CARD)):  # the last one is trained last
            fit_all(f"chosen-k-{name}", jobs, storage.join(self.folder, "fit"))
        models = {job.name: Candidate(job.out) for job in jobs}
        names = self.data.class_names
        parts = {each.folder: (each.load(), list(models)) for each in (self.data.train, self.data.validation)}
        judged = judge(models, parts, names, self.score)
        found = [{name: measured(table, len(names)) for name, table in part.items()} for part in judged.values()]
        return tuple(
            _tried(option, job, [part[job.name] for part in found]) for option, job in zip(options, jobs, strict=True)
        )

    def _job(self, name: str, share: float, option: _Option, progress: Progress) -> TrainingJob:
        names = self.data.class_names
        return TrainingJob(
            name=name,
            model=self.network.config,
            class_names=list(names),
            training=shortened(self.training, share, option.dhat),
            data=dhat_training_set(self.dhat, len(names), option.quotas),
            initial=None if self.network.afresh else self.network.start,
            fresh_head=self.network.fresh_head,
            out=storage.join(self.folder, name),
            seed=self.network.seed,
            progress=progress.part(name),
        )


def shortened(training: Training, share: float, images: int) -> Training:
    """The same training at a share of its length, in whole minibatches; its rate rises and drops at the same shares.

    Args:
        training: the whole one.
        share: from 0 to 1.
        images: of an epoch.
    """
    batch = training.global_batch
    seen = max(1, floor(share * training.total_images(images) / batch)) * batch
    return training.model_copy(update={"epochs": None, "images_seen": seen})


def order(tried: Tried) -> tuple[float, ...]:
    """A key for sorting: what is better comes first."""
    return (-tried.top1, tried.loss, tried.images_per_class)


def survivors(options: Sequence[_Option], tried: Sequence[Tried], count: int) -> list[_Option]:
    """So many of the options, those that did best, in their order."""
    best = {one.images_per_class for one in sorted(tried, key=order)[:count]}
    return [option for option in options if option.images_per_class in best]


def _tried(option: _Option, job: TrainingJob, parts: Sequence[Measured]) -> Tried:
    """What a trial came to on all parts of D."""
    judged = sum(part.images for part in parts)
    top1 = sum(part.images * part.top1 for part in parts) / judged
    loss = sum(part.images * part.loss for part in parts) / judged
    seen = job.training.steps(option.dhat) * job.training.global_batch
    return Tried(option.images_per_class, option.dhat, seen, top1, loss, judged)
