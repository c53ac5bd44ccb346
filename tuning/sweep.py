"""A sweep: the same trial at several settings, on Ray Tune; the best one wins."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import storage
from cluster.errors import InputError, LastingError, StageError, one_line

METRIC = "val_top1"
TIE_BREAKER = "val_loss"
ERROR, LASTING = "error", "lasting"
"""What a trial reports that failed: why, and whether it would again."""


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it.

    Attributes:
        learning_rate: the setting, per 256 images.
        metrics: what the trial measured, `val_top1` (in [0, 1]) and `val_loss` among it; empty when it failed.
        error: one line, when it failed.
        lasting: whether it would fail so again, which is a result.
    """

    learning_rate: float
    metrics: dict[str, float]
    error: str | None = None
    lasting: bool = False


def sweep(
    name: str,
    learning_rates: Sequence[float],
    trial: Callable[[float, Any], Mapping[str, float | None]],
    *,
    concurrent: int,
    work: str,
) -> list[Trial]:
    """Runs `trial` once for every learning rate.

    A trial starts its own training workers, so it reserves nothing for itself.

    Args:
        name: of the sweep; a file name.
        learning_rates: distinct settings.
        trial: gets the learning rate and a `ray.train.UserCallback` that passes reports on to Tune; returns the final metrics.
        concurrent: trials that run at the same time.
        work: folder for Tune's own state while the sweep lasts.

    Returns:
        The trials, in the order of `learning_rates`: those that failed, too, and those of which Tune has nothing to say.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    def trainable(config: dict[str, Any]) -> None:
        callback: Any = TuneReportCallback
        try:
            metrics = trial(config["learning_rate"], callback())
        except (StageError, InputError) as error:
            tune.report({ERROR: str(error), LASTING: isinstance(error, LastingError)})
        else:
            tune.report({**metrics})

    filesystem, path = storage.ray_filesystem(work)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"memory": 1}),
        param_space={"learning_rate": tune.grid_search(list(learning_rates))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(name=name, storage_path=path, storage_filesystem=filesystem, verbose=0),
    )
    found: dict[float, Trial] = {}
    results = tuner.fit()
    for result in (results[number] for number in range(len(results))):
        rate, metrics = float((result.config or {})["learning_rate"]), result.metrics or {}
        if result.error is not None:
            found[rate] = Trial(rate, {}, one_line(str(result.error).strip().rpartition("\n")[2]))
        elif ERROR in metrics:
            found[rate] = Trial(rate, {}, one_line(metrics[ERROR]), metrics[LASTING])
        else:
            numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
            found[rate] = Trial(rate, {key: value for key, value in numbers.items() if math.isfinite(value)})
    storage.delete_tree(storage.join(work, name))
    return [found.get(rate, Trial(rate, {}, "ended without a result")) for rate in learning_rates]


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest `val_top1`; among equals the lowest `val_loss`, then the lowest learning rate."""
    finished = [trial for trial in trials if METRIC in trial.metrics]
    return min(finished, key=lambda t: (-t.metrics[METRIC], t.metrics.get(TIE_BREAKER, math.inf), t.learning_rate))
