"""Write rows to shards and commit shards in a generation; a crash loses only uncommitted rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from mmalign import files
from mmalign.store import manifest as manifests
from mmalign.store.groups import Groups
from mmalign.store.ids import OpenShards
from mmalign.store.manifest import Manifest, ModelCard
from mmalign.store.schema import Row, row_batch, thumbnail_batch, vector_batch
from mmalign.store.shards import write_shard

ROWS_PER_SHARD = 10_000


class Writer:
    """Adds rows to a store. A row is acknowledged once `commit` has returned; final.

    Each id has at most one live row: a new row replaces the old one in the same generation. Used
    as a context manager, it commits the remaining rows at the end; after an error it does not.
    """

    def __init__(
        self,
        store: Path,
        model: ModelCard,
        rows_per_shard: int = ROWS_PER_SHARD,
        *,
        precision: str = "",
    ) -> None:
        """Open or create a store.

        Args:
            store: The folder.
            model: The model that made the vectors.
            rows_per_shard: Rows that are written and committed together.
            precision: The arithmetic that the vectors were computed in, to be recorded.

        Raises:
            IdentityError: The store holds embeddings of another model.
            StoreError: Its newest generation is damaged.
        """
        self.store, self.model, self.rows_per_shard = store, model, rows_per_shard
        self.precision = precision
        self._rows: dict[str, Row] = {}
        self._replaced: set[str] = set()
        self._open_shards, self._groups = OpenShards(store, model), Groups(store)
        for folder in ("shards", "groups"):
            files.make_folder(store / folder)
        manifests.commit(store, self._check, model, groups=self._groups)

    def _check(self, base: Manifest) -> Manifest:
        manifests.require_model(self.store, base, self.model)
        return base

    def add(self, row: Row, replaces: Sequence[str] = ()) -> bool:
        """Add a row; return True if that filled a shard and committed it.

        Args:
            row: The row; it replaces the row with the same id.
            replaces: Ids of other rows to delete in the same commit.
        """
        self._replaced.update(replaces)
        self._rows.pop(row.id, None)
        self._rows[row.id] = row
        if len(self._rows) < self.rows_per_shard:
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """Write the rows added since the last commit as one shard and commit it in a generation."""
        if not self._rows:
            return
        ids = list(self._rows)
        rows = list(self._rows.values())
        shard = write_shard(
            self.store,
            row_batch(rows),
            vector_batch(rows, self.model.dim, self.model.positions),
            thumbnail_batch([row.thumbnail for row in rows]),
            precision=self.precision,
            space=self.model.identity,
        )

        def change(base: Manifest) -> Manifest:
            others = [s for s in self._check(base).shards if s.name != shard.name]
            gone = [*ids, *self._replaced]
            kept = self._open_shards.with_ids_deleted(others, gone)
            return replace(base, shards=(*kept, shard))

        manifests.commit(self.store, change, self.model, groups=self._groups)
        self._rows, self._replaced = {}, set()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ctrl-C keeps the rows embedded so far; a failure of the writer must not be repeated.
        if kind is None or kind is KeyboardInterrupt:
            self.commit()
