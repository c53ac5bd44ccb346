"""The command line, `tophat`."""

from pipeline.cli import (  # noqa: F401 - each adds its commands to the application
    data,
    evaluate,
    export,
    init,
    models,
    recipe,
    run,
    select,
)
from pipeline.cli.app import main as main
