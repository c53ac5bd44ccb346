"""The exception tree.

TophatError                   anything this project raises on purpose
├── InputError                a mistake in what the user gave: one line, exit code 2
│   ├── RecipeError           a recipe field (unknown key, out of bounds, contradicting another)
│   ├── RecipeErrors          several of them: a line each
│   ├── SourceError           a source that is missing, unreadable, or not what it says it is
│   ├── StorageError          an object store or path that refuses (credentials, bucket, permission)
│   │   └── MissingError      nothing is at a path or key; a missing bucket is a refusal
│   ├── ModelError            a model directory or architecture that cannot be used
│   ├── ResourceError         the cluster cannot ever run what the recipe asks for
│   ├── ClusterError          a cluster that cannot be reached, refuses the token, or does not have the job
│   └── RunError              a run directory that cannot be used (it belongs to another recipe, ...)
├── StageError                a stage that failed for a reason which is not the user's input
│   └── LastingError          the same stage would fail so again: a loss that is no number
└── Interrupted               a signal ended what has more to say about it than `cluster.interrupt` has
"""

from collections.abc import Sequence


class TophatError(Exception):
    """Base of every error raised on purpose."""


class InputError(TophatError):
    """A user's mistake, reported in one line: the field, the value, the rule, the fix.

    Args:
        field: what was set, in the user's own terms (`select.images_per_class`, `--model`).
        value: the value that was got.
        rule: what holds for it, as a clause ("must be at most 10, the number of classes").
        fix: what to do, in the imperative.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        self.fix = fix
        super().__init__(one_line(f"{field} = {shown(value)}: {rule}; {fix}"))

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.rule, self.fix)


class RecipeError(InputError):
    """A field of a recipe."""


class RecipeErrors(InputError):  # noqa: N818 - several
    """Several mistakes of a recipe, told in one answer: how many there are, and below it a line for each.

    Args:
        mistakes: at least one; what `InputError` says of a mistake is said of the first.
    """

    MOST = 20
    """Mistakes that are told; a person corrects no more at once."""

    def __init__(self, mistakes: Sequence[RecipeError]) -> None:
        first = mistakes[0]
        super().__init__(first.field, first.value, first.rule, first.fix)
        self.mistakes = tuple(mistakes)

    def __str__(self) -> str:
        told = [str(one) for one in self.mistakes[: self.MOST]]
        more = [f"and {len(self.mistakes) - self.MOST:,} more"] if len(self.mistakes) > self.MOST else []
        return "\n  ".join([f"{len(self.mistakes):,} mistakes:", *told, *more])

    def __reduce__(self) -> tuple[type["RecipeErrors"], tuple[tuple[RecipeError, ...]]]:  # type: ignore[override]
        return type(self), (self.mistakes,)


class SourceError(InputError):
    """A source of images."""


class StorageError(InputError):
    """A path or an object store."""


class MissingError(StorageError):
    """Nothing is at a path, or at a key of a bucket that exists."""


class ModelError(InputError):
    """A model directory or an architecture."""


class ResourceError(InputError):
    """More CPUs, GPUs or memory than the cluster can ever have."""


class ClusterError(InputError):
    """A cluster's address, token or job."""


class RunError(InputError):
    """A run directory."""


class StageError(TophatError):
    """A stage that failed although its input was sound.

    Args:
        message: what failed, and why.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[type["StageError"], tuple[str]]:
        return type(self), (self.message,)  # whatever Ray adds to the text on the way


class LastingError(StageError):
    """A stage that would fail in the same way again: among the settings that are tried, that is a result."""


class Interrupted(TophatError):  # noqa: N818 - no fault of anybody's
    """What follows from an interruption where it is not what `cluster.interrupt.INTERRUPTED` says; raised from a KeyboardInterrupt.

    Args:
        message: one line that begins with "interrupted; ".
    """


def shown(value: object, limit: int = 120) -> str:
    """`value` for a message: quoted when it is text, and never long."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str) -> str:
    """`text` on one line, without control characters (names in messages are hostile)."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
