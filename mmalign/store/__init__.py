"""Embeddings on disk: immutable Arrow shards under one manifest generation, as in docs/format.md.

schema.py     columns of a shard; what a row is
fields.py     metadata as typed columns, beside the JSON
manifest.py   one generation of a store: the only commit point
model_card.py the model of a store: its space, and a tower for each modality
groups.py     what a generation names: groups of shards, and their deleted rows
shards.py     one shard: written once, checked before it is read
ids.py        ids -> rows, by sorted hashes
receipts.py   rows -> shards and a receipt -> manifest
writer.py     rows one by one, written and committed together
reader.py     a manifest -> memory-mapped vectors and rows
where.py      select rows by SQL
phrases.py    select rows by what their captions say
failures.py   every sample without an embedding, and why
changes.py    delete, compact, join small shards
update.py     fields of meta, without embedding
merge.py      several stores -> one
garbage.py    removal of files that are no longer needed
health.py     verify
repair.py     a generation without the damaged files
format2.py    how format 2 wrote shards
upgrade.py    format 2 -> format 3
swap.py       vectors of a new model beside the current ones, and the swap
"""

from mmalign.store.changes import CompactReport as CompactReport
from mmalign.store.changes import ManyDeletions as ManyDeletions
from mmalign.store.changes import compact as compact
from mmalign.store.changes import delete as delete
from mmalign.store.changes import delete_rows as delete_rows
from mmalign.store.changes import join_small_shards as join_small_shards
from mmalign.store.changes import require_few as require_few
from mmalign.store.failures import add_failures as add_failures
from mmalign.store.health import verify as verify
from mmalign.store.manifest import commit_index as commit_index
from mmalign.store.merge import MergeReport as MergeReport
from mmalign.store.merge import merge as merge
from mmalign.store.model_card import ModelCard as ModelCard
from mmalign.store.model_card import Tower as Tower
from mmalign.store.model_card import joined_model as joined_model
from mmalign.store.reader import Store as Store
from mmalign.store.reader import open_or_new as open_or_new
from mmalign.store.reader import open_store as open_store
from mmalign.store.receipts import Committer as Committer
from mmalign.store.receipts import Receipt as Receipt
from mmalign.store.receipts import commit_receipts as commit_receipts
from mmalign.store.receipts import write_rows as write_rows
from mmalign.store.repair import RepairReport as RepairReport
from mmalign.store.repair import repair as repair
from mmalign.store.schema import UNKNOWN as UNKNOWN
from mmalign.store.schema import Row as Row
from mmalign.store.schema import meta_json as meta_json
from mmalign.store.schema import pair_vectors as pair_vectors
from mmalign.store.swap import NextSpace as NextSpace
from mmalign.store.update import UpdateReport as UpdateReport
from mmalign.store.update import update as update
from mmalign.store.update import update_rows as update_rows
from mmalign.store.upgrade import UpgradeReport as UpgradeReport
from mmalign.store.upgrade import upgrade as upgrade
from mmalign.store.writer import ROWS_PER_SHARD as ROWS_PER_SHARD
from mmalign.store.writer import Writer as Writer

__all__ = [
    "ROWS_PER_SHARD",
    "UNKNOWN",
    "Committer",
    "CompactReport",
    "ManyDeletions",
    "MergeReport",
    "ModelCard",
    "NextSpace",
    "Receipt",
    "RepairReport",
    "Row",
    "Store",
    "Tower",
    "UpdateReport",
    "UpgradeReport",
    "Writer",
    "add_failures",
    "commit_index",
    "commit_receipts",
    "compact",
    "delete",
    "delete_rows",
    "join_small_shards",
    "joined_model",
    "merge",
    "meta_json",
    "open_or_new",
    "open_store",
    "pair_vectors",
    "repair",
    "require_few",
    "update",
    "update_rows",
    "upgrade",
    "verify",
    "write_rows",
]
