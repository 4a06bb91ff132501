"""Write rows to shards and commit shards in a generation; a crash loses only uncommitted rows."""

from pathlib import Path
from types import TracebackType

from mmalign.store.model_card import ModelCard
from mmalign.store.receipts import Committer, write_rows
from mmalign.store.schema import Row

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
            model: The model that made the vectors; its towers are added to those of the store.
            rows_per_shard: Rows that are written and committed together.
            precision: The arithmetic that the vectors were computed in, to be recorded.

        Raises:
            IdentityError: The store holds embeddings of another model, or of another tower.
            StoreError: Its newest generation is damaged.
        """
        self.store, self.model, self.rows_per_shard = store, model, rows_per_shard
        self.precision = precision
        self._rows: dict[str, Row] = {}
        self._committer = Committer(store, model)

    def add(self, row: Row) -> bool:
        """Add a row, which replaces the row with its id; return True if that led to a commit."""
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
        receipt = write_rows(
            self.store,
            self.model,
            list(self._rows.values()),
            precision=self.precision,
        )
        self._committer.commit([receipt])
        self._rows = {}

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
