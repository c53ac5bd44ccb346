"""The learning rate as a pure function of the images seen (section 4.1)."""

from models.config import Training


def learning_rate(training: Training, images_seen: int, total_images: int) -> float:
    """The learning rate of the step that starts when `images_seen` images have been processed.

    A linear warm-up from `training.learning_rate` to the peak (`learning_rate / 256 * batch_size * workers`) over the
    first `training.warmup` of the run; from then on the peak, multiplied by `drop_factor` at each of `drops` equally
    spaced points: drop k of n comes when k / (n + 1) of the run is done, so that every drop takes effect.

    Section 4.1: "we use a warm-up from 0.1 to 0.1/256 x 1536", "decrease the learning rate by a factor of 2 at equally
    spaced steps such that the total number of reductions is 13 over the course of training".

    Args:
        training: the recipe's section.
        images_seen: images processed before this step, over all workers; 0 <= images_seen <= total_images.
        total_images: images of the whole run.

    Returns:
        The learning rate, in the units of `torch.optim.SGD`.
    """
    peak = training.peak_learning_rate
    warmup_images = training.warmup * total_images
    if images_seen < warmup_images:
        start = min(training.learning_rate, peak)
        return start + (peak - start) * images_seen / warmup_images
    passed = min(training.drops, images_seen * (training.drops + 1) // total_images)
    return peak * float(training.drop_factor**passed)


def due(step: int, steps: int, times: int) -> bool:
    """Whether, of `times` equally spaced points in `steps`, one falls on the end of `step` (1-based)."""
    return step * times // steps != (step - 1) * times // steps
