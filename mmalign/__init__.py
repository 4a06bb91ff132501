"""Align images and text in one embedding space, store the embeddings, and search them.

>>> import mmalign
>>> mmalign.__version__
'0.1.0'

Everything below is loaded on first use, so that importing the package costs nothing:

    train(sources, out)              pairs -> a run folder with the model
    load_model(run)                  a run folder or the name of a pretrained model -> `Encoder`
    embed(model, sources, out)       images and captions -> a store
    build_index(store)               an index over a store, its recall measured
    evaluate(model, sources)         recall@k, zero-shot accuracy
    open_store(path)                 the newest generation of a store -> `Store`
    Searcher.open(store)             ready to search; `Query` and `Row` are ways to ask
    register_modality(...)           one more kind of item to embed and search, see
                                     `examples/palettes.py`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.data import SampleProblem as SampleProblem
    from mmalign.embedding.embed import embed as embed
    from mmalign.encoding.modalities import register_modality as register_modality
    from mmalign.encoding.modality_encoder import Decoded as Decoded
    from mmalign.encoding.modality_encoder import ModalityEncoder as ModalityEncoder
    from mmalign.evaluation.evaluate import evaluate as evaluate
    from mmalign.items import Row as Row
    from mmalign.modality import Modality as Modality
    from mmalign.model import Encoder as Encoder
    from mmalign.model import load_model as load_model
    from mmalign.search.build import build_index as build_index
    from mmalign.search.query import Query as Query
    from mmalign.search.searcher import Searcher as Searcher
    from mmalign.search.several import MultiSearcher as MultiSearcher
    from mmalign.store import open_store as open_store
    from mmalign.training.settings import TrainConfig as TrainConfig
    from mmalign.training.train import train as train

__version__ = "0.1.0"
__all__ = [
    "Decoded", "Encoder", "Modality", "ModalityEncoder", "MultiSearcher", "Query", "Row",
    "SampleProblem", "Searcher", "TrainConfig", "__version__", "build_index", "embed", "evaluate",
    "load_model", "open_store", "register_modality", "train",
]  # fmt: skip

_HOME = {
    "Decoded": "mmalign.encoding.modality_encoder",
    "Encoder": "mmalign.model",
    "Modality": "mmalign.modality",
    "ModalityEncoder": "mmalign.encoding.modality_encoder",
    "MultiSearcher": "mmalign.search.several",
    "Query": "mmalign.search.query",
    "Row": "mmalign.items",
    "SampleProblem": "mmalign.data",
    "Searcher": "mmalign.search.searcher",
    "TrainConfig": "mmalign.training.settings",
    "build_index": "mmalign.search.build",
    "embed": "mmalign.embedding.embed",
    "evaluate": "mmalign.evaluation.evaluate",
    "load_model": "mmalign.model",
    "open_store": "mmalign.store",
    "register_modality": "mmalign.encoding.modalities",
    "train": "mmalign.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmalign' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
