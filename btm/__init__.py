"""Train, merge and ensemble expert language models (Branch-Train-Merge, https://arxiv.org/abs/2208.03306).

>>> import btm
>>> forest = btm.Forest.open("outputs/demo")          # doctest: +SKIP
>>> ensemble = btm.load_forest_ensemble(forest)       # doctest: +SKIP

Importing this package costs nothing: each name is loaded when it is first used, torch when a model is.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btm.config import Config
    from btm.config_ensemble import EnsembleConfig
    from btm.errors import BtmError
    from btm.forest import Forest
    from btm.forest_models import load_forest_ensemble, merge_forest
    from btm.version import __version__

_HOMES = {
    "BtmError": "btm.errors",
    "Config": "btm.config",
    "EnsembleConfig": "btm.config_ensemble",
    "Forest": "btm.forest",
    "__version__": "btm.version",
    "load_forest_ensemble": "btm.forest_models",
    "merge_forest": "btm.forest_models",
}

__all__ = ["BtmError", "Config", "EnsembleConfig", "Forest", "__version__", "load_forest_ensemble", "merge_forest"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'btm' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)
