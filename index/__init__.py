"""Vectors in, row numbers and scores out: exact search, and an index that keeps a promised recall.

    spec.py          what an index is, and the designs to choose from
    exact.py         every row compared; the truth that recall is measured against
    vectors.py       stored vectors, wherever their shards lie
    quantizer.py     which list of an IVF a vector belongs to, as its queries see it
    approximate.py   candidates from FAISS, scored exactly; the only file that imports faiss
    mapped.py        lists that stay in a file, so that opening reads none of them
    measure.py       recall, latency and the parameters that give them
    plan.py          which design is built: rounds on samples, then all rows
    report.py        what was tried, as a table
    folder.py        an index on disk: build, open

Installed as `mmalign.index`. It knows neither stores nor models: it is given vectors.
"""

from mmalign.index.exact import Exact as Exact
from mmalign.index.exact import Extended as Extended
from mmalign.index.folder import describe as describe
from mmalign.index.folder import open_index as open_index
from mmalign.index.folder import write_description as write_description
from mmalign.index.folder import write_index as write_index
from mmalign.index.plan import Queries as Queries
from mmalign.index.report import table as table
from mmalign.index.spec import Index as Index
from mmalign.index.vectors import VectorReader as VectorReader

__all__ = [
    "Exact",
    "Extended",
    "Index",
    "Queries",
    "VectorReader",
    "describe",
    "open_index",
    "table",
    "write_description",
    "write_index",
]
