"""Time filtered batch normalization against what it replaces: single layers, and training steps of whole models; and
compare the figures to what they shall be.

``run(Settings(...))`` gives results as plain JSON types, ``markdown`` tables and ``plot`` a picture of them. The rows
are in :mod:`.rows`, the aims in :mod:`.targets`.
"""

from fbn_plugin.engine.benchmark.picture import plot
from fbn_plugin.engine.benchmark.report import markdown
from fbn_plugin.engine.benchmark.runner import load, run
from fbn_plugin.engine.benchmark.settings import DEFAULT_MODELS, MODELS, Settings

__all__ = ["DEFAULT_MODELS", "MODELS", "Settings", "load", "markdown", "plot", "run"]
