"""Tilewright: papers as passes. A compiler-style graph optimization toolkit for PyTorch models.

The public surface is small and lazily imported, so that `import tilewright` costs milliseconds.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A checkout without symbolic links still finds the layers one folder up.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

if TYPE_CHECKING:
    from tilewright.frontends.api import Executable, evaluate, explain, optimize
    from tilewright.frontends.export.api import export
    from tilewright.frontends.export.language_package import load_language_model
    from tilewright.frontends.kv_cache import kv_cache
    from tilewright.frontends.kv_prefix import prefix_cache
    from tilewright.frontends.speculate import speculate
    from tilewright.frontends.weight_offload import offload_weights
    from tilewright.frontends.window_search import WindowSearch

_PUBLIC = {
    "WindowSearch": "tilewright.frontends.window_search",
    "Executable": "tilewright.frontends.api",
    "evaluate": "tilewright.frontends.api",
    "explain": "tilewright.frontends.api",
    "export": "tilewright.frontends.export.api",
    "kv_cache": "tilewright.frontends.kv_cache",
    "load_language_model": "tilewright.frontends.export.language_package",
    "offload_weights": "tilewright.frontends.weight_offload",
    "optimize": "tilewright.frontends.api",
    "prefix_cache": "tilewright.frontends.kv_prefix",
    "speculate": "tilewright.frontends.speculate",
}

__all__ = [
    "Executable",
    "WindowSearch",
    "__version__",
    "evaluate",
    "explain",
    "export",
    "kv_cache",
    "load_language_model",
    "offload_weights",
    "optimize",
    "prefix_cache",
    "speculate",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in ("compiler", "passes", "runtime", "kernels", "frontends", "tools"):
        return importlib.import_module(f"tilewright.{name}")
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
