"""Vectors in, row numbers and scores out: exact search, and an IVF index above 50,000 rows.

    spec.py      which index, with which parameters; how one is chosen
    exact.py     every row compared; the truth that recall is measured against
    ivf.py       inverted lists; the only file that imports faiss
    folder.py    an index on disk: build, measure, open

Installed as `mmalign.index`. It knows neither stores nor models: it is given vectors.
"""

from mmalign.index.exact import Exact as Exact
from mmalign.index.exact import Extended as Extended
from mmalign.index.folder import build_index as build_index
from mmalign.index.folder import describe as describe
from mmalign.index.folder import open_index as open_index
from mmalign.index.folder import write_description as write_description
from mmalign.index.spec import Index as Index
from mmalign.index.spec import Spec as Spec
from mmalign.index.spec import choose as choose

__all__ = [
    "Exact",
    "Extended",
    "Index",
    "Spec",
    "build_index",
    "choose",
    "describe",
    "open_index",
    "write_description",
]
