"""How long a plan takes, and how it is made to take less."""

from dataclasses import dataclass, replace

from pipeline.guide.decide import CPU_SIZE, SIZES, Choice, Lengths, Plan
from pipeline.guide.findings import Findings
from tuning.halving import rungs

FLOOR = 1 / 3
"""What a length is shortened to, at most."""


@dataclass(frozen=True)
class Costs:
    """Seconds that one image takes on one worker.

    Attributes:
        size: of the input that they were measured at.
        teacher_step: of the teacher, forward and backward.
        student_step: of the student.
        teacher_forward: of the teacher, forward.
        decode: an image of D, in training.
        pool_decode: an image of U, in training.
        score_decode: an image of U, for the teacher.
    """

    size: int
    teacher_step: float
    student_step: float
    teacher_forward: float
    decode: float
    pool_decode: float
    score_decode: float


TRAINING_START, SCORING_START, OTHERS = 14.0, 14.0, 30.0
"""Seconds until a training's workers learn, until an actor scores, and of everything that is not one of these (2 cores)."""


def estimate(plan: Plan, costs: Costs, found: Findings) -> dict[str, float]:
    """Seconds of each stage, by name."""
    larger = (plan.size.value / costs.size) ** 2
    forward = costs.teacher_forward * (larger if plan.teacher.value is not None else 1.0)
    machine, seen, pool = found.machine, plan.lengths.value, found.unlabeled.images
    learnt = {
        "teacher": seen.teacher * (larger * costs.teacher_step + costs.decode),
        "pretrained": seen.pretrain * (larger * costs.student_step + costs.pool_decode),
        "student": len(plan.rates.value) * seen.fine_tune * (larger * costs.student_step + costs.decode),
        "supervised": seen.supervised * (larger * costs.student_step + costs.decode),
    }
    starts = {name: TRAINING_START * (len(plan.rates.value) if name == "student" else 1) for name in learnt}
    trained = {name: starts[name] + seconds / plan.workers for name, seconds in learnt.items()}
    if plan.teacher.value is None:  # features of D, where its head is fitted
        trained["teacher"] = SCORING_START + found.labeled.images * (forward + costs.score_decode)
    shared = pool * (forward + costs.score_decode) / machine.cores
    scored = pool * max(forward / machine.gpus, costs.score_decode / machine.cores) if machine.gpus else shared
    tried = rungs(len(plan.tries)) if plan.tries else []
    choice = sum(rung.settings * (TRAINING_START + rung.share * learnt["pretrained"] / plan.workers) for rung in tried)
    chosen = {"choice of K": choice} if tried else {}
    return {
        "teacher": trained.pop("teacher"),
        "scores": SCORING_START + scored,
        **chosen,
        **trained,
        "the rest": OTHERS,
    }


def in_time(plan: Plan, costs: Costs, found: Findings, minutes: float) -> Plan:
    """The plan, shortened until it takes no longer: first its trainings, to a third at most, then its input."""
    whole = sum(estimate(plan, costs, found).values())
    if whole <= 60 * minutes:
        return plan
    # Weights that were made for larger images say little about small ones.
    least = min(SIZES) if plan.start is None else CPU_SIZE if plan.start.resizable else plan.size.value
    for size in [plan.size.value, *(size for size in reversed(SIZES) if least <= size < plan.size.value)]:
        smaller = replace(plan, size=Choice(size, plan.size.why))
        fixed = sum(estimate(replace(smaller, lengths=Choice(Lengths(0, 0, 0, 0), "")), costs, found).values())
        moving = sum(estimate(smaller, costs, found).values()) - fixed
        factor = min(1.0, (60 * minutes - fixed) / max(moving, 1e-9))
        if factor >= FLOOR:
            return _shortened(smaller, plan, factor, minutes)
    shortest = _shortened(smaller, plan, FLOOR, minutes)
    takes = sum(estimate(shortest, costs, found).values()) / 60
    return replace(
        shortest,
        notes=(*shortest.notes, f"that is still {takes:.0f} minutes: take a smaller part of U, or a faster machine"),
    )


def _shortened(plan: Plan, before: Plan, factor: float, minutes: float) -> Plan:
    notes = []
    if plan.size.value < before.size.value:
        notes.append(
            f"the input was made smaller ({plan.size.value} and not {before.size.value} pixels) for {minutes:g} minutes"
        )
    if factor < 1:
        notes.append(f"trainings were shortened to {factor:.0%} for {minutes:g} minutes")
    return replace(plan, lengths=Choice(plan.lengths.value.times(factor), plan.lengths.why), notes=tuple(notes))


def slow_images(plan: Plan, costs: Costs) -> str | None:
    """What to do where decoding takes most of the time, because the images are much larger than the input."""
    if max(costs.decode, costs.pool_decode) < costs.student_step or plan.machine.gpus:
        return None
    side = 2 * plan.size.value
    return (
        f"decoding an image takes longer than training on it ({1000 * max(costs.decode, costs.pool_decode):.0f} and "
        f"{1000 * costs.student_step:.0f} ms): `tophat ingest --resize {side}` makes small copies, once"
    )
