"""Rows into shards, shards into a manifest generation; a crash costs what was not committed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from mmalign import files
from mmalign.store import manifest as manifests
from mmalign.store.ids import KnownIds
from mmalign.store.manifest import Manifest, ModelCard
from mmalign.store.schema import Row, to_batch
from mmalign.store.shards import write_shard

ROWS_PER_SHARD = 10_000


class Writer:
    """Puts rows into a store. A row is acknowledged once `commit` has returned; final.

    An id is live once: a row replaces the one that had its id, in the generation that adds it.
    Used as a context manager it commits what is left at the end, and after an error nothing that
    was not committed before.
    """

    def __init__(self, store: Path, model: ModelCard, rows_per_shard: int = ROWS_PER_SHARD) -> None:
        """Open or create a store.

        Raises:
            IdentityError: The store holds embeddings of another model.
            StoreError: Its newest generation is damaged.
        """
        self.store, self.model, self.rows_per_shard = store, model, rows_per_shard
        self._rows: dict[str, Row] = {}
        self._replaced: set[str] = set()
        self._known = KnownIds(store, model.dim)
        files.make_folder(store / "shards")
        manifests.commit(store, self._check, model)

    def _check(self, held: Manifest) -> Manifest:
        manifests.require_model(self.store, held, self.model)
        return held

    def add(self, row: Row, replaces: Sequence[str] = ()) -> bool:
        """Take a row; True when that filled a shard and committed it.

        Args:
            row: It replaces the row that has its id.
            replaces: Ids of other rows that go in the same commit.
        """
        self._replaced.update(replaces)
        self._rows.pop(row.id, None)
        self._rows[row.id] = row
        if len(self._rows) < self.rows_per_shard:
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """Write the rows taken since the last commit as one shard, and name it in a generation."""
        if not self._rows:
            return
        ids = list(self._rows)
        shard = write_shard(self.store, to_batch(list(self._rows.values()), self.model.dim))
        self._known.learn(shard, ids)

        def change(base: Manifest) -> Manifest:
            others = [s for s in self._check(base).shards if s.name != shard.name]
            gone = [*ids, *self._replaced]
            return replace(base, shards=(*self._known.without(others, gone), shard))

        manifests.commit(self.store, change, self.model)
        self._rows, self._replaced = {}, set()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ctrl-C keeps what was embedded; a failure of the writer itself must not be repeated.
        if kind is None or kind is KeyboardInterrupt:
            self.commit()
