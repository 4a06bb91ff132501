"""Vectors in, the nearest rows out: exact search, and an index with a recall target.

    spec.py          the index interface, and the index specs to choose from
    exact.py         exact search; the ground truth for recall
    vectors.py       stored vectors in any number of shards
    owners.py        rows with several vectors: each is found once
    quantizer.py     the coarse quantizer of an IVF, in the metric of the queries
    approximate.py   candidates from FAISS, scored exactly; the only file that imports faiss
    mapped.py        lists that stay in a file, so that opening reads none of them
    measure.py       recall, latency and the parameters that give them
    plan.py          which spec is built: rounds on samples, then all rows
    report.py        what was tried, as a table
    folder.py        an index on disk: build, open

Installed as `mmalign.index`. It depends on neither stores nor models, only on vectors.
"""

from mmalign.index.exact import Exact as Exact
from mmalign.index.exact import Extended as Extended
from mmalign.index.folder import describe as describe
from mmalign.index.folder import open_index as open_index
from mmalign.index.folder import write_description as write_description
from mmalign.index.folder import write_index as write_index
from mmalign.index.owners import Owners as Owners
from mmalign.index.plan import Queries as Queries
from mmalign.index.report import table as table
from mmalign.index.spec import Index as Index
from mmalign.index.vectors import VectorReader as VectorReader

__all__ = [
    "Exact",
    "Extended",
    "Index",
    "Owners",
    "Queries",
    "VectorReader",
    "describe",
    "open_index",
    "table",
    "write_description",
    "write_index",
]
