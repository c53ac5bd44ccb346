"""The paper's pipeline.

Its name and those of the packages it is built on are common ones. They are loaded here, from where this one is, before anything else of
theirs can be asked for: else a `models.py` in a folder of the user's, which PYTHONPATH or `python -m` puts first, would be taken for ours.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for _name in ("cluster", "models", "tuning"):
    importlib.import_module(_name)
del sys.path[0]
