"""upgrade: make a store of format 3 of one of format 2."""

from dataclasses import dataclass, replace
from pathlib import Path

from mmalign.errors import StoreError
from mmalign.progress import bar
from mmalign.store import manifest as manifests
from mmalign.store.changes import undamaged_tables
from mmalign.store.groups import Shard
from mmalign.store.manifest import Manifest
from mmalign.store.shards import write_tables


@dataclass(frozen=True)
class UpgradeReport:
    """What `upgrade` did."""

    generation: int
    rows: int
    shards: int
    """Shards that were written anew."""
    format_before: int


def upgrade(path: str | Path) -> UpgradeReport:
    """Write the shards of a store anew in format 3 and commit them in one generation.

    Rows keep their numbers, so an index stays. Until the commit the store is as it was; if the
    process is killed, run it again. The old files are removed by `compact` after an hour.

    Raises:
        StoreError: A shard is damaged, or the store was changed meanwhile; nothing was changed.
    """
    store = Path(path)
    before = manifests.newest(store)
    old = [shard for shard in before.shards if is_old(shard)]
    written: dict[str, Shard] = {}
    with bar("upgrade", sum(shard.rows for shard in old), "rows") as progress:
        for shard in old:
            tables = undamaged_tables(store, shard, before.model)
            space = before.model.identity
            written[shard.name] = write_tables(store, *tables, name=shard.name, space=space)
            progress.update(shard.rows)

    def change(base: Manifest) -> Manifest:
        if any(is_old(shard) and shard.name not in written for shard in base.shards):
            raise StoreError(f"{store}: rows were added during the upgrade; run it again")
        return replace(base, shards=tuple(_exchanged(shard, written) for shard in base.shards))

    after = manifests.commit(store, change, before.model, upgrade=True)
    return UpgradeReport(after.generation, after.rows, len(old), before.format)


def is_old(shard: Shard) -> bool:
    """Return whether a shard is one file, as in format 2."""
    return shard.row_file == shard.vector_file


def _exchanged(shard: Shard, written: dict[str, Shard]) -> Shard:
    if not is_old(shard):
        return shard
    new = written[shard.name]
    return replace(new, deleted_rows=shard.deleted_rows, deleted=shard.deleted)
