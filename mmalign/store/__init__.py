"""Embeddings on disk: immutable Arrow shards under one manifest generation, as in docs/format.md.

schema.py     columns of a shard; what a row is
manifest.py   one generation of a store: the only commit point
writer.py     rows -> shards -> manifest
reader.py     a manifest -> memory-mapped vectors and rows; verify
"""

from mmalign.store.manifest import ModelCard as ModelCard
from mmalign.store.manifest import commit_index as commit_index
from mmalign.store.reader import Store as Store
from mmalign.store.reader import open_store as open_store
from mmalign.store.reader import verify as verify
from mmalign.store.schema import Row as Row
from mmalign.store.writer import Writer as Writer

__all__ = ["ModelCard", "Row", "Store", "Writer", "commit_index", "open_store", "verify"]
