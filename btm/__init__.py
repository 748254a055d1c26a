"""Train, merge and ensemble expert language models (Branch-Train-Merge, https://arxiv.org/abs/2208.03306).

>>> import btm
>>> forest = btm.Forest.open("outputs/demo")          # doctest: +SKIP
>>> ensemble = btm.load_forest_ensemble(forest)       # doctest: +SKIP

Importing this package is fast: torch and transformers are imported when a model is first loaded.
"""

from btm.config import Config, EnsembleConfig
from btm.errors import BtmError
from btm.forest import Forest
from btm.forest_models import load_forest_ensemble, merge_forest
from btm.version import __version__

__all__ = ["BtmError", "Config", "EnsembleConfig", "Forest", "__version__", "load_forest_ensemble", "merge_forest"]
