"""The command line, `tophat`."""

from pipeline.cli import data, models, run, select  # noqa: F401 - each adds its commands to the application
from pipeline.cli.app import main as main
