"""The paper's pipeline: section 3.2, from a recipe to a student. Section 3.3 and supplement 3 change the teacher alone."""

from dataclasses import dataclass

from cluster.store import Made
from pipeline.choosing import settle_k
from pipeline.context import Run
from pipeline.evaluation import Trained
from pipeline.recipe.sections import Recipe
from pipeline.stages import (
    Evaluated,
    LabeledData,
    Listed,
    evaluate,
    exclude,
    list_unlabeled,
    materialize,
    score_unlabeled,
    select_top_k,
    show_gallery,
    survey_labeled,
)
from pipeline.teaching import Network, Round, fine_tune, pretrain_on_weak_labels, ready_model, train


@dataclass(frozen=True)
class Result:
    """What a run comes to.

    Attributes:
        teacher: the first one.
        rounds: each from its teacher to its student, who teaches the next.
        baseline: the student's network, trained on D alone (Table 2, "Fully Supervised").
        evaluation: of all of them, on test images.
    """

    teacher: Made[Trained]
    rounds: list[Round]
    baseline: Made[Trained]
    evaluation: Made[Evaluated]


def run(this: Run, recipe: Recipe) -> Result:
    """Section 3.2, as often as the recipe has rounds (section 4.2).

    Raises:
        Reached: the stage `this.until` is made.
    """
    data = survey_labeled(this, recipe)  # D
    pool = list_unlabeled(this, recipe.unlabeled)  # U
    teacher = first = obtain_teacher(this, recipe, data, pool)  # (1)
    student = Network(recipe.student.model, recipe.seed_of("student"))
    rounds = []
    for number in range(1, recipe.rounds + 1):
        with this.named(f"round-{number}" if recipe.rounds > 1 else ""):
            rounds.append(distill(this, recipe, student, teacher, data, pool))
        teacher = rounds[-1].student
    this.call("student", teacher)
    baseline = train(this, "supervised", student, recipe.supervised, data.train, data)
    models = {"teacher": first, **models_of(rounds), "supervised": baseline}
    return Result(first, rounds, baseline, evaluate(this, data.test, models))


def obtain_teacher(this: Run, recipe: Recipe, data: LabeledData, pool: Made[Listed]) -> Made[Trained]:
    """(1) The teacher: trained on D, or ready; pre-trained on weak labels before that (section 3.3); taught by itself after that
    (supplement 3)."""
    wanted, seed = recipe.teacher, recipe.seed_of("teacher")
    with this.named("self-training" if wanted.self_training else ""):
        if wanted.ready is not None and wanted.training is None:
            teacher = ready_model(this, wanted.ready, data)
        else:
            assert wanted.training is not None
            network = Network.of(wanted, seed)
            if wanted.weak is not None:
                network = pretrain_on_weak_labels(this, wanted.weak, network, data)
            teacher = train(this, "teacher", network, wanted.training, data.train, data)
        if wanted.self_training is None:
            return teacher
        itself = Network.of(wanted, seed).afresh()
        course = recipe.model_copy(
            update={"pretrain": wanted.self_training.pretrain, "fine_tune": wanted.self_training.fine_tune}
        )
        teacher = distill(this, course, itself, teacher, data, pool).student
    this.call("teacher", teacher)
    return teacher


def distill(
    this: Run, recipe: Recipe, network: Network, teacher: Made[Trained], data: LabeledData, pool: Made[Listed]
) -> Round:
    """(2) to (4): from a teacher to a student."""
    scores = score_unlabeled(this, recipe.score, teacher, pool)  # (2), ranking
    excluded = exclude(this, recipe, teacher, scores, data, pool)
    recipe = settle_k(this, recipe, network, scores, excluded, data, pool)
    selection = select_top_k(this, recipe, scores, excluded, data, pool)  # (2), picking
    dhat = materialize(this, recipe, selection, data, pool)  # D-hat
    show_gallery(this, recipe, selection, dhat, data)
    pretrained = train(this, "pretrained", network, recipe.pretrain, dhat, data)  # (3)
    student = fine_tune(this, network, recipe.fine_tune, data, start=pretrained)  # (4)
    return Round(scores, selection, dhat, pretrained, student)


def models_of(rounds: list[Round]) -> dict[str, Made[Trained]]:
    """The models of each round, by their names in the run."""
    found: dict[str, Made[Trained]] = {}
    for number, each in enumerate(rounds, 1):
        prefix = f"round-{number}/" if len(rounds) > 1 else ""
        found |= {f"{prefix}pretrained": each.pretrained, f"{prefix}student": each.student}
    return found
