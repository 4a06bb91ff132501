"""Align images and text, store their embeddings, and find one by the other.

>>> import mmalign
>>> mmalign.__version__
'0.1.0'

The three doors for a program are loaded on first use, so that importing the package costs nothing:
`load_model(run)`, `open_store(path)` and `Searcher.open(store)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.model import load_model as load_model
    from mmalign.search.searcher import Searcher as Searcher
    from mmalign.store import open_store as open_store

__version__ = "0.1.0"
__all__ = ["Searcher", "__version__", "load_model", "open_store"]

_HOME = {
    "load_model": "mmalign.model",
    "open_store": "mmalign.store",
    "Searcher": "mmalign.search.searcher",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmalign' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
